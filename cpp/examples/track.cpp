// A tracking loop: features and matches of every frame with the one before it, with one wait per
// frame. Descriptors stay on the GPU; what comes home are keypoints and the matches.
//   aliked_track FRAME... --model FILE
#include <cstdio>
#include <vector>

#include "aliked.hpp"
#include "files.h"

namespace {

// The features of one frame on the GPU; two of them take turns.
struct Slot {
  aliked::Memory<float> keypoints, scores, descriptors;
  aliked_buffers buffers;

  Slot(const aliked::Extractor &extractor, int capacity, int length)
      : keypoints(extractor, ALIKED_DEVICE, std::size_t(capacity) * 2),
        scores(extractor, ALIKED_DEVICE, std::size_t(capacity)),
        descriptors(extractor, ALIKED_DEVICE, std::size_t(capacity) * std::size_t(length)),
        buffers{ALIKED_DEVICE, capacity, keypoints.data(), scores.data(), descriptors.data(),
                nullptr} {}
};

int body(int count, char **words) {
  const CommandLine line(count, words, {"model", "top_k"});
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = line.get("top_k", options.top_k);
  aliked::Extractor extractor(line.get("model", std::string("model.safetensors")), options);
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
    for (int i = 0; i < matches.count; ++i) matched += matches.index[i] >= 0;
    std::printf("%s: %d matches\n", line.names[frame].c_str(), matched);
    previous = current;
  }
  return 0;
}

}  // namespace

int main(int count, char **words) { return run_program("aliked_track", body, count, words); }
