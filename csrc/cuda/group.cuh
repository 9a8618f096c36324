// The threads that work on one bag-class together, a warp or a block, and how they agree on sums and extremes.
//
// Everything is added up in a fixed order, without atomics: the same launch gives the same bits.
#pragma once

#include "platform.h"

namespace sgl {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
// Of a thread, at most: as few as do without memory of its own, so that as many threads as can be hide each other's waiting.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRegistersInFloat = 112;
#else
constexpr int kRegistersInFloat = 96;
#endif
template <class T>
constexpr int kRegisters = sizeof(T) == sizeof(double) ? 128 : kRegistersInFloat;

// The largest thing that is reduced: FirstPass<double>.
constexpr int kMaxWords = 12;

// `value` as the lane whose number differs in the bits of `lanes` has it.
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

// Where warps leave what the block agrees on. Two, used in turn: whoever writes one has passed the barrier after which
// the other was read.
struct GroupShared {
  uint64_t of_warp[2][kMaxThreads / kWarp][kMaxWords / 2];
};

// A warp, or the whole block.
class Group {
 public:
  SGL_DEVICE Group(bool is_warp, GroupShared& shared) : is_warp_(is_warp), turn_(0), shared_(shared) {}

  SGL_DEVICE int rank() const { return is_warp_ ? threadIdx.x % kWarp : threadIdx.x; }
  SGL_DEVICE int size() const { return is_warp_ ? kWarp : blockDim.x; }

  // which group of the block this one is, and how many there are
  SGL_DEVICE int index() const { return is_warp_ ? threadIdx.x / kWarp : 0; }
  SGL_DEVICE int count() const { return is_warp_ ? blockDim.x / kWarp : 1; }

  SGL_DEVICE void sync() const {
    if (is_warp_) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // R has merge(const R&), which is commutative to the bit; so every thread ends with the same result.
  template <class R>
  SGL_DEVICE R reduce(R value) {
    static_assert(sizeof(R) <= kMaxWords * sizeof(uint32_t) && alignof(R) <= 8, "fits into GroupShared");
    // unrolled where that is little code
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
