#include "matcher.h"

#include <algorithm>

namespace aliked::core {
namespace {

constexpr size_t CANDIDATE = 8;
constexpr int DEPTH = 16;            // as in match.cu
constexpr int MOST = 64 * 65535;     // rows that a grid has blocks for

void check_descriptors(const aliked_descriptors *d) {
  require(d, "there are no descriptors: the pointer is null");
  require(d->count >= 0 && d->count <= MOST,
          text("%d descriptors cannot be matched; give 0 to %d", d->count, MOST));
  require(d->length > 0 && d->length % DEPTH == 0 && d->length <= 4096,
          text("descriptors of length %d cannot be matched; give a multiple of %d up to 4096",
               d->length, DEPTH));
  require(d->descriptors || d->count == 0, "the descriptors are a null pointer");
  require(d->memory == ALIKED_HOST || d->memory == ALIKED_PAGE_LOCKED ||
              d->memory == ALIKED_DEVICE,
          text("the descriptors are in no memory that is known (%d)", int(d->memory)));
  require(d->memory != ALIKED_DEVICE || size_t(d->descriptors) % 16 == 0,
          "the descriptors are not aligned to 16 bytes");
}

// Half as much again as is needed, so that sets of about one size allocate once.
size_t with_room(size_t size) { return size + size / 2; }

}  // namespace

Matcher::Matcher(int device) : device_(device) {
  const Current current(device_);
  state_ = std::make_unique<State>(device_);
}

Matcher::~Matcher() {
  try {
    const Current current(device_);
    if (!state_) return;
    driver().cuEventSynchronize(state_->done.get());
    driver().cuStreamSynchronize(state_->stream.get());
    state_.reset();
  } catch (const Error &) {  // the context is gone, and everything with it
    state_.release();
  }
}

// The same descriptors on the device, copied by the matcher's own stream where they are not.
aliked_descriptors Matcher::on_device(const aliked_descriptors &from, DeviceMemory &copy) {
  aliked_descriptors to = from;
  if (from.memory == ALIKED_DEVICE || from.count == 0) return to;
  const CUstream stream = state_->stream.get();
  const size_t count = size_t(from.count), size = count * size_t(from.length) * sizeof(float);
  if (copy.size() < size + count * sizeof(float)) {
    copy = DeviceMemory();
    copy = DeviceMemory(with_room(size + count * sizeof(float)), "descriptors to match");
  }
  check(driver().cuMemcpyHtoDAsync(copy.get(), from.descriptors, size, stream),
        "copy descriptors to the GPU");
  if (from.scores)
    check(driver().cuMemcpyHtoDAsync(copy.get() + size, from.scores, count * sizeof(float),
                                     stream),
          "copy scores to the GPU");
  to.memory = ALIKED_DEVICE;
  to.descriptors = (const float *)copy.get();
  to.scores = from.scores ? (const float *)(copy.get() + size) : nullptr;
  return to;
}

void Matcher::queue(const aliked_descriptors &first, const aliked_descriptors &second,
                    float min_similarity, CUstream stream, aliked_matches *matches) {
  const Driver &d = driver();
  State &s = *state_;
  const size_t rows = size_t(first.count), columns = size_t(second.count);
  check(d.cuStreamWaitEvent(stream, s.done.get(), 0), "wait for an event");
  if (s.best.size() < (rows + columns) * CANDIDATE ||
      s.found.size() < rows * (sizeof(int) + sizeof(float))) {
    check(d.cuEventSynchronize(s.done.get()), "wait for the GPU");
    s.best = DeviceMemory();
    s.best = DeviceMemory(with_room((rows + columns) * CANDIDATE), "matching");
    s.found = HostMemory();
    s.found = HostMemory(with_room(rows * (sizeof(int) + sizeof(float)) + 16), "the matches");
  }
  int *const index = (int *)s.found.get();
  float *const similarities = (float *)(index + rows);
  *matches = {first.count, index, similarities};
  if (!rows) return;
  const CUdeviceptr best_rows = s.best.get(), best_columns = best_rows + rows * CANDIDATE;
  check(d.cuMemsetD8Async(best_rows, 0, (rows + columns) * CANDIDATE, stream), "clear a buffer");
  const Build &build = *find_build("match", {});
  Sizes sizes;
  sizes.rows = first.count, sizes.columns = second.count;
  if (columns)
    s.kernels.launch(stream, "find_best", build, sizes,
                     Arguments() << CUdeviceptr(first.descriptors)
                                 << CUdeviceptr(second.descriptors) << CUdeviceptr(first.scores)
                                 << CUdeviceptr(second.scores) << best_rows << best_columns
                                 << first.count << second.count << first.length,
                     false);
  const CUdeviceptr found = s.found.on_device();
  s.kernels.launch(stream, "keep_mutual", build, sizes,
                   Arguments() << best_rows << best_columns << found
                               << found + rows * sizeof(int) << first.count
                               << bits(min_similarity),
                   columns > 0);
  check(d.cuEventRecord(s.done.get(), stream), "record an event");
}

namespace {

void check_pair(const aliked_descriptors *first, const aliked_descriptors *second,
                float min_similarity, const aliked_matches *matches) {
  check_descriptors(first);
  check_descriptors(second);
  require(matches, "there is nowhere to put the matches: the pointer is null");
  require(min_similarity == min_similarity, "min_similarity is not a number");
  require(first->length == second->length,
          text("descriptors of length %d cannot be compared with descriptors of length %d",
               first->length, second->length));
}

}  // namespace

void Matcher::match(const aliked_descriptors *first, const aliked_descriptors *second,
                    float min_similarity, aliked_matches *matches) {
  check_pair(first, second, min_similarity, matches);
  const std::lock_guard lock(mutex_);
  const Current current(device_);
  const CUstream stream = state_->stream.get();
  check(driver().cuStreamWaitEvent(stream, state_->done.get(), 0), "wait for an event");
  queue(on_device(*first, state_->copies[0]), on_device(*second, state_->copies[1]),
        min_similarity, stream, matches);
  check(driver().cuStreamSynchronize(stream), "wait for the GPU");
}

void Matcher::match_async(const aliked_descriptors *first, const aliked_descriptors *second,
                          float min_similarity, CUstream stream, aliked_matches *matches) {
  check_pair(first, second, min_similarity, matches);
  require(first->memory == ALIKED_DEVICE && second->memory == ALIKED_DEVICE,
          "asynchronous matching needs descriptors on the device");
  const std::lock_guard lock(mutex_);
  const Current current(device_);
  queue(*first, *second, min_similarity, stream ? stream : state_->stream.get(), matches);
}

}  // namespace aliked::core
