// Backward on the CPU: computes the gradient of each instance from its logit and the saved row of its pair.
//
// Compiled once per instruction set, each in a separate namespace (SGL_LEVEL).
#pragma once

#include "loops.h"

namespace sgl {
namespace SGL_LEVEL {

template <class Pooling, Kind kind, bool scaled, class T>
void gradient_pass(const T* x, int64_t n, const Coefficients<T>& of_pair, T* grad) {
  using F = typename VectorOf<T>::F;
  const Coefficients<T> k = of_pair;
  map_vectors<F>(x, n, grad, [&](F v) SGL_INLINED {
    const Probability<F> o = probability<scaled>(v, k.scale);
    F g = instance_slope<kind, scaled>(v, o, k);
    if (Pooling::kCode != NoPooling::kCode) g += Pooling::template slope<scaled>(v, o, k.pooling, k.slope1, k.slope2);
    return g;
  });
}

template <class Pooling, Kind kind, class T>
void gradient_of_kind(const T* x, int64_t n, const Coefficients<T>& k, T* grad) {
  if constexpr (kind == Kind::kBagOnly && Pooling::kCode == NoPooling::kCode) {
    for (int64_t j = 0; j < n; ++j) grad[j] = T(0);
  } else if (k.scale.any) {
    gradient_pass<Pooling, kind, true>(x, n, k, grad);
  } else {
    gradient_pass<Pooling, kind, false>(x, n, k, grad);
  }
}

template <class T>
void gradient_of(const Coefficients<T>& k, const Row<T>& row, T* grad, ParallelFor parallel_for) {
  for_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
    const T* x = row.x + begin;
    T* g = grad + begin;
    with_pooling(k.pooling_code, [&](auto pooling) {
      using P = decltype(pooling);
      if (k.kind == Kind::kPositive) {
        gradient_of_kind<P, Kind::kPositive>(x, size, k, g);
      } else if (k.kind == Kind::kNegative) {
        gradient_of_kind<P, Kind::kNegative>(x, size, k, g);
      } else if (k.kind == Kind::kRounded) {
        gradient_of_kind<P, Kind::kRounded>(x, size, k, g);
      } else if (k.kind == Kind::kExtremes) {
        gradient_of_kind<P, Kind::kExtremes>(x, size, k, g);
      } else {
        gradient_of_kind<P, Kind::kBagOnly>(x, size, k, g);
      }
    });
  });
}

// Whether all instances of the pair have the same gradient, which needs no logits. It is not computed as a product:
// logits of an excluded pair may be NaN, and a weight of 0 must not hide a NaN.
template <class T>
bool has_one_gradient(const Coefficients<T>& k, T& gradient) {
  if (k.kind == Kind::kExcluded || k.kind == Kind::kNonFinite) {
    gradient = k.kind == Kind::kExcluded ? T(0) : nan_of(T());
    return true;
  }
  if (k.kind != Kind::kBagOnly && k.kind != Kind::kConstant) return false;
  if (k.pooling_code != NoPooling::kCode && !adds_logits(k.pooling_code)) return false;
  gradient = k.pooling_code == NoPooling::kCode ? T(0) : k.slope1;
  return true;
}

template <class T, class Out>
void backward_range_as(
    const Problem<T>& problem, const Backward<T>& saved, Out* grad, int64_t begin, int64_t end, T* scratch,
    ParallelFor parallel_for) {
  const Layout& layout = *problem.layout;
  const T* denominators = saved.rows + layout.bags * layout.classes * kColumns;
  T* row_grad = scratch + row_step(layout);
  RowLoader<T> rows(problem, end, scratch, parallel_for);
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t cls = pair % layout.classes;
    const Instances r = instances_of(layout, pair / layout.classes, cls);
    if (r.positions == 0) continue;
    const T* columns = saved.rows + pair * kColumns;
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[cls];
    const T grad_output = saved.grad_output[saved.per_pair ? pair : 0];
    const Coefficients<T> k = coefficients(columns, denominators, grad_output, pos_weight, problem.settings);
    T value;
    if (has_one_gradient(k, value)) {
      if (rows.together()) {
        const int64_t n = rows.row(pair, r).n;
        for (int64_t j = 0; j < n; ++j) rows.memory(pair)[j] = value;
        rows.replaced(pair, grad);
      } else {
        fill_row(value, problem.mask, r, grad, parallel_for);
      }
      continue;
    }
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
