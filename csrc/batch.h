// From the sums over the instances of each bag-class to the loss of the batch, and from there to what the gradient needs:
// the same for every device.
#pragma once

#include "sgl_math.h"

namespace sgl {

enum class Label : int8_t {
  kUnknown,
  kNegative,
  kPositive
};

enum class Kind : int8_t {
  kAbsent = 0,  // unknown label or no instance: takes no part
  kNegative = 1,
  kPositive = 2,
  kUnranked = 3,  // positive, its instances all alike: only the bag loss sees it
  kBroken = 4,  // holds a NaN or an infinity: loss and gradient are NaN
};

// What the loss is made of, the same for every bag-class.
struct Settings {
  double delta_l, lam, mask_weight;
  int64_t pooling;
  double pooling_parameter;
  bool per_bag, rescale, weighted;
};

// What passes over the instances of one bag-class find out.
struct Sums {
  Kind kind;
  bool positive;  // its label
  int64_t n;  // instances
  double low, high, nearest;  // smallest, largest logit, and the distance of the nearest to zero
  double median;  // of the logits, of a positive bag-class
  double loss[3];  // BCE of the negative, ambiguous and positive instances
  int64_t count[3];
  double square;  // of p at instances with M > 0, scaled as p is
  double pooled[3];  // sums of PoolingTerms
};

// The two numbers that the pooling needs of a bag-class in its gradient are slope1 and slope2.
struct BagClass {
  Kind kind;
  double low, high, nearest;
  double weight;  // w of Eq. 8
  double loss[3];
  int64_t count[3];
  double bag_loss, bag_slope;  // BCE(P, y) and its derivative by the bag logit
  double slope1, slope2;
  double mask;  // sqrt(mean (p [M > 0])^2)
  double mask_slope;  // d mask / dx = mask_slope * scaled_p^2 * q
};

SGL_HD BagClass finish(const Sums& s, const Settings& settings, double pos_weight) {
  BagClass b = {};
  b.kind = s.kind;
  if (s.kind == Kind::kAbsent) return b;
  b.weight = 1;
  if (s.kind == Kind::kBroken) {
    // never silently dropped, whatever the weights of the terms; Eq. 8's denominators are those of the others, too
    // not by an index that is computed, which would put the arrays of a CUDA thread into memory
    b.bag_loss = nan_of(double());
    b.loss[0] = s.positive ? 0.0 : b.bag_loss;
    b.loss[1] = s.positive ? b.bag_loss : 0.0;
    b.count[0] = s.positive ? 0 : s.n;
    b.count[1] = s.positive ? s.n : 0;
    return b;
  }
  b.low = s.low;
  b.high = s.high;
  b.nearest = s.nearest;
  for (int k = 0; k < 3; ++k) {
    b.loss[k] = s.loss[k];
    b.count[k] = s.count[k];
  }
  const Scale<double> scale = scale_of(s.low, s.high, s.nearest, settings.pooling);
  const Scale<double> none{0, 0, 0, false};
  if (s.kind == Kind::kPositive && settings.weighted) {
    // Eq. 7, 8
    const double alpha = probability<false>(s.high, none).p - probability<false>(s.median, none).p;
    b.weight = exp((alpha - 1) * 0.6931471805599453);
  }
  if (s.square > 0) {
    b.mask = exp(scale.p) * std::sqrt(s.square / static_cast<double>(s.n));
    b.mask_slope = b.mask / s.square;
  }
  if (settings.pooling == kNone) return b;
  const BagLogit z = finish_pooling(
      settings.pooling, s.pooled[0], s.pooled[1], s.pooled[2], s.n, s.high, scale, settings.pooling_parameter);
  b.slope1 = z.slope1;
  b.slope2 = z.slope2;
  // BCE(P, y) (Eq. 3)
  const Probability<double> bag = probability<false>(z.z, none);
  b.bag_loss = s.positive ? pos_weight * softplus(-z.z, bag.u) : softplus(z.z, bag.u);
  b.bag_slope = s.positive ? -(pos_weight * bag.q) : bag.p;
  return b;
}

SGL_HD double at_least_one(int64_t n) { return n > 1 ? static_cast<double>(n) : 1.0; }

// Sums over the bag-classes that take part (Eq. 8, 9).
struct Batch {
  int64_t participants;
  int64_t count[3];  // instances in each part
  double part[3], per_bag, bag, mask;
};

SGL_HD void add(Batch& batch, const BagClass& b, double class_weight) {
  if (b.kind == Kind::kAbsent) return;
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
// What forward saves for backward: a row of each bag-class, and a last one of what they share, the batch's denominators,
// which are known only when all bag-classes are.

enum Column {
  kColumnKind,
  kColumnLow,
  kColumnHigh,
  kColumnNearest,
  kColumnNegative,  // weight of the BCE of an instance in each part
  kColumnAmbiguous,
  kColumnPositive,
  kColumnMask,  // weight of the mask penalty
  kColumnPooling,  // weight of dz/dx
  kColumnSlope1,
  kColumnSlope2,
  kColumns
};

enum Share {  // columns of the last row
  kShareNegative,
  kShareAmbiguous,
  kSharePositive,
  kShareBagClass
};

template <class T>
SGL_HD void save_row(const BagClass& b, const Settings& settings, double class_weight, T* row) {
  row[kColumnKind] = static_cast<T>(static_cast<int>(b.kind));
  row[kColumnLow] = static_cast<T>(b.low);
  row[kColumnHigh] = static_cast<T>(b.high);
  row[kColumnNearest] = static_cast<T>(b.nearest);
  for (int k = 0; k < 3; ++k) {
    const double divisor = settings.per_bag ? at_least_one(b.count[k]) : 1.0;
    row[kColumnNegative + k] = static_cast<T>(settings.lam * class_weight * b.weight / divisor);
  }
  row[kColumnMask] = static_cast<T>(settings.mask_weight * class_weight * b.mask_slope);
  row[kColumnPooling] = static_cast<T>(class_weight * b.bag_slope);
  row[kColumnSlope1] = static_cast<T>(b.slope1);
  row[kColumnSlope2] = static_cast<T>(b.slope2);
}

template <class T>
SGL_HD void save_shares(const Batch& batch, const Settings& settings, double times, T* row) {
  for (int k = 0; k < kColumns; ++k) row[k] = T(0);
  row[kShareBagClass] = static_cast<T>(times / at_least_one(batch.participants));
  for (int k = 0; k < 3; ++k)
    row[kShareNegative + k] =
        settings.per_bag ? row[kShareBagClass] : static_cast<T>(times / at_least_one(batch.count[k]));
}

// What is left to do when all bag-classes are known; the gradient will be ``times`` that of the loss.
template <class T>
SGL_HD void conclude(const Batch& batch, const Settings& settings, double times, T* total, T* parts, T* shares) {
  save_shares(batch, settings, times, shares);
  const Loss loss = loss_of(batch, settings);
  *total = static_cast<T>(loss.total);
  parts[0] = static_cast<T>(loss.bag);
  parts[1] = static_cast<T>(loss.instance);
  parts[2] = static_cast<T>(loss.mask);
}

// A Batch as the operators hand it out, to be added up over processes: its integers first, then its floating numbers.
constexpr int64_t kBatchNumbers = 10;
static_assert(sizeof(Batch) == kBatchNumbers * sizeof(double), "");

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of one instance

template <class T>
struct Coefficients {
  Kind kind;
  T negative, ambiguous, positive, mask, slope1, slope2, pos_weight;
  Guide<T> guide;
  Scale<T> scale;
  PoolingSettings<T> pooling;
};

template <class T>
SGL_HD Coefficients<T> coefficients(
    const T* row, const T* shares, T grad_output, T pos_weight, const Settings& settings) {
  Coefficients<T> k;
  k.kind = static_cast<Kind>(static_cast<int>(row[kColumnKind]));
  const T low = row[kColumnLow], high = row[kColumnHigh];
  k.negative = grad_output * shares[kShareNegative] * row[kColumnNegative];
  k.ambiguous = grad_output * shares[kShareAmbiguous] * row[kColumnAmbiguous];
  k.positive = grad_output * shares[kSharePositive] * row[kColumnPositive];
  k.mask = grad_output * shares[kShareBagClass] * row[kColumnMask];
  const T bag = grad_output * shares[kShareBagClass] * row[kColumnPooling];
  k.slope1 = bag * row[kColumnSlope1];
  k.slope2 = bag * row[kColumnSlope2];
  k.pos_weight = pos_weight;
  k.scale = scale_of(low, high, row[kColumnNearest], settings.pooling);
  k.guide = Guide<T>{};
  if (k.kind == Kind::kPositive) k.guide = guide_of(low, high, k.scale, settings.delta_l, settings.rescale);
  k.pooling = pooling_settings(settings.pooling, low, high, settings.pooling_parameter);
  return k;
}

// Of the instance loss and the mask penalty.
template <bool is_positive, bool scaled, class F, class T>
SGL_HD F instance_slope(F x, const Probability<F>& o, const Coefficients<T>& k) {
  if (!is_positive) return k.negative * o.p;
  const Target<F> t = target_of(theta_of(x, o, k.guide), k.guide);
  const F weight = t.negative * k.negative + t.ambiguous * k.ambiguous + t.positive * k.positive;
  const F mask = select(t.m > T(0), k.mask * (o.scaled_p * o.scaled_p) * o.q, F(T(0)));
  return weight * bce_slope(o, t.m, k.pos_weight) + mask;
}

}  // namespace sgl
