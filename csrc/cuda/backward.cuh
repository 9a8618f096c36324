// Backward: the gradient is computed again from the logits and the saved row of each pair (bag, class). A group
// of threads processes a piece of a pair, or of several pairs whose classes lie side by side in memory. Threads exchange nothing.
#pragma once

#include "group.cuh"
#include "rows.cuh"

namespace sgl {
namespace cuda {

template <class Pooling, Kind kind, bool scaled, class T>
SGL_DEVICE T slope_of(T x, const Coefficients<T>& k) {
  const Probability<T> o = probability<scaled>(x, k.scale);
  T g = instance_slope<kind, scaled>(x, o, k);
  if (Pooling::kCode != NoPooling::kCode) g += Pooling::template slope<scaled>(x, o, k.pooling, k.slope1, k.slope2);
  return g;
}

// The same for any kind and pooling, which it chooses for each instance.
template <bool scaled, class T>
SGL_DEVICE T any_slope_of(T x, const Coefficients<T>& k) {
  const Probability<T> o = probability<scaled>(x, k.scale);
  T g = T(0);
  if (k.kind == Kind::kNegative) g = instance_slope<Kind::kNegative, scaled>(x, o, k);
  if (k.kind == Kind::kPositive) g = instance_slope<Kind::kPositive, scaled>(x, o, k);
  if (k.kind == Kind::kRounded) g = instance_slope<Kind::kRounded, scaled>(x, o, k);
  if (k.kind == Kind::kExtremes) g = instance_slope<Kind::kExtremes, scaled>(x, o, k);
  return g + with_pooling(k.pooling_code, [&](auto pooling) {
           return decltype(pooling)::template slope<scaled>(x, o, k.pooling, k.slope1, k.slope2);
         });
}

// The gradient slope(x) of a simple row: of pack `first`, of the one `step` packs further on, and so on. Then of the
// instances after the `packs` whole packs, in the same way: neighbouring threads have neighbouring instances.
template <class T, class In, class Slope>
SGL_DEVICE void write_gradient(
    const Row<In>& row, In* grad, unsigned packs, unsigned first, unsigned step, const Slope& slope) {
  constexpr unsigned kSize = Pack<In>::kSize;
  const unsigned n = row.n;
  // in both loops the next logits are loaded before the gradient of these is computed
  if (first < packs) {
    const Pack<In>* const logits = reinterpret_cast<const Pack<In>*>(row.x);
    Pack<In> next = logits[first];
#pragma unroll 1
    for (unsigned p = first; p < packs; p += step) {
      Pack<In> pack = next;
      if (p + step < packs) next = logits[p + step];
#pragma unroll
      for (unsigned v = 0; v < kSize; ++v) write_as(&pack.x[v], slope(read_as(T(), pack.x[v])));
      reinterpret_cast<Pack<In>*>(grad)[p] = pack;
    }
  }
  const unsigned begin = packs * kSize + first;
  if (begin >= n) return;
  const Dimension& dim = row.rows->dimension[0];
  const In* from = row.x + begin * dim.logits;
  In* to = grad + begin * dim.grad;
  const int64_t from_step = step * dim.logits, to_step = step * dim.grad;
  In next = *from;
#pragma unroll 1
  for (unsigned j = begin; j < n; j += step, to += to_step) {
    const In x = next;
    from += from_step;
    if (j + step < n) next = *from;
    write_as(to, slope(read_as(T(), x)));
  }
}

// The same for a kind and a pooling with kOwnLoop, both chosen outside of the loop.
template <Kind kind, class T, class In>
SGL_DEVICE void write_own_loop(
    const Row<In>& row, In* grad, unsigned packs, unsigned first, unsigned step, const Coefficients<T>& k) {
  with_pooling(k.pooling_code, [&](auto pooling) {
    using P = decltype(pooling);
    if constexpr (P::kOwnLoop)
      write_gradient<T>(row, grad, packs, first, step, [&](T x) { return slope_of<P, kind, false>(x, k); });
  });
}

// The same for any row, kind and pooling, instance by instance.
template <bool scaled, class T, class In>
SGL_DEVICE void write_general(const Row<In>& row, In* grad, unsigned first, unsigned step, const Coefficients<T>& k) {
#pragma unroll 1
  for (unsigned j = first; j < static_cast<unsigned>(row.n); j += step) {
    const Steps steps = steps_to(*row.rows, j);
    const bool live = row.mask == nullptr || row.mask[steps.mask];
    const T x = read_as(T(), live ? row.x[steps.logits] : filler(In()));
    write_as(grad + steps.grad, live ? any_slope_of<scaled>(x, k) : T(0));
  }
}

// The same number to every instance, without reading them.
template <class T, class In>
SGL_DEVICE void fill(const Row<In>& row, In* grad, unsigned packs, T value, unsigned first, unsigned step) {
  constexpr unsigned kSize = Pack<In>::kSize;
  Pack<In> pack;
#pragma unroll
  for (unsigned v = 0; v < kSize; ++v) write_as(&pack.x[v], value);
  for (unsigned p = first; p < packs; p += step) reinterpret_cast<Pack<In>*>(grad)[p] = pack;
#pragma unroll 1
  for (unsigned j = packs * kSize + first; j < static_cast<unsigned>(row.n); j += step) {
    const Steps steps = steps_to(*row.rows, j);
    write_as(grad + steps.grad, row.mask == nullptr || row.mask[steps.mask] ? value : T(0));
  }
}

// The gradient of a pair from its saved row and the denominators: of the packs and instances that write_gradient says.
template <class T, class In>
SGL_DEVICE void write_row(
    const Call& call, const Row<In>& row, In* row_grad, const T* columns, const T* denominators, T grad_output,
    int64_t cls, unsigned first, unsigned step) {
  const T* pos_weights = static_cast<const T*>(call.pos_weight);
  const T pos_weight = pos_weights == nullptr ? T(1) : pos_weights[cls];
  const Coefficients<T> k = coefficients(columns, denominators, grad_output, pos_weight, call.settings);
  const bool in_packs = row.is_contiguous && call.rows.dimension[0].grad == 1 && lies_on_16_bytes(row_grad);
  const unsigned packs = in_packs ? row.n / Pack<In>::kSize : 0;
  const bool own_loop = row.is_simple && !k.scale.any && has_own_loop(k.pooling_code);
  if (k.kind == Kind::kExcluded || k.kind == Kind::kNonFinite) {
    // No product with 0 or NaN: an excluded pair may hold anything, and a weight of 0 must not hide a NaN.
    fill(row, row_grad, packs, k.kind == Kind::kExcluded ? T(0) : nan_of(T()), first, step);
  } else if (own_loop && k.kind == Kind::kNegative) {
    write_own_loop<Kind::kNegative>(row, row_grad, packs, first, step, k);
  } else if (own_loop && k.kind == Kind::kPositive) {
    write_own_loop<Kind::kPositive>(row, row_grad, packs, first, step, k);
  } else if (k.scale.any) {
    write_general<true>(row, row_grad, first, step, k);
  } else {
    write_general<false>(row, row_grad, first, step, k);
  }
}

template <class T, class In>
__global__ void __maxnreg__(kRegisters<T>) backward_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Backward backward, const int group_bits,
    const Tiling tiling) {
  const Rows& rows = call.rows;
  const T* saved = static_cast<const T*>(backward.saved);
  const uint32_t classes = rows.classes, pairs = rows.units;
  const T* denominators = saved + int64_t{pairs} * kColumns;
  const T* grad_output = static_cast<const T*>(backward.grad_output);
  In* grad = static_cast<In*>(backward.grad);

  const uint32_t groups = blockDim.x >> group_bits, rank = threadIdx.x & ((1u << group_bits) - 1);
  // Neighbouring threads have neighbouring classes, then neighbouring instances.
  const uint32_t at = quotient_of(rank, tiling.across), class_at = rank - at * tiling.across.by;
  for (uint32_t item = blockIdx.x * groups + (threadIdx.x >> group_bits); item < tiling.items;
       item += gridDim.x * groups) {
    const uint32_t strip = quotient_of(item, tiling.pieces), bag = quotient_of(strip, tiling.strips);
    const uint32_t cls = (strip - bag * tiling.strips.by) * tiling.across.by + class_at;
    if (at >= tiling.lengthwise || cls >= classes) continue;
    const uint32_t pair = bag * classes + cls;
    const Place place = place_of(rows, bag, cls);
    const Row<In> row(call, place, tiling.lengthwise);
    write_row(
        call, row, grad + place.grad, saved + int64_t{pair} * kColumns, denominators,
        grad_output[backward.per_pair ? pair : 0], cls, (item - strip * tiling.pieces.by) * tiling.lengthwise + at,
        tiling.pieces.by * tiling.lengthwise);
  }

  if (rows.offsets == nullptr || blockIdx.x > 0) return;
  // rows of no bag, before the first and after the last: there are none where the offsets are right, so one block is enough
  const int64_t begin = clamped(offset_at(rows, 0), 0, rows.positions);
  const int64_t end = clamped(offset_at(rows, rows.bags), begin, rows.positions);
  const int64_t outside = (begin + rows.positions - end) * static_cast<int64_t>(classes);
  In zero;
  write_as(&zero, T(0));
  for (int64_t i = threadIdx.x; i < outside; i += blockDim.x) {
    const int64_t row = i / classes, cls = i - row * classes;
    grad[(row < begin ? row : row - begin + end) * rows.grad_bag + cls * rows.grad_class] = zero;
  }
}

}  // namespace cuda
}  // namespace sgl
