// aliked_extract IMAGE... --model FILE: keypoints of images as text, all features as NumPy arrays.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iomanip>

#include "aliked.hpp"
#include "files.h"

namespace fs = std::filesystem;

namespace {

// One line per keypoint: x, y, score.
void write_text(const std::string &file, const aliked::Features &features) {
  std::ofstream stream(file);
  stream << std::setprecision(9);
  for (std::size_t i = 0; i < features.count(); ++i)
    stream << features.keypoints[2 * i] << ' ' << features.keypoints[2 * i + 1] << ' '
           << features.scores[i] << '\n';
  if (!stream.flush()) throw std::runtime_error("cannot write " + file);
}

int body(int count, char **words) {
  const CommandLine line(count, words,
                         {"model", "top_k", "scores_th", "n_limit", "strict", "device", "output"});
  if (line.names.empty() || line.get("model", std::string()).empty())
    throw std::runtime_error("give images and --model FILE (python -m aliked.fused.pack_weights "
                             "writes one); others: --top_k N, --scores_th X, --n_limit N, "
                             "--strict 0, --device N, --output FOLDER");
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = line.get("top_k", options.top_k);
  options.scores_th = line.get("scores_th", options.scores_th);
  options.n_limit = line.get("n_limit", options.n_limit);
  options.strict = line.get("strict", options.strict);
  options.device = line.get("device", options.device);
  const fs::path folder = line.get("output", std::string("."));
  fs::create_directories(folder);

  aliked::Extractor extractor(line.get("model", std::string()), options);
  for (const std::string &name : line.names) {
    const Image image = read_image(name);
    const aliked::Features features = extractor(image.rgb.data(), image.height, image.width);
    const std::string stem = (folder / fs::path(name).stem()).string();
    const std::size_t n = features.count();
    write_text(stem + ".txt", features);
    write_npy(stem + ".keypoints.npy", features.keypoints.data(), {n, 2});
    write_npy(stem + ".scores.npy", features.scores.data(), {n});
    write_npy(stem + ".descriptors.npy", features.descriptors.data(),
              {n, std::size_t(features.length)});
    std::printf("%s: %zu keypoints, %dx%d\n", name.c_str(), n, image.width, image.height);
  }
  return 0;
}

}  // namespace

int main(int count, char **words) { return run_program("aliked_extract", body, count, words); }
