// A tracking loop: features and matches of every frame with the one before it, with one wait per
// frame. Descriptors stay on the GPU; what comes home are keypoints and the matches.
//   aliked_track FRAME... --model FILE
#include <cmath>
#include <cstdio>
#include <vector>

#include "aliked.hpp"
#include "files.h"

namespace {

const std::string USAGE = "aliked_track FRAME... --model FILE [--top_k N]";

// The features of one frame; two of them take turns.
struct Slot {
  aliked::Memory<float> keypoints, scores, descriptors;
  aliked_buffers buffers;

  Slot(const aliked::Extractor &extractor, int capacity, int length)
      : keypoints(extractor, ALIKED_PAGE_LOCKED, std::size_t(capacity) * 2),
        scores(extractor, ALIKED_DEVICE, std::size_t(capacity)),
        descriptors(extractor, ALIKED_DEVICE, std::size_t(capacity) * std::size_t(length)),
        buffers{ALIKED_DEVICE, capacity, keypoints.data(), scores.data(), descriptors.data(),
                nullptr} {}
};

int body(int count, char **words) {
  const CommandLine line(count, words, {"model", "top_k"});
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = line.get("top_k", options.top_k);
  const std::string file = line.get("model", std::string());
  if (file.empty() || line.names.empty() || options.top_k < 1)
    throw std::runtime_error("usage: " + USAGE);
  aliked::Extractor extractor(file, options);
  aliked::Matcher matcher;

  const int length = extractor.info().descriptor_length;
  std::vector<Slot> slots;
  for (int i = 0; i < 2; ++i) slots.emplace_back(extractor, options.top_k, length);
  aliked_features previous{};
  for (std::size_t frame = 0; frame < line.names.size(); ++frame) {
    const Image image = read_image(line.names[frame]);  // stands in for a camera
    const aliked_features current = extractor.extract_async(
        aliked::images(image.rgb.data(), image.height, image.width), &slots[frame % 2].buffers);
    aliked_matches matches{};
    if (frame > 0)  // on the same stream: the features are there before they are matched
      matches = matcher.match_async(aliked::descriptors_of(previous),
                                    aliked::descriptors_of(current), 0.75f, extractor.stream());
    extractor.synchronize();  // the one wait

    int matched = 0;
    double moved = 0;
    for (int i = 0; i < matches.count; ++i) {
      if (matches.index[i] < 0) continue;
      const float *before = previous.keypoints + 2 * i;
      const float *now = current.keypoints + 2 * matches.index[i];
      moved += std::hypot(now[0] - before[0], now[1] - before[1]);
      ++matched;
    }
    std::printf("%s: %d matches, %.2f pixels apart\n", line.names[frame].c_str(), matched,
                matched ? moved / matched : 0);
    previous = current;
  }
  return 0;
}

}  // namespace

int main(int count, char **words) { return run_program(USAGE, body, count, words); }
