// The CUDA runtime around the kernels: devices, the current device, launch errors.
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_ops.h"

#ifdef PROTOKEN_EMULATE
#include "cuda_emulation.h"
#endif

namespace protoken::cuda {

constexpr int kSharedByRight = 48 << 10;  // dynamic shared memory of a kernel that was not allowed more

#ifdef PROTOKEN_EMULATE

// Few processors: every block gets several units. 0 is of compute capability 9.0, 1 of 8.0 and 2 of 8.6.
Device device_of(int index) {
  constexpr int kCapability[3][2] = {{9, 0}, {8, 0}, {8, 6}}, kShared[3] = {227 << 10, 163 << 10, 99 << 10};
  return {index, kCapability[index][0], kCapability[index][1], 3, kShared[index]};
}
Versions versions() { return {0, 0}; }
Current::Current(int) : before_(0) {}
Current::~Current() {}
void check_launch(const char*) {}
static void check(cudaError_t, const char*) {}

#else

static void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next launch would be told of it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

Device device_of(int index) {
  static std::mutex mutex;
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> guard(mutex);
  for (const Device& device : known)
    if (device.index == index) return device;
  Device device{index, 0, 0, 0, 0};
  check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
  check(cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index), "compute capability");
  check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index), "multiprocessor count");
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "shared memory");
  known.push_back(device);
  return device;
}

Versions versions() {
  Versions found{0, 0};
  check(cudaDriverGetVersion(&found.driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&found.runtime), "cudaRuntimeGetVersion");
  return found;
}

Current::Current(int index) : before_(-1) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != index) {
    check(cudaSetDevice(index), "cudaSetDevice");
    before_ = current;
  }
}
Current::~Current() {
  if (before_ >= 0) static_cast<void>(cudaSetDevice(before_));  // a destructor has nobody to tell
}

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

#endif

void allow_shared(const void* kernel, int bytes, const Device& device) {
  if (bytes <= kSharedByRight) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> guard(mutex);
  int& before = allowed[{kernel, device.index}];
  if (bytes <= before) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  before = bytes;
}

}  // namespace protoken::cuda
