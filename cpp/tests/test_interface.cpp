// The C interface over a driver that is a CPU and whose kernels do nothing: what is refused and
// how, what memory it takes, several threads.
#include <dlfcn.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <thread>
#include <vector>

#include "aliked.hpp"
#include "check.h"

namespace {

std::string folder;
std::string weights() { return folder + "/random.safetensors"; }

long live_objects() {
  return ((long (*)())dlsym(dlopen("libcuda.so.1", RTLD_NOW), "fake_live_objects"))();
}
size_t device_bytes() {
  return ((size_t(*)())dlsym(dlopen("libcuda.so.1", RTLD_NOW), "fake_device_bytes"))();
}

aliked_options with(int top_k, int n_limit = 5000, int max_plans = 16) {
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = top_k, options.n_limit = n_limit, options.max_plans = max_plans;
  return options;
}

// An environment variable of the driver's, for a while.
struct Pretend {
  const char *name;
  Pretend(const char *name, const std::string &value) : name(name) {
    setenv(name, value.c_str(), 1);
  }
  ~Pretend() { unsetenv(name); }
};

void test_creation() {
  aliked_extractor *e = (aliked_extractor *)1;
  CHECK_STATUS(aliked_create(nullptr, nullptr, &e), ALIKED_BAD_ARGUMENT, "null");
  CHECK(!e);
  CHECK_STATUS(aliked_create(weights().c_str(), nullptr, nullptr), ALIKED_BAD_ARGUMENT, "null");
  CHECK_STATUS(aliked_create("/no/such/file", nullptr, &e), ALIKED_NO_FILE, "No such file");
  CHECK_STATUS(aliked_create(folder.c_str(), nullptr, &e), ALIKED_NO_FILE, "cannot read");
  CHECK_STATUS(aliked_create((folder + "/damaged.safetensors").c_str(), nullptr, &e),
               ALIKED_BAD_WEIGHTS, "damaged");
  aliked_options options = ALIKED_OPTIONS;
  for (size_t size : {size_t(3), sizeof options + 8}) {
    options.size = size;
    CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_BAD_ARGUMENT, "options");
  }
  options = ALIKED_OPTIONS, options.model = "aliked-n16";
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_BAD_WEIGHTS, "aliked-test");
  options = ALIKED_OPTIONS, options.device = 7;
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_NO_DEVICE, "GPU 7");
  options.device = -1;
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_NO_DEVICE, "GPU -1");
  options = with(0, 0);
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_BAD_ARGUMENT, "n_limit");
  options = with(10, 0, 0);
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_BAD_ARGUMENT, "max_plans");
  for (float threshold : {std::numeric_limits<float>::quiet_NaN(), -0.1f, 1.1f}) {
    options = with(0), options.scores_th = threshold;
    CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_BAD_ARGUMENT, "number");
  }
  options = with(0), options.strict = 2;
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_BAD_ARGUMENT, "strict is 2");
  options.size = offsetof(aliked_options, strict);  // of version 1.0, which had no such field
  CHECK_STATUS(aliked_create(weights().c_str(), &options, &e), ALIKED_OK, "");
  aliked_destroy(e);
  {
    const Pretend poor("FAKE_MEMORY", "1000");
    CHECK_STATUS(aliked_create(weights().c_str(), nullptr, &e), ALIKED_OUT_OF_MEMORY, "weights");
  }
  std::ifstream file(weights(), std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  CHECK_STATUS(aliked_create_from_memory(nullptr, 3, nullptr, &e), ALIKED_BAD_ARGUMENT, "null");
  CHECK_STATUS(aliked_create_from_memory(content.data(), 100, nullptr, &e), ALIKED_BAD_WEIGHTS,
               "truncated");
  CHECK_STATUS(aliked_create_from_memory(content.data(), content.size(), nullptr, &e), ALIKED_OK,
               "");
  aliked_info info;
  CHECK_STATUS(aliked_get_info(e, &info), ALIKED_OK, "");
  CHECK(!std::strcmp(info.model, "aliked-test") && info.descriptor_length == 64);
  CHECK(info.top_k == 1000 && info.capability == 90 && info.device_memory > 100000);
  CHECK_STATUS(aliked_get_info(e, nullptr), ALIKED_BAD_ARGUMENT, "null");
  CHECK_STATUS(aliked_get_info(nullptr, &info), ALIKED_BAD_ARGUMENT, "null");
  aliked_destroy(e);
  aliked_destroy(nullptr);
  CHECK(!std::strcmp(aliked_version(), ALIKED_VERSION));
}

void test_images() {
  aliked::Extractor extractor(weights(), with(10));
  aliked_extractor *e = extractor.get();
  std::vector<unsigned char> pixels(64 * 80 * 3 * 3);
  aliked_features features;
  const auto extract = [&](int batch, int height, int width, size_t row = 0, size_t image = 0) {
    const aliked_images images = {pixels.data(), ALIKED_HOST, batch, height, width, row, image};
    return aliked_extract(e, &images, &features);
  };
  CHECK_STATUS(extract(1, 64, 80), ALIKED_OK, "");
  CHECK(features.batch == 1 && features.capacity == 10 && features.length == 64);
  CHECK_STATUS(extract(1, 5, 5), ALIKED_OK, "");
  CHECK(features.capacity == 1);
  CHECK_STATUS(extract(3, 20, 30, 100, 2000), ALIKED_OK, "");
  CHECK_STATUS(extract(0, 64, 80), ALIKED_BAD_ARGUMENT, "batch");
  CHECK_STATUS(extract(-3, 64, 80), ALIKED_BAD_ARGUMENT, "batch");
  CHECK_STATUS(extract(1, 4, 80), ALIKED_BAD_ARGUMENT, "at least 5");
  CHECK_STATUS(extract(1, 64, -80), ALIKED_BAD_ARGUMENT, "at least 5");
  CHECK_STATUS(extract(1, 2147483647, 2147483647), ALIKED_BAD_ARGUMENT, "too large");
  CHECK_STATUS(extract(1, 2000000000, 5), ALIKED_BAD_ARGUMENT, "too large");
  CHECK_STATUS(extract(1, 5, 2147483647), ALIKED_BAD_ARGUMENT, "too large");
  CHECK_STATUS(extract(2147483647, 64, 80), ALIKED_BAD_ARGUMENT, "many");
  CHECK_STATUS(extract(1, 64, 80, 239), ALIKED_BAD_ARGUMENT, "row stride");
  CHECK_STATUS(extract(2, 20, 30, 90, 1799), ALIKED_BAD_ARGUMENT, "stride");
  CHECK_STATUS(aliked_extract(e, nullptr, &features), ALIKED_BAD_ARGUMENT, "null");
  aliked_images images = aliked::images(nullptr, 64, 80);
  CHECK_STATUS(aliked_extract(e, &images, &features), ALIKED_BAD_ARGUMENT, "null");
  images = aliked::images(pixels.data(), 64, 80);
  images.memory = aliked_memory(9);
  CHECK_STATUS(aliked_extract(e, &images, &features), ALIKED_BAD_ARGUMENT, "memory");
  images.memory = ALIKED_HOST;
  CHECK_STATUS(aliked_extract(nullptr, &images, &features), ALIKED_BAD_ARGUMENT, "null");
  CHECK_STATUS(aliked_extract(e, &images, nullptr), ALIKED_OK, "");

  int capacity;
  CHECK_STATUS(aliked_capacity(e, 6, 6, &capacity), ALIKED_OK, "");
  CHECK(capacity == 4);
  CHECK_STATUS(aliked_capacity(e, 4, 6, &capacity), ALIKED_BAD_ARGUMENT, "at least 5");
  CHECK_STATUS(aliked_capacity(e, 6, 6, nullptr), ALIKED_BAD_ARGUMENT, "null");

  CHECK_STATUS(aliked_wait(e, &features), ALIKED_BAD_ARGUMENT, "submitted");
  CHECK_STATUS(aliked_submit(e, &images), ALIKED_OK, "");
  CHECK_STATUS(aliked_submit(e, &images), ALIKED_BAD_ARGUMENT, "waited");
  CHECK_STATUS(aliked_extract(e, &images, &features), ALIKED_BAD_ARGUMENT, "waited");
  CHECK_STATUS(aliked_wait(e, &features), ALIKED_OK, "");

  // The caller's buffers.
  std::vector<float> keypoints(30), scores(15, 7), descriptors(15 * 64);
  int counts = -1;
  aliked_buffers buffers = {ALIKED_HOST,   15,     keypoints.data(),
                            scores.data(), descriptors.data(), &counts};
  features = extractor.extract_into(images, buffers);
  CHECK(features.scores == scores.data() && features.capacity == 15 && counts == 0);
  CHECK(scores[14] == 0);
  buffers.capacity = 9;
  CHECK_STATUS(aliked_extract_into(e, &images, &buffers, &features), ALIKED_BAD_ARGUMENT, "room");
  CHECK_STATUS(aliked_extract_into(e, &images, nullptr, &features), ALIKED_BAD_ARGUMENT, "null");
  buffers.capacity = 15;
  CHECK_STATUS(aliked_extract_async(e, &images, &buffers, nullptr, &features), ALIKED_BAD_ARGUMENT,
               "device");
  CHECK_STATUS(aliked_extract_async(e, &images, nullptr, nullptr, &features), ALIKED_OK, "");
  CHECK(features.memory == ALIKED_DEVICE && !features.counts);
  CHECK_STATUS(aliked_synchronize(e, nullptr), ALIKED_OK, "");
  {
    const aliked::Memory<float> xy(extractor, ALIKED_PAGE_LOCKED, 30),
        s(extractor, ALIKED_PAGE_LOCKED, 15);
    const aliked::Memory<unsigned char> rgb(extractor, ALIKED_DEVICE, 64 * 80 * 3);
    const aliked_buffers there = {ALIKED_DEVICE, 15, xy.data(), s.data(), nullptr, nullptr};
    aliked_images on_device = images;
    on_device.data = rgb.data(), on_device.memory = ALIKED_DEVICE;
    CHECK_STATUS(aliked_extract_async(e, &on_device, &there, extractor.stream(), &features),
                 ALIKED_OK, "");
    CHECK_STATUS(aliked_extract_into(e, &on_device, &there, &features), ALIKED_OK, "");
    on_device.height = 32, on_device.row_stride = 300;
    CHECK_STATUS(aliked_extract(e, &on_device, &features), ALIKED_OK, "");
  }
  void *pointer;
  CHECK_STATUS(aliked_allocate(e, ALIKED_HOST, 10, &pointer), ALIKED_BAD_ARGUMENT, "page-locked");
  CHECK_STATUS(aliked_allocate(e, ALIKED_DEVICE, 0, &pointer), ALIKED_BAD_ARGUMENT, "0 bytes");
  CHECK_STATUS(aliked_free(e, ALIKED_DEVICE, nullptr), ALIKED_OK, "");
}

void test_memory() {
  const long objects = live_objects();
  const size_t bytes = device_bytes();
  {
    aliked::Extractor extractor(weights(), with(50, 1, 3));
    std::vector<unsigned char> pixels(200 * 200 * 3);
    const auto extract = [&](int size) {
      const aliked_images images = aliked::images(pixels.data(), size, size + size % 7);
      return aliked_extract(extractor.get(), &images, nullptr);
    };
    size_t most = 0;
    for (int i = 0; i < 500; ++i) {
      CHECK_STATUS(extract(20 + i * 37 % 150), ALIKED_OK, "");
      if (i < 200) most = std::max(most, device_bytes());
      else CHECK(device_bytes() <= most);  // three plans at most, however many sizes
    }
    CHECK_STATUS(extract(100), ALIKED_OK, "");
    const long then = live_objects();
    for (int i = 0; i < 20; ++i) CHECK_STATUS(extract(100), ALIKED_OK, "");
    CHECK(live_objects() == then);  // nothing is made for a size that was there
    // Where there is no room for one more, the oldest goes; where that is not enough, it says so.
    const Pretend poor("FAKE_MEMORY", std::to_string(device_bytes() + 1000));
    CHECK_STATUS(extract(90), ALIKED_OK, "");
    const Pretend poorer("FAKE_MEMORY", "700000");
    CHECK_STATUS(extract(180), ALIKED_OUT_OF_MEMORY, "185x180");
    CHECK_STATUS(extract(20), ALIKED_OK, "");
  }
  CHECK(live_objects() == objects && device_bytes() == bytes);
}

void test_devices() {
  aliked_extractor *e;
  {
    const Pretend none("FAKE_CAPABILITY", "70");  // below 90 there are no clusters
    CHECK_STATUS(aliked_create(weights().c_str(), nullptr, &e), ALIKED_OK, "");
    const std::vector<unsigned char> pixels(64 * 64 * 3);
    const aliked_images images = aliked::images(pixels.data(), 64, 64);
    CHECK_STATUS(aliked_extract(e, &images, nullptr), ALIKED_OK, "");
    aliked_destroy(e);
  }
}

void test_threads() {
  std::vector<std::thread> threads;
  std::vector<int> errors(8);
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([t, &errors] {
      aliked::Extractor extractor(weights(), with(t % 2 ? 20 : 0));
      std::vector<unsigned char> pixels(64 * 64 * 3);
      for (int i = 0; i < 50; ++i) {
        const aliked_images images = aliked::images(pixels.data(), 30 + (t + i) % 5, 64);
        errors[size_t(t)] += aliked_extract(extractor.get(), &images, nullptr) != ALIKED_OK;
      }
      // Errors are each thread's own.
      aliked_extract(extractor.get(), nullptr, nullptr);
      errors[size_t(t)] += !std::strstr(aliked_last_error(), "null");
    });
  for (std::thread &thread : threads) thread.join();
  for (int count : errors) CHECK(count == 0);
}

void test_matching() {
  const long objects = live_objects();
  {
    aliked::Matcher matcher;
    aliked_matcher *m = matcher.get();
    std::vector<float> some(70 * 64, 0.125f), scores(70, 1);
    aliked_descriptors a = {some.data(), scores.data(), ALIKED_HOST, 70, 64}, b = a;
    aliked_matches matches;
    b.count = 50;
    CHECK_STATUS(aliked_match(m, &a, &b, 0.5f, &matches), ALIKED_OK, "");
    CHECK(matches.count == 70);
    b.count = 0;
    CHECK_STATUS(aliked_match(m, &a, &b, 0.5f, &matches), ALIKED_OK, "");
    CHECK_STATUS(aliked_match(m, &b, &a, 0.5f, &matches), ALIKED_OK, "");
    CHECK(matches.count == 0);
    CHECK_STATUS(aliked_match(m, nullptr, &a, 0.5f, &matches), ALIKED_BAD_ARGUMENT, "null");
    CHECK_STATUS(aliked_match(m, &a, &a, 0.5f, nullptr), ALIKED_BAD_ARGUMENT, "null");
    CHECK_STATUS(aliked_match(nullptr, &a, &a, 0.5f, &matches), ALIKED_BAD_ARGUMENT, "null");
    b.count = -1;
    CHECK_STATUS(aliked_match(m, &a, &b, 0.5f, &matches), ALIKED_BAD_ARGUMENT, "-1");
    b = a, b.length = 32;
    CHECK_STATUS(aliked_match(m, &a, &b, 0.5f, &matches), ALIKED_BAD_ARGUMENT, "length");
    b.length = 33;
    CHECK_STATUS(aliked_match(m, &b, &b, 0.5f, &matches), ALIKED_BAD_ARGUMENT, "multiple");
    b = a, b.descriptors = nullptr;
    CHECK_STATUS(aliked_match(m, &b, &a, 0.5f, &matches), ALIKED_BAD_ARGUMENT, "null");
    CHECK_STATUS(aliked_match_async(m, &a, &a, 0.5f, nullptr, &matches), ALIKED_BAD_ARGUMENT,
                 "device");
    CHECK_STATUS(aliked_match(m, &a, &a, std::numeric_limits<float>::quiet_NaN(), &matches),
                 ALIKED_BAD_ARGUMENT, "number");
    aliked_matcher *none;
    CHECK_STATUS(aliked_create_matcher(5, &none), ALIKED_NO_DEVICE, "GPU 5");
    CHECK_STATUS(aliked_create_matcher(0, nullptr), ALIKED_BAD_ARGUMENT, "null");
    aliked_destroy_matcher(nullptr);
  }
  CHECK(live_objects() == objects);
}

}  // namespace

int main(int, char **words) {
  folder = words[1];
  test_creation();
  test_images();
  test_memory();
  test_devices();
  test_threads();
  test_matching();
  return result();
}
