// Non-maximum suppression in one pass. A warp owns four rows of 128 pixels, four by four to a lane,
// and has the two rows above and below in registers too, so that it finds the maxima of windows
// without anyone's help; only bits travel between warps: which pixels are maxima.
//
// Such bits are four words per row: bit i of word j is column 4 i + j of the tile.
//
// Defined before this text: RADIUS (2), WARPS, BINS, BIN_SHIFT, LOWEST_BIN, TALLY.

constexpr int ROWS = 4;                   // of a warp; a block has WARPS
constexpr int HEIGHT = ROWS * WARPS;      // of a tile; its width is 128
constexpr int HALO = 5 * RADIUS;          // five windows follow each other: one, and two per round
constexpr int STEP_DOWN = HEIGHT - 2 * HALO;
// Tiles start at columns that are multiples of four, the first with one lane before the image: a
// lane at the edge of the tile has no neighbour, which must not matter to pixels that exist.
constexpr int STEP_ACROSS = 104, LEAD = 4, LEFT_HALO = 12;
constexpr int AROUND = 2 * RADIUS;        // rows of bits that a warp reads above and below its own
constexpr int SEEN = ROWS + 2 * RADIUS;   // rows of values of a warp
constexpr float LOWEST = 1e-45f;          // a maximum is above zero

// Largest of five neighbours out of eight values in a row, for the middle four.
__device__ __forceinline__ void windows(const float (&v)[8], float (&best)[4]) {
  const float middle = fmaxf(fmaxf(v[3], v[4]), LOWEST), two = fmaxf(v[2], middle);
  const float left = fmaxf(v[1], two), right = fmaxf(v[5], v[6]);
  best[0] = fmaxf(v[0], left);
  best[1] = fmaxf(left, v[5]);
  best[2] = fmaxf(two, right);
  best[3] = fmaxf(middle, fmaxf(right, v[7]));
}

// Add the maxima of 5x5 windows to the bits of the warp's own rows.
__device__ __forceinline__ void add_maxima(const float (&values)[SEEN][4], u32 (&maxima)[ROWS][4]) {
  float down[4][ROWS];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float column[SEEN] = {values[0][j], values[1][j], values[2][j], values[3][j],
                                values[4][j], values[5][j], values[6][j], values[7][j]};
    windows(column, down[j]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float row[8] = {__shfl_up_sync(FULL_WARP, down[2][r], 1),
                          __shfl_up_sync(FULL_WARP, down[3][r], 1),
                          down[0][r], down[1][r], down[2][r], down[3][r],
                          __shfl_down_sync(FULL_WARP, down[0][r], 1),
                          __shfl_down_sync(FULL_WARP, down[1][r], 1)};
    float best[4];
    windows(row, best);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      maxima[r][j] |= __ballot_sync(FULL_WARP, values[r + RADIUS][j] == best[j]);
  }
}

// Which pixels of a row have one of the maxima in their window; `rows` starts two rows above.
__device__ __forceinline__ uint4 near_maxima(const uint4 *rows) {
  uint4 any = rows[0];
#pragma unroll
  for (int i = 1; i <= 2 * RADIUS; ++i) {
    const uint4 row = rows[i];
    any = make_uint4(any.x | row.x, any.y | row.y, any.z | row.z, any.w | row.w);
  }
  const u32 all = any.x | any.y | any.z | any.w;
  return make_uint4(any.x | any.y | any.z | (any.z | any.w) << 1, all | any.w << 1,
                    all | any.x >> 1, any.y | any.z | any.w | (any.x | any.y) >> 1);
}

// Take away the values near maxima: zero never becomes a maximum. `shared` is the warp's own.
__device__ __forceinline__ void suppress(float (&values)[SEEN][4], const uint4 *rows,
                                         uint4 *shared) {
  const u32 lane = threadIdx.x, bit = 1u << lane;
  if (lane < SEEN) shared[lane] = near_maxima(rows + lane);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < SEEN; ++r) {
    const uint4 near = shared[r];
    if (near.x & bit) values[r][0] = 0;
    if (near.y & bit) values[r][1] = 0;
    if (near.z & bit) values[r][2] = 0;
    if (near.w & bit) values[r][3] = 0;
  }
  __syncwarp();
}

// The scores of a lane from pixel (y, x) on, zero outside the image.
__device__ __forceinline__ void load(float (&values)[SEEN][4], const float *scores, int y, int x,
                                     int height, int width) {
  const float *row = scores + ((long long)y * width + x);
  const bool aligned = width % 4 == 0;  // then four pixels are all inside or all outside
  bool inside[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) inside[j] = x + j >= 0 && x + j < width;
#pragma unroll
  for (int r = 0; r < SEEN; ++r, row += width) {
    const bool exists = y + r >= 0 && y + r < height;
    if (aligned) {
      float4 all = make_float4(0, 0, 0, 0);
      if (exists && inside[0]) all = *(const float4 *)row;
      values[r][0] = all.x, values[r][1] = all.y, values[r][2] = all.z, values[r][3] = all.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[r][j] = exists && inside[j] ? row[j] : 0;
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
find_maxima(const float *scores, long long *keys, int *tally, int height, int width) {
  __shared__ uint4 found[2][HEIGHT + 2 * AROUND], near[WARPS][SEEN];
  __shared__ int count, first;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = 32 * warp + lane;
  const int top = blockIdx.y * STEP_DOWN, left = int(blockIdx.z) * STEP_ACROSS - LEAD;
  const int y = top + ROWS * warp, x = left + 4 * lane;
  const long long capacity = (long long)(height - 2 * RADIUS) * (width - 2 * RADIUS);
  scores += (long long)blockIdx.x * height * width;
  keys += blockIdx.x * capacity;
  tally += (long long)blockIdx.x * TALLY;
  await_previous_kernel();

  float values[SEEN][4];
  load(values, scores, y - RADIUS, x, height, width);
  if (thread == 0) count = 0;
  if (thread < 2 * AROUND) {  // there is nothing beyond the tile
    const int row = thread < AROUND ? thread : HEIGHT + thread;
    found[0][row] = found[1][row] = make_uint4(0, 0, 0, 0);
  }

  // Pixels that are the block's own. At the image's border there is no halo.
  const int begin = blockIdx.y == 0 ? 0 : top + HALO;
  const int end = blockIdx.y == gridDim.y - 1 ? height : top + HEIGHT - HALO;
  u32 maxima[ROWS][4] = {};
  bool used = true;
  // After the first, two more rounds recover maxima that only suppressed neighbours suppressed.
#pragma unroll 1
  for (int round = 0; round < 3; ++round) {
    if (round > 0) {
      uint4 *bits = found[round - 1] + ROWS * warp;
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (lane == r)
          bits[AROUND + r] = make_uint4(maxima[r][0], maxima[r][1], maxima[r][2], maxima[r][3]);
      __syncthreads();
      const int halo = round == 1 ? AROUND : 0;  // what the next round needs of this one
      used = y + ROWS > begin - halo && y < end + halo;
      if (used) suppress(values, bits, near[warp]);
    }
    if (used) add_maxima(values, maxima);
  }

  u32 mine = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (y + r >= max(begin, RADIUS) && y + r < min(end, height - RADIUS))
#pragma unroll
      for (int j = 0; j < 4; ++j) mine |= (maxima[r][j] >> lane & 1) << (4 * r + j);
  const int from = max(blockIdx.z == 0 ? 0 : left + LEFT_HALO, RADIUS) - x;
  const int to = min(blockIdx.z == gridDim.z - 1 ? width : left + LEFT_HALO + STEP_ACROSS,
                     width - RADIUS) - x;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < from || j >= to) mine &= ~(0x1111u << j);

  // Where the lane's keys go: after those of lower lanes, of warps before, of blocks before.
  int place = __popc(mine);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(FULL_WARP, place, step);
    if (lane >= step) place += before;
  }
  int start = 0;
  if (lane == 31 && place > 0) start = atomicAdd(&count, place);
  start = __shfl_sync(FULL_WARP, start, 31) + place - __popc(mine);
  __syncthreads();
  if (thread == 0) first = count ? atomicAdd(tally + BINS, count) : 0;
  __syncthreads();
  for (long long at = first + start; mine; mine &= mine - 1, ++at) {
    const int i = __ffs(mine) - 1, pixel = (y + i / 4) * width + x + i % 4;
    const int bits = __float_as_int(scores[pixel]);
    if (at < capacity) keys[at] = ((long long)bits << 32) | (0xFFFFFFFFu - unsigned(pixel));
    const int bin = (bits >> BIN_SHIFT) - LOWEST_BIN;
    // Most maxima of a photograph are below all bins: counting them in one place would queue up.
    if (bin > 0) atomicAdd(tally + bin, 1);
  }
}
