#if MNNVL_AR_CUDA
#include "launch/device.h"

#include <atomic>

namespace mnnvl_ar::launch {

namespace {

CUcontext retain(int device) {
  static const auto get = driver_function<CUresult (*)(CUdevice*, int)>("cuDeviceGet", 2000);
  static const auto keep = driver_function<CUresult (*)(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain", 7000);
  CUdevice number = 0;
  CUcontext context = nullptr;
  if (get == nullptr || keep == nullptr || get(&number, device) != CUDA_SUCCESS) return nullptr;
  return keep(&context, number) == CUDA_SUCCESS ? context : nullptr;
}

}  // namespace

CUcontext primary_context(int device) {
  constexpr int kRemembered = 64;
  static std::atomic<CUcontext> contexts[kRemembered];
  if (device < 0 || device >= kRemembered) return nullptr;
  CUcontext context = contexts[device].load(std::memory_order_acquire);
  if (context == nullptr) {
    context = retain(device);
    contexts[device].store(context, std::memory_order_release);
  }
  return context;
}

InContext::InContext(CUcontext context) {
  static const auto push = driver_function<CUresult (*)(CUcontext)>("cuCtxPushCurrent", 4000);
  pushed_ = context != nullptr && push != nullptr && push(context) == CUDA_SUCCESS;
}

InContext::~InContext() {
  static const auto pop = driver_function<CUresult (*)(CUcontext*)>("cuCtxPopCurrent", 4000);
  CUcontext popped = nullptr;
  if (pushed_ && pop != nullptr) pop(&popped);
}

// By the driver: the runtime says device 0 of a thread that has no context.
bool OnDevice::is_on(int device) {
  static const auto current = driver_function<CUresult (*)(CUcontext*)>("cuCtxGetCurrent", 4000);
  static const auto device_of = driver_function<CUresult (*)(CUdevice*)>("cuCtxGetDevice", 2000);
  CUcontext context = nullptr;
  CUdevice here = -1;
  if (current == nullptr || device_of == nullptr || current(&context) != CUDA_SUCCESS || context == nullptr)
    return false;
  return device_of(&here) == CUDA_SUCCESS && here == device;
}

}  // namespace mnnvl_ar::launch
#endif
