// A group of threads, a warp or a block, that processes one pair (bag, class), and its reductions: sums and extremes.
//
// Numbers are added in a fixed order and without atomics, so that the same launch gives the same bits.
#pragma once

#include "platform.h"

namespace sgl {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
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

// A warp, or the whole block.
class Group {
 public:
  SGL_DEVICE Group(bool is_warp, GroupShared& shared) : is_warp_(is_warp), turn_(0), shared_(shared) {}

  SGL_DEVICE int rank() const { return is_warp_ ? threadIdx.x % kWarp : threadIdx.x; }
  SGL_DEVICE int size() const { return is_warp_ ? kWarp : blockDim.x; }

  // the number of this group within the block, and the number of groups
  SGL_DEVICE int index() const { return is_warp_ ? threadIdx.x / kWarp : 0; }
  SGL_DEVICE int count() const { return is_warp_ ? blockDim.x / kWarp : 1; }

  SGL_DEVICE void sync() const {
    if (is_warp_) {
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
#pragma unroll(sizeof(R) <= 2 * sizeof(uint32_t) ? 5 : 1)
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value.merge(from_other_lane(value, lanes));
    if (size() == kWarp) return value;
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
  const bool is_warp_;
  int turn_;
  GroupShared& shared_;
};

}  // namespace cuda
}  // namespace sgl
