// The arithmetic of the Self-Guiding Loss for one instance and one bag-class, shared by every device.
//
// What is called per instance is written for any F: a float or double, or the Floats of cpu/vector.h, several instances
// at once. So it has no branches, `select` in place of ?:, and the numbers of the bag-class beside it are a plain T.
// No torch here. Equation numbers: Seibold et al., ACCV 2020.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SGL_HD __host__ __device__ __forceinline__
// long, in double, and not worth a copy in a kernel's code and registers wherever it is called
#define SGL_HD_CALL inline __host__ __device__ __noinline__
#else
// always: a call left standing would run with the instruction set of the baseline, whoever calls
#define SGL_HD inline __attribute__((always_inline))
#define SGL_HD_CALL SGL_HD
#endif

namespace sgl {

// ---------------------------------------------------------------------------------------------------------------------
// exp, log1p and expm1. float: own polynomials, at most 2 ulp, and no call, so that loops vectorize. double: libm.

template <class To, class From>
SGL_HD To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// std::numeric_limits, which device code may not call
SGL_HD float infinity_of(float) { return bits_of<float>(0x7f800000u); }
SGL_HD double infinity_of(double) { return bits_of<double>(uint64_t{0x7ff0000000000000u}); }
SGL_HD float nan_of(float) { return bits_of<float>(0x7fc00000u); }
SGL_HD double nan_of(double) { return bits_of<double>(uint64_t{0x7ff8000000000000u}); }

SGL_HD float select(bool condition, float a, float b) { return condition ? a : b; }
SGL_HD double select(bool condition, double a, double b) { return condition ? a : b; }

SGL_HD uint32_t to_bits(float x) { return bits_of<uint32_t>(x); }
SGL_HD float from_bits(uint32_t bits) { return bits_of<float>(bits); }

// -|x|
template <class F>
SGL_HD F minus_magnitude(F x) {
  return from_bits(to_bits(x) | 0x80000000u);
}
SGL_HD double minus_magnitude(double x) { return -std::fabs(x); }

// 1.5 * 2^23: what is added to it loses its fraction, rounded to nearest, and lies in the lowest bits
constexpr float kRound = 12582912.0f;

// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two pieces, so that n times the first is exact
template <class F>
struct ReducedExponent {
  F r;
  F shifted;  // n + kRound
};

template <class F>
SGL_HD ReducedExponent<F> reduce_exponent(F x) {
  const F shifted = x * 1.44269504088896341f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return {r, shifted};
}

// e^r - 1 for |r| <= ln 2 / 2
template <class F>
SGL_HD F expm1_polynomial(F r) {
  F s = r * 0.0013814559f + 0.0083687352f;
  s = s * r + 0.0416683890f;
  s = s * r + 0.1666652113f;
  s = s * r + 0.4999999404f;
  return s * (r * r) + r;
}

// 2^(n + more) from n + kRound: the bits of kRound itself are shifted out
template <class F>
SGL_HD F power_of_two(F shifted, int more) {
  return from_bits((to_bits(shifted) << 23) + (static_cast<uint32_t>(127 + more) << 23));
}

#if defined(__CUDA_ARCH__) || defined(SGL_EMULATE)

// One instruction each on a GPU, at most 2 and 1 ulp; elsewhere what stands for it in tests.
SGL_HD float exp2_instruction(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
SGL_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// For x <= 88. What the product with log2 e loses to rounding, many ulp of the result where |x| is large, is made good.
SGL_HD float exp(float x) {
  x = x < -105.0f ? -105.0f : x;  // 0
  const float scaled = x * 1.44269502f;
  const float lost = std::fma(x, 1.92596303e-8f, std::fma(x, 1.44269502f, -scaled));
  const float result = exp2_instruction(scaled);
  return result * (lost * 0.693147181f) + result;
}

#else

template <class F>
SGL_HD F reciprocal(F x) {
  return 1.0f / x;
}

// x 2^n from n + kRound, for n > -190. In two factors: as one, 2^n leaves the range of floats where the result does not yet.
template <class F>
SGL_HD F times_power_of_two(F x, F shifted) {
  return x * power_of_two(shifted, 64) * 5.42101086e-20f;
}

// For x <= 40, which is all that is needed: what is called has arguments <= 0.
template <class F>
SGL_HD F exp(F x) {
  x = select(x < -105.0f, F(-105.0f), x);  // 0
  const ReducedExponent<F> e = reduce_exponent(x);
  return times_power_of_two(expm1_polynomial(e.r) + 1.0f, e.shifted);
}

#endif

// e^x - 1 for x <= 0
template <class F>
SGL_HD F expm1_negative(F x) {
  x = select(x < -40.0f, F(-40.0f), x);  // -1
  const ReducedExponent<F> e = reduce_exponent(x);
  const F scale = power_of_two(e.shifted, 0);
  return expm1_polynomial(e.r) * scale + (scale - 1.0f);
}

// log(1 + f) for 1 / sqrt 2 <= 1 + f <= sqrt 2
template <class F>
SGL_HD F log1p_polynomial(F f) {
  F s = f * -0.0763449669f + 0.1276157647f;
  s = s * f - 0.1316018254f;
  s = s * f + 0.1420175731f;
  s = s * f - 0.1662335694f;
  s = s * f + 0.2000122666f;
  s = s * f - 0.2500081956f;
  s = s * f + 0.3333333135f;
  const F square = f * f;
  return s * (f * square) - square * 0.5f + f;
}

// log(1 + u) for 0 <= u <= 1, from f = u, or f = (1 + u) / 2 - 1 where 1 + u > sqrt 2: both exact
template <class F>
SGL_HD F log1p_unit(F u) {
  const auto low = u < 0.41421356f;
  const F s = log1p_polynomial(select(low, u, (u - 1.0f) * 0.5f));
  return select(low, s, s + 0.693147181f);
}

// log(1 + e) for e >= 0
template <class F>
SGL_HD F log1p_any(F e) {
  const F z = e + 1.0f;
  const F lost = e - (z - 1.0f);  // exact
  // z = 2^n (1 + f)
  const auto n = (to_bits(z) - 0x3f3504f3u) >> 23;
  const F f = from_bits(to_bits(z) - (n << 23)) - 1.0f;
  // 2^23 + n as a float has n in its lowest bits
  return log1p_polynomial(f) + (from_bits(n + 0x4b000000u) - 8388608.0f) * 0.693147181f + lost / z;
}

SGL_HD double reciprocal(double x) { return 1.0 / x; }
SGL_HD_CALL double exp(double x) { return std::exp(x); }
SGL_HD_CALL double log(double x) { return std::log(x); }
SGL_HD_CALL double expm1(double x) { return std::expm1(x); }
SGL_HD_CALL double log1p(double x) { return std::log1p(x); }
SGL_HD double expm1_negative(double x) { return expm1(x); }
SGL_HD double log1p_unit(double u) { return log1p(u); }
SGL_HD double log1p_any(double e) { return log1p(e); }

// ---------------------------------------------------------------------------------------------------------------------
// Probabilities

enum Pooling : int64_t {
  kNone = 0,  // the bag loss is someone else's
  kMax = 1,
  kMean = 2,
  kMeanLogits = 3,
  kSoftmax = 4,
  kLinearSoftmax = 5,
  kLSE = 6,
  kNoisyOr = 7,
};

// A bag-class whose every p (or every 1 - p, or p (1 - p)) is tiny has them multiplied by a power of e that makes the
// largest about 1: sums then neither underflow nor lose digits. All 0, so no scaling, in any other bag-class.
template <class T>
struct Scale {
  T p, q, pq;  // p is multiplied by e^-p, 1 - p by e^q, p (1 - p) by e^pq
  bool any;
};

// e^-40: below the rounding of double beside 1, far above the smallest float
template <class T>
SGL_HD Scale<T> scale_of(T low, T high, T nearest_to_zero, int64_t pooling) {
  const T far = T(40);
  const bool any = high < -far || low > far || (pooling == kLinearSoftmax && nearest_to_zero > far);
  if (!any) return {T(0), T(0), T(0), false};
  return {high < T(0) ? high : T(0), low > T(0) ? low : T(0), nearest_to_zero, true};
}

template <class F>
struct Probability {
  F u;  // e^-|x|
  F p, q;  // sigmoid(x), sigmoid(-x): 1 - p would have no digits left where p is near 1
  F scaled_p, scaled_q, scaled_pq;
};

template <bool scaled, class F, class T>
SGL_HD Probability<F> probability(F x, const Scale<T>& scale) {
  Probability<F> o;
  o.u = exp(minus_magnitude(x));
  const F larger = reciprocal(T(1) + o.u);
  const F smaller = o.u * larger;
  const auto positive = x >= T(0);
  o.p = select(positive, larger, smaller);
  o.q = select(positive, smaller, larger);
  if (scaled) {
    o.scaled_p = exp(select(positive, F(T(0)), x) - scale.p) * larger;
    o.scaled_q = exp(scale.q - select(positive, x, F(T(0)))) * larger;
    o.scaled_pq = exp(scale.pq + minus_magnitude(x)) * larger * larger;
  } else {
    o.scaled_p = o.p;
    o.scaled_q = o.q;
    o.scaled_pq = smaller * larger;
  }
  return o;
}

// Sum of log(1 + u) as one logarithm of a product, which is kept as its excess over 1, so that nothing of a tiny u is
// lost. In float for at most kFactors factors of at most 2.
template <class F>
struct LogOfProduct {
  static constexpr int kFactors = 16;
  F excess;

  SGL_HD LogOfProduct() : excess(F(0)) {}
  SGL_HD void multiply_by_1_plus(F u) { excess = u * (excess + F(1)) + excess; }
  SGL_HD F log() const { return log1p_any(excess); }
};

// log(1 + e^x) from u = e^-|x|; softplus(-x) is -log p, softplus(x) is -log(1 - p)
template <class F>
SGL_HD F softplus(F x, F u) {
  return select(x > F(0), x, F(0)) + log1p_unit(u);
}

// ---------------------------------------------------------------------------------------------------------------------
// Self-guidance of a positive bag-class (Eq. 5, 6)

template <class T>
struct Guide {
  T low, high;  // extreme logits
  T inverse_p_high;  // 1 / p at high, scaled as p is
  T lift, inverse_span;  // 1 / (lift expm1(low - high))
  T delta_l, delta_h;
};

// rescale = false takes theta = p: that is rescaling between the logits -inf and inf, p = 0 and p = 1, and as such costs
// the loops no branch.
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

// ---------------------------------------------------------------------------------------------------------------------
// Lower median

// Floats in their order as integers, and back
SGL_HD int32_t order_of(float x) {
  const int32_t bits = bits_of<int32_t>(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
SGL_HD int64_t order_of(double x) {
  const int64_t bits = bits_of<int64_t>(x);
  return bits < 0 ? bits ^ 0x7fffffffffffffff : bits;
}
SGL_HD float at_order(int32_t order) { return bits_of<float>(order < 0 ? order ^ 0x7fffffff : order); }
SGL_HD double at_order(int64_t order) { return bits_of<double>(order < 0 ? order ^ 0x7fffffffffffffff : order); }

// As torch.median has it: the smallest of n numbers that half of them do not exceed. By passes that only compare and
// count, several times faster than one selection that moves numbers about, and the same on every device.
//
// The median lies between two ends, of which it is known how many numbers they are not exceeded by. Most passes look
// where a straight line between the ends has it, which takes a smooth distribution five to eight; the first looks at
// `guess`, best the mean. So that none takes many, some passes halve the floats in between, and some look just below the
// largest number that is not above the upper end: several numbers may be equal to the median.
//
// count_up_to(pivot): how many are <= pivot; largest_up_to(pivot): the largest of those.
template <class T, class Count, class Largest>
SGL_HD T
lower_median(int64_t n, T smallest, T largest, T guess, const Count& count_up_to, const Largest& largest_up_to) {
  const int64_t wanted = (n + 1) / 2;
  auto low = order_of(smallest), high = order_of(largest);
  T left = smallest, right = largest, count_left = T(0), count_right = static_cast<T>(n);
  for (int step = 0; low < high; ++step) {
    auto middle = (low & high) + ((low ^ high) >> 1);  // rounded down, without overflow
    if (step % 8 == 7) {
      right = largest_up_to(right);
      const auto order = order_of(right);
      high = order < high ? order : high;  // not if it is 0 and was -0
      if (low >= high) break;
      middle = high - 1;
    } else if (step % 4 != 3 && (step < 8 || step % 2 == 0)) {
      const T share = (static_cast<T>(wanted) - T(0.5) - count_left) / (count_right - count_left);
      const auto order = order_of(step == 0 ? guess : left + (right - left) * share);
      if (order >= low && order < high) middle = order;
    }
    const T pivot = at_order(middle);
    const int64_t count = count_up_to(pivot);
    if (count == wanted) return largest_up_to(pivot);
    if (count > wanted) {
      high = middle;
      right = pivot;
      count_right = static_cast<T>(count);
    } else {
      low = middle + 1;
      left = pivot;
      count_left = static_cast<T>(count);
    }
  }
  return at_order(low);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pooling: bag logit z = log P - log(1 - P) from up to three sums over the instances (Eq. 3, 4), and dz/dx from two
// numbers of the bag-class. Weighted means share z = log sum w p - log sum w q, as 1 - P = sum w q / sum w.

template <class T>
struct PoolingSettings {
  T parameter;
  T high;  // largest logit
  T p_reference;  // softmax: p where the weight e^(a p) is largest; weights are relative to it
  T q_high;  // lse: q of the largest logit
};

template <class T>
SGL_HD PoolingSettings<T> pooling_settings(int64_t pooling, T low, T high, double parameter) {
  if (pooling != kSoftmax && pooling != kLSE) return {static_cast<T>(parameter), high, T(0), T(0)};  // nobody asks
  const Scale<T> none{T(0), T(0), T(0), false};
  const Probability<T> at_low = probability<false>(low, none), at_high = probability<false>(high, none);
  return {static_cast<T>(parameter), high, parameter >= 0 ? at_high.p : at_low.p, at_high.q};
}

template <class F>
struct PoolingTerms {
  F a, b, c;
};

// how much e^(r p) falls short of the largest, as r (q - min q) >= 0
template <class F, class T>
SGL_HD F lse_shortfall(const Probability<F>& o, const PoolingSettings<T>& s) {
  const F d = o.q - s.q_high;
  return s.parameter * select(d > T(0), d, F(T(0)));
}

template <int64_t pooling, bool scaled, class F, class T>
SGL_HD PoolingTerms<F> pooling_terms(F x, const Probability<F>& o, const Scale<T>& scale, const PoolingSettings<T>& s) {
  const F zero = F(T(0));
  if (pooling == kMax) return {select(x == s.high, F(T(1)), zero), zero, zero};
  if (pooling == kMean) return {o.scaled_p, o.scaled_q, zero};
  if (pooling == kMeanLogits) return {x, zero, zero};
  if (pooling == kSoftmax) {
    const F weight = exp(s.parameter * (o.p - s.p_reference));
    return {weight * o.scaled_p, weight * o.scaled_q, zero};
  }
  if (pooling == kLinearSoftmax) return {o.scaled_p * o.scaled_p, o.scaled_pq, zero};
  if (pooling == kLSE) {
    if (scaled) return {o.scaled_p, o.scaled_q, zero};  // r p (or r q) is tiny: the mean
    const F shortfall = lse_shortfall(o, s);
    const F weight = exp(-shortfall);
    return {-weight * expm1_negative(-s.parameter * o.p), weight, -expm1_negative(-shortfall)};
  }
  // noisy_or: -log(1 - p), which is p where p is tiny
  if (scaled && scale.p < T(0)) return {o.scaled_p, zero, zero};
  return {softplus(x, o.u), zero, zero};
}

struct BagLogit {
  double z;
  double slope1, slope2;  // what pooling_slope needs of the bag-class
};

SGL_HD BagLogit finish_pooling(
    int64_t pooling, double a, double b, double c, int64_t count, double high, const Scale<double>& scale,
    double parameter) {
  const double n = static_cast<double>(count);
  switch (pooling) {
    case kMax:
      return {high, 1 / a, 0};
    case kMean:
    case kSoftmax:
      return {log(a) + scale.p - log(b) + scale.q, 1 / a, 1 / b};
    case kMeanLogits:
      return {a / n, 1 / n, 0};
    case kLinearSoftmax:
      return {log(a) + 2 * scale.p - log(b) + scale.pq, 1 / a, 1 / b};
    case kLSE: {
      if (scale.p < 0) return {log(a / n) + scale.p, 1 / a, 0};
      if (scale.q > 0) return {scale.q - log(b / n), 0, 1 / b};
      // With weights e^(r (p - max p)): P = max p + log(mean weight) / r cancels where P is small, and
      // P = log1p(mean(e^(rp) - 1)) / r is used there; Q = 1 - P = min q - log(mean weight) / r never cancels.
      const Probability<double> o = probability<false>(high, Scale<double>{0, 0, 0, false});
      const double loss = c / n < 0.5 ? -log1p(-c / n) : -log(b / n);
      const double largest = parameter * o.p;
      const double log_mean = largest > 1 ? largest + log(a / n + exp(-largest)) : log1p(a / n * exp(largest));
      double p = log_mean / parameter, q = o.q + loss / parameter;
      double z;
      if (p < 0.5) {
        q = 1 - p;
        z = log(p) - log1p(-p);
      } else {
        p = 1 - q;
        z = log1p(-q) - log(q);
      }
      return {z, 1 / (b * p * q), 0};
    }
    case kNoisyOr: {
      // a = -log(1 - P), scaled as p is
      if (scale.p < 0) return {log(a) + scale.p, 1 / a, 0};
      const double p = -expm1(-a);
      return {a + log(p), 1 / p, 0};
    }
    default:
      return {0, 0, 0};
  }
}

// dz/dx
template <int64_t pooling, bool scaled, class F, class T>
SGL_HD F pooling_slope(F x, const Probability<F>& o, const PoolingSettings<T>& s, T slope1, T slope2) {
  if (pooling == kMax) return select(x == s.high, F(slope1), F(T(0)));
  if (pooling == kMeanLogits) return F(slope1);
  if (pooling == kMean) return o.scaled_p * o.q * slope1 + o.p * o.scaled_q * slope2;
  if (pooling == kSoftmax) {
    const F ap = s.parameter * o.p, aq = s.parameter * o.q;
    return exp(s.parameter * (o.p - s.p_reference)) *
           (o.scaled_p * o.q * (T(1) + ap) * slope1 + o.p * o.scaled_q * (T(1) - aq) * slope2);
  }
  if (pooling == kLinearSoftmax)
    return T(2) * o.scaled_p * o.scaled_p * o.q * slope1 - o.scaled_pq * (o.q - o.p) * slope2;
  if (pooling == kLSE) {
    if (scaled) return o.scaled_p * o.q * slope1 + o.p * o.scaled_q * slope2;
    return exp(-lse_shortfall(o, s)) * (o.p * o.q) * slope1;
  }
  return o.scaled_p * slope1;  // noisy_or
}

}  // namespace sgl
