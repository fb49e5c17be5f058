// Words of memory that several processes share.
#pragma once

#include <atomic>
#include <cstdint>

#include "protocol/sentinel.h"

namespace mnnvl_ar::host {

using protocol::Vector;

static_assert(std::atomic_ref<uint64_t>::is_always_lock_free && std::atomic_ref<uint32_t>::is_always_lock_free);

inline uint32_t load_word(const void* address) {
  return std::atomic_ref<uint32_t>(*static_cast<uint32_t*>(const_cast<void*>(address))).load(std::memory_order_acquire);
}

inline void store_word(void* address, uint32_t value) {
  std::atomic_ref<uint32_t>(*static_cast<uint32_t*>(address)).store(value, std::memory_order_release);
}

inline void store_word_if_zero(void* address, uint32_t value) {
  uint32_t zero = 0;
  std::atomic_ref<uint32_t>(*static_cast<uint32_t*>(address)).compare_exchange_strong(zero, value);
}

inline Vector load_vector(const uint8_t* address) {
  auto* half = reinterpret_cast<uint64_t*>(const_cast<uint8_t*>(address));
  const uint64_t low = std::atomic_ref<uint64_t>(half[0]).load(std::memory_order_acquire);
  const uint64_t high = std::atomic_ref<uint64_t>(half[1]).load(std::memory_order_acquire);
  return Vector{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                 static_cast<uint32_t>(high >> 32)}};
}

inline void store_vector(uint8_t* address, const Vector& v) {
  auto* half = reinterpret_cast<uint64_t*>(address);
  std::atomic_ref<uint64_t>(half[0]).store(v.word[0] | uint64_t{v.word[1]} << 32, std::memory_order_release);
  std::atomic_ref<uint64_t>(half[1]).store(v.word[2] | uint64_t{v.word[3]} << 32, std::memory_order_release);
}

}  // namespace mnnvl_ar::host
