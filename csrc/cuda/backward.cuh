// Backward: the gradient is computed again from the logits and the saved row of each pair (bag, class). A warp or a block
// processes a piece of a pair, and every thread a few neighbouring instances. Threads exchange nothing.
#pragma once

#include "group.cuh"
#include "rows.cuh"

namespace sgl {
namespace cuda {

template <bool scaled, class T>
SGL_DEVICE T slope_of(T x, const Coefficients<T>& k) {
  const Probability<T> o = probability<scaled>(x, k.scale);
  T g = T(0);
  // The kind and the pooling are the same for the whole group: no warp diverges.
  if (k.kind == Kind::kNegative) g = instance_slope<Kind::kNegative, scaled>(x, o, k);
  if (k.kind == Kind::kPositive) g = instance_slope<Kind::kPositive, scaled>(x, o, k);
  if (k.kind == Kind::kRounded) g = instance_slope<Kind::kRounded, scaled>(x, o, k);
  if (k.kind == Kind::kExtremes) g = instance_slope<Kind::kExtremes, scaled>(x, o, k);
  return g + with_pooling(k.pooling_code, [&](auto pooling) {
           return decltype(pooling)::template slope<scaled>(x, o, k.pooling, k.slope1, k.slope2);
         });
}

// The gradient of pack p of the row, of the one `step` packs further on, and so on.
template <bool scaled, class T, class In>
SGL_DEVICE void write_gradient(const Row<In>& row, In* grad, bool in_packs, const Coefficients<T>& k, int p, int step) {
  constexpr int kSize = Pack<In>::kSize;
  if (in_packs && p < row.whole_packs) {
    Pack<In> next = row.pack(p);
#pragma unroll 1
    for (; p < row.whole_packs; p += step) {
      Pack<In> pack = next;
      // the next one is loaded meanwhile
      if (p + step < row.whole_packs) next = row.pack(p + step);
#pragma unroll
      for (int v = 0; v < kSize; ++v) write_as(&pack.x[v], slope_of<scaled>(read_as(T(), pack.x[v]), k));
      reinterpret_cast<Pack<In>*>(grad)[p] = pack;
    }
  }
#pragma unroll 1
  for (; p * kSize < row.n; p += step) {
#pragma unroll 1
    for (int j = p * kSize; j < p * kSize + kSize && j < row.n; ++j) {
      const Steps steps = steps_to(*row.rows, j);
      const bool live = row.mask == nullptr || row.mask[steps.mask];
      const T x = read_as(T(), live ? row.x[steps.logits] : filler(In()));
      write_as(grad + steps.grad, live ? slope_of<scaled>(x, k) : T(0));
    }
  }
}

// The same number to every instance.
template <class T, class In>
SGL_DEVICE void fill(const Row<In>& row, In* grad, bool in_packs, T value, int p, int step) {
  constexpr int kSize = Pack<In>::kSize;
  Pack<In> pack;
#pragma unroll
  for (int v = 0; v < kSize; ++v) write_as(&pack.x[v], value);
  const int whole_packs = in_packs && row.mask == nullptr ? row.n / kSize : 0;
  for (; p < whole_packs; p += step) reinterpret_cast<Pack<In>*>(grad)[p] = pack;
#pragma unroll 1
  for (; p * kSize < row.n; p += step) {
#pragma unroll 1
    for (int j = p * kSize; j < p * kSize + kSize && j < row.n; ++j) {
      const Steps steps = steps_to(*row.rows, j);
      write_as(grad + steps.grad, row.mask == nullptr || row.mask[steps.mask] ? value : T(0));
    }
  }
}

// The gradient of a pair from its saved row and the denominators: of pack `first`, of the one `step` further on, and so on.
template <class T, class In>
SGL_DEVICE void write_row(
    const Call& call, const Row<In>& row, In* row_grad, const T* columns, const T* denominators, T grad_output,
    int64_t cls, int first, int step) {
  const T* pos_weights = static_cast<const T*>(call.pos_weight);
  const T pos_weight = pos_weights == nullptr ? T(1) : pos_weights[cls];
  const Coefficients<T> k = coefficients(columns, denominators, grad_output, pos_weight, call.settings);
  const Rows& rows = call.rows;
  const bool in_packs = rows.dimensions == 1 && rows.dimension[0].grad == 1 && lies_on_16_bytes(row_grad);
  if (k.kind == Kind::kExcluded || k.kind == Kind::kNonFinite) {
    // No product with 0 or NaN: an excluded pair may hold anything, and a weight of 0 must not hide a NaN.
    fill(row, row_grad, in_packs, k.kind == Kind::kExcluded ? T(0) : nan_of(T()), first, step);
  } else if (k.scale.any) {
    write_gradient<true>(row, row_grad, in_packs, k, first, step);
  } else {
    write_gradient<false>(row, row_grad, in_packs, k, first, step);
  }
}

template <class T, class In>
__global__ void __maxnreg__(kRegisters<T>) backward_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Backward backward, const bool warp_per_bag_class,
    const uint32_t pieces) {
  const Rows& rows = call.rows;
  const T* saved = static_cast<const T*>(backward.saved);
  const uint32_t classes = rows.classes, pairs = rows.units;
  const T* denominators = saved + int64_t{pairs} * kColumns;
  const T* grad_output = static_cast<const T*>(backward.grad_output);
  In* grad = static_cast<In*>(backward.grad);

  // 32 bits: division takes a fraction of the instructions of 64 bits (plan_of limits the items)
  const uint32_t size = warp_per_bag_class ? kWarp : blockDim.x;
  const uint32_t groups = blockDim.x / size;
  for (uint32_t item = blockIdx.x * groups + threadIdx.x / size; item < pairs * pieces; item += gridDim.x * groups) {
    const uint32_t pair = item / pieces;
    const uint32_t bag = pair / classes, cls = pair - bag * classes;
    const Place place = place_of(rows, bag, cls);
    const Row<In> row(call, place);
    const int first = static_cast<int>((item - pair * pieces) * size + threadIdx.x % size);
    write_row(
        call, row, grad + place.grad, saved + int64_t{pair} * kColumns, denominators,
        grad_output[backward.per_pair ? pair : 0], cls, first, static_cast<int>(pieces * size));
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
