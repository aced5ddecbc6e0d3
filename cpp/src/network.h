// The network as a straight line of kernels: `aliked/fused/pipeline.py` in C++.
#pragma once

#include <functional>
#include <string>

#include "arena.h"
#include "driver.h"
#include "kernels.h"
#include "weights.h"

namespace aliked::core {

// Which keypoints to keep, as in `aliked.configs.Selection`.
struct Selection {
  int top_k;
  float scores_th;
  int n_limit;
  bool strict;

  bool by_threshold() const { return top_k <= 0; }
  bool by_mean() const { return by_threshold() && !strict; }
  int limit() const { return by_threshold() ? n_limit : top_k; }
};

// A batch of images of one size, and the frame of whole multiples of 32 around them.
struct Frame {
  static constexpr int STRIDE = 32;
  int batch, height, width;

  int padded_height() const { return (height + STRIDE - 1) / STRIDE * STRIDE; }
  int padded_width() const { return (width + STRIDE - 1) / STRIDE * STRIDE; }
  int top() const { return (padded_height() - height) / 2; }
  int left() const { return (padded_width() - width) / 2; }
  size_t image_bytes() const { return size_t(height) * size_t(width) * 3; }
  bool operator<(const Frame &other) const;
};

// Where the last kernels write: device memory, or page-locked memory under its device address.
struct Outputs {
  CUdeviceptr keypoints, scores, descriptors;
};

// A model's weights on a device, and what it selects.
class Network {
 public:
  Network(const Weights &weights, const Selection &selection);

  const Selection &selection() const { return selection_; }
  const Shape &shape() const { return shape_; }
  size_t weight_bytes() const { return memory_.size(); }

  // Rows per image. Throws ALIKED_BAD_ARGUMENT for sizes that the kernels cannot count.
  int keypoints(const Frame &frame) const;

 private:
  friend class Buffers;
  CUdeviceptr weight(const std::string &tensor) const {
    return memory_.get() + weights_.offset(tensor);
  }

  Weights weights_;  // for the offsets; its bytes are on the device
  Shape shape_;
  Selection selection_;
  DeviceMemory memory_;
};

// Device memory for one frame, and the launches that work in it.
class Buffers {
 public:
  Buffers(const Network &network, const Frame &frame);

  CUdeviceptr images() const { return at(images_); }
  Outputs outputs() const { return {at(keypoints_), at(scores_), at(descriptors_)}; }
  size_t bytes() const { return memory_.size(); }
  int keypoints() const { return int(k_); }

  // Write what the kernels expect on their first run, and leave so.
  void prepare(CUstream stream) const;

  // Queue all kernels, from `images` to `outputs`; keypoints are always in `outputs()` too, from
  // the moment that `when_refined` is called.
  void launch(CUstream stream, Kernels &kernels, CUdeviceptr images, const Outputs &outputs,
              const std::function<void()> &when_refined = {}) const;

 private:
  CUdeviceptr at(int buffer) const { return memory_.get() + arena_.offset(buffer); }

  const Network &network_;
  Frame frame_;
  long k_, capacity_, room_, parts_;
  Arena arena_;
  int images_, x1_, below1_, s1_, f2_, below2_, s2_, x3_, f3_, below3_, s3_, x4_, f4_, none_, s4_;
  int score_map_, tally_, keys_, means_, totals_, chosen_, nms_scores_, dispersities_;
  int offsets_, finished_, sums_, keypoints_, scores_, descriptors_;
  DeviceMemory memory_;
};

}  // namespace aliked::core
