// What the tests say when something is not as it should be.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline int failures = 0;

#define CHECK(condition)                                                                          \
  do {                                                                                            \
    if (!(condition)) {                                                                           \
      ++failures;                                                                                 \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
    }                                                                                             \
  } while (false)

// A call's status, and a word of the sentence that goes with it.
#define CHECK_STATUS(call, wanted, word)                                                          \
  do {                                                                                            \
    const aliked_status got = (call);                                                             \
    const std::string sentence = aliked_last_error();                                             \
    if (got != (wanted) || (got != ALIKED_OK && sentence.find(word) == std::string::npos)) {      \
      ++failures;                                                                                 \
      std::fprintf(stderr, "%s:%d: %s gave %d: %s\n", __FILE__, __LINE__, #call, int(got),        \
                   sentence.c_str());                                                             \
    }                                                                                             \
  } while (false)

inline int result() {
  if (failures) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures ? 1 : 0;
}
