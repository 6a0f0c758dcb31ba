// The part of CUDA that the backend uses, on the host: device memory is the host's, a stream runs what it was given
// when somebody waits for it, and kernels run as block.h has it. Stands in for the toolkit's header of the same name.
#pragma once

#define DRAFTWERK_CUDA_EMULATION 1

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "device_functions.h"
#include "vector_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
using cudaGraph_t = struct EmulatedGraph*;
using cudaGraphExec_t = struct EmulatedGraphExec*;
using cudaGraphNode_t = struct EmulatedGraphNode*;
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDefault = 0;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaHostAllocDefault = 0;
inline constexpr unsigned cudaMemAttachGlobal = 1;

struct cudaDeviceProp {
  char name[256];
  int major;
  int minor;
  int multiProcessorCount;
  std::size_t totalGlobalMem;
  std::size_t sharedMemPerBlockOptin;
  int l2CacheSize;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};
struct cudaKernelNodeParamsV2 {
  void* func;
  dim3 gridDim;
  dim3 blockDim;
  unsigned sharedMemBytes;
  void** kernelParams;
  void** extra;
};
enum cudaGraphNodeType { cudaGraphNodeTypeKernel = 0 };
struct cudaGraphNodeParams {
  cudaGraphNodeType type;
  cudaKernelNodeParamsV2 kernel;
};
enum cudaGraphDependencyType { cudaGraphDependencyTypeDefault = 0, cudaGraphDependencyTypeProgrammatic = 1 };
struct cudaGraphEdgeData {
  unsigned char from_port;
  unsigned char to_port;
  unsigned char type;
};
inline constexpr unsigned char cudaGraphKernelNodePortProgrammatic = 1;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
inline constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  int ptxVersion;
};

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaDeviceSynchronize();

cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset(void* to, int value, std::size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments);
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData* edges, std::size_t count, cudaGraphNodeParams* parameters);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);

namespace emulation {

using Invoke = std::function<void(void** arguments)>;
/// Lets a kernel be launched by its address; returns that.
const void* know_kernel(const void* address, std::size_t argument_bytes, Invoke invoke);

/// The address of a kernel of one argument, as launches by address take it.
template <typename Arguments>
const void* kernel_address(void (*kernel)(Arguments)) {
  return know_kernel(reinterpret_cast<const void*>(kernel), sizeof(Arguments),
                     [kernel](void** arguments) { kernel(*static_cast<Arguments*>(arguments[0])); });
}

// --- what tests set -----------------------------------------------------------------------------------------------

/// What the device has, of which allocations take; more fails. Default 1 GiB.
void set_device_memory(std::size_t bytes);
/// Bytes that are allocated now, of the device's and of pinned memory.
std::size_t allocated_bytes();
/// How often memory was allocated, of the device's and pinned.
std::int64_t allocations();
/// Launches of kernels that do not prefer shared memory to the first-level cache.
std::int64_t launches_that_prefer_cache();
/// How often somebody has waited for a stream.
std::int64_t waits();
/// Operations of all streams that nobody has waited for.
std::size_t operations_ahead();
/// What a device would have waited for, in seconds, each time that somebody had waited for a stream: until the next
/// launch was there, and until somebody waited again, which is when the host had done all its work.
struct HostTimes {
  std::vector<double> to_launch;
  std::vector<double> to_wait;
};
/// Those since the last call.
HostTimes take_host_times();
/// Kernels do nothing from now on, so that the host's caches are the host's: results stay what they were.
void skip_kernels();
/// 0: no device; otherwise what properties and the driver say.
void set_device(int count, int major, int minor, int driver_version);
/// The next allocation of pinned memory fails, and the `after`-th asynchronous copy from now on (0: the next), after
/// which the device works as before.
void fail_pinned();
void fail_copy(int after, cudaError_t error);
/// The `after`-th launch from now on (0: the next) ends the device with this error, as an illegal access would: all
/// later calls fail, until reset().
void fail_launch(int after, cudaError_t error);
/// The next graph that is to be made fails with this error, after which the device works as before.
void fail_graph(cudaError_t error);
/// The same of the next launch of a graph.
void fail_graph_launch(cudaError_t error);
/// Graphs whose kernels begin early are not supported from now on.
void refuse_early_starts();
/// Everything as at the beginning, but for what is allocated.
void reset();

}  // namespace emulation
