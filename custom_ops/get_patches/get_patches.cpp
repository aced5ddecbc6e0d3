// The operator's declaration and its CPU version.
#include "call.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

namespace aliked {
namespace {

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread, as in PyTorch's own loops

// Copies a window whose first pixel is (left, top) out of `map`, and zeros where not inside(y, x).
template <int SIZE, typename T, typename Inside>
void copy_window(const Geometry& g, const T* map, int64_t left, int64_t top, T* patch,
                 const Inside& inside) {
  const int64_t size = SIZE > 0 ? SIZE : g.size;
  for (int64_t channel = 0; channel < g.channels; ++channel, map += g.channel_stride)
    for (int64_t y = top; y < top + size; ++y)
      for (int64_t x = left; x < left + size; ++x)
        *patch++ = inside(y, x) ? map[y * g.row_stride + x * g.column_stride] : T{0};
}

template <int SIZE, typename T>
void copy_windows(const Call& call) {
  const Geometry g = call.geometry;
  const auto* maps = static_cast<const T*>(call.maps.const_data_ptr());
  const auto* centres = static_cast<const int64_t*>(call.centres.const_data_ptr());
  auto* patches = static_cast<T*>(call.patches.mutable_data_ptr());
  const int64_t length = g.channels * g.size * g.size;
  const auto inside = [=](int64_t y, int64_t x) { return on_map(g, y, x); };
  const auto always = [](int64_t, int64_t) { return true; };
  const auto copy = [=](int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) {
      const T* map = maps + window / g.per_image * g.image_stride;
      const int64_t left = window_begin(centres[2 * window], g.width, g.size);
      const int64_t top = window_begin(centres[2 * window + 1], g.height, g.size);
      T* patch = patches + window * length;
      // Most windows are inside as a whole, and several times faster without a question per pixel.
      if (inside(top, left) && inside(top + g.size - 1, left + g.size - 1))
        copy_window<SIZE>(g, map, left, top, patch, always);
      else
        copy_window<SIZE>(g, map, left, top, patch, inside);
    }
  };
  torch::stable::parallel_for(0, g.windows, std::max<int64_t>(GRAIN / length, 1), copy);
}

Tensor get_patches(const Tensor& maps, const Tensor& centres, int64_t size) {
  const Call call = prepare(maps, centres, size);
  dispatch(call, [&](auto element, auto side) {
    copy_windows<decltype(side)::value, decltype(element)>(call);
  });
  return call.patches;
}

}  // namespace
}  // namespace aliked

STABLE_TORCH_LIBRARY_FRAGMENT(aliked, library) {
  library.def("get_patches(Tensor maps, Tensor centres, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aliked, CPU, library) {
  library.impl("get_patches", TORCH_BOX(&aliked::get_patches));
}

// Importing the library as a Python module registers the operator; the module itself is empty.
PyMODINIT_FUNC PyInit__library() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_library"};
  return PyModule_Create(&module);
}
