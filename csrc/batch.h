// Computes the loss of each (bag, class) pair and of the batch from sums over the instances, and the coefficients of
// the gradient. All devices share this code.
//
// A pair means one (bag, class) pair throughout.
#pragma once

#include "pooling.h"
#include "self_guidance.h"

namespace sgl {

enum class Label : int8_t {
  kUnknown,
  kNegative,
  kPositive
};

// The instance loss of a pair.
enum class Kind : int8_t {
  kExcluded = 0,  // unknown label or no instance: contributes nothing
  kNegative = 1,  // BCE against 0
  kPositive = 2,  // BCE against the ternary targets
  kConstant = 3,  // positive, all logits equal: only the bag loss applies
  kNonFinite = 4,  // a logit is NaN or infinite: loss and gradient are NaN
  kBagOnly = 5,  // the loss has no instance term
  kRounded = 6,  // positive: BCE against the rounded probabilities
  kExtremes = 7,  // the smallest and the largest instance have a loss of their own
};

// Which loss the operators compute.
enum LossCode : int64_t {
  kSelfGuidingLoss = 0,
  kBagLoss = 1,  // the bag loss alone
  kBagInstanceLoss = 2,  // BIL (Zhou et al. 2017)
  kMinMeanMaxLoss = 3,  // MMM (Morfi & Stowell 2018); the pooling is the mean
  kBagLogits = 4,  // no loss: the bag logit of each pair
};

// Settings that all pairs share.
struct Settings {
  double delta_l, lam, mask_weight;
  int64_t pooling;
  double pooling_parameter;
  bool per_bag, rescale, weighted;
  int64_t loss;
};

// The results of the passes over the instances of one pair.
struct Sums {
  Kind kind;
  bool positive;  // the label
  int64_t n;  // number of instances
  Extent<double> extent;
  double median;  // median logit, for kPositive
  double loss[3];  // BCE of the negative, ambiguous and positive instances
  int64_t count[3];
  double square;  // sum of the squares of the scaled p, over the instances with M > 0
  double pooled[3];  // sums of PoolingTerms
  int64_t lows, highs;  // kExtremes: numbers of instances equal to the smallest and to the largest logit
};

struct Pair {
  Kind kind;
  double weight;  // w of Eq. 7
  double loss[3];
  int64_t count[3];
  double bag_logit;
  double bag_loss, bag_slope;  // BCE(P, y) and its derivative by the bag logit
  double slope1, slope2;  // values that the pooling needs for dz/dx
  double mask;  // sqrt(mean (p [M > 0])^2)
  double mask_slope;  // d mask / dx = mask_slope * scaled_p^2 * q
  // kBagInstanceLoss: d loss / d (sum of the BCE of the instances); kMinMeanMaxLoss: d loss / dx of a smallest instance
  double instance_slope;
  double high_slope;  // kMinMeanMaxLoss: d loss / dx of a largest instance
};

SGL_HD Pair nonfinite_pair(const Sums& s) {
  // Every term is NaN. The denominators of the other pairs count this pair.
  // Constant indices only: a dynamic index would move these arrays to local memory.
  Pair b = {};
  b.kind = s.kind;
  b.weight = 1;
  b.bag_logit = b.bag_loss = b.mask = nan_of(double());
  b.loss[0] = s.positive ? 0.0 : b.bag_loss;
  b.loss[1] = s.positive ? b.bag_loss : 0.0;
  b.count[0] = s.positive ? 0 : s.n;
  b.count[1] = s.positive ? s.n : 0;
  return b;
}

template <class F>
struct BagLoss {
  F loss, slope;  // BCE(P, y) and its derivative by the bag logit
};

// BCE(P, y) of the bag logit z (Eq. 3). `bag` is probability(z).
template <class F, class Condition>
SGL_HD BagLoss<F> bag_loss_of(F z, const Probability<F>& bag, Condition positive, F pos_weight) {
  const F loss = softplus(select(positive, -z, z), bag.u);
  return {select(positive, pos_weight * loss, loss), select(positive, -(pos_weight * bag.q), bag.p)};
}

SGL_HD Pair finalize_pair(const Sums& s, const Settings& settings, double pos_weight) {
  if (s.kind == Kind::kNonFinite) return nonfinite_pair(s);
  Pair b = {};
  b.kind = s.kind;
  b.bag_logit = nan_of(double());
  if (s.kind == Kind::kExcluded) return b;
  b.weight = 1;
  const double high = s.extent.high;
  const bool has_parts = settings.loss == kSelfGuidingLoss;
  for (int k = 0; k < 3; ++k) {
    b.loss[k] = has_parts ? s.loss[k] : 0.0;
    b.count[k] = has_parts ? s.count[k] : 0;
  }
  const Scale<double> none{0, 0, 0, false};
  if (s.kind == Kind::kPositive && settings.weighted) {
    // Eq. 7, 8
    const double alpha = probability<false>(high, none).p - probability<false>(s.median, none).p;
    b.weight = exp((alpha - 1) * 0.6931471805599453);
  }
  const Scale<double> scale = pooling_scale(settings.pooling, s.extent);
  if (s.square > 0) {
    b.mask = exp(scale.p) * std::sqrt(s.square / static_cast<double>(s.n));
    b.mask_slope = b.mask / s.square;
  }
  if (settings.loss == kBagInstanceLoss && !s.positive) {
    b.bag_loss = s.loss[0] / static_cast<double>(s.n);
    b.instance_slope = 1 / static_cast<double>(s.n);
    return b;
  }
  if (settings.pooling == NoPooling::kCode) return b;
  const BagLogit z = finish_pooling(
      settings.pooling, {{s.pooled[0], s.pooled[1], s.pooled[2]}, s.n, s.extent, scale, settings.pooling_parameter});
  b.bag_logit = z.z;
  b.slope1 = z.slope1;
  b.slope2 = z.slope2;
  b.bag_slope = 1;
  if (settings.loss == kBagLogits) return b;
  const Probability<double> bag = probability<false>(z.z, none);
  if (settings.loss == kMinMeanMaxLoss) {
    // BCE(max p, y), BCE(min p, 0) and BCE(mean p, y / 2), a third each
    const double y = s.positive ? 1 : 0;
    const Probability<double> at_low = probability<false>(s.extent.low, none), at_high = probability<false>(high, none);
    const double of_mean = (1 - y / 2) * softplus(z.z, bag.u) + y / 2 * softplus(-z.z, bag.u);
    const double of_high = s.positive ? softplus(-high, at_high.u) : softplus(high, at_high.u);
    b.bag_loss = (of_high + softplus(s.extent.low, at_low.u) + of_mean) / 3;
    b.bag_slope = (bag.p - y / 2) / 3;
    b.instance_slope = at_low.p / 3 / static_cast<double>(s.lows);
    b.high_slope = (s.positive ? -at_high.q : at_high.p) / 3 / static_cast<double>(s.highs);
    return b;
  }
  const BagLoss<double> of_bag = bag_loss_of(z.z, bag, s.positive, pos_weight);
  b.bag_loss = of_bag.loss;
  b.bag_slope = of_bag.slope;
  if (settings.loss == kBagInstanceLoss) {
    const double difference = b.bag_loss - s.loss[0] / static_cast<double>(s.n);
    b.bag_loss += difference * difference;
    b.instance_slope = -2 * difference / static_cast<double>(s.n);
  }
  return b;
}

SGL_HD double at_least_one(int64_t n) { return n > 1 ? static_cast<double>(n) : 1.0; }

// Sums over the pairs that are not excluded (Eq. 7, 9).
struct Batch {
  int64_t participants;
  int64_t count[3];  // instances in each part
  double part[3], per_bag, bag, mask;
};

SGL_HD void add(Batch& batch, const Pair& b, double class_weight) {
  if (b.kind == Kind::kExcluded) return;
  batch.participants += 1;
  for (int k = 0; k < 3; ++k) {
    if (b.count[k] == 0) continue;
    const double loss = class_weight * b.weight * b.loss[k];
    batch.count[k] += b.count[k];
    batch.part[k] += loss;
    batch.per_bag += loss / static_cast<double>(b.count[k]);
  }
  batch.bag += class_weight * b.bag_loss;
  batch.mask += class_weight * b.mask;
}

SGL_HD void merge(Batch& batch, const Batch& o) {
  batch.participants += o.participants;
  for (int k = 0; k < 3; ++k) {
    batch.count[k] += o.count[k];
    batch.part[k] += o.part[k];
  }
  batch.per_bag += o.per_bag;
  batch.bag += o.bag;
  batch.mask += o.mask;
}

struct Loss {
  double total, bag, instance, mask;
};

SGL_HD Loss loss_of(const Batch& batch, const Settings& settings) {
  const double participants = at_least_one(batch.participants);
  Loss loss = {};
  loss.bag = batch.bag / participants;
  loss.mask = batch.mask / participants;
  if (settings.per_bag) {
    loss.instance = batch.per_bag / participants;
  } else {
    for (int k = 0; k < 3; ++k) loss.instance += batch.part[k] / at_least_one(batch.count[k]);
  }
  loss.total = loss.bag + settings.lam * loss.instance + settings.mask_weight * loss.mask;
  return loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward saves one row per pair for backward. A last row holds the denominators of the batch, which are known only
// after all pairs.

enum Column {
  kColumnKind,
  kColumnLow,
  kColumnHigh,
  kColumnReference,  // as in Extent
  kColumnNegative,  // these three: weight of the BCE of an instance in each part
  kColumnAmbiguous,
  kColumnPositive,
  kColumnMask,  // weight of the mask penalty
  kColumnPooling,  // weight of dz/dx
  kColumnSlope1,
  kColumnSlope2,
  kColumnTieWeight,
  kColumns
};

enum Denominator {  // columns of the last row
  kDenominatorNegative,
  kDenominatorAmbiguous,
  kDenominatorPositive,
  kDenominatorPair
};

template <class T>
SGL_HD void save_row(const Sums& s, const Pair& b, const Settings& settings, double class_weight, T* row) {
  row[kColumnKind] = static_cast<T>(static_cast<int>(b.kind));
  const bool finite = b.kind != Kind::kExcluded && b.kind != Kind::kNonFinite;
  row[kColumnLow] = finite ? static_cast<T>(s.extent.low) : T(0);
  row[kColumnHigh] = finite ? static_cast<T>(s.extent.high) : T(0);
  row[kColumnReference] = finite ? static_cast<T>(s.extent.reference) : T(0);
  if (settings.loss == kSelfGuidingLoss) {
    for (int k = 0; k < 3; ++k) {
      const double weight = settings.lam * class_weight * b.weight;
      row[kColumnNegative + k] = static_cast<T>(settings.per_bag ? weight / at_least_one(b.count[k]) : weight);
    }
  } else {
    row[kColumnNegative] = static_cast<T>(class_weight * b.instance_slope);
    row[kColumnAmbiguous] = T(0);
    row[kColumnPositive] = static_cast<T>(class_weight * b.high_slope);
  }
  row[kColumnMask] = static_cast<T>(settings.mask_weight * class_weight * b.mask_slope);
  row[kColumnPooling] = static_cast<T>(class_weight * b.bag_slope);
  row[kColumnSlope1] = static_cast<T>(b.slope1);
  row[kColumnSlope2] = static_cast<T>(b.slope2);
  row[kColumnTieWeight] = finite ? static_cast<T>(s.extent.tie_weight) : T(0);
}

// Writes the reciprocals of the denominators, multiplied by ``times``.
template <class T>
SGL_HD void save_denominators(const Batch& batch, const Settings& settings, double times, T* row) {
  for (int k = 0; k < kColumns; ++k) row[k] = T(0);
  const double participants = settings.loss == kBagLogits ? 1.0 : at_least_one(batch.participants);
  row[kDenominatorPair] = static_cast<T>(times / participants);
  for (int k = 0; k < 3; ++k)
    row[kDenominatorNegative + k] =
        settings.per_bag ? row[kDenominatorPair] : static_cast<T>(times / at_least_one(batch.count[k]));
}

// Computes the loss from the sums over all pairs. Backward returns ``times`` the gradient of the loss.
template <class T>
SGL_HD void finalize_batch(
    const Batch& batch, const Settings& settings, double times, T* total, T* parts, T* denominators) {
  save_denominators(batch, settings, times, denominators);
  const Loss loss = loss_of(batch, settings);
  *total = static_cast<T>(loss.total);
  parts[0] = static_cast<T>(loss.bag);
  parts[1] = static_cast<T>(loss.instance);
  parts[2] = static_cast<T>(loss.mask);
}

// The operators return a Batch as a tensor that processes sum: its integers first, then its floating-point numbers.
constexpr int64_t kBatchNumbers = 10, kBatchIntegers = 4;
static_assert(sizeof(Batch) == kBatchNumbers * sizeof(double), "");

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of one instance

template <class T>
struct Coefficients {
  Kind kind;
  T low, high;  // smallest and largest logit
  T negative, ambiguous, positive, mask, slope1, slope2, pos_weight;
  Guide<T> guide;
  Scale<T> scale;
  int64_t pooling_code;  // NoPooling if the gradient of the bag logit is 0
  PoolingSettings<T> pooling;
};

template <class T>
SGL_HD Kind kind_of(const T* row) {
  return static_cast<Kind>(static_cast<int>(row[kColumnKind]));
}

// slope1 and slope2 of the pooling, times the gradient of the loss with respect to the bag logit.
template <class T>
struct BagSlopes {
  T slope1, slope2;

  SGL_HD bool zero() const { return slope1 == T(0) && slope2 == T(0); }
};

template <class T>
SGL_HD BagSlopes<T> bag_slopes(const T* row, const T* denominators, T grad_output) {
  const T bag = grad_output * denominators[kDenominatorPair] * row[kColumnPooling];
  return {bag * row[kColumnSlope1], bag * row[kColumnSlope2]};
}

template <class T>
SGL_HD Coefficients<T> coefficients(
    const T* row, const T* denominators, T grad_output, T pos_weight, const Settings& settings) {
  Coefficients<T> k;
  k.kind = kind_of(row);
  const Extent<T> extent{row[kColumnLow], row[kColumnHigh], row[kColumnReference], row[kColumnTieWeight]};
  k.low = extent.low;
  k.high = extent.high;
  k.negative = grad_output * denominators[kDenominatorNegative] * row[kColumnNegative];
  k.ambiguous = grad_output * denominators[kDenominatorAmbiguous] * row[kColumnAmbiguous];
  k.positive = grad_output * denominators[kDenominatorPositive] * row[kColumnPositive];
  k.mask = grad_output * denominators[kDenominatorPair] * row[kColumnMask];
  const BagSlopes<T> of_bag = bag_slopes(row, denominators, grad_output);
  k.slope1 = of_bag.slope1;
  k.slope2 = of_bag.slope2;
  k.pos_weight = pos_weight;
  k.scale = pooling_scale(settings.pooling, extent);
  k.guide = Guide<T>{};
  if (k.kind == Kind::kPositive)
    k.guide = guide_of(extent.low, extent.high, k.scale, settings.delta_l, settings.rescale);
  k.pooling_code = of_bag.zero() ? NoPooling::kCode : settings.pooling;
  k.pooling = pooling_settings(settings.pooling, extent, settings.pooling_parameter);
  return k;
}

// The gradient of the instance terms with respect to the logit of an instance. It is 0 for kinds without such a term.
template <Kind kind, bool scaled, class F, class T>
SGL_HD F instance_slope(F x, const Probability<F>& o, const Coefficients<T>& k) {
  if (kind == Kind::kNegative) return k.negative * o.p;
  if (kind == Kind::kRounded) return k.negative * select(x > T(0), -o.q, o.p);
  if (kind == Kind::kExtremes)
    return select(x == k.low, F(k.negative), F(T(0))) + select(x == k.high, F(k.positive), F(T(0)));
  if (kind != Kind::kPositive) return F(T(0));
  const Target<F> t = target_of(theta_of(x, o, k.guide), k.guide);
  const F weight = t.negative * k.negative + t.ambiguous * k.ambiguous + t.positive * k.positive;
  const F mask = select(t.m > T(0), k.mask * (o.scaled_p * o.scaled_p) * o.q, F(T(0)));
  return weight * bce_slope(o, t.m, k.pos_weight) + mask;
}

}  // namespace sgl
