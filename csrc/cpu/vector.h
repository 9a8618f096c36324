// Vectors of floats for the functions of vector_math.h. They use the vector extensions of the compiler, which generates
// the instructions of the level that the file is compiled for. N is the number of floats in a machine vector: 4, 8 or
// 16.
//
// Each object holds two machine vectors. The operations on one instance form a long dependency chain; two independent
// chains hide the latency.
//
// The loops over instances are not left to the auto-vectorizer: whether gcc vectorizes a long loop with conditions
// depends on the surrounding code. Constructors are explicit because gcc compiles implicit ones for the baseline
// instruction set, where they cannot be inlined into code for a higher one.
#pragma once

#include "../vector_math.h"

#if SGL_WIDTH == 16
#include <immintrin.h>
#endif

namespace sgl {

// The vector types of the compiler. They are listed for each N because gcc ignores a vector size that depends on a
// template parameter.
template <int N>
struct Raw;

#define SGL_RAW(N)                                            \
  template <>                                                 \
  struct Raw<N> {                                             \
    typedef float F __attribute__((vector_size(4 * (N))));    \
    typedef float Half __attribute__((vector_size(2 * (N)))); \
    typedef double D __attribute__((vector_size(4 * (N))));   \
    typedef int32_t I __attribute__((vector_size(4 * (N))));  \
    typedef int64_t L __attribute__((vector_size(4 * (N))));  \
    typedef uint32_t U __attribute__((vector_size(4 * (N)))); \
  };
SGL_RAW(4)
SGL_RAW(8)
SGL_RAW(16)

template <int N>
struct Bits {
  typename Raw<N>::U a, b;

  friend SGL_HD Bits operator+(Bits x, uint32_t y) { return {x.a + y, x.b + y}; }
  friend SGL_HD Bits operator-(Bits x, uint32_t y) { return {x.a - y, x.b - y}; }
  friend SGL_HD Bits operator-(Bits x, Bits y) { return {x.a - y.a, x.b - y.b}; }
  friend SGL_HD Bits operator|(Bits x, uint32_t y) { return {x.a | y, x.b | y}; }
  friend SGL_HD Bits operator<<(Bits x, int n) { return {x.a << n, x.b << n}; }
  friend SGL_HD Bits operator>>(Bits x, int n) { return {x.a >> n, x.b >> n}; }
};

// All bits of a lane are 1 if a condition holds, otherwise 0.
template <int N>
struct Mask {
  typename Raw<N>::I a, b;

  friend SGL_HD Mask operator|(Mask x, Mask y) { return {x.a | y.a, x.b | y.b}; }
  friend SGL_HD Mask operator&(Mask x, Mask y) { return {x.a & y.a, x.b & y.b}; }
};

template <int N>
struct Floats {
  using V = typename Raw<N>::F;
  V a, b;

  Floats() = default;
  SGL_HD Floats(V first, V second) : a(first), b(second) {}
  SGL_HD Floats(float every) : a(every - V{}), b(every - V{}) {}

  friend SGL_HD Floats operator+(Floats x, Floats y) { return {x.a + y.a, x.b + y.b}; }
  friend SGL_HD Floats operator-(Floats x, Floats y) { return {x.a - y.a, x.b - y.b}; }
  friend SGL_HD Floats operator*(Floats x, Floats y) { return {x.a * y.a, x.b * y.b}; }
  friend SGL_HD Floats operator/(Floats x, Floats y) { return {x.a / y.a, x.b / y.b}; }
  friend SGL_HD Floats operator-(Floats x) { return {-x.a, -x.b}; }
  SGL_HD Floats& operator+=(Floats y) { return *this = *this + y; }

  friend SGL_HD Mask<N> operator<(Floats x, Floats y) { return {x.a < y.a, x.b < y.b}; }
  friend SGL_HD Mask<N> operator<=(Floats x, Floats y) { return {x.a <= y.a, x.b <= y.b}; }
  friend SGL_HD Mask<N> operator>(Floats x, Floats y) { return {x.a > y.a, x.b > y.b}; }
  friend SGL_HD Mask<N> operator>=(Floats x, Floats y) { return {x.a >= y.a, x.b >= y.b}; }
  friend SGL_HD Mask<N> operator==(Floats x, Floats y) { return {x.a == y.a, x.b == y.b}; }
};

template <int N>
SGL_HD Floats<N> select(Mask<N> condition, Floats<N> x, Floats<N> y) {
  return {condition.a ? x.a : y.a, condition.b ? x.b : y.b};
}

// gcc copies a member of a struct of Floats in pieces of 16 bytes. The loads of whole vectors that follow have to wait for
// all of them, which takes four times as long as the arithmetic of a pass.
template <int N>
SGL_HD Floats<N> value(Floats<N> x) {
  return {x.a, x.b};
}

template <int N>
SGL_HD Bits<N> to_bits(Floats<N> x) {
  return {bits_of<typename Raw<N>::U>(x.a), bits_of<typename Raw<N>::U>(x.b)};
}
template <int N>
SGL_HD Floats<N> from_bits(Bits<N> bits) {
  return {bits_of<typename Raw<N>::F>(bits.a), bits_of<typename Raw<N>::F>(bits.b)};
}

#if SGL_WIDTH == 16

// AVX-512 has instructions for these functions.

SGL_HD Floats<16> times_power_of_two(Floats<16> x, Floats<16> shifted) {
  const Floats<16> n = shifted - kRound;
  return {_mm512_scalef_ps(x.a, n.a), _mm512_scalef_ps(x.b, n.b)};
}

// Error of at most 1 ulp for arguments between 1 and 2, the only ones used. A division takes as long as ten
// multiplications.
SGL_HD Floats<16> reciprocal(Floats<16> x) {
  const Floats<16> guess = {_mm512_rcp14_ps(x.a), _mm512_rcp14_ps(x.b)};
  return guess + guess * (1.0f - x * guess);
}

#endif

// Combines 2N lanes into 8, so that the following operations cost a fraction.
template <int N, class Combine>
SGL_HD Floats<4> narrowed(Floats<N> x, const Combine& combine) {
  if constexpr (N == 4) {
    return x;
  } else {
    const typename Raw<N>::F both = combine(x.a, x.b);
    Floats<N / 2> halves;
    std::memcpy(&halves, &both, sizeof(both));
    return narrowed(halves, combine);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The operations of Floats and double that the loops over a row need. Doubles are processed one by one, because their
// exp and log are function calls.

template <class F>
struct Lanes;

template <int N>
struct Lanes<Floats<N>> {
  using Number = float;
  using Condition = Mask<N>;
  static constexpr int kCount = 2 * N;

  static SGL_HD Floats<N> load(const float* x) {
    Floats<N> v;
    std::memcpy(&v.a, x, sizeof(v.a));
    std::memcpy(&v.b, x + N, sizeof(v.b));
    return v;
  }
  static SGL_HD void store(float* x, Floats<N> v) {
    std::memcpy(x, &v.a, sizeof(v.a));
    std::memcpy(x + N, &v.b, sizeof(v.b));
  }

  // the first `n` lanes
  static SGL_HD Mask<N> first(int64_t n) {
    typename Raw<N>::I lane;
    for (int i = 0; i < N; ++i) lane[i] = i;
    const int32_t end = static_cast<int32_t>(n);
    return {lane < end, lane < end - N};
  }

  using Narrow = Floats<4>;
  static SGL_HD Narrow narrow_sum(Floats<N> x) {
    return narrowed(x, [](auto a, auto b) SGL_INLINED { return a + b; });
  }
  // A combined product has up to 2N / 8 times as many factors. It is at most 2^64.
  static SGL_HD Narrow log_of(LogOfProduct<Floats<N>> product) {
    LogOfProduct<Narrow> all;
    all.excess = narrowed(product.excess, [](auto a, auto b) SGL_INLINED { return a * b + (a + b); });
    return all.log();
  }

  // Adds up floats in double, lane by lane. A vector holds half as many doubles as floats, so there are two vectors.
  struct Sum {
    typename Raw<N>::D low, high;

    SGL_HD Sum() : low{}, high{} {}
    SGL_HD void add(Floats<N> x) {
      const typename Raw<N>::F both = x.a + x.b;
      typename Raw<N>::Half halves[2];
      std::memcpy(halves, &both, sizeof(both));
      low += __builtin_convertvector(halves[0], typename Raw<N>::D);
      high += __builtin_convertvector(halves[1], typename Raw<N>::D);
    }
    SGL_HD double total() const {
      const typename Raw<N>::D both = low + high;
      double lanes[N / 2];
      std::memcpy(lanes, &both, sizeof(both));
      for (int half = N / 4; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      return lanes[0];
    }
  };

  // Counts how often a condition held, at most 2^31 times per lane.
  struct Count {
    typename Raw<N>::I a, b;

    SGL_HD Count() : a{}, b{} {}
    SGL_HD void add(Mask<N> condition) {
      a -= condition.a;
      b -= condition.b;
    }
    SGL_HD int64_t total() const {
      const typename Raw<N>::I both = a + b;
      int64_t n = 0;
      for (int i = 0; i < N; ++i) n += both[i];
      return n;
    }
  };

  template <class Better>
  static SGL_HD float best(Floats<N> x, const Better& better) {
    const Floats<4> v = narrowed(x, [&](auto a, auto b) SGL_INLINED { return better(a, b) ? a : b; });
    const auto both = better(v.a, v.b) ? v.a : v.b;
    const float left = better(both[0], both[2]) ? both[0] : both[2],
                right = better(both[1], both[3]) ? both[1] : both[3];
    return better(left, right) ? left : right;
  }
};

template <>
struct Lanes<double> {
  using Number = double;
  using Condition = bool;
  static constexpr int kCount = 1;

  static SGL_HD double load(const double* x) { return *x; }
  static SGL_HD void store(double* x, double v) { *x = v; }
  static SGL_HD bool first(int64_t n) { return n > 0; }

  using Narrow = double;
  static SGL_HD double narrow_sum(double x) { return x; }
  static SGL_HD double log_of(LogOfProduct<double> product) { return product.log(); }

  struct Sum {
    double v;

    SGL_HD Sum() : v(0) {}
    SGL_HD void add(double x) { v += x; }
    SGL_HD double total() const { return v; }
  };

  struct Count {
    int64_t v;

    SGL_HD Count() : v(0) {}
    SGL_HD void add(bool condition) { v += condition; }
    SGL_HD int64_t total() const { return v; }
  };

  template <class Better>
  static SGL_HD double best(double x, const Better&) {
    return x;
  }
};

}  // namespace sgl
