// Copies between the host and any rank's block, mapped as it is here. For diagnosis; no call uses it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>

#include "protocol/params.h"

#if MNNVL_AR_CUDA
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace mnnvl_ar::diagnosis {

#if MNNVL_AR_CUDA
// A device's context, and a stream in it for copies, which waits for nothing. Never destroyed: the driver may be gone before us
// at exit.
struct Copier {
  CUcontext context = nullptr;
  cudaStream_t stream = nullptr;
};

template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(entry) : nullptr;
}

// Of the current device the first time, as create() calls it; then of any thread.
inline Copier copier(int64_t device) {
  static std::mutex mutex;
  static auto& known = *new std::map<int64_t, Copier>;
  const std::lock_guard<std::mutex> lock(mutex);
  Copier& made = known[device];
  if (made.stream == nullptr) {
    const auto current = driver_function<CUresult (*)(CUcontext*)>("cuCtxGetCurrent", 4000);
    if (cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking) != cudaSuccess) made.stream = nullptr;
    if (current == nullptr || current(&made.context) != CUDA_SUCCESS) made.stream = nullptr;
  }
  return made;
}

// While it lives, this thread is on the device, and may use it although another thread captures. Contexts are pushed and popped:
// setting the device back on a thread that was on none would make a context on device 0.
class BesideCaptures {
 public:
  explicit BesideCaptures(int64_t device) : copier_(copier(device)) {
    static const auto push = driver_function<CUresult (*)(CUcontext)>("cuCtxPushCurrent", 4000);
    pushed_ = copier_.stream != nullptr && push != nullptr && push(copier_.context) == CUDA_SUCCESS;
    if (pushed_) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~BesideCaptures() {
    static const auto pop = driver_function<CUresult (*)(CUcontext*)>("cuCtxPopCurrent", 4000);
    if (!pushed_) return;
    cudaThreadExchangeStreamCaptureMode(&mode_);
    CUcontext popped = nullptr;
    if (pop != nullptr) pop(&popped);
  }
  // Null: the device cannot be used.
  cudaStream_t stream() const { return pushed_ ? copier_.stream : nullptr; }

 private:
  const Copier copier_;
  bool pushed_ = false;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};
#endif

// A group's blocks as they are mapped here, and where.
struct Blocks {
  const protocol::Params& params;
  uint64_t slot_vectors;
  int64_t device;  // CUDA device index, or -1: host
};

class BlockReader {
 public:
  explicit BlockReader(const Blocks& blocks) : blocks_(blocks) {}

  // False: that memory cannot be read (in time), and `to` is undefined.
  bool read(uint32_t rank, uint64_t offset, void* to, uint64_t bytes) const {
    return copy(to, block_of(rank) + offset, bytes, true);
  }
  bool write(uint32_t rank, uint64_t offset, const void* from, uint64_t bytes) const {
    return copy(block_of(rank) + offset, from, bytes, false);
  }

 private:
  uint8_t* block_of(uint32_t rank) const { return blocks_.params.group.block_of(rank); }

  bool copy(void* to, const void* from, uint64_t bytes, [[maybe_unused]] bool is_read) const {
    if (blocks_.device < 0) {
      std::memcpy(to, from, bytes);
      return true;
    }
#if MNNVL_AR_CUDA
    const BesideCaptures guard(blocks_.device);
    const cudaStream_t stream = guard.stream();
    if (stream == nullptr) return false;
    const auto kind = is_read ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    if (cudaMemcpyAsync(to, from, bytes, kind, stream) != cudaSuccess) return false;
    return cudaStreamSynchronize(stream) == cudaSuccess;
#else
    return false;
#endif
  }

  const Blocks& blocks_;
};

}  // namespace mnnvl_ar::diagnosis
