// Backward: the gradient is computed again from the logits and the saved row of each pair (bag, class). A group
// of threads processes a piece of a pair, or of several pairs whose classes lie side by side in memory. Threads exchange nothing.
#pragma once

#include <type_traits>

#include "group.cuh"
#include "rows.cuh"

namespace sgl {
namespace cuda {

// Whether a negative pair needs nothing but p of its instances, so that sigmoid() suffices.
SGL_HD constexpr bool needs_p_only(int64_t pooling) {
  return pooling == NoPooling::kCode || pooling == MaxPooling::kCode;
}

template <class Pooling, Kind kind, class T>
SGL_DEVICE T slope_of(T x, const Coefficients<T>& k) {
  Probability<T> o = {};
  T g;
  if constexpr (kind == Kind::kNegative && needs_p_only(Pooling::kCode)) {
    g = k.negative * sigmoid(x);
  } else {
    o = probability<false>(x, k.scale);
    g = instance_slope<kind, false>(x, o, k);
  }
  if constexpr (Pooling::kCode != NoPooling::kCode)
    g += Pooling::template slope<false>(x, o, k.pooling, k.slope1, k.slope2);
  return g;
}

// The same for any kind and pooling, which it chooses for each instance. `by_sigmoid`: p of a negative pair is sigmoid(), so
// that the gradient has the same bits in every layout.
template <bool scaled, class T>
SGL_DEVICE T any_slope_of(T x, const Coefficients<T>& k, bool by_sigmoid) {
  const Probability<T> o = probability<scaled>(x, k.scale);
  T g = T(0);
  if (k.kind == Kind::kNegative)
    g = !scaled && by_sigmoid ? k.negative * sigmoid(x) : instance_slope<Kind::kNegative, scaled>(x, o, k);
  if (k.kind == Kind::kPositive) g = instance_slope<Kind::kPositive, scaled>(x, o, k);
  if (k.kind == Kind::kRounded) g = instance_slope<Kind::kRounded, scaled>(x, o, k);
  if (k.kind == Kind::kExtremes) g = instance_slope<Kind::kExtremes, scaled>(x, o, k);
  return g + with_pooling(k.pooling_code, [&](auto pooling) {
           return decltype(pooling)::template slope<scaled>(x, o, k.pooling, k.slope1, k.slope2);
         });
}

// ---------------------------------------------------------------------------------------------------------------------
// Simple rows: one stride, and every position is an instance

template <class P>
SGL_DEVICE P* moved(P* address, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return reinterpret_cast<P*>(reinterpret_cast<Byte*>(address) + bytes);
}

// The instances of a thread, a pack of them at a time: adjacent ones (tiling.in_packs), or instances that lie `tiling.each`
// positions apart, so that neighbouring threads have neighbouring ones. The first pack may begin before the row, at a multiple
// of 16 or 32 bytes, and the last one may end after it.
template <class In>
struct Instances {
  static constexpr int kSize = Pack<In>::kSize;
  const Tiling& tiling;
  const In* logits;
  In* grad;
  int position, n;
  uint32_t whole;  // a pack at a position below it lies in the row and can be accessed at once

  // `first`: number of the thread among those that process the row
  SGL_DEVICE Instances(
      const Tiling& t, const In* all_logits, In* all_grads, const Bounds& bounds, uint32_t cls, uint32_t first)
      : tiling(t), n(static_cast<int>(bounds.end - bounds.begin)) {
    const uint64_t bag = bounds.begin;
    logits = all_logits + (bag * t.logits_bag + static_cast<uint64_t>(cls) * t.logits_class);
    grad = all_grads + (bag * t.grad_bag + static_cast<uint64_t>(cls) * t.grad_class);
    const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(logits)) / sizeof(In) & t.skew_mask;
    position = static_cast<int>(first * t.first_step - skew);
    whole = t.in_packs && n >= kSize ? n - kSize + 1 : 0;
    logits = moved(logits, int64_t{position} * t.logits_stride);
    grad = moved(grad, int64_t{position} * t.grad_stride);
  }

  SGL_DEVICE bool exist() const { return position < n; }
  SGL_DEVICE bool is_instance(int j) const { return static_cast<uint32_t>(j) < static_cast<uint32_t>(n); }

  SGL_DEVICE void load(Pack<In>& pack) const {
    if (static_cast<uint32_t>(position) < whole) {
      pack = *reinterpret_cast<const Pack<In>*>(logits);
      return;
    }
    const In* from = logits;
#pragma unroll
    for (int v = 0; v < kSize; ++v, from = moved(from, tiling.logits_each))
      if (is_instance(position + v * tiling.each)) pack.x[v] = *from;
  }

  // the pack that was loaded from position `at`
  SGL_DEVICE void store(const Pack<In>& pack, int at) const {
    if (static_cast<uint32_t>(at) < whole) {
      *reinterpret_cast<Pack<In>*>(grad) = pack;
      return;
    }
    In* to = grad;
#pragma unroll
    for (int v = 0; v < kSize; ++v, to = moved(to, tiling.grad_each))
      if (is_instance(at + v * tiling.each)) *to = pack.x[v];
  }
};

// The gradient slope(x) of each instance. `next`: the first pack
template <class T, class In, class Slope>
SGL_DEVICE void write_gradient(Instances<In> instances, Pack<In> next, const Slope& slope) {
  constexpr int kSize = Pack<In>::kSize;
#pragma unroll 1
  while (instances.exist()) {
    // the next logits are loaded before the gradient of these is computed
    Pack<In> pack = next;
    const int at = instances.position;
    instances.position += instances.tiling.step;
    instances.logits = moved(instances.logits, instances.tiling.logits_step);
    if (instances.exist()) instances.load(next);
#pragma unroll
    for (int v = 0; v < kSize; ++v) write_as(&pack.x[v], slope(read_as(T(), pack.x[v])));
    instances.store(pack, at);
    instances.grad = moved(instances.grad, instances.tiling.grad_step);
  }
}

// The same number to every instance.
template <class T, class In>
SGL_DEVICE void fill(Instances<In> instances, T value) {
  Pack<In> pack;
#pragma unroll
  for (int v = 0; v < Pack<In>::kSize; ++v) write_as(&pack.x[v], value);
#pragma unroll 1
  while (instances.exist()) {
    instances.store(pack, instances.position);
    instances.position += instances.tiling.step;
    instances.grad = moved(instances.grad, instances.tiling.grad_step);
  }
}

// The saved row of a pair and the denominators of the batch.
template <class T>
struct SavedRow {
  T columns[kColumns], denominators[kDenominatorPair + 1];

  SGL_DEVICE bool is(Kind kind) const { return columns[kColumnKind] == static_cast<T>(static_cast<int>(kind)); }
  // whether all logits are below the limit of sigmoid()
  SGL_DEVICE bool below_limit() const { return columns[kColumnHigh] < T(1e38); }
};

// Numbers that lie on 16 bytes
template <class T, int kCount>
SGL_DEVICE void load_packs(T (&to)[kCount], const T* from) {
  static_assert(kCount % Pack<T>::kSize == 0, "whole packs");
#pragma unroll
  for (int k = 0; k < kCount; k += Pack<T>::kSize) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + k);
#pragma unroll
    for (int v = 0; v < Pack<T>::kSize; ++v) to[k + v] = pack.x[v];
  }
}

// Calls f with an object of the pooling whose bit is set in `bit`, if it has kOwnLoop. nvcc would make a slower jump table of a
// comparison with codes.
template <class Function>
SGL_DEVICE void with_own_pooling(uint32_t bit, const Function& f) {
#define SGL_CASE(P)          \
  if constexpr (P::kOwnLoop) \
    if (bit & 1u << P::kCode) return f(P());
  SGL_POOLINGS(SGL_CASE)
#undef SGL_CASE
}

// For a kind and a pooling with kOwnLoop: both are constants of the loop, and of the computation of the coefficients.
template <Kind kind, class T, class In>
SGL_DEVICE void write_own_loop(
    const Call& call, const Instances<In>& instances, const Pack<In>& first, SavedRow<T> saved, T grad_output,
    uint32_t cls) {
  with_own_pooling(instances.tiling.own_pooling, [&](auto pooling) {
    using P = decltype(pooling);
    saved.columns[kColumnKind] = static_cast<T>(static_cast<int>(kind));
    Settings settings = call.settings;
    settings.pooling = P::kCode;
    // negative pairs do not need pos_weight
    const T* pos_weights = static_cast<const T*>(call.pos_weight);
    const T pos_weight = kind == Kind::kNegative || pos_weights == nullptr ? T(1) : pos_weights[cls];
    const Coefficients<T> k = coefficients(saved.columns, saved.denominators, grad_output, pos_weight, settings);
    write_gradient<T>(instances, first, [&](T x) { return slope_of<P, kind>(x, k); });
  });
}

// The gradient of a simple row. False if its kind or pooling has no loop of its own.
template <class T, class In>
SGL_DEVICE bool write_simple(
    const Call& call, const Instances<In>& instances, const Pack<In>& first, const SavedRow<T>& saved, T grad_output,
    uint32_t cls) {
  // These loops need p that is not scaled (scale_of), and logits below the limit of sigmoid().
  const bool in_range =
      saved.columns[kColumnHigh] >= T(-40) && saved.columns[kColumnLow] <= T(40) && saved.below_limit();
  if (in_range && instances.tiling.own_pooling != 0) {
    if (saved.is(Kind::kNegative)) {
      write_own_loop<Kind::kNegative>(call, instances, first, saved, grad_output, cls);
      return true;
    }
    if (saved.is(Kind::kPositive)) {
      write_own_loop<Kind::kPositive>(call, instances, first, saved, grad_output, cls);
      return true;
    }
  }
  // No product with 0 or NaN: an excluded pair may hold anything, and a weight of 0 must not hide a NaN.
  const bool excluded = saved.is(Kind::kExcluded);
  if (!excluded && !saved.is(Kind::kNonFinite)) return false;
  fill(instances, excluded ? T(0) : nan_of(T()));
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Any row, instance by instance

template <bool scaled, class T, class In>
SGL_DEVICE void write_each(
    const Row<In>& row, In* grad, int first, int step, const Coefficients<T>& k, bool by_sigmoid) {
  const bool excluded = k.kind == Kind::kExcluded, filled = excluded || k.kind == Kind::kNonFinite;
#pragma unroll 1
  for (int j = first; j < row.n; j += step) {
    const Steps steps = steps_to(*row.rows, j);
    const bool live = row.has(steps);
    T g = live && !excluded ? nan_of(T()) : T(0);
    if (live && !filled) g = any_slope_of<scaled>(read_as(T(), row.x[steps.logits]), k, by_sigmoid);
    write_as(grad + steps.grad, g);
  }
}

template <class T, class In>
SGL_DEVICE void write_general(
    const Call& call, const Row<In>& row, In* grad, int first, int step, const SavedRow<T>& saved, T grad_output,
    uint32_t cls) {
  const T* pos_weights = static_cast<const T*>(call.pos_weight);
  const T pos_weight = pos_weights == nullptr ? T(1) : pos_weights[cls];
  const Coefficients<T> k = coefficients(saved.columns, saved.denominators, grad_output, pos_weight, call.settings);
  const bool by_sigmoid = needs_p_only(call.settings.pooling) && saved.below_limit();
  if (k.scale.any) {
    write_each<true>(row, grad, first, step, k, by_sigmoid);
  } else {
    write_each<false>(row, grad, first, step, k, by_sigmoid);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

template <class T, class In>
__global__ void __maxnreg__(kRegisters<T>) backward_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Backward backward,
    const __grid_constant__ Tiling tiling) {
  const Rows& rows = call.rows;
  const T* columns = static_cast<const T*>(backward.saved);
  const uint32_t classes = rows.classes;
  const T* grad_outputs = static_cast<const T*>(backward.grad_output);
  In* grads = static_cast<In*>(backward.grad);

  const uint32_t rank = threadIdx.x & ((1u << tiling.group_bits) - 1);
  // Neighbouring threads have neighbouring classes, then neighbouring instances.
  const uint32_t at = quotient_of(rank, tiling.across), class_at = rank - at * tiling.across.by;
  for (uint32_t item = blockIdx.x * tiling.groups + (threadIdx.x >> tiling.group_bits); item < tiling.items;
       item += tiling.item_step) {
    const uint32_t strip = quotient_of(item, tiling.pieces), bag = quotient_of(strip, tiling.strips);
    const uint32_t cls = (strip - bag * tiling.strips.by) * tiling.across.by + class_at;
    if (at >= tiling.lengthwise || cls >= classes) continue;
    const uint32_t pair = bag * classes + cls, piece = item - strip * tiling.pieces.by;
    SavedRow<T> saved;
    load_packs(saved.columns, columns + int64_t{pair} * kColumns);
    load_packs(saved.denominators, columns + int64_t{rows.units} * kColumns);
    const T grad_output = grad_outputs[pair * backward.grad_output_step];
    const Bounds bounds = bounds_of(rows, bag);
    const uint32_t first = piece * tiling.lengthwise + at;
    if (tiling.is_simple) {
      const Instances<In> instances(tiling, static_cast<const In*>(call.logits), grads, bounds, cls, first);
      Pack<In> pack = {};
      if (instances.exist()) instances.load(pack);
      if (write_simple(call, instances, pack, saved, grad_output, cls)) continue;
    }
    const Place place = place_of(rows, bounds, cls);
    write_general(
        call, Row<In>(call, place, tiling.lengthwise, nullptr), grads + place.grad, static_cast<int>(first),
        static_cast<int>(tiling.pieces.by * tiling.lengthwise), saved, grad_output, cls);
  }

  if (rows.offsets == nullptr || blockIdx.x > 0) return;
  // rows of no bag, before the first and after the last: there are none where the offsets are right, so one block is enough
  const Bounds bounds = bounds_of(rows, 0, static_cast<uint32_t>(rows.bags));
  const int64_t begin = bounds.begin, end = bounds.end;
  const int64_t outside = (begin + rows.positions - end) * static_cast<int64_t>(classes);
  In zero;
  write_as(&zero, T(0));
  for (int64_t i = threadIdx.x; i < outside; i += blockDim.x) {
    const int64_t row = i / classes, cls = i - row * classes;
    grads[(row < begin ? row : row - begin + end) * rows.grad_bag + cls * rows.grad_class] = zero;
  }
}

}  // namespace cuda
}  // namespace sgl
