// Forward: a warp or a block takes one bag-class after another, its first pass brings the logits from memory, and the
// others find them in the cache. A negative bag-class needs the first pass alone, unless its pooling wants sums. What is
// found is finished for several bag-classes at once, a thread each, and the last block to be done adds up the blocks.
#pragma once

#include "group.cuh"
#include "rows.cuh"

namespace sgl {
namespace cuda {

// ---------------------------------------------------------------------------------------------------------------------
// What the passes find

template <class T>
struct FirstPass {
  double loss;  // of an instance of a negative bag; NaN if a logit is NaN or infinite
  T low, high, nearest;
  int ties;  // at high
  int n;
  int unused;  // a whole number of 8 bytes

  SGL_DEVICE void merge(const FirstPass& o) {
    loss += o.loss;
    low = o.low < low ? o.low : low;
    nearest = o.nearest < nearest ? o.nearest : nearest;
    ties = o.high > high ? o.ties : o.high == high ? ties + o.ties : ties;
    high = o.high > high ? o.high : high;
    n += o.n;
  }
};

struct GuidedPass {
  double loss[3], square;
  int negatives, positives;

  SGL_DEVICE void merge(const GuidedPass& o) {
    for (int k = 0; k < 3; ++k) loss[k] += o.loss[k];
    square += o.square;
    negatives += o.negatives;
    positives += o.positives;
  }
};

struct PooledPass {
  double sum[3];

  SGL_DEVICE void merge(const PooledPass& o) {
    for (int k = 0; k < 3; ++k) sum[k] += o.sum[k];
  }
};

struct CountPass {
  int n;

  SGL_DEVICE void merge(const CountPass& o) { n += o.n; }
};

template <class T>
struct LargestPass {
  T x;

  SGL_DEVICE void merge(const LargestPass& o) { x = o.x > x ? o.x : x; }
};

// ---------------------------------------------------------------------------------------------------------------------
// The passes

template <class T, class In>
SGL_DEVICE FirstPass<T> first_pass(const Row<In>& row, bool negative, Group& group) {
  FirstPass<T> found = {0, infinity_of(T()), -infinity_of(T()), infinity_of(T()), 0, 0, 0};
  T not_finite = T(0), above = T(0);
  LogOfProduct<T> product;
  for_instances<kPacks<In>, T>(
      row, group,
      [&](T x, bool live) {
        // a dead x is a NaN, which no comparison takes
        const T magnitude = x < T(0) ? -x : x;
        found.low = x < found.low ? x : found.low;
        found.nearest = magnitude < found.nearest ? magnitude : found.nearest;
        found.ties = x > found.high ? 1 : found.ties + (x == found.high ? 1 : 0);
        found.high = x > found.high ? x : found.high;
        found.n += live ? 1 : 0;
        not_finite += (live ? x : T(0)) * T(0);
        if (negative) {
          product.multiply_by_1_plus(live ? exp(-magnitude) : T(0));
          above += x > T(0) ? x : T(0);
        }
      },
      [&] {
        if (!negative) return;
        // softplus(x) = max(x, 0) + log(1 + e^-|x|)
        found.loss += static_cast<double>(above + product.log());
        above = T(0);
        product = LogOfProduct<T>();
      });
  found.loss += static_cast<double>(not_finite);
  return group.reduce(found);
}

template <bool scaled, class T, class In>
SGL_DEVICE GuidedPass
guided_pass(const Row<In>& row, const Guide<T>& guide, const Scale<T>& scale, T pos_weight, T harmless, Group& group) {
  GuidedPass found = {};
  T negative = T(0), ambiguous = T(0), positive = T(0), square = T(0);
  for_instances<0, T>(
      row, group,
      [&](T x, bool live) {
        x = live ? x : harmless;
        const Probability<T> o = probability<scaled>(x, scale);
        const Target<T> t = target_of(theta_of(x, o, guide), guide);
        const T l = live ? bce(x, o, t.m, pos_weight) : T(0);
        negative += l * t.negative;
        ambiguous += l * t.ambiguous;
        positive += l * t.positive;
        square += live && t.m > T(0) ? o.scaled_p * o.scaled_p : T(0);
        found.negatives += live && t.negative != T(0) ? 1 : 0;
        found.positives += live && t.positive != T(0) ? 1 : 0;
      },
      [&] {
        found.loss[0] += static_cast<double>(negative);
        found.loss[1] += static_cast<double>(ambiguous);
        found.loss[2] += static_cast<double>(positive);
        found.square += static_cast<double>(square);
        negative = ambiguous = positive = square = T(0);
      });
  return found;
}

template <int64_t pooling, bool scaled, class T, class In>
SGL_DEVICE PooledPass
pooled_pass(const Row<In>& row, const Scale<T>& scale, const PoolingSettings<T>& settings, Group& group) {
  PooledPass found = {};
  T a = T(0), b = T(0), c = T(0);
  for_instances<0, T>(
      row, group,
      [&](T x, bool live) {
        x = live ? x : settings.high;
        const PoolingTerms<T> t = pooling_terms<pooling, scaled>(x, probability<scaled>(x, scale), scale, settings);
        a += live ? t.a : T(0);
        b += live ? t.b : T(0);
        c += live ? t.c : T(0);
      },
      [&] {
        found.sum[0] += static_cast<double>(a);
        found.sum[1] += static_cast<double>(b);
        found.sum[2] += static_cast<double>(c);
        a = b = c = T(0);
      });
  return found;
}

template <bool scaled, class T, class In>
SGL_DEVICE PooledPass pooled_pass(
    int64_t pooling, const Row<In>& row, const Scale<T>& scale, const PoolingSettings<T>& settings, Group& group) {
  switch (pooling) {
    case kMean:
      return pooled_pass<kMean, scaled>(row, scale, settings, group);
    case kMeanLogits:
      return pooled_pass<kMeanLogits, false>(row, scale, settings, group);
    case kSoftmax:
      return pooled_pass<kSoftmax, scaled>(row, scale, settings, group);
    case kLinearSoftmax:
      return pooled_pass<kLinearSoftmax, scaled>(row, scale, settings, group);
    case kLSE:
      return pooled_pass<kLSE, scaled>(row, scale, settings, group);
    case kNoisyOr:
      return pooled_pass<kNoisyOr, scaled>(row, scale, settings, group);
    default:
      return PooledPass{};
  }
}

template <class T, class In>
SGL_DEVICE T median_of(const Row<In>& row, int n, T low, T high, Group& group) {
  return lower_median(
      // a mean would be one more number to agree on in the first pass
      n, low, high, low + (high - low) * T(0.5),
      [&](T pivot) {
        CountPass found = {0};
        for_instances<1, T>(row, group, [&](T x, bool) { found.n += x <= pivot ? 1 : 0; }, [] {});
        return static_cast<int64_t>(group.reduce(found).n);
      },
      [&](T pivot) {
        LargestPass<T> found = {low};
        for_instances<1, T>(
            row, group, [&](T x, bool) { found.x = (x <= pivot) & (x > found.x) ? x : found.x; }, [] {});
        return group.reduce(found).x;
      });
}

// What one thread of the group has to say of the bag-class is written to `out`.
template <class T, class In>
SGL_DEVICE void find_sums(
    const Settings& settings, const Row<In>& row, Label label, T pos_weight, Group& group, Sums& out) {
  const bool writes = group.rank() == 0, positive = label == Label::kPositive;
  if (writes) {
    out.kind = Kind::kAbsent;
    out.positive = positive;
    for (int k = 0; k < 3; ++k) out.loss[k] = out.count[k] = 0;
    out.square = 0;
  }
  if (label == Label::kUnknown) return;
  const FirstPass<T> first = first_pass<T>(row, !positive, group);
  if (first.n == 0) return;
  const bool broken = first.loss != first.loss;
  const bool unranked = positive && settings.rescale && first.low == first.high;
  if (writes) {
    out.kind = broken ? Kind::kBroken : unranked ? Kind::kUnranked : positive ? Kind::kPositive : Kind::kNegative;
    out.n = first.n;
    out.low = first.low;
    out.high = first.high;
    out.nearest = first.nearest;
    if (!positive) {
      out.loss[0] = first.loss;
      out.count[0] = first.n;
    }
    if (settings.pooling == kMax) out.pooled[0] = first.ties;
  }
  if (broken) return;
  const Scale<T> scale = scale_of(first.low, first.high, first.nearest, settings.pooling);
  if (positive && !unranked) {
    const Guide<T> guide = guide_of(first.low, first.high, scale, settings.delta_l, settings.rescale);
    const GuidedPass guided = group.reduce(
        scale.any ? guided_pass<true>(row, guide, scale, pos_weight, first.low, group)
                  : guided_pass<false>(row, guide, scale, pos_weight, first.low, group));
    if (writes) {
      for (int k = 0; k < 3; ++k) out.loss[k] = guided.loss[k];
      out.count[0] = guided.negatives;
      out.count[2] = guided.positives;
      out.count[1] = first.n - guided.negatives - guided.positives;
      out.square = guided.square;
    }
    if (settings.weighted) {
      const T median = median_of(row, first.n, first.low, first.high, group);
      if (writes) out.median = median;
    }
  }
  if (settings.pooling == kNone || settings.pooling == kMax) return;
  const PoolingSettings<T> pooling =
      pooling_settings(settings.pooling, first.low, first.high, settings.pooling_parameter);
  const PooledPass pooled = group.reduce(
      scale.any ? pooled_pass<true>(settings.pooling, row, scale, pooling, group)
                : pooled_pass<false>(settings.pooling, row, scale, pooling, group));
  if (writes)
    for (int k = 0; k < 3; ++k) out.pooled[k] = pooled.sum[k];
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

struct BatchSums : Batch {
  SGL_DEVICE void merge(const BatchSums& o) { sgl::merge(*this, o); }
};

// Bag-classes that are finished together, a thread each, as their few numbers in double cost as long as a pass: so many
// of a block, or of each of its warps.
constexpr int kMaxGroups = 8, kOfBlock = 32, kOfWarp = 8;
constexpr int kWaiting = kMaxGroups * kOfWarp;

struct ForwardShared {
  GroupShared group;
  Sums sums[kWaiting];
  BatchSums batch[kWaiting];
  bool is_last;
};

SGL_DEVICE unsigned unit_of(const Group& group, unsigned round) {
  return (round * gridDim.x + blockIdx.x) * group.count() + group.index();
}

template <class T>
SGL_DEVICE void finish_one(
    const Call& call, const Forward& forward, const Sums& sums, unsigned unit, BatchSums& batch) {
  const unsigned cls = unit % call.rows.classes;
  const T* pos_weights = static_cast<const T*>(call.pos_weight);
  const T* class_weights = static_cast<const T*>(forward.class_weight);
  const double pos_weight = pos_weights == nullptr ? 1.0 : pos_weights[cls];
  const double class_weight = class_weights == nullptr ? 1.0 : class_weights[cls];
  const BagClass b = finish(sums, call.settings, pos_weight);
  save_row(b, call.settings, class_weight, static_cast<T*>(forward.saved) + int64_t{unit} * kColumns);
  add(batch, b, class_weight);
}

// Goes through this block's bag-classes, the unit of round r being the r-th of its group, and adds up what the loss is
// made of.
template <class T, class In, class RowOf>
SGL_DEVICE BatchSums sums_of_block(
    const Call& call, const Forward& forward, bool warp_per_bag_class, ForwardShared& shared, const RowOf& row_of) {
  const Settings& settings = call.settings;
  const T* pos_weights = static_cast<const T*>(call.pos_weight);

  Group group(warp_per_bag_class, shared.group);
  const unsigned together = warp_per_bag_class ? kOfWarp : kOfBlock;
  // this group's part of what is shared
  const unsigned mine = group.index() * together;
  if (static_cast<unsigned>(group.rank()) < together) shared.batch[mine + group.rank()] = BatchSums{};

  // numbers that the loop need not keep are computed anew
  for (unsigned round = 0; unit_of(group, round) < call.rows.units; ++round) {
    const unsigned unit = unit_of(group, round), waiting = round % together;
    const unsigned bag = unit / call.rows.classes, cls = unit - bag * call.rows.classes;
    const Label label = label_of(forward.targets, bag, cls);
    const Row<In> row = row_of(group, round, bag, cls);
    const T pos_weight = pos_weights == nullptr ? T(1) : pos_weights[cls];
    find_sums(settings, row, label, pos_weight, group, shared.sums[mine + waiting]);
    if (waiting + 1 < together && unit_of(group, round + 1) < call.rows.units) continue;
    group.sync();
    const unsigned k = group.rank();
    if (k <= waiting)
      finish_one<T>(call, forward, shared.sums[mine + k], unit_of(group, round - waiting + k), shared.batch[mine + k]);
    group.sync();
  }
  __syncthreads();

  Group block(false, shared.group);
  BatchSums batch = {};
  for (unsigned k = block.rank(); k < group.count() * together; k += block.size()) batch.merge(shared.batch[k]);
  return block.reduce(batch);
}

// By the last block to be done: adds up the blocks.
template <class T>
SGL_DEVICE void save_batch(const Call& call, const Forward& forward, ForwardShared& shared) {
  Group block(false, shared.group);
  BatchSums batch = {};
  const BatchSums* of_block = static_cast<const BatchSums*>(forward.of_block);
  for (unsigned b = block.rank(); b < gridDim.x; b += block.size()) batch.merge(of_block[b]);
  batch = block.reduce(batch);
  if (block.rank() == 0) {
    if (forward.sums != nullptr) *forward.sums = batch;
    conclude(
        batch, call.settings, 1, static_cast<T*>(forward.total), static_cast<T*>(forward.parts),
        static_cast<T*>(forward.saved) + int64_t{call.rows.units} * kColumns);
  }
}

// By one thread: what save_batch does, from sums over several batches.
template <class T>
__global__ void conclude_kernel(
    const Batch* sums, const __grid_constant__ Settings settings, double times, T* total, T* parts, T* shares) {
  conclude(*sums, settings, times, total, parts, shares);
}

template <class T, class In>
__global__ void __maxnreg__(kRegisters<T>) forward_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Forward forward, const bool warp_per_bag_class) {
  SGL_SHARED(ForwardShared, shared);
  const auto row_of = [&](const Group&, unsigned, unsigned bag, unsigned cls) {
    return Row<In>(call, place_of(call.rows, bag, cls));
  };
  const BatchSums batch = sums_of_block<T, In>(call, forward, warp_per_bag_class, shared, row_of);
  if (threadIdx.x == 0) {
    forward.of_block[blockIdx.x] = batch;
    __threadfence();
    // counts up to the last block, and that one sets it back to 0
    shared.is_last = atomicInc(forward.blocks_done, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (shared.is_last) save_batch<T>(call, forward, shared);
}

}  // namespace cuda
}  // namespace sgl
