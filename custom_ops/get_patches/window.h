// Where windows lie on their maps; nothing of PyTorch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_AND_DEVICE __host__ __device__
#else
#define HOST_AND_DEVICE
#endif

namespace aliked {

// Sizes and strides of a call, in elements.
struct Geometry {
  int64_t channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;  // of the maps
  int64_t per_image, windows;                                       // N, B * N
  int32_t size;                                                     // side of a window
};

// First row (or column) of a window around `centre` on a map with `side` rows (or columns).
HOST_AND_DEVICE inline int64_t window_begin(int64_t centre, int64_t side, int32_t size) {
  // A centre far outside moves to where the window is outside just as well and no sum overflows.
  const int64_t lowest = -int64_t{size}, highest = side + size;
  const int64_t near = centre < lowest ? lowest : centre > highest ? highest : centre;
  return near - (size - 1) / 2;
}

HOST_AND_DEVICE inline bool on_map(const Geometry& g, int64_t y, int64_t x) {
  return y >= 0 && y < g.height && x >= 0 && x < g.width;
}

}  // namespace aliked
