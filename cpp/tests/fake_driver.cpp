// A CUDA driver for machines without a GPU: memory is the host's, streams do at once what they are
// told, a captured graph is a list of what to do, and kernels are the CUDA sources compiled for the
// CPU (tests/helpers/cuda_on_host.hpp), each when it is first loaded.
//
// The environment says what it pretends to be:
//   FAKE_DEVICES     number of GPUs (1)         FAKE_CAPABILITY  compute capability (90)
//   FAKE_MEMORY      bytes of device memory     FAKE_DRIVER      version (13000)
//   FAKE_KERNELS=0   launches do nothing: for checking the host's code with sanitizers
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}

using Work = std::function<void()>;

struct FakeGraph {
  std::vector<Work> work;
};

struct FakeStream {
  std::shared_ptr<FakeGraph> captured;  // while it captures
  std::set<FakeStream *> joined;        // streams whose work is in the capture and not yet awaited
};

struct FakeEvent {
  std::shared_ptr<FakeGraph> captured;
  FakeStream *stream = nullptr;
};

struct FakeModule {
  void *library = nullptr;
  int cluster = 1;
};

struct FakeFunction {
  FakeModule *module;
  std::string name;
  void *address;
};

std::mutex mutex;
std::map<uintptr_t, size_t> device_memory, page_locked;
size_t device_bytes = 0;
std::atomic<long> live_objects{0};
thread_local std::vector<CUcontext> contexts;

// Queue work on a stream: now, or into the graph that it captures.
CUresult queue(CUstream stream, Work work) {
  FakeStream *s = (FakeStream *)stream;
  if (s && s->captured) s->captured->work.push_back(std::move(work));
  else work();
  return CUDA_SUCCESS;
}

bool lies_in(const std::map<uintptr_t, size_t> &blocks, uintptr_t address, size_t size) {
  const std::lock_guard lock(mutex);
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return false;
  --after;
  return address + size <= after->first + after->second;
}
bool is_on_device(uintptr_t address, size_t size) { return lies_in(device_memory, address, size); }
bool device_writes_to(uintptr_t address, size_t size) {
  return is_on_device(address, size) || lies_in(page_locked, address, size);
}

CUresult copy(CUstream stream, uintptr_t to, uintptr_t from, size_t size, bool to_device,
              bool from_device) {
  if ((to_device && !is_on_device(to, size)) || (from_device && !is_on_device(from, size)))
    return CUDA_ERROR_INVALID_VALUE;
  return queue(stream, [=] { memcpy((void *)to, (const void *)from, size); });
}

}  // namespace

// For the tests: what was created and not destroyed.
EXPORT long fake_live_objects() { return live_objects; }
EXPORT size_t fake_device_bytes() { return device_bytes; }

EXPORT CUresult cuInit(unsigned) {
  return setting("FAKE_DEVICES", 1) ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = int(setting("FAKE_DRIVER", 13000));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult, const char **name) {
  *name = "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult result, const char **sentence) {
  *sentence = result == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "fake error";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int *count) {
  *count = int(setting("FAKE_DEVICES", 1));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice) {
  snprintf(name, size_t(size), "a CPU that plays a GPU");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
  const int capability = int(setting("FAKE_CAPABILITY", 90));
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
                                                                       : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
  ++live_objects;
  *context = (CUcontext)&live_objects;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice) {
  --live_objects;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent(CUcontext *context) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

// An image is four lines: a library, the command that makes it, the size of clusters, the lowest
// compute capability that has it.
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  std::istringstream lines((const char *)image);
  std::string library, command, cluster, lowest;
  std::getline(lines, library), std::getline(lines, command), std::getline(lines, cluster);
  std::getline(lines, lowest);
  if (setting("FAKE_CAPABILITY", 90) < atol(lowest.c_str())) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  auto loaded = std::make_unique<FakeModule>();
  loaded->cluster = atoi(cluster.c_str());
  if (setting("FAKE_KERNELS", 1)) {
    const std::lock_guard lock(mutex);
    if (FILE *existing = fopen(library.c_str(), "r")) fclose(existing);
    else if (system(command.c_str()) != 0) return CUDA_ERROR_INVALID_IMAGE;
    loaded->library = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!loaded->library) return CUDA_ERROR_INVALID_IMAGE;
  }
  ++live_objects;
  *module = (CUmodule)loaded.release();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
  --live_objects;
  delete (FakeModule *)module;  // the library stays, as its functions may be in a graph
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static std::vector<std::unique_ptr<FakeFunction>> functions;
  FakeModule *m = (FakeModule *)module;
  void *address = m->library ? dlsym(m->library, name) : nullptr;
  if (m->library && !address) return CUDA_ERROR_NOT_FOUND;
  const std::lock_guard lock(mutex);
  functions.push_back(std::make_unique<FakeFunction>(FakeFunction{m, name, address}));
  *function = (CUfunction)functions.back().get();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                                 void **parameters, void **) {
  const FakeFunction &f = *(const FakeFunction *)function;
  std::vector<long> arguments;
  for (; *parameters; ++parameters) arguments.push_back(*(const long *)*parameters);
  const std::vector<int> grid = {int(config->gridDimX), int(config->gridDimY),
                                 int(config->gridDimZ)};
  const std::vector<int> block = {int(config->blockDimX), int(config->blockDimY),
                                  int(config->blockDimZ)};
  for (int size : grid)
    if (size < 1) return CUDA_ERROR_INVALID_VALUE;
  // Only another kernel may come before one that starts early.
  FakeStream *stream = (FakeStream *)config->hStream;
  if (config->numAttrs && stream->captured && stream->captured->work.empty())
    return CUDA_ERROR_INVALID_VALUE;
  if (!f.address) return queue(config->hStream, [] {});
  const int cluster = f.module->cluster;
  const auto run = (void (*)(void *, const long *, int, const int *, const int *, int))dlsym(
      f.module->library, "launch");
  void *const kernel = f.address;
  return queue(config->hStream, [=] {
    const std::lock_guard lock(mutex);  // the CPU's kernels keep their threads in globals
    run(kernel, arguments.data(), int(arguments.size()), grid.data(), block.data(), cluster);
  });
}
EXPORT CUresult cuMemAlloc(CUdeviceptr *memory, size_t size) {
  const std::lock_guard lock(mutex);
  const size_t most = size_t(setting("FAKE_MEMORY", 1L << 40));
  if (device_bytes + size > most) return CUDA_ERROR_OUT_OF_MEMORY;
  void *allocated = aligned_alloc(256, (size + 255) / 256 * 256);
  if (!allocated) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(allocated, 0xFF, size);  // NaN: what nobody writes shows
  device_memory[uintptr_t(allocated)] = size;
  device_bytes += size, ++live_objects;
  *memory = CUdeviceptr(allocated);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemFree(CUdeviceptr memory) {
  const std::lock_guard lock(mutex);
  const auto found = device_memory.find(uintptr_t(memory));
  if (found == device_memory.end()) return CUDA_ERROR_INVALID_VALUE;
  device_bytes -= found->second, --live_objects;
  device_memory.erase(found);
  free((void *)memory);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostAlloc(void **memory, size_t size, unsigned) {
  *memory = malloc(size);
  if (!*memory) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(*memory, 0xFF, size);
  const std::lock_guard lock(mutex);
  page_locked[uintptr_t(*memory)] = size;
  ++live_objects;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemFreeHost(void *memory) {
  const std::lock_guard lock(mutex);
  if (!page_locked.erase(uintptr_t(memory))) return CUDA_ERROR_INVALID_VALUE;
  --live_objects;
  free(memory);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetDevicePointer(CUdeviceptr *device, void *memory, unsigned) {
  *device = CUdeviceptr(memory);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  if (!device_writes_to(uintptr_t(to), size) || !device_writes_to(uintptr_t(from), size))
    return CUDA_ERROR_INVALID_VALUE;
  return copy(stream, uintptr_t(to), uintptr_t(from), size, false, false);
}
EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  return copy(stream, uintptr_t(to), uintptr_t(from), size, true, false);
}
EXPORT CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  return copy(stream, uintptr_t(to), uintptr_t(from), size, false, true);
}
EXPORT CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  return copy(stream, uintptr_t(to), uintptr_t(from), size, true, true);
}
EXPORT CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D *c, CUstream stream) {
  const bool from_device = c->srcMemoryType == CU_MEMORYTYPE_DEVICE;
  const uintptr_t from = from_device ? uintptr_t(c->srcDevice) : uintptr_t(c->srcHost);
  if (c->dstMemoryType != CU_MEMORYTYPE_DEVICE || c->srcPitch < c->WidthInBytes)
    return CUDA_ERROR_INVALID_VALUE;
  for (size_t row = 0; row < c->Height; ++row) {
    const CUresult result = copy(stream, uintptr_t(c->dstDevice) + row * c->dstPitch,
                                 from + row * c->srcPitch, c->WidthInBytes, true, from_device);
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
  if (!device_writes_to(uintptr_t(to), size)) return CUDA_ERROR_INVALID_VALUE;
  return queue(stream, [=] { memset((void *)to, value, size); });
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  if (!device_writes_to(uintptr_t(to), 4 * count)) return CUDA_ERROR_INVALID_VALUE;
  return queue(stream, [=] { std::fill_n((unsigned *)to, count, value); });
}
EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned) {
  ++live_objects;
  *stream = (CUstream) new FakeStream;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamDestroy(CUstream stream) {
  --live_objects;
  delete (FakeStream *)stream;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  return ((FakeStream *)stream)->captured ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  FakeStream *s = (FakeStream *)stream;
  FakeEvent *e = (FakeEvent *)event;
  if (!e->captured) return CUDA_SUCCESS;
  if (s->captured == e->captured) {
    s->joined.erase(e->stream);
    e->stream->captured = nullptr;
  } else {  // this stream's work belongs to the capture until it is awaited there
    s->captured = e->captured;
    e->stream->joined.insert(s);
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  ((FakeStream *)stream)->captured = std::make_shared<FakeGraph>();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  FakeStream *s = (FakeStream *)stream;
  ++live_objects;
  *graph = (CUgraph) new FakeGraph(*s->captured);
  s->captured = nullptr;
  if (!s->joined.empty()) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventCreate(CUevent *event, unsigned) {
  ++live_objects;
  *event = (CUevent) new FakeEvent;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  FakeEvent *e = (FakeEvent *)event;
  e->stream = (FakeStream *)stream;
  e->captured = e->stream ? e->stream->captured : nullptr;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
EXPORT CUresult cuEventDestroy(CUevent event) {
  --live_objects;
  delete (FakeEvent *)event;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph,
                                            unsigned long long) {
  ++live_objects;
  *executable = (CUgraphExec) new FakeGraph(*(FakeGraph *)graph);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  for (const Work &work : ((FakeGraph *)graph)->work) queue(stream, work);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) {
  --live_objects;
  delete (FakeGraph *)graph;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec graph) {
  --live_objects;
  delete (FakeGraph *)graph;
  return CUDA_SUCCESS;
}
