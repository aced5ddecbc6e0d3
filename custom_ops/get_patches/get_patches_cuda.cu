// The operator's GPU version.
#define USE_CUDA  // for what PyTorch's headers declare only with it
#include "call.h"
#include "copy_windows.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

namespace aliked {
namespace {

constexpr int64_t WARP = 32;
constexpr int64_t MOST_BLOCKS = 1 << 30;  // a grid can have 2^31 - 1; blocks take turns beyond

template <int SIZE, typename T>
void launch(const Call& call, cudaStream_t stream) {
  const Geometry& g = call.geometry;
  const int64_t warps = (g.channels * g.size * g.size + WARP - 1) / WARP;
  const auto across = static_cast<uint32_t>(std::min<int64_t>(warps * WARP, THREADS));
  const dim3 block(across, THREADS / across);
  const int64_t blocks = std::min((g.windows + block.y - 1) / block.y, MOST_BLOCKS);
  copy_windows<SIZE, T><<<static_cast<uint32_t>(blocks), block, 0, stream>>>(
      g, static_cast<const T*>(call.maps.const_data_ptr()),
      static_cast<const int64_t*>(call.centres.const_data_ptr()),
      static_cast<T*>(call.patches.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor get_patches(const Tensor& maps, const Tensor& centres, int64_t size) {
  const Call call = prepare(maps, centres, size);
  const auto device = maps.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  dispatch(call, [&](auto element, auto side) {
    launch<decltype(side)::value, decltype(element)>(call, static_cast<cudaStream_t>(stream));
  });
  return call.patches;
}

}  // namespace
}  // namespace aliked

STABLE_TORCH_LIBRARY_IMPL(aliked, CUDA, library) {
  library.impl("get_patches", TORCH_BOX(&aliked::get_patches));
}
