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
#include "launch/device.h"
#endif

namespace mnnvl_ar::diagnosis {

#if MNNVL_AR_CUDA
// A device's primary context, and a stream in it for copies, which waits for nothing. Never destroyed: the driver may be gone
// before us at exit.
struct Copier {
  CUcontext context = nullptr;
  cudaStream_t stream = nullptr;
};

inline Copier copier(int64_t device) {
  static std::mutex mutex;
  static auto& known = *new std::map<int64_t, Copier>;
  const std::lock_guard<std::mutex> lock(mutex);
  Copier& made = known[device];
  if (made.stream == nullptr) {
    made.context = launch::primary_context(static_cast<int>(device));
    const launch::InContext in(made.context);
    if (!in.ok() || cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking) != cudaSuccess)
      made.stream = nullptr;
  }
  return made;
}

// While it lives, this thread is on the device, and may use it although another thread captures.
class BesideCaptures {
 public:
  explicit BesideCaptures(int64_t device) : copier_(copier(device)), in_(copier_.context) {
    if (in_.ok()) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~BesideCaptures() {
    if (in_.ok()) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  // Null: the device cannot be used.
  cudaStream_t stream() const { return in_.ok() ? copier_.stream : nullptr; }

 private:
  const Copier copier_;
  const launch::InContext in_;
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
