// A thread on a device, for as long as it takes, and what the driver has that the runtime does not.
//
// Contract
//   * What context was current comes back, a green one or none too. The runtime's cudaSetDevice would put a primary one in its place,
//     and set back on a thread that never chose a device it would make one on device 0.
//   * Primary contexts are retained for good: what the library keeps in them may be used until the process ends.
#pragma once

#if MNNVL_AR_CUDA
#include <cuda.h>
#include <cuda_runtime_api.h>

namespace mnnvl_ar::launch {

// Null: the driver has none of that version.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(entry) : nullptr;
}

// Null: the device cannot be used.
CUcontext primary_context(int device);

// While it lives, that context is this thread's.
class InContext {
 public:
  explicit InContext(CUcontext context);
  ~InContext();
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;
  bool ok() const { return pushed_; }

 private:
  bool pushed_ = false;
};

// While it lives, this thread is on that device: in the context that it has there, if it has one.
class OnDevice {
 public:
  explicit OnDevice(int device) : there_(is_on(device)), context_(there_ ? nullptr : primary_context(device)) {}
  bool ok() const { return there_ || context_.ok(); }

 private:
  static bool is_on(int device);

  const bool there_;
  const InContext context_;
};

}  // namespace mnnvl_ar::launch
#endif
