// Backward on the CPU: computes the gradient of each instance from its logit and the saved row of its pair.
//
// Compiled once per instruction set, each in a separate namespace (SGL_LEVEL).
#pragma once

#include "loops.h"

namespace sgl {
namespace SGL_LEVEL {

template <class Pooling, Kind kind, class T>
void gradient_pass(const T* x, int64_t n, const Coefficients<T>& of_pair, T* grad) {
  if constexpr (kind == Kind::kBagOnly && Pooling::kCode == NoPooling::kCode) {
    for (int64_t j = 0; j < n; ++j) grad[j] = T(0);
  } else {
    using F = typename VectorOf<T>::F;
    const Coefficients<T> k = of_pair;
    map_vectors<F>(x, n, grad, [&](F v) SGL_INLINED {
      const Probability<F> o = probability<false>(v, k.scale);
      F g = instance_slope<kind, false>(v, o, k);
      if (Pooling::kCode != NoPooling::kCode) g += Pooling::template slope<false>(v, o, k.pooling, k.slope1, k.slope2);
      return g;
    });
  }
}

// For any kind and pooling, which are chosen for each vector. This saves code where speed matters less.
template <bool scaled, class T>
void any_gradient_pass(const T* x, int64_t n, const Coefficients<T>& of_pair, T* grad) {
  using F = typename VectorOf<T>::F;
  const Coefficients<T> k = of_pair;
  map_vectors<F>(x, n, grad, [&](F v) SGL_INLINED {
    const Probability<F> o = probability<scaled>(v, k.scale);
    F g = F(T(0));
    if (k.kind == Kind::kPositive) g = instance_slope<Kind::kPositive, scaled>(v, o, k);
    if (k.kind == Kind::kNegative) g = instance_slope<Kind::kNegative, scaled>(v, o, k);
    if (k.kind == Kind::kRounded) g = instance_slope<Kind::kRounded, scaled>(v, o, k);
    if (k.kind == Kind::kExtremes) g = instance_slope<Kind::kExtremes, scaled>(v, o, k);
    with_pooling(k.pooling_code, [&](auto pooling) SGL_INLINED {
      using P = decltype(pooling);
      if (P::kCode != NoPooling::kCode) g += P::template slope<scaled>(v, o, k.pooling, k.slope1, k.slope2);
    });
    return g;
  });
}

template <class T>
void gradient_of(const Coefficients<T>& k, const Row<T>& row, T* grad, ParallelFor parallel_for) {
  for_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
    const T* x = row.x + begin;
    T* g = grad + begin;
    if (k.scale.any) return any_gradient_pass<true>(x, size, k, g);
    // the losses for comparison
    if (k.kind == Kind::kRounded || k.kind == Kind::kExtremes) return any_gradient_pass<false>(x, size, k, g);
    with_pooling(k.pooling_code, [&](auto pooling) {
      using P = decltype(pooling);
      if (k.kind == Kind::kPositive) {
        gradient_pass<P, Kind::kPositive>(x, size, k, g);
      } else if (k.kind == Kind::kNegative) {
        gradient_pass<P, Kind::kNegative>(x, size, k, g);
      } else {
        gradient_pass<P, Kind::kBagOnly>(x, size, k, g);
      }
    });
  });
}

// Whether all instances of the pair have the same gradient, which needs no logits. It is not computed as a product:
// logits of an excluded pair may be NaN, and a weight of 0 must not hide a NaN.
template <class T>
SGL_HD bool has_one_gradient(const T* columns, const T* denominators, T grad_output, int64_t pooling, T& gradient) {
  const Kind kind = kind_of(columns);
  if (kind == Kind::kExcluded || kind == Kind::kNonFinite) {
    gradient = kind == Kind::kExcluded ? T(0) : nan_of(T());
    return true;
  }
  if (kind != Kind::kBagOnly && kind != Kind::kConstant) return false;
  const BagSlopes<T> of_bag = bag_slopes(columns, denominators, grad_output);
  const bool is_zero = pooling == NoPooling::kCode || of_bag.zero();
  gradient = is_zero ? T(0) : of_bag.slope1;
  return is_zero || adds_logits(pooling);
}

template <class T, class Out>
void backward_range_as(
    const Problem<T>& problem, const Backward<T>& saved, Out* grad, int64_t begin, int64_t end, T* scratch,
    ParallelFor parallel_for) {
  const Layout& layout = *problem.layout;
  const T* denominators = saved.rows + layout.bags * layout.classes * kColumns;
  T* row_grad = scratch + row_step(layout);
  RowLoader<T> rows(problem, end, scratch, parallel_for);
  for (PairIndex at(begin, layout.classes); at.pair < end; at.next()) {
    const int64_t pair = at.pair;
    const Instances r = instances_of(layout, at.bag, at.cls);
    if (r.positions == 0) continue;
    const T* columns = saved.rows + pair * kColumns;
    const T grad_output = saved.grad_output[saved.per_pair ? pair : 0];
    T value;
    if (has_one_gradient(columns, denominators, grad_output, problem.settings.pooling, value)) {
      if (rows.together()) {
        const int64_t n = rows.row(pair, r).n;
        for (int64_t j = 0; j < n; ++j) rows.memory(pair)[j] = value;
        rows.replaced(pair, grad);
      } else {
        fill_row(value, problem.mask, r, grad, parallel_for);
      }
      continue;
    }
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[at.cls];
    const Coefficients<T> k = coefficients(columns, denominators, grad_output, pos_weight, problem.settings);
    const Row<T> row = rows.row(pair, r);
    if (rows.together()) {
      gradient_of(k, row, rows.memory(pair), parallel_for);
      rows.replaced(pair, grad);
      continue;
    }
    T* direct = nullptr;
    if constexpr (sizeof(Out) == sizeof(T)) {
      if (problem.mask == nullptr && r.count == 1 && (r.dimensions[0].grad == 1 || r.inner == 1))
        direct = grad + r.grad;
    }
    gradient_of(k, row, direct != nullptr ? direct : row_grad, parallel_for);
    if (direct == nullptr) store_row(row_grad, problem.mask, r, grad, parallel_for);
  }
}

template <class T>
void backward_range(
    const Problem<T>& problem, const Backward<T>& saved, void* grad, int64_t begin, int64_t end, T* scratch,
    ParallelFor parallel_for) {
  if (problem.type == native_type<T>())
    return backward_range_as(problem, saved, static_cast<T*>(grad), begin, end, scratch, parallel_for);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf)
      return backward_range_as(problem, saved, static_cast<Half*>(grad), begin, end, scratch, parallel_for);
    return backward_range_as(problem, saved, static_cast<BFloat16*>(grad), begin, end, scratch, parallel_for);
  }
}

}  // namespace SGL_LEVEL
}  // namespace sgl
