// The equations of the Self-Guiding Loss for one instance of a positive bag: theta, M, BCE and its derivative (Eq. 5,
// 6).
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

// For rescale = false, theta = p. This equals rescaling between the logits -inf and inf (p = 0 and p = 1), so the loops
// need no branch.
template <class T>
SGL_HD Guide<T> guide_of(T low, T high, const Scale<T>& scale, double delta_l, bool rescale) {
  const T infinity = infinity_of(T());
  const T delta_h = static_cast<T>(1.0 - delta_l);
  if (!rescale) return {-infinity, infinity, exp(scale.p), T(1), T(-1), static_cast<T>(delta_l), delta_h};
  const T p_high = (scale.any ? probability<true>(high, scale) : probability<false>(high, scale)).scaled_p;
  // 2^64 if the logits are so close together that the reciprocal might be infinite
  const T span = expm1_negative(low - high), lift = span > T(-1e-15) ? T(18446744073709551616.0) : T(1);
  return {low, high, T(1) / p_high, lift, T(1) / (span * lift), static_cast<T>(delta_l), delta_h};
}

// expm1(low - x) / expm1(low - high)
template <class F, class T>
SGL_HD F rise_of(F x, const Guide<T>& g) {
  return (expm1_negative(g.low - x) * g.lift) * g.inverse_span;
}
#if defined(__CUDA_ARCH__) || defined(SGL_EMULATE)
// If the logits differ by ln 2 or more, exp(...) - 1 is precise enough: its error is at most 4 ulp of theta = 1.
SGL_HD float rise_of(float x, const Guide<float>& g) {
  if (g.inverse_span < -2.0f) return rise_of<float, float>(x, g);
  return std::fma(exp2_instruction((g.low - x) * 1.44269504f), g.inverse_span, -g.inverse_span);
}
#endif

// theta = (p - min p) / (max p - min p) (Eq. 5). Differences of probabilities lose precision where the sigmoid
// saturates. sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)) does not, so theta is computed as [p /
// max p] [expm1(min x - x) / expm1(min x - max x)].
template <class F, class T>
SGL_HD F theta_of(F x, const Probability<F>& o, const Guide<T>& g) {
  const F theta = (o.scaled_p * g.inverse_p_high) * rise_of(x, g);
  return select((theta > T(1)) | (x == g.high), F(T(1)), theta);
}

// M (Eq. 6): 0 for negative, 1 for positive, theta for ambiguous instances. The parts are numbers: 1 for the part of
// the instance and 0 for the others. With conditions instead, compilers insert branches and do not vectorize the loops.
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

// BCE from logits, (1 - M) softplus(x) + pos_weight M softplus(-x), without cancellation and without epsilon
template <class F, class T>
SGL_HD F bce(F x, const Probability<F>& o, F m, T pos_weight) {
  const F log1p_u = log1p_unit(o.u);
  const F above = select(x > T(0), x, F(T(0)));
  const F below = above - x;  // exact
  return (T(1) - m) * (above + log1p_u) + pos_weight * m * (below + log1p_u);
}

// d bce / dx. For pos_weight = 1 it is p - M: exactly 0 for M = p, and -(1 - p) without cancellation for M = 1.
template <class F, class T>
SGL_HD F bce_slope(const Probability<F>& o, F m, T pos_weight) {
  const F certain = -pos_weight * o.q;
  const F other = (o.p - m) + (T(1) - pos_weight) * (m * o.q);
  return select(m == T(1), certain, other);
}

}  // namespace sgl
