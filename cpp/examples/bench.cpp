// aliked_bench --model FILE [--image IMAGE] [--batch N] [--runs N] [--top_k N] [--output FILE]: how
// long the features of a batch take, from the host and on the device alone. Milliseconds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <vector>

#include "aliked.hpp"
#include "files.h"

namespace {

const std::string USAGE =
    "aliked_bench --model FILE [--image IMAGE] [--batch N] [--runs N] [--top_k N] [--device N]"
    " [--output FILE.jsonl]";

using Clock = std::chrono::steady_clock;

struct Percentiles {
  double p5, p50, p95, p99;
};

double milliseconds(Clock::duration time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

// Warm up for a tenth of the runs, then time each.
Percentiles measure(int runs, const std::function<void()> &run) {
  std::vector<double> times;
  for (int i = -std::max(10, runs / 10); i < runs; ++i) {
    const Clock::time_point start = Clock::now();
    run();
    if (i >= 0) times.push_back(milliseconds(Clock::now() - start));
  }
  std::sort(times.begin(), times.end());
  const double last = double(times.size() - 1);
  const auto at = [&](double share) { return times[std::size_t(share * last)]; };
  return {at(0.05), at(0.50), at(0.95), at(0.99)};
}

// A picture of blobs, for those who have none at hand.
Image blobs(int height, int width) {
  const std::size_t pixels = std::size_t(height) * std::size_t(width);
  Image image{height, width, std::vector<unsigned char>(3 * pixels)};
  unsigned state = 1;
  for (std::size_t i = 0; i < image.rgb.size(); ++i) {
    const std::size_t y = i / 3 / std::size_t(width), x = i / 3 % std::size_t(width);
    state = state * 1664525u + 1013904223u;
    image.rgb[i] = (unsigned char)(((x / 13 * 7 + y / 11 * 5) % 8) * 24 + (state >> 27));
  }
  return image;
}

int body(int count, char **words) {
  const CommandLine line(count, words,
                         {"model", "image", "batch", "runs", "top_k", "device", "output"});
  const std::string file = line.get("model", std::string());
  if (file.empty() || !line.names.empty())
    throw std::runtime_error("usage: " + USAGE);
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = line.get("top_k", options.top_k);
  options.device = line.get("device", options.device);
  const int batch = line.get("batch", 1), runs = line.get("runs", 2000);
  if (batch < 1 || runs < 1) throw std::runtime_error("--batch and --runs are at least 1");
  const std::string picture = line.get("image", std::string());
  const Image image = picture.empty() ? blobs(480, 640) : read_image(picture);
  std::vector<unsigned char> ordinary;
  for (int b = 0; b < batch; ++b)
    ordinary.insert(ordinary.end(), image.rgb.begin(), image.rgb.end());

  aliked::Extractor extractor(file, options);
  const aliked_info info = extractor.info();
  const aliked_images on_host = aliked::images(ordinary.data(), image.height, image.width, batch);
  const aliked::Memory<unsigned char> locked(extractor, ALIKED_PAGE_LOCKED, ordinary.size());
  std::memcpy(locked.data(), ordinary.data(), ordinary.size());
  aliked_images page_locked = on_host;
  page_locked.data = locked.data();
  page_locked.memory = ALIKED_PAGE_LOCKED;
  const aliked::Memory<unsigned char> device(extractor, ALIKED_DEVICE, ordinary.size());
  const aliked_images on_device = {device.data(), ALIKED_DEVICE, batch, image.height, image.width,
                                   0, 0};

  std::printf("%s, batch %d of %dx%d, K = %d, %s; ms\n", info.model, batch, image.width,
              image.height, info.top_k, info.device);
  std::printf("%-44s %8s %8s %8s %8s\n", "", "p5", "p50", "p95", "p99");
  std::ofstream output;
  if (line.options.count("output")) output.open(line.get("output", std::string()), std::ios::app);
  const auto report = [&](const char *name, const Percentiles &p) {
    std::printf("%-44s %8.4f %8.4f %8.4f %8.4f\n", name, p.p5, p.p50, p.p95, p.p99);
    if (output.is_open())
      output << "{\"what\": \"" << name << "\", \"model\": \"" << info.model << "\", \"device\": \""
             << info.device << "\", \"batch\": " << batch << ", \"width\": " << image.width
             << ", \"height\": " << image.height << ", \"top_k\": " << info.top_k
             << ", \"runs\": " << runs << ", \"p5_ms\": " << p.p5 << ", \"p50_ms\": " << p.p50
             << ", \"p95_ms\": " << p.p95 << ", \"p99_ms\": " << p.p99 << "}\n";
  };
  report("host to host", measure(runs, [&] { extractor.extract(on_host); }));
  report("host to host, image page-locked", measure(runs, [&] { extractor.extract(page_locked); }));
  report("device to device, one call and a wait", measure(runs, [&] {
           extractor.extract_async(on_device);
           extractor.synchronize();
         }));
  const int together = std::min(50, runs);
  Percentiles many = measure(runs / together, [&] {
    for (int i = 0; i < together; ++i) extractor.extract_async(on_device);
    extractor.synchronize();
  });
  for (double *p : {&many.p5, &many.p50, &many.p95, &many.p99}) *p /= together;
  report("device to device, calls back to back", many);
  std::printf("device memory %.1f MiB\n", double(extractor.info().device_memory) / 1048576.0);
  return 0;
}

}  // namespace

int main(int count, char **words) { return run_program(USAGE, body, count, words); }
