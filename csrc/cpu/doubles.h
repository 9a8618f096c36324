// Vectors of doubles, for the values of several pairs at once. They have the functions of vector_math.h that a bag loss
// needs. As in vector.h, N is the number of floats in a machine vector, and an object holds two machine vectors.
#pragma once

#include "vector.h"

namespace sgl {

template <int N>
struct DoublesMask {
  typename Raw<N>::L a, b;
};

template <int N>
struct Doubles {
  using V = typename Raw<N>::D;
  static constexpr int kCount = N;
  V a, b;

  Doubles() = default;
  SGL_HD Doubles(V first, V second) : a(first), b(second) {}
  SGL_HD Doubles(double every) : a(every - V{}), b(every - V{}) {}

  static SGL_HD Doubles load(const double* x) {
    Doubles v;
    std::memcpy(&v.a, x, sizeof(v.a));
    std::memcpy(&v.b, x + N / 2, sizeof(v.b));
    return v;
  }
  static SGL_HD void store(double* x, Doubles v) {
    std::memcpy(x, &v.a, sizeof(v.a));
    std::memcpy(x + N / 2, &v.b, sizeof(v.b));
  }

  friend SGL_HD Doubles operator+(Doubles x, Doubles y) { return {x.a + y.a, x.b + y.b}; }
  friend SGL_HD Doubles operator-(Doubles x, Doubles y) { return {x.a - y.a, x.b - y.b}; }
  friend SGL_HD Doubles operator*(Doubles x, Doubles y) { return {x.a * y.a, x.b * y.b}; }
  friend SGL_HD Doubles operator/(Doubles x, Doubles y) { return {x.a / y.a, x.b / y.b}; }
  friend SGL_HD Doubles operator-(Doubles x) { return {-x.a, -x.b}; }

  friend SGL_HD DoublesMask<N> operator<(Doubles x, Doubles y) { return {x.a < y.a, x.b < y.b}; }
  friend SGL_HD DoublesMask<N> operator>(Doubles x, Doubles y) { return {x.a > y.a, x.b > y.b}; }
  friend SGL_HD DoublesMask<N> operator>=(Doubles x, Doubles y) { return {x.a >= y.a, x.b >= y.b}; }
};

template <int N>
SGL_HD Doubles<N> select(DoublesMask<N> condition, Doubles<N> x, Doubles<N> y) {
  return {condition.a ? x.a : y.a, condition.b ? x.b : y.b};
}

template <int N>
SGL_HD Doubles<N> minus_magnitude(Doubles<N> x) {
  return select(x < Doubles<N>(0.0), x, -x);
}

template <int N>
SGL_HD Doubles<N> reciprocal(Doubles<N> x) {
  return 1.0 / x;
}

// x 2^n from n + 1.5 * 2^52, for n > -1600. Two factors, because 2^n may be smaller than the smallest double when the
// result is not.
template <int N>
SGL_HD typename Raw<N>::D times_power_of_two(typename Raw<N>::D x, typename Raw<N>::D shifted) {
  using L = typename Raw<N>::L;
  const L power = (bits_of<L>(shifted) << 52) + (int64_t{1023 + 600} << 52);
  return x * bits_of<typename Raw<N>::D>(power) * 0x1p-600;
}

// e^x for x <= 0: x = n ln 2 + r, and the Taylor series of e^r, |r| <= ln 2 / 2. Its error is at most 1e-17 e^r.
template <int N>
SGL_HD Doubles<N> exp(Doubles<N> x) {
  x = select(x < Doubles<N>(-750.0), Doubles<N>(-750.0), x);  // 0
  const Doubles<N> shifted = x * 1.4426950408889634 + 0x1.8p52;
  const Doubles<N> n = shifted - 0x1.8p52;
  // ln 2 as the sum of two constants. The product of n and the first one is exact.
  const Doubles<N> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  Doubles<N> s = 1.0 / 6227020800;  // 1 / 13!
  for (const double inverse_factorial :
       {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
        1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    s = s * r + inverse_factorial;
  return {times_power_of_two<N>(s.a, shifted.a), times_power_of_two<N>(s.b, shifted.b)};
}

// log(1 + u) for 0 <= u <= 1. As for floats, from f = u, or from f = (1 + u) / 2 - 1 if 1 + u > sqrt 2. Then log(1 + f)
// is the series 2 (s + s^3 / 3 + s^5 / 5 + ...) of s = f / (2 + f), |s| <= 0.172. Its error is at most 1e-18 |s|.
template <int N>
SGL_HD Doubles<N> log1p_unit(Doubles<N> u) {
  const auto low = u < Doubles<N>(0.41421356237309503);
  const Doubles<N> f = select(low, u, (u - 1.0) * 0.5);
  const Doubles<N> s = f / (f + 2.0), square = s * s;
  Doubles<N> sum = 1.0 / 21;
  for (const double inverse : {1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3})
    sum = sum * square + inverse;
  const Doubles<N> twice = s + s, log = twice + twice * (square * sum);
  return select(low, log, log + 0.6931471805599453);
}

}  // namespace sgl
