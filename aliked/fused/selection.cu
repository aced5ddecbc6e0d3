// Which maxima become keypoints, their order, and their refinement to sub-pixel positions.
//
// Defined before this text: RADIUS, BINS, BIN_SHIFT, LOWEST_BIN, TALLY, and EACH, the candidates of
// one warp of `refine`.

typedef long long Key;

constexpr int INDEX_BITS = 32;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int OWN_BINS = BINS / THREADS;
constexpr Key BIN_SIZE = Key(1) << (BIN_SHIFT + INDEX_BITS);

__device__ __forceinline__ int warp_sum(int value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
  return value;
}

// The sum of all threads' values, for all.
__device__ int block_sum(int value) {
  __shared__ int sums[WARPS];
  value = warp_sum(value);
  __syncthreads();  // everyone has read the sums of the last call
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  int total = 0;
  for (int i = 0; i < WARPS; ++i) total += sums[i];
  return total;
}

// How many of the first `total` keys are at least `low`.
__device__ int count_from(const Key *keys, int total, Key low) {
  int count = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < total; i += THREADS) count += keys[i] >= low;
  return block_sum(count);
}

struct Best {
  int bin, kept;
};

// The highest bin with at least k keys in it and above it, and how many these are.
__device__ Best best_bin(const int *tally, int total, int k) {
  __shared__ int sums[WARPS];
  __shared__ Best best;
  // The first thread has the highest bins.
  const int4 *own = (const int4 *)(tally + BINS - (threadIdx.x + 1) * OWN_BINS);
  int counts[OWN_BINS], sum = 0;
#pragma unroll
  for (int i = 0; i < OWN_BINS; i += 4) {
    const int4 v = own[i / 4];
    counts[i] = v.x, counts[i + 1] = v.y, counts[i + 2] = v.z, counts[i + 3] = v.w;
    sum += v.x + v.y + v.z + v.w;
  }
  int above = sum;  // with those of the threads before in the warp
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(FULL_WARP, above, step);
    if (threadIdx.x % 32 >= step) above += other;
  }
  if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = above;
  if (threadIdx.x == 0) best = {0, total};  // the lowest bin has what the others leave
  __syncthreads();
  above -= sum;
  for (int i = 0; i < WARPS; ++i) above += i < threadIdx.x / 32 ? sums[i] : 0;
  if (above < k && above + sum >= k) {
#pragma unroll
    for (int i = OWN_BINS - 1; i >= 0; --i) {
      if (above < k && above + counts[i] >= k)
        best = {BINS - (int)(threadIdx.x + 1) * OWN_BINS + i, above + counts[i]};
      above += counts[i];
    }
  }
  __syncthreads();
  return best;
}

// The smallest key to keep so that at least k, and at most `room`, are kept.
__device__ Key lowest_of_best(const Key *keys, const int *tally, int total, int k, int room) {
  Best best = best_bin(tally, total, k);
  const Key first = (Key)(best.bin + LOWEST_BIN) << (BIN_SHIFT + INDEX_BITS);
  Key low = best.bin ? first : 1, high = first + BIN_SIZE;
  // Many scores in one bin, as on a flat image: halve the range of keys. Keys differ, so it ends.
  while (best.kept > room) {
    const Key middle = low + (high - low) / 2;
    const int count = count_from(keys, total, middle);
    if (count >= k) {
      low = middle;
      best.kept = count;
    } else {
      high = middle;
    }
  }
  return low;
}

// The smallest key whose score is above the threshold; above the mean where none is.
__device__ Key lowest_above(const Key *keys, int total, int threshold_bits, float mean) {
  const Key low = (Key)(threshold_bits + 1) << INDEX_BITS;
  if (threshold_bits >= 0 && count_from(keys, total, low) > 0) return low;
  return (Key)(__float_as_int(mean) + 1) << INDEX_BITS;
}

// Every block finds the same smallest key, then keeps its share of the keys. Without `means` by
// number alone. A `threshold_bits` below 0 says that there is no threshold.
extern "C" __global__ void __launch_bounds__(THREADS)
select_keys(const Key *keys, int *tally, const float *means, Key *chosen, int by_threshold,
            int capacity, int room, int k, int threshold_bits) {
  __shared__ int kept, first;
  await_previous_kernel();
  keys += (size_t)blockIdx.y * capacity;
  chosen += (size_t)blockIdx.y * room;
  tally += (size_t)blockIdx.y * TALLY;
  const int stride = gridDim.x * THREADS, start = blockIdx.x * THREADS + threadIdx.x;
  // Asked for before it is known how many there are; what is beyond them is not looked at.
  Key key = start < capacity ? keys[start] : 0;
  const int total = tally[BINS];
  Key low = 0;
  bool raster = false;
  if (by_threshold) {
    low = lowest_above(keys, total, threshold_bits, means[blockIdx.y]);
    raster = count_from(keys, total, low) <= k;
  }
  if (!raster) low = lowest_of_best(keys, tally, total, k, room);
  if (threadIdx.x == 0) tally[BINS + 2] = raster;

  for (int i = start; i - (int)threadIdx.x < total; i += stride) {
    if (i != start) key = i < total ? keys[i] : 0;
    const bool keep = i < total && key >= low;
    const u32 votes = __ballot_sync(FULL_WARP, keep);
    if (threadIdx.x == 0) kept = 0;
    __syncthreads();
    int place = 0;
    if (threadIdx.x % 32 == 0 && votes) place = atomicAdd(&kept, __popc(votes));
    place = __shfl_sync(FULL_WARP, place, 0) + __popc(votes & ((1u << threadIdx.x % 32) - 1));
    __syncthreads();
    if (threadIdx.x == 0) first = atomicAdd(tally + BINS + 1, kept);
    __syncthreads();
    place += first;
    if (keep && place < room) chosen[place] = key;
  }
}

constexpr int BLOCK_EACH = WARPS * EACH;
constexpr int CHUNK = 2048;  // keys in shared memory
constexpr int SIDE = 2 * RADIUS + 1;
constexpr float TEMPERATURE = 0.1f;

struct Keypoints {
  float2 *positions;
  float *scores, *nms_scores, *dispersities;
};

// One of a warp's candidates; lane i has pixel i of the window around it.
struct Candidate {
  Key key;
  int at, y, x;
  bool real;
  float score;

  // Rows beyond the keypoints are fill-ins: the first pixels, with a score of zero.
  __device__ __forceinline__ void look(const float *scores, int count, int k, int width) {
    const int lane = threadIdx.x % 32, window = lane < SIDE * SIDE ? lane : 0;
    const u32 pixel = 0xFFFFFFFFu - (u32)key, inner = width - 2 * RADIUS;
    real = at < count;
    if (!real) key = 0;
    y = real ? pixel / width : at / inner + RADIUS;
    x = real ? pixel % width : at % inner + RADIUS;
    const size_t row = y + window / SIDE - RADIUS;
    if (real || at < k) score = scores[row * width + x + window % SIDE - RADIUS];
  }

  // Soft-argmax, by a whole warp.
  __device__ __forceinline__ void store(const Keypoints &out, size_t row) const {
    const int lane = threadIdx.x % 32;
    const int step_y = lane / SIDE - RADIUS, step_x = lane % SIDE - RADIUS;
    const float nms_score = __int_as_float((int)(key >> INDEX_BITS));
    float sum = lane < SIDE * SIDE ? __expf((score - nms_score) * (1 / TEMPERATURE)) : 0;
    float sum_y = sum * step_y, sum_x = sum * step_x;
    float squares = sum * (step_y * step_y + step_x * step_x);
#pragma unroll
    for (int step = 16; step; step /= 2) {
      sum += __shfl_xor_sync(FULL_WARP, sum, step);
      sum_y += __shfl_xor_sync(FULL_WARP, sum_y, step);
      sum_x += __shfl_xor_sync(FULL_WARP, sum_x, step);
      squares += __shfl_xor_sync(FULL_WARP, squares, step);
    }
    const float shift_y = sum_y / sum, shift_x = sum_x / sum;
    const float spread = squares / sum - shift_y * shift_y - shift_x * shift_x;
    const float at_y = y + shift_y, at_x = x + shift_x;
    // The four pixels around are in the window: the shift is less than its radius.
    const float floor_y = floorf(at_y), floor_x = floorf(at_x);
    const float below = at_y - floor_y, right = at_x - floor_x;
    const int corner = ((int)floor_y - y + RADIUS) * SIDE + (int)floor_x - x + RADIUS;
    const float v00 = __shfl_sync(FULL_WARP, score, corner);
    const float v01 = __shfl_sync(FULL_WARP, score, corner + 1);
    const float v10 = __shfl_sync(FULL_WARP, score, corner + SIDE);
    const float v11 = __shfl_sync(FULL_WARP, score, corner + SIDE + 1);
    const float upper = (1 - right) * v00 + right * v01, lower = (1 - right) * v10 + right * v11;
    if (lane == 0) {
      out.positions[row] = make_float2(at_x, at_y);
      out.scores[row] = nms_score > 0 ? (1 - below) * upper + below * lower : 0;
      out.nms_scores[row] = nms_score;
      out.dispersities[row] = spread * (1.f / (RADIUS * RADIUS));
    }
  }
};

// Rank what `select` kept by counting what is larger, and refine the first k.
extern "C" __global__ void __launch_bounds__(THREADS)
refine_keypoints(const Key *chosen, const int *tally, const float *scores, float2 *positions,
                 float *refined, float *nms_scores, float *dispersities, int height, int width,
                 int room, int k) {
  __shared__ Key others[CHUNK];
  await_previous_kernel();
  chosen += (size_t)blockIdx.y * room;
  tally += (size_t)blockIdx.y * TALLY + BINS;
  scores += (size_t)blockIdx.y * height * width;
  const int lane = threadIdx.x % 32, first = blockIdx.x * BLOCK_EACH + threadIdx.x / 32;
  // Asked for before it is known how many there are; what is beyond them is not looked at.
  Candidate mine[EACH];
  for (int i = 0; i < EACH; ++i) {
    mine[i].at = first + i * WARPS;
    mine[i].key = mine[i].at < room ? chosen[mine[i].at] : 0;
  }
  Key keys[CHUNK / THREADS];
#pragma unroll
  for (int i = 0; i < CHUNK / THREADS; ++i) {
    const int j = i * THREADS + threadIdx.x;
    keys[i] = j < room ? chosen[j] : 0;
  }
  const int count = tally[1] < room ? tally[1] : room;
  const Key used = tally[2] ? (Key)0xFFFFFFFF : (Key)-1;  // the bits that the order goes by
  if (blockIdx.x * BLOCK_EACH >= (count > k ? count : k)) return;

  int rank[EACH] = {};
  for (int i = 0; i < EACH; ++i) mine[i].look(scores, count, k, width);
  for (int start = 0; start < count; start += CHUNK) {
    const int size = count - start < CHUNK ? count - start : CHUNK;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK / THREADS; ++i) {
      const int j = i * THREADS + threadIdx.x;
      others[j] = (start == 0 ? keys[i] : start + j < count ? chosen[start + j] : 0) & used;
    }
    __syncthreads();
#pragma unroll 4
    for (int j = lane; j < size; j += 32)
      for (int i = 0; i < EACH; ++i) rank[i] += others[j] > (mine[i].key & used);
  }
  const Keypoints out = {positions, refined, nms_scores, dispersities};
  for (int i = 0; i < EACH; ++i) {
    const int total = warp_sum(rank[i]), row = mine[i].real ? total : mine[i].at;
    if (row < k) mine[i].store(out, (size_t)blockIdx.y * k + row);
  }
}
