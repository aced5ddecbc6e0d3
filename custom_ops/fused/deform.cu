// Deformable 3x3 convolutions in half precision. A block makes PIXELS pixels of COLUMNS channels:
// the offset convolution (its inner size divided among the warps, pixels straight from global
// memory), samples of all taps in shared memory, and their product with the weights.
//
// Inner sizes count in chunks of 8 channels, 16 bytes. 16 channels are a slice: 2 chunks of each
// tap, one of the shortcut, one that is nothing. A step of a product takes 4 chunks: lane i has
// chunk i % 4 of rows i / 4 and i / 4 + 8. The weights lie in that order (`fragments.deform`).
//
// Where there are few pixels, BLOCKS blocks share the slices of the same pixels (a cluster): each
// has its part of every sum. They add up the offsets all, the values each of some of the pixels.
//
// Defined before this text: CI, CO, COLUMNS of CO per block, PIXELS per block (8 or a multiple of
// 16), BLOCKS, WARPS, TILES of 8 columns per warp, AHEAD, AT_ONCE; LEVEL, and with it CS, QUARTER,
// POOL (0 without).

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = CI / 8, TAPS = 9;
constexpr int UNITS = (PIXELS + 15) / 16;  // of 16 rows of a matrix: 4 x 4 pixels side by side
constexpr bool HALF = PIXELS == 8;         // rows 8 to 15 of the only unit are no pixels
constexpr int DOWN = HALF ? 2 : 4, ACROSS = 4 * UNITS;  // pixels of a block
constexpr int PLACES = PIXELS * TAPS;
constexpr int OWN = PIXELS / BLOCKS;  // pixels whose values this block finishes

constexpr int SLICES = CI / 16 / BLOCKS;  // of a block
constexpr int SLICE = 20, SLICE_STEPS = 5, SHORTCUT = 18;  // chunks, steps, the shortcut's chunk
constexpr int STEPS = SLICES * SLICE_STEPS;
constexpr int OFFSET_TILES = 3;  // of 8 columns: 18 offsets
constexpr int OFFSET_WARP_STEPS = (STEPS + WARPS - 1) / WARPS;
constexpr int BESIDE = COLUMNS / 8 / TILES, GROUPS = WARPS / BESIDE;  // warps: columns, inner size
constexpr int WARP_STEPS = (STEPS + GROUPS - 1) / GROUPS;
constexpr bool EARLY = UNITS == 1;  // otherwise there are not enough registers
constexpr int OFFSET_AHEAD = EARLY || OFFSET_WARP_STEPS < 2 ? OFFSET_WARP_STEPS : 2;
static_assert(BESIDE * TILES * 8 == COLUMNS && GROUPS * BESIDE == WARPS, "warps share evenly");
static_assert(SLICES * BLOCKS * 16 == CI && OWN * BLOCKS == PIXELS, "blocks share evenly");
static_assert(BLOCKS == 1 || (UNITS == 1 && COLUMNS == CO && POOL <= 1), "blocks share one unit");
static_assert(!LEVEL || 2 * CS == CI, "a slice has a chunk of the shortcut");

// Rows of shared memory start 64 bytes further on in the 128 bytes of a row of banks.
__device__ constexpr int row_chunks(int chunks) { return chunks + (12 - chunks % 8) % 8; }
constexpr int ROW = row_chunks(SLICES * SLICE);  // of `samples`, in chunks
constexpr int LEVEL_ROW = row_chunks(CO / 8);
constexpr int SUM_ROW = COLUMNS + 8;             // of `sums`, in floats
constexpr int OFFSET_ROW = 12;                   // of `offsets`, in pairs

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int SAMPLE_BYTES = larger(16 * PIXELS * ROW, 8 * WARPS * PIXELS * OFFSET_ROW);
constexpr int PLACE_BYTES = (16 + 4) * PLACES;
constexpr int TOTAL_BYTES = BLOCKS > 1 ? 8 * PLACES : 0;  // of the block's offsets
constexpr int SUM_BYTES = 4 * GROUPS * PIXELS * SUM_ROW;
// The sums of the warps follow the samples, or replace them where there is no room for both.
constexpr bool REPLACE = SAMPLE_BYTES + larger(PLACE_BYTES, SUM_BYTES) > 48 * 1024;
constexpr int SUM_START = REPLACE ? 0 : SAMPLE_BYTES;
constexpr int VALUE_START = REPLACE ? SUM_BYTES : 0;
constexpr int TOTAL_START =
    larger(SAMPLE_BYTES + PLACE_BYTES, larger(SUM_START + SUM_BYTES,
                                              VALUE_START + 16 * OWN * LEVEL_ROW));
constexpr int BYTES = TOTAL_START + TOTAL_BYTES;
static_assert(BYTES <= 48 * 1024, "what every GPU has");

struct Map {
  int height, width, top, left;  // of the whole map; the block's first pixel
  __device__ int y(int m) const { return top + m % 16 / 4; }
  __device__ int x(int m) const { return left + m / 16 * 4 + m % 4; }
  __device__ bool has(int y, int x) const {
    return ((u32)y < (u32)height) & ((u32)x < (u32)width);
  }
};

// The 8 channels from chunk `chunk` on of a pixel, zeros if its number is negative.
template <int CHANNELS>
__device__ __forceinline__ uint4 chunk_of(const uint4 *map, int pixel, int chunk) {
  return load_early(map + (long long)pixel * (CHANNELS / 8) + chunk, pixel >= 0);
}

// d += a b of 16 rows, an inner size of 32 and 8 columns; `low` and `high` are rows 0-7 and 8-15.
__device__ __forceinline__ void product32(float (&d)[4], uint4 low, uint4 high, uint4 b) {
  product16(d, {low.x, high.x, low.y, high.y}, {b.x, b.y});
  product16(d, {low.z, high.z, low.w, high.w}, {b.z, b.w});
}

// Of the neighbour of pixel m that belongs to the tap of a slice's chunk.
__device__ __forceinline__ uint4 neighbour(const uint4 *x, const Map &map, int m, int slice,
                                           int chunk) {
  const int tap = chunk / 2;
  const int row = map.y(m) + tap / 3 - 1, column = map.x(m) + tap % 3 - 1;
  const bool exists = (tap < TAPS) & map.has(row, column);
  return chunk_of<CI>(x, exists ? row * map.width + column : -1, 2 * slice + chunk % 2);
}

// A warp's share of the offset convolution: every WARPS-th step, OFFSET_AHEAD of them at a time.
struct Offsets {
  const uint4 *weight;  // of this lane
  uint4 b[OFFSET_AHEAD][OFFSET_TILES];
  float sums[UNITS][OFFSET_TILES][4];

  // The bias belongs to warp 0 of the first block.
  __device__ __forceinline__ Offsets(const uint4 *all, const float *bias, bool first_block) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    weight = all + warp * OFFSET_TILES * 32 + lane;
    for (int j = 0; j < OFFSET_TILES; ++j) {
      const int tap = 4 * j + lane % 4;
      float2 first = make_float2(0, 0);
      if (first_block && warp == 0 && tap < TAPS) first = *(const float2 *)(bias + 2 * tap);
      for (int u = 0; u < UNITS; ++u) {
        sums[u][j][0] = sums[u][j][2] = first.x;
        sums[u][j][1] = sums[u][j][3] = first.y;
      }
    }
  }

  // Ask for the weights of the steps from the warp's `start`-th on.
  __device__ __forceinline__ void ask(int start) {
#pragma unroll
    for (int i = 0; i < OFFSET_AHEAD; ++i) {
      const int step = (start + i) * WARPS;
      for (int j = 0; j < OFFSET_TILES; ++j)
        b[i][j] = load_early(weight + (step * OFFSET_TILES + j) * 32,
                             step + WARPS <= STEPS || step + threadIdx.x / 32 < STEPS);
    }
  }

  // Multiply the pixels by these.
  __device__ __forceinline__ void run(int start, const uint4 *x, const Map &map) {
    const int lane = threadIdx.x % 32;
    uint4 low[OFFSET_AHEAD][UNITS], high[OFFSET_AHEAD][UNITS];
#pragma unroll
    for (int i = 0; i < OFFSET_AHEAD; ++i) {
      const int step = (start + i) * WARPS + threadIdx.x / 32, slice = step / SLICE_STEPS;
      // Steps beyond the last one count as taps beyond the last one.
      const int chunk = step < STEPS ? step % SLICE_STEPS * 4 + lane % 4 : SLICE;
      for (int u = 0; u < UNITS; ++u) {
        const int m = 16 * u + lane / 4;
        low[i][u] = neighbour(x, map, m, slice, chunk);
        high[i][u] = HALF ? make_uint4(0, 0, 0, 0) : neighbour(x, map, m + 8, slice, chunk);
      }
    }
    __syncwarp();  // keeps the compiler from multiplying before it has asked for all
#pragma unroll
    for (int i = 0; i < OFFSET_AHEAD; ++i)
      for (int u = 0; u < UNITS; ++u)
        for (int j = 0; j < OFFSET_TILES; ++j)
          product32(sums[u][j], low[i][u], high[i][u], b[i][j]);
  }

  // Pairs (dy, dx) [WARPS, PIXELS, OFFSET_ROW].
  __device__ __forceinline__ void store(float2 *offsets) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    offsets += (warp * PIXELS + lane / 4) * OFFSET_ROW + lane % 4;
    for (int u = 0; u < UNITS; ++u)
      for (int j = 0; j < OFFSET_TILES; ++j) {
        float2 *row = offsets + 16 * u * OFFSET_ROW + 4 * j;
        row[0] = make_float2(sums[u][j][0], sums[u][j][1]);
        if (!HALF) row[8 * OFFSET_ROW] = make_float2(sums[u][j][2], sums[u][j][3]);
      }
  }
};

// The offset of a place (pixel by pixel, tap by tap) as this block's warps have it.
__device__ __forceinline__ float2 block_offset(const float2 *offsets, int place) {
  float2 offset = make_float2(0, 0);
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) {
    const float2 share =
        offsets[(warp * PIXELS + place / TAPS) * OFFSET_ROW + place % TAPS];
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

// Where all taps are sampled. Shares are those of the rows above and below and of the columns before
// and after, zero outside the map. The pixel above and before stands in the upper 30 bits of a
// corner, the lowest bits tell whether the next column and the next row are other pixels.
struct Places {
  float4 *shares;  // [PLACES]
  u32 *corners;

  // Given the offset (dy, dx).
  __device__ __forceinline__ void set(int place, float2 offset, const Map &map) const {
    const int m = place / TAPS, tap = place % TAPS;
    const float limit = max(map.height, map.width) * 0.25f;  // as in the trained model
    const float y = map.y(m) + tap / 3 - 1 + fminf(fmaxf(offset.x, -limit), limit);
    const float x = map.x(m) + tap % 3 - 1 + fminf(fmaxf(offset.y, -limit), limit);
    const float above = floorf(y), before = floorf(x), below = y - above, after = x - before;
    const int row = (int)above, column = (int)before, rows = map.height, columns = map.width;
    shares[place] = make_float4((u32)row < (u32)rows ? 1 - below : 0,
                                (u32)(row + 1) < (u32)rows ? below : 0,
                                (u32)column < (u32)columns ? 1 - after : 0,
                                (u32)(column + 1) < (u32)columns ? after : 0);
    const int first_row = min(max(row, 0), rows - 1), first_column = min(max(column, 0), columns - 1);
    const bool next_row = first_row == row && row + 1 < rows;
    const bool next_column = first_column == column && column + 1 < columns;
    corners[place] = (u32)(first_row * columns + first_column) << 2 | next_row << 1 | next_column;
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

  // `x` is the map from these channels on.
  __device__ __forceinline__ void ask(const unsigned char *x, int width, const Places &places, int place) {
    const float4 shares = places.shares[place];
    const u32 corner = places.corners[place];
    const int right = corner & 1, below = corner & 2 ? width : 0;
    for (int i = 0; i < 4; ++i) {
      const int pixel = (int)(corner >> 2) + (i / 2 ? below : 0) + (i % 2 ? right : 0);
      corners[i] = load_early((const uint4 *)(x + (long long)pixel * (2 * CI)));
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

// A thread samples the same 8 channels of some places, several at a time, for their loads to
// overlap.
__device__ __forceinline__ void fill_samples(const uint4 *x, int width, const Places &places,
                                             uint4 *samples) {
  constexpr int CHUNKS_HERE = 2 * SLICES, STRIDE = THREADS / CHUNKS_HERE;
  static_assert(STRIDE * CHUNKS_HERE == THREADS, "threads share evenly");
  const int chunk = threadIdx.x % CHUNKS_HERE, first = threadIdx.x / CHUNKS_HERE;
  const unsigned char *const from = (const unsigned char *)(x + chunk);
  samples += chunk / 2 * SLICE + chunk % 2;
#pragma unroll 1
  for (int start = 0; start < PLACES; start += AT_ONCE * STRIDE) {
    Sample some[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
      some[k].ask(from, width, places, min(start + k * STRIDE + first, PLACES - 1));
    __syncwarp();  // as above
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int place = start + k * STRIDE + first;
      if (place < PLACES) samples[place / TAPS * ROW + place % TAPS * 2] = some[k].mean();
    }
  }
}

// What follows the taps in each slice: the shortcut's pixels, if any, and zeros.
struct Rest {
  static constexpr int COUNT = PIXELS * SLICES, EACH = (COUNT + THREADS - 1) / THREADS;
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

// A warp's part of the product: TILES tiles of 8 columns, every GROUPS-th step.
struct Product {
  const uint4 *weight;  // of this lane: first step, first tile
  int group;
  uint4 b[AHEAD][TILES];
  float sums[UNITS][TILES][4] = {};

  __device__ __forceinline__ bool has(int i) const {
    return (i + 1) * GROUPS <= STEPS || i * GROUPS + group < STEPS;
  }

  __device__ __forceinline__ void ask(int i) {
    for (int j = 0; j < TILES; ++j)
      b[i % AHEAD][j] = load_early(weight + (i * GROUPS * (CO / 8) + j) * 32, has(i));
  }

  __device__ __forceinline__ Product(const uint4 *all, int first_column) {
    const int warp = threadIdx.x / 32;
    group = warp / BESIDE;
    weight = all + (group * (CO / 8) + first_column / 8 + warp % BESIDE * TILES) * 32;
    weight += threadIdx.x % 32;
  }

  // Ask for the first weights, long before they are needed.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ask(i);
  }

  __device__ __forceinline__ void run(const uint4 *samples) {
    const int lane = threadIdx.x % 32;
    samples += lane / 4 * ROW + 4 * group + lane % 4;
#pragma unroll
    for (int i = 0; i < WARP_STEPS; ++i) {
      if (has(i))
        for (int u = 0; u < UNITS; ++u) {
          const uint4 *row = samples + 16 * u * ROW + i * GROUPS * 4;
          const uint4 low = row[0], high = HALF ? make_uint4(0, 0, 0, 0) : row[8 * ROW];
          for (int j = 0; j < TILES; ++j) product32(sums[u][j], low, high, b[i % AHEAD][j]);
        }
      if (i + AHEAD < WARP_STEPS) ask(i + AHEAD);
    }
  }

  // [GROUPS, PIXELS, SUM_ROW]
  __device__ __forceinline__ void store(float *all) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *row = all + (group * PIXELS + lane / 4) * SUM_ROW;
    row += warp % BESIDE * TILES * 8 + lane % 4 * 2;
    for (int u = 0; u < UNITS; ++u)
      for (int j = 0; j < TILES; ++j) {
        float *at = row + 16 * u * SUM_ROW + 8 * j;
        *(float2 *)at = make_float2(sums[u][j][0], sums[u][j][1]);
        if (!HALF) *(float2 *)(at + 8 * SUM_ROW) = make_float2(sums[u][j][2], sums[u][j][3]);
      }
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
constexpr int PAIRS = COLUMNS / 2, ROWS_AT_ONCE = THREADS / PAIRS;
static_assert(THREADS % PAIRS == 0, "threads share evenly");

// The values of OWN pixels from `first` on; `emit(row, pair)` takes this thread's channels of pixel
// first + row.
template <typename Emit>
__device__ __forceinline__ void finish(const float *sums, float2 bias, int first, Emit emit) {
  constexpr int EACH = (OWN + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  const int column = threadIdx.x % PAIRS * 2, start = threadIdx.x / PAIRS;
  u32 pairs[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    pairs[k] = value(sums, bias, first + min(start + k * ROWS_AT_ONCE, OWN - 1), column);
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    if (start + k * ROWS_AT_ONCE < OWN) emit(start + k * ROWS_AT_ONCE, pairs[k]);
}

#if LEVEL
// A warp's projection of a unit to its level, and that to its share of the score head.
struct Level {
  static constexpr int INNER_STEPS = CO / 32, LEVEL_TILES = QUARTER / 8;
  uint4 b[INNER_STEPS][LEVEL_TILES];
  u32 score_b[LEVEL_TILES];

  // Ask for the weights.
  __device__ __forceinline__ void ask(const uint4 *weight, const unsigned short *score_weight) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < INNER_STEPS; ++step)
      for (int j = 0; j < LEVEL_TILES; ++j)
        b[step][j] = load_early(weight + (step * LEVEL_TILES + j) * 32 + lane);
    for (int j = 0; j < LEVEL_TILES; ++j) {
      const unsigned short *at = score_weight + (8 * j + lane % 4 * 2) * 8 + lane / 4;
      score_b[j] = at[0] | (u32)at[8] << 16;
    }
  }

  // `first` is the pixel of the first of the OWN rows.
  __device__ __forceinline__ void run(const uint4 *values, const Map &map, int unit, int first,
                                      u32 *kept, u32 *score) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float levels[LEVEL_TILES][4] = {}, shares[4] = {};
#pragma unroll
    for (int step = 0; step < INNER_STEPS; ++step) {
      const uint4 *row = values + (16 * unit + g) * LEVEL_ROW + 4 * step + t;
      const uint4 none = make_uint4(0, 0, 0, 0);
      const uint4 low = OWN >= 8 || g < OWN ? row[0] : none;
      const uint4 high = OWN > 8 ? row[8 * LEVEL_ROW] : none;
      for (int j = 0; j < LEVEL_TILES; ++j) product32(levels[j], low, high, b[step][j]);
    }
    // Sums of a product lie as the rows of the next product want them.
    u32 rows[LEVEL_TILES][2];
    for (int j = 0; j < LEVEL_TILES; ++j)
      for (int i = 0; i < 2; ++i)
        rows[j][i] = pack(selu(levels[j][2 * i]), selu(levels[j][2 * i + 1]));
    for (int j = 0; j < LEVEL_TILES; j += 2)
      product16(shares, {rows[j][0], rows[j][1], rows[j + 1][0], rows[j + 1][1]},
                {score_b[j], score_b[j + 1]});
    for (int i = 0; i < (OWN > 8 ? 2 : 1); ++i) {
      const int row = 16 * unit + g + 8 * i, y = map.y(first + row), x = map.x(first + row);
      if (row >= OWN || !map.has(y, x)) continue;
      const size_t pixel = (size_t)y * map.width + x;
      for (int j = 0; j < LEVEL_TILES; ++j) kept[pixel * (QUARTER / 2) + 4 * j + t] = rows[j][i];
      score[pixel * 4 + t] = pack(shares[2 * i], shares[2 * i + 1]);
    }
  }
};

// Means over the units that lie in the map.
__device__ __forceinline__ void pool(const u32 *values, const Map &map, u32 *pooled) {
  for (int i = threadIdx.x; i < UNITS * CO / 2; i += THREADS) {
    const int unit = i / (CO / 2), pair = i % (CO / 2);
    if (!map.has(map.top, map.x(16 * unit))) continue;
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int m = 0; m < 16; ++m)
      add_share(sum, 1.f / 16, values[(16 * unit + m) * LEVEL_ROW * 4 + pair]);
    const size_t pixel = (size_t)(map.top / 4) * (map.width / 4) + map.x(16 * unit) / 4;
    pooled[pixel * (CO / 2) + pair] = pack(sum.x, sum.y);
  }
}
#endif

// x [B, height, width, CI]; fragments: of the offset weight, of the weight (and the shortcut's), of
// the level's. out [B, height, width, CO], or with LEVEL `kept` [.., QUARTER].
#if BLOCKS > 1
#define CLUSTER CLUSTER_OF(BLOCKS)
#else
#define CLUSTER
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 512 / THREADS) deform(
    const uint4 *x, const uint4 *fragments, const float *offset_bias, const float *bias, u32 *out,
#if LEVEL
    const uint4 *shortcut, const unsigned short *score_weight, u32 *pooled, u32 *score,
#endif
    int height, int width) {
  CLUSTER_SHARED(memory, BYTES);
  uint4 *const samples = (uint4 *)memory;
  float2 *const offsets = (float2 *)memory;  // before the samples
  const Places places{(float4 *)(memory + SAMPLE_BYTES),
                      (u32 *)(memory + SAMPLE_BYTES + 16 * PLACES)};
  float *const sums = (float *)(memory + SUM_START);
  constexpr int SPLIT = CO / COLUMNS * BLOCKS, ALL_STEPS = BLOCKS * STEPS;
  const int left = blockIdx.x / SPLIT * ACROSS, part = blockIdx.x % SPLIT;
  const int rank = BLOCKS > 1 ? part : 0, first_column = BLOCKS > 1 ? 0 : part * COLUMNS;
  const Map map{height, width, (int)blockIdx.y * DOWN, left};
  const size_t before = (size_t)blockIdx.z * height * width;
  x += before * CHUNKS + rank * 2 * SLICES;

  // Nobody writes weights: they are asked for before the kernel that makes x has ended.
  Offsets share(fragments + rank * STEPS * OFFSET_TILES * 32, offset_bias, rank == 0);
  share.ask(0);
  const uint4 *const weight = fragments + ALL_STEPS * OFFSET_TILES * 32;
  Product product(weight + rank * STEPS * (CO / 8) * 32, first_column);
  if (EARLY) product.begin();
  await_previous_kernel();
  Rest rest;
#if LEVEL
  rest.ask(shortcut + before * (CS / 8) + rank * SLICES, map);
#endif
  share.run(0, x, map);
#pragma unroll
  for (int start = OFFSET_AHEAD; start < OFFSET_WARP_STEPS; start += OFFSET_AHEAD) {
    share.ask(start);
    share.run(start, x, map);
  }
  if (!EARLY) product.begin();
  share.store(offsets);
  __syncthreads();
#if BLOCKS > 1
  float2 *const totals = (float2 *)(memory + TOTAL_START);
  for (int i = threadIdx.x; i < PLACES; i += THREADS) totals[i] = block_offset(offsets, i);
  arrive_at_cluster();
  wait_for_cluster();
  for (int i = threadIdx.x; i < PLACES; i += THREADS)
    places.set(i, cluster_offset(totals, i), map);
#else
  for (int i = threadIdx.x; i < PLACES; i += THREADS)
    places.set(i, block_offset(offsets, i), map);
#endif
  __syncthreads();
  rest.store(samples);
  fill_samples(x, width, places, samples);
  __syncthreads();
  product.run(samples);
  if (REPLACE) __syncthreads();
  product.store(sums);
  const int first = rank * OWN;
  const float2 mine = ((const float2 *)(bias + first_column))[threadIdx.x % PAIRS];
#if LEVEL
  static_assert(UNITS <= WARPS, "a warp per unit");
  const int warp = threadIdx.x / 32;
  Level level;
  if (warp < UNITS) level.ask(weight + ALL_STEPS * (CO / 8) * 32, score_weight);
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
  arrive_at_cluster();  // this block has read what it needs of the others
#endif
#if LEVEL
  __syncthreads();
  if (warp < UNITS)
    level.run((const uint4 *)values, map, warp, first, out + before * (QUARTER / 2),
              score + before * 4);
  if (POOL > 1) pool(values, map, pooled + before / 16 * (CO / 2));
#endif
#if BLOCKS > 1
  wait_for_cluster();
#endif
}
