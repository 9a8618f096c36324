// Forward and backward of one bag-class: loops over a row of instances, several at once.
//
// Compiled once for each instruction set, in a namespace of its own (SGL_LEVEL), with SGL_WIDTH floats at once.
#pragma once

#include <memory>

#include "rows.h"
#include "vector.h"

namespace sgl {
namespace SGL_LEVEL {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using F = Floats<SGL_WIDTH>;
};
template <>
struct VectorOf<double> {
  using F = double;
};

struct All {};  // every lane counts

template <class F>
SGL_HD F keep(All, F x) {
  return x;
}
template <class F>
SGL_HD F keep(typename Lanes<F>::Condition live, F x) {
  return select(live, x, F(0));
}
template <class C>
SGL_HD C both(All, C condition) {
  return condition;
}
template <class C>
SGL_HD C both(C live, C condition) {
  return live & condition;
}

// Sums of floats run over this many vectors, then go on in double: enough digits for a bag of a million.
constexpr int64_t kBlock = 16;
static_assert(kBlock <= LogOfProduct<float>::kFactors, "a block's factors go into one product");

// The last n % kCount of n numbers, with one of them once more in the lanes that do not count; `room` may be needed.
template <class F, class T>
SGL_HD const T* last_vector(const T* x, int64_t n, T* room) {
  constexpr int64_t kWidth = Lanes<F>::kCount;
  const int64_t whole = n / kWidth * kWidth;
  if (n <= kPadded) return x + whole;
  for (int64_t i = 0; i < kWidth; ++i) room[i] = x[whole + i < n ? whole + i : whole];
  return room;
}

// Calls each(x, live) for the n > 0 numbers from x on, and end() after every kBlock vectors and at the last. In the
// lanes that do not count there is one of the numbers once more.
template <class F, class T, class Each, class End>
SGL_HD void for_vectors(const T* x, int64_t n, const Each& each, const End& end) {
  constexpr int64_t kWidth = Lanes<F>::kCount;
  const int64_t whole = n / kWidth, rest = n % kWidth;
  for (int64_t start = 0; start * kWidth < n; start += kBlock) {
    const int64_t stop = start + kBlock < whole ? start + kBlock : whole;
    for (int64_t v = start; v < stop; ++v) each(Lanes<F>::load(x + v * kWidth), All{});
    if (rest > 0 && start + kBlock > whole) {
      T room[kWidth];
      each(Lanes<F>::load(last_vector<F>(x, n, room)), Lanes<F>::first(rest));
    }
    end();
  }
}

template <class F, class T, class Each>
SGL_HD void for_vectors(const T* x, int64_t n, const Each& each) {
  for_vectors<F>(x, n, each, []() SGL_INLINED {});
}

// y[j] = f(x[j])
template <class F, class T, class Function>
SGL_HD void map_vectors(const T* x, int64_t n, T* y, const Function& f) {
  constexpr int64_t kWidth = Lanes<F>::kCount;
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t j = 0; j < whole; j += kWidth) Lanes<F>::store(y + j, f(Lanes<F>::load(x + j)));
  if (whole == n) return;
  T room[kWidth];
  Lanes<F>::store(room, f(Lanes<F>::load(last_vector<F>(x, n, room))));
  for (int64_t i = 0; whole + i < n; ++i) y[whole + i] = room[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes over a piece of a row. What they find of two pieces is merged.

template <class T>
struct Extremes {
  T low, high;
  double sum;  // of the loss in a negative bag-class, else of the logits / 64; NaN if a logit is NaN

  void merge(const Extremes& o) {
    low = o.low < low ? o.low : low;
    high = o.high > high ? o.high : high;
    sum += o.sum;
  }
  bool finite() const { return sum == sum && low > -infinity_of(T()) && high < infinity_of(T()); }
};

template <class F>
struct Ends {
  F low, high;

  SGL_HD void add(F x) {
    low = select(x < low, x, low);
    high = select(x > high, x, high);
  }
  SGL_HD auto extremes(double sum) const {
    using T = typename Lanes<F>::Number;
    return Extremes<T>{
        Lanes<F>::best(low, [](auto a, auto b) SGL_INLINED { return a < b; }),
        Lanes<F>::best(high, [](auto a, auto b) SGL_INLINED { return a > b; }), sum};
  }
};

// An unlabelled instance of a negative bag is negative: M = 0, weight 1.
template <class T>
Extremes<T> negative_pass(const T* x, int64_t n) {
  using F = typename VectorOf<T>::F;
  Ends<F> ends = {F(x[0]), F(x[0])};
  typename Lanes<typename Lanes<F>::Narrow>::Sum loss;
  F above = F(0);
  LogOfProduct<F> product;
  for_vectors<F>(
      x, n,
      [&](F v, auto live) SGL_INLINED {
        ends.add(v);
        above += keep(live, select(v < F(0), F(0), v));  // a NaN stays one
        product.multiply_by_1_plus(keep(live, exp(minus_magnitude(v))));
      },
      [&]() SGL_INLINED {
        loss.add(Lanes<F>::narrow_sum(above) + Lanes<F>::log_of(product));
        above = F(0);
        product = LogOfProduct<F>();
      });
  return ends.extremes(loss.total());
}

template <class T>
Extremes<T> extremes_pass(const T* x, int64_t n) {
  using F = typename VectorOf<T>::F;
  Ends<F> ends = {F(x[0]), F(x[0])};
  typename Lanes<F>::Sum sum;
  F some = F(0);
  for_vectors<F>(
      x, n,
      [&](F v, auto live) SGL_INLINED {
        ends.add(v);
        some += keep(live, v * T(1.0 / 64));  // no sum of finite numbers is infinite
      },
      [&]() SGL_INLINED {
        sum.add(some);
        some = F(0);
      });
  return ends.extremes(sum.total());
}

template <class T>
struct Smallest {
  T x;

  void merge(const Smallest& o) { x = o.x < x ? o.x : x; }
};

// the distance of the nearest logit to zero
template <class T>
Smallest<T> nearest_pass(const T* x, int64_t n) {
  using F = typename VectorOf<T>::F;
  F nearest = F(infinity_of(T()));
  for_vectors<F>(x, n, [&](F v, auto) SGL_INLINED {
    const F magnitude = -minus_magnitude(v);
    nearest = select(magnitude < nearest, magnitude, nearest);
  });
  return {Lanes<F>::best(nearest, [](auto a, auto b) SGL_INLINED { return a < b; })};
}

struct Number {
  int64_t n;

  void merge(const Number& o) { n += o.n; }
};

template <class T>
Number count_up_to_pass(const T* x, int64_t n, T pivot) {
  using F = typename VectorOf<T>::F;
  typename Lanes<F>::Count count;
  for_vectors<F>(x, n, [&](F v, auto live) SGL_INLINED { count.add(both(live, v <= F(pivot))); });
  return {count.total()};
}

template <class T>
Number count_equal_pass(const T* x, int64_t n, T value) {
  using F = typename VectorOf<T>::F;
  typename Lanes<F>::Count count;
  for_vectors<F>(x, n, [&](F v, auto live) SGL_INLINED { count.add(both(live, v == F(value))); });
  return {count.total()};
}

template <class T>
struct Largest {
  T x;

  void merge(const Largest& o) { x = o.x > x ? o.x : x; }
};

template <class T>
Largest<T> largest_up_to_pass(const T* x, int64_t n, T pivot, T smallest) {
  using F = typename VectorOf<T>::F;
  F largest = F(smallest);
  for_vectors<F>(
      x, n, [&](F v, auto) SGL_INLINED { largest = select(v <= F(pivot), select(v > largest, v, largest), largest); });
  return {Lanes<F>::best(largest, [](auto a, auto b) SGL_INLINED { return a > b; })};
}

struct Guided {
  double loss[3], negatives, positives, square;

  void merge(const Guided& o) {
    for (int k = 0; k < 3; ++k) loss[k] += o.loss[k];
    negatives += o.negatives;
    positives += o.positives;
    square += o.square;
  }
};

template <bool scaled, class T>
Guided guided_pass(const T* x, int64_t n, const Guide<T>& of_bag, const Scale<T>& of_logits, T pos_weight) {
  using F = typename VectorOf<T>::F;
  using Sum = typename Lanes<F>::Sum;
  const Guide<T> guide = of_bag;
  const Scale<T> scale = of_logits;
  Sum loss0, loss1, loss2, squares;
  F l0 = F(0), l1 = F(0), l2 = F(0), square = F(0);
  F negatives = F(0), positives = F(0);  // as floats exact: a piece has fewer than 2^24 instances
  for_vectors<F>(
      x, n,
      [&](F v, auto live) SGL_INLINED {
        const Probability<F> o = probability<scaled>(v, scale);
        const Target<F> t = target_of(theta_of(v, o, guide), guide);
        const F l = keep(live, bce(v, o, t.m, pos_weight));
        l0 += l * t.negative;
        l1 += l * t.ambiguous;
        l2 += l * t.positive;
        negatives += keep(live, t.negative);
        positives += keep(live, t.positive);
        const F p = keep(live, select(t.m > F(0), o.scaled_p, F(0)));
        square += p * p;
      },
      [&]() SGL_INLINED {
        loss0.add(l0);
        loss1.add(l1);
        loss2.add(l2);
        squares.add(square);
        l0 = l1 = l2 = square = F(0);
      });
  Sum all_negatives, all_positives;
  all_negatives.add(negatives);
  all_positives.add(positives);
  return {{loss0.total(), loss1.total(), loss2.total()}, all_negatives.total(), all_positives.total(), squares.total()};
}

struct Pooled {
  double sum[3];

  void merge(const Pooled& o) {
    for (int k = 0; k < 3; ++k) sum[k] += o.sum[k];
  }
};

template <int64_t pooling, bool scaled, class T>
Pooled pooled_pass(const T* x, int64_t n, const Scale<T>& of_logits, const PoolingSettings<T>& of_bag) {
  using F = typename VectorOf<T>::F;
  using Sum = typename Lanes<F>::Sum;
  const Scale<T> scale = of_logits;
  const PoolingSettings<T> settings = of_bag;
  Sum sum_a, sum_b, sum_c;
  F a = F(0), b = F(0), c = F(0);
  for_vectors<F>(
      x, n,
      [&](F v, auto live) SGL_INLINED {
        const PoolingTerms<F> t = pooling_terms<pooling, scaled>(v, probability<scaled>(v, scale), scale, settings);
        a += keep(live, t.a);
        b += keep(live, t.b);
        c += keep(live, t.c);
      },
      [&]() SGL_INLINED {
        sum_a.add(a);
        sum_b.add(b);
        sum_c.add(c);
        a = b = c = F(0);
      });
  return {{sum_a.total(), sum_b.total(), sum_c.total()}};
}

template <bool scaled, class T>
Pooled pooled_pass(int64_t pooling, const T* x, int64_t n, const Scale<T>& scale, const PoolingSettings<T>& settings) {
  switch (pooling) {
    case kMean:
      return pooled_pass<kMean, scaled>(x, n, scale, settings);
    case kMeanLogits:
      return pooled_pass<kMeanLogits, false>(x, n, scale, settings);
    case kSoftmax:
      return pooled_pass<kSoftmax, scaled>(x, n, scale, settings);
    case kLinearSoftmax:
      return pooled_pass<kLinearSoftmax, scaled>(x, n, scale, settings);
    case kLSE:
      return pooled_pass<kLSE, scaled>(x, n, scale, settings);
    case kNoisyOr:
      return pooled_pass<kNoisyOr, scaled>(x, n, scale, settings);
    default:
      return {};
  }
}

template <bool is_positive, int64_t pooling, bool scaled, class T>
void gradient_pass(const T* x, int64_t n, const Coefficients<T>& of_bag, T* grad) {
  using F = typename VectorOf<T>::F;
  const Coefficients<T> k = of_bag;
  map_vectors<F>(x, n, grad, [&](F v) SGL_INLINED {
    const Probability<F> o = probability<scaled>(v, k.scale);
    F g = instance_slope<is_positive, scaled>(v, o, k);
    if (pooling != kNone) g += pooling_slope<pooling, scaled>(v, o, k.pooling, k.slope1, k.slope2);
    return g;
  });
}

template <bool is_positive, bool scaled, class T>
void gradient_pass(int64_t pooling, const T* x, int64_t n, const Coefficients<T>& k, T* grad) {
  switch (pooling) {
    case kMax:
      return gradient_pass<is_positive, kMax, scaled>(x, n, k, grad);
    case kMean:
      return gradient_pass<is_positive, kMean, scaled>(x, n, k, grad);
    case kMeanLogits:
      return gradient_pass<is_positive, kMeanLogits, scaled>(x, n, k, grad);
    case kSoftmax:
      return gradient_pass<is_positive, kSoftmax, scaled>(x, n, k, grad);
    case kLinearSoftmax:
      return gradient_pass<is_positive, kLinearSoftmax, scaled>(x, n, k, grad);
    case kLSE:
      return gradient_pass<is_positive, kLSE, scaled>(x, n, k, grad);
    case kNoisyOr:
      return gradient_pass<is_positive, kNoisyOr, scaled>(x, n, k, grad);
    default:
      return gradient_pass<is_positive, kNone, scaled>(x, n, k, grad);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole rows

template <class Pass>
auto over_pieces(Spread spread, int64_t n, const Pass& pass) {
  using Found = decltype(pass(n, n));
  const int64_t pieces = pieces_of(n);
  if (pieces == 1) return pass(0, n);
  std::unique_ptr<Found[]> found(new Found[pieces]);
  for_pieces(spread, n, [&](int64_t begin, int64_t size) { found[begin / kPiece] = pass(begin, size); });
  for (int64_t i = 1; i < pieces; ++i) found[0].merge(found[i]);
  return found[0];
}

template <class T>
T median_of(const Row<T>& row, T low, T high, T mean, Spread spread) {
  return lower_median(
      row.n, low, high, mean,
      [&](T pivot) {
        return over_pieces(
                   spread, row.n,
                   [&](int64_t begin, int64_t size) { return count_up_to_pass(row.x + begin, size, pivot); })
            .n;
      },
      [&](T pivot) {
        return over_pieces(
                   spread, row.n,
                   [&](int64_t begin, int64_t size) { return largest_up_to_pass(row.x + begin, size, pivot, low); })
            .x;
      });
}

template <class T>
Sums sums_of(const Settings& settings, Label label, T pos_weight, const Row<T>& row, Spread spread) {
  Sums out = {};
  if (label == Label::kUnknown || row.n == 0) return out;
  out.n = row.n;
  out.positive = label == Label::kPositive;
  const Extremes<T> e = over_pieces(spread, row.n, [&](int64_t begin, int64_t size) {
    return out.positive ? extremes_pass(row.x + begin, size) : negative_pass(row.x + begin, size);
  });
  if (!e.finite()) {
    out.kind = Kind::kBroken;
    return out;
  }
  out.low = e.low;
  out.high = e.high;
  T nearest = T(0);
  if (settings.pooling == kLinearSoftmax)  // nobody else asks
    nearest =
        over_pieces(spread, row.n, [&](int64_t begin, int64_t size) { return nearest_pass(row.x + begin, size); }).x;
  out.nearest = nearest;
  const Scale<T> scale = scale_of(e.low, e.high, nearest, settings.pooling);
  if (!out.positive) {
    out.kind = Kind::kNegative;
    out.loss[0] = e.sum;
    out.count[0] = row.n;
  } else if (settings.rescale && e.low == e.high) {
    out.kind = Kind::kUnranked;
  } else {
    out.kind = Kind::kPositive;
    const T mean = static_cast<T>(e.sum * 64 / static_cast<double>(row.n));
    if (settings.weighted) out.median = median_of(row, e.low, e.high, mean, spread);
    const Guide<T> guide = guide_of(e.low, e.high, scale, settings.delta_l, settings.rescale);
    const Guided guided = over_pieces(spread, row.n, [&](int64_t begin, int64_t size) {
      const T* x = row.x + begin;
      return scale.any ? guided_pass<true>(x, size, guide, scale, pos_weight)
                       : guided_pass<false>(x, size, guide, scale, pos_weight);
    });
    for (int k = 0; k < 3; ++k) out.loss[k] = guided.loss[k];
    out.count[0] = static_cast<int64_t>(guided.negatives);
    out.count[2] = static_cast<int64_t>(guided.positives);
    out.count[1] = row.n - out.count[0] - out.count[2];
    out.square = guided.square;
  }
  if (settings.pooling == kMax) {
    const Number ties = over_pieces(
        spread, row.n, [&](int64_t begin, int64_t size) { return count_equal_pass(row.x + begin, size, e.high); });
    out.pooled[0] = static_cast<double>(ties.n);
  } else if (settings.pooling != kNone) {
    const PoolingSettings<T> pooling = pooling_settings(settings.pooling, e.low, e.high, settings.pooling_parameter);
    const Pooled pooled = over_pieces(spread, row.n, [&](int64_t begin, int64_t size) {
      const T* x = row.x + begin;
      return scale.any ? pooled_pass<true>(settings.pooling, x, size, scale, pooling)
                       : pooled_pass<false>(settings.pooling, x, size, scale, pooling);
    });
    for (int k = 0; k < 3; ++k) out.pooled[k] = pooled.sum[k];
  }
  return out;
}

template <class T>
Batch forward_range(
    const Problem<T>& problem, const Label* labels, T* saved, int64_t begin, int64_t end, T* scratch, Spread spread) {
  const Layout& layout = *problem.layout;
  Batch batch = {};
  Rows<T> rows(problem, end, scratch, spread);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t cls = unit % layout.classes;
    Row<T> row{nullptr, 0};
    if (labels[unit] != Label::kUnknown) row = rows.row(unit, instances_of(layout, unit / layout.classes, cls));
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[cls];
    const double class_weight = problem.class_weight == nullptr ? 1.0 : problem.class_weight[cls];
    const BagClass b =
        finish(sums_of(problem.settings, labels[unit], pos_weight, row, spread), problem.settings, pos_weight);
    add(batch, b, class_weight);
    save_row(b, problem.settings, class_weight, saved + unit * kColumns);
  }
  return batch;
}

template <class T>
void gradient_of(int64_t pooling, Coefficients<T> k, const Row<T>& row, T* grad, Spread spread) {
  if (k.kind == Kind::kUnranked) k.negative = T(0);  // only the bag loss sees it
  for_pieces(spread, row.n, [&](int64_t begin, int64_t size) {
    const T* x = row.x + begin;
    T* g = grad + begin;
    if (k.kind == Kind::kPositive) {
      if (k.scale.any) {
        gradient_pass<true, true>(pooling, x, size, k, g);
      } else {
        gradient_pass<true, false>(pooling, x, size, k, g);
      }
    } else if (k.scale.any) {
      gradient_pass<false, true>(pooling, x, size, k, g);
    } else {
      gradient_pass<false, false>(pooling, x, size, k, g);
    }
  });
}

template <class T, class Out>
void backward_range_as(
    const Problem<T>& problem, const T* saved, T grad_output, Out* grad, int64_t begin, int64_t end, T* scratch,
    Spread spread) {
  const Layout& layout = *problem.layout;
  const T* shares = saved + layout.bags * layout.classes * kColumns;
  T* row_grad = scratch + row_step(layout);
  Rows<T> rows(problem, end, scratch, spread);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t cls = unit % layout.classes;
    const Instances r = instances_of(layout, unit / layout.classes, cls);
    if (r.positions == 0) continue;
    const T* columns = saved + unit * kColumns;
    const Kind kind = static_cast<Kind>(static_cast<int>(columns[kColumnKind]));
    if (kind == Kind::kAbsent || kind == Kind::kBroken) {
      // not a product with 0 or NaN: what takes no part may hold anything, what is broken is so for any weight
      const T value = kind == Kind::kAbsent ? T(0) : nan_of(T());
      if (rows.together()) {
        const int64_t n = rows.row(unit, r).n;
        for (int64_t j = 0; j < n; ++j) rows.memory(unit)[j] = value;
        rows.replaced(unit, grad);
      } else {
        fill(value, problem.mask, r, grad);
      }
      continue;
    }
    const Row<T> row = rows.row(unit, r);
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[cls];
    const Coefficients<T> k = coefficients(columns, shares, grad_output, pos_weight, problem.settings);
    if (rows.together()) {
      gradient_of(problem.settings.pooling, k, row, rows.memory(unit), spread);
      rows.replaced(unit, grad);
      continue;
    }
    T* direct = nullptr;
    if constexpr (sizeof(Out) == sizeof(T)) {
      if (problem.mask == nullptr && r.count == 1 && (r.dimensions[0].grad == 1 || r.inner == 1))
        direct = grad + r.grad;
    }
    gradient_of(problem.settings.pooling, k, row, direct != nullptr ? direct : row_grad, spread);
    if (direct == nullptr) store_row(row_grad, problem.mask, r, grad, spread);
  }
}

template <class T>
void backward_range(
    const Problem<T>& problem, const T* saved, T grad_output, void* grad, int64_t begin, int64_t end, T* scratch,
    Spread spread) {
  if (problem.type == native_type<T>())
    return backward_range_as(problem, saved, grad_output, static_cast<T*>(grad), begin, end, scratch, spread);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf)
      return backward_range_as(problem, saved, grad_output, static_cast<Half*>(grad), begin, end, scratch, spread);
    return backward_range_as(problem, saved, grad_output, static_cast<BFloat16*>(grad), begin, end, scratch, spread);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void math(int function, const T* x, T* y, int64_t n) {
  using F = typename VectorOf<T>::F;
  T room[kPadded + 2 * SGL_WIDTH] = {};
  if (n <= kPadded) x = static_cast<const T*>(std::memcpy(room, x, n * sizeof(T)));
  if (function == 0) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return exp(v); });
  if (function == 1) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return log1p_unit(v); });
  if (function == 2) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return expm1_negative(v); });
  if (function == 3) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return log1p_any(v); });
  if (function == 4) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return reciprocal(v); });
}

template <class T>
Kernels<T> all_kernels() {
  return {&forward_range<T>, &backward_range<T>, &math<T>};
}

}  // namespace SGL_LEVEL
}  // namespace sgl
