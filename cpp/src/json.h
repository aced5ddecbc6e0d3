// As much of JSON as the header of a safetensors file has: objects, arrays, strings, whole numbers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace aliked::core {

struct Json {
  enum Kind { OBJECT, ARRAY, STRING, NUMBER } kind = NUMBER;
  std::vector<std::pair<std::string, Json>> members;  // of an object, in the order of the text
  std::vector<Json> items;                            // of an array
  std::string string;
  uint64_t number = 0;

  const Json *find(std::string_view name) const;  // a member, or null
};

// Throws std::invalid_argument with what is wrong, and where.
Json parse_json(std::string_view text);

}  // namespace aliked::core
