// Reductions over a row: its sum of squares (numerics step 3), or a maximum; and maxima of neighbours in it.
//
// Contract
//   * Each warp reduces its groups of 32 vectors and stores one word a group into every CTA of the cluster; then each thread reduces
//     the words of all groups, in ascending order. So all threads of the cluster get the same bits, whatever the cluster's size.
//   * Exchanges of a cluster are numbered 0, 1, ... (`turn`). Two sets of words take turns: a warp that is one exchange ahead has
//     had the words of every warp, and each of those wrote them after it had read the set of the exchange before.
//   * After exchange(turn), prepare_next(turn) before exchange(turn + 2).
//   * All warps of a CTA call join_cluster(), after init() where they do both; those that exchange wait for the others, by
//     await_cluster(), before their first exchange.
#pragma once

#include "kernels/row.cuh"
#include "protocol/numerics.h"

namespace mnnvl_ar::kernels {

template <class Tile>
struct RowReduction {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  alignas(16) float group[2][kRows][kMaxGroups];
  uint64_t mbarrier[2];

  // By one warp of each CTA, before it arrives in the cluster. Where there is a group only its warp writes.
  __device__ __forceinline__ void init(const Lane& lane) {
#pragma unroll
    for (uint32_t set = 0; set < 2 * kRows; ++set) {
#pragma unroll 1
      for (uint32_t i = lane.groups + threadIdx.x % 32; i < kMaxGroups; i += 32)
        (&group[0][0][0])[set * kMaxGroups + i] = 0.0f;
    }
    if (gridDim.x > 1 && threadIdx.x % 32 == 0) {
      for (uint32_t set : {0, 1}) {
        const uint32_t bar = ptx::shared_address(&mbarrier[set]);
        ptx::mbarrier_init(bar, 1);
        expect(lane, bar);
      }
      ptx::mbarrier_init_fence();  // for the cluster: what others touch are mbarriers, and words that only they write
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void join_cluster() {
    if (gridDim.x > 1) ptx::cluster_arrive_relaxed();
  }
  static __device__ __forceinline__ void await_cluster() {
    if (gridDim.x > 1) ptx::cluster_wait();
  }

  // Each thread's part of each row in, by rows and columns; the sums of all groups out. `here` is this object's address, kept.
  static __device__ __forceinline__ void exchange_sums(const Lane& lane, uint32_t here, uint32_t turn,
                                                       float (&sum)[Tile::kVectors]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (float& value : sum) value = protocol::add(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    uint32_t word[Tile::kVectors];
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) word[i] = protocol::as_bits(sum[i]);
    exchange(lane, here, turn, word);
  }

  // The same with the maximum of each group.
  static __device__ __forceinline__ void exchange_maxima(const Lane& lane, uint32_t here, uint32_t turn,
                                                         uint32_t (&word)[Tile::kVectors]) {
#pragma unroll
    for (uint32_t& value : word) value = __reduce_max_sync(0xffffffffu, value);
    exchange(lane, here, turn, word);
  }

  // The maximum of each block of `neighbours` vectors, a power of two up to 32, to every thread of the block. A warp holds whole
  // blocks, so nothing is exchanged with others.
  static __device__ __forceinline__ void max_in_blocks(uint32_t neighbours, uint32_t (&word)[Tile::kVectors]) {
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      if (step >= neighbours) break;
#pragma unroll
      for (uint32_t& value : word) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
  }

  static __device__ __forceinline__ void prepare_next(const Lane& lane, uint32_t here, uint32_t turn) {
    if (!Tile::kOnce && gridDim.x > 1 && threadIdx.x == 0) expect(lane, here + mbarrier_offset(turn));
  }

  // Each row's sum, after exchange_sums().
  static __device__ __forceinline__ void add_up(const Lane& lane, uint32_t here, uint32_t turn, float (&sum)[kRows]) {
    const uint32_t groups = here + set_offset(turn);
    float part[kRows][protocol::kSums] = {};
#pragma unroll 1
    for (uint32_t first = 0; first < lane.groups; first += kAtOnce) {
      if (kRows > 1 || lane.groups - first > kAtOnce / 2) {
        add_groups<kAtOnce>(groups + first * 4, part);
      } else {
        add_groups<kAtOnce / 2>(groups + first * 4, part);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum[i] = protocol::total(part[i]);
  }

  // Each row's maximum, after exchange_maxima().
  static __device__ __forceinline__ void max_up(const Lane& lane, uint32_t here, uint32_t turn,
                                                uint32_t (&most)[kRows]) {
    const uint32_t groups = here + set_offset(turn);
#pragma unroll
    for (uint32_t& value : most) value = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < lane.groups; first += 4) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const protocol::Vector four = ptx::load_shared_vector(groups + first * 4 + i * kRowBytes);
#pragma unroll
        for (uint32_t word : four.word) most[i] = max(most[i], word);
      }
    }
  }

 private:
  // Loaded together, so that one latency is paid and not one a load; of one row, half of them where those are all. Groups that
  // are not there are +0, which changes no sum.
  static constexpr uint32_t kAtOnce = kRows == 1 ? 32 : kRows == 2 ? 16 : 8;
  static_assert(kMaxGroups % kAtOnce == 0);
  static constexpr uint32_t kRowBytes = kMaxGroups * 4;

  static __device__ __forceinline__ uint32_t place(int i) { return i / kColumns * kRowBytes + i % kColumns * 4; }
  static __device__ __forceinline__ uint32_t set_offset(uint32_t turn) { return turn % 2 * (kRows * kRowBytes); }
  static __device__ __forceinline__ uint32_t mbarrier_offset(uint32_t turn) {
    return 2 * kRows * kRowBytes + turn % 2 * 8;
  }

  static __device__ __forceinline__ void expect(const Lane& lane, uint32_t bar) {
    ptx::mbarrier_arrive_expect(bar, lane.groups * kRows * 4);
  }

  template <uint32_t kCount>
  static __device__ __forceinline__ void add_groups(uint32_t first, float (&part)[kRows][protocol::kSums]) {
    float4 four[kRows][kCount / 4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) four[i][j] = ptx::load_shared_float4(first + i * kRowBytes + j * 16);
    }
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float value[] = {four[i][j].x, four[i][j].y, four[i][j].z, four[i][j].w};
#pragma unroll
        for (int k = 0; k < protocol::kSums; ++k) part[i][k] = protocol::add(part[i][k], value[k]);
      }
    }
  }

  static __device__ __forceinline__ void exchange(const Lane& lane, uint32_t here, uint32_t turn,
                                                  const uint32_t (&word)[Tile::kVectors]) {
    if (gridDim.x == 1) {
      exchange_in_cta(lane, here + set_offset(turn), word);
    } else {
      exchange_in_cluster(lane, here, turn, word);
    }
  }

  static __device__ __forceinline__ void exchange_in_cluster(const Lane& lane, uint32_t here, uint32_t turn,
                                                             const uint32_t (&word)[Tile::kVectors]) {
    const uint32_t peer = lane.vector % 32, bar = here + mbarrier_offset(turn);
    if (peer < gridDim.x) {
      const uint32_t remote = ptx::map_shared(here + set_offset(turn) + lane.vector / 32 * 4, peer);
      const uint32_t remote_bar = ptx::map_shared(bar, peer);
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) ptx::store_async(remote + place(i), word[i], remote_bar);
    }
    ptx::mbarrier_wait_cluster(bar, turn / 2 % 2);
  }

  // A cluster of one is launched like no cluster at all, and there a store to the cluster's window may find "cluster target
  // block not present" (seen on H200 in captured calls; decision 18). Nor is there anybody to send to.
  static __device__ __forceinline__ void exchange_in_cta(const Lane& lane, uint32_t groups,
                                                         const uint32_t (&word)[Tile::kVectors]) {
    if (lane.vector % 32 == 0) {
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) ptx::store_shared(groups + place(i) + lane.vector / 32 * 4, word[i]);
    }
    ptx::barrier_sync(kExchanged, lane.warps * 32);
  }
};

}  // namespace mnnvl_ar::kernels
