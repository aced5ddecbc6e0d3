// The compiled kernels: images embedded in the library, loaded into a context when first wanted.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "launches.h"

namespace aliked::core {

// A launch's arguments: each takes 8 bytes, of which an int uses the first four.
class Arguments {
 public:
  Arguments &operator<<(CUdeviceptr address) {
    values_.push_back(address);
    return *this;
  }
  Arguments &operator<<(int value) {
    values_.push_back((unsigned long long)(long long)value);
    return *this;
  }
  Arguments &operator<<(float) = delete;  // kernels take a float's bits as an int
  std::vector<void *> addresses() {
    std::vector<void *> addresses;
    for (auto &value : values_) addresses.push_back(&value);
    addresses.push_back(nullptr);  // marks the end for the tests' driver
    return addresses;
  }

 private:
  std::vector<unsigned long long> values_;
};

// The bits of a float32.
int bits(float value);

// The modules of one user in one context; not for several threads at a time.
class Kernels {
 public:
  explicit Kernels(const Device &device);

  // Whether blocks can read each other's shared memory, and the kernels for it are built.
  bool has_clusters() const { return clusters_; }

  // Queue a kernel. With `early` it may start while the kernel before it in the stream ends: it
  // waits for that by itself, so only a kernel may come before it.
  void launch(CUstream stream, const std::string &kernel, const Build &build, const Sizes &sizes,
              Arguments arguments, bool early);

 private:
  CUfunction function(const Build &build, const std::string &kernel);

  const Device &device_;
  bool clusters_, overlaps_;
  std::map<int, Module> modules_;
  std::map<std::pair<int, std::string>, CUfunction> functions_;
};

}  // namespace aliked::core
