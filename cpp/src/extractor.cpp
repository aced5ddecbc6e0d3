#include "extractor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace aliked::core {
namespace {

// Up to this size the kernels write descriptors straight into the host's memory, which overlaps
// with their work; what is larger is copied when they are done.
constexpr size_t MAPPED = 4 << 20;

Selection check_options(const aliked_options &options) {
  require(options.top_k > 0 || options.n_limit > 0,
          text("n_limit is %d in threshold mode; it must be at least 1", options.n_limit));
  require(options.scores_th >= 0 && options.scores_th <= 1,
          text("scores_th is %g; give a number from 0 to 1", double(options.scores_th)));
  require(options.strict == 0 || options.strict == 1,
          text("strict is %d; give 0 or 1", options.strict));
  require(options.max_plans > 0,
          text("max_plans is %d; it must be at least 1", options.max_plans));
  return {std::max(0, options.top_k), options.scores_th, options.n_limit, options.strict == 1};
}

// Rows of one image to the front where their score is above 0, as `drop_fill_ins` does in Python;
// returns how many. All but always they are there already.
int keep_real(int rows, int length, float *keypoints, float *scores, float *descriptors) {
  int kept = 0;
  for (int i = 0; i < rows; ++i) {
    if (!(scores[i] > 0)) continue;
    if (i != kept) {
      std::copy_n(keypoints + 2 * i, 2, keypoints + 2 * kept);
      if (descriptors)
        std::copy_n(descriptors + size_t(length) * size_t(i), length,
                    descriptors + size_t(length) * size_t(kept));
      scores[kept] = scores[i];
    }
    ++kept;
  }
  std::fill(scores + kept, scores + rows, 0.f);
  return kept;
}

}  // namespace

Extractor::Extractor(const Weights &weights, const aliked_options &options)
    : model_(weights.model()), max_plans_(size_t(std::max(1, options.max_plans))),
      device_(options.device) {
  const Selection selection = check_options(options);
  const Current current(device_);
  state_ = std::make_unique<State>(device_, weights, selection);
}

Extractor::~Extractor() {
  try {
    const Current current(device_);
    if (!state_) return;
    for (const auto &[frame, plan] : state_->plans)
      if (plan->busy) driver().cuEventSynchronize(plan->done.get());
    driver().cuStreamSynchronize(state_->stream.get());
    state_.reset();
  } catch (const Error &) {  // the context is gone, and everything with it
    state_.release();
  }
}

void Extractor::info(aliked_info *info) {
  require(info, "there is nowhere to put the information: the pointer is null");
  const std::lock_guard lock(mutex_);
  *info = {};
  const Network &network = state_->network;
  std::snprintf(info->model, sizeof info->model, "%s", model_.c_str());
  std::snprintf(info->device, sizeof info->device, "%s", device_.name().c_str());
  info->capability = device_.capability();
  info->descriptor_length = network.shape().dim;
  info->top_k = network.selection().top_k;
  info->n_limit = network.selection().n_limit;
  info->scores_th = network.selection().scores_th;
  info->device_memory = network.weight_bytes();
  for (const auto &[frame, plan] : state_->plans) info->device_memory += plan->buffers.bytes();
}

int Extractor::capacity(int height, int width) {
  return state_->network.keypoints({1, height, width});
}

// ---- Plans

void Extractor::drop_oldest() {
  auto &plans = state_->plans;
  const auto earlier = [](const auto &a, const auto &b) {
    return a.second->last_used < b.second->last_used;
  };
  const auto oldest = std::min_element(plans.begin(), plans.end(), earlier);
  Plan &plan = *oldest->second;
  if (plan.busy) check(driver().cuEventSynchronize(plan.done.get()), "wait for the GPU");
  if (pending_ == &plan) pending_ = nullptr;
  plans.erase(oldest);
}

std::unique_ptr<Plan> Extractor::make_plan(const Frame &frame) {
  auto plan = std::make_unique<Plan>(state_->network, frame);
  plan->done = make_event();
  plan->buffers.prepare(state_->stream.get());
  check(driver().cuStreamSynchronize(state_->stream.get()), "prepare buffers");
  return plan;
}

Plan &Extractor::plan_for(const Frame &frame) {
  auto &plans = state_->plans;
  auto found = plans.find(frame);
  if (found == plans.end()) {
    state_->network.keypoints(frame);  // refuses bad sizes before anything is dropped for them
    while (plans.size() >= max_plans_) drop_oldest();
    for (;;) try {
        found = plans.emplace(frame, make_plan(frame)).first;
        break;
      } catch (const Error &error) {
        if (error.status != ALIKED_OUT_OF_MEMORY || plans.empty()) throw;
        drop_oldest();
      }
  }
  found->second->last_used = ++state_->uses;
  return *found->second;
}

void Extractor::make_results(Plan &plan) {
  Results &results = plan.results;
  if (results.memory.get()) return;
  const size_t rows = size_t(plan.frame.batch) * size_t(plan.buffers.keypoints());
  const auto aligned = [](size_t size) { return (size + 255) / 256 * 256; };
  results.scores = aligned(rows * 2 * sizeof(float));
  results.descriptors = results.scores + aligned(rows * sizeof(float));
  const size_t length = size_t(state_->network.shape().dim);
  results.memory = HostMemory(results.descriptors + rows * length * sizeof(float), "the features");
  results.counts.assign(size_t(plan.frame.batch), 0);
}

// The kernels as a graph; with `to_host` it also brings the features home, all but the descriptors
// of threshold mode: `collect` copies as many as there are.
GraphExec Extractor::capture(Plan &plan, bool to_host) {
  const Driver &d = driver();
  const CUstream stream = state_->stream.get(), beside = state_->beside.get();
  const Buffers &buffers = plan.buffers;
  const Results &results = plan.results;
  const Outputs own = buffers.outputs();
  const size_t rows = size_t(plan.frame.batch) * size_t(buffers.keypoints());
  const size_t bytes = rows * size_t(state_->network.shape().dim) * sizeof(float);
  const bool counted = state_->network.selection().by_threshold();
  const bool mapped = to_host && !counted && bytes <= MAPPED;
  Outputs outputs = own;
  if (to_host) outputs.scores = results.memory.on_device() + results.scores;
  if (mapped) outputs.descriptors = results.memory.on_device() + results.descriptors;

  const auto run = [&] {
    buffers.launch(stream, state_->kernels, buffers.images(), outputs, [&] {
      if (!to_host) return;
      // Keypoints go home while the descriptors are made.
      check(d.cuEventRecord(state_->fork.get(), stream), "record an event");
      check(d.cuStreamWaitEvent(beside, state_->fork.get(), 0), "wait for an event");
      check(d.cuMemcpyDtoHAsync(results.keypoints_host(), own.keypoints, rows * 2 * sizeof(float),
                                beside),
            "copy keypoints to the host");
      check(d.cuEventRecord(state_->join.get(), beside), "record an event");
    });
    if (!to_host) return;
    if (!mapped && !counted)
      check(d.cuMemcpyDtoHAsync(results.descriptors_host(), own.descriptors, bytes, stream),
            "copy descriptors to the host");
    check(d.cuStreamWaitEvent(stream, state_->join.get(), 0), "wait for an event");
  };
  check(d.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "begin a capture");
  CUgraph captured = nullptr;
  try {
    run();
  } catch (...) {
    d.cuStreamEndCapture(stream, &captured);
    const Graph discarded(captured);
    throw;
  }
  check(d.cuStreamEndCapture(stream, &captured), "end a capture");
  const Graph graph(captured);
  CUgraphExec executable;
  check(d.cuGraphInstantiateWithFlags(&executable, graph.get(), 0), "make a graph");
  return GraphExec(executable);
}

// ---- Runs

// Order this run after the last one of the plan, and queue the images' copy.
void Extractor::begin(Plan &plan, CUstream stream, const aliked_images &images) {
  const bool through_staging = images.memory == ALIKED_HOST;
  if (plan.busy && through_staging) {  // the last run may still read from there
    check(driver().cuEventSynchronize(plan.done.get()), "wait for the GPU");
    plan.busy = false;
  }
  if (plan.busy && plan.stream != stream)
    check(driver().cuStreamWaitEvent(stream, plan.done.get(), 0), "wait for an event");
  if (through_staging && !plan.staging.get())
    plan.staging = HostMemory(size_t(plan.frame.batch) * plan.frame.image_bytes(), "the images");
  plan.stream = stream;
  plan.busy = true;
  upload(stream, images, plan.buffers.images(), plan.staging);
}

void Extractor::finish(Plan &plan, CUstream stream) {
  check(driver().cuEventRecord(plan.done.get(), stream), "record an event");
}

void Extractor::submit_locked(const aliked_images *images) {
  const Frame frame = check_images(images);
  Plan &plan = plan_for(frame);
  make_results(plan);
  if (!plan.to_host) plan.to_host = capture(plan, true);
  const CUstream stream = state_->stream.get();
  begin(plan, stream, *images);
  check(driver().cuGraphLaunch(plan.to_host.get(), stream), "launch the graph");
  finish(plan, stream);
  pending_ = &plan;
}

// Count the rows, and bring home what the graph has left behind.
void Extractor::collect(Plan &plan) {
  Results &results = plan.results;
  const int length = state_->network.shape().dim, k = plan.buffers.keypoints();
  const CUstream stream = state_->stream.get();
  const bool counted = state_->network.selection().by_threshold();
  for (int b = 0; b < plan.frame.batch && counted; ++b) {
    const float *scores = results.scores_host() + size_t(b) * size_t(k);
    int last = k;
    while (last > 0 && !(scores[last - 1] > 0)) --last;
    const size_t first = size_t(b) * size_t(k) * size_t(length);
    if (last > 0)
      check(driver().cuMemcpyDtoHAsync(results.descriptors_host() + first,
                                       plan.buffers.outputs().descriptors + first * sizeof(float),
                                       size_t(last) * size_t(length) * sizeof(float), stream),
            "copy descriptors to the host");
  }
  if (counted) check(driver().cuStreamSynchronize(stream), "wait for the GPU");
  for (int b = 0; b < plan.frame.batch; ++b) {
    const size_t first = size_t(b) * size_t(k);
    results.counts[size_t(b)] = keep_real(k, length, results.keypoints_host() + 2 * first,
                                          results.scores_host() + first,
                                          results.descriptors_host() + first * size_t(length));
  }
}

void Extractor::wait_locked(aliked_features *features) {
  require(pending_, "nothing was submitted that could be waited for");
  Plan &plan = *std::exchange(pending_, nullptr);
  check(driver().cuStreamSynchronize(state_->stream.get()), "wait for the GPU");
  plan.busy = false;
  collect(plan);
  if (!features) return;
  const Results &results = plan.results;
  *features = {plan.frame.batch, plan.buffers.keypoints(), state_->network.shape().dim,
               ALIKED_PAGE_LOCKED, results.keypoints_host(), results.scores_host(),
               results.descriptors_host(), results.counts.data()};
}

namespace {

void check_buffers(const aliked_buffers &buffers, int rows) {
  require(buffers.memory == ALIKED_HOST || buffers.memory == ALIKED_PAGE_LOCKED ||
              buffers.memory == ALIKED_DEVICE,
          text("the buffers are in no memory that is known (%d)", int(buffers.memory)));
  require(buffers.capacity >= rows,
          text("the buffers have room for %d rows per image where %d are needed", buffers.capacity,
               rows));
}

// [batch, rows, width] floats to [batch, capacity, width].
void copy_rows(const aliked_features &from, int capacity, int width, const float *source,
               float *to) {
  if (!to) return;
  const size_t row = size_t(width);
  for (int b = 0; b < from.batch; ++b)
    std::memcpy(to + size_t(b) * size_t(capacity) * row,
                source + size_t(b) * size_t(from.capacity) * row,
                size_t(from.counts[b]) * row * sizeof(float));
}

// Into the caller's host memory.
void copy_features(aliked_features *features, const aliked_buffers &buffers) {
  copy_rows(*features, buffers.capacity, 2, features->keypoints, buffers.keypoints);
  copy_rows(*features, buffers.capacity, 1, features->scores, buffers.scores);
  copy_rows(*features, buffers.capacity, features->length, features->descriptors,
            buffers.descriptors);
  for (int b = 0; b < features->batch; ++b) {
    if (buffers.counts) buffers.counts[b] = features->counts[b];
    if (buffers.scores)  // rows that are none
      std::fill(buffers.scores + size_t(b) * size_t(buffers.capacity) + features->counts[b],
                buffers.scores + size_t(b + 1) * size_t(buffers.capacity), 0.f);
  }
  features->memory = buffers.memory;
  features->capacity = buffers.capacity;
  features->keypoints = buffers.keypoints;
  features->scores = buffers.scores;
  features->descriptors = buffers.descriptors;
  if (buffers.counts) features->counts = buffers.counts;
}

// Queue the copy of [batch, rows, width] floats on the device to [batch, capacity, width], there or
// in page-locked memory.
void copy_rows_async(CUstream stream, int batch, int rows, int capacity, int width,
                     CUdeviceptr source, const float *to) {
  if (!to) return;
  const size_t bytes = size_t(rows) * size_t(width) * sizeof(float);
  const size_t stride = size_t(capacity) * size_t(width) * sizeof(float);
  const int copies = rows == capacity ? 1 : batch;  // all at once where there are no gaps
  for (int b = 0; b < copies; ++b)
    check(driver().cuMemcpyAsync(CUdeviceptr(to) + size_t(b) * stride, source + size_t(b) * bytes,
                                 copies == 1 ? bytes * size_t(batch) : bytes, stream),
          "copy features on the GPU");
}

}  // namespace

void Extractor::async_locked(const aliked_images *images, const aliked_buffers *buffers,
                             CUstream stream, aliked_features *features) {
  const Frame frame = check_images(images);
  const int k = state_->network.keypoints(frame), length = state_->network.shape().dim;
  if (buffers) {
    require(buffers->memory == ALIKED_DEVICE,
            "an asynchronous extraction writes to the device: give buffers that are there");
    require(!buffers->counts, "counts are on the host, but these buffers are on the device");
    check_buffers(*buffers, k);
  }
  Plan &plan = plan_for(frame);
  if (!plan.to_device) plan.to_device = capture(plan, false);
  begin(plan, stream, *images);
  check(driver().cuGraphLaunch(plan.to_device.get(), stream), "launch the graph");
  const Outputs own = plan.buffers.outputs();
  aliked_features found = {frame.batch, k, length, ALIKED_DEVICE, (const float *)own.keypoints,
                           (const float *)own.scores, (const float *)own.descriptors, nullptr};
  if (buffers) {
    const int capacity = buffers->capacity;
    copy_rows_async(stream, frame.batch, k, capacity, 2, own.keypoints, buffers->keypoints);
    copy_rows_async(stream, frame.batch, k, capacity, 1, own.scores, buffers->scores);
    copy_rows_async(stream, frame.batch, k, capacity, length, own.descriptors,
                    buffers->descriptors);
    for (int b = 0; b < frame.batch && buffers->scores && capacity > k; ++b)
      check(driver().cuMemsetD8Async(
                CUdeviceptr(buffers->scores + size_t(b) * size_t(capacity) + size_t(k)), 0,
                size_t(capacity - k) * sizeof(float), stream),
            "clear scores on the GPU");
    found.capacity = capacity;
    found.keypoints = buffers->keypoints;
    found.scores = buffers->scores;
    found.descriptors = buffers->descriptors;
  }
  finish(plan, stream);
  if (features) *features = found;
}

// ---- The calls of the interface

void Extractor::extract(const aliked_images *images, const aliked_buffers *buffers,
                        aliked_features *features) {
  const std::lock_guard lock(mutex_);
  const Current current(device_);
  require(!pending_, "what was submitted before has not been waited for");
  aliked_features found;
  if (buffers && buffers->memory == ALIKED_DEVICE) {
    async_locked(images, buffers, state_->stream.get(), &found);
    check(driver().cuStreamSynchronize(state_->stream.get()), "wait for the GPU");
  } else {
    if (buffers) check_buffers(*buffers, state_->network.keypoints(check_images(images)));
    submit_locked(images);
    wait_locked(&found);
    if (buffers) copy_features(&found, *buffers);
  }
  if (features) *features = found;
}

void Extractor::submit(const aliked_images *images) {
  const std::lock_guard lock(mutex_);
  const Current current(device_);
  require(!pending_, "what was submitted before has not been waited for");
  submit_locked(images);
}

void Extractor::wait(aliked_features *features) {
  const std::lock_guard lock(mutex_);
  const Current current(device_);
  wait_locked(features);
}

void Extractor::extract_async(const aliked_images *images, const aliked_buffers *buffers,
                              CUstream stream, aliked_features *features) {
  const std::lock_guard lock(mutex_);
  const Current current(device_);
  async_locked(images, buffers, stream ? stream : state_->stream.get(), features);
}

CUstream Extractor::stream() { return state_->stream.get(); }

void Extractor::synchronize(CUstream stream) {
  const Current current(device_);
  check(driver().cuStreamSynchronize(stream ? stream : state_->stream.get()), "wait for the GPU");
}

void *Extractor::allocate(aliked_memory memory, size_t size) {
  const Current current(device_);
  require(size > 0, "0 bytes were asked for");
  if (memory == ALIKED_DEVICE) {
    CUdeviceptr pointer;
    check(driver().cuMemAlloc(&pointer, size), text("allocate %zu bytes on the GPU", size));
    return (void *)pointer;
  }
  require(memory == ALIKED_PAGE_LOCKED, "only page-locked and device memory can be allocated here");
  void *pointer;
  check(driver().cuMemHostAlloc(&pointer, size, CU_MEMHOSTALLOC_PORTABLE),
        text("allocate %zu bytes of page-locked memory", size));
  return pointer;
}

void Extractor::free(aliked_memory memory, void *pointer) {
  if (!pointer) return;
  const Current current(device_);
  require(memory == ALIKED_DEVICE || memory == ALIKED_PAGE_LOCKED,
          "only page-locked and device memory can be freed here");
  check(memory == ALIKED_DEVICE ? driver().cuMemFree(CUdeviceptr(pointer))
                                : driver().cuMemFreeHost(pointer),
        "free memory");
}

}  // namespace aliked::core
