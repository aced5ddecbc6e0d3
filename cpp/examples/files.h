// Images in, arrays out, and the options of a command line: what the programs share.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "aliked.hpp"

struct Image {
  int height = 0, width = 0;
  std::vector<unsigned char> rgb;  // [height, width, 3]
};

// PNG or JPEG where the build found a reader, PPM (P6) always. Throws std::runtime_error.
Image read_image(const std::string &file);

// An image's features in a folder, which is made: NAME.txt has a line x, y, score per keypoint,
// NAME.keypoints.npy, .scores.npy and .descriptors.npy are NumPy's arrays.
void write_features(const std::string &folder, const std::string &image,
                    const aliked::Features &features);

struct CommandLine {
  std::vector<std::string> names;              // what is no option
  std::map<std::string, std::string> options;  // --name value

  // Throws std::runtime_error for an option that is not among `known`, or has no value.
  CommandLine(int count, char **words, const std::vector<std::string> &known);
  std::string get(const std::string &name, const std::string &otherwise) const;
  int get(const std::string &name, int otherwise) const;
  float get(const std::string &name, float otherwise) const;
};

// Calls `body`, or prints `usage` for --help; an error becomes a sentence on stderr and status 2.
// `usage` begins with the program's name.
int run_program(const std::string &usage, int (*body)(int, char **), int count, char **words);
