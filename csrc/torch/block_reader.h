// Copies between the host and any rank's block, mapped as it is here. For diagnosis; no call uses it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>

#include "torch/workspace.h"

#if MNNVL_AR_CUDA
#include <cuda_runtime_api.h>
#endif

namespace mnnvl_ar {

#if MNNVL_AR_CUDA
// While it lives, this thread may use the device although another one captures.
class BesideCaptures {
 public:
  explicit BesideCaptures(int64_t device) {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(static_cast<int>(device));
  }
  ~BesideCaptures() {
    cudaSetDevice(before_);
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  int before_ = 0;
};

// A device's stream for copies, which waits for nothing. Never destroyed: the driver may be gone before us at exit.
inline cudaStream_t copy_stream(int64_t device) {
  static std::mutex mutex;
  static std::map<int64_t, cudaStream_t> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = streams[device];
  if (stream == nullptr && cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) stream = nullptr;
  return stream;
}
#endif

class BlockReader {
 public:
  explicit BlockReader(const Workspace& workspace) : w_(workspace) {}

  // False: that memory cannot be read (in time), and `to` is undefined.
  bool read(uint32_t rank, uint64_t offset, void* to, uint64_t bytes) const {
    return copy(to, block_of(rank) + offset, bytes, true);
  }
  bool write(uint32_t rank, uint64_t offset, const void* from, uint64_t bytes) const {
    return copy(block_of(rank) + offset, from, bytes, false);
  }
  uint8_t* block_of(uint32_t rank) const {
    const protocol::Params& p = w_.params;
    return p.peers[(rank + p.ranks - p.rank - 1) % p.ranks];
  }

 private:
  bool copy(void* to, const void* from, uint64_t bytes, [[maybe_unused]] bool is_read) const {
    if (w_.settings.device < 0) {
      std::memcpy(to, from, bytes);
      return true;
    }
#if MNNVL_AR_CUDA
    const BesideCaptures guard(w_.settings.device);
    const cudaStream_t stream = copy_stream(w_.settings.device);
    if (stream == nullptr) return false;
    const auto kind = is_read ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    if (cudaMemcpyAsync(to, from, bytes, kind, stream) != cudaSuccess) return false;
    return cudaStreamSynchronize(stream) == cudaSuccess;
#else
    return false;
#endif
  }

  const Workspace& w_;
};

}  // namespace mnnvl_ar
