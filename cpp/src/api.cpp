// The C interface: null pointers, and exceptions into a status and a sentence.
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "aliked.h"
#include "error.h"
#include "extractor.h"
#include "matcher.h"
#include "weights.h"

using namespace aliked::core;

struct aliked_extractor : Extractor {
  using Extractor::Extractor;
};
struct aliked_matcher : Matcher {
  using Matcher::Matcher;
};

namespace {

thread_local std::string last_error;

aliked_status failed(aliked_status status, const char *sentence) noexcept {
  try {
    last_error = sentence;
  } catch (...) {  // no memory for the sentence: the status remains
    last_error.clear();
  }
  return status;
}

// Runs a call's body; nothing is thrown out of the library.
template <typename Body> aliked_status guarded(Body body) noexcept {
  try {
    body();
    return ALIKED_OK;
  } catch (const Error &error) {
    return failed(error.status, error.what());
  } catch (const std::bad_alloc &) {
    return failed(ALIKED_OUT_OF_MEMORY, "there is not enough memory on the host");
  } catch (const std::exception &error) {
    return failed(ALIKED_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(ALIKED_INTERNAL_ERROR, "something unknown was thrown");
  }
}

aliked_extractor &existing(aliked_extractor *extractor) {
  require(extractor, "there is no extractor: the pointer is null");
  return *extractor;
}

// The options, whichever header the caller was compiled with. What an older one has no field for is
// 0, which means what the library did then.
aliked_options complete(const aliked_options *given) {
  constexpr size_t SIZE_1_0 = offsetof(aliked_options, strict);
  if (!given) return ALIKED_OPTIONS;
  require(given->size == sizeof(aliked_options) || given->size == SIZE_1_0,
          text("the options have a size of %zu bytes where this library has %zu: start from "
               "ALIKED_OPTIONS", given->size, sizeof(aliked_options)));
  aliked_options options = {};
  std::memcpy(&options, given, given->size);
  return options;
}

aliked_extractor *create(const Weights &weights, const aliked_options *given) {
  const aliked_options options = complete(given);
  if (options.model && weights.model() != options.model)
    throw Error(ALIKED_BAD_WEIGHTS, text("the weights are those of %s and not of %.60s",
                                         weights.model().c_str(), options.model));
  return new aliked_extractor(weights, options);
}

}  // namespace

const char *aliked_version(void) { return ALIKED_VERSION; }

const char *aliked_last_error(void) { return last_error.c_str(); }

aliked_status aliked_create(const char *file, const aliked_options *options,
                            aliked_extractor **extractor) {
  return guarded([&] {
    require(extractor, "there is nowhere to put the extractor: the pointer is null");
    *extractor = nullptr;
    require(file, "there is no weights file: the pointer is null");
    *extractor = create(Weights::read(file), options);
  });
}

aliked_status aliked_create_from_memory(const void *weights, size_t size,
                                        const aliked_options *options,
                                        aliked_extractor **extractor) {
  return guarded([&] {
    require(extractor, "there is nowhere to put the extractor: the pointer is null");
    *extractor = nullptr;
    require(weights, "there are no weights: the pointer is null");
    *extractor = create(Weights::parse(weights, size, "the memory given"), options);
  });
}

void aliked_destroy(aliked_extractor *extractor) { delete extractor; }

aliked_status aliked_get_info(aliked_extractor *extractor, aliked_info *info) {
  return guarded([&] { existing(extractor).info(info); });
}

aliked_status aliked_capacity(aliked_extractor *extractor, int height, int width, int *capacity) {
  return guarded([&] {
    require(capacity, "there is nowhere to put the capacity: the pointer is null");
    *capacity = existing(extractor).capacity(height, width);
  });
}

aliked_status aliked_extract(aliked_extractor *extractor, const aliked_images *images,
                             aliked_features *features) {
  return guarded([&] { existing(extractor).extract(images, nullptr, features); });
}

aliked_status aliked_extract_into(aliked_extractor *extractor, const aliked_images *images,
                                  const aliked_buffers *buffers, aliked_features *features) {
  return guarded([&] {
    require(buffers, "there are no buffers: the pointer is null");
    existing(extractor).extract(images, buffers, features);
  });
}

aliked_status aliked_submit(aliked_extractor *extractor, const aliked_images *images) {
  return guarded([&] { existing(extractor).submit(images); });
}

aliked_status aliked_wait(aliked_extractor *extractor, aliked_features *features) {
  return guarded([&] { existing(extractor).wait(features); });
}

aliked_status aliked_extract_async(aliked_extractor *extractor, const aliked_images *images,
                                   const aliked_buffers *buffers, aliked_stream stream,
                                   aliked_features *features) {
  return guarded(
      [&] { existing(extractor).extract_async(images, buffers, (CUstream)stream, features); });
}

aliked_status aliked_get_stream(aliked_extractor *extractor, aliked_stream *stream) {
  return guarded([&] {
    require(stream, "there is nowhere to put the stream: the pointer is null");
    *stream = existing(extractor).stream();
  });
}

aliked_status aliked_synchronize(aliked_extractor *extractor, aliked_stream stream) {
  return guarded([&] { existing(extractor).synchronize((CUstream)stream); });
}

aliked_status aliked_allocate(aliked_extractor *extractor, aliked_memory memory, size_t size,
                              void **pointer) {
  return guarded([&] {
    require(pointer, "there is nowhere to put the memory: the pointer is null");
    *pointer = existing(extractor).allocate(memory, size);
  });
}

aliked_status aliked_free(aliked_extractor *extractor, aliked_memory memory, void *pointer) {
  return guarded([&] { existing(extractor).free(memory, pointer); });
}

aliked_status aliked_create_matcher(int device, aliked_matcher **matcher) {
  return guarded([&] {
    require(matcher, "there is nowhere to put the matcher: the pointer is null");
    *matcher = nullptr;
    *matcher = new aliked_matcher(device);
  });
}

void aliked_destroy_matcher(aliked_matcher *matcher) { delete matcher; }

namespace {

aliked_matcher &existing(aliked_matcher *matcher) {
  require(matcher, "there is no matcher: the pointer is null");
  return *matcher;
}

}  // namespace

aliked_status aliked_match(aliked_matcher *matcher, const aliked_descriptors *first,
                           const aliked_descriptors *second, float min_similarity,
                           aliked_matches *matches) {
  return guarded([&] { existing(matcher).match(first, second, min_similarity, matches); });
}

aliked_status aliked_match_async(aliked_matcher *matcher, const aliked_descriptors *first,
                                 const aliked_descriptors *second, float min_similarity,
                                 aliked_stream stream, aliked_matches *matches) {
  return guarded([&] {
    existing(matcher).match_async(first, second, min_similarity, (CUstream)stream, matches);
  });
}
