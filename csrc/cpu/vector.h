// Several floats at once, as the arithmetic of vector_math.h takes them: compilers' vectors, which become the instructions of
// whatever level the file is compiled for. N is the number of floats in a vector of the machine: 4, 8 or 16.
//
// Two vectors go side by side: the arithmetic of an instance is one long chain, each step waits for the one before, and
// what a processor looks ahead is about as long as the chain.
//
// Loops of scalars are left to the compiler where nothing depends on it. These are not: whether gcc makes vectors of a
// long loop with conditions in it changes with the code around it. Constructors are written out: gcc compiles implicit
// ones for the baseline, and those cannot be inlined elsewhere.
#pragma once

#include "../vector_math.h"

#if SGL_WIDTH == 16
#include <immintrin.h>
#endif

namespace sgl {

// The compiler's types; spelled out, as gcc forgets the size of a vector where it depends on a template's parameter.
template <int N>
struct Raw;

#define SGL_RAW(N)                                            \
  template <>                                                 \
  struct Raw<N> {                                             \
    typedef float F __attribute__((vector_size(4 * (N))));    \
    typedef float Half __attribute__((vector_size(2 * (N)))); \
    typedef double D __attribute__((vector_size(4 * (N))));   \
    typedef int32_t I __attribute__((vector_size(4 * (N))));  \
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

// All ones where a condition holds, zeros elsewhere.
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

// what AVX-512 has an instruction for

SGL_HD Floats<16> times_power_of_two(Floats<16> x, Floats<16> shifted) {
  const Floats<16> n = shifted - kRound;
  return {_mm512_scalef_ps(x.a, n.a), _mm512_scalef_ps(x.b, n.b)};
}

// at most 1 ulp, for the numbers between 1 and 2 that it is asked: a division takes as long as ten multiplications
SGL_HD Floats<16> reciprocal(Floats<16> x) {
  const Floats<16> guess = {_mm512_rcp14_ps(x.a), _mm512_rcp14_ps(x.b)};
  return guess + guess * (1.0f - x * guess);
}

#endif

// Eight numbers of 2N, each combined from as many lanes: what comes next then costs a fraction.
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
// What loops over a row need of Floats, and of a plain double, which goes one by one: its exp and log are calls anyway.

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
  // up to 2N / 8 times as many factors in one product as without: 2^64 at most
  static SGL_HD Narrow log_of(LogOfProduct<Floats<N>> product) {
    LogOfProduct<Narrow> all;
    all.excess = narrowed(product.excess, [](auto a, auto b) SGL_INLINED { return a * b + (a + b); });
    return all.log();
  }

  // Sums of floats go on in double, lane by lane; twice as many vectors, as they are half as many to a vector.
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

  // How often a condition held; at most 2^31 times in a lane.
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
