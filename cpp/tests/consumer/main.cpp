#include <aliked.hpp>
#include <cstdio>

template class aliked::Memory<float>;

int main() {
  try {
    aliked::Extractor extractor("/no/such/file");
  } catch (const aliked::Error &error) {
    std::puts(error.what());
    return error.status == ALIKED_NO_FILE ? 0 : 1;
  }
  return 1;
}
