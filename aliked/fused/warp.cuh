// What the kernels need of a warp, from Turing up: packed half precision, matrix products, shared
// memory. Compiled by NVRTC, which has no headers of its own, so nothing is included here.
// tests/helpers/cuda_on_host.hpp has the same functions for the CPU.

typedef unsigned int u32;  // two half-precision numbers, or any 32 bits
constexpr u32 FULL_WARP = 0xFFFFFFFFu;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
      : "=r"(both) : "f"(low), "f"(high));
  return both;
}

__device__ __forceinline__ float low_half(u32 both) {
  float value;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(both));
  return value;
}

__device__ __forceinline__ float high_half(u32 both) {
  float value;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(both));
  return value;
}

// Both halves of a * b + c, each rounded once.
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// d = a b + c: d and c [16, 8] float32, a [16, 8] and b [8, 8] in half precision (mma.m16n8k8).
// With g = lane / 4 and t = lane % 4, a lane holds
//   a[0], a[1]: columns 2t, 2t + 1 of rows g and g + 8;  b: rows 2t, 2t + 1 of column g;
//   d[0], d[1]: columns 2t, 2t + 1 of row g;  d[2], d[3]: the same of row g + 8.
__device__ __forceinline__ void product8(float (&d)[4], u32 a0, u32 a1, u32 b,
                                         const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
               "{%7,%8,%9,%10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ void product8(float (&d)[4], u32 a0, u32 a1, u32 b) {
  product8(d, a0, a1, b, d);
}

// As `product8` with an inner size of 16 (mma.m16n8k16): a[2], a[3] and b[1] hold columns and rows
// 8 further on.
__device__ __forceinline__ void product16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                          const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
                 "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  product8(d, a[0], a[1], b[0], c);
  product8(d, a[2], a[3], b[1]);
#endif
}

__device__ __forceinline__ void product16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  product16(d, a, b, d);
}

// Blocks side by side along x that read each other's shared memory, from Hopper on: an attribute
// of such a kernel, and the memory. A block must not end while another one may read from it.
#define CLUSTER_OF(blocks) __attribute__((cluster_dims(blocks, 1, 1)))
#define CLUSTER_SHARED(name, bytes) __shared__ __align__(16) unsigned char name[bytes]

__device__ __forceinline__ int rank_in_cluster() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// What all blocks wrote before they arrived, all can read once they have waited.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same without making anything visible: this block reads no more from the others.
__device__ __forceinline__ void leave_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What lies in the shared memory of the block of a rank where `shared` points to in this block's.
__device__ __forceinline__ float2 load_of_block(const float2 *shared, int rank) {
  float2 v = make_float2(0, 0);
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .b32 at; mapa.shared::cluster.u32 at, %2, %3; "
               "ld.shared::cluster.v2.f32 {%0, %1}, [at];}"
               : "=f"(v.x), "=f"(v.y)
               : "r"((u32)__cvta_generic_to_shared(shared)), "r"(rank) : "memory");
#endif
  return v;
}

// Four 8x8 matrices of half precision from shared memory: lane i gives the address of row i % 8 of
// matrix i / 8 (16-byte aligned) and receives columns 2 (i % 4) and the next of row i / 4 of each.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

// As `load_matrices`, each matrix transposed: rows 2 (i % 4) and the next of column i / 4.
__device__ __forceinline__ void load_transposed(u32 (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

// Start to copy 16 bytes, both sides aligned to 16, from global to shared memory; zeros where
// `used` is false. Turing has no such instruction and copies at once.
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool used = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(used ? 16 : 0)
               : "memory");
#else
  *(uint4 *)shared = used ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}

// Ask now for 16 bytes of memory that nobody writes meanwhile, zeros where `used` is false: such
// loads stay in their order, so that those in a row overlap.
__device__ __forceinline__ uint4 load_early(const uint4 *global, bool used = true) {
  uint4 v;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
               "mov.u32 %3, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(global), "r"((u32)used));
  return v;
}

__device__ __forceinline__ uint2 load_early(const uint2 *global, bool used = true) {
  uint2 v;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; "
               "@p ld.global.v2.u32 {%0, %1}, [%2];}"
               : "=&r"(v.x), "=&r"(v.y) : "l"(global), "r"((u32)used));
  return v;
}

// The copies since the last call are one group.
__device__ __forceinline__ void end_group_of_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait for all of this thread's groups but the last.
__device__ __forceinline__ void wait_for_all_but_last_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

// Wait for this thread's copies; a barrier then makes everyone's visible.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// x > 0 ? positive : bottom (2^x - 1), in three instructions. What __expf uses would take three more
// for results below 2^-126.
__device__ __forceinline__ float power_below_zero(float x, float positive, float bottom) {
  asm("{.reg .pred p; .reg .f32 power; setp.le.f32 p, %1, 0f00000000; ex2.approx.ftz.f32 power, %1;"
      "@p fma.rn.f32 %0, power, %2, %3;}"
      : "+f"(positive) : "f"(x), "f"(bottom), "f"(-bottom));
  return positive;
}

constexpr float SELU_SCALE = 1.0507009873554805f, SELU_ALPHA = 1.6732632423543772f;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float selu(float x) {
  return power_below_zero(x * LOG2E, SELU_SCALE * x, SELU_SCALE * SELU_ALPHA);
}

// First in every kernel, for all threads, before it reads or writes what another one writes or
// reads: it may have started while the kernel before it was still at work (`cuda_source.py`).
__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
