// The shipped library on a machine without a driver or a GPU: it loads, and says what is missing.
#include <string>

#include "aliked.h"
#include "check.h"

int main(int, char **words) {
  const std::string folder = words[1];
  aliked_extractor *extractor = nullptr;
  const aliked_status status =
      aliked_create((folder + "/random.safetensors").c_str(), nullptr, &extractor);
  if (status == ALIKED_OK) {
    std::puts("there is a GPU here: nothing to check");
    aliked_destroy(extractor);
    return 0;
  }
  CHECK(status == ALIKED_NO_DRIVER || status == ALIKED_NO_DEVICE);
  CHECK(!extractor);
  CHECK(std::string(aliked_last_error()).find("NVIDIA driver") != std::string::npos);
  std::puts(aliked_last_error());
  aliked_matcher *matcher = nullptr;
  CHECK(aliked_create_matcher(0, &matcher) == status && !matcher);
  return result();
}
