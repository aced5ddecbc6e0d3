#include "kernels.h"

#include <cstring>

#include "embedded.h"

namespace aliked::core {
namespace {

// As in `aliked/fused/cuda_source.py` and `deform.py`.
constexpr int OVERLAPS_FROM = 90, CLUSTERS_FROM = 90;  // compute capability
constexpr int OVERLAPS_IN_GRAPHS_FROM = 12030;         // version of the driver
constexpr long MOST_BLOCKS[3] = {2147483647, 65535, 65535};

}  // namespace

int bits(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

Kernels::Kernels(const Device &device)
    : device_(device),
      clusters_(device.capability() >= CLUSTERS_FROM && EMBEDDED_CLUSTERS),
      overlaps_(device.capability() >= OVERLAPS_FROM &&
                driver().version >= OVERLAPS_IN_GRAPHS_FROM) {}

CUfunction Kernels::function(const Build &build, const std::string &kernel) {
  CUfunction &function = functions_[{build.number, kernel}];
  if (function) return function;
  Module &module = modules_[build.number];
  if (!module) {
    CUmodule loaded;
    const void *const image = embedded_image(build.number);
    const CUresult result =
        image ? driver().cuModuleLoadData(&loaded, image) : CUDA_ERROR_NO_BINARY_FOR_GPU;
    if (result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION ||
        result == CUDA_ERROR_INVALID_PTX || result == CUDA_ERROR_JIT_COMPILER_NOT_FOUND)
      throw Error(ALIKED_UNSUPPORTED_DEVICE,
                  text("this library has no kernels for %s (compute capability %d.%d), and its PTX "
                       "does not run there; it was built for %s: build it again with "
                       "-DCMAKE_CUDA_ARCHITECTURES=%d, or update the driver",
                       device_.name().c_str(), device_.capability() / 10,
                       device_.capability() % 10, EMBEDDED_ARCHITECTURES, device_.capability()));
    check(result, "load the kernels of " + build.source);
    module = Module(loaded);
  }
  check(driver().cuModuleGetFunction(&function, module.get(), kernel.c_str()), "find " + kernel);
  return function;
}

void Kernels::launch(CUstream stream, const std::string &kernel, const Build &build,
                     const Sizes &sizes, Arguments arguments, bool early) {
  const Geometry shape = geometry(kernel, build, sizes);
  for (int axis = 0; axis < 3; ++axis)
    require(shape.grid[axis] <= MOST_BLOCKS[axis], "the batch or the images are too large");
  CUlaunchAttribute attribute;
  std::memset(&attribute, 0, sizeof attribute);
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config;
  std::memset(&config, 0, sizeof config);
  config.gridDimX = unsigned(shape.grid[0]);
  config.gridDimY = unsigned(shape.grid[1]);
  config.gridDimZ = unsigned(shape.grid[2]);
  config.blockDimX = unsigned(shape.block[0]);
  config.blockDimY = unsigned(shape.block[1]);
  config.blockDimZ = unsigned(shape.block[2]);
  config.hStream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && overlaps_ ? 1 : 0;
  check(driver().cuLaunchKernelEx(&config, function(build, kernel), arguments.addresses().data(),
                                  nullptr),
        "launch " + kernel);
}

}  // namespace aliked::core
