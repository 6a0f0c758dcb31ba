#include <cuda_runtime.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// A stream keeps what it was given until somebody waits, so that whoever changes memory too early is found out.
struct EmulatedStream {
  std::deque<std::function<void()>> waiting;
};
struct EmulatedEvent {
  EmulatedStream* stream = nullptr;  ///< where it was recorded; null once the stream got there
};
struct EmulatedGraphNode {};
struct EmulatedGraph {
  std::vector<emulation::Launch> launches;
  std::vector<std::unique_ptr<EmulatedGraphNode>> handles;
};
struct EmulatedGraphExec {
  std::vector<emulation::Launch> launches;
};

namespace {

constexpr std::size_t kAlignment = 4096;

struct Kernel {
  std::size_t argument_bytes = 0;
  emulation::Invoke invoke;
  std::size_t most_shared = std::size_t{48} << 10;
  bool prefers_shared = false;
};

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Runtime {
  std::recursive_mutex mutex;
  std::map<const void*, Kernel> kernels;
  std::map<void*, std::size_t> device;
  std::map<void*, std::size_t> pinned;
  std::size_t device_bytes = 0;
  std::int64_t allocations = 0;
  std::int64_t prefer_cache = 0;
  std::size_t device_limit = std::size_t{1} << 30;
  std::vector<EmulatedStream*> streams;
  EmulatedStream default_stream;
  std::int64_t waits = 0;
  std::optional<Clock::time_point> waited;  ///< until when somebody did, and nothing was launched since
  Clock::time_point idle_from;
  emulation::HostTimes host;
  int devices = 1;
  int major = 9;
  int minor = 0;
  int driver = 13000;
  bool skip_kernels = false;
  bool fail_pinned = false;
  int copies_until_failure = -1;
  cudaError_t fail_copy = cudaSuccess;
  int fail_after = -1;
  cudaError_t fail_with = cudaSuccess;
  cudaError_t fail_graph = cudaSuccess;
  cudaError_t fail_graph_launch = cudaSuccess;
  bool refuse_early = false;
  cudaError_t dead = cudaSuccess;  ///< the error that ended the device
  cudaError_t last = cudaSuccess;
};

Runtime& runtime() {
  static Runtime one;
  return one;
}

cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) runtime().last = error;
  return error;
}

EmulatedStream& of(cudaStream_t stream) { return stream == nullptr ? runtime().default_stream : *stream; }

cudaError_t drain(EmulatedStream& stream) {
  while (!stream.waiting.empty()) {
    const std::function<void()> next = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    if (runtime().dead == cudaSuccess) next();
  }
  return told(runtime().dead);
}

cudaError_t drain_all() {
  for (EmulatedStream* stream : runtime().streams) drain(*stream);
  return drain(runtime().default_stream);
}

cudaError_t enqueue(cudaStream_t stream, std::function<void()> operation) {
  if (runtime().dead != cudaSuccess) return told(runtime().dead);
  of(stream).waiting.push_back(std::move(operation));
  return cudaSuccess;
}

/// The same of launches.
cudaError_t enqueue_launch(cudaStream_t stream, std::function<void()> operation) {
  if (runtime().waited) runtime().host.to_launch.push_back(seconds_since(*std::exchange(runtime().waited, {})));
  return enqueue(stream, std::move(operation));
}

bool is_pinned_or_device(const void* pointer) {
  for (const auto* map : {&runtime().device, &runtime().pinned}) {
    auto at = map->upper_bound(const_cast<void*>(pointer));
    if (at == map->begin()) continue;
    --at;
    if (static_cast<const char*>(pointer) < static_cast<const char*>(at->first) + at->second) return true;
  }
  return false;
}

/// Whether an address lies in what is in use of this thread's stack, which no GPU can read.
bool is_on_the_stack(std::uintptr_t address) {
  thread_local const std::uintptr_t kEnd = [] {
    pthread_attr_t attributes;
    void* begin = nullptr;
    std::size_t bytes = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
    return reinterpret_cast<std::uintptr_t>(begin) + bytes;
  }();
  return address >= reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0)) && address < kEnd;
}

/// Whether one of the words of a kernel's argument is such an address.
bool holds_the_stack(const void* argument, std::size_t bytes) {
  std::vector<std::uintptr_t> words(bytes / sizeof(std::uintptr_t) + 1);
  std::memcpy(words.data(), argument, bytes);
  return std::ranges::any_of(words, is_on_the_stack);
}

/// A launch, with a copy of its argument.
emulation::Launch launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, const void* argument) {
  const Kernel& known = runtime().kernels.at(kernel);
  std::vector<std::max_align_t> copy(known.argument_bytes / sizeof(std::max_align_t) + 1);
  std::memcpy(copy.data(), argument, known.argument_bytes);
  const auto body = [&known, copy = std::move(copy)]() mutable {
    void* arguments[] = {copy.data()};
    known.invoke(arguments);
  };
  return {grid, block, shared, body};
}

/// Runs launches up to the one that is to fail.
void run_all(std::span<const emulation::Launch> launches) {
  Runtime& r = runtime();
  if (r.skip_kernels) return;
  const auto after = static_cast<std::size_t>(r.fail_after);
  if (r.fail_after >= 0 && after < launches.size()) {
    emulation::run(launches.first(after));
    r.fail_after = -1;
    r.dead = r.fail_with;
    return;
  }
  if (r.fail_after >= 0) r.fail_after -= static_cast<int>(launches.size());
  emulation::run(launches);
}

cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, const void* argument) {
  const auto found = runtime().kernels.find(kernel);
  const bool fits = found != runtime().kernels.end() && shared <= found->second.most_shared && grid.x > 0 &&
                    grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536 &&
                    block.x * block.y * block.z <= emulation::kMaxThreads &&
                    !holds_the_stack(argument, found->second.argument_bytes);
  if (fits && !found->second.prefers_shared) ++runtime().prefer_cache;
  return told(fits ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t allocate(void** pointer, std::size_t bytes, std::map<void*, std::size_t>& known) {
  ++runtime().allocations;
  // Each by itself and of exactly this size, so that a sanitizer sees what goes beyond it.
  if (posix_memalign(pointer, kAlignment, bytes) != 0) return told(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xFF, bytes);  // NaN: what was never written must not be read
  known[*pointer] = bytes;
  return cudaSuccess;
}

using Lock = std::lock_guard<std::recursive_mutex>;

}  // namespace

// --- device -------------------------------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaGetLastError() { return std::exchange(runtime().last, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = runtime().devices;
  if (runtime().driver < 13000) return told(cudaErrorInsufficientDriver);
  return told(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
  return told(device >= 0 && device < runtime().devices ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulated");
  properties->major = runtime().major;
  properties->minor = runtime().minor;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = runtime().device_limit;
  properties->sharedMemPerBlockOptin = std::size_t{227} << 10;
  properties->l2CacheSize = 1 << 20;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime().driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const Lock lock(runtime().mutex);
  *total = runtime().device_limit;
  *free = *total - std::min(*total, runtime().device_bytes);
  return told(runtime().dead);
}
cudaError_t cudaDeviceSynchronize() {
  const Lock lock(runtime().mutex);
  return drain_all();
}

// --- memory -------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  const Lock lock(runtime().mutex);
  if (runtime().dead != cudaSuccess) return told(runtime().dead);
  if (bytes > runtime().device_limit - std::min(runtime().device_limit, runtime().device_bytes)) {
    return told(cudaErrorMemoryAllocation);
  }
  const cudaError_t error = allocate(pointer, bytes, runtime().device);
  if (error == cudaSuccess) runtime().device_bytes += bytes;
  return error;
}
cudaError_t cudaFree(void* pointer) {
  const Lock lock(runtime().mutex);
  if (pointer == nullptr) return cudaSuccess;
  drain_all();
  const auto found = runtime().device.find(pointer);
  if (found == runtime().device.end()) return told(cudaErrorInvalidValue);
  runtime().device_bytes -= found->second;
  runtime().device.erase(found);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  const Lock lock(runtime().mutex);
  if (runtime().dead != cudaSuccess) return told(runtime().dead);
  if (std::exchange(runtime().fail_pinned, false)) return told(cudaErrorMemoryAllocation);
  return allocate(pointer, bytes, runtime().pinned);
}
cudaError_t cudaFreeHost(void* pointer) {
  const Lock lock(runtime().mutex);
  if (pointer == nullptr) return cudaSuccess;
  drain_all();
  if (runtime().pinned.erase(pointer) == 0) return told(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return error != cudaSuccess ? error : drain(runtime().default_stream);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  if (runtime().copies_until_failure >= 0 && runtime().copies_until_failure-- == 0) return told(runtime().fail_copy);
  if (is_pinned_or_device(from)) {
    return enqueue(stream, [=] { std::memmove(to, from, bytes); });
  }
  // Memory that is not pinned is read before the call returns.
  const auto* first = static_cast<const std::byte*>(from);
  return enqueue(stream, [to, copy = std::vector<std::byte>(first, first + bytes)] {
    if (!copy.empty()) std::memcpy(to, copy.data(), copy.size());
  });
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = cudaMemsetAsync(to, value, bytes, nullptr);
  return error != cudaSuccess ? error : drain(runtime().default_stream);
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  return enqueue(stream, [=] { std::memset(to, value, bytes); });
}

// --- streams and events -------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(runtime().mutex);
  runtime().streams.push_back(*stream = new EmulatedStream);
  return told(runtime().dead);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  drain(*stream);
  std::erase(runtime().streams, stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  Runtime& r = runtime();
  ++r.waits;
  if (r.idle_from != Clock::time_point()) r.host.to_wait.push_back(seconds_since(r.idle_from));
  const cudaError_t error = drain(of(stream));
  r.waited = r.idle_from = Clock::now();
  return error;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(runtime().mutex);
  return enqueue(stream, [event] { cudaEventSynchronize(event); });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent;
  return told(runtime().dead);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  event->stream = &of(stream);
  return enqueue(stream, [event] { event->stream = nullptr; });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  while (event->stream != nullptr && !event->stream->waiting.empty()) {
    const std::function<void()> next = std::move(event->stream->waiting.front());
    event->stream->waiting.pop_front();
    next();
  }
  return told(runtime().dead);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0F;  // time means nothing here
  return told(runtime().dead);
}

// --- kernels and graphs -------------------------------------------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const Lock lock(runtime().mutex);
  const auto found = runtime().kernels.find(kernel);
  if (found == runtime().kernels.end() || value > (227 << 10)) return told(cudaErrorInvalidValue);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    found->second.prefers_shared = value == cudaSharedmemCarveoutMaxShared;
    return cudaSuccess;
  }
  found->second.most_shared = static_cast<std::size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const Lock lock(runtime().mutex);
  const cudaError_t error =
      check_launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, arguments[0]);
  if (error != cudaSuccess) return error;
  return enqueue_launch(config->stream,
                        [launch = launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                         arguments[0])] { run_all({&launch, 1}); });
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const Lock lock(runtime().mutex);
  *attributes = {.ptxVersion = runtime().major * 10 + runtime().minor};
  return told(runtime().kernels.contains(kernel) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = new EmulatedGraph;
  return told(runtime().dead);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*,
                             const cudaGraphEdgeData* edge, std::size_t count, cudaGraphNodeParams* parameters) {
  const Lock lock(runtime().mutex);
  const cudaKernelNodeParamsV2& p = parameters->kernel;
  const cudaError_t error = check_launch(p.func, p.gridDim, p.blockDim, p.sharedMemBytes, p.kernelParams[0]);
  const bool chained = count == (graph->launches.empty() ? 0 : 1) && parameters->type == cudaGraphNodeTypeKernel;
  if (error != cudaSuccess || !chained) return told(cudaErrorInvalidValue);
  graph->launches.push_back(launch(p.func, p.gridDim, p.blockDim, p.sharedMemBytes, p.kernelParams[0]));
  const bool programmatic = count == 1 && edge != nullptr && edge->type == cudaGraphDependencyTypeProgrammatic;
  if (programmatic && (edge->from_port != cudaGraphKernelNodePortProgrammatic || runtime().major < 9)) {
    return told(cudaErrorInvalidValue);
  }
  if (programmatic && runtime().refuse_early) return told(cudaErrorNotSupported);
  graph->launches.back().early = programmatic;
  graph->handles.push_back(std::make_unique<EmulatedGraphNode>());
  *node = graph->handles.back().get();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  const cudaError_t error = std::exchange(runtime().fail_graph, cudaSuccess);
  if (error != cudaSuccess) return told(error);
  *executable = new EmulatedGraphExec{graph->launches};
  return told(runtime().dead);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const Lock lock(runtime().mutex);
  drain_all();
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = std::exchange(runtime().fail_graph_launch, cudaSuccess);
  if (error != cudaSuccess) return told(error);
  return enqueue_launch(stream, [executable] { run_all(executable->launches); });
}

// --- what tests set -----------------------------------------------------------------------------------------------

namespace emulation {

const void* know_kernel(const void* address, std::size_t argument_bytes, Invoke invoke) {
  const Lock lock(runtime().mutex);
  Kernel& kernel = runtime().kernels[address];
  kernel.argument_bytes = argument_bytes;
  kernel.invoke = std::move(invoke);
  return address;
}

void set_device_memory(std::size_t bytes) { runtime().device_limit = bytes; }

std::int64_t waits() {
  const Lock lock(runtime().mutex);
  return runtime().waits;
}

std::size_t operations_ahead() {
  const Lock lock(runtime().mutex);
  std::size_t count = runtime().default_stream.waiting.size();
  for (const EmulatedStream* stream : runtime().streams) count += stream->waiting.size();
  return count;
}

HostTimes take_host_times() {
  const Lock lock(runtime().mutex);
  return std::exchange(runtime().host, {});
}

std::size_t allocated_bytes() {
  const Lock lock(runtime().mutex);
  std::size_t bytes = runtime().device_bytes;
  for (const auto& [pointer, size] : runtime().pinned) bytes += size;
  return bytes;
}

std::int64_t allocations() {
  const Lock lock(runtime().mutex);
  return runtime().allocations;
}

std::int64_t launches_that_prefer_cache() {
  const Lock lock(runtime().mutex);
  return runtime().prefer_cache;
}

void set_device(int count, int major, int minor, int driver_version) {
  runtime().devices = count;
  runtime().major = major;
  runtime().minor = minor;
  runtime().driver = driver_version;
}

void skip_kernels() { runtime().skip_kernels = true; }

void fail_pinned() { runtime().fail_pinned = true; }
void fail_copy(int after, cudaError_t error) {
  runtime().copies_until_failure = after;
  runtime().fail_copy = error;
}

void fail_launch(int after, cudaError_t error) {
  runtime().fail_after = after;
  runtime().fail_with = error;
}

void fail_graph(cudaError_t error) { runtime().fail_graph = error; }
void fail_graph_launch(cudaError_t error) { runtime().fail_graph_launch = error; }
void refuse_early_starts() { runtime().refuse_early = true; }

void reset() {
  const Lock lock(runtime().mutex);
  Runtime& r = runtime();
  r.device_limit = std::size_t{1} << 30;
  r.devices = 1;
  r.major = 9;
  r.minor = 0;
  r.driver = 13000;
  r.skip_kernels = false;
  r.fail_pinned = false;
  r.copies_until_failure = -1;
  r.fail_after = -1;
  r.fail_graph = r.fail_graph_launch = cudaSuccess;
  r.refuse_early = false;
  r.dead = r.last = cudaSuccess;
  set_order(Order::changing);
}

}  // namespace emulation
