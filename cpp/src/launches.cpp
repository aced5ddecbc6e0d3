#include "launches.h"

#include <algorithm>
#include <sstream>

#include "error.h"

namespace aliked::core {
namespace {

// The words of the table's expressions.
long ratio(long a, long b) { return std::max(1L, (a + b - 1) / b); }
long smaller(long a, long b) { return std::min(a, b); }

std::vector<std::string> words(const char *list) {
  std::vector<std::string> words;
  std::istringstream stream(list);
  for (std::string word; std::getline(stream >> std::ws, word, ',');) words.push_back(word);
  return words;
}

std::vector<Build> read_builds() {
  std::map<std::string, std::vector<std::string>> fields;
  std::vector<Build> builds;
  const auto add = [&](const char *source, const std::vector<long> &values) {
    Build build{int(builds.size()), source, {}};
    const std::vector<std::string> &names = fields[source];
    for (size_t i = 0; i < values.size() && i < names.size(); ++i)
      build.constants[names[i]] = values[i];
    builds.push_back(std::move(build));
  };
#define NUMBER(...)
#define VALUE(...)
#define LAUNCH(...)
#define FIELDS(source, ...) fields[#source] = words(#__VA_ARGS__);
#define BUILD(source, ...) add(#source, {__VA_ARGS__});
#include "launches.def"
#undef NUMBER
#undef VALUE
#undef LAUNCH
#undef FIELDS
#undef BUILD
  return builds;
}

// A constant of a build, 0 where it has none of that name.
long constant(const Build &build, const char *name) {
  const auto found = build.constants.find(name);
  return found == build.constants.end() ? 0 : found->second;
}

}  // namespace

const std::vector<Build> &builds() {
  static const std::vector<Build> all = read_builds();
  return all;
}

const Build *find_build(const std::string &source, const Constants &wanted) {
  for (const Build &build : builds()) {
    const auto has = [&](const auto &pair) {
      const auto found = build.constants.find(pair.first);
      return found != build.constants.end() && found->second == pair.second;
    };
    if (build.source == source && std::all_of(wanted.begin(), wanted.end(), has)) return &build;
  }
  return nullptr;
}

// Every name that an expression may have; most use few of them.
#define ALIKED_SIZES                                                                              \
  [[maybe_unused]] const long batch = sizes.batch, height = sizes.height, width = sizes.width,    \
                              rows = sizes.rows, columns = sizes.columns, k = sizes.k,            \
                              room = sizes.room, capacity = sizes.capacity

#define NUMBER(...)
#define VALUE(name, expression)                                                                   \
  long value_of_##name(const Sizes &sizes) {                                                      \
    ALIKED_SIZES;                                                                                 \
    return expression;                                                                            \
  }
#define LAUNCH(...)
#define FIELDS(...)
#define BUILD(...)
#include "launches.def"
#undef VALUE
#undef LAUNCH

Geometry geometry(const std::string &kernel, const Build &build, const Sizes &sizes) {
  ALIKED_SIZES;
  [[maybe_unused]] const long CO = constant(build, "CO"), COLUMNS = constant(build, "COLUMNS"),
                              BLOCKS = constant(build, "BLOCKS"), DOWN = constant(build, "DOWN"),
                              PIXELS = constant(build, "PIXELS"), EACH = constant(build, "EACH"),
                              WARPS = constant(build, "WARPS"),
                              POSITIONS = constant(build, "POSITIONS");
#define VALUE(...)
#define LAUNCH(name, its_source, threads_x, threads_y, blocks_x, blocks_y, blocks_z)              \
  if (kernel == #name && build.source == #its_source)                                             \
    return {{blocks_x, blocks_y, blocks_z}, {threads_x, threads_y, 1}};
#include "launches.def"
#undef NUMBER
#undef VALUE
#undef LAUNCH
#undef FIELDS
#undef BUILD
  throw Error(ALIKED_INTERNAL_ERROR,
              "the table of launches has no " + kernel + " of " + build.source);
}

bool has_kernels(const Shape &shape) {
  const auto [c1, c2, c3, c4] = shape.channels;
  const long q = shape.quarter();
  return shape.dim == 4 * q &&  //
         find_build("blocks", {{"IN", 3}, {"OUT", c1}, {"QUARTER", q}}) &&
         find_build("blocks", {{"IN", c1}, {"OUT", c2}, {"QUARTER", q}}) &&
         find_build("deform", {{"CI", c2}, {"CO", c3}, {"LEVEL", 0}}) &&
         find_build("deform", {{"CI", c3}, {"CS", c2}, {"QUARTER", q}, {"POOL", 4}}) &&
         find_build("deform", {{"CI", c3}, {"CO", c4}, {"LEVEL", 0}}) &&
         find_build("deform", {{"CI", c4}, {"CS", c3}, {"QUARTER", q}, {"POOL", 1}}) &&
         find_build("describe", {{"C1", c1}, {"QUARTER", q}, {"POSITIONS", shape.positions}});
}

}  // namespace aliked::core
