// The addresses of the instances of a pair (bag, class), and loads and stores of 16 bytes where the alignment allows them.
//
// In a group of s threads, thread r has the positions r V to r V + V - 1, then those s V further on, and so on. V is the
// number of logits in 16 bytes, or 1 in a short row. In a row with a stride, V is 1, too: neighbouring threads read
// neighbouring instances.
#pragma once

#include "group.cuh"
#include "launch.h"

namespace sgl {
namespace cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Labels

SGL_DEVICE Label label_of(const Targets& targets, uint32_t bag, uint32_t cls) {
  const int64_t at = bag * targets.bag_step + cls * targets.class_step;
  uint64_t bits;
  if (targets.bytes == 4) {
    bits = static_cast<const uint32_t*>(targets.data)[at];
  } else if (targets.bytes == 8) {
    bits = static_cast<const uint64_t*>(targets.data)[at];
  } else if (targets.bytes == 2) {
    bits = static_cast<const uint16_t*>(targets.data)[at];
  } else {
    bits = static_cast<const uint8_t*>(targets.data)[at];
  }
  bits &= targets.magnitude;
  return bits > targets.largest ? Label::kUnknown : bits == 0 ? Label::kNegative : Label::kPositive;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

template <class In>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(In);
  In x[kSize];
};

// The instances of a thread form runs of this many packs. After each run, sums in float are added to sums in double. The first
// pass loads a whole run at once, to keep many loads in flight.
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
  int64_t logits, grad;  // of the first position
  uint32_t first;  // the bag, or the first row of a packed one
  int positions;
};

// `value`, but at least 0 and at most `most`
SGL_DEVICE uint32_t clamped(int64_t value, uint32_t most) {
  const int32_t high = static_cast<int32_t>(value >> 32);
  uint32_t low = static_cast<uint32_t>(value);
  if (high > 0) low = most;
  if (high < 0) low = 0;
  return low < most ? low : most;
}

struct Bounds {
  uint32_t begin, end;
};

// Offsets `first` and `last`. They are clamped, so that invalid ones never address other memory. If they decrease, bags
// overlap, and a shared row gets the gradient of one of these bags. Which one is undefined.
SGL_DEVICE Bounds bounds_of(const Rows& rows, uint32_t first, uint32_t last) {
  const int64_t from = first * rows.offsets_step, to = last * rows.offsets_step;
  int64_t begin, end;
  if (rows.offsets_are_64_bit) {
    begin = static_cast<const int64_t*>(rows.offsets)[from], end = static_cast<const int64_t*>(rows.offsets)[to];
  } else {
    begin = static_cast<const int32_t*>(rows.offsets)[from], end = static_cast<const int32_t*>(rows.offsets)[to];
  }
  const uint32_t most = static_cast<uint32_t>(rows.positions);
  const uint32_t low = clamped(begin, most), high = clamped(end, most);
  return {low, high > low ? high : low};
}

// The first position of a bag in steps of logits_bag, and the one after its last. There are at most 2^30 - 1 positions.
SGL_DEVICE Bounds bounds_of(const Rows& rows, uint32_t bag) {
  if (rows.offsets == nullptr) return {bag, bag + static_cast<uint32_t>(rows.positions)};
  return bounds_of(rows, bag, bag + 1);
}

SGL_DEVICE Place place_of(const Rows& rows, const Bounds& bounds, uint32_t cls) {
  return {
      bounds.begin * rows.logits_bag + cls * rows.logits_class, bounds.begin * rows.grad_bag + cls * rows.grad_class,
      bounds.begin, static_cast<int>(bounds.end - bounds.begin)};
}

// Steps from the first position of a bag to position j.
struct Steps {
  int64_t logits, mask, grad;
};

SGL_DEVICE Steps steps_to(const Rows& rows, int j) {
  Steps s = {0, 0, 0};
  // Not unrolled: nvcc would make it a third of all code, above all from compute_100 on, although it rarely runs.
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

// Piece `piece` of 2^bits of a row of one stride. It begins at a multiple of 16 positions, so that packs stay aligned.
SGL_DEVICE Place piece_of(const Rows& rows, Place place, int piece, int bits) {
  const int length = (((place.positions + (1 << bits) - 1) >> bits) + 15) & ~15;
  const int begin = piece * length < place.positions ? piece * length : place.positions;
  place.logits += begin * rows.dimension[0].logits;
  place.positions = length < place.positions - begin ? length : place.positions - begin;
  return place;
}

// A flag in global memory that no kernel writes. nvcc does not always see that the address is one of global memory.
SGL_DEVICE bool flag_at(const bool* address) {
#if defined(__CUDA_ARCH__)
  return __ldg(reinterpret_cast<const unsigned char*>(address)) != 0;
#else
  return *address;
#endif
}

// Whether the position at these steps from the first one of a bag is an instance. `first`: as in Place
SGL_DEVICE bool is_instance(const Rows& rows, const bool* mask, uint32_t first, const Steps& steps) {
  return mask == nullptr || flag_at(mask + (first * rows.mask_bag + steps.mask));
}

// The steps of a logit from the first position to position j, or kNoInstance. If it were inlined, the code of the forward kernel
// would be a sixth larger.
constexpr int64_t kNoInstance = -(int64_t{1} << 62);
SGL_DEVICE_CALL int64_t step_to_instance(SharedAddress<Rows> rows, const bool* mask, uint32_t first, int j) {
  const Steps steps = steps_to(rows.object(), j);
  return is_instance(rows.object(), mask, first, steps) ? steps.logits : kNoInstance;
}

// Rows of at most this many positions are short, unless each thread has a whole run of them.
constexpr int kShort = 4 * kWarp;

template <class In>
struct Row {
  const In* x;
  const bool* mask;  // of all bags
  const Rows* rows;
  SharedAddress<Rows> shared_rows;  // a copy for at()
  uint32_t first;  // as in Place
  int n;  // positions
  bool is_simple, is_adjacent;  // as in Call
  bool is_contiguous;  // simple, with stride 1, and packs lie on 16 bytes
  bool is_short;
  int width;  // neighbouring positions of a thread: a pack, or 1 in a short row, so that more threads have work
  int whole_packs;  // of all threads together; none in a short row

  // `threads`: a power of 2, that process the row. `copy`: of the rows of the call, in shared memory; needed for at() if the call
  // is not simple
  SGL_DEVICE Row(const Call& c, const Place& place, int threads, const Rows* copy)
      : x(static_cast<const In*>(c.logits) + place.logits),
        mask(c.mask),
        rows(&c.rows),
        shared_rows(copy),
        first(place.first),
        n(place.positions) {
    is_simple = c.is_simple;
    is_adjacent = c.is_adjacent;
    is_contiguous = is_adjacent && lies_on_16_bytes(x);
    is_short = n <= kShort && n < kPacks<In> * Pack<In>::kSize * threads;
    width = is_short || (is_simple && !is_contiguous) ? 1 : Pack<In>::kSize;
    whole_packs = 0;
    if (is_simple && !is_short) whole_packs = is_contiguous ? n / Pack<In>::kSize : n / Pack<In>::kSize & -threads;
  }

  // Whether the position at these steps from the first one is an instance.
  SGL_DEVICE bool has(const Steps& steps) const { return is_instance(*rows, mask, first, steps); }

  // Packs begin, begin + threads, ... of a simple row. One branch for all of them. `rank`: of the thread
  template <int kCount>
  SGL_DEVICE void load(Pack<In> (&packs)[kCount], int begin, int rank, int threads) const {
    if (is_contiguous) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) packs[u] = reinterpret_cast<const Pack<In>*>(x)[begin + u * threads];
    } else {
      const int64_t stride = rows->dimension[0].logits, step = threads * stride;
      const In* from = x + ((begin - rank) * Pack<In>::kSize + rank) * stride;
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int v = 0; v < Pack<In>::kSize; ++v, from += step) packs[u].x[v] = *from;
      }
    }
  }

  // The logit at position j, or a NaN where there is no instance.
  SGL_DEVICE In at(int j, bool& live) const {
    live = j < n;
    if (!live) return filler(In());
    if (is_simple) return x[j * rows->dimension[0].logits];
    const int64_t step = step_to_instance(shared_rows, mask, first, j);
    live = step != kNoInstance;
    return live ? x[step] : filler(In());
  }
};

// Calls f(x, is an instance) for each x in order.
template <class F>
struct OneByOne {
  F f;

  template <class T, int kCount>
  SGL_DEVICE void operator()(const T (&x)[kCount], bool live) const {
#pragma unroll
    for (int v = 0; v < kCount; ++v) f(x[v], live);
  }
};
template <class F>
SGL_DEVICE OneByOne<F> one_by_one(const F& f) {
  return {f};
}

// Calls f(several x, are they instances) for this thread's positions of the row, and flush() after every run.
// kTogether: how many packs are loaded before f gets the first one: a whole run, or 1. With 1, flush() is called at the end
// only. With 0, f gets single instances, and neighbouring threads have neighbouring ones. This saves code and registers in
// passes whose arithmetic takes longer than the loads. Then f only gets positions that are instances.
template <int kTogether, class T, class In, class F, class Flush>
SGL_DEVICE void for_instances(const Row<In>& row, const Group& group, const F& f, const Flush& flush) {
  constexpr int kSize = Pack<In>::kSize, kRun = kPacks<In> * kSize;
  static_assert(kTogether <= 1 || kTogether == kPacks<In>, "nothing, a pack or a run");
  const int rank = group.rank(), size = group.size();
  if constexpr (kTogether == 0) {
    const int64_t step = size * row.rows->dimension[0].logits;
    const In* from = row.x + rank * row.rows->dimension[0].logits;
#pragma unroll 1
    for (int j = rank; j < row.n;) {
      const int end = j + kRun * size < row.n ? j + kRun * size : row.n;
#pragma unroll 1
      for (; j < end; j += size) {
        In now;
        if (row.is_simple) {
          now = *from;
          from += step;
        } else {
          bool live;
          now = row.at(j, live);
          if (!live) continue;
        }
        const T x[1] = {read_as(T(), now)};
        f(x, true);
      }
      flush();
    }
    return;
  }
  int p = rank;
  if constexpr (kTogether > 1) {
    for (; p + (kTogether - 1) * size < row.whole_packs; p += kTogether * size) {
      Pack<In> packs[kTogether];
      row.load(packs, p, rank, size);
      T x[kTogether * kSize];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int v = 0; v < kSize; ++v) x[u * kSize + v] = read_as(T(), packs[u].x[v]);
      }
      f(x, true);
      flush();
    }
  }
  if constexpr (kTogether > 1) {
    if (row.is_simple && row.is_short) {
      // A short row: a thread has at most 16 instances. If the row does not begin at a multiple of 32 bytes, the threads begin at
      // the multiple before it. So eight threads read one sector at a time.
      const int64_t stride = row.rows->dimension[0].logits;
      constexpr uint32_t kSector = 32 / sizeof(In);
      if (row.is_adjacent) p -= static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row.x)) / sizeof(In) % kSector;
#pragma unroll 1
      for (; p < row.n; p += size) {
        if (p < 0) continue;
        const T x[1] = {read_as(T(), row.x[p * stride])};
        f(x, true);
      }
      flush();
      return;
    }
  }
#pragma unroll 1
  for (; p < row.whole_packs; p += size) {
    Pack<In> pack[1];
    row.load(pack, p, rank, size);
    T x[kSize];
#pragma unroll
    for (int v = 0; v < kSize; ++v) x[v] = read_as(T(), pack[0].x[v]);
    f(x, true);
  }
  // The rest of a simple row completes at most one run. Other rows consist of this rest alone.
  if (row.width == 1) p = row.whole_packs * kSize + rank;
  const int run = size * (row.width == 1 ? kRun : kRun / kSize);
#pragma unroll 1
  do {
    const int end = kTogether > 1 ? p + run : row.n;
#pragma unroll 1
    for (; p < end && p * row.width < row.n; p += size) {
#pragma unroll 1
      for (int v = 0; v < row.width; ++v) {
        bool live;
        const T x[1] = {read_as(T(), row.at(p * row.width + v, live))};
        f(x, live);
      }
    }
    flush();
  } while (kTogether > 1 && p * row.width < row.n);
}

}  // namespace cuda
}  // namespace sgl
