// The floating-point mode of a call: IEEE, rounding to nearest, subnormals kept, whatever the caller has set (as
// torch.set_flush_denormal does). Bits must not depend on it, least of all on one rank alone.
#pragma once

#include <cstdint>

namespace mnnvl_ar::host {

// From here to the end of the scope. What it guards has to be a call that is not inlined: compilers do not know that arithmetic
// depends on the mode.
class FloatMode {
 public:
  explicit FloatMode(bool is_set) : is_set_(is_set), before_(get()) {
    if (is_set_) set(kIeee);
  }
  ~FloatMode() {
    if (is_set_) set(before_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kIeee = 0x1f80;  // of MXCSR: all exceptions masked, nothing else
  static uint64_t get() { return __builtin_ia32_stmxcsr(); }
  static void set(uint64_t mode) { __builtin_ia32_ldmxcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kIeee = 0;  // of FPCR
  static uint64_t get() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
#error "this processor's floating-point mode is not known"
#endif

  const bool is_set_;
  const uint64_t before_;
};

}  // namespace mnnvl_ar::host
