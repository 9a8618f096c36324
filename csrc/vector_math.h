// exp, log1p, expm1, sigmoid and softplus, for one number or for a vector of numbers.
//
// F is float, double, or the Floats of cpu/vector.h, which hold several instances. Therefore the code has no branches
// and uses `select` instead of ?:. Values of the whole pair (bag, class) have the scalar type T. This file does not use
// torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SGL_HD __host__ __device__ __forceinline__
// A long function in double: one copy per kernel saves code and registers.
#define SGL_HD_CALL inline __host__ __device__ __noinline__
#else
// Always inline: an out-of-line copy would be compiled for the baseline instruction set.
#define SGL_HD inline __attribute__((always_inline))
#define SGL_HD_CALL SGL_HD
#endif
#if defined(__CUDACC__)
#define SGL_INLINED
#else
#define SGL_INLINED __attribute__((always_inline))  // of a lambda
#endif

namespace sgl {

// ---------------------------------------------------------------------------------------------------------------------
// exp, log1p and expm1. float: polynomials with an error of at most 2 ulp; loops vectorize because there is no function
// call. double: libm.

template <class To, class From>
SGL_HD To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// In place of std::numeric_limits, which device code cannot call.
SGL_HD float infinity_of(float) { return bits_of<float>(0x7f800000u); }
SGL_HD double infinity_of(double) { return bits_of<double>(uint64_t{0x7ff0000000000000u}); }
SGL_HD float nan_of(float) { return bits_of<float>(0x7fc00000u); }
SGL_HD double nan_of(double) { return bits_of<double>(uint64_t{0x7ff8000000000000u}); }

SGL_HD float select(bool condition, float a, float b) { return condition ? a : b; }
SGL_HD double select(bool condition, double a, double b) { return condition ? a : b; }

// x. Of Floats (cpu/vector.h) it is copied vector by vector.
SGL_HD float value(float x) { return x; }
SGL_HD double value(double x) { return x; }

SGL_HD uint32_t to_bits(float x) { return bits_of<uint32_t>(x); }
SGL_HD float from_bits(uint32_t bits) { return bits_of<float>(bits); }

// -|x|
template <class F>
SGL_HD F minus_magnitude(F x) {
  return from_bits(to_bits(x) | 0x80000000u);
}
SGL_HD double minus_magnitude(double x) { return -std::fabs(x); }
#if defined(__CUDA_ARCH__)
SGL_HD float minus_magnitude(float x) { return -fabsf(x); }  // a modifier of the instruction that reads it
#endif

// 1.5 * 2^23: adding it rounds a number to the nearest integer, which is then in the lowest bits of the sum
constexpr float kRound = 12582912.0f;

// x = n ln 2 + r with |r| <= ln 2 / 2. ln 2 is split into two constants so that n times the first is exact.
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

// One GPU instruction each, with errors of at most 2 and 1 ulp. In the emulator, the functions of the host replace
// them.
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

// For -1e38 < x <= 88. The rounding error of the product with log2 e would be many ulp of the result for large |x|, so
// the result is corrected by e^(x - scaled ln 2). ln 2 is split into two constants.
SGL_HD float exp_in_range(float x) {
  const float scaled = x * 1.44269502f;
  const float lost = std::fma(scaled, 1.90465430e-9f, std::fma(scaled, -0.693147182f, x));
  const float result = exp2_instruction(scaled);
  return result * lost + result;
}
// For x <= 88, and 0 below -105.
SGL_HD float exp(float x) { return exp_in_range(std::fmax(x, -105.0f)); }
// 1 / (1 + e^-x) for x < 1e38, without the two cases of `probability`
SGL_HD float sigmoid(float x) { return reciprocal(1.0f + exp_in_range(std::fmin(-x, 88.0f))); }
// a / b, to 2 ulp
SGL_HD float quotient(float a, float b) { return a * reciprocal(b); }

#else

template <class F>
SGL_HD F reciprocal(F x) {
  return 1.0f / x;
}
template <class F>
SGL_HD F quotient(F a, F b) {
  return a / b;
}

// x 2^n from n + kRound, for n > -190. Two factors, because 2^n may be out of the range of floats when the result is
// not.
template <class F>
SGL_HD F times_power_of_two(F x, F shifted) {
  return x * power_of_two(shifted, 64) * 5.42101086e-20f;
}

// For x <= 40. All callers pass arguments <= 0.
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

// log(1 + u) for 0 <= u <= 1, from f = u, or from f = (1 + u) / 2 - 1 if 1 + u > sqrt 2. Both f are exact.
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
  // the float 2^23 + n has n in its lowest bits
  return log1p_polynomial(f) + (from_bits(n + 0x4b000000u) - 8388608.0f) * 0.693147181f + quotient(lost, z);
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
// Probabilities: sigmoid and softplus

// If every p of a pair (or every 1 - p, or every p (1 - p)) is tiny, each is multiplied by a power of e that makes the
// largest about 1. Sums then neither underflow nor lose digits. Any other pair has only zeros here: no scaling.
template <class T>
struct Scale {
  T p, q, pq;  // p is multiplied by e^-p, 1 - p by e^q, p (1 - p) by e^pq
  bool any;
};

// e^-40 is below the rounding error of 1 in double, and far above the smallest float. `nearest` is the smallest |x|,
// for poolings that sum p (1 - p).
template <class T>
SGL_HD Scale<T> scale_of(T low, T high, T nearest = T(0)) {
  const T far = T(40);
  if (!(high < -far || low > far || nearest > far)) return {T(0), T(0), T(0), false};
  return {high < T(0) ? high : T(0), low > T(0) ? low : T(0), nearest, true};
}

template <class F>
struct Probability {
  F u;  // e^-|x|
  F p, q;  // sigmoid(x), sigmoid(-x); 1 - p would lose all precision for p near 1
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

SGL_HD double sigmoid(double x) { return probability<false>(x, Scale<double>{0, 0, 0, false}).p; }

// Sum of log(1 + u) as one logarithm of a product. The product is stored minus 1, so that a tiny u keeps its precision.
// In float, for at most kFactors factors, each at most 2.
template <class F>
struct LogOfProduct {
  static constexpr int kFactors = 16;
  F excess;

  SGL_HD LogOfProduct() : excess(F(0)) {}
  SGL_HD void multiply_by_1_plus(F u) { excess = u * (excess + F(1)) + excess; }
  SGL_HD F log() const { return log1p_any(excess); }
};

// log(1 + e^x) from u = e^-|x|. softplus(-x) = -log p, softplus(x) = -log(1 - p).
template <class F>
SGL_HD F softplus(F x, F u) {
  return select(x > F(0), x, F(0)) + log1p_unit(u);
}

}  // namespace sgl
