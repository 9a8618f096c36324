// The equations of the Self-Guiding Loss for one instance of a positive bag: theta, M, BCE and its derivative (Eq. 5, 6).
//
// Equation numbers: Seibold et al., ACCV 2020. No torch here.
#pragma once

#include "vector_math.h"

namespace sgl {

template <class T>
struct Guide {
  T low, high;  // extreme logits
  T inverse_p_high;  // 1 / p at high, scaled as p is
  T lift, inverse_span;  // 1 / (lift expm1(low - high))
  T delta_l, delta_h;
};

// rescale = false gives theta = p. That is rescaling between the logits -inf and inf (p = 0 and p = 1), so the loops need
// no branch for it.
template <class T>
SGL_HD Guide<T> guide_of(T low, T high, const Scale<T>& scale, double delta_l, bool rescale) {
  const T infinity = infinity_of(T());
  const T delta_h = static_cast<T>(1.0 - delta_l);
  if (!rescale) return {-infinity, infinity, exp(scale.p), T(1), T(-1), static_cast<T>(delta_l), delta_h};
  const T p_high = (scale.any ? probability<true>(high, scale) : probability<false>(high, scale)).scaled_p;
  // 2^64 where the instances are so nearly alike that the reciprocal might be infinite
  const T span = expm1_negative(low - high), lift = span > T(-1e-15) ? T(18446744073709551616.0) : T(1);
  return {low, high, T(1) / p_high, lift, T(1) / (span * lift), static_cast<T>(delta_l), delta_h};
}

// theta = (p - min p) / (max p - min p) (Eq. 5). Differences of probabilities lose their digits where the sigmoid
// saturates; sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)) does not, so
// theta = [p / max p] [expm1(min x - x) / expm1(min x - max x)].
template <class F, class T>
SGL_HD F theta_of(F x, const Probability<F>& o, const Guide<T>& g) {
  const F rise = (expm1_negative(g.low - x) * g.lift) * g.inverse_span;
  const F theta = (o.scaled_p * g.inverse_p_high) * rise;
  return select((theta > T(1)) | (x == g.high), F(T(1)), theta);
}

// M (Eq. 6): 0 negative, 1 positive, theta ambiguous. The parts are numbers, 1 for the one that the instance is in: as
// conditions they make compilers branch around the arithmetic of each part, and loops stay scalar.
template <class F>
struct Target {
  F m;
  F negative, ambiguous, positive;
};

template <class F, class T>
SGL_HD Target<F> target_of(F theta, const Guide<T>& g) {
  const F negative = select(theta < g.delta_l, F(T(1)), F(T(0)));
  const F positive = select(theta > g.delta_h, F(T(1)), F(T(0)));
  const F ambiguous = (T(1) - negative) - positive;
  return {positive + ambiguous * theta, negative, ambiguous, positive};
}

// BCE from logits, (1 - M) softplus(x) + pos_weight M softplus(-x): no cancellation, no epsilon
template <class F, class T>
SGL_HD F bce(F x, const Probability<F>& o, F m, T pos_weight) {
  const F log1p_u = log1p_unit(o.u);
  const F above = select(x > T(0), x, F(T(0)));
  const F below = above - x;  // exact
  return (T(1) - m) * (above + log1p_u) + pos_weight * m * (below + log1p_u);
}

// d bce / dx = p - M where pos_weight is 1: exactly 0 where M = p, and with all its digits where M = 1 and p nearly so
template <class F, class T>
SGL_HD F bce_slope(const Probability<F>& o, F m, T pos_weight) {
  const F certain = -pos_weight * o.q;
  const F other = (o.p - m) + (T(1) - pos_weight) * (m * o.q);
  return select(m == T(1), certain, other);
}

}  // namespace sgl
