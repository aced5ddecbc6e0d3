// Whether every kernel fits every architecture it was compiled for: what ptxas reported of
// registers and shared memory against the limits that NVIDIA documents.
#include <cstdio>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

#include "check.h"
#include "error.h"
#include "launches.h"

namespace {

// Of the CUDA C++ programming guide, "technical specifications per compute capability". A block has
// at most 48 KiB of statically declared shared memory everywhere.
constexpr int REGISTERS = 65536, REGISTERS_OF_A_THREAD = 255, STATIC_SHARED = 48 << 10;
const std::map<int, int> SHARED = {  // KiB of a multiprocessor, by compute capability
    {75, 64}, {80, 164}, {86, 100}, {87, 164}, {89, 100}, {90, 228}, {100, 228}, {103, 228},
    {110, 228}, {120, 100}, {121, 100}};
constexpr int RESERVED_SHARED = 1024;  // of a block, from 8.0 on
constexpr int REGISTER_UNIT = 256;     // a warp's registers come in so many

// Threads of a block, from the table; 0 where it does not have the kernel.
long threads_of(const std::string &kernel) {
  using namespace aliked::core;
  for (const Build &build : builds()) {
    try {
      const Geometry shape = geometry(kernel, build, {1, 64, 64, 64, 64, 64, 64, 64});
      return shape.block[0] * shape.block[1] * shape.block[2];
    } catch (const Error &) {  // a build of another source
    }
  }
  return 0;
}

}  // namespace

int main(int count, char **words) {
  const std::regex entry("Compiling entry function '(\\w+)' for 'sm_(\\d+)'");
  const std::regex used("Used (\\d+) registers");
  const std::regex shared("(\\d+) bytes smem");
  std::set<std::string> kernels;
  int checked = 0;
  for (int i = 1; i < count; ++i) {
    std::ifstream file(words[i]);
    CHECK(bool(file));
    std::string line, kernel;
    int architecture = 0;
    std::smatch match;
    while (std::getline(file, line)) {
      if (std::regex_search(line, match, entry))
        kernel = match[1], architecture = std::stoi(match[2]);
      if (!std::regex_search(line, match, used)) continue;
      const int registers = std::stoi(match[1]);
      const int bytes = std::regex_search(line, match, shared) ? std::stoi(match[1]) : 0;
      const long threads = threads_of(kernel);
      const int warp = (registers * 32 + REGISTER_UNIT - 1) / REGISTER_UNIT * REGISTER_UNIT;
      const bool known = SHARED.count(architecture) > 0;
      if (!known) std::fprintf(stderr, "no limits are known here for sm_%d\n", architecture);
      const bool fits = known && threads > 0 && registers <= REGISTERS_OF_A_THREAD &&
                        warp * ((threads + 31) / 32) <= REGISTERS && bytes <= STATIC_SHARED &&
                        bytes + RESERVED_SHARED <= SHARED.at(architecture) * 1024;
      if (!fits)
        std::fprintf(stderr, "%s on sm_%d: %ld threads, %d registers, %d bytes\n", kernel.c_str(),
                     architecture, threads, registers, bytes);
      CHECK(fits);
      kernels.insert(kernel);
      ++checked;
    }
  }
  std::printf("%d kernels checked, %zu names\n", checked, kernels.size());
  CHECK(kernels.size() == 12 && checked >= 12);
  return result();
}
