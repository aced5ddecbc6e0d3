// CUDA on the CPU, for checking kernels where there is no GPU: every thread of a block is a fiber,
// blocks run one after the other. A barrier that is missing shows, because the order of the threads
// is drawn anew in every round; so does shared memory that nothing wrote, which starts as NaN.
// The functions are those of aliked/fused/warp.cuh.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__  // also before members of a struct
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((section("cuda_shared"))) static
#define DYNAMIC_SHARED(name) unsigned char *const name = cuda_host::block_memory()
#define CLUSTER_SHARED(name, bytes) DYNAMIC_SHARED(name)
#define CLUSTER_OF(blocks)

typedef unsigned int u32;
constexpr u32 FULL_WARP = 0xFFFFFFFFu;
struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern "C" unsigned char __start_cuda_shared[], __stop_cuda_shared[];
__attribute__((section("cuda_shared"), used)) static unsigned char some_shared_memory[16];

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr size_t STACK = 128 << 10, DYNAMIC = 228 << 10;
constexpr int LARGEST_CLUSTER = 8;
alignas(128) static unsigned char dynamic_shared[LARGEST_CLUSTER][DYNAMIC];
typedef void (*Kernel)(long, long, long, long, long, long, long, long, long, long, long, long,
                       long, long, long, long, long, long, long, long, long, long, long, long,
                       long, long, long, long, long, long, long, long);
static Kernel kernel;
static long arguments[32];

// Threads that wait for each other: all of a warp, or all of a block.
struct Group {
  int size = 0, arrived = 0;
  long generation = 0;
  const void *operands[1024];
};

struct Fiber {
  jmp_buf state;
  ucontext_t start;
  bool started = false, done = false;
  int index = 0;
  long cluster_generation = 0;
};

static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static std::vector<Group> warps;
static Group blocks[LARGEST_CLUSTER], cluster;
static int block_size, first_block;
static Fiber *current;
static jmp_buf scheduler;
static ucontext_t scheduler_start;
static std::mt19937 random_order;

static void yield() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

static void leave(Group &group) {
  --group.size;
  if (group.size > 0 && group.arrived == group.size) group.arrived = 0, ++group.generation;
}

// Wait for the group; the last one in does `work` for all, on everyone's operands by rank.
template <typename Work> void together(Group &group, int rank, const void *operand, Work work) {
  const long generation = group.generation;
  group.operands[rank] = operand;
  if (++group.arrived == group.size) {
    work(group.operands);
    group.arrived = 0;
    ++group.generation;
  } else {
    while (group.generation == generation) yield();
  }
}

// Of this thread's block in its cluster.
static int rank() { return current->index / block_size; }
static unsigned char *block_memory() { return dynamic_shared[rank()]; }
static int lane() { return current->index % 32; }
template <typename Work> void as_warp(const void *operand, Work work) {
  together(warps[current->index / 32], lane(), operand, work);
}

static void body() {
  const long *a = arguments;
  kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
         a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26],
         a[27], a[28], a[29], a[30], a[31]);
  current->done = true;
  leave(blocks[rank()]);
  leave(cluster);
  leave(warps[current->index / 32]);
  _longjmp(scheduler, 1);
}

static void resume(Fiber &fiber) {
  current = &fiber;
  const int i = fiber.index % block_size;
  blockIdx.x = first_block + rank();
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

static void run_cluster(int size) {
  const int threads = size * block_size;
  memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
  memset(dynamic_shared, 0xFF, size * DYNAMIC);
  fibers.assign(threads, Fiber());
  warps.assign((threads + 31) / 32, Group());
  for (int i = 0; i < size; ++i) blocks[i] = Group(), blocks[i].size = block_size;
  cluster = Group();
  cluster.size = threads;
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < threads; ++i) {
    Fiber &fiber = fibers[i];
    fiber.index = i;
    ++warps[i / 32].size;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks.data() + i * STACK;
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, body, 0);
  }
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), random_order);
    for (int i : order) resume(fibers[i]);
    order.erase(std::remove_if(order.begin(), order.end(), [](int i) { return fibers[i].done; }),
                order.end());
  }
}

}  // namespace cuda_host

extern "C" void launch(void *kernel, const long *arguments, int count, const int *grid,
                       const int *shape, int cluster) {
  cuda_host::kernel = (cuda_host::Kernel)kernel;
  memset(cuda_host::arguments, 0, sizeof cuda_host::arguments);
  std::copy(arguments, arguments + count, cuda_host::arguments);
  gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  blockDim = {(unsigned)shape[0], (unsigned)shape[1], (unsigned)shape[2]};
  const int threads = shape[0] * shape[1] * shape[2];
  cuda_host::block_size = threads;
  cuda_host::stacks.resize(cluster * threads * cuda_host::STACK);
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; x += cluster) {
        blockIdx = {x, y, z};
        cuda_host::first_block = x;
        cuda_host::run_cluster(cluster);
      }
}

static void __syncthreads() {
  cuda_host::together(cuda_host::blocks[cuda_host::rank()], 0, nullptr, [](const void **) {});
}
static int rank_in_cluster() { return cuda_host::rank(); }
// Nobody who waits goes on before all have arrived.
static void arrive_at_cluster() {
  cuda_host::Group &group = cuda_host::cluster;
  cuda_host::current->cluster_generation = group.generation;
  if (++group.arrived == group.size) group.arrived = 0, ++group.generation;
}
static void leave_cluster() { arrive_at_cluster(); }
static void wait_for_cluster() {
  while (cuda_host::cluster.generation == cuda_host::current->cluster_generation)
    cuda_host::yield();
}
template <typename T> T load_of_block(const T *shared, int rank) {
  return *(const T *)((const unsigned char *)shared +
                      (rank - cuda_host::rank()) * (long)cuda_host::DYNAMIC);
}
static void __syncwarp(u32 = FULL_WARP) { cuda_host::as_warp(nullptr, [](const void **) {}); }
static void __threadfence() {}

template <typename T> T __shfl_sync(u32, T value, int from, int width = 32) {
  static T values[256][32];  // by warp and lane
  const int lane = cuda_host::lane(), warp = cuda_host::current->index / 32;
  cuda_host::as_warp(&value, [warp](const void **all) {
    for (int i = 0; i < 32; ++i) values[warp][i] = *(const T *)all[i];
  });
  const T result = values[warp][lane / width * width + (from & (width - 1))];
  __syncwarp();  // before the next one overwrites the values
  return result;
}
template <typename T> T __shfl_xor_sync(u32 mask, T value, int other, int width = 32) {
  const int lane = cuda_host::lane(), target = lane ^ other;
  return __shfl_sync(mask, value, target / width == lane / width ? target : lane);
}
template <typename T> T __shfl_up_sync(u32 mask, T value, u32 by, int width = 32) {
  const int lane = cuda_host::lane();
  return __shfl_sync(mask, value, lane % width >= (int)by ? lane - (int)by : lane);
}
template <typename T> T __shfl_down_sync(u32 mask, T value, u32 by, int width = 32) {
  const int lane = cuda_host::lane();
  return __shfl_sync(mask, value, lane % width + (int)by < width ? lane + (int)by : lane);
}
static u32 __ballot_sync(u32, bool vote) {
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (u32)__shfl_sync(FULL_WARP, (int)vote, i) << i;
  return bits;
}
static bool __any_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
static bool __all_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) == FULL_WARP; }

template <typename T> T atomicAdd(T *at, T value) { T old = *at; *at += value; return old; }
template <typename T> T atomicMax(T *at, T value) {
  T old = *at;
  *at = std::max(old, value);
  return old;
}
template <typename T> T atomicMin(T *at, T value) {
  T old = *at;
  *at = std::min(old, value);
  return old;
}
template <typename T> T atomicOr(T *at, T value) { T old = *at; *at |= value; return old; }
template <typename T> T atomicExch(T *at, T value) { T old = *at; *at = value; return old; }

template <typename To, typename From> To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static int __float_as_int(float value) { return bits_of<int>(value); }
static u32 __float_as_uint(float value) { return bits_of<u32>(value); }
static float __int_as_float(int value) { return bits_of<float>(value); }
static float __uint_as_float(u32 value) { return bits_of<float>(value); }
static int __popc(u32 x) { return __builtin_popcount(x); }
static int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static int __ffs(int x) { return __builtin_ffs(x); }
static int __ffsll(long long x) { return __builtin_ffsll(x); }
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
#define __expf expf  // the C library has a function of this name
static float __fadd_rd(float a, float b) {
  const double sum = (double)a + b;
  return (float)sum > sum ? nextafterf((float)sum, -INFINITY) : (float)sum;
}
static float rsqrtf(float x) { return 1 / sqrtf(x); }
static float __fdividef(float a, float b) { return a / b; }
template <typename T> T __ldg(const T *at) { return *at; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }

static u32 pack(float low, float high) {
  return bits_of<uint16_t>((_Float16)low) | (u32)bits_of<uint16_t>((_Float16)high) << 16;
}
static float low_half(u32 both) { return bits_of<_Float16>((uint16_t)both); }
static float high_half(u32 both) { return bits_of<_Float16>((uint16_t)(both >> 16)); }
static u32 multiply_add(u32 a, u32 b, u32 c) {
  return pack(low_half(a) * low_half(b) + low_half(c), high_half(a) * high_half(b) + high_half(c));
}

namespace cuda_host {

// One lane's part of d += a b with an inner size of `inner`, 8 or 16.
struct Product { float *d; const u32 *a, *b; };

static float half_of(u32 both, int which) { return which ? high_half(both) : low_half(both); }

static void multiply(const void **all, int inner) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product &mine = *(const Product *)all[lane];
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < inner / 8; ++k)
      for (int i = 0; i < 2; ++i) {
        a[g][8 * k + 2 * t + i] = half_of(mine.a[2 * k], i);
        a[g + 8][8 * k + 2 * t + i] = half_of(mine.a[2 * k + 1], i);
        b[8 * k + 2 * t + i][g] = half_of(mine.b[k], i);
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product &mine = *(const Product *)all[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < inner; ++k) mine.d[i] += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
  }
}

struct Rows { const unsigned char *row; u32 *r; };

static u32 entry(const void **all, int matrix, int row, int column) {
  uint16_t value;
  memcpy(&value, ((const Rows *)all[8 * matrix + row])->row + 2 * column, 2);
  return value;
}

template <bool TRANSPOSED> void load(const void **all) {
  for (int lane = 0; lane < 32; ++lane) {
    const int i = lane / 4, j = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const u32 low = TRANSPOSED ? entry(all, m, j, i) : entry(all, m, i, j);
      const u32 high = TRANSPOSED ? entry(all, m, j + 1, i) : entry(all, m, i, j + 1);
      ((const Rows *)all[lane])->r[m] = low | high << 16;
    }
  }
}

static Rows rows(u32 *r, const void *row) {
  if ((uintptr_t)row % 16) fprintf(stderr, "row of a matrix not aligned to 16 bytes\n"), abort();
  return {(const unsigned char *)row, r};
}

}  // namespace cuda_host

static void product16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  cuda_host::Product mine{d, a, b};
  cuda_host::as_warp(&mine, [](const void **all) { cuda_host::multiply(all, 16); });
}
static void product8(float (&d)[4], u32 a0, u32 a1, u32 b) {
  const u32 a[2] = {a0, a1};
  cuda_host::Product mine{d, a, &b};
  cuda_host::as_warp(&mine, [](const void **all) { cuda_host::multiply(all, 8); });
}
static void product16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  product16(d, a, b);
}
static void product8(float (&d)[4], u32 a0, u32 a1, u32 b, const float (&c)[4]) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  product8(d, a0, a1, b);
}
static void load_matrices(u32 (&r)[4], const void *row) {
  cuda_host::Rows mine = cuda_host::rows(r, row);
  cuda_host::as_warp(&mine, [](const void **all) { cuda_host::load<false>(all); });
}
static void load_transposed(u32 (&r)[4], const void *row) {
  cuda_host::Rows mine = cuda_host::rows(r, row);
  cuda_host::as_warp(&mine, [](const void **all) { cuda_host::load<true>(all); });
}
static uint4 load_early(const uint4 *global, bool used = true) {
  return used ? *global : make_uint4(0, 0, 0, 0);
}
static uint2 load_early(const uint2 *global, bool used = true) {
  return used ? *global : make_uint2(0, 0);
}
static void copy_async(void *shared, const void *global, bool used = true) {
  if ((uintptr_t)shared % 16 || (used && (uintptr_t)global % 16))
    fprintf(stderr, "asynchronous copy not aligned to 16 bytes\n"), abort();
  if (used) memcpy(shared, global, 16);
  else memset(shared, 0, 16);
}
static void end_group_of_copies() {}
static void wait_for_all_but_last_group() {}
static void wait_for_copies() {}
static float power_below_zero(float x, float positive, float bottom) {
  return x > 0 ? positive : bottom * (exp2f(x) - 1);
}
constexpr float SELU_SCALE = 1.0507009873554805f, SELU_ALPHA = 1.6732632423543772f;
constexpr float LOG2E = 1.4426950408889634f;
static float selu(float x) {
  return SELU_SCALE * (x > 0 ? x : SELU_ALPHA * (expf(x) - 1));
}
static void await_previous_kernel() {}
