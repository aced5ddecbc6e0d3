// Mutual nearest neighbours of two sets of unit-length descriptors, in float32.
//
// A candidate is one 64-bit number: the similarity above the inverted index, so that the largest is
// the most similar and, among equals, the first. It is zero where there is none.
//
// Defined before this text: THREADS (256).

typedef unsigned long long Candidate;

constexpr int TILE = 64;              // rows and columns of a block
constexpr int DEPTH = 16;             // channels in shared memory at a time
constexpr int EACH = 4;               // rows and columns of a thread
constexpr int ACROSS = TILE / EACH;   // threads along either side
constexpr int PITCH = TILE + 4;       // keeps rows aligned to 16 bytes and off each other's banks
static_assert(ACROSS * ACROSS == THREADS && TILE * DEPTH == 4 * THREADS, "threads share evenly");

__device__ __forceinline__ Candidate larger(Candidate a, Candidate b) { return a > b ? a : b; }

// Larger similarities have larger bits, negative ones included; none where it is not a number.
__device__ __forceinline__ Candidate candidate(float similarity, int index) {
  if (!(similarity == similarity)) return 0;
  const u32 bits = __float_as_int(similarity);
  const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (Candidate)ordered << 32 | (0xFFFFFFFFu - (u32)index);
}

__device__ __forceinline__ float similarity_of(Candidate best) {
  const u32 ordered = best >> 32;
  return __int_as_float(ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered);
}

__device__ __forceinline__ int index_of(Candidate best) { return 0xFFFFFFFFu - (u32)best; }

// DEPTH channels from `channel` on of TILE descriptors from `first` on, transposed.
__device__ __forceinline__ void load_tile(float (*tile)[PITCH], const float *descriptors, int first,
                                          int count, int channel, int dim) {
  const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 4;
  float4 v = make_float4(0, 0, 0, 0);
  if (first + row < count)
    v = *(const float4 *)(descriptors + (size_t)(first + row) * dim + channel + part);
  tile[part][row] = v.x, tile[part + 1][row] = v.y;
  tile[part + 2][row] = v.z, tile[part + 3][row] = v.w;
}

// Whether a descriptor takes part: rows of score 0 are fill-ins. Without scores all do.
__device__ __forceinline__ bool takes_part(const float *scores, int at, int count) {
  return at < count && (!scores || scores[at] > 0);
}

// The best column of every row and the best row of every column; `best_*` are zero before. `dim` is
// a multiple of DEPTH.
extern "C" __global__ void __launch_bounds__(THREADS)
find_best(const float *a, const float *b, const float *scores_a, const float *scores_b,
          Candidate *best_a, Candidate *best_b, int rows, int columns, int dim) {
  __shared__ __align__(16) float tile_a[DEPTH][PITCH], tile_b[DEPTH][PITCH];
  __shared__ Candidate of_warps[THREADS / 32][TILE];
  await_previous_kernel();
  const int top = blockIdx.y * TILE, left = blockIdx.x * TILE;
  const int down = threadIdx.x / ACROSS * EACH, across = threadIdx.x % ACROSS * EACH;
  float sums[EACH][EACH] = {};
  for (int channel = 0; channel < dim; channel += DEPTH) {
    __syncthreads();
    load_tile(tile_a, a, top, rows, channel, dim);
    load_tile(tile_b, b, left, columns, channel, dim);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
      const float4 x = *(const float4 *)&tile_a[k][down], y = *(const float4 *)&tile_b[k][across];
      const float u[EACH] = {x.x, x.y, x.z, x.w}, v[EACH] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < EACH; ++j) sums[i][j] += u[i] * v[j];
    }
  }

  bool has_row[EACH], has_column[EACH];
  for (int i = 0; i < EACH; ++i) {
    has_row[i] = takes_part(scores_a, top + down + i, rows);
    has_column[i] = takes_part(scores_b, left + across + i, columns);
  }
  // Half a warp has all columns of the tile for the same rows.
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    Candidate best = 0;
    for (int j = 0; j < EACH; ++j)
      if (has_column[j]) best = larger(best, candidate(sums[i][j], left + across + j));
    for (int step = ACROSS / 2; step; step /= 2)
      best = larger(best, __shfl_xor_sync(FULL_WARP, best, step));
    if (across == 0 && has_row[i] && best) atomicMax(best_a + top + down + i, best);
  }
  // The two halves of a warp and all warps share the columns.
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    Candidate best = 0;
    for (int i = 0; i < EACH; ++i)
      if (has_row[i]) best = larger(best, candidate(sums[i][j], top + down + i));
    best = larger(best, __shfl_xor_sync(FULL_WARP, best, ACROSS));
    if (threadIdx.x % 32 < ACROSS) of_warps[threadIdx.x / 32][across + j] = best;
  }
  __syncthreads();
  if (threadIdx.x >= TILE) return;
  Candidate best = 0;
  for (int warp = 0; warp < THREADS / 32; ++warp) best = larger(best, of_warps[warp][threadIdx.x]);
  if (takes_part(scores_b, left + threadIdx.x, columns) && best)
    atomicMax(best_b + left + threadIdx.x, best);
}

// For each row its column where both are each other's best and similar enough, else -1.
// `min_similarity` comes as the bits of a float32.
extern "C" __global__ void __launch_bounds__(THREADS)
keep_mutual(const Candidate *best_a, const Candidate *best_b, int *matches, float *similarities,
            int rows, int min_similarity) {
  await_previous_kernel();
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= rows) return;
  const Candidate best = best_a[row];
  const int column = best ? index_of(best) : -1;
  const float similarity = best ? similarity_of(best) : 0;
  const bool mutual = best && index_of(best_b[column]) == row &&
                      similarity >= __int_as_float(min_similarity);
  matches[row] = mutual ? column : -1;
  similarities[row] = mutual ? similarity : 0;
}
