// Where the instances of a bag-class lie, and reading and writing them 16 bytes at a time where memory allows.
//
// Which thread gets which instance depends on the group alone, not on the layout: thread r of a group of s has positions
// r V to r V + V - 1, then those s V further on, and so on, V being what 16 bytes hold. So sums are bitwise the same for
// a map, a channels_last map and packed rows.
#pragma once

#include "group.cuh"
#include "launch.h"

namespace sgl {
namespace cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Labels

SGL_DEVICE Label label_of(const Targets& targets, int64_t bag, int64_t cls) {
  const int64_t at = bag * targets.bag_step + cls * targets.class_step;
  bool zero, unknown = false;
  if (targets.bytes == 8) {
    if (targets.is_floating) {
      const double y = static_cast<const double*>(targets.data)[at];
      zero = y == 0, unknown = y != y;
    } else {
      zero = static_cast<const int64_t*>(targets.data)[at] == 0;
    }
  } else if (targets.bytes == 4) {
    if (targets.is_floating) {
      const float y = static_cast<const float*>(targets.data)[at];
      zero = y == 0, unknown = y != y;
    } else {
      zero = static_cast<const int32_t*>(targets.data)[at] == 0;
    }
  } else if (targets.bytes == 2) {
    const uint16_t bits = static_cast<const uint16_t*>(targets.data)[at];
    if (targets.is_floating) {
      const int magnitude = bits & 0x7fff;
      zero = magnitude == 0, unknown = magnitude > (targets.is_bfloat16 ? 0x7f80 : 0x7c00);
    } else {
      zero = bits == 0;
    }
  } else {
    zero = static_cast<const uint8_t*>(targets.data)[at] == 0;
  }
  return unknown ? Label::kUnknown : zero ? Label::kNegative : Label::kPositive;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

template <class In>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(In);
  In x[kSize];
};

// A thread's instances, in the order in which it meets them, form runs of so many packs: after each, sums that are kept
// in float go into double. Where many bytes have to be under way, a run is loaded as a whole.
template <class In>
constexpr int kPacks = sizeof(In) == 2 ? 2 : 4;

template <class In>
SGL_DEVICE In filler(In);  // all bits 1: a NaN
template <>
SGL_DEVICE float filler(float) {
  return bits_of<float>(0xffffffffu);
}
template <>
SGL_DEVICE double filler(double) {
  return bits_of<double>(~uint64_t{0});
}
template <>
SGL_DEVICE Half filler(Half) {
  return {0xffffu};
}
template <>
SGL_DEVICE BFloat16 filler(BFloat16) {
  return {0xffffu};
}

struct Place {
  int64_t logits, mask, grad;  // of the first position
  int positions;
};

SGL_DEVICE int64_t offset_at(const Rows& rows, int64_t i) {
  const int64_t at = i * rows.offsets_step;
  return rows.offsets_are_64_bit ? static_cast<const int64_t*>(rows.offsets)[at]
                                 : static_cast<const int32_t*>(rows.offsets)[at];
}

SGL_DEVICE int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

SGL_DEVICE Place place_of(const Rows& rows, int64_t bag, int64_t cls) {
  int64_t first = bag, positions = rows.positions;
  if (rows.offsets != nullptr) {
    // Clamped, so that unchecked offsets never address other memory. Where they fall, bags overlap, and the gradient of a
    // shared row is that of one of them; which one is undefined.
    first = clamped(offset_at(rows, bag), 0, rows.positions);
    positions = clamped(offset_at(rows, bag + 1), first, rows.positions) - first;
  }
  return {
      first * rows.logits_bag + cls * rows.logits_class, first * rows.mask_bag,
      first * rows.grad_bag + cls * rows.grad_class, static_cast<int>(positions)};
}

// Steps from the first position of a bag to position j.
struct Steps {
  int64_t logits, mask, grad;
};

SGL_DEVICE Steps steps_to(const Rows& rows, int j) {
  Steps s = {0, 0, 0};
  // unrolled, as nvcc has it most of all from compute_100 on, it would be a third of all code, for what is rarely run
#pragma unroll 1
  for (int d = rows.dimensions - 1; d > 0; --d) {
    const Dimension& dim = rows.dimension[d];
    const int size = static_cast<int>(dim.size);
    const int outer = j / size;
    const int inner = j - outer * size;
    s.logits += inner * dim.logits;
    s.mask += inner * dim.mask;
    s.grad += inner * dim.grad;
    j = outer;
  }
  const Dimension& dim = rows.dimension[0];
  return {s.logits + j * dim.logits, s.mask + j * dim.mask, s.grad + j * dim.grad};
}

SGL_DEVICE bool lies_on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class In>
struct Row {
  const In* x;
  const bool* mask;
  const Rows* rows;
  int n;  // positions
  int whole_packs;  // that may be read as such: contiguous, aligned, every position an instance

  SGL_DEVICE Row(const Call& call, const Place& place)
      : x(static_cast<const In*>(call.logits) + place.logits),
        mask(call.mask == nullptr ? nullptr : call.mask + place.mask),
        rows(&call.rows),
        n(place.positions) {
    const Rows& r = call.rows;
    const bool in_packs = r.dimensions == 1 && r.dimension[0].logits == 1 && mask == nullptr && lies_on_16_bytes(x);
    whole_packs = in_packs ? n / Pack<In>::kSize : 0;
  }

  SGL_DEVICE Pack<In> pack(int p) const { return reinterpret_cast<const Pack<In>*>(x)[p]; }
};

// Calls f(x, is an instance) for this thread's positions of the row, and flush() after every run of them. kTogether: how
// many packs are loaded before the first is needed, a whole run, 1, or 0: then instances come one by one, which is for
// passes that compute so much that loads do not matter, and code and registers do.
template <int kTogether, class T, class In, class F, class Flush>
SGL_DEVICE void for_instances(const Row<In>& row, const Group& group, const F& f, const Flush& flush) {
  constexpr int kSize = Pack<In>::kSize;
  static_assert(kTogether <= 1 || kTogether == kPacks<In>, "nothing, a pack or a run");
  int p = group.rank();
  if constexpr (kTogether > 1) {
    for (; p + (kTogether - 1) * group.size() < row.whole_packs; p += kTogether * group.size()) {
      Pack<In> packs[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) packs[u] = row.pack(p + u * group.size());
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int v = 0; v < kSize; ++v) f(read_as(T(), packs[u].x[v]), true);
      }
      flush();
    }
  }
  int of_run = 0;
  const auto count_pack = [&] {
    if (++of_run == kPacks<In>) {
      flush();
      of_run = 0;
    }
  };
  if constexpr (kTogether > 0) {
#pragma unroll 1
    for (; p < row.whole_packs; p += group.size()) {
      const Pack<In> pack = row.pack(p);
#pragma unroll
      for (int v = 0; v < kSize; ++v) f(read_as(T(), pack.x[v]), true);
      count_pack();
    }
  }
#pragma unroll 1
  for (; p * kSize < row.n; p += group.size()) {
#pragma unroll 1
    for (int v = 0; v < kSize; ++v) {
      const int j = p * kSize + v;
      In x = filler(In());
      bool live = false;
      if (p < row.whole_packs) {
        x = row.x[j];
        live = true;
      } else if (j < row.n) {
        const Steps steps = steps_to(*row.rows, j);
        live = row.mask == nullptr || row.mask[steps.mask];
        if (live) x = row.x[steps.logits];
      }
      f(read_as(T(), x), live);
    }
    count_pack();
  }
  flush();
}

}  // namespace cuda
}  // namespace sgl
