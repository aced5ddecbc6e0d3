// aliked_extract IMAGE... --model FILE: keypoints of images as text, all features as NumPy arrays.
#include <cstdio>

#include "aliked.hpp"
#include "files.h"

namespace {

const std::string USAGE =
    "aliked_extract IMAGE... --model FILE [--top_k N] [--scores_th X] [--n_limit N] [--strict 0]"
    " [--device N] [--output FOLDER]; python -m aliked.fused.pack_weights writes FILE";

int body(int count, char **words) {
  const CommandLine line(count, words,
                         {"model", "top_k", "scores_th", "n_limit", "strict", "device", "output"});
  if (line.names.empty() || line.get("model", std::string()).empty())
    throw std::runtime_error("usage: " + USAGE);
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = line.get("top_k", options.top_k);
  options.scores_th = line.get("scores_th", options.scores_th);
  options.n_limit = line.get("n_limit", options.n_limit);
  options.strict = line.get("strict", options.strict);
  options.device = line.get("device", options.device);
  const std::string folder = line.get("output", std::string("."));

  aliked::Extractor extractor(line.get("model", std::string()), options);
  for (const std::string &name : line.names) {
    const Image image = read_image(name);
    const aliked::Features features = extractor(image.rgb.data(), image.height, image.width);
    write_features(folder, name, features);
    std::printf("%s: %zu keypoints, %dx%d\n", name.c_str(), features.count(), image.width,
                image.height);
  }
  return 0;
}

}  // namespace

int main(int count, char **words) { return run_program(USAGE, body, count, words); }
