// Deformable 3x3 convolutions in half precision. A block makes PIXELS pixels of COLUMNS channels:
// the offset convolution (its inner size divided among the warps, pixels straight from global
// memory), samples of all taps in shared memory, and their product with the weights.
//
// Products are transposed: weights are the left operand, 16 channels by 16, 8 pixels the right one.
// Inner sizes count in chunks of 8 channels, 16 bytes. 16 channels are a slice: 2 chunks of each
// tap, one of the shortcut, one that is nothing. A step of a product takes 4 chunks: lane i has
// chunk i % 4 of pixel i / 4. The weights lie in that order (`fragments.deform`).
//
// Where there are few pixels, BLOCKS blocks share the slices of the same pixels (a cluster): each
// has its part of every sum. They add up the offsets all, the values each of some of the pixels.
//
// Defined before this text: CI, CO, COLUMNS of CO per block, PIXELS per block (8 or 16), BLOCKS,
// WARPS (a multiple of 9), TILES of 16 columns per warp, AHEAD and OFFSET_AHEAD (steps whose
// operands a warp has asked for), EARLY (whether the first ones of the product before all else),
// AT_ONCE (samples of a thread, likewise), RESIDENT (blocks that a multiprocessor should hold);
// LEVEL, and with it CS, QUARTER, POOL (0 without).

constexpr int THREADS = 32 * WARPS, TAPS = 9;
constexpr int SETS = PIXELS / 8;               // of 8 pixels, in 2 rows of 4
constexpr int DOWN = 2 * SETS, ACROSS = 4;     // pixels of a block
constexpr int PLACES = PIXELS * TAPS;
constexpr int OWN = PIXELS / BLOCKS;           // pixels whose values this block finishes

constexpr int SLICES = CI / 16 / BLOCKS;       // of a block
constexpr int SLICE = 20, SLICE_STEPS = 5, SHORTCUT = 18;  // chunks, steps, the shortcut's chunk
constexpr int STEPS = SLICES * SLICE_STEPS;

__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__device__ constexpr int ratio_up(int a, int b) { return (a + b - 1) / b; }

constexpr int OFFSET_TILES = 2;                // of 16: 18 offsets
constexpr int OFFSET_WARPS = smaller(WARPS, STEPS), OFFSET_EACH = ratio_up(STEPS, OFFSET_WARPS);
constexpr int BESIDE = COLUMNS / 16 / TILES, GROUPS = WARPS / BESIDE;  // warps: columns, inner size
constexpr int WARP_STEPS = ratio_up(STEPS, GROUPS);
static_assert(PIXELS == 8 || PIXELS == 16, "a block has one matrix of 16 pixels, or half of it");
static_assert(BESIDE * TILES * 16 == COLUMNS && GROUPS > 0 && GROUPS <= STEPS, "all have work");
static_assert(SLICES * BLOCKS * 16 == CI && OWN * BLOCKS == PIXELS, "blocks share evenly");
static_assert(BLOCKS == 1 || (COLUMNS == CO && POOL <= 1), "blocks have all columns");
static_assert(!LEVEL || (2 * CS == CI && COLUMNS == CO), "a slice has a chunk of the shortcut");
static_assert(POOL <= 1 || (POOL == 4 && PIXELS == 16), "a block has the pixels of one mean");

// Rows of chunks start 64 bytes further on in the 128 bytes of a row of banks: no conflicts where a
// warp reads 8 rows of 4.
__device__ constexpr int row_chunks(int chunks) { return chunks + (12 - chunks % 8) % 8; }
constexpr int ROW = row_chunks(SLICES * SLICE);  // of `samples`, in chunks
constexpr int LEVEL_ROW = row_chunks(CO / 8);    // of `values`
// Rows of sums, one per pixel, start 4 floats further on: none where it writes 8 columns of 4.
constexpr int SUM_ROW = COLUMNS + 4, OFFSET_ROW = 20;
constexpr int LEVEL_TILES = QUARTER / 8;         // of 8 channels
constexpr int SCORE_ROW = row_chunks(QUARTER / 8);  // of `levels`

constexpr int SAMPLE_BYTES =
    larger(16 * PIXELS * ROW, 4 * OFFSET_WARPS * PIXELS * OFFSET_ROW);
constexpr int PLACE_BYTES = (16 + 4) * PLACES;
constexpr int TOTAL_BYTES = BLOCKS > 1 ? 8 * PLACES : 0;  // of the block's offsets
constexpr int SUM_BYTES = 4 * GROUPS * PIXELS * SUM_ROW;
// The sums of the warps follow the samples, or replace them where there is no room for both.
constexpr bool REPLACE = SAMPLE_BYTES + larger(PLACE_BYTES, SUM_BYTES) > 48 * 1024;
constexpr int SUM_START = REPLACE ? 0 : SAMPLE_BYTES;
constexpr int VALUE_START = REPLACE ? SUM_BYTES : 0;
constexpr int VALUE_BYTES = 16 * OWN * LEVEL_ROW, LEVEL_BYTES = 16 * 16 * SCORE_ROW;
static_assert(!LEVEL || REPLACE || VALUE_BYTES + LEVEL_BYTES <= SAMPLE_BYTES,
              "the sums stay, for other blocks read them");
constexpr int TOTAL_START =
    larger(SAMPLE_BYTES + PLACE_BYTES, larger(SUM_START + SUM_BYTES,
                                              VALUE_START + VALUE_BYTES + LEVEL_BYTES));
constexpr int BYTES = TOTAL_START + TOTAL_BYTES;
static_assert(BYTES <= 48 * 1024, "what every GPU has");

struct Map {
  int height, width, top, left;  // of the whole map; the block's first pixel
  __device__ int y(int m) const { return top + m / 4; }
  __device__ int x(int m) const { return left + m % 4; }
  __device__ bool has(int y, int x) const {
    return ((u32)y < (u32)height) & ((u32)x < (u32)width);
  }
};

// The 8 channels from chunk `chunk` on of a pixel, zeros if its number is negative.
template <int CHANNELS>
__device__ __forceinline__ uint4 chunk_of(const uint4 *map, int pixel, int chunk) {
  return load_early(map + (long long)pixel * (CHANNELS / 8) + chunk, pixel >= 0);
}

// Of the neighbour of pixel m that belongs to the tap of a slice's chunk.
__device__ __forceinline__ uint4 neighbour(const uint4 *x, const Map &map, int m, int slice,
                                           int chunk) {
  const int tap = chunk / 2;
  const int row = map.y(m) + tap / 3 - 1, column = map.x(m) + tap % 3 - 1;
  const bool exists = (tap < TAPS) & map.has(row, column);
  return chunk_of<CI>(x, exists ? row * map.width + column : -1, 2 * slice + chunk % 2);
}

// 16 channels by an inner size of 32, of a lane.
struct Weight {
  uint4 first, second;
  __device__ __forceinline__ void ask(const uint4 *at, bool used) {
    first = load_early(at, used), second = load_early(at + 32, used);
  }
};
constexpr int WEIGHT = 64;  // of a warp, in chunks

// d += weight pixels, of 16 channels and 8 pixels: channel g of pixels 2t and 2t + 1, then g + 8.
__device__ __forceinline__ void product32(float (&d)[4], const Weight &weight, uint4 pixels) {
  const uint4 a = weight.first, b = weight.second;
  product16(d, {a.x, a.y, a.z, a.w}, {pixels.x, pixels.y});
  product16(d, {b.x, b.y, b.z, b.w}, {pixels.z, pixels.w});
}

// A warp's share of the offset convolution: every OFFSET_WARPS-th step, OFFSET_AHEAD at a time.
struct Offsets {
  const uint4 *weight;  // of this lane
  Weight weights[OFFSET_AHEAD][OFFSET_TILES];
  float sums[SETS][OFFSET_TILES][4];

  // The bias belongs to warp 0 of the first block.
  __device__ __forceinline__ Offsets(const uint4 *all, const float *bias, bool first_block) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    weight = all + warp * OFFSET_TILES * WEIGHT + lane;
    const bool mine = first_block && warp == 0;
    for (int j = 0; j < OFFSET_TILES; ++j)
      for (int i = 0; i < 4; ++i) {
        const int offset = 16 * j + g + i / 2 * 8;
        const float first = mine && offset < 2 * TAPS ? bias[offset] : 0;
        for (int s = 0; s < SETS; ++s) sums[s][j][i] = first;
      }
  }

  // Ask for the weights of the steps from the warp's `start`-th on.
  __device__ __forceinline__ void ask(int start) {
#pragma unroll
    for (int i = 0; i < OFFSET_AHEAD; ++i) {
      const int step = (start + i) * OFFSET_WARPS;
      const bool used = step + OFFSET_WARPS <= STEPS || step + threadIdx.x / 32 < STEPS;
      for (int j = 0; j < OFFSET_TILES; ++j)
        weights[i][j].ask(weight + (step * OFFSET_TILES + j) * WEIGHT, used);
    }
  }

  // Multiply the pixels by these.
  __device__ __forceinline__ void run(int start, const uint4 *x, const Map &map) {
    const int lane = threadIdx.x % 32;
    uint4 pixels[OFFSET_AHEAD][SETS];
#pragma unroll
    for (int i = 0; i < OFFSET_AHEAD; ++i) {
      const int step = (start + i) * OFFSET_WARPS + threadIdx.x / 32, slice = step / SLICE_STEPS;
      // Steps beyond the last one count as taps beyond the last one.
      const int chunk = step < STEPS ? step % SLICE_STEPS * 4 + lane % 4 : SLICE;
      for (int s = 0; s < SETS; ++s)
        pixels[i][s] = neighbour(x, map, 8 * s + lane / 4, slice, chunk);
    }
    __syncwarp();  // keeps the compiler from multiplying before it has asked for all
#pragma unroll
    for (int i = 0; i < OFFSET_AHEAD; ++i)
      for (int s = 0; s < SETS; ++s)
        for (int j = 0; j < OFFSET_TILES; ++j)
          product32(sums[s][j], weights[i][j], pixels[i][s]);
  }

  // [OFFSET_WARPS, PIXELS, OFFSET_ROW]: dy and dx of each tap.
  __device__ __forceinline__ void store(float *offsets) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    offsets += (warp * PIXELS + lane % 4 * 2) * OFFSET_ROW + g;
    for (int s = 0; s < SETS; ++s)
      for (int j = 0; j < OFFSET_TILES; ++j)
        for (int i = 0; i < 4; ++i) {
          const int offset = 16 * j + i / 2 * 8;  // and g
          if (offset + g < 2 * TAPS) offsets[(8 * s + i % 2) * OFFSET_ROW + offset] = sums[s][j][i];
        }
  }
};

// The offset of a place (pixel by pixel, tap by tap) as this block's warps have it.
__device__ __forceinline__ float2 block_offset(const float *offsets, int place) {
  offsets += place / TAPS * OFFSET_ROW + place % TAPS * 2;
  float2 offset = make_float2(0, 0);
#pragma unroll
  for (int warp = 0; warp < OFFSET_WARPS; ++warp) {
    const float2 share = *(const float2 *)(offsets + warp * PIXELS * OFFSET_ROW);
    offset.x += share.x, offset.y += share.y;
  }
  return offset;
}

#if BLOCKS > 1
// The same of all blocks, whose totals [PLACES] are complete.
__device__ __forceinline__ float2 cluster_offset(const float2 *totals, int place) {
  float2 offset = make_float2(0, 0);
#pragma unroll
  for (int rank = 0; rank < BLOCKS; ++rank) {
    const float2 share = load_of_block(totals + place, rank);
    offset.x += share.x, offset.y += share.y;
  }
  return offset;
}
#endif

// Where all taps are sampled. Shares are those of the rows above and below and of the columns
// before and after, zero outside the map. A corner is the pixel above and before, in bytes (so that
// an image's map has less than 4 GiB), and two bits: the next column and row are other pixels.
struct Places {
  float4 *shares;  // [PLACES]
  u32 *corners;

  // Given the offset (dy, dx).
  __device__ __forceinline__ void set(int place, float2 offset, const Map &map) const {
    const int m = place / TAPS, tap = place % TAPS, rows = map.height, columns = map.width;
    const float limit = max(rows, columns) * 0.25f;  // as in the trained model
    const float y = map.y(m) + tap / 3 - 1 + fminf(fmaxf(offset.x, -limit), limit);
    const float x = map.x(m) + tap % 3 - 1 + fminf(fmaxf(offset.y, -limit), limit);
    const float above = floorf(y), before = floorf(x), below = y - above, after = x - before;
    const int row = (int)above, column = (int)before;
    shares[place] = make_float4((u32)row < (u32)rows ? 1 - below : 0,
                                (u32)(row + 1) < (u32)rows ? below : 0,
                                (u32)column < (u32)columns ? 1 - after : 0,
                                (u32)(column + 1) < (u32)columns ? after : 0);
    const int nearest_row = min(max(row, 0), rows - 1);
    const int nearest_column = min(max(column, 0), columns - 1);
    const bool next_row = (nearest_row == row) & (row + 1 < rows);
    const bool next_column = (nearest_column == column) & (column + 1 < columns);
    const u32 pixel = nearest_row * columns + nearest_column;
    corners[place] = pixel * (2 * CI) | next_row << 1 | next_column;
  }
};

// a + share * two halves.
__device__ __forceinline__ void add_share(float2 &a, float share, u32 both) {
  a.x += share * low_half(both), a.y += share * high_half(both);
}

// 8 channels of a bilinear sample, summed in float32.
struct Sample {
  uint4 corners[4];
  float share[4];

  // `x` is the map from these channels on, `row_bytes` the size of its rows.
  __device__ __forceinline__ void ask(const unsigned char *x, u32 row_bytes, const Places &places,
                                      int place) {
    const float4 shares = places.shares[place];
    const u32 corner = places.corners[place];
    const u32 after = (corner & 1) * (2 * CI), below = corner & 2 ? row_bytes : 0;
    for (int i = 0; i < 4; ++i) {
      const u32 at = (corner & ~3u) + (i / 2 ? below : 0) + (i % 2 ? after : 0);
      corners[i] = load_early((const uint4 *)(x + at));
      share[i] = (i / 2 ? shares.y : shares.x) * (i % 2 ? shares.w : shares.z);
    }
  }

  __device__ __forceinline__ uint4 mean() const {
    float2 a = make_float2(0, 0), b = a, c = a, d = a;
    for (int i = 0; i < 4; ++i) {
      add_share(a, share[i], corners[i].x), add_share(b, share[i], corners[i].y);
      add_share(c, share[i], corners[i].z), add_share(d, share[i], corners[i].w);
    }
    return make_uint4(pack(a.x, a.y), pack(b.x, b.y), pack(c.x, c.y), pack(d.x, d.y));
  }
};

constexpr int EACH = 2 * SLICES, STRIDE = THREADS / EACH / TAPS;  // chunks of a place, pixels
constexpr int COUNT = ratio_up(PIXELS, STRIDE), TOGETHER = smaller(AT_ONCE, COUNT);  // samples
static_assert(STRIDE * TAPS * EACH == THREADS && COUNT % TOGETHER == 0, "threads share evenly");

// A thread samples the same 8 channels and the same tap of some pixels, AT_ONCE at a time for their
// loads to overlap.
__device__ __forceinline__ void fill_samples(const uint4 *x, int width, const Places &places,
                                             uint4 *samples) {
  const int chunk = threadIdx.x % EACH, place = threadIdx.x / EACH, first = place / TAPS;
  const unsigned char *const from = (const unsigned char *)(x + chunk);
  samples += first * ROW + chunk / 2 * SLICE + chunk % 2 + place % TAPS * 2;
  if (PIXELS < STRIDE && first >= PIXELS) return;
#pragma unroll 1
  for (int k = 0; k < COUNT; k += TOGETHER) {
    Sample some[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      some[i].ask(from, width * (2 * CI), places, place + (k + i) * STRIDE * TAPS);
    __syncwarp();  // as above
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) samples[(k + i) * STRIDE * ROW] = some[i].mean();
  }
}

// What follows the taps in each slice: the shortcut's pixels, if any, and zeros.
struct Rest {
  static constexpr int COUNT = PIXELS * SLICES, EACH = ratio_up(COUNT, THREADS);
  uint4 chunks[EACH] = {};

  __device__ __forceinline__ void ask(const uint4 *below, const Map &map) {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = threadIdx.x + k * THREADS, m = i / SLICES, y = map.y(m), x = map.x(m);
      const bool exists = (i < COUNT) & map.has(y, x);
      chunks[k] = chunk_of<CS>(below, exists ? y * map.width + x : -1, i % SLICES);
    }
  }

  __device__ __forceinline__ void store(uint4 *samples) const {
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = threadIdx.x + k * THREADS;
      if (i >= COUNT) continue;
      uint4 *const rest = samples + i / SLICES * ROW + i % SLICES * SLICE + SHORTCUT;
      rest[0] = chunks[k], rest[1] = make_uint4(0, 0, 0, 0);
    }
  }
};

// A warp's part of the product: TILES tiles of 16 columns, every GROUPS-th step.
struct Product {
  const uint4 *weight;  // of this lane: first step, first tile
  int group, column;
  Weight weights[AHEAD][TILES];
  float sums[SETS][TILES][4] = {};

  __device__ __forceinline__ Product(const uint4 *all, int first_column) {
    const int warp = threadIdx.x / 32;
    group = warp / BESIDE, column = warp % BESIDE * TILES * 16;
    weight = all + (group * (CO / 16) + (first_column + column) / 16) * WEIGHT + threadIdx.x % 32;
  }

  __device__ __forceinline__ bool has(int i) const {
    return (i + 1) * GROUPS <= STEPS || i * GROUPS + group < STEPS;
  }

  __device__ __forceinline__ void ask(int i) {
    for (int j = 0; j < TILES; ++j)
      weights[i % AHEAD][j].ask(weight + (i * GROUPS * (CO / 16) + j) * WEIGHT, has(i));
  }

  // Ask for the first weights, before they are needed.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (i < WARP_STEPS) ask(i);
  }

  __device__ __forceinline__ void run(const uint4 *samples) {
    const int lane = threadIdx.x % 32;
    samples += lane / 4 * ROW + 4 * group + lane % 4;
#pragma unroll
    for (int i = 0; i < WARP_STEPS; ++i) {
      if (has(i))
        for (int s = 0; s < SETS; ++s) {
          const uint4 pixels = samples[8 * s * ROW + i * GROUPS * 4];
          for (int j = 0; j < TILES; ++j) product32(sums[s][j], weights[i % AHEAD][j], pixels);
        }
      if (i + AHEAD < WARP_STEPS) ask(i + AHEAD);
    }
  }

  // [GROUPS, PIXELS, SUM_ROW]
  __device__ __forceinline__ void store(float *all) const {
    const int lane = threadIdx.x % 32;
    all += (group * PIXELS + lane % 4 * 2) * SUM_ROW + column + lane / 4;
    for (int s = 0; s < SETS; ++s)
      for (int j = 0; j < TILES; ++j)
        for (int i = 0; i < 4; ++i)
          all[(8 * s + i % 2) * SUM_ROW + 16 * j + i / 2 * 8] = sums[s][j][i];
  }
};

// Channels `column` and the next of pixel m, summed over the warps (and blocks), then SELU.
__device__ __forceinline__ u32 value(const float *sums, float2 bias, int m, int column) {
#pragma unroll
  for (int i = 0; i < BLOCKS * GROUPS; ++i) {
    const float *at = sums + (i % GROUPS * PIXELS + m) * SUM_ROW + column;
#if BLOCKS > 1
    const float2 share = load_of_block((const float2 *)at, i / GROUPS);
#else
    const float2 share = *(const float2 *)at;
#endif
    bias.x += share.x, bias.y += share.y;
  }
  return pack(selu(bias.x), selu(bias.y));
}

// Every thread finishes two channels of some of the pixels.
constexpr int PAIRS = COLUMNS / 2, ROWS_AT_ONCE = smaller(THREADS / PAIRS, OWN);
constexpr int ROUNDS = ratio_up(OWN, ROWS_AT_ONCE);

// The values of OWN pixels from `first` on; `emit(row, pair)` takes this thread's channels of pixel
// first + row.
template <typename Emit>
__device__ __forceinline__ void finish(const float *sums, float2 bias, int first, Emit emit) {
  const int column = threadIdx.x % PAIRS * 2, start = threadIdx.x / PAIRS;
  if (start >= ROWS_AT_ONCE) return;
  u32 pairs[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k)
    pairs[k] = value(sums, bias, first + min(start + k * ROWS_AT_ONCE, OWN - 1), column);
#pragma unroll
  for (int k = 0; k < ROUNDS; ++k)
    if (start + k * ROWS_AT_ONCE < OWN) emit(start + k * ROWS_AT_ONCE, pairs[k]);
}

#if LEVEL
// 8 channels of the projection of OWN pixels to their level; one warp. Here pixels are the left
// operand, weights the right one.
struct Level {
  static constexpr int INNER_STEPS = CO / 32;
  uint4 b[INNER_STEPS];

  // Ask for the weights.
  __device__ __forceinline__ void ask(const uint4 *weight, int tile) {
#pragma unroll
    for (int step = 0; step < INNER_STEPS; ++step)
      b[step] = load_early(weight + (step * LEVEL_TILES + tile) * 32 + threadIdx.x % 32);
  }

  // `first` is the pixel of the first of the OWN rows; `levels` [16, SCORE_ROW * 4].
  __device__ __forceinline__ void run(const uint4 *values, const Map &map, int first, int tile,
                                      u32 *levels, u32 *kept) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint4 none = make_uint4(0, 0, 0, 0);
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < INNER_STEPS; ++step) {
      const uint4 *row = values + g * LEVEL_ROW + 4 * step + t;
      const uint4 low = OWN >= 8 || g < OWN ? row[0] : none;
      const uint4 high = OWN > 8 ? row[8 * LEVEL_ROW] : none;
      product16(sums, {low.x, high.x, low.y, high.y}, {b[step].x, b[step].y});
      product16(sums, {low.z, high.z, low.w, high.w}, {b[step].z, b[step].w});
    }
    for (int i = 0; i < (OWN > 8 ? 2 : 1); ++i) {
      const u32 pair = pack(selu(sums[2 * i]), selu(sums[2 * i + 1]));
      const int row = g + 8 * i, y = map.y(first + row), x = map.x(first + row);
      levels[row * SCORE_ROW * 4 + 4 * tile + t] = pair;
      if (row < OWN && map.has(y, x))
        kept[((size_t)y * map.width + x) * (QUARTER / 2) + 4 * tile + t] = pair;
    }
  }
};

// The share of the score head; one warp.
struct Score {
  static constexpr int INNER_STEPS = QUARTER / 16;
  u32 b[INNER_STEPS][2];

  // Ask for the weights.
  __device__ __forceinline__ void ask(const unsigned short *weight) {
    const int lane = threadIdx.x % 32;
    for (int j = 0; j < 2 * INNER_STEPS; ++j) {
      const unsigned short *at = weight + (8 * j + lane % 4 * 2) * 8 + lane / 4;
      b[j / 2][j % 2] = at[0] | (u32)at[8] << 16;
    }
  }

  __device__ __forceinline__ void run(const u32 *levels, const Map &map, int first, u32 *score) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums[4] = {};
    for (int step = 0; step < INNER_STEPS; ++step) {
      const u32 *low = levels + g * SCORE_ROW * 4 + 8 * step + t, *high = low + 8 * SCORE_ROW * 4;
      product16(sums, {low[0], OWN > 8 ? high[0] : 0, low[4], OWN > 8 ? high[4] : 0}, b[step]);
    }
    for (int i = 0; i < (OWN > 8 ? 2 : 1); ++i) {
      const int row = g + 8 * i, y = map.y(first + row), x = map.x(first + row);
      if (row < OWN && map.has(y, x))
        score[((size_t)y * map.width + x) * 4 + t] = pack(sums[2 * i], sums[2 * i + 1]);
    }
  }
};

// The mean of the block's 4 x 4 pixels, by the last threads: the first ones have the projection.
__device__ __forceinline__ void pool(const u32 *values, const Map &map, u32 *pooled) {
  const int pair = (int)threadIdx.x - (THREADS - CO / 2);
  if (pair < 0) return;
  float2 sum = make_float2(0, 0);
#pragma unroll
  for (int m = 0; m < PIXELS; ++m) add_share(sum, 1.f / 16, values[m * LEVEL_ROW * 4 + pair]);
  const size_t pixel = (size_t)(map.top / 4) * (map.width / 4) + map.left / 4;
  pooled[pixel * (CO / 2) + pair] = pack(sum.x, sum.y);
}
#endif

#if BLOCKS > 1
#define CLUSTER CLUSTER_OF(BLOCKS)
#else
#define CLUSTER
#endif

// x [B, height, width, CI]; fragments: of the offset weight, of the weight (and the shortcut's), of
// the level's. out [B, height, width, CO], or with LEVEL `kept` [.., QUARTER].
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, RESIDENT) deform(
    const uint4 *x, const uint4 *fragments, const float *offset_bias, const float *bias, u32 *out,
#if LEVEL
    const uint4 *shortcut, const unsigned short *score_weight, u32 *pooled, u32 *score,
#endif
    int height, int width) {
  CLUSTER_SHARED(memory, BYTES);
  uint4 *const samples = (uint4 *)memory;
  float *const offsets = (float *)memory;  // before the samples
  const Places places{(float4 *)(memory + SAMPLE_BYTES),
                      (u32 *)(memory + SAMPLE_BYTES + 16 * PLACES)};
  float *const sums = (float *)(memory + SUM_START);
  constexpr int SPLIT = CO / COLUMNS * BLOCKS, ALL_STEPS = BLOCKS * STEPS;
  const int left = blockIdx.x / SPLIT * ACROSS, part = blockIdx.x % SPLIT;
  const int rank = BLOCKS > 1 ? part : 0, first_column = BLOCKS > 1 ? 0 : part * COLUMNS;
  const Map map{height, width, (int)blockIdx.y * DOWN, left};
  const size_t before = (size_t)blockIdx.z * height * width;
  const int warp = threadIdx.x / 32;
  x += before * (CI / 8) + rank * 2 * SLICES;

  // Nobody writes weights: they are asked for before the kernel that makes x has ended.
  Offsets share(fragments + rank * STEPS * OFFSET_TILES * WEIGHT, offset_bias, rank == 0);
  if (warp < OFFSET_WARPS) share.ask(0);
  const uint4 *const weight = fragments + ALL_STEPS * OFFSET_TILES * WEIGHT;
  Product product(weight + rank * STEPS * (CO / 16) * WEIGHT, first_column);
  const bool multiplies = WARPS == GROUPS * BESIDE || warp < GROUPS * BESIDE;
  if (EARLY && multiplies) product.begin();
  await_previous_kernel();
  Rest rest;
#if LEVEL
  rest.ask(shortcut + before * (CS / 8) + rank * SLICES, map);
#endif
  if (warp < OFFSET_WARPS) {
    share.run(0, x, map);
#pragma unroll
    for (int start = OFFSET_AHEAD; start < OFFSET_EACH; start += OFFSET_AHEAD) {
      share.ask(start);
      share.run(start, x, map);
    }
    share.store(offsets);
  }
  __syncthreads();
  static_assert(PLACES <= THREADS, "a thread per place");
  const int place = threadIdx.x;
#if BLOCKS > 1
  float2 *const totals = (float2 *)(memory + TOTAL_START);
  if (place < PLACES) totals[place] = block_offset(offsets, place);
  arrive_at_cluster();
  wait_for_cluster();
  if (place < PLACES) places.set(place, cluster_offset(totals, place), map);
#else
  if (place < PLACES) places.set(place, block_offset(offsets, place), map);
#endif
  __syncthreads();
  rest.store(samples);
  fill_samples(x, width, places, samples);
  if (!EARLY && multiplies) product.begin();
  __syncthreads();
  if (multiplies) product.run(samples);
  if (REPLACE) __syncthreads();
  if (multiplies) product.store(sums);
  const int first = rank * OWN;
  const float2 mine = ((const float2 *)(bias + first_column))[threadIdx.x % PAIRS];
#if LEVEL
  Level level;
  Score shares;
  if (warp < LEVEL_TILES) level.ask(weight + ALL_STEPS * (CO / 16) * WEIGHT, warp);
  if (warp == 0) shares.ask(score_weight);
#endif
#if BLOCKS > 1
  arrive_at_cluster();
  wait_for_cluster();
#else
  __syncthreads();
#endif

#if LEVEL
  u32 *const values = (u32 *)(memory + VALUE_START);
  finish(sums, mine, first, [=](int row, u32 pair) {
    values[row * LEVEL_ROW * 4 + threadIdx.x % PAIRS] = pair;
  });
#else
  finish(sums, mine, first, [=](int row, u32 pair) {
    const int y = map.y(first + row), x = map.x(first + row);
    const size_t pixel = before + (size_t)y * width + x;
    if (map.has(y, x)) out[pixel * (CO / 2) + first_column / 2 + threadIdx.x % PAIRS] = pair;
  });
#endif
#if BLOCKS > 1
  leave_cluster();  // this block has read what it needs of the others
#endif
#if LEVEL
  __syncthreads();
  u32 *const levels = (u32 *)(memory + VALUE_START + VALUE_BYTES);
  if (warp < LEVEL_TILES)
    level.run((const uint4 *)values, map, first, warp, levels, out + before * (QUARTER / 2));
  if (POOL > 1) pool(values, map, pooled + before / 16 * (CO / 2));
  __syncthreads();
  if (warp == 0) shares.run(levels, map, first, score + before * 4);
#endif
#if BLOCKS > 1
  wait_for_cluster();
#endif
}
