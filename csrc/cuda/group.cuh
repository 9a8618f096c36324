// A group of threads that processes one pair (bag, class), and its reductions: sums and extremes. A group is a part of a
// warp, a warp, or a block.
//
// Numbers are added in a fixed order and without atomics, so that the same launch gives the same bits.
#pragma once

#include "platform.h"

namespace sgl {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpBits = 5, kWarp = 1 << kWarpBits;
// The lanes that process a pair of few instances. The four pairs of a warp share the cost of everything that does not depend
// on the number of instances.
constexpr int kPartBits = 3, kPart = 1 << kPartBits;
constexpr int kMaxThreads = 256;
// Registers per thread, at most: as few as possible without spills. Then many threads are resident, which hides latency.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRegistersInFloat = 112;
#else
constexpr int kRegistersInFloat = 96;
#endif
template <class T>
constexpr int kRegisters = sizeof(T) == sizeof(double) ? 128 : kRegistersInFloat;

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
// barrier after the reads of the other.
struct GroupShared {
  uint64_t of_warp[2][kMaxThreads / kWarp][kMaxWords / 2];
};

// 2^bits threads: kPart lanes of a warp, a warp, or the whole block. The parts of a warp reduce together: either all of them
// call reduce(), or none.
class Group {
 public:
  SGL_DEVICE Group(int bits, GroupShared& shared) : bits_(bits), turn_(0), shared_(shared) {}

  SGL_DEVICE bool is_part() const { return bits_ < kWarpBits; }
  SGL_DEVICE int rank() const { return threadIdx.x & (size() - 1); }
  SGL_DEVICE int size() const { return 1 << bits_; }

  SGL_DEVICE void resize(int bits) { bits_ = bits; }

  SGL_DEVICE void sync() const {
    if (bits_ <= kWarpBits) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // R::merge(const R&) is exactly commutative. Therefore every thread gets the same result.
  template <class R>
  SGL_DEVICE R reduce(R value) {
    static_assert(sizeof(R) <= kMaxWords * sizeof(uint32_t) && alignof(R) <= 8, "fits into GroupShared");
    // unrolled if the code stays small
    if constexpr (sizeof(R) <= 2 * sizeof(uint32_t)) {
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value.merge(from_other_lane(value, lanes));
    } else {
#pragma unroll 1
      for (int lanes = (is_part() ? kPart : kWarp) / 2; lanes > 0; lanes /= 2)
        value.merge(from_other_lane(value, lanes));
    }
    if (bits_ <= kWarpBits) return value;
    if (threadIdx.x % kWarp == 0) std::memcpy(shared_.of_warp[turn_][threadIdx.x / kWarp], &value, sizeof(R));
    __syncthreads();
    std::memcpy(&value, shared_.of_warp[turn_][0], sizeof(R));
#pragma unroll 1
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
      R other;
      std::memcpy(&other, shared_.of_warp[turn_][warp], sizeof(R));
      value.merge(other);
    }
    turn_ ^= 1;
    return value;
  }

 private:
  int bits_;
  int turn_;
  GroupShared& shared_;
};

}  // namespace cuda
}  // namespace sgl
