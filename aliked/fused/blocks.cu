// Blocks 1 and 2 in half precision, all that reads their outputs at the same pixel included.
// IN, OUT: channels of the block's input and output (IN 3: the image); QUARTER: D / 4.
//
// Maps in shared memory are planes of 8 channels, 16 bytes per pixel: the left operand of a tap is
// then eight pixels side by side, without conflicts of banks. Weights come as `fragments.py` puts
// them: what a lane needs of one product is contiguous, and a lane's results are neighbouring
// channels of a pixel, so that stores are wide and a result is the next product's left operand.
// Lane 4g + t of a warp holds pixels g and g + 8 of its sixteen.
//
// The weights are scaled so that a product is x log2(e), ready for the SELU's power of two. Results
// that stay here are SELU(x) / UNIT, whose positive part is the product itself: see `fragments.py`.

typedef unsigned char byte;
constexpr int THREADS = 128, WARPS = 4;
constexpr int FRAGMENT = 256;  // bytes of the [16, 8] right operand of one product

// Bytes between planes of a map: the lanes that write one pixel meet different banks.
__device__ constexpr int plane(int pixels, int channels) {
  return (pixels + 7) / 8 * 128 + (channels > 8 ? 1024 / channels : 0);
}
__device__ constexpr int steps(int inner) { return (inner + 15) / 16; }

// The right operand of one step of a product with 8 TILES columns.
template <int TILES>
__device__ __forceinline__ void load_columns(u32 (&b)[TILES][2], const byte *fragments) {
  const int lane = threadIdx.x % 32;
  if (TILES == 1) {
    const uint2 v = ((const uint2 *)fragments)[lane];
    b[0][0] = v.x, b[0][1] = v.y;
  }
#pragma unroll
  for (int j = 0; j + 1 < TILES; j += 2) {
    const uint4 v = ((const uint4 *)fragments)[16 * j + lane];
    b[j][0] = v.x, b[j][1] = v.y, b[j + 1][0] = v.z, b[j + 1][1] = v.w;
  }
}

constexpr float UNIT = SELU_SCALE / LOG2E;

template <int TILES>
__device__ __forceinline__ void multiply(float (&d)[TILES][4], const u32 (&a)[4],
                                         const u32 (&b)[TILES][2]) {
#pragma unroll
  for (int j = 0; j < TILES; ++j) product16(d[j], a, b[j]);
}

// d = a b + c.
template <int TILES>
__device__ __forceinline__ void multiply(float (&d)[TILES][4], const u32 (&a)[4],
                                         const u32 (&b)[TILES][2], const float (&c)[TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; ++j) product16(d[j], a, b[j], c[j]);
}

// This lane's channels of a bias, as a sum starts with them.
template <int TILES>
__device__ __forceinline__ void load_bias(float (&c)[TILES][4], const float *bias) {
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i)
    c[i / 4][i % 4] = bias[threadIdx.x % 4 * 2 * TILES + i / 4 * 2 + i % 2] * LOG2E;
}

// SELU in place, in units of UNIT unless KEEP, and the results of pixels g and g + 8 in half
// precision.
template <bool KEEP, int TILES>
__device__ __forceinline__ void activate(float (&d)[TILES][4], u32 (&packed)[2][TILES]) {
  constexpr float unit = KEEP ? UNIT : 1, bottom = unit * SELU_ALPHA * LOG2E;
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] = power_below_zero(d[j][i], unit * d[j][i], bottom);
    packed[0][j] = pack(d[j][0], d[j][1]);
    packed[1][j] = pack(d[j][2], d[j][3]);
  }
}

template <int WORDS> __device__ __forceinline__ void store(byte *at, const u32 (&word)[WORDS]) {
  if (WORDS == 1) *(u32 *)at = word[0];
  if (WORDS == 2) *(uint2 *)at = make_uint2(word[0], word[1 % WORDS]);
  if (WORDS == 4)
    *(uint4 *)at = make_uint4(word[0], word[1 % WORDS], word[2 % WORDS], word[3 % WORDS]);
}

// Where this lane's channels of pixel 0 are in a map of shared memory.
template <int CHANNELS, int PLANE> __device__ __forceinline__ byte *own_channels(byte *map) {
  const int channel = threadIdx.x % 4 * (CHANNELS / 4);
  return map + channel / 8 * PLANE + channel % 8 * 2;
}

// Results of the previous product, as left operand, times CHANNELS rows of fragments.
template <int CHANNELS, int TILES>
__device__ __forceinline__ void project(float (&d)[TILES][4], const u32 (&x)[2][CHANNELS / 8],
                                        const byte *fragments) {
#pragma unroll
  for (int s = 0; s < steps(CHANNELS); ++s) {
    u32 b[TILES][2];
    load_columns(b, fragments + s * TILES * FRAGMENT);
    const float zero[TILES][4] = {};
    if (CHANNELS == 8) {
#pragma unroll
      for (int j = 0; j < TILES; ++j) product8(d[j], x[0][0], x[1][0], b[j][0], zero[j]);
    } else {
      constexpr int LAST = CHANNELS / 8 - 1;
      const u32 a[4] = {x[0][2 * s], x[1][2 * s], x[0][min(2 * s + 1, LAST)],
                        x[1][min(2 * s + 1, LAST)]};
      if (s == 0) multiply(d, a, b, zero);
      else multiply(d, a, b);
    }
  }
}

// With 8 channels a step has taps 2s and 2s + 1; the tenth has weight zero and reads the ninth.
__device__ __forceinline__ int tap_of(int s, int second) {
  return second && s < 4 ? 2 * s + 1 : 2 * s;
}

// Steps BEGIN to END of d[m] = start + 3x3 convolution, at rows 2m, 2m + 1 of 4 rows x 8 columns,
// whose top left neighbour is at `corner` of a map. Channels 8 to 15 of a step are those of the
// pixel, or of the next tap.
template <int CHANNELS, int TILES, int PITCH, int PLANE, int BEGIN, int END>
__device__ __forceinline__ void convolve_quad(float (&d)[2][TILES][4],
                                              const float (&start)[TILES][4], const byte *corner,
                                              const byte *fragments) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  corner += (lane % 8 + matrix % 2 * PITCH) * 16;
  if (CHANNELS > 8) corner += matrix / 2 * PLANE;
#pragma unroll
  for (int s = BEGIN; s < END; ++s) {
    u32 b[TILES][2];
    load_columns(b, fragments + (s - BEGIN) * TILES * FRAGMENT);
    const int part = CHANNELS == 8 ? 0 : s % (CHANNELS / 16);
    const int tap = CHANNELS > 8 ? s / (CHANNELS / 16) : tap_of(s, matrix / 2);
    const byte *at = corner + part * 2 * PLANE + (tap / 3 * PITCH + tap % 3) * 16;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      u32 a[4];
      load_matrices(a, at + 2 * m * PITCH * 16);
      if (s == 0) multiply(d[m], a, b, start);
      else multiply(d[m], a, b);
    }
  }
}

// Store what reads a block's output at sixteen pixels, rows `pixel` and `below` of eight: their
// share of the score head's first layer, [8], and SELU(projection), [QUARTER], if KEEP.
template <bool KEEP>
__device__ __forceinline__ void emit_level(const u32 (&x)[2][OUT / 8], const byte *level_fragments,
                                           const byte *score_fragments, byte *kept, byte *score,
                                           int pixel, int below) {
  const int t = threadIdx.x % 4;
  float level[QUARTER / 8][4], share[1][4];
  project<OUT, QUARTER / 8>(level, x, level_fragments);
  u32 packed[2][QUARTER / 8];
  activate<KEEP>(level, packed);
  project<QUARTER, 1>(share, packed, score_fragments);
  if (KEEP) {
    store(kept + (long long)pixel * QUARTER * 2 + t * (QUARTER / 2), packed[0]);
    store(kept + (long long)below * QUARTER * 2 + t * (QUARTER / 2), packed[1]);
  }
  *(u32 *)(score + (long long)pixel * 16 + t * 4) = pack(share[0][0], share[0][1]);
  *(u32 *)(score + (long long)below * 16 + t * 4) = pack(share[0][2], share[0][3]);
}

template <int COUNT>
__device__ __forceinline__ void copy_fragments(byte *to, const byte *from) {
  to += threadIdx.x * 16, from += threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < COUNT * FRAGMENT; i += THREADS * 16)
    if (i + THREADS * 16 <= COUNT * FRAGMENT || threadIdx.x * 16 < COUNT * FRAGMENT - i)
      copy_async(to + i, from + i);
}

#if IN == 3

constexpr int ROWS = 16, COLUMNS = 32;  // a tile of the output
// The image and the stem's map have rows of the same length, so that the stem counts pixels without
// rows; what it makes of the last two columns is not used. The products read a little further.
constexpr int PITCH = COLUMNS + 4, PIXELS = ((ROWS + 2) * PITCH + 15) / 16 * 16;
constexpr int PLANE = plane(PIXELS, OUT), IMAGE_PIXELS = PIXELS + 2 * PITCH + 4;
constexpr int TILES = OUT / 8;
// In the stem, a step is a row of the kernel: 4 pixels of 4 channels, the last of each unused.
constexpr int STEM = 0, CONV = STEM + 3 * TILES, LEVEL = CONV + steps(9 * OUT) * TILES,
              SCORE = LEVEL + QUARTER / 8, FRAGMENTS = SCORE + steps(QUARTER);

// Levels 0..255 over 256, exactly: the bits of (1024 + level) / 256 - 4 in half precision.
__device__ __forceinline__ u32 halves(u32 low, u32 high) {
  return multiply_add(low | high << 16 | 0x64006400u, 0x1C001C00u, 0xC400C400u);
}

// The tile's image with two pixels around it. Outside the padded frame is zero; between the frame
// and the image, the image's border.
__device__ __forceinline__ void load_image(uint2 *tile, const byte *image, int top, int left,
                                           int height, int width, int padded_height,
                                           int padded_width, int image_top, int image_left) {
  constexpr int ROUNDS = (IMAGE_PIXELS + THREADS - 1) / THREADS;
  u32 colours[ROUNDS][3];
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
    const int i = threadIdx.x + n * THREADS;
    int y = top - 2 + i / PITCH, x = left - 2 + i % PITCH;
    const bool inside = (u32)y < (u32)padded_height && (u32)x < (u32)padded_width;
    y = min(max(y - image_top, 0), height - 1);
    x = min(max(x - image_left, 0), width - 1);
    const byte *pixel = image + 3 * (y * width + x);
#pragma unroll
    for (int c = 0; c < 3; ++c) colours[n][c] = inside ? pixel[c] : 0;
  }
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
    const int i = threadIdx.x + n * THREADS;
    if (i < IMAGE_PIXELS)
      tile[i] = make_uint2(halves(colours[n][0], colours[n][1]), halves(colours[n][2], 0));
  }
}

// The first convolution at the tile's pixels and one around it.
__device__ __forceinline__ void stem(byte *map, const byte *image, const byte *fragments,
                                     const float *bias) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 b[3][TILES][2];
  float start[TILES][4];
#pragma unroll
  for (int r = 0; r < 3; ++r) load_columns(b[r], fragments + r * TILES * FRAGMENT);
  load_bias(start, bias);
  const int first = threadIdx.x / 32 * 16;
  const byte *source = image + (first + g) * 8 + t * 4;
  byte *own = own_channels<OUT, PLANE>(map) + (first + g) * 16;
  for (int p = first; p < PIXELS; p += WARPS * 16) {
    float d[TILES][4];
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const u32 *at = (const u32 *)source + r * PITCH * 2;
      const u32 a[4] = {at[0], at[8 * 2], at[2 * 2], at[(8 + 2) * 2]};
      if (r == 0) multiply(d, a, b[r], start);
      else multiply(d, a, b[r]);
    }
    u32 packed[2][TILES];
    activate<false>(d, packed);
    store(own, packed[0]);
    store(own + 8 * 16, packed[1]);
    source += WARPS * 16 * 8, own += WARPS * 16 * 16;
  }
}

// Zero where the stem's map is outside the frame.
__device__ __forceinline__ void clear_outside(byte *map, int top, int left, int height, int width) {
  for (int p = threadIdx.x; p < PIXELS; p += THREADS) {
    const int y = top - 1 + p / PITCH, x = left - 1 + p % PITCH;
    if ((u32)y < (u32)height && (u32)x < (u32)width) continue;
    for (int j = 0; j < TILES; ++j) *(uint4 *)(map + j * PLANE + p * 16) = make_uint4(0, 0, 0, 0);
  }
}

// Means of 2x2 pixels of 4 rows x 8 columns. Lanes of even columns take the upper two rows.
__device__ __forceinline__ void emit_means(const float (&d)[2][TILES][4], byte *pooled, int row,
                                           int column, int width) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool odd = g % 2;
  float means[2 * TILES];
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
    const float upper = d[0][i / 2][i % 2] + d[0][i / 2][2 + i % 2];
    const float lower = d[1][i / 2][i % 2] + d[1][i / 2][2 + i % 2];
    const float other = __shfl_xor_sync(FULL_WARP, odd ? upper : lower, 4);
    means[i] = ((odd ? lower : upper) + other) * 0.25f;
  }
  u32 packed[TILES];
#pragma unroll
  for (int j = 0; j < TILES; ++j) packed[j] = pack(means[2 * j], means[2 * j + 1]);
  const long long pixel = (long long)(row + odd) * width + column + g / 2;
  store(pooled + pixel * OUT * 2 + t * (OUT / 2), packed);
}

extern "C" __global__ void __launch_bounds__(THREADS, 5)
    block1(const byte *images, const byte *fragments, const float *stem_bias, const float *bias,
           byte *kept, byte *pooled, byte *score, int height, int width, int padded_height,
           int padded_width, int image_top, int image_left) {
  __shared__ __align__(16) byte weights[FRAGMENTS * FRAGMENT];
  __shared__ __align__(16) uint2 image[IMAGE_PIXELS];
  __shared__ __align__(16) byte map[TILES * PLANE];
  const int top = blockIdx.y * ROWS, left = blockIdx.x * COLUMNS;
  const long long size = (long long)padded_height * padded_width, b = blockIdx.z;
  copy_fragments<FRAGMENTS>(weights, fragments);
  await_previous_kernel();
  load_image(image, images + b * height * width * 3, top, left, height, width, padded_height,
             padded_width, image_top, image_left);
  wait_for_copies();
  __syncthreads();
  stem(map, (const byte *)image, weights + STEM * FRAGMENT, stem_bias);
  __syncthreads();
  if (top == 0 || left == 0 || top + ROWS == padded_height || left + COLUMNS == padded_width) {
    clear_outside(map, top, left, padded_height, padded_width);
    __syncthreads();
  }

  kept += b * size * OUT * 2, pooled += b * (size / 4) * OUT * 2, score += b * size * 16;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int strip = threadIdx.x / 32 * 8;
  float start[TILES][4];
  load_bias(start, bias);
  for (int row = 0; row < ROWS; row += 4) {
    float d[2][TILES][4];
    convolve_quad<OUT, TILES, PITCH, PLANE, 0, steps(9 * OUT)>(
        d, start, map + 16 * (row * PITCH + strip), weights + CONV * FRAGMENT);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      u32 packed[2][TILES];
      activate<true>(d[m], packed);
      const int pixel = (top + row + 2 * m) * padded_width + left + strip + g;
      const int below = pixel + padded_width;
      store(kept + (long long)pixel * OUT * 2 + t * (OUT / 2), packed[0]);
      store(kept + (long long)below * OUT * 2 + t * (OUT / 2), packed[1]);
      emit_level<false>(packed, weights + LEVEL * FRAGMENT, weights + SCORE * FRAGMENT, nullptr,
                        score, pixel, below);
    }
    emit_means(d, pooled, (top + row) / 2, (left + strip) / 2, padded_width / 2);
  }
}

#else

constexpr int ROWS = 8, COLUMNS = 16;  // a tile of the output: 4 rows x 8 columns for each warp
constexpr int BELOW_PITCH = COLUMNS + 4, BELOW_ROWS = ROWS + 4;
constexpr int BELOW_PLANE = plane(BELOW_ROWS * BELOW_PITCH, IN);
constexpr int PITCH = COLUMNS + 2, PIXELS = (ROWS + 2) * PITCH, PLANE = plane(PIXELS, OUT);
constexpr int TILES = OUT / 8, SIXTEENS = 3;  // sixteen pixels each, of a warp in the first layer
static_assert(WARPS * SIXTEENS * 16 >= PIXELS, "the warps reach every pixel");
constexpr int FIRST = 0, SECOND = FIRST + steps(9 * IN) * TILES,
              SHORTCUT = SECOND + steps(9 * OUT) * TILES, LEVEL = SHORTCUT + TILES,
              SCORE = LEVEL + steps(OUT) * (QUARTER / 8), FRAGMENTS = SCORE + steps(QUARTER);
// When the first layer is done, the last fragments take the place of its own: what follows the
// second layer, and as many of that layer's steps as there is room for.
constexpr int LATE_STEPS = (SECOND - (FRAGMENTS - SHORTCUT)) / TILES;
constexpr int EARLY_STEPS = steps(9 * OUT) - LATE_STEPS, LATE = SECOND + EARLY_STEPS * TILES;
static_assert(LATE_STEPS > 0, "there is room");

// The tile's input with two pixels around it, zero outside the map.
__device__ __forceinline__ void load_below(byte *tile, const byte *x, int top, int left, int height,
                                           int width) {
  constexpr int PARTS = IN / 8;
#pragma unroll
  for (int i = threadIdx.x; i < BELOW_ROWS * BELOW_PITCH * PARTS; i += THREADS) {
    const int p = i / PARTS, part = i % PARTS;
    const int row = top - 2 + p / BELOW_PITCH, column = left - 2 + p % BELOW_PITCH;
    const bool inside = (u32)row < (u32)height && (u32)column < (u32)width;
    const byte *pixel = x + (long long)(row * width + column) * (IN * 2);
    copy_async(tile + part * BELOW_PLANE + 16 * p, pixel + part * 16, inside);
  }
}

// d[m] = start + 3x3 convolution of the input at sixteen pixels; at[m] is the top left neighbour of
// this lane's of them.
__device__ __forceinline__ void convolve_below(float (&d)[SIXTEENS][TILES][4],
                                               const float (&start)[TILES][4],
                                               const byte *const (&at)[SIXTEENS],
                                               const byte *fragments) {
  const bool second = threadIdx.x % 32 / 16;
#pragma unroll
  for (int s = 0; s < steps(9 * IN); ++s) {
    u32 b[TILES][2];
    load_columns(b, fragments + s * TILES * FRAGMENT);
    const int tap = IN == 8 ? tap_of(s, second) : s;
    const int offset = (tap / 3 * BELOW_PITCH + tap % 3) * 16;
#pragma unroll
    for (int m = 0; m < SIXTEENS; ++m) {
      u32 a[4];
      load_matrices(a, at[m] + offset);
      if (s == 0) multiply(d[m], a, b, start);
      else multiply(d[m], a, b);
    }
  }
}

// The first layer at the tile's pixels and one around it, zero outside the map.
__device__ __forceinline__ void first_layer(byte *map, const byte *below, const byte *fragments,
                                            const float *bias, int top, int left, int height,
                                            int width) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  const int begin = threadIdx.x / 32 * SIXTEENS * 16;
  const byte *at[SIXTEENS];
#pragma unroll
  for (int m = 0; m < SIXTEENS; ++m) {
    const int p = min(begin + 16 * m + lane % 16, PIXELS - 1);
    at[m] = below + 16 * (p / PITCH * BELOW_PITCH + p % PITCH);
    if (IN > 8) at[m] += lane / 16 * BELOW_PLANE;
  }
  float d[SIXTEENS][TILES][4], start[TILES][4];
  load_bias(start, bias);
  convolve_below(d, start, at, fragments);
  byte *own = own_channels<OUT, PLANE>(map);
#pragma unroll
  for (int m = 0; m < SIXTEENS; ++m) {
    u32 packed[2][TILES];
    activate<false>(d[m], packed);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int p = begin + 16 * m + 8 * h + g;
      const int row = top - 1 + p / PITCH, column = left - 1 + p % PITCH;
      const bool inside = (u32)row < (u32)height && (u32)column < (u32)width;
#pragma unroll
      for (int j = 0; j < TILES; ++j) packed[h][j] = inside ? packed[h][j] : 0;
      if (p < PIXELS) store(own + 16 * p, packed[h]);
    }
  }
}

// d += the input at 4 rows x 8 columns, from `corner` on, times the shortcut's weight.
__device__ __forceinline__ void add_shortcut(float (&d)[2][TILES][4], const byte *corner,
                                             const byte *fragments) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  u32 b[TILES][2];
  load_columns(b, fragments);
  corner += lane % 8 * 16;
  if (IN == 8) {
    u32 a[4];
    load_matrices(a, corner + matrix * BELOW_PITCH * 16);
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      product8(d[0][j], a[0], a[1], b[j][0]);
      product8(d[1][j], a[2], a[3], b[j][0]);
    }
    return;
  }
  corner += matrix % 2 * BELOW_PITCH * 16 + matrix / 2 * BELOW_PLANE;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    u32 a[4];
    load_matrices(a, corner + 2 * m * BELOW_PITCH * 16);
    multiply(d[m], a, b);
  }
}

// Means of 4x4 pixels of 4 rows x 8 columns.
__device__ __forceinline__ void emit_means(const float (&d)[2][TILES][4], byte *pooled, int row,
                                           int column, int width) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float means[2 * TILES];
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
    const int j = i / 2, k = i % 2;
    float sum = d[0][j][k] + d[0][j][2 + k] + d[1][j][k] + d[1][j][2 + k];
    sum += __shfl_xor_sync(FULL_WARP, sum, 4);
    means[i] = (sum + __shfl_xor_sync(FULL_WARP, sum, 8)) * 0.0625f;
  }
  u32 packed[TILES];
#pragma unroll
  for (int j = 0; j < TILES; ++j) packed[j] = pack(means[2 * j], means[2 * j + 1]);
  const long long pixel = (long long)row * width + column + g / 4;
  if (g % 4 == 0) store(pooled + pixel * OUT * 2 + t * (OUT / 2), packed);
}

extern "C" __global__ void __launch_bounds__(THREADS, 5)
    block2(const byte *x, const byte *fragments, const float *first_bias, const float *bias,
           byte *kept, byte *pooled, byte *score, int height, int width) {
  __shared__ __align__(16) byte weights[LATE * FRAGMENT];
  __shared__ __align__(16) byte below[IN / 8 * BELOW_PLANE];
  __shared__ __align__(16) byte map[TILES * PLANE];
  const int top = blockIdx.y * ROWS, left = blockIdx.x * COLUMNS;
  const long long size = (long long)height * width, b = blockIdx.z;
  await_previous_kernel();
  load_below(below, x + b * size * IN * 2, top, left, height, width);
  copy_fragments<SECOND>(weights, fragments);
  end_group_of_copies();
  copy_fragments<LATE - SECOND>(weights + SECOND * FRAGMENT, fragments + SECOND * FRAGMENT);
  end_group_of_copies();
  wait_for_all_but_last_group();
  __syncthreads();
  first_layer(map, below, weights + FIRST * FRAGMENT, first_bias, top, left, height, width);
  wait_for_copies();
  __syncthreads();
  copy_fragments<FRAGMENTS - LATE>(weights, fragments + LATE * FRAGMENT);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 2 * 4, column = warp % 2 * 8;
  float d[2][TILES][4], start[TILES][4];
  load_bias(start, bias);
  const byte *corner = map + 16 * (row * PITCH + column);
  convolve_quad<OUT, TILES, PITCH, PLANE, 0, EARLY_STEPS>(d, start, corner,
                                                          weights + SECOND * FRAGMENT);
  wait_for_copies();
  __syncthreads();
  convolve_quad<OUT, TILES, PITCH, PLANE, EARLY_STEPS, EARLY_STEPS + LATE_STEPS>(d, start, corner,
                                                                                 weights);
  add_shortcut(d, below + 16 * ((row + 2) * BELOW_PITCH + column + 2),
               weights + (SHORTCUT - LATE) * FRAGMENT);

  kept += b * size * QUARTER * 2, pooled += b * (size / 16) * OUT * 2, score += b * size * 16;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    u32 packed[2][TILES];
    activate<true>(d[m], packed);
    const int pixel = (top + row + 2 * m) * width + left + column + lane / 4;
    emit_level<true>(packed, weights + (LEVEL - LATE) * FRAGMENT,
                     weights + (SCORE - LATE) * FRAGMENT, kept, score, pixel, pixel + width);
  }
  emit_means(d, pooled, (top + row) / 4, (left + column) / 4, width / 4);
}

#endif
