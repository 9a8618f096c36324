// Backward: the gradient is computed again from the logits and the saved row of each pair (bag, class). A warp or a block
// processes a piece of a pair, or of several pairs whose classes lie side by side in memory. Threads exchange nothing.
#pragma once

#include <type_traits>

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

// The same for what is rare. It chooses kind and pooling for each instance, so that there is one copy of the loop.
template <bool scaled, class T>
SGL_DEVICE T rare_slope_of(T x, const Coefficients<T>& k) {
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

// The gradient slope(x) of pack `first` of the row, of the one `step` packs further on, and so on. Then the instances
// outside of whole packs, in the same way: neighbouring threads have neighbouring instances.
template <class T, class In, class Slope>
SGL_DEVICE void write_gradient(
    const Row<In>& row, In* grad, bool in_packs, unsigned first, unsigned step, const Slope& slope) {
  constexpr unsigned kSize = Pack<In>::kSize;
  const unsigned packs = in_packs ? row.whole_packs : 0, n = row.n;
  if (first < packs) {
    Pack<In> next = row.pack(first);
#pragma unroll 1
    for (unsigned p = first; p < packs; p += step) {
      Pack<In> pack = next;
      // the next one is loaded meanwhile
      if (p + step < packs) next = row.pack(p + step);
#pragma unroll
      for (unsigned v = 0; v < kSize; ++v) write_as(&pack.x[v], slope(read_as(T(), pack.x[v])));
      reinterpret_cast<Pack<In>*>(grad)[p] = pack;
    }
  }
#pragma unroll 1
  for (unsigned j = packs * kSize + first; j < n; j += step) {
    const Steps steps = steps_to(*row.rows, j);
    const bool live = row.mask == nullptr || row.mask[steps.mask];
    const T x = read_as(T(), live ? row.x[steps.logits] : filler(In()));
    write_as(grad + steps.grad, live ? slope(x) : T(0));
  }
}

// The same number to every instance, without reading them.
template <class T, class In>
SGL_DEVICE void fill(const Row<In>& row, In* grad, bool in_packs, T value, unsigned first, unsigned step) {
  constexpr unsigned kSize = Pack<In>::kSize;
  Pack<In> pack;
#pragma unroll
  for (unsigned v = 0; v < kSize; ++v) write_as(&pack.x[v], value);
  const unsigned n = row.n, packs = in_packs && row.mask == nullptr ? n / kSize : 0;
  for (unsigned p = first; p < packs; p += step) reinterpret_cast<Pack<In>*>(grad)[p] = pack;
#pragma unroll 1
  for (unsigned j = packs * kSize + first; j < n; j += step) {
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
  const Rows& rows = call.rows;
  const bool in_packs = rows.dimensions == 1 && rows.dimension[0].grad == 1 && lies_on_16_bytes(row_grad);
  if (k.kind == Kind::kExcluded || k.kind == Kind::kNonFinite) {
    // No product with 0 or NaN: an excluded pair may hold anything, and a weight of 0 must not hide a NaN.
    fill(row, row_grad, in_packs, k.kind == Kind::kExcluded ? T(0) : nan_of(T()), first, step);
  } else if (k.scale.any) {
    write_gradient<T>(row, row_grad, in_packs, first, step, [&](T x) { return rare_slope_of<true>(x, k); });
  } else if (k.kind == Kind::kRounded || k.kind == Kind::kExtremes) {
    write_gradient<T>(row, row_grad, in_packs, first, step, [&](T x) { return rare_slope_of<false>(x, k); });
  } else {
    // chosen once, outside of the loop
    with_pooling(k.pooling_code, [&](auto pooling) {
      using P = decltype(pooling);
      const auto write = [&](auto kind) {
        write_gradient<T>(
            row, row_grad, in_packs, first, step, [&](T x) { return slope_of<P, decltype(kind)::value, false>(x, k); });
      };
      if (k.kind == Kind::kPositive) {
        write(std::integral_constant<Kind, Kind::kPositive>());
      } else if (k.kind == Kind::kNegative) {
        write(std::integral_constant<Kind, Kind::kNegative>());
      } else {
        write(std::integral_constant<Kind, Kind::kBagOnly>());
      }
    });
  }
}

template <class T, class In>
__global__ void __maxnreg__(kRegisters<T>) backward_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Backward backward, const bool warp_per_bag_class,
    const uint32_t pieces) {
  const Rows& rows = call.rows;
  const T* saved = static_cast<const T*>(backward.saved);
  const uint32_t classes = rows.classes, pairs = rows.units, bags = static_cast<uint32_t>(rows.bags);
  const T* denominators = saved + int64_t{pairs} * kColumns;
  const T* grad_output = static_cast<const T*>(backward.grad_output);
  In* grad = static_cast<In*>(backward.grad);

  // 32 bits: division takes a fraction of the instructions of 64 bits (plan_of limits the items)
  const uint32_t size = warp_per_bag_class ? kWarp : blockDim.x;
  const uint32_t groups = blockDim.x / size;
  // Neighbouring threads have neighbouring classes, then neighbouring instances.
  const uint32_t across = classes_across(rows, size), strips = (classes + across - 1) / across;
  const uint32_t rank = threadIdx.x % size, lengthwise = size / across;
  const uint32_t at = rank / across, class_at = rank - at * across;
  for (uint32_t item = blockIdx.x * groups + threadIdx.x / size; item < bags * strips * pieces;
       item += gridDim.x * groups) {
    const uint32_t strip = item / pieces;
    const uint32_t bag = strip / strips, cls = (strip - bag * strips) * across + class_at;
    if (at >= lengthwise || cls >= classes) continue;
    const uint32_t pair = bag * classes + cls;
    const Place place = place_of(rows, bag, cls);
    const Row<In> row(call, place);
    write_row(
        call, row, grad + place.grad, saved + int64_t{pair} * kColumns, denominators,
        grad_output[backward.per_pair ? pair : 0], cls, (item - strip * pieces) * lengthwise + at, pieces * lengthwise);
  }

  if (rows.offsets == nullptr) return;
  // rows of no bag, before the first and after the last: there are none where the offsets are right
  const int64_t begin = clamped(offset_at(rows, 0), 0, rows.positions);
  const int64_t end = clamped(offset_at(rows, rows.bags), begin, rows.positions);
  const int64_t outside = (begin + rows.positions - end) * static_cast<int64_t>(classes);
  In zero;
  write_as(&zero, T(0));
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < outside;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / classes, cls = i - row * classes;
    grad[(row < begin ? row : row - begin + end) * rows.grad_bag + cls * rows.grad_class] = zero;
  }
}

}  // namespace cuda
}  // namespace sgl
