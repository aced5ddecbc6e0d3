// A weights file: safetensors whose tensors lie as the kernels read them. docs/cpp.md has the
// format; `aliked/fused/pack_weights.py` writes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace aliked::core {

// Sizes of a model: see `aliked/configs.py`.
struct Shape {
  int channels[4] = {};
  int dim = 0;        // of a descriptor
  int positions = 0;  // that it is sampled at

  int quarter() const { return dim / 4; }
};

// Every tensor that a kernel reads, and how much of it: the kernels do not check.
struct Expected {
  std::string name, type;  // "F16" or "F32"
  int64_t count;
};
std::vector<Expected> expected_tensors(const Shape &shape);

class Weights {
 public:
  // Both throw ALIKED_BAD_WEIGHTS, `read` also ALIKED_NO_FILE. `file` is what sentences call it.
  static Weights read(const std::string &file);
  static Weights parse(const void *data, size_t size, const std::string &file);

  const std::string &model() const { return model_; }
  const Shape &shape() const { return shape_; }

  // All tensors for one copy to the device, each aligned to ALIGNMENT bytes.
  static constexpr size_t ALIGNMENT = 256;
  const std::vector<unsigned char> &bytes() const { return bytes_; }
  size_t offset(const std::string &tensor) const { return offsets_.at(tensor); }

 private:
  std::string model_;
  Shape shape_;
  std::vector<unsigned char> bytes_;
  std::map<std::string, size_t> offsets_;
};

}  // namespace aliked::core
