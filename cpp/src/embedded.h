// What the build has embedded: kernels.S and embedded.cpp are generated (cmake/kernels.cmake).
#pragma once

namespace aliked::core {

// A fat binary per build of the table, by its number.
const void *embedded_image(int build);

extern const char *const EMBEDDED_ARCHITECTURES;  // "75 80 90"
extern const bool EMBEDDED_CLUSTERS;              // whether one of them has clusters

}  // namespace aliked::core
