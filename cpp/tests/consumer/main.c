#include <aliked.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  aliked_extractor *extractor = NULL;
  aliked_options options = ALIKED_OPTIONS;
  options.top_k = 100;
  if (strcmp(aliked_version(), ALIKED_VERSION)) return 1;
  if (aliked_create("/no/such/file", &options, &extractor) != ALIKED_NO_FILE) return 1;
  printf("%s\n", aliked_last_error());
  aliked_destroy(extractor);
  return 0;
}
