// The score head in one pass: the levels' shares added up, three 3x3 convolutions, the sigmoid. A
// tile of 64 columns with its halo stays in shared memory; every convolution reads half precision
// and adds up in float32. All stages use the same 64 columns: each loses one at either side, except
// at the border of the frame, where what is outside counts as zero.
//
// A product has 16 pairs of neighbouring pixels as rows and 2 pixels times 4 channels as columns:
// its inner size is a row of the 4 pixels around the pair, times channels.
//
// Defined before this text: DOWN, the rows of scores of a tile; BLOCKS, of a multiprocessor; TALLY,
// the integers per image that are set to zero on the way.

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int WIDE = 64, ACROSS = 58;         // columns of a tile, and from one tile to the next
constexpr int MARGIN = 3;                     // what three 3x3 windows add to a tile's rows
constexpr int ROWS = DOWN + 2 * MARGIN;
// Pixels of levels 2, 3 and 4 (1/2, 1/8 and 1/32 of the size) that 64 pixels are interpolated from.
constexpr int PIXELS2 = WIDE / 2 + 2, PIXELS3 = WIDE / 8 + 2, PIXELS4 = WIDE / 32 + 2;
constexpr int PIXELS = PIXELS2 + PIXELS3 + PIXELS4;
// Rows of maps in shared memory have a pixel of zeros at either end. With 8 channels, even and odd
// pixels are apart, so that neighbouring pairs are neighbours.
constexpr int HALF_ROW = (WIDE + 2) / 2;      // in 16 bytes: a pixel of 8 channels, or two of 4
constexpr int FULL_ROW = 2 * HALF_ROW;
constexpr int PARTS = WARPS / 2;              // of a tile's rows, each the work of two warps

static_assert(ROWS % 2 == 0 && (ROWS - 2) % PARTS == 0 && DOWN % 4 == 0, "the warps' shares");
static_assert((ROWS + 1) * HALF_ROW <= ROWS * PIXELS, "the first convolution replaces the levels");

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.f, 1.f + __expf(-x));
}

// Between which pixels of a level a pixel of the full map lies: the first, counted from the tile's
// first, and the weight of the next. Weights are multiples of 2^-11, so that both are exact in half
// precision and add up to 1.
struct Place {
  int pixel;
  float next;
  __device__ Place(int at, float scale, int first) {
    const float position = at * scale;
    pixel = int(position);
    next = (position - pixel + 4096.f) - 4096.f;
    pixel -= first;
  }
  __device__ float weight(int i) const {
    return i == pixel ? 1.f - next : i == pixel + 1 ? next : 0.f;
  }
  __device__ u32 weights(int i) const { return pack(weight(i), weight(i + 1)); }
};

// Along one side of a level, of 1 / 2^shift of the frame's size: how many pixels, and how many per
// pixel of the frame, corners aligned.
struct Side {
  int size;
  float scale;
  __device__ Side(int full_size, int shift) {
    size = full_size >> shift;
    scale = __fdividef(float(size - 1), float(full_size - 1));
  }
  __device__ int first(int at) const { return int(at * scale); }
};

__device__ __forceinline__ u32 between(u32 a, u32 b, u32 share) {
  const u32 minus_one = 0xBC00BC00u;
  return multiply_add(share, multiply_add(a, minus_one, b), a);
}

// Interpolate the levels' pixels between rows: [ROWS, PIXELS], of all three levels side by side.
__device__ __forceinline__ void interpolate_rows(uint4 *pixels, const uint4 *s2, const uint4 *s3,
                                                 const uint4 *s4, int top, int left, int height,
                                                 int width) {
  constexpr int AT_ONCE = THREADS / PIXELS;
  const int thread = 32 * threadIdx.y + threadIdx.x, i = thread % PIXELS;
  if (thread >= AT_ONCE * PIXELS) return;
  const bool second = i < PIXELS2, third = i < PIXELS2 + PIXELS3;
  const int shift = second ? 1 : third ? 3 : 5;
  const int from = second ? 0 : third ? PIXELS2 : PIXELS2 + PIXELS3;
  const Side down(height, shift), across(width, shift);
  const uint4 *level = second ? s2 : third ? s3 : s4;
  level += (unsigned long long)(u32)(down.size * across.size) * blockIdx.x;
  level += min(across.first(left) + i - from, across.size - 1);
  const char *const column = (const char *)level;
  const int pitch = 16 * across.size;
#pragma unroll
  for (int j = 0; j < (ROWS + AT_ONCE - 1) / AT_ONCE; ++j) {
    const int row = thread / PIXELS + j * AT_ONCE;
    const float position = min(max(top + row, 0), height - 1) * down.scale;
    const int upper = int(position), lower = min(upper + 1, down.size - 1);
    const u32 share = pack(position - upper, position - upper);
    const uint4 a = *(const uint4 *)(column + (long long)upper * pitch);
    const uint4 b = *(const uint4 *)(column + (long long)lower * pitch);
    if (row < ROWS)
      pixels[row * PIXELS + i] = make_uint4(between(a.x, b.x, share), between(a.y, b.y, share),
                                            between(a.z, b.z, share), between(a.w, b.w, share));
  }
}

// Where pixel `column` of a row is, in pixels: in order, or even and odd ones apart.
template <bool APART> __device__ __forceinline__ int place_of(int column) {
  const int at = column + 1;
  return APART ? at % 2 * HALF_ROW + at / 2 : at;
}

// The sum of all shares and its activation. A warp makes 16 columns of half of the rows: products
// of weights [16 pixels, 16 + 8] with the pixels of level 2, and of levels 3 and 4.
struct Blend {
  u32 second[4], others[2];  // the weights
  const uint4 *pixels;       // the row that this lane gives to products
  __device__ Blend(const uint4 *rows, int column, int left, int width) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, k = lane % 8;
    const Side level2(width, 1), level3(width, 3), level4(width, 5);
    const int first2 = level2.first(left + column), first3 = level3.first(left + column),
              first4 = level4.first(left + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int x = left + column + g + 8 * i;
      const Place fine(x, level2.scale, first2);
      const Place coarse(x, t < 2 ? level3.scale : level4.scale, t < 2 ? first3 : first4);
      second[i] = fine.weights(2 * t);
      second[i + 2] = fine.weights(2 * t + 8);
      others[i] = coarse.weights(2 * t % 4);
    }
    const int at2 = first2 - level2.first(left) + lane % 16;
    const int at3 = PIXELS2 + first3 - level3.first(left) + k;
    const int at4 = PIXELS2 + PIXELS3 + first4 - level4.first(left) + k - 4;
    pixels = rows + (lane < 16 ? min(at2, PIXELS2 - 1)
                               : k < 4 ? min(at3, PIXELS2 + PIXELS3 - 1) : min(at4, PIXELS - 1));
  }
};

__device__ __forceinline__ void blend(unsigned char *out, uint4 *rows, const u32 *s1,
                                      const uint4 *s2, const uint4 *s3, const uint4 *s4, int top,
                                      int left, int height, int width) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int column = threadIdx.y % 4 * 16, begin = threadIdx.y / 4 * (ROWS / 2);
  const int x = left + column + g;  // what is outside the frame is cleared later
  const char *const s1_left = (const char *)(s1 + (min(x, width - 1) * 4 + t));
  const char *const s1_right = (const char *)(s1 + (min(x + 8, width - 1) * 4 + t));
  u32 own[ROWS / 2][2];  // asked for before anything has to wait
#pragma unroll
  for (int i = 0; i < ROWS / 2; ++i) {
    const long long row = (long long)min(max(top + begin + i, 0), height - 1) * (16 * width);
    own[i][0] = *(const u32 *)(s1_left + row);
    own[i][1] = *(const u32 *)(s1_right + row);
  }
  interpolate_rows(rows, s2, s3, s4, top, left, height, width);
  const Blend weights(rows, column, left, width);
  out += 16 * (begin * FULL_ROW + place_of<true>(column + g)) + 4 * t;
  __syncthreads();
  float sums[2][4];  // a row's products start before the row above is finished
#pragma unroll
  for (int i = 0; i <= ROWS / 2; ++i) {
    if (i < ROWS / 2) {
      const float start[4] = {low_half(own[i][0]), high_half(own[i][0]), low_half(own[i][1]),
                              high_half(own[i][1])};
      u32 b[4];
      load_transposed(b, weights.pixels + (begin + i) * PIXELS);
      product16(sums[i % 2], weights.second, {b[0], b[1]}, start);
      product8(sums[i % 2], weights.others[0], weights.others[1], b[2]);
    }
    if (i > 0) {
      const float (&sum)[4] = sums[(i - 1) % 2];
      unsigned char *const row = out + 16 * FULL_ROW * (i - 1);
      *(u32 *)row = pack(selu(sum[0]), selu(sum[1]));
      *(u32 *)(row + 16 * 4) = pack(selu(sum[2]), selu(sum[3]));
    }
  }
}

// Zero what lies outside the frame; the tile's first column is inside.
template <bool APART, typename Pixel>
__device__ __forceinline__ void clear_outside(Pixel *map, int top, int left, int height,
                                              int width) {
  __syncthreads();
#pragma unroll 1
  for (int row = threadIdx.y; row < ROWS; row += WARPS)
#pragma unroll 1
    for (int column = threadIdx.x; column < WIDE; column += 32)
      if (top + row < 0 || top + row >= height || left + column >= width)
        map[row * FULL_ROW + place_of<APART>(column)] = Pixel();
}

// A 3x3 convolution and its activation for 32 columns of rows [first, first + COUNT) of the tile.
// `in` is what this lane gives to products in row 0, `step` the bytes from there to the next
// product of the row. A row of 4 channels takes HALF_ROW * 16 bytes.
template <int STEPS, int COUNT>
__device__ __forceinline__ void convolve(unsigned char *out, const unsigned char *in, int pitch,
                                         int step, const uint2 *fragments, const float *bias,
                                         int first) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4, column = threadIdx.y % 2 * 32;
  uint2 b[3][STEPS];
#pragma unroll
  for (int i = 0; i < 3 * STEPS; ++i) b[i / STEPS][i % STEPS] = fragments[32 * i + lane];
  const float2 two = *(const float2 *)(bias + lane % 2 * 2);
  const float start[4] = {two.x, two.y, two.x, two.y};
  in += (first - 1) * pitch;
  out += first * HALF_ROW * 16 + 8 * (column + 1) + 16 * g + 4 * t;
  float sums[4][4];  // rows that have begun; one more than they need, as above
#pragma unroll
  for (int i = 0; i < COUNT + 3; ++i) {
#pragma unroll
    for (int s = 0; s < STEPS && i < COUNT + 2; ++s) {
      u32 a[4];
      load_matrices(a, in + i * pitch + s * step);
#pragma unroll
      for (int row = 0; row < 3; ++row) {
        if (i < row || i - row >= COUNT) continue;
        float (&sum)[4] = sums[(i - row) % 4];
        if (row == 0 && s == 0)
          product16(sum, a, {b[0][0].x, b[0][0].y}, start);
        else
          product16(sum, a, {b[row][s].x, b[row][s].y});
      }
    }
    if (i < 3) continue;
    const float (&sum)[4] = sums[(i - 3) % 4];
    unsigned char *const row = out + (i - 3) * HALF_ROW * 16;
    *(u32 *)row = pack(selu(sum[0]), selu(sum[1]));
    *(u32 *)(row + 8 * 16) = pack(selu(sum[2]), selu(sum[3]));
  }
}

// The last convolution and the sigmoid for 32 columns of 4 rows: a product's columns are 4 rows of
// 2 pixels, so 6 rows go in.
__device__ __forceinline__ void finish(float *scores, const unsigned char *in,
                                       const uint2 *fragments, int row, int column, int top,
                                       int left, int begin, int end, int height, int width) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sum[4] = {0, 0, 0, 0};
  in += (row - 1) * HALF_ROW * 16;
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    u32 a[4];
    load_matrices(a, in + i * HALF_ROW * 16);
    const uint2 b = fragments[32 * i + lane];
    product16(sum, a, {b.x, b.y});
  }
  const int y = top + row + t;
  if (y < 0 || y >= height) return;
  scores += (long long)y * width + left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = column + 2 * g + i % 2 + i / 2 * 16, x = left + c;
    if (c >= begin && c < end && x >= 0 && x < width) scores[c] = sigmoid(sum[i]);
  }
}

// [B, H, W, 8] and the levels' shares to float32 [B, height, width] of the frame, from row `top`
// and column `left` on. fragments: [3 * 2 + 3 + 6, 32] of weights.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
score_head(const u32 *s1, const uint4 *s2, const uint4 *s3, const uint4 *s4, const uint2 *fragments,
           const float *first_bias, const float *second_bias, float *scores, int *tally,
           int full_height, int full_width, int top, int left, int height, int width) {
  __shared__ uint4 blended[ROWS * FULL_ROW], pixels[ROWS * PIXELS];
  const int lane = threadIdx.x, warp = threadIdx.y, thread = 32 * warp + lane;
  const int y0 = top + int(blockIdx.y) * DOWN - MARGIN, x0 = blockIdx.z * ACROSS;
  const int tile = blockIdx.z * gridDim.y + blockIdx.y, tiles = gridDim.z * gridDim.y;
  await_previous_kernel();
#pragma unroll 1
  for (int i = tile * THREADS + thread; i < TALLY; i += tiles * THREADS)
    tally[(long long)blockIdx.x * TALLY + i] = 0;
  s1 += (long long)blockIdx.x * full_height * full_width * 4;
  if (thread < 2 * ROWS)  // the first pixel is even, the last is odd
    blended[thread / 2 * FULL_ROW + thread % 2 * (FULL_ROW - 1)] = make_uint4(0, 0, 0, 0);
  const bool edge = y0 < 0 || y0 + ROWS > full_height || x0 + WIDE > full_width;
  blend((unsigned char *)blended, pixels, s1, s2, s3, s4, y0, x0, full_height, full_width);
  if (edge) clear_outside<true>(blended, y0, x0, full_height, full_width);
  __syncthreads();

  // The first convolution's output takes the place of `pixels`, the second's that of `blended`.
  uint2 *const first = (uint2 *)pixels, *const second = (uint2 *)blended;
  const int pair = warp % 2 * 16 + lane % 16, share = warp / 2;
  if (thread < 2 * ROWS)
    first[thread / 2 * FULL_ROW + thread % 2 * (FULL_ROW - 1)] = make_uint2(0, 0);
  constexpr int COUNT = (ROWS - 2) / PARTS;
  convolve<2, COUNT>((unsigned char *)first,
                     (const unsigned char *)(blended + lane / 16 * HALF_ROW + pair), 16 * FULL_ROW,
                     16, fragments, first_bias, 1 + share * COUNT);
  if (edge) clear_outside<false>(first, y0, x0, full_height, full_width);
  __syncthreads();
  // Two rows less than there are shares for: the last two are made of anything, and not used.
  if (thread < 2 * ROWS)
    second[thread / 2 * FULL_ROW + thread % 2 * (FULL_ROW - 1)] = make_uint2(0, 0);
  convolve<1, COUNT>((unsigned char *)second, (const unsigned char *)(pixels + pair + lane / 16),
                     16 * HALF_ROW, 0, fragments + 6 * 32, second_bias, 2 + share * COUNT);
  if (edge) clear_outside<false>(second, y0, x0, full_height, full_width);
  __syncthreads();

  const int begin = blockIdx.z == 0 ? 0 : MARGIN;
  const int end = blockIdx.z == gridDim.z - 1 ? WIDE : WIDE - MARGIN;
  scores += (long long)blockIdx.x * height * width;
  for (int task = warp; task < 2 * (DOWN / 4); task += WARPS) {
    const int column = task % 2 * 32, row = MARGIN + task / 2 * 4;
    const uint4 *in = blended + (column / 2 + lane % 16 + lane / 16);
    finish(scores, (const unsigned char *)in, fragments + 9 * 32, row, column, y0 - top, x0 - left,
           begin, end, height, width);
  }
}
