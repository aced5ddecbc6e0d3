// The mean score of an image, which threshold mode needs. Scores are added up as whole numbers of
// 2^-36, so that the sum does not depend on the order of the blocks.
//
// Defined before this text: THREADS.

constexpr float ONE = 68719476736.f;  // 2^36: an image may have 2^28 pixels of score 1

// Per image, zero before and after the kernel.
struct Total {
  unsigned long long sum, blocks;  // blocks that have added their share
};

extern "C" __global__ void __launch_bounds__(THREADS)
mean_scores(const float *scores, Total *totals, float *means, int pixels) {
  __shared__ unsigned long long sums[THREADS / 32];
  await_previous_kernel();
  scores += (size_t)blockIdx.y * pixels;
  unsigned long long sum = 0;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < pixels; i += gridDim.x * THREADS)
    sum += (unsigned long long)(scores[i] * ONE);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < THREADS / 32; ++i) sum += sums[i];
  Total &total = totals[blockIdx.y];
  atomicAdd(&total.sum, sum);
  __threadfence();  // the sum is there before the block counts
  if (atomicAdd(&total.blocks, 1ull) != gridDim.x - 1) return;
  __threadfence();
  means[blockIdx.y] = (float)((double)atomicAdd(&total.sum, 0ull) / ONE / pixels);
  total.sum = 0, total.blocks = 0;
}
