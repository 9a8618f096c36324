// A group of threads that processes one pair (bag, class), or several at once, and its reductions: sums and extremes. A group
// is a warp or a block.
//
// Numbers are added in a fixed order and without atomics, so that the same launch gives the same bits.
#pragma once

#include "platform.h"

namespace sgl {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpBits = 5, kWarp = 1 << kWarpBits;
// The lanes that process a pair of few instances: eight, or four. The pairs of a warp share the cost of everything that does not
// depend on the number of instances.
constexpr int kPartBits = 3, kFewLanesBits = 2;
constexpr int kMaxThreads = 256;
// Registers per thread, at most: as few as possible without spills. Then many threads are resident, which hides latency.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kRegistersInFloat = 120, kRegistersInDouble = 144;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRegistersInFloat = 128, kRegistersInDouble = 144;
#else
constexpr int kRegistersInFloat = 96, kRegistersInDouble = 128;
#endif
template <class T>
constexpr int kRegisters = sizeof(T) == sizeof(double) ? kRegistersInDouble : kRegistersInFloat;

// The largest struct that is reduced is FirstPass<double>.
constexpr int kMaxWords = 12;

// The `value` of the lane whose number is this lane's number XOR `lanes`.
template <class R>
SGL_DEVICE R from_other_lane(const R& value, int lanes) {
  static_assert(sizeof(R) % sizeof(uint32_t) == 0, "whole words are exchanged");
  constexpr int kWords = sizeof(R) / sizeof(uint32_t);
  uint32_t words[kWords];
  std::memcpy(words, &value, sizeof(R));
#pragma unroll
  for (int k = 0; k < kWords; ++k) words[k] = __shfl_xor_sync(kAllLanes, words[k], lanes);
  R other;
  std::memcpy(&other, words, sizeof(R));
  return other;
}

// The results of the warps of a block. There are two buffers, used in turn: a thread that writes one of them has passed the
// barrier after the reads of the other. The results of parts take the space of both: of 16 parts in float, of 8 in double.
struct GroupShared {
  static constexpr int kBuffer = kMaxThreads / kWarp * kMaxWords / 2;
  uint64_t of_warp[8 * kBuffer];
};

// 2^bits threads: a warp or the whole block. It can be divided into parts, which process a pair each: neighbouring threads
// belong to neighbouring parts. The parts reduce together: either all of them call reduce(), or none.
class Group {
 public:
  SGL_DEVICE Group(int bits, GroupShared& shared) : bits_(bits), part_bits_(0), turn_(0), shared_(shared) {}

  SGL_DEVICE int first_thread() const { return threadIdx.x & -(1 << bits_); }
  SGL_DEVICE int part() const { return threadIdx.x & ((1 << part_bits_) - 1); }
  // of the thread in its part, and the number of threads in a part
  SGL_DEVICE int rank() const { return (threadIdx.x & ((1 << bits_) - 1)) >> part_bits_; }
  SGL_DEVICE int size() const { return 1 << (bits_ - part_bits_); }

  // Into 2^part_bits parts, at most a warp's lanes.
  SGL_DEVICE void divide(int part_bits) { part_bits_ = part_bits; }

  SGL_DEVICE void sync() const {
    if (bits_ <= kWarpBits) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // R::merge(const R&) is exactly commutative. Therefore every thread of a part gets the same result. Small R are reduced by
  // undivided groups only. `unrolled`: whether the loop over the lanes of a warp is unrolled, which takes fewer instructions and
  // more code
  template <bool unrolled, class R>
  SGL_DEVICE R reduce(R value) {
    static_assert(sizeof(R) <= kMaxWords * sizeof(uint32_t) && alignof(R) <= 8, "fits into GroupShared");
    if constexpr (unrolled && sizeof(R) <= 2 * sizeof(uint32_t)) {
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value.merge(from_other_lane(value, lanes));
    } else if constexpr (unrolled) {
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
        if (lanes >> part_bits_ > 0) value.merge(from_other_lane(value, lanes));
    } else {
#pragma unroll 1
      for (int lanes = kWarp / 2; lanes >> part_bits_ > 0; lanes /= 2) value.merge(from_other_lane(value, lanes));
    }
    if (bits_ <= kWarpBits) return value;
    constexpr int kWords = sizeof(R) / sizeof(uint64_t) + (sizeof(R) % sizeof(uint64_t) != 0);
    const int parts = 1 << part_bits_;
    if (parts > 1) __syncthreads();  // other threads may still read either buffer
    uint64_t* const of_warp = shared_.of_warp + (parts > 1 ? 0 : turn_ * GroupShared::kBuffer);
    const int lane = threadIdx.x % kWarp;
    if (lane < parts) std::memcpy(of_warp + (threadIdx.x / kWarp * parts + lane) * kWords, &value, sizeof(R));
    __syncthreads();
    std::memcpy(&value, of_warp + part() * kWords, sizeof(R));
#pragma unroll 1
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
      R other;
      std::memcpy(&other, of_warp + (warp * parts + part()) * kWords, sizeof(R));
      value.merge(other);
    }
    if (parts > 1) __syncthreads();
    turn_ ^= 1;
    return value;
  }
  // Unrolled if the code stays small.
  template <class R>
  SGL_DEVICE R reduce(const R& value) {
    return reduce<sizeof(R) <= 6 * sizeof(uint32_t)>(value);
  }

 private:
  int bits_, part_bits_;
  int turn_;
  GroupShared& shared_;
};

}  // namespace cuda
}  // namespace sgl
