// The GPU kernel; nothing of PyTorch.
//
// Threads follow the elements of the patches, so a warp always writes neighbours. What it reads
// lies in runs of `size` pixels of a row in an NCHW map, each run in memory sectors of its own,
// whoever reads it; in a channels-last map the neighbours in memory are the window's other
// channels, which the same block reads a moment later, out of its L1 cache.
#pragma once

#include "window.h"

namespace aliked {

constexpr int THREADS = 128;  // of a block, at most
constexpr int AT_ONCE = 4;    // elements a thread loads before it stores the first: loads are slow

// Along x of a block: the elements of one window; along y and over the grid: windows.
template <int SIZE, typename T>
__global__ void __launch_bounds__(THREADS)
    copy_windows(const Geometry g, const T* __restrict__ maps, const int64_t* __restrict__ centres,
                 T* __restrict__ patches) {
  const uint32_t size = SIZE > 0 ? SIZE : g.size, area = size * size;
  const uint32_t length = static_cast<uint32_t>(g.channels) * area;  // below 2^31, see `check`
  const int64_t windows_at_once = int64_t{gridDim.x} * blockDim.y;
  int64_t window = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  for (; window < g.windows; window += windows_at_once) {
    const T* map = maps + window / g.per_image * g.image_stride;
    const int64_t left = window_begin(centres[2 * window], g.width, size);
    const int64_t top = window_begin(centres[2 * window + 1], g.height, size);
    T* patch = patches + window * length;
    for (uint32_t first = threadIdx.x; first < length; first += AT_ONCE * blockDim.x) {
      T values[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const uint32_t i = first + k * blockDim.x, channel = i / area, pixel = i % area;
        const int64_t y = top + pixel / size, x = left + pixel % size;
        values[k] = i < length && on_map(g, y, x)
                        ? map[channel * g.channel_stride + y * g.row_stride + x * g.column_stride]
                        : T{0};
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k)
        if (first + k * blockDim.x < length) patch[first + k * blockDim.x] = values[k];
    }
  }
}

}  // namespace aliked
