// A call of the operator: its arguments, checked, and its result, allocated.
//
// Nothing but PyTorch's stable ABI is used, so the library outlives PyTorch's updates.
#pragma once

#include "window.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <type_traits>

namespace aliked {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Call {
  Tensor maps;     // [B, C, H, W], any strides
  Tensor centres;  // [B, N, 2] int64 (x, y), contiguous
  Tensor patches;  // [B, N, C, size, size], contiguous, to be filled
  Geometry geometry;
};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "get_patches: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline bool is_integer(ScalarType type) {
  return type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Short ||
         type == ScalarType::Char || type == ScalarType::Byte;
}

inline void check(const Tensor& maps, const Tensor& centres, int64_t size) {
  if (maps.dim() != 4) refuse("maps must be [B, C, H, W], not of ", maps.dim(), " dimensions");
  if (centres.dim() != 3 || centres.size(2) != 2)
    refuse("centres must be [B, N, 2], pixels (x, y)");
  if (centres.size(0) != maps.size(0))
    refuse("there are ", maps.size(0), " maps, but centres for ", centres.size(0));
  if (!is_integer(centres.scalar_type()))
    refuse("centres must be integers; round or truncate them first");
  if (centres.device() != maps.device()) refuse("maps and centres must be on one device");
  if (size < 1) refuse("the size of a window must be at least 1, not ", size);
  const int64_t most = std::numeric_limits<int32_t>::max();
  if (size > most / size || size * size > most / std::max<int64_t>(maps.size(1), 1))
    refuse("a window of ", size, "x", size, " pixels with ", maps.size(1),
           " channels has more than ", most, " elements");
}

inline Call prepare(const Tensor& maps, const Tensor& centres, int64_t size) {
  check(maps, centres, size);
  const int64_t batch = maps.size(0), count = centres.size(1), channels = maps.size(1);
  Geometry geometry{channels,       maps.size(2),   maps.size(3),
                    maps.stride(0), maps.stride(1), maps.stride(2), maps.stride(3),
                    count,          batch * count,  static_cast<int32_t>(size)};
  return {maps, torch::stable::contiguous(torch::stable::to(centres, ScalarType::Long)),
          torch::stable::new_empty(maps, {batch, count, channels, size, size}), geometry};
}

// Calls `copy(T{}, std::integral_constant<int, SIZE>{})`, unless the result has no elements.
//
// The operator copies elements and never computes with them, so T is an unsigned integer of their
// size, whatever their type. SIZE is the side of a window where it is a usual one, else 0: with a
// constant, loops and divisions become a few instructions.
template <typename Copy>
void dispatch(const Call& call, const Copy& copy) {
  if (call.patches.numel() == 0) return;
  const auto copy_elements = [&](auto element) {
    switch (call.geometry.size) {
      case 3: return copy(element, std::integral_constant<int, 3>{});
      case 5: return copy(element, std::integral_constant<int, 5>{});
      default: return copy(element, std::integral_constant<int, 0>{});
    }
  };
  switch (call.maps.element_size()) {
    case 1: return copy_elements(uint8_t{});
    case 2: return copy_elements(uint16_t{});
    case 4: return copy_elements(uint32_t{});
    case 8: return copy_elements(uint64_t{});
    default: refuse("maps of ", call.maps.element_size(), " bytes per element are not supported");
  }
}

}  // namespace aliked
