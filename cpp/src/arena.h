// Buffers that share one allocation: those that are never in use together may lie on each other.
#pragma once

#include <cstddef>
#include <vector>

namespace aliked::core {

class Arena {
 public:
  // A buffer that is in use from step `first` to step `last`; returns its number.
  int add(size_t size, int first, int last);
  // Choose the places of all; returns the size of the whole.
  size_t place();
  size_t offset(int buffer) const { return buffers_[size_t(buffer)].offset; }

 private:
  struct Buffer {
    size_t size, offset;
    int first, last;
  };
  std::vector<Buffer> buffers_;
};

}  // namespace aliked::core
