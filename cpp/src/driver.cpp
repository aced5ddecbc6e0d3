#include "driver.h"

#include <dlfcn.h>

namespace aliked::core {
namespace {

constexpr const char *LIBRARY = "libcuda.so.1";
constexpr int OLDEST = 11080;  // cuLaunchKernelEx

// The name that a function has in the library once cuda.h's macros have been applied.
#define ALIKED_NAME(name) #name
#define ALIKED_EXPANDED(name) ALIKED_NAME(name)

Driver load() {
  void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *reason = dlerror();
    throw Error(ALIKED_NO_DRIVER,
                text("there is no NVIDIA driver here: %s; install one",
                     reason ? reason : "libcuda.so.1 cannot be loaded"));
  }
  Driver driver;
  const char *missing = nullptr;
#define ALIKED_LOAD(name)                                                                         \
  driver.name = (decltype(driver.name))dlsym(library, ALIKED_EXPANDED(name));                     \
  if (!driver.name) missing = ALIKED_EXPANDED(name);
  ALIKED_DRIVER_FUNCTIONS(ALIKED_LOAD)
#undef ALIKED_LOAD
  if (driver.cuDriverGetVersion) driver.cuDriverGetVersion(&driver.version);
  if (missing || driver.version < OLDEST)
    throw Error(ALIKED_NO_DRIVER,
                text("the NVIDIA driver supports CUDA %d.%d%s%s; update it to one for CUDA %d.%d "
                     "or newer",
                     driver.version / 1000, driver.version % 1000 / 10,
                     missing ? " and has no " : "", missing ? missing : "", OLDEST / 1000,
                     OLDEST % 1000 / 10));
  const CUresult result = driver.cuInit(0);
  if (result == CUDA_ERROR_NO_DEVICE)
    throw Error(ALIKED_NO_DEVICE, "the NVIDIA driver sees no GPU on this machine");
  if (result != CUDA_SUCCESS) {
    const char *name = nullptr, *sentence = nullptr;
    driver.cuGetErrorName(result, &name);
    driver.cuGetErrorString(result, &sentence);
    throw Error(ALIKED_NO_DRIVER, text("the NVIDIA driver does not start: %s (%s)",
                                       sentence ? sentence : "", name ? name : "unknown"));
  }
  return driver;
}

}  // namespace

const Driver &driver() {
  static const Driver loaded = load();  // tried again by the next call where it throws
  return loaded;
}

void check(CUresult result, const std::string &doing) {
  if (result == CUDA_SUCCESS) return;
  const char *name = nullptr, *sentence = nullptr;
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &sentence);
  const aliked_status status =
      result == CUDA_ERROR_OUT_OF_MEMORY ? ALIKED_OUT_OF_MEMORY
      : result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION
          ? ALIKED_UNSUPPORTED_DEVICE
          : ALIKED_CUDA_ERROR;
  throw Error(status, text("cannot %s: %s (%s)", doing.c_str(), sentence ? sentence : "no reason",
                           name ? name : "unknown error"));
}

Device::Device(int number) : number_(number) {
  const Driver &d = driver();
  int count = 0;
  check(d.cuDeviceGetCount(&count), "count the GPUs");
  if (number < 0 || number >= count)
    throw Error(ALIKED_NO_DEVICE,
                text("GPU %d was asked for, but there are %d here, from 0 on", number, count));
  check(d.cuDeviceGet(&device_, number), "open the GPU");
  char name[256] = "";
  check(d.cuDeviceGetName(name, sizeof name, device_), "ask for the GPU's name");
  name_ = name;
  capability_ = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) * 10 +
                attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  check(d.cuDevicePrimaryCtxRetain(&context_, device_), "create a context on the GPU");
}

Device::~Device() { driver().cuDevicePrimaryCtxRelease(device_); }

int Device::attribute(CUdevice_attribute attribute) const {
  int value = 0;
  check(driver().cuDeviceGetAttribute(&value, attribute, device_), "ask what the GPU has");
  return value;
}

Current::Current(const Device &device) {
  check(driver().cuCtxPushCurrent(device.context()), "use the GPU's context");
}

Current::~Current() {
  CUcontext popped;
  driver().cuCtxPopCurrent(&popped);
}

Stream make_stream() {
  CUstream stream;
  check(driver().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "create a stream");
  return Stream(stream);
}

Event make_event() {
  CUevent event;
  check(driver().cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "create an event");
  return Event(event);
}

DeviceMemory::DeviceMemory(size_t size, const char *what_for) : size_(size) {
  CUdeviceptr memory;
  check(driver().cuMemAlloc(&memory, size),
        text("allocate %.1f MiB on the GPU for %s", double(size) / 1048576.0, what_for));
  memory_ = Owner<CUdeviceptr, release>(memory);
}

HostMemory::HostMemory(size_t size, const char *what_for) : size_(size) {
  void *memory;
  check(driver().cuMemHostAlloc(&memory, size, CU_MEMHOSTALLOC_DEVICEMAP),
        text("allocate %.1f MiB of page-locked memory for %s", double(size) / 1048576.0, what_for));
  memory_ = Owner<void *, release>(memory);
  check(driver().cuMemHostGetDevicePointer(&on_device_, memory, 0), "map page-locked memory");
}

}  // namespace aliked::core
