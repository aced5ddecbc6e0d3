// The CUDA driver, loaded by name, and owners of what it gives out.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <string>
#include <utility>

#include "error.h"

namespace aliked::core {

// Functions as cuda.h declares them; its macros give their current versions (cuMemAlloc_v2).
#define ALIKED_DRIVER_FUNCTIONS(F)                                                                \
  F(cuInit) F(cuDriverGetVersion) F(cuGetErrorName) F(cuGetErrorString)                           \
  F(cuDeviceGet) F(cuDeviceGetCount) F(cuDeviceGetName) F(cuDeviceGetAttribute)                   \
  F(cuDevicePrimaryCtxRetain) F(cuDevicePrimaryCtxRelease) F(cuCtxPushCurrent)                    \
  F(cuCtxPopCurrent) F(cuModuleLoadData) F(cuModuleUnload) F(cuModuleGetFunction)                 \
  F(cuMemAlloc) F(cuMemFree) F(cuMemHostAlloc) F(cuMemFreeHost) F(cuMemHostGetDevicePointer)      \
  F(cuMemcpyAsync) F(cuMemcpyHtoDAsync) F(cuMemcpyDtoHAsync) F(cuMemcpyDtoDAsync)                 \
  F(cuMemcpy2DAsync) F(cuMemsetD8Async) F(cuMemsetD32Async)                                       \
  F(cuStreamCreate) F(cuStreamDestroy) F(cuStreamSynchronize)                                     \
  F(cuStreamWaitEvent) F(cuStreamBeginCapture) F(cuStreamEndCapture)                              \
  F(cuEventCreate) F(cuEventRecord) F(cuEventSynchronize) F(cuEventDestroy)                       \
  F(cuGraphInstantiateWithFlags)                                                                  \
  F(cuGraphLaunch) F(cuGraphDestroy) F(cuGraphExecDestroy) F(cuLaunchKernelEx)

struct Driver {
#define ALIKED_MEMBER(name) decltype(&::name) name = nullptr;
  ALIKED_DRIVER_FUNCTIONS(ALIKED_MEMBER)
#undef ALIKED_MEMBER
  int version = 0;  // 12030 for CUDA 12.3
};

// Loads libcuda.so.1 on the first call; throws ALIKED_NO_DRIVER where it cannot.
const Driver &driver();

// Throws what a call returned, unless it succeeded; `doing` says what for: "launch block1".
void check(CUresult result, const std::string &doing);

// The primary context of a GPU, which CUDA's run-time library and PyTorch use too.
class Device {
 public:
  explicit Device(int number);
  ~Device();
  Device(const Device &) = delete;
  Device &operator=(const Device &) = delete;

  int number() const { return number_; }
  int capability() const { return capability_; }  // 90 for 9.0
  const std::string &name() const { return name_; }
  CUcontext context() const { return context_; }
  int attribute(CUdevice_attribute attribute) const;

 private:
  int number_, capability_ = 0;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::string name_;
};

// Makes a device's context current, and the caller's again at the end.
class Current {
 public:
  explicit Current(const Device &device);
  ~Current();
  Current(const Current &) = delete;
  Current &operator=(const Current &) = delete;
};

// Owns a handle: `Release` frees it, in the context that is then current.
template <typename Handle, void (*Release)(Handle)> class Owner {
 public:
  Owner() = default;
  explicit Owner(Handle handle) : handle_(handle) {}
  Owner(Owner &&other) noexcept : handle_(std::exchange(other.handle_, Handle())) {}
  Owner &operator=(Owner &&other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owner() {
    if (handle_) Release(handle_);
  }
  Handle get() const { return handle_; }
  explicit operator bool() const { return bool(handle_); }

 private:
  Handle handle_ = Handle();
};

inline void release(CUdeviceptr memory) { driver().cuMemFree(memory); }
inline void release(void *memory) { driver().cuMemFreeHost(memory); }
inline void release(CUstream stream) { driver().cuStreamDestroy(stream); }
inline void release(CUevent event) { driver().cuEventDestroy(event); }
inline void release(CUmodule module) { driver().cuModuleUnload(module); }
inline void release(CUgraph graph) { driver().cuGraphDestroy(graph); }
inline void release(CUgraphExec graph) { driver().cuGraphExecDestroy(graph); }

using Stream = Owner<CUstream, release>;
using Event = Owner<CUevent, release>;
using Module = Owner<CUmodule, release>;
using Graph = Owner<CUgraph, release>;
using GraphExec = Owner<CUgraphExec, release>;

Stream make_stream();
Event make_event();

// Device memory. Throws ALIKED_OUT_OF_MEMORY with `what_for`.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(size_t size, const char *what_for);
  CUdeviceptr get() const { return memory_.get(); }
  size_t size() const { return size_; }

 private:
  Owner<CUdeviceptr, release> memory_;
  size_t size_ = 0;
};

// Page-locked host memory that the device can read and write.
class HostMemory {
 public:
  HostMemory() = default;
  HostMemory(size_t size, const char *what_for);
  unsigned char *get() const { return (unsigned char *)memory_.get(); }
  CUdeviceptr on_device() const { return on_device_; }
  size_t size() const { return size_; }

 private:
  Owner<void *, release> memory_;
  CUdeviceptr on_device_ = 0;
  size_t size_ = 0;
};

}  // namespace aliked::core
