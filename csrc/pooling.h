// Pooling: the bag logit z = log P - log(1 - P) of a pair (bag, class), and its derivative dz/dx (Eq. 3, 4).
//
// Each pooling is one struct. Kernels select it by its code with with_pooling() and sum its terms over the instances.
// docs/adding-a-pooling.md explains how to add a pooling.
#pragma once

#include "vector_math.h"

namespace sgl {

// ---------------------------------------------------------------------------------------------------------------------
// Inputs and outputs of the poolings

// A value of the pair that a pooling needs before its terms are summed. Forward computes it in a separate pass.
enum class Reference {
  kNone,
  kNearestToZero,  // the smallest |x|
  kKthLargest,  // the k-th largest x, and the weight of the instances tied for it
};

// Summary of the logits of a pair.
template <class T>
struct Extent {
  T low, high;  // smallest and largest logit
  T reference;  // the value that the pooling's kReference names; 0 for kNone
  T tie_weight;  // kKthLargest: weight of an instance equal to the reference, above 0 and at most 1
};

// Values of the pair that terms() and slope() need.
template <class T>
struct PoolingSettings {
  T parameter;
  T high;  // largest logit
  T reference, tie_weight;  // their meaning depends on the pooling
};

// Up to three terms of an instance. They are summed over the pair.
template <class F>
struct PoolingTerms {
  F a, b, c;
};

// The results of the passes over a pair.
struct PooledPair {
  double sum[3];  // sums of the terms
  int64_t n;  // instances
  Extent<double> extent;
  Scale<double> scale;
  double parameter;
};

struct BagLogit {
  double z;
  double slope1, slope2;  // values of the pair that slope() needs
};

// ---------------------------------------------------------------------------------------------------------------------
// The poolings. A struct has
//   kCode, kName    its code for the operators and its name in Python
//   kSums           the number of terms that it uses
//   kReference      the value of the pair that it needs before its terms are summed
//   kCountsMaxima   whether its only term is 1 for each instance equal to the largest
//   kAddsLogits     whether its only term is the logit
//   kParameter      whether it has a parameter; otherwise the parameter is 1
//   kOwnLoop        whether backward on CUDA has a separate loop for it, which is faster but takes time to compile
//   scale           exponents of the powers of e by which p, 1 - p and p (1 - p) are multiplied, so that sums stay in range
//   settings        values of the pair that its terms and its slope need
//   terms           the terms of an instance, which are summed over the pair
//   finish          the bag logit from the sums
//   slope           dz/dx of an instance

struct PoolingBase {
  static constexpr int kSums = 2;
  static constexpr Reference kReference = Reference::kNone;
  static constexpr bool kCountsMaxima = false, kAddsLogits = false, kParameter = false, kOwnLoop = false;

  template <class T>
  static SGL_HD Scale<T> scale(const Extent<T>& e) {
    return scale_of(e.low, e.high);
  }
  template <class T>
  static SGL_HD PoolingSettings<T> settings(const Extent<T>& e, double parameter) {
    return {static_cast<T>(parameter), e.high, T(0), T(0)};
  }
};

// P = sum w p / sum w. Then 1 - P = sum w q / sum w, and z = log sum w p - log sum w q.
struct WeightedMean : PoolingBase {
  static SGL_HD BagLogit finish(const PooledPair& s) {
    return {log(s.sum[0]) + s.scale.p - log(s.sum[1]) + s.scale.q, 1 / s.sum[0], 1 / s.sum[1]};
  }
  // dz/dx for constant weights
  template <class F, class T>
  static SGL_HD F mean_slope(const Probability<F>& o, T slope1, T slope2) {
    return o.scaled_p * o.q * slope1 + o.p * o.scaled_q * slope2;
  }
};

// No bag loss in the operator: Python computes it.
struct NoPooling : PoolingBase {
  static constexpr int64_t kCode = 0;
  static constexpr const char* kName = "none";
  static constexpr bool kOwnLoop = true;
  static constexpr int kSums = 0;

  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F, const Probability<F>&, const Scale<T>&, const PoolingSettings<T>&) {
    return {F(T(0)), F(T(0)), F(T(0))};
  }
  static SGL_HD BagLogit finish(const PooledPair&) { return {0, 0, 0}; }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>&, const PoolingSettings<T>&, T, T) {
    return F(T(0));
  }
};

// P = max p
struct MaxPooling : PoolingBase {
  static constexpr int64_t kCode = 1;
  static constexpr const char* kName = "max";
  static constexpr bool kOwnLoop = true;
  static constexpr int kSums = 1;
  static constexpr bool kCountsMaxima = true;

  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F x, const Probability<F>&, const Scale<T>&, const PoolingSettings<T>& s) {
    return {select(x == s.high, F(T(1)), F(T(0))), F(T(0)), F(T(0))};
  }
  static SGL_HD BagLogit finish(const PooledPair& s) { return {s.extent.high, 1 / s.sum[0], 0}; }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F x, const Probability<F>&, const PoolingSettings<T>& s, T slope1, T) {
    return select(x == s.high, F(slope1), F(T(0)));
  }
};

// P = mean p
struct MeanPooling : WeightedMean {
  static constexpr int64_t kCode = 2;
  static constexpr const char* kName = "mean";

  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F, const Probability<F>& o, const Scale<T>&, const PoolingSettings<T>&) {
    return {value(o.scaled_p), value(o.scaled_q), F(T(0))};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>& o, const PoolingSettings<T>&, T slope1, T slope2) {
    return mean_slope(o, slope1, slope2);
  }
};

// P = sigmoid(mean x)
struct MeanLogitsPooling : PoolingBase {
  static constexpr int64_t kCode = 3;
  static constexpr const char* kName = "mean_logits";
  static constexpr int kSums = 1;
  static constexpr bool kAddsLogits = true;

  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F x, const Probability<F>&, const Scale<T>&, const PoolingSettings<T>&) {
    return {value(x), F(T(0)), F(T(0))};
  }
  static SGL_HD BagLogit finish(const PooledPair& s) {
    const double n = static_cast<double>(s.n);
    return {s.sum[0] / n, 1 / n, 0};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>&, const PoolingSettings<T>&, T slope1, T) {
    return F(slope1);
  }
};

// P = sum p e^(a p) / sum e^(a p), with a as parameter. The weights are relative to the largest.
struct SoftmaxPooling : WeightedMean {
  static constexpr int64_t kCode = 4;
  static constexpr const char* kName = "softmax";
  static constexpr bool kOwnLoop = true;

  template <class T>
  static SGL_HD PoolingSettings<T> settings(const Extent<T>& e, double parameter) {
    const Scale<T> none{T(0), T(0), T(0), false};
    const T p = probability<false>(parameter >= 0 ? e.high : e.low, none).p;
    return {static_cast<T>(parameter), e.high, p, T(0)};
  }
  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F, const Probability<F>& o, const Scale<T>&, const PoolingSettings<T>& s) {
    const F weight = exp(s.parameter * (o.p - s.reference));
    return {weight * o.scaled_p, weight * o.scaled_q, F(T(0))};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>& o, const PoolingSettings<T>& s, T slope1, T slope2) {
    const F ap = s.parameter * o.p, aq = s.parameter * o.q;
    return exp(s.parameter * (o.p - s.reference)) *
           (o.scaled_p * o.q * (T(1) + ap) * slope1 + o.p * o.scaled_q * (T(1) - aq) * slope2);
  }
};

// P = sum p^2 / sum p
struct LinearSoftmaxPooling : PoolingBase {
  static constexpr int64_t kCode = 5;
  static constexpr const char* kName = "linear_softmax";
  static constexpr Reference kReference = Reference::kNearestToZero;

  // Every p (1 - p) may be tiny although neither all p nor all 1 - p are.
  template <class T>
  static SGL_HD Scale<T> scale(const Extent<T>& e) {
    return scale_of(e.low, e.high, e.reference);
  }
  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F, const Probability<F>& o, const Scale<T>&, const PoolingSettings<T>&) {
    return {o.scaled_p * o.scaled_p, value(o.scaled_pq), F(T(0))};
  }
  static SGL_HD BagLogit finish(const PooledPair& s) {
    return {log(s.sum[0]) + 2 * s.scale.p - log(s.sum[1]) + s.scale.pq, 1 / s.sum[0], 1 / s.sum[1]};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>& o, const PoolingSettings<T>&, T slope1, T slope2) {
    return T(2) * o.scaled_p * o.scaled_p * o.q * slope1 - o.scaled_pq * (o.q - o.p) * slope2;
  }
};

// P = (1/r) log mean e^(r p), with r > 0 as parameter
struct LSEPooling : WeightedMean {
  static constexpr int64_t kCode = 6;
  static constexpr const char* kName = "lse";
  static constexpr int kSums = 3;
  static constexpr bool kParameter = true;

  template <class T>
  static SGL_HD PoolingSettings<T> settings(const Extent<T>& e, double parameter) {
    const Scale<T> none{T(0), T(0), T(0), false};
    const Probability<T> o = probability<false>(e.high, none);
    return {static_cast<T>(parameter), e.high, e.high < T(0) ? o.p : o.q, T(0)};
  }
  // r (max p - p) >= 0: the weight e^(r p) is e^-shortfall times the largest weight. For precision, the difference is
  // computed from p if the largest p is below 1/2, otherwise from 1 - p.
  template <class F, class T>
  static SGL_HD F shortfall(const Probability<F>& o, const PoolingSettings<T>& s) {
    const F d = s.high < T(0) ? s.reference - o.p : o.q - s.reference;
    return s.parameter * select(d > T(0), d, F(T(0)));
  }
  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F, const Probability<F>& o, const Scale<T>&, const PoolingSettings<T>& s) {
    if (scaled) return {value(o.scaled_p), value(o.scaled_q), F(T(0))};  // r p (or r q) is tiny: P is the mean
    const F short_of = shortfall(o, s);
    const F weight = exp(-short_of);
    return {-weight * expm1_negative(-s.parameter * o.p), value(weight), -expm1_negative(-short_of)};
  }
  static SGL_HD BagLogit finish(const PooledPair& s) {
    const double a = s.sum[0], b = s.sum[1], c = s.sum[2], n = static_cast<double>(s.n), r = s.parameter;
    if (s.scale.p < 0) return {log(a / n) + s.scale.p, 1 / a, 0};
    if (s.scale.q > 0) return {s.scale.q - log(b / n), 0, 1 / b};
    // The weights are e^(r (p - max p)). P = max p + log(mean weight) / r cancels for small P, so small P are computed
    // as log1p(mean(e^(rp) - 1)) / r. Q = 1 - P = min q - log(mean weight) / r never cancels.
    const Probability<double> o = probability<false>(s.extent.high, Scale<double>{0, 0, 0, false});
    const double loss = c / n < 0.5 ? -log1p(-c / n) : -log(b / n);
    const double largest = r * o.p;
    const double log_mean = largest > 1 ? largest + log(a / n + exp(-largest)) : log1p(a / n * exp(largest));
    double p = log_mean / r, q = o.q + loss / r;
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
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>& o, const PoolingSettings<T>& s, T slope1, T slope2) {
    if (scaled) return mean_slope(o, slope1, slope2);
    return exp(-shortfall(o, s)) * (o.p * o.q) * slope1;
  }
};

// P = 1 - prod (1 - p). The sum is -log(1 - P). If every p is tiny, it is the sum of the scaled p.
struct NoisyOrPooling : PoolingBase {
  static constexpr int64_t kCode = 7;
  static constexpr const char* kName = "noisy_or";
  static constexpr int kSums = 1;

  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F x, const Probability<F>& o, const Scale<T>& scale, const PoolingSettings<T>&) {
    if (scaled && scale.p < T(0)) return {value(o.scaled_p), F(T(0)), F(T(0))};
    return {softplus(x, o.u), F(T(0)), F(T(0))};
  }
  static SGL_HD BagLogit finish(const PooledPair& s) {
    const double a = s.sum[0];
    if (s.scale.p < 0) return {log(a) + s.scale.p, 1 / a, 0};
    const double p = -expm1(-a);
    return {a + log(p), 1 / p, 0};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F, const Probability<F>& o, const PoolingSettings<T>&, T slope1, T) {
    return o.scaled_p * slope1;
  }
};

// P = mean of the k largest p. The parameter is k, or a fraction of the bag if it is below 1. Instances tied at the
// k-th place share the remaining places equally.
struct TopKPooling : WeightedMean {
  static constexpr int64_t kCode = 8;
  static constexpr const char* kName = "topk";
  static constexpr Reference kReference = Reference::kKthLargest;
  static constexpr bool kParameter = true;

  // k for a bag of n > 0 instances. Integer arithmetic gives the same k on every device and in the reference.
  static SGL_HD int64_t places(int64_t n, double parameter) {
    if (parameter >= 1) return parameter < static_cast<double>(n) ? static_cast<int64_t>(parameter) : n;
    constexpr int64_t kWhole = int64_t{1} << 30;
    const int64_t k = (static_cast<int64_t>(parameter * kWhole) * n + kWhole - 1) / kWhole;
    return k < 1 ? 1 : k < n ? k : n;
  }

  // the k-th largest logit is the smallest one that contributes
  template <class T>
  static SGL_HD Scale<T> scale(const Extent<T>& e) {
    return scale_of(e.reference, e.high);
  }
  template <class T>
  static SGL_HD PoolingSettings<T> settings(const Extent<T>& e, double parameter) {
    return {static_cast<T>(parameter), e.high, e.reference, e.tie_weight};
  }
  template <class F, class T>
  static SGL_HD F weighted(F x, F value, const PoolingSettings<T>& s) {
    const F counted = select(x == s.reference, F(s.tie_weight) * value, value);
    return select(x < s.reference, F(T(0)), counted);  // not a product: `value` may be infinite there
  }
  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(F x, const Probability<F>& o, const Scale<T>&, const PoolingSettings<T>& s) {
    return {weighted(x, o.scaled_p, s), weighted(x, o.scaled_q, s), F(T(0))};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F x, const Probability<F>& o, const PoolingSettings<T>& s, T slope1, T slope2) {
    return weighted(x, mean_slope(o, slope1, slope2), s);
  }
};

// P = (mean p^r)^(1/r), with r > 0 as parameter
struct GeneralizedMeanPooling : PoolingBase {
  static constexpr int64_t kCode = 9;
  static constexpr const char* kName = "generalized_mean";
  static constexpr bool kParameter = true;

  // s.reference is -log p of the largest logit
  template <class T>
  static SGL_HD PoolingSettings<T> settings(const Extent<T>& e, double parameter) {
    return {static_cast<T>(parameter), e.high, softplus(-e.high, exp(minus_magnitude(e.high))), T(0)};
  }
  // (p / max p)^r
  template <class F, class T>
  static SGL_HD F relative_power(F minus_log_p, const PoolingSettings<T>& s) {
    const F d = s.reference - minus_log_p;
    return exp(s.parameter * select(d < T(0), d, F(T(0))));
  }
  template <bool scaled, class F, class T>
  static SGL_HD PoolingTerms<F> terms(
      F x, const Probability<F>& o, const Scale<T>& scale, const PoolingSettings<T>& s) {
    if (scaled && scale.q > T(0)) return {F(T(1)), value(o.scaled_q), F(T(0))};  // r q is tiny: 1 - P is the mean of q
    const F minus_log_p = softplus(-x, o.u);
    return {relative_power(minus_log_p, s), -expm1_negative(-s.parameter * minus_log_p), F(T(0))};
  }
  static SGL_HD BagLogit finish(const PooledPair& s) {
    const double a = s.sum[0], n = static_cast<double>(s.n), r = s.parameter, missing = s.sum[1] / n;
    if (s.scale.q > 0) return {s.scale.q - log(missing), 1 / (a * missing), 0};
    // t = -log P > 0 from mean(1 - p^r) if that is small, otherwise from the mean of (p / max p)^r
    const double high = s.extent.high;
    const double t =
        missing < 0.5 ? -log1p(-missing) / r : softplus(-high, exp(minus_magnitude(high))) - log(a / n) / r;
    const double q = -expm1(-t);
    return {-t - log(q), 1 / (a * q), 0};
  }
  template <bool scaled, class F, class T>
  static SGL_HD F slope(F x, const Probability<F>& o, const PoolingSettings<T>& s, T slope1, T) {
    return relative_power(softplus(-x, o.u), s) * o.scaled_q * slope1;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The list of poolings, and their selection by code

#define SGL_POOLINGS(X)   \
  X(NoPooling)            \
  X(MaxPooling)           \
  X(MeanPooling)          \
  X(MeanLogitsPooling)    \
  X(SoftmaxPooling)       \
  X(LinearSoftmaxPooling) \
  X(LSEPooling)           \
  X(NoisyOrPooling)       \
  X(TopKPooling)          \
  X(GeneralizedMeanPooling)

// The operators reject any other code before they start a kernel (check_settings in tensors.h).
SGL_HD bool is_pooling(int64_t code) {
  switch (code) {
#define SGL_CASE(P) case P::kCode:
    SGL_POOLINGS(SGL_CASE)
#undef SGL_CASE
    return true;
  }
  return false;
}

// Calls f with an object of the struct that has this code. An unknown code terminates the program.
template <class Function>
SGL_HD auto with_pooling(int64_t code, const Function& f) -> decltype(f(NoPooling())) {
  switch (code) {
#define SGL_CASE(P) \
  case P::kCode:    \
    return f(P());
    SGL_POOLINGS(SGL_CASE)
#undef SGL_CASE
  }
#if defined(__CUDA_ARCH__)
  __trap();
#else
  __builtin_trap();
#endif
  return f(NoPooling());
}

template <class T>
SGL_HD Scale<T> pooling_scale(int64_t code, const Extent<T>& extent) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::scale(extent); });
}

template <class T>
SGL_HD PoolingSettings<T> pooling_settings(int64_t code, const Extent<T>& extent, double parameter) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::settings(extent, parameter); });
}

SGL_HD Reference pooling_reference(int64_t code) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::kReference; });
}

SGL_HD bool counts_maxima(int64_t code) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::kCountsMaxima; });
}

SGL_HD bool adds_logits(int64_t code) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::kAddsLogits; });
}

SGL_HD bool has_sums(int64_t code) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::kSums > 0; });
}

SGL_HD bool has_own_loop(int64_t code) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::kOwnLoop; });
}

SGL_HD BagLogit finish_pooling(int64_t code, const PooledPair& pair) {
  return with_pooling(code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::finish(pair); });
}

}  // namespace sgl
