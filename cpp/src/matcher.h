// Mutual nearest neighbours on the GPU.
#pragma once

#include <memory>
#include <mutex>

#include "aliked.h"
#include "driver.h"
#include "kernels.h"

namespace aliked::core {

class Matcher {
 public:
  explicit Matcher(int device);
  ~Matcher();

  void match(const aliked_descriptors *first, const aliked_descriptors *second,
             float min_similarity, aliked_matches *matches);
  void match_async(const aliked_descriptors *first, const aliked_descriptors *second,
                   float min_similarity, CUstream stream, aliked_matches *matches);

 private:
  struct State {
    explicit State(const Device &device)
        : kernels(device), stream(make_stream()), done(make_event()) {}
    Kernels kernels;
    Stream stream;
    Event done;             // of the last call
    DeviceMemory best;      // candidates of the rows, then of the columns
    DeviceMemory copies[2]; // descriptors and scores that came from the host
    HostMemory found;       // indices, then similarities
  };

  aliked_descriptors on_device(const aliked_descriptors &descriptors, DeviceMemory &copy);
  void queue(const aliked_descriptors &first, const aliked_descriptors &second,
             float min_similarity, CUstream stream, aliked_matches *matches);

  std::mutex mutex_;
  Device device_;
  std::unique_ptr<State> state_;
};

}  // namespace aliked::core
