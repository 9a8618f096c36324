// Forward on the CPU: computes the sums over the instances of each pair, the loss of the pair, and its saved row.
//
// Compiled once per instruction set, each in a separate namespace (SGL_LEVEL).
#pragma once

#include "../median.h"
#include "doubles.h"
#include "loops.h"

namespace sgl {
namespace SGL_LEVEL {

// ---------------------------------------------------------------------------------------------------------------------
// Passes over one piece of a row. The results of the pieces are merged.

template <class T>
struct Extremes {
  T low, high;
  double sum;  // negative_pass: of the loss; others: of the logits / kDivisor. Not finite if a logit is NaN.

  static constexpr int kDivisor = 64;  // prevents overflow of a sum of finite numbers

  void merge(const Extremes& o) {
    low = o.low < low ? o.low : low;
    high = o.high > high ? o.high : high;
    sum += o.sum;
  }
  double sum_of_logits() const { return sum * kDivisor; }  // not after negative_pass
  bool finite() const { return sum - sum == 0 && low > -infinity_of(T()) && high < infinity_of(T()); }
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

// Every instance of a negative pair is negative: M = 0, weight 1.
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
        some += keep(live, v * T(1.0 / Extremes<T>::kDivisor));
      },
      [&]() SGL_INLINED {
        sum.add(some);
        some = F(0);
      });
  return ends.extremes(sum.total());
}

template <class T>
struct SumOfLogits {
  double sum;  // divided by Extremes<T>::kDivisor; not finite if a logit is not finite

  void merge(const SumOfLogits& o) { sum += o.sum; }
  double sum_of_logits() const { return sum * Extremes<T>::kDivisor; }
};

template <class T>
SumOfLogits<T> sum_pass(const T* x, int64_t n) {
  using F = typename VectorOf<T>::F;
  constexpr int64_t kSums = 4;  // in turn, because an addition waits for the one before it
  constexpr int64_t kStep = kBlock * Lanes<F>::kCount;
  const T factor = T(1.0 / Extremes<T>::kDivisor);
  typename Lanes<F>::Sum sum;
  int64_t start = 0;
  for (; start + kStep <= n; start += kStep) {
    F some[kSums] = {F(0), F(0), F(0), F(0)};
    for (int64_t v = 0; v < kBlock; v += kSums)
      for (int64_t k = 0; k < kSums; ++k) some[k] += Lanes<F>::load(x + start + (v + k) * Lanes<F>::kCount) * factor;
    sum.add((some[0] + some[1]) + (some[2] + some[3]));
  }
  F rest = F(0);
  for (; start + Lanes<F>::kCount <= n; start += Lanes<F>::kCount) rest += Lanes<F>::load(x + start) * factor;
  if (start < n) {
    T room[Lanes<F>::kCount];
    rest += keep<F>(Lanes<F>::first(n - start), Lanes<F>::load(last_vector<F>(x, n, room)) * factor);
  }
  sum.add(rest);
  return {sum.total()};
}

template <class T>
struct Smallest {
  T x;

  void merge(const Smallest& o) { x = o.x < x ? o.x : x; }
};

// the smallest |x|
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
  F negatives = F(0), positives = F(0);  // exact as floats: a piece has fewer than 2^24 instances
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

struct Rounded {
  double loss;

  void merge(const Rounded& o) { loss += o.loss; }
};

// BCE of every instance against its rounded probability: log(1 + e^-|x|)
template <class T>
Rounded rounded_pass(const T* x, int64_t n) {
  using F = typename VectorOf<T>::F;
  typename Lanes<typename Lanes<F>::Narrow>::Sum loss;
  LogOfProduct<F> product;
  for_vectors<F>(
      x, n, [&](F v, auto live) SGL_INLINED { product.multiply_by_1_plus(keep(live, exp(minus_magnitude(v)))); },
      [&]() SGL_INLINED {
        loss.add(Lanes<F>::log_of(product));
        product = LogOfProduct<F>();
      });
  return {loss.total()};
}

// The sums of terms(v, o) over the instances. kSums: the number of terms
template <int kSums, bool scaled, class T, class Terms>
SGL_HD Pooled sums_of_terms(const T* x, int64_t n, const Scale<T>& of_logits, const Terms& terms) {
  using F = typename VectorOf<T>::F;
  using Sum = typename Lanes<F>::Sum;
  const Scale<T> scale = of_logits;
  Sum sum_a, sum_b, sum_c;
  F a = F(0), b = F(0), c = F(0);
  for_vectors<F>(
      x, n,
      [&](F v, auto live) SGL_INLINED {
        const PoolingTerms<F> t = terms(v, probability<scaled>(v, scale), scale);
        a += keep(live, t.a);
        if (kSums > 1) b += keep(live, t.b);
        if (kSums > 2) c += keep(live, t.c);
      },
      [&]() SGL_INLINED {
        sum_a.add(a);
        if (kSums > 1) sum_b.add(b);
        if (kSums > 2) sum_c.add(c);
        a = b = c = F(0);
      });
  return {{sum_a.total(), sum_b.total(), sum_c.total()}};
}

template <class Pooling, class T>
Pooled pooled_pass(const T* x, int64_t n, const Scale<T>& scale, const PoolingSettings<T>& of_bag) {
  const PoolingSettings<T> settings = of_bag;
  return sums_of_terms<Pooling::kSums, false>(x, n, scale, [&](auto v, const auto& o, const auto& s) SGL_INLINED {
    return Pooling::template terms<false>(v, o, s, settings);
  });
}

// With scaled probabilities, which is rare: one loop chooses the pooling for each vector. This saves code.
template <class T>
Pooled scaled_pooled_pass(
    int64_t code, const T* x, int64_t n, const Scale<T>& scale, const PoolingSettings<T>& of_bag) {
  const PoolingSettings<T> settings = of_bag;
  return sums_of_terms<3, true>(x, n, scale, [&](auto v, const auto& o, const auto& s) SGL_INLINED {
    return with_pooling(
        code, [&](auto pooling) SGL_INLINED { return decltype(pooling)::template terms<true>(v, o, s, settings); });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole rows

template <class T>
int64_t count_up_to(const Row<T>& row, T pivot, ParallelFor parallel_for) {
  return over_pieces(
             parallel_for, row.n,
             [&](int64_t begin, int64_t size) { return count_up_to_pass(row.x + begin, size, pivot); })
      .n;
}

template <class T>
int64_t count_equal(const Row<T>& row, T value, ParallelFor parallel_for) {
  return over_pieces(
             parallel_for, row.n,
             [&](int64_t begin, int64_t size) { return count_equal_pass(row.x + begin, size, value); })
      .n;
}

// The `wanted`-th smallest logit, counted from 1.
template <class T>
T order_statistic_of(const Row<T>& row, int64_t wanted, T low, T high, T guess, ParallelFor parallel_for) {
  return order_statistic(
      row.n, wanted, low, high, guess, [&](T pivot) { return count_up_to(row, pivot, parallel_for); },
      [&](T pivot) {
        return over_pieces(
                   parallel_for, row.n,
                   [&](int64_t begin, int64_t size) { return largest_up_to_pass(row.x + begin, size, pivot, low); })
            .x;
      });
}

// Finds the reference of the pooling (pooling.h) and the weight of instances equal to it.
template <class T>
void find_reference(const Settings& settings, const Row<T>& row, T mean, ParallelFor parallel_for, Extent<T>& extent) {
  const Reference wanted = pooling_reference(settings.pooling);
  if (wanted == Reference::kNearestToZero) {
    extent.reference = over_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
                         return nearest_pass(row.x + begin, size);
                       }).x;
  } else if (wanted == Reference::kKthLargest) {
    const int64_t k = TopKPooling::places(row.n, settings.pooling_parameter);
    const T guess = guess_kth_largest(row.n, k, mean, extent.high);
    extent.reference = order_statistic_of(row, row.n - k + 1, extent.low, extent.high, guess, parallel_for);
    const int64_t above = row.n - count_up_to(row, extent.reference, parallel_for);
    const int64_t tied = count_equal(row, extent.reference, parallel_for);
    extent.tie_weight = static_cast<T>(static_cast<double>(k - above) / static_cast<double>(tied));
  }
}

template <class T>
void find_pooled(
    const Settings& settings, const Row<T>& row, const Extent<T>& extent, const Scale<T>& scale,
    ParallelFor parallel_for, Sums& out) {
  if (counts_maxima(settings.pooling)) {
    out.pooled[0] = static_cast<double>(count_equal(row, extent.high, parallel_for));
    return;
  }
  const PoolingSettings<T> pooling = pooling_settings(settings.pooling, extent, settings.pooling_parameter);
  const Pooled pooled = over_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
    const T* x = row.x + begin;
    if (scale.any) return scaled_pooled_pass(settings.pooling, x, size, scale, pooling);
    return with_pooling(settings.pooling, [&](auto chosen) {
      using P = decltype(chosen);
      if constexpr (P::kSums == 0 || P::kCountsMaxima) {
        return Pooled{};  // not reached
      } else {
        return pooled_pass<P>(x, size, scale, pooling);
      }
    });
  });
  for (int k = 0; k < 3; ++k) out.pooled[k] = pooled.sum[k];
}

// The instances of a positive pair against their ternary targets.
template <class T>
void find_guided(
    const Settings& settings, const Row<T>& row, const Extent<T>& extent, const Scale<T>& scale, T mean, T pos_weight,
    ParallelFor parallel_for, Sums& out) {
  if (settings.weighted)
    out.median = order_statistic_of(row, median_rank(row.n), extent.low, extent.high, mean, parallel_for);
  const Guide<T> guide = guide_of(extent.low, extent.high, scale, settings.delta_l, settings.rescale);
  const Guided guided = over_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
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

// Sums{}, member by member: for Sums{}, gcc clears a block of memory, which takes longer than all other instructions of a
// small bag.
SGL_HD Sums no_sums() {
  Sums out;
  out.kind = Kind::kExcluded;
  out.positive = false;
  out.n = out.lows = out.highs = 0;
  out.extent.low = out.extent.high = out.extent.reference = out.extent.tie_weight = 0;
  out.median = out.square = 0;
  for (int k = 0; k < 3; ++k) {
    out.loss[k] = out.pooled[k] = 0;
    out.count[k] = 0;
  }
  static_assert(sizeof(Sums) == 19 * sizeof(double), "clear a new member here");
  return out;
}

template <class T>
Sums all_sums_of(const Settings& settings, Label label, T pos_weight, const Row<T>& row, ParallelFor parallel_for) {
  Sums out = no_sums();
  out.n = row.n;
  out.positive = label == Label::kPositive;
  const bool has_instances = settings.loss == kSelfGuidingLoss || settings.loss == kBagInstanceLoss;
  const bool against_zero = has_instances && !out.positive;
  const Extremes<T> e = over_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
    return against_zero ? negative_pass(row.x + begin, size) : extremes_pass(row.x + begin, size);
  });
  if (!e.finite()) {
    out.kind = Kind::kNonFinite;
    return out;
  }
  const T mean =
      against_zero ? e.low + (e.high - e.low) * T(0.5) : static_cast<T>(e.sum_of_logits() / static_cast<double>(row.n));
  Extent<T> extent{e.low, e.high, T(0), T(0)};
  if (pooling_reference(settings.pooling) != Reference::kNone)
    find_reference(settings, row, mean, parallel_for, extent);
  out.extent = {extent.low, extent.high, extent.reference, extent.tie_weight};
  const Scale<T> scale = pooling_scale(settings.pooling, extent);
  if (against_zero) {
    out.kind = Kind::kNegative;
    out.loss[0] = e.sum;
    out.count[0] = row.n;
    if (settings.loss == kBagInstanceLoss) return out;  // no bag loss for negative bags
  } else if (settings.loss == kMinMeanMaxLoss) {
    out.kind = Kind::kExtremes;
    out.lows = count_equal(row, e.low, parallel_for);
    out.highs = count_equal(row, e.high, parallel_for);
  } else if (!has_instances) {
    out.kind = Kind::kBagOnly;
  } else if (settings.loss == kBagInstanceLoss) {
    out.kind = Kind::kRounded;
    out.loss[0] = over_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
                    return rounded_pass(row.x + begin, size);
                  }).loss;
  } else if (settings.rescale && e.low == e.high) {
    out.kind = Kind::kConstant;
  } else {
    out.kind = Kind::kPositive;
    find_guided(settings, row, extent, scale, mean, pos_weight, parallel_for, out);
  }
  if (adds_logits(settings.pooling) && !against_zero) {
    out.pooled[0] = e.sum_of_logits();
  } else if (has_sums(settings.pooling)) {
    find_pooled(settings, row, extent, scale, parallel_for, out);
  }
  return out;
}

// The sum of the logits alone, for a loss that needs no more.
template <class T>
SGL_HD Sums sum_of_logits(Label label, const Row<T>& row, ParallelFor parallel_for) {
  const double sum = over_pieces(parallel_for, row.n, [&](int64_t begin, int64_t size) {
                       return sum_pass(row.x + begin, size);
                     }).sum_of_logits();
  Sums out = no_sums();
  out.n = row.n;
  out.positive = label == Label::kPositive;
  out.kind = sum - sum == 0 ? Kind::kBagOnly : Kind::kNonFinite;
  out.pooled[0] = sum;
  return out;
}

template <class T>
SGL_HD Sums sums_of(const Settings& settings, Label label, T pos_weight, const Row<T>& row, ParallelFor parallel_for) {
  if (label == Label::kUnknown || row.n == 0) return no_sums();
  const bool only_bag = settings.loss == kBagLoss || settings.loss == kBagLogits;
  if (only_bag && adds_logits(settings.pooling)) return sum_of_logits(label, row, parallel_for);
  return all_sums_of(settings, label, pos_weight, row, parallel_for);
}

// Computes the bag losses of several pairs at once: exp and log of one number take as long as those of a vector.
template <class T>
class BagLosses {
 public:
  explicit BagLosses(Batch& batch) : batch_(batch) {}

  // `row` is the saved row of the pair.
  SGL_HD void add(double bag_logit, bool positive, double pos_weight, double class_weight, T* row) {
    bag_logit_[count_] = bag_logit;
    positive_[count_] = positive ? 1.0 : 0.0;
    pos_weight_[count_] = pos_weight;
    class_weight_[count_] = class_weight;
    row_[count_] = row;
    if (++count_ == D::kCount) finish();
  }

  // Adds the losses to the batch and their derivatives to the saved rows. Not inlined: one copy makes the
  // library smaller.
  __attribute__((noinline)) void finish() {
    const D z = D::load(bag_logit_);
    const Scale<double> none{0, 0, 0, false};
    const BagLoss<D> found =
        bag_loss_of(z, probability<false>(z, none), D::load(positive_) > D(0.0), D::load(pos_weight_));
    double loss[D::kCount], slope[D::kCount];
    D::store(loss, found.loss);
    D::store(slope, found.slope);
    for (int i = 0; i < count_; ++i) {
      batch_.bag += class_weight_[i] * loss[i];
      row_[i][kColumnPooling] = static_cast<T>(class_weight_[i] * slope[i]);
    }
    count_ = 0;
  }

 private:
  using D = Doubles<SGL_WIDTH>;
  Batch& batch_;
  int count_ = 0;
  double bag_logit_[D::kCount] = {}, positive_[D::kCount] = {}, pos_weight_[D::kCount] = {};
  double class_weight_[D::kCount];
  T* row_[D::kCount];
};

template <class T>
SGL_HD Batch forward_range_with(
    const Settings& settings, bool adds_bag_loss, const Problem<T>& problem, const Label* labels, const Forward<T>& out,
    int64_t begin, int64_t end, T* scratch, ParallelFor parallel_for) {
  const Layout& layout = *problem.layout;
  Batch batch = {};
  BagLosses<T> bag_losses(batch);
  RowLoader<T> rows(problem, end, scratch, parallel_for);
  for (PairIndex at(begin, layout.classes); at.pair < end; at.next()) {
    const int64_t pair = at.pair;
    const Label label = labels == nullptr ? Label::kPositive : labels[pair];
    Row<T> row{nullptr, 0};
    if (label != Label::kUnknown) row = rows.row(pair, instances_of(layout, at.bag, at.cls));
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[at.cls];
    const double class_weight = problem.class_weight == nullptr ? 1.0 : problem.class_weight[at.cls];
    const Sums sums = sums_of(settings, label, pos_weight, row, parallel_for);
    const Pair found = finalize_pair(sums, settings, pos_weight);
    T* saved = out.saved + pair * kColumns;
    add(batch, found, class_weight);
    save_row(sums, found, settings, class_weight, saved);
    if (out.bag_logits != nullptr) out.bag_logits[pair] = static_cast<T>(found.bag_logit);
    if (adds_bag_loss && found.kind == Kind::kBagOnly)
      bag_losses.add(found.bag_logit, sums.positive, pos_weight, class_weight, saved);
  }
  if (adds_bag_loss) bag_losses.finish();
  return batch;
}

constexpr Settings bag_logits_of_means() {
  Settings settings{};
  settings.pooling = MeanLogitsPooling::kCode;
  settings.loss = kBagLogits;
  return settings;
}

template <class T>
Batch forward_range(
    const Problem<T>& problem, const Label* labels, const Forward<T>& out, int64_t begin, int64_t end, T* scratch,
    ParallelFor parallel_for) {
  const auto with = [&](const Settings& settings, bool adds_bag_loss) SGL_INLINED {
    return forward_range_with(settings, adds_bag_loss, problem, labels, out, begin, end, scratch, parallel_for);
  };
  const bool bag_loss = problem.settings.loss == kBagLoss;
  const bool only_bag = bag_loss || problem.settings.loss == kBagLogits;
  // For small bags, the choices between losses and poolings take longer than a sum of logits. The compiler removes them
  // where the settings are constants.
  static constexpr Settings kMeans = bag_logits_of_means();
  if (only_bag && problem.settings.pooling == kMeans.pooling) return with(kMeans, bag_loss);
  Settings settings = problem.settings;
  if (only_bag) settings.loss = kBagLogits;
  return with(settings, bag_loss);
}

}  // namespace SGL_LEVEL
}  // namespace sgl
