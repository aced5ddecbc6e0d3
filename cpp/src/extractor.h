// An extractor: a network, and a plan (buffers and graphs) per size of its batches.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "aliked.h"
#include "driver.h"
#include "kernels.h"
#include "network.h"
#include "transfer.h"

namespace aliked::core {

// Features as arrays in page-locked memory: [rows, 2], [rows], [rows, length].
struct Results {
  HostMemory memory;
  size_t scores = 0, descriptors = 0;  // offsets in bytes
  std::vector<int> counts;

  float *keypoints_host() const { return (float *)memory.get(); }
  float *scores_host() const { return (float *)(memory.get() + scores); }
  float *descriptors_host() const { return (float *)(memory.get() + descriptors); }
};

struct Plan {
  Plan(const Network &network, const Frame &frame) : frame(frame), buffers(network, frame) {}

  Frame frame;
  Buffers buffers;
  HostMemory staging;   // of images in ordinary memory
  Results results;      // for callers who want them on the host
  GraphExec to_host, to_device;
  Event done;           // of the last run, in `stream`
  CUstream stream = nullptr;
  bool busy = false;    // a run may still be at work
  uint64_t last_used = 0;
};

class Extractor {
 public:
  Extractor(const Weights &weights, const aliked_options &options);
  ~Extractor();

  void info(aliked_info *info);
  int capacity(int height, int width);
  void extract(const aliked_images *images, const aliked_buffers *buffers,
               aliked_features *features);
  void submit(const aliked_images *images);
  void wait(aliked_features *features);
  void extract_async(const aliked_images *images, const aliked_buffers *buffers, CUstream stream,
                     aliked_features *features);
  CUstream stream();
  void synchronize(CUstream stream);
  void *allocate(aliked_memory memory, size_t size);
  void free(aliked_memory memory, void *pointer);

 private:
  // All that must go while the context is current.
  struct State {
    State(const Device &device, const Weights &weights, const Selection &selection)
        : kernels(device), network(weights, selection), stream(make_stream()),
          beside(make_stream()), fork(make_event()), join(make_event()) {}
    Kernels kernels;
    Network network;
    Stream stream, beside;  // the second one copies while kernels of the first go on
    Event fork, join;
    std::map<Frame, std::unique_ptr<Plan>> plans;
    uint64_t uses = 0;
  };

  Plan &plan_for(const Frame &frame);
  std::unique_ptr<Plan> make_plan(const Frame &frame);
  void drop_oldest();
  void begin(Plan &plan, CUstream stream, const aliked_images &images);
  void finish(Plan &plan, CUstream stream);
  void make_results(Plan &plan);
  GraphExec capture(Plan &plan, bool to_host);
  void collect(Plan &plan);
  void submit_locked(const aliked_images *images);
  void wait_locked(aliked_features *features);
  void async_locked(const aliked_images *images, const aliked_buffers *buffers, CUstream stream,
                    aliked_features *features);

  std::mutex mutex_;
  const std::string model_;
  const size_t max_plans_;
  Device device_;
  std::unique_ptr<State> state_;
  Plan *pending_ = nullptr;  // submitted, and nobody has waited for it
};

}  // namespace aliked::core
