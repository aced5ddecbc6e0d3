// aliked/fused/launches.def for C++: which builds of the kernels there are, and how each kernel is
// launched. Nothing is said here that the table says.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "weights.h"

namespace aliked::core {

#define NUMBER(name, value) constexpr long name = value;
#define VALUE(...)
#define LAUNCH(...)
#define FIELDS(...)
#define BUILD(...)
#include "launches.def"
#undef NUMBER
#undef VALUE
#undef LAUNCH
#undef FIELDS
#undef BUILD

using Constants = std::map<std::string, long>;

// One compilation of a source.
struct Build {
  int number;  // its row among all builds: the number of its embedded image
  std::string source;
  Constants constants;
};

const std::vector<Build> &builds();

// The first build of a source that has all of `wanted`, or null.
const Build *find_build(const std::string &source, const Constants &wanted);

// What the expressions of the table speak of; a launch sets what its row names.
struct Sizes {
  long batch = 0, height = 0, width = 0, rows = 0, columns = 0, k = 0, room = 0, capacity = 0;
};

#define NUMBER(...)
#define VALUE(name, expression) long value_of_##name(const Sizes &sizes);
#define LAUNCH(...)
#define FIELDS(...)
#define BUILD(...)
#include "launches.def"
#undef NUMBER
#undef VALUE
#undef LAUNCH
#undef FIELDS
#undef BUILD

struct Geometry {
  long grid[3], block[3];
};

Geometry geometry(const std::string &kernel, const Build &build, const Sizes &sizes);

// Whether every kernel is built for a model of these sizes.
bool has_kernels(const Shape &shape);

}  // namespace aliked::core
