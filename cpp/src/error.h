// What goes wrong inside the library: thrown here, turned into a status and a sentence in api.cpp.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "aliked.h"

namespace aliked::core {

struct Error : std::runtime_error {
  aliked_status status;
  Error(aliked_status status, const std::string &sentence)
      : std::runtime_error(sentence), status(status) {}
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string text(const char *format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

inline void require(bool condition, const std::string &sentence) {
  if (!condition) throw Error(ALIKED_BAD_ARGUMENT, sentence);
}

}  // namespace aliked::core
