#include "files.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <sstream>
#include <stdexcept>

#if defined(ALIKED_STB)
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#include <stb_image.h>
#elif defined(ALIKED_OPENCV)
#include <opencv2/imgcodecs.hpp>
#endif

namespace {

constexpr long LARGEST_SIDE = 1 << 20;

Image read_ppm(std::istream &stream, const std::string &file) {
  long width = 0, height = 0, most = 0;
  stream.ignore(2);
  for (long *value : {&width, &height, &most}) {
    while (stream >> std::ws && stream.peek() == '#') stream.ignore(1 << 20, '\n');
    stream >> *value;
  }
  stream.get();
  if (!stream || most != 255 || width < 1 || height < 1 || width > LARGEST_SIDE ||
      height > LARGEST_SIDE || width * height > (1L << 28))
    throw std::runtime_error(file + " is no 8-bit binary PPM of a sensible size");
  Image image{int(height), int(width), std::vector<unsigned char>(size_t(width * height) * 3)};
  if (!stream.read((char *)image.rgb.data(), std::streamsize(image.rgb.size())))
    throw std::runtime_error(file + " is truncated");
  return image;
}

Image read_other(const std::string &file) {
#if defined(ALIKED_STB)
  int width, height, channels;
  unsigned char *pixels = stbi_load(file.c_str(), &width, &height, &channels, 3);
  if (!pixels) throw std::runtime_error("cannot read " + file + ": " + stbi_failure_reason());
  Image image{height, width, {pixels, pixels + size_t(width) * size_t(height) * 3}};
  stbi_image_free(pixels);
  return image;
#elif defined(ALIKED_OPENCV)
  const cv::Mat bgr = cv::imread(file, cv::IMREAD_COLOR);
  if (bgr.empty()) throw std::runtime_error("cannot read " + file);
  Image image{bgr.rows, bgr.cols, std::vector<unsigned char>(bgr.total() * 3)};
  for (int y = 0; y < bgr.rows; ++y)
    for (int x = 0; x < 3 * bgr.cols; ++x)
      image.rgb[size_t(y) * size_t(bgr.cols) * 3 + size_t(x)] = bgr.ptr(y)[x / 3 * 3 + 2 - x % 3];
  return image;
#else
  throw std::runtime_error("cannot read " + file +
                           ": this program was built without stb and OpenCV and reads PPM only");
#endif
}

}  // namespace

Image read_image(const std::string &file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot open " + file);
  const char first = char(stream.get()), second = char(stream.get());
  if (first == 'P' && second == '6') {
    stream.seekg(0);
    return read_ppm(stream, file);
  }
  return read_other(file);
}

namespace {

void write_text(const std::string &file, const aliked::Features &features) {
  std::ofstream stream(file);
  stream << std::setprecision(9);
  for (size_t i = 0; i < features.count(); ++i)
    stream << features.keypoints[2 * i] << ' ' << features.keypoints[2 * i + 1] << ' '
           << features.scores[i] << '\n';
  if (!stream.flush()) throw std::runtime_error("cannot write " + file);
}

// A float32 array as NumPy's .npy (format 1.0).
void write_npy(const std::string &file, std::span<const float> values,
               const std::vector<size_t> &shape) {
  std::ostringstream sides;
  for (size_t side : shape) sides << side << ", ";
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + sides.str() + "), }";
  header.resize((header.size() + 10 + 1 + 63) / 64 * 64 - 10 - 1, ' ');  // data aligned to 64
  header += '\n';
  std::ofstream stream(file, std::ios::binary);
  stream.write("\x93NUMPY\x01\x00", 8);
  stream.put(char(header.size() & 255)).put(char(header.size() >> 8));
  stream << header;
  stream.write((const char *)values.data(), std::streamsize(values.size_bytes()));
  if (!stream.flush()) throw std::runtime_error("cannot write " + file);
}

}  // namespace

void write_features(const std::string &folder, const std::string &image,
                    const aliked::Features &features) {
  std::filesystem::create_directories(folder);
  const std::string stem = (std::filesystem::path(folder) /
                            std::filesystem::path(image).stem()).string();
  const size_t count = features.count();
  write_text(stem + ".txt", features);
  write_npy(stem + ".keypoints.npy", features.keypoints, {count, 2});
  write_npy(stem + ".scores.npy", features.scores, {count});
  write_npy(stem + ".descriptors.npy", features.descriptors, {count, size_t(features.length)});
}

CommandLine::CommandLine(int count, char **words, const std::vector<std::string> &known) {
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.rfind("--", 0) != 0) {
      names.push_back(word);
      continue;
    }
    const std::string name = word.substr(2);
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      std::string all;
      for (const std::string &one : known) all += " --" + one;
      throw std::runtime_error("unknown option " + word + "; there are" + all);
    }
    if (++i == count) throw std::runtime_error(word + " needs a value");
    options[name] = words[i];
  }
}

std::string CommandLine::get(const std::string &name, const std::string &otherwise) const {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : found->second;
}

namespace {

template <typename T> T number(const std::string &name, const std::string &word) {
  std::istringstream stream(word);
  T value;
  if (!(stream >> value) || !(stream >> std::ws).eof())
    throw std::runtime_error("--" + name + " is " + word + "; give a number");
  return value;
}

}  // namespace

int CommandLine::get(const std::string &name, int otherwise) const {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : number<int>(name, found->second);
}

float CommandLine::get(const std::string &name, float otherwise) const {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : number<float>(name, found->second);
}

int run_program(const std::string &usage, int (*body)(int, char **), int count, char **words) {
  if (std::find(words, words + count, std::string("--help")) != words + count) {
    std::printf("usage: %s\n", usage.c_str());
    return 0;
  }
  try {
    return body(count, words);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s: error: %s\n", usage.substr(0, usage.find(' ')).c_str(),
                 error.what());
    return 2;
  }
}
