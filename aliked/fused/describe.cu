// Descriptors in half precision: where to sample, then samples, projection and aggregation.
//
// Four lanes (a quad) share a pixel: register i of a level holds channels QUARTER / 4 * t + 2 i and
// the next in lane t. Such registers of eight pixels are an operand of a matrix product without any
// exchange, as its inner index may run in any order: the weights have the same one (`fragments.py`).
//
// Places in a map of one image count in 32 bits, images in 64.
//
// Defined before this text: C1, QUARTER, POSITIONS.

constexpr int DIM = 4 * QUARTER;
constexpr int REGS = QUARTER / 8;   // of a lane, per level of a pixel
constexpr int INNER = C1 / 8;       // registers of a lane for the first level before its projection

struct Level {
  const u32 *values;
  int height, width;
  float scale_y, scale_x;  // of its pixels, per pixel of the padded frame
};

struct Maps {
  const u32 *x1;
  Level levels[3];
  int height, width;  // of the padded frame
};

// N words, aligned to as many bytes as they have, at most 16.
template <int N> __device__ __forceinline__ void load(u32 (&to)[N], const u32 *from) {
  if constexpr (N >= 4) {
    for (int i = 0; i < N; i += 4) {
      const uint4 v = *(const uint4 *)(from + i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else if constexpr (N == 2) {
    const uint2 v = *(const uint2 *)from;
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *from;
  }
}

// As above; zeros where not `used`. A branch would be dearer.
__device__ __forceinline__ void load_if(u32 (&to)[4], const u32 *from, bool used) {
  const uint4 v = load_early((const uint4 *)from, used);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_if(u32 (&to)[2], const u32 *from, bool used) {
  const uint2 v = load_early((const uint2 *)from, used);
  to[0] = v.x, to[1] = v.y;
}

__device__ __forceinline__ u32 both(float value) { return pack(value, value); }

// SELU of y for x = y log2(e): the weights bring the factor.
__device__ __forceinline__ float selu_of_power(float x) {
  const float ln2 = 0.6931471805599453f;
  return power_below_zero(x, SELU_SCALE * ln2 * x, SELU_SCALE * SELU_ALPHA);
}

// The maps of image `b`.
__device__ __forceinline__ Maps maps_of(Maps maps, int b) {
  maps.x1 += size_t(b) * maps.height * maps.width * (C1 / 2);
  for (Level &level : maps.levels)
    level.values += size_t(b) * level.height * level.width * (QUARTER / 2);
  return maps;
}

// The projection of the first level: of lane's rows (see `product16`) for each 8 channels.
struct Projection {
  u32 weights[REGS][2];

  __device__ __forceinline__ Projection(const u32 *fragments, int lane) {
    u32 all[REGS * INNER];
    load(all, fragments + lane * REGS * INNER);
    for (int i = 0; i < REGS; ++i)
      for (int k = 0; k < INNER; ++k) weights[i][k] = all[i * INNER + k];
  }

  // SELU of the projected pixels of rows g (`low`) and g + 8 (`high`).
  __device__ __forceinline__ void apply(u32 (&low)[REGS], u32 (&high)[REGS], const u32 (&x)[INNER],
                                        const u32 (&y)[INNER]) const {
#pragma unroll
    for (int i = 0; i < REGS; ++i) {
      float sums[4] = {};
      if constexpr (INNER == 2) {
        const u32 a[4] = {x[0], y[0], x[1], y[1]};
        product16(sums, a, weights[i]);
      } else {
        product8(sums, x[0], y[0], weights[i][0]);
      }
      low[i] = pack(selu_of_power(sums[0]), selu_of_power(sums[1]));
      high[i] = pack(selu_of_power(sums[2]), selu_of_power(sums[3]));
    }
  }
};

// Places in a frame are whole numbers from 0 on in float32: conversions are dear. This one is for
// less than 2^23, rounding down: above 2^23 the lowest bits of a float32 count ones.
__device__ __forceinline__ int whole(float x) {
  return __float_as_int(__fadd_rd(x, 0x1p23f)) & 0x7FFFFF;
}
__device__ __forceinline__ float rounded_down(float x) { return __fadd_rd(x, 0x1p23f) - 0x1p23f; }
__device__ __forceinline__ float clamp(float x, int size) {
  return fminf(fmaxf(x, 0.f), size - 1.f);
}

// Where a pixel of the padded frame lies in a level along one axis: between `first` and the next.
struct Between {
  int first, next;
  float share;  // of the next
};

__device__ __forceinline__ Between between(float at, float scale, int size) {
  const float source = at * scale;
  const int first = whole(source);
  return {first, min(first + 1, size - 1), source - rounded_down(source)};
}

// A level at one pixel (y, x) of the padded frame, corners aligned.
__device__ __forceinline__ void upsample(u32 (&out)[REGS], const Level &level, float y, float x,
                                         int t) {
  const Between row = between(y, level.scale_y, level.height);
  const Between column = between(x, level.scale_x, level.width);
  const u32 *at = level.values + t * REGS;
  u32 corners[4][REGS];
  for (int i = 0; i < 4; ++i) {
    const int pixel = (i / 2 ? row.next : row.first) * level.width +
                      (i % 2 ? column.next : column.first);
    load(corners[i], at + pixel * (QUARTER / 2));
  }
  const float below = row.share, right = column.share;
  const u32 shares[4] = {both((1 - below) * (1 - right)), both((1 - below) * right),
                         both(below * (1 - right)), both(below * right)};
#pragma unroll
  for (int i = 0; i < REGS; ++i) {
    out[i] = multiply_add(corners[0][i], shares[0], 0);
    for (int k = 1; k < 4; ++k) out[i] = multiply_add(corners[k][i], shares[k], out[i]);
  }
}

// Along one axis, two neighbouring pixels lie between three of a level, which is at most half as
// large: their shares of each. `wide` where the second needs the third.
struct Pair {
  int at[3];
  u32 first[2], second[3];
  bool wide;
};

__device__ __forceinline__ Pair pair_between(const float (&at)[2], float scale, int size) {
  const Between one = between(at[0], scale, size), two = between(at[1], scale, size);
  Pair pair;
  pair.wide = two.first > one.first;
  pair.at[0] = one.first, pair.at[1] = one.next, pair.at[2] = two.next;
  const u32 near = both(1 - two.share), far = both(two.share);
  pair.first[0] = both(1 - one.share), pair.first[1] = both(one.share);
  pair.second[0] = pair.wide ? 0 : near;
  pair.second[1] = pair.wide ? near : far;
  pair.second[2] = pair.wide ? far : 0;
  return pair;
}

// A level at the four pixels (y[i / 2], x[i % 2]) of the padded frame.
__device__ __forceinline__ void upsample_square(u32 (&out)[4][REGS], const Level &level,
                                                const float (&y)[2], const float (&x)[2], int t) {
  const Pair rows = pair_between(y, level.scale_y, level.height);
  const Pair columns = pair_between(x, level.scale_x, level.width);
  const char *values = (const char *)(level.values + t * REGS);
  const u32 stride = level.width * QUARTER * 2;  // bytes
#pragma unroll
  for (int r = 0; r < 3; ++r) {
    const char *row = values + (unsigned long long)u32(rows.at[r]) * stride;
    u32 source[3][REGS];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const u32 *from = (const u32 *)(row + u32(columns.at[c] * QUARTER * 2));
      if (r < 2 && c < 2) load(source[c], from);
      else load_if(source[c], from, (r < 2 || rows.wide) && (c < 2 || columns.wide));
    }
#pragma unroll
    for (int i = 0; i < REGS; ++i) {
      u32 left = multiply_add(source[0][i], columns.first[0], 0);
      left = multiply_add(source[1][i], columns.first[1], left);
      u32 right = multiply_add(source[0][i], columns.second[0], 0);
      right = multiply_add(source[1][i], columns.second[1], right);
      right = multiply_add(source[2][i], columns.second[2], right);
      if (r < 2) {
        out[0][i] = multiply_add(left, rows.first[r], r ? out[0][i] : 0);
        out[1][i] = multiply_add(right, rows.first[r], r ? out[1][i] : 0);
      }
      out[2][i] = multiply_add(left, rows.second[r], r ? out[2][i] : 0);
      out[3][i] = multiply_add(right, rows.second[r], r ? out[3][i] : 0);
    }
  }
}

// The sum of squares of the eight pixels whose registers the quads of a warp have: the diagonal of
// products of those pixels with themselves, in float32. Register 2 i + 1 takes rows 8 to 15, so that
// pairs of registers are operands as they are.
struct Squares {
  float even[4] = {}, odd[4] = {};

  __device__ __forceinline__ void add(const u32 (&values)[REGS]) {
#pragma unroll
    for (int i = 0; i < REGS; i += 2) {
      product8(even, values[i], values[i + 1], values[i]);
      product8(odd, values[i], values[i + 1], values[i + 1]);
    }
  }

  // That of a lane's own quad: place (g, g) is in lane g / 2 of it.
  __device__ __forceinline__ float sum(int lane) const {
    const float mine = lane / 4 % 2 ? even[1] + odd[3] : even[0] + odd[2];
    return __shfl_sync(FULL_WARP, mine, (lane & ~3) + lane / 8);
  }
};

__device__ __forceinline__ float reciprocal_length(float squares) {
  return rsqrtf(squares > 1e-12f ? squares : 1e-12f);
}

struct Geometry {
  int top, left, height, width;  // of the image in the padded frame
};

__device__ __forceinline__ bool inside(const Geometry &image, float y, float x) {
  return y >= 0 && y < image.height && x >= 0 && x < image.width;
}

#define MAPS_PARAMETERS                                                                           \
  const u32 *x1, const u32 *f2, const u32 *f3, const u32 *f4, int padded_height,                  \
      int padded_width, int height2, int width2, int scale_y2, int scale_x2, int height3,         \
      int width3, int scale_y3, int scale_x3, int height4, int width4, int scale_y4, int scale_x4
#define LEVEL_OF(n)                                                                               \
  {f##n, height##n, width##n, __int_as_float(scale_y##n), __int_as_float(scale_x##n)}
#define MAPS {x1, {LEVEL_OF(2), LEVEL_OF(3), LEVEL_OF(4)}, padded_height, padded_width}

constexpr int OFFSETS = 2 * POSITIONS;
constexpr int TAPS = 9;
constexpr int GROUP = 8;                // keypoints of a block of `sample_offsets`, a warp per tap
constexpr int OFFSET_TILES = OFFSETS / 16;
constexpr int CHUNKS = DIM / 32;        // of the weights: see `fragments.by_chunks`
constexpr int HIDDEN_ROW = OFFSETS / 2 + 4;
constexpr int KEYPOINTS = 32;           // of a block of `sample_descriptors`

// The weights of 16 offsets by 32 channels: the left operands of two products.
struct Weights {
  uint4 low, high;  // of offsets 0 to 7 and 8 to 15

  __device__ __forceinline__ void load(const u32 *fragments, int number, int lane) {
    const uint4 *from = (const uint4 *)fragments + number * 64 + lane;
    low = load_early(from), high = load_early(from + 32);
  }

  // Times four registers of each lane, whose quad has a keypoint.
  __device__ __forceinline__ void multiply(float (&sums)[4], u32 f0, u32 f1, u32 f2,
                                           u32 f3) const {
    const u32 a[4] = {low.x, high.x, low.y, high.y}, b[2] = {f0, f1};
    const u32 c[4] = {low.z, high.z, low.w, high.w}, d[2] = {f2, f3};
    product16(sums, a, b);
    product16(sums, c, d);
  }
};

// The patches' first layer, added up over the taps: [GROUP, OFFSETS] in half precision.
__device__ __forceinline__ void hide(u32 (*hidden)[HIDDEN_ROW],
                                     const float (*sums)[OFFSETS][GROUP], const float *bias) {
  for (int i = threadIdx.x; i < OFFSETS / 2 * GROUP; i += 32 * TAPS) {
    const int channel = i / GROUP * 2, point = i % GROUP;
    float low = bias[channel], high = bias[channel + 1];
    for (int n = 0; n < TAPS; ++n) {
      low += sums[n][channel][point];
      high += sums[n][channel + 1][point];
    }
    hidden[point][channel / 2] = pack(selu(low), selu(high));
  }
}

// The second layer's 16 offsets from `first_offset` on of `count` keypoints, clamped.
__device__ __forceinline__ void store_offsets(float *offsets, const u32 (*hidden)[HIDDEN_ROW],
                                              const Weights (&weights)[OFFSETS / 32],
                                              const float *bias, int first_offset, int count,
                                              float limit, int lane) {
  const int g = lane / 4, t = lane % 4;
  float sums[4] = {};
#pragma unroll
  for (int chunk = 0; chunk < OFFSETS / 32; ++chunk) {
    const uint4 f = *(const uint4 *)&hidden[g][16 * chunk + 4 * t];
    weights[chunk].multiply(sums, f.x, f.y, f.z, f.w);
  }
  for (int i = 0; i < 4; ++i) {
    const int channel = first_offset + g + i / 2 * 8, point = 2 * t + i % 2;
    const float offset = sums[i] + bias[channel];
    if (point < count)
      offsets[point * OFFSETS + channel] = fminf(fmaxf(offset, -limit), limit);
  }
}

// Offsets of the sample positions of 8 keypoints; zeroes the counter of parts of every 32.
extern "C" __global__ void __launch_bounds__(32 * TAPS)
sample_offsets(const float *keypoints, MAPS_PARAMETERS, const u32 *level_fragments,
               const u32 *patch_fragments, const float *patch_bias, const float *offset_bias,
               float *offsets, int *parts, int rows, int k, int top, int left, int height,
               int width) {
  constexpr int PIECES = CHUNKS * OFFSET_TILES, BATCH = 2;
  __shared__ __align__(16) float sums[TAPS][OFFSETS][GROUP];
  __shared__ __align__(16) u32 hidden[GROUP][HIDDEN_ROW];
  const int lane = threadIdx.x % 32, tap = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * GROUP;
  // Nobody writes weights: they need not wait.
  const u32 *fragments = patch_fragments + tap * PIECES * 256;
  Weights weights[2][BATCH];
#pragma unroll
  for (int i = 0; i < BATCH; ++i) weights[0][i].load(fragments, i, lane);
  const Projection projection(level_fragments, lane);
  await_previous_kernel();
  if (threadIdx.x == 0 && first % KEYPOINTS == 0) parts[first / KEYPOINTS] = 0;

  const int row = first + g < rows ? first + g : rows - 1;
  const Maps maps = maps_of(MAPS, row / k);
  const float2 point = ((const float2 *)keypoints)[row];
  // Truncated, not rounded: the patch is centred as the weights were trained.
  const float y = truncf(point.y) + (tap / 3 - 1), x = truncf(point.x) + (tap % 3 - 1);
  const bool used = inside({top, left, height, width}, y, x);
  const float padded_y = clamp(y + top, maps.height), padded_x = clamp(x + left, maps.width);

  u32 features[4][REGS], inner[INNER], none[REGS];
  const u32 zeros[INNER] = {};
  const int pixel = whole(padded_y) * maps.width + whole(padded_x);
  load(inner, maps.x1 + pixel * (C1 / 2) + t * INNER);
#pragma unroll
  for (int l = 0; l < 3; ++l) upsample(features[1 + l], maps.levels[l], padded_y, padded_x, t);
#pragma unroll
  for (int i = 0; i < BATCH; ++i) weights[1][i].load(fragments, BATCH + i, lane);
  projection.apply(features[0], none, inner, zeros);
  Squares squares;
  for (int l = 0; l < 4; ++l) squares.add(features[l]);
  const float length = squares.sum(lane), scale = used ? reciprocal_length(length) : 0;

  float partial[OFFSET_TILES][4] = {};
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u32 *f = &features[0][0] + i / OFFSET_TILES * 4;
    Weights &now = weights[i / BATCH % 2][i % BATCH];
    now.multiply(partial[i % OFFSET_TILES], f[0], f[1], f[2], f[3]);
    if (i + 2 * BATCH < PIECES) now.load(fragments, i + 2 * BATCH, lane);
  }
  // Columns 2t and 2t + 1 of the products are the pixels of those quads.
  const float even = __shfl_sync(FULL_WARP, scale, 8 * t);
  const float odd = __shfl_sync(FULL_WARP, scale, 8 * t + 4);
#pragma unroll
  for (int tile = 0; tile < OFFSET_TILES; ++tile)
    for (int i = 0; i < 4; ++i)
      sums[tap][16 * tile + g + i / 2 * 8][2 * t + i % 2] = partial[tile][i] * (i % 2 ? odd : even);

  Weights second[OFFSETS / 32];
  if (tap < OFFSET_TILES)
    for (int i = 0; i < OFFSETS / 32; ++i)
      second[i].load(patch_fragments + TAPS * CHUNKS * OFFSET_TILES * 256, i * OFFSET_TILES + tap,
                     lane);
  __syncthreads();
  hide(hidden, sums, patch_bias);
  __syncthreads();
  if (tap < OFFSET_TILES)
    store_offsets(offsets + size_t(first) * OFFSETS, hidden, second, offset_bias, 16 * tap,
                  rows - first, 0.25f * (height > width ? height : width), lane);
}

constexpr int SHARE = 4;                 // sample positions of a block of `sample_descriptors`
constexpr int PARTS = POSITIONS / SHARE; // blocks for the same keypoints
constexpr int WARPS = 16;
constexpr int ROWS = KEYPOINTS * SHARE;  // 8 of each warp
constexpr int ROW = DIM / 2 + 4;         // words: 16 bytes further on in the banks than the last
constexpr int STEPS = DIM / 16;          // of a matrix product over the channels
constexpr int SUM_ROW = DIM + 8;
static_assert(SHARE == 4 && ROWS == 8 * WARPS && SUM_ROW * KEYPOINTS <= ROW * ROWS, "fits");

// The normalised features of the four pixels around a position, weighted and added up. Lanes of a
// quad have the same position.
__device__ __forceinline__ void sample(u32 (&sum)[4][REGS], const Maps &maps, const Geometry &image,
                                       float y, float x, const u32 *level_fragments, int lane) {
  const int t = lane % 4;
  const float floor_y = floorf(y), floor_x = floorf(x);
  const float rows[2] = {clamp(floor_y + image.top, maps.height),
                         clamp(floor_y + 1 + image.top, maps.height)};
  const float columns[2] = {clamp(floor_x + image.left, maps.width),
                            clamp(floor_x + 1 + image.left, maps.width)};
  u32 features[4][4][REGS], inner[4][INNER];  // by level and corner
  upsample_square(features[1], maps.levels[0], rows, columns, t);
  upsample_square(features[2], maps.levels[1], rows, columns, t);
  for (int i = 0; i < 4; ++i) {
    const u32 pixel = whole(rows[i / 2]) * maps.width + whole(columns[i % 2]);
    load(inner[i], maps.x1 + t * INNER + size_t(pixel) * (C1 / 2));
  }
  upsample_square(features[3], maps.levels[2], rows, columns, t);
  const Projection projection(level_fragments, lane);
  projection.apply(features[0][0], features[0][1], inner[0], inner[1]);
  projection.apply(features[0][2], features[0][3], inner[2], inner[3]);

  const float below = y - floor_y, right = x - floor_x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Squares squares;
#pragma unroll
    for (int l = 0; l < 4; ++l) squares.add(features[l][i]);
    const float share = (i / 2 ? below : 1 - below) * (i % 2 ? right : 1 - right);
    const bool used = inside(image, floor_y + i / 2, floor_x + i % 2);
    const float length = squares.sum(lane);  // by all lanes, used or not
    const float scale = used ? share * reciprocal_length(length) : 0;
    const u32 factor = both(scale < 6e4f ? scale : 6e4f);
#pragma unroll
    for (int l = 0; l < 4; ++l)
      for (int n = 0; n < REGS; ++n)
        sum[l][n] = multiply_add(features[l][i][n], factor, i ? sum[l][n] : 0);
  }
}

// A warp's weights of `COUNT` steps of a product with DIM columns: N times 8 columns from `first` on,
// as `fragments.fragments` has them. Asked for long before they are needed.
template <int COUNT, int N>
__device__ __forceinline__ void load_weights(u32 (&to)[COUNT][N][2], const u32 *fragments,
                                             int first, int lane) {
  fragments += first / 2 * 2 * 64 + lane * 4;
#pragma unroll
  for (int step = 0; step < COUNT; ++step, fragments += DIM / 8 * 64) {
    if constexpr (N == 1) {
      load_if(to[step][0], fragments + first % 2 * 2, true);
    } else {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        u32 pair[4];
        load_if(pair, fragments + n * 64, true);
        for (int i = 0; i < 4; ++i) to[step][n + i / 2][i % 2] = pair[i];
      }
    }
  }
}

// 32 rows of `values`, 16 columns, times N products' weights.
template <int N>
__device__ __forceinline__ void multiply(float (&sums)[2][N][4], const u32 *values,
                                         const u32 (&weights)[N][2], int lane) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    u32 a[4];
    load_matrices(a, values + (16 * tile + lane % 16) * ROW + lane / 16 * 4);
#pragma unroll
    for (int n = 0; n < N; ++n) product16(sums[tile][n], a, weights[n]);
  }
}

// Half of the inner size of the projection.
__device__ __forceinline__ void project(float (&sums)[2][QUARTER / 8][4], const u32 *rows,
                                        const u32 (&weights)[STEPS / 2][QUARTER / 8][2],
                                        int lane) {
#pragma unroll
  for (int step = 0; step < STEPS / 2; ++step) multiply(sums, rows + 8 * step, weights[step], lane);
}

// SELU of a warp's 32 rows by QUARTER columns. The projection's columns are in such an order that a
// lane has neighbouring channels.
__device__ __forceinline__ void store_projected(u32 *rows, const float (&sums)[2][QUARTER / 8][4],
                                                int lane) {
  rows += lane / 4 * ROW + lane % 4 * REGS;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 out[REGS];
    for (int n = 0; n < REGS; ++n) {
      const float *pair = sums[i / 2][n] + i % 2 * 2;
      out[n] = pack(selu_of_power(pair[0]), selu_of_power(pair[1]));
    }
    for (int n = 0; n < REGS; n += 2)
      *(uint2 *)(rows + 8 * i * ROW + n) = make_uint2(out[n], out[n + 1]);
  }
}

constexpr int COLUMNS = DIM / 64;  // times 8: of a warp in the aggregation

// This block's part of the aggregation: [KEYPOINTS, DIM] into `part`. A warp makes an eighth of the
// columns, of two of the four positions; it has the weights of the first.
__device__ __forceinline__ void aggregate(float *part, u32 *values,
                                          const u32 (&first)[STEPS][COLUMNS][2],
                                          const u32 *fragments, int lane, int warp) {
  const int g = lane / 4, t = lane % 4, half = warp / 8, eighth = warp % 8;
  float sums[2][COLUMNS][4] = {};
  u32 second[STEPS][COLUMNS][2];
  load_weights(second, fragments + DIM * DIM / 2, eighth * COLUMNS, lane);
  const u32 *rows = values + 2 * half * KEYPOINTS * ROW;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) multiply(sums, rows + 8 * step, first[step], lane);
  rows += KEYPOINTS * ROW;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) multiply(sums, rows + 8 * step, second[step], lane);
  __syncthreads();
  float *shared = (float *)values;
#pragma unroll
  for (int stage = 1; stage >= 0; --stage) {
    if (half == stage)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        for (int n = 0; n < COLUMNS; ++n) {
          const int row = 8 * i + g, column = (eighth * COLUMNS + n) * 8 + 2 * t;
          float2 sum = make_float2(sums[i / 2][n][i % 2 * 2], sums[i / 2][n][i % 2 * 2 + 1]);
          float2 *other = (float2 *)(shared + row * SUM_ROW + column);
          if (stage) {
            *other = sum;
          } else {
            sum.x += other->x, sum.y += other->y;
            *(float2 *)(part + row * DIM + column) = sum;
          }
        }
    __syncthreads();
  }
}

// Unit-length sums of all parts, in one order whichever block is the last to come.
__device__ __forceinline__ void add_parts(float *descriptors, const float *parts, int rows) {
  constexpr int LANES = 32 * WARPS / KEYPOINTS, TIMES = DIM / 4 / LANES;
  const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  float4 sums[TIMES];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < TIMES; ++i) {
    const int column = 4 * (lane + i * LANES);
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const float4 v = *(const float4 *)(parts + (size_t(part) * KEYPOINTS + row) * DIM + column);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    squares += sum.x * sum.x + sum.y * sum.y + sum.z * sum.z + sum.w * sum.w;
    sums[i] = sum;
  }
  for (int step = LANES / 2; step; step /= 2) squares += __shfl_xor_sync(FULL_WARP, squares, step);
  const float scale = rsqrtf(squares > 1e-24f ? squares : 1e-24f);
  if (row >= rows) return;
#pragma unroll
  for (int i = 0; i < TIMES; ++i) {
    const float4 sum = make_float4(sums[i].x * scale, sums[i].y * scale, sums[i].z * scale,
                                   sums[i].w * scale);
    *(float4 *)(descriptors + size_t(row) * DIM + 4 * (lane + i * LANES)) = sum;
  }
}

// Descriptors of 32 keypoints: blocks blockIdx.x * PARTS on sample SHARE positions each, and the
// last of them to finish adds up what all have made in `sums`.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
sample_descriptors(const float *keypoints, const float *offsets, MAPS_PARAMETERS,
                   const u32 *level_fragments, const u32 *sample_fragments, float *sums,
                   int *finished, float *descriptors, int rows, int k, int top, int left,
                   int height, int width) {
  __shared__ __align__(16) u32 values[ROWS * ROW];
  __shared__ bool last;
  await_previous_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int group = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
  {
    const int wanted = group * KEYPOINTS + warp % 4 * 8 + g, position = part * SHARE + warp / 4;
    const int row = wanted < rows ? wanted : rows - 1;
    const float2 point = ((const float2 *)keypoints)[row];
    const float *offset = offsets + size_t(row) * OFFSETS + position;
    const float x = point.x + offset[0], y = point.y + offset[POSITIONS];
    u32 sum[4][REGS];
    sample(sum, maps_of(MAPS, row / k), {top, left, height, width}, y, x, level_fragments, lane);
    u32 *to = values + (8 * warp + g) * ROW + t * REGS;
#pragma unroll
    for (int l = 0; l < 4; ++l)
      for (int i = 0; i < REGS; i += 2)
        *(uint2 *)(to + l * (QUARTER / 2) + i) = make_uint2(sum[l][i], sum[l][i + 1]);
  }
  // A warp projects 32 rows to a quarter of the columns.
  u32 *mine = values + warp / 4 * 32 * ROW;
  float projected[2][QUARTER / 8][4] = {};
  u32 first[STEPS / 2][QUARTER / 8][2], second[STEPS][COLUMNS][2];
  load_weights(first, sample_fragments, warp % 4 * (QUARTER / 8), lane);
  __syncthreads();
  project(projected, mine, first, lane);
  load_weights(first, sample_fragments + DIM * DIM / 4, warp % 4 * (QUARTER / 8), lane);
  project(projected, mine + 4 * STEPS, first, lane);
  const u32 *weights =
      sample_fragments + (1 + part * SHARE + warp / 8 * 2) * (DIM * DIM / 2);
  load_weights(second, weights, warp % 8 * COLUMNS, lane);
  __syncthreads();
  store_projected(mine + warp % 4 * (QUARTER / 2), projected, lane);
  __syncthreads();
  sums += size_t(group) * PARTS * KEYPOINTS * DIM;
  aggregate(sums + part * KEYPOINTS * DIM, values, second, weights, lane, warp);

  if (threadIdx.x == 0) {  // the barriers around order everyone's writes and reads
    __threadfence();
    last = atomicAdd(finished + group, 1) == PARTS - 1;
    if (last) finished[group] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  add_parts(descriptors + size_t(group) * KEYPOINTS * DIM, sums, rows - group * KEYPOINTS);
}
