#include "arena.h"

#include <algorithm>
#include <numeric>

namespace aliked::core {
namespace {

constexpr size_t ALIGNMENT = 256;

}  // namespace

int Arena::add(size_t size, int first, int last) {
  buffers_.push_back({(size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, 0, first, last});
  return int(buffers_.size()) - 1;
}

// The largest first, each in the lowest gap that those in use at the same time leave.
size_t Arena::place() {
  std::vector<size_t> order(buffers_.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [this](size_t a, size_t b) { return buffers_[a].size > buffers_[b].size; });
  std::vector<const Buffer *> placed;  // ascending offsets
  size_t whole = 0;
  for (size_t i : order) {
    Buffer &buffer = buffers_[i];
    buffer.offset = 0;
    for (const Buffer *other : placed) {
      if (other->last < buffer.first || buffer.last < other->first) continue;
      if (other->offset >= buffer.offset + buffer.size) break;
      buffer.offset = std::max(buffer.offset, other->offset + other->size);
    }
    const auto after = [](size_t offset, const Buffer *other) { return offset < other->offset; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer.offset, after), &buffer);
    whole = std::max(whole, buffer.offset + buffer.size);
  }
  return whole;
}

}  // namespace aliked::core
