// ALIKED from C++20: owners and spans over aliked.h. Errors are thrown as `aliked::Error`.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "aliked.h"

namespace aliked {

struct Error : std::runtime_error {
  aliked_status status;
  explicit Error(aliked_status of) : std::runtime_error(aliked_last_error()), status(of) {}
};

inline void check(aliked_status status) {
  if (status != ALIKED_OK) throw Error(status);
}

// A batch of 8-bit RGB images without gaps, in ordinary memory.
inline aliked_images images(const unsigned char *data, int height, int width, int batch = 1) {
  return {data, ALIKED_HOST, batch, height, width, 0, 0};
}

// One image's features; the extractor's next call may overwrite what it refers to.
struct Features {
  std::span<const float> keypoints;    // [count, 2]: x, y
  std::span<const float> scores;       // [count]
  std::span<const float> descriptors;  // [count, length]
  int length = 0;

  std::size_t count() const { return scores.size(); }
  std::span<const float> descriptor(std::size_t i) const {
    return descriptors.subspan(i * std::size_t(length), std::size_t(length));
  }
};

// Image b of a batch whose features are on the host.
inline Features features_of(const aliked_features &all, int b = 0) {
  const std::size_t count = std::size_t(all.counts[b]), length = std::size_t(all.length);
  const std::size_t first = std::size_t(b) * std::size_t(all.capacity);
  return {{all.keypoints + 2 * first, 2 * count},
          {all.scores + first, count},
          {all.descriptors + first * length, count * length},
          all.length};
}

class Extractor {
 public:
  explicit Extractor(const std::string &weights, const aliked_options &options = ALIKED_OPTIONS) {
    aliked_extractor *created = nullptr;
    check(aliked_create(weights.c_str(), &options, &created));
    extractor_.reset(created);
  }

  // Of one image of [height, width, 3] bytes.
  Features operator()(const unsigned char *rgb, int height, int width) {
    return features_of(extract(images(rgb, height, width)));
  }

  aliked_features extract(const aliked_images &images) {
    aliked_features features;
    check(aliked_extract(get(), &images, &features));
    return features;
  }

  // Into buffers of the caller's, which no later call overwrites.
  aliked_features extract_into(const aliked_images &images, const aliked_buffers &buffers) {
    aliked_features features;
    check(aliked_extract_into(get(), &images, &buffers, &features));
    return features;
  }

  void submit(const aliked_images &images) { check(aliked_submit(get(), &images)); }
  aliked_features wait() {
    aliked_features features;
    check(aliked_wait(get(), &features));
    return features;
  }

  // On the device, on the caller's stream or the extractor's own; see `aliked_extract_async`.
  aliked_features extract_async(const aliked_images &images,
                                const aliked_buffers *buffers = nullptr,
                                aliked_stream stream = nullptr) {
    aliked_features features;
    check(aliked_extract_async(get(), &images, buffers, stream, &features));
    return features;
  }

  void synchronize(aliked_stream stream = nullptr) { check(aliked_synchronize(get(), stream)); }
  aliked_stream stream() const {
    aliked_stream stream;
    check(aliked_get_stream(get(), &stream));
    return stream;
  }
  int capacity(int height, int width) const {
    int capacity = 0;
    check(aliked_capacity(get(), height, width, &capacity));
    return capacity;
  }
  aliked_info info() const {
    aliked_info info;
    check(aliked_get_info(get(), &info));
    return info;
  }
  aliked_extractor *get() const { return extractor_.get(); }

 private:
  struct Destroy {
    void operator()(aliked_extractor *extractor) const { aliked_destroy(extractor); }
  };
  std::unique_ptr<aliked_extractor, Destroy> extractor_;
};

// Memory of an extractor's: page-locked, or on its device. It must go before the extractor.
template <typename T> class Memory {
 public:
  Memory(const Extractor &extractor, aliked_memory memory, std::size_t count)
      : extractor_(extractor.get()), memory_(memory), count_(count) {
    void *allocated = nullptr;
    check(aliked_allocate(extractor_, memory, count * sizeof(T), &allocated));
    data_ = static_cast<T *>(allocated);
  }
  Memory(Memory &&other) noexcept
      : extractor_(other.extractor_), memory_(other.memory_), count_(other.count_),
        data_(std::exchange(other.data_, nullptr)) {}
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  ~Memory() {
    if (data_) aliked_free(extractor_, memory_, data_);
  }
  T *data() const { return data_; }
  std::size_t size() const { return count_; }

 private:
  aliked_extractor *extractor_;
  aliked_memory memory_;
  std::size_t count_;
  T *data_ = nullptr;
};

class Matcher {
 public:
  explicit Matcher(int device = 0) {
    aliked_matcher *created = nullptr;
    check(aliked_create_matcher(device, &created));
    matcher_.reset(created);
  }

  aliked_matches match(const aliked_descriptors &first, const aliked_descriptors &second,
                       float min_similarity = 0.75f) {
    aliked_matches matches;
    check(aliked_match(get(), &first, &second, min_similarity, &matches));
    return matches;
  }
  aliked_matches match_async(const aliked_descriptors &first, const aliked_descriptors &second,
                             float min_similarity, aliked_stream stream) {
    aliked_matches matches;
    check(aliked_match_async(get(), &first, &second, min_similarity, stream, &matches));
    return matches;
  }
  aliked_matcher *get() const { return matcher_.get(); }

 private:
  struct Destroy {
    void operator()(aliked_matcher *matcher) const { aliked_destroy_matcher(matcher); }
  };
  std::unique_ptr<aliked_matcher, Destroy> matcher_;
};

// Image b's descriptors on the device, to be matched.
inline aliked_descriptors descriptors_of(const aliked_features &all, int b = 0) {
  const std::size_t first = std::size_t(b) * std::size_t(all.capacity);
  const int count = all.counts ? all.counts[b] : all.capacity;
  return {all.descriptors + first * std::size_t(all.length), all.scores + first, all.memory, count,
          all.length};
}

}  // namespace aliked
