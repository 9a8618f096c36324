// Forward: a group of threads processes one pair (bag, class) after another, or several pairs at once. The first pass loads the
// logits from memory, and the others find them in the cache. A negative pair needs the first pass alone, unless its pooling
// has sums. A block finalizes several pairs together, one thread per pair. The last block that ends
// adds the sums of all blocks.
#pragma once

#include <type_traits>

#include "group.cuh"
#include "rows.cuh"

namespace sgl {
namespace cuda {

// ---------------------------------------------------------------------------------------------------------------------
// The results of the passes

// `ties`: whether the instances at `high` are counted, or else the smallest magnitude is found.
template <class T, bool ties>
struct FirstPass {
  double loss;  // of an instance of a negative bag; NaN if a logit is NaN or infinite
  T low, high;
  std::conditional_t<ties, int, T> more;  // instances at high, or the smallest |x|
  int n;

  // Of no instances.
  SGL_DEVICE FirstPass() : loss(0), low(infinity_of(T())), high(-infinity_of(T())), more(0), n(0) {
    if constexpr (!ties) more = infinity_of(T());
  }

  SGL_DEVICE void merge(const FirstPass& o) {
    loss += o.loss;
    low = smaller(low, o.low);
    if constexpr (ties) {
      add_ties(o.high, o.more);
    } else {
      more = smaller(more, o.more);
    }
    high = larger(high, o.high);
    n += o.n;
  }
  // before `high` is merged
  SGL_DEVICE void add_ties(T other_high, int others) {
    more = other_high > high ? others : other_high == high ? more + others : more;
  }
};

// FirstPass with either of the numbers; the other one is 0.
template <class T>
struct FirstFound {
  double loss;
  T low, high, nearest;
  int ties, n;
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

struct SumPass {
  double sum;

  SGL_DEVICE void merge(const SumPass& o) { sum += o.sum; }
};

struct CountPass {
  int n;

  SGL_DEVICE void merge(const CountPass& o) { n += o.n; }
};

struct RankPass {
  int below, equal;

  SGL_DEVICE void merge(const RankPass& o) {
    below += o.below;
    equal += o.equal;
  }
};

template <class T>
struct LargestPass {
  T x;

  SGL_DEVICE void merge(const LargestPass& o) { x = larger(x, o.x); }
};

// ---------------------------------------------------------------------------------------------------------------------
// The division of the work

// A long pair takes two launches: the blocks of the first one process pieces of pairs, and the second one continues with what
// they found.
enum class Stage {
  kAll,
  kFirstPass,
  kOthers
};

// What the passes have to compute for these settings. The host computes this once for all threads.
struct Needs {
  bool has_instances;  // a negative pair has the loss of its instances
  bool ties;  // the instances at the largest logit are counted
  bool nearest;  // the smallest |x| is kept
  bool counts_maxima;
  bool constant;  // a positive pair whose logits are all equal is a kind of its own
  bool others[2];  // [positive]: the pair needs other passes than the first one
  Kind kind[2];  // [positive]
};

// Whether the first pass alone gives all sums of a pair.
inline bool first_pass_suffices(const Settings& settings, bool positive) {
  const bool has_instances = settings.loss == kSelfGuidingLoss || settings.loss == kBagInstanceLoss;
  const bool is_pooled = has_sums(settings.pooling) && !counts_maxima(settings.pooling);
  return !(positive && has_instances) && settings.loss != kMinMeanMaxLoss && !is_pooled;
}

inline Needs needs_of(const Settings& settings) {
  Needs needs = {};
  needs.has_instances = settings.loss == kSelfGuidingLoss || settings.loss == kBagInstanceLoss;
  needs.counts_maxima = counts_maxima(settings.pooling);
  needs.ties = needs.counts_maxima || settings.loss == kMinMeanMaxLoss;
  needs.nearest = pooling_reference(settings.pooling) == Reference::kNearestToZero;
  needs.constant = settings.loss == kSelfGuidingLoss && settings.rescale;
  needs.kind[1] = settings.loss == kSelfGuidingLoss   ? Kind::kPositive
                  : settings.loss == kBagInstanceLoss ? Kind::kRounded
                  : settings.loss == kMinMeanMaxLoss  ? Kind::kExtremes
                                                      : Kind::kBagOnly;
  needs.kind[0] = needs.has_instances ? Kind::kNegative : needs.kind[1];
  for (int positive = 0; positive < 2; ++positive)
    needs.others[positive] = !first_pass_suffices(settings, positive == 1);
  return needs;
}

// How Plan divides the work of a launch. 2^group_bits threads form a group with 2^part_bits parts. 2^piece_bits is the number of
// pieces of a pair: kFirstPass has a block for each piece, and kOthers merges this number of results.
struct Work {
  Stage stage;
  int group_bits, part_bits, piece_bits;
  int pair_bits;  // 2^pair_bits pairs of a block are processed at once
  Divisor classes;
  Needs needs;
};

// ---------------------------------------------------------------------------------------------------------------------
// The passes

template <bool negative, bool ties, class T, class In>
SGL_DEVICE FirstPass<T, ties> first_pass(const Row<In>& row, const Group& group) {
  FirstPass<T, ties> found;
  T not_finite = T(0), above = T(0);
  LogOfProduct<T> product;
  // NaN makes `above` NaN, and an infinite logit is the largest or the smallest
  constexpr bool found_by_extremes = negative && kMaximumOfNaN && std::is_same_v<T, float>;
  for_instances<kPacks<In>, T>(
      row, group,
      [&](const auto& x, bool live) {
        constexpr int kCount = sizeof(x) / sizeof(T);
        // Where there is no instance, x is a NaN, which smaller() and larger() ignore.
        T high = -infinity_of(T());
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          const T magnitude = magnitude_of(x[v]);
          high = larger(high, x[v]);
          found.low = smaller(found.low, x[v]);
          if constexpr (!ties) found.more = smaller(found.more, magnitude);
          found.n += live ? 1 : 0;
          if constexpr (!found_by_extremes) not_finite += (live ? x[v] : T(0)) * T(0);
          if (negative) {
            product.multiply_by_1_plus(live ? exp(-magnitude) : T(0));
            above += found_by_extremes ? larger_or_nan(T(0), live ? x[v] : T(0)) : larger(T(0), x[v]);
          }
        }
        if constexpr (ties) {
          int at_high = 0;
#pragma unroll
          for (int v = 0; v < kCount; ++v) at_high += x[v] == high ? 1 : 0;
          found.add_ties(high, at_high);
        }
        found.high = larger(found.high, high);
      },
      [&] {
        if (!negative) return;
        // softplus(x) = max(x, 0) + log(1 + e^-|x|)
        found.loss += static_cast<double>(above + product.log());
        above = T(0);
        product = LogOfProduct<T>();
      });
  if (found_by_extremes && found.n > 0) not_finite = found.low * T(0) + found.high * T(0);
  found.loss += static_cast<double>(not_finite);
  return found;
}

// The first pass of this part of the group. `partial`: what it found in the pieces of all pairs. `piece`: of this block. False if
// the launch ends with it.
template <bool ties, class T, class In>
SGL_DEVICE bool find_first(
    const Row<In>& row, bool negative, const Work& work, PartialResult* partial, unsigned pair, unsigned piece,
    Group& group, FirstFound<T>& result) {
  FirstPass<T, ties> found;
  static_assert(sizeof(found) <= sizeof(PartialResult), "fits into the workspace");
  if (work.stage == Stage::kOthers) {
    if (group.rank() < 1 << work.piece_bits)
      found = *reinterpret_cast<const FirstPass<T, ties>*>(partial + ((pair << work.piece_bits) + group.rank()));
  } else {
    // One variant for each combination, without work that the row does not need.
    found = negative ? first_pass<true, ties, T>(row, group) : first_pass<false, ties, T>(row, group);
  }
  found = group.reduce(found);
  if (work.stage == Stage::kFirstPass) {
    if (group.rank() == 0)
      *reinterpret_cast<FirstPass<T, ties>*>(partial + ((pair << work.piece_bits) + piece)) = found;
    return false;
  }
  result = {found.loss, found.low, found.high, ties ? T(0) : T(found.more), ties ? int(found.more) : 0, found.n};
  return true;
}

// With pos_weight = 1, the logarithms of the BCE all have the weight 1. So three products take the place of a logarithm for each
// instance. With another pos_weight, each ambiguous instance needs its own logarithm.
template <bool scaled, class T, class In>
SGL_DEVICE GuidedPass
guided_pass(const Row<In>& row, const Guide<T>& guide, const Scale<T>& scale, T pos_weight, const Group& group) {
  GuidedPass found = {};
  T negative = T(0), ambiguous = T(0), positive = T(0), square = T(0);
  LogOfProduct<T> of_negative, of_ambiguous, of_positive;
  for_instances<0, T>(
      row, group, one_by_one([&](T x, bool) {
        const Probability<T> o = probability<scaled>(x, scale);
        const T theta = theta_of(x, o, guide);
        const bool is_negative = theta<guide.delta_l, is_positive = theta> guide.delta_h;
        const bool is_ambiguous = !is_negative && !is_positive;
        const T above = larger(T(0), x), below = above - x;  // exact
        negative += is_negative ? above : T(0);
        positive += is_positive ? below : T(0);
        of_negative.multiply_by_1_plus(is_negative ? o.u : T(0));
        of_positive.multiply_by_1_plus(is_positive ? o.u : T(0));
        T linear = (T(1) - theta) * above + pos_weight * theta * below;
        if (pos_weight != T(1)) {
          linear += (T(1) - theta + pos_weight * theta) * log1p_unit(o.u);
        } else {
          of_ambiguous.multiply_by_1_plus(is_ambiguous ? o.u : T(0));
        }
        ambiguous += is_ambiguous ? linear : T(0);
        square += !is_negative && theta > T(0) ? o.scaled_p * o.scaled_p : T(0);
        found.negatives += is_negative ? 1 : 0;
        found.positives += is_positive ? 1 : 0;
      }),
      [&] {
        found.loss[0] += static_cast<double>(negative + of_negative.log());
        found.loss[1] += static_cast<double>(ambiguous + of_ambiguous.log());
        found.loss[2] += static_cast<double>(pos_weight * (positive + of_positive.log()));
        found.square += static_cast<double>(square);
        negative = ambiguous = positive = square = T(0);
        of_negative = of_ambiguous = of_positive = LogOfProduct<T>();
      });
  return found;
}

// BCE of every instance against its rounded probability: log(1 + e^-|x|)
template <class T, class In>
SGL_DEVICE double rounded_pass(const Row<In>& row, Group& group) {
  SumPass found = {0};
  LogOfProduct<T> product;
  for_instances<0, T>(
      row, group, one_by_one([&](T x, bool) { product.multiply_by_1_plus(exp(-magnitude_of(x))); }), [&] {
        found.sum += static_cast<double>(product.log());
        product = LogOfProduct<T>();
      });
  return group.reduce(found).sum;
}

// The sums of terms(x) over the instances.
template <int kSums, class T, class In, class Terms>
SGL_DEVICE PooledPass pooled_pass(const Row<In>& row, const Group& group, const Terms& terms) {
  PooledPass found = {};
  T a = T(0), b = T(0), c = T(0);
  for_instances<0, T>(
      row, group, one_by_one([&](T x, bool) {
        const PoolingTerms<T> t = terms(x);
        a += t.a;
        if (kSums > 1) b += t.b;
        if (kSums > 2) c += t.c;
      }),
      [&] {
        found.sum[0] += static_cast<double>(a);
        if (kSums > 1) found.sum[1] += static_cast<double>(b);
        if (kSums > 2) found.sum[2] += static_cast<double>(c);
        a = b = c = T(0);
      });
  return found;
}

template <class T, class In>
SGL_DEVICE PooledPass
pooled_sums(int64_t code, const Row<In>& row, const Scale<T>& scale, const PoolingSettings<T>& settings, Group& group) {
  if (scale.any) {
    // This is rare: one loop chooses the pooling for each instance, which saves code.
    return pooled_pass<3, T>(row, group, [&](T x) {
      const Probability<T> o = probability<true>(x, scale);
      return with_pooling(
          code, [&](auto pooling) { return decltype(pooling)::template terms<true>(x, o, scale, settings); });
    });
  }
  return with_pooling(code, [&](auto pooling) {
    using P = decltype(pooling);
    if constexpr (P::kSums > 0 && !P::kCountsMaxima) {
      return pooled_pass<P::kSums, T>(
          row, group, [&](T x) { return P::template terms<false>(x, probability<false>(x, scale), scale, settings); });
    } else {
      return PooledPass{};
    }
  });
}

template <class T, class In>
SGL_DEVICE int64_t count_up_to(const Row<In>& row, T pivot, Group& group) {
  CountPass found = {0};
  for_instances<0, T>(row, group, one_by_one([&](T x, bool) { found.n += x <= pivot ? 1 : 0; }), [] {});
  return group.reduce(found).n;
}

// The numbers of instances below `value` and equal to it.
template <class T, class In>
SGL_DEVICE RankPass rank_of(const Row<In>& row, T value, Group& group) {
  RankPass found = {0, 0};
  for_instances<1, T>(
      row, group, one_by_one([&](T x, bool) {
        found.below += x < value ? 1 : 0;
        found.equal += x == value ? 1 : 0;
      }),
      [] {});
  return group.reduce(found);
}

// The bins in which the logits of a pair are counted: a warp has 256 of them, a block more. A group uses the elements of `found`
// and `taken` at the number of its first warp.
struct SearchShared {
  static constexpr int kBins = 8, kTaken = 4;  // of a thread: its bins, and the logits that fit into their memory
  struct Found {
    uint32_t bin, before, inside;
  };
  alignas(8) uint32_t bins[kMaxThreads * kBins];
  uint32_t of_warp[kMaxThreads / kWarp];
  Found found[kMaxThreads / kWarp];
  uint32_t taken[kMaxThreads / kWarp];
};

// x >= 0 rounded to an integer. It has to be less than 2^23.
SGL_DEVICE uint32_t rounded_fma(float a, float b) { return bits_of<uint32_t>(std::fma(a, b, 8388608.0f)) & 0x7fffffu; }
SGL_DEVICE uint32_t rounded_fma(double a, double b) {
  return static_cast<uint32_t>(bits_of<uint64_t>(std::fma(a, b, 4503599627370496.0)));
}

// The `wanted`-th smallest logit in two passes. The first one counts the logits in bins of equal width between `low` and `high`.
// The second one takes the logits of the bin that has the result. False if that bin has too many logits, or if the range of the
// logits is below 1e-30 or above 1e30.
template <class T, class In>
SGL_DEVICE bool search_bins(
    const Row<In>& row, uint32_t wanted, T low, T high, Group& group, SearchShared& shared, T& result) {
  const T range = high - low;
  if (!(range > T(1e-30) && range < T(1e30))) return false;
  const int rank = group.rank(), size = group.size(), first = group.first_thread(), warp = first / kWarp;
  uint32_t* const bins = shared.bins + first * SearchShared::kBins;
  uint32_t* const own = bins + rank * SearchShared::kBins;
  const T scale = static_cast<T>(size * SearchShared::kBins - 1) / range;
  group.sync();  // other threads may still read the bins of an earlier search
#pragma unroll
  for (int k = 0; k < SearchShared::kBins; ++k) own[k] = 0;
  group.sync();
  for_instances<1, T>(
      row, group, one_by_one([&](T x, bool live) {
        if (live) atomicAdd(bins + rounded_fma(x - low, scale), 1u);
      }),
      [] {});
  group.sync();
  uint32_t inside = 0, before = 0;
#pragma unroll
  for (int k = 0; k < SearchShared::kBins; ++k) inside += own[k];
  uint32_t total = inside;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const uint32_t others = from_other_lane(total, lanes);
    if (threadIdx.x & lanes) before += others;
    total += others;
  }
  if (size > kWarp) {
    if (threadIdx.x % kWarp == 0) shared.of_warp[threadIdx.x / kWarp] = total;
    __syncthreads();
    for (unsigned k = 0; k < threadIdx.x / kWarp; ++k) before += shared.of_warp[k];
  }
  if (before < wanted && wanted <= before + inside) {
    int k = 0;
    while (before + own[k] < wanted) before += own[k++];
    shared.found[warp] = {static_cast<uint32_t>(rank * SearchShared::kBins + k), before, own[k]};
    shared.taken[warp] = 0;
  }
  group.sync();
  const uint32_t bin = shared.found[warp].bin, place = wanted - 1 - shared.found[warp].before;
  const int taken = shared.found[warp].inside;
  if (taken > size * SearchShared::kTaken) return false;
  // The memory of the bins now holds the logits of the chosen bin.
  for_instances<1, T>(
      row, group, one_by_one([&](T x, bool live) {
        if (!live || rounded_fma(x - low, scale) != bin) return;
        std::memcpy(bins + atomicAdd(&shared.taken[warp], 1u) * (sizeof(T) / sizeof(*bins)), &x, sizeof(T));
      }),
      [] {});
  group.sync();
  // The order of these logits differs between launches. The result does not: it is the (`place` + 1)-th smallest of them.
  LargestPass<T> negative_of = {-high};
  for (int j = rank; j < taken; j += size) {
    T x, other;
    std::memcpy(&x, bins + j * (sizeof(T) / sizeof(*bins)), sizeof(T));
    uint32_t up_to = 0;
#pragma unroll 4
    for (int i = 0; i < taken; ++i) {
      std::memcpy(&other, bins + i * (sizeof(T) / sizeof(*bins)), sizeof(T));
      up_to += other <= x ? 1 : 0;
    }
    if (up_to > place) negative_of.x = larger(negative_of.x, -x);
  }
  result = -group.reduce(negative_of).x;
  return true;
}

// The `wanted`-th smallest logit, counted from 1, for the pairs that search_bins() refuses. It is slower and has little code.
template <class T, class In>
SGL_DEVICE T order_statistic_of(const Row<In>& row, int n, int64_t wanted, T low, T high, T guess, Group& group) {
  return order_statistic(
      n, wanted, low, high, guess, [&](T pivot) { return count_up_to(row, pivot, group); },
      [&](T pivot) {
        LargestPass<T> found = {low};
        for_instances<0, T>(
            row, group, one_by_one([&](T x, bool) { found.x = (x <= pivot) & (x > found.x) ? x : found.x; }), [] {});
        return group.reduce(found).x;
      });
}

// The median (k = 0) or the k-th largest logit: one copy of the code for both.
template <class T, class In>
SGL_DEVICE T ranked(const Row<In>& row, int n, int64_t k, T low, T high, Group& group, SearchShared& shared) {
  const int64_t wanted = k == 0 ? median_rank(n) : n - k + 1;
  T result;
  if (wanted >= n) return high;
  if (search_bins(row, static_cast<uint32_t>(wanted), low, high, group, shared, result)) return result;
  // The first guess is the middle of the range. The mean would need one more reduction in the first pass.
  const T middle = low + (high - low) * T(0.5);
  const T guess = k == 0 ? middle : middle + (high - middle) * T(0.5);
  return order_statistic_of(row, n, wanted, low, high, guess, group);
}

// Thread 0 of each part writes to `out` what the first pass found. The result is whether the pair needs other passes, too.
template <class T>
SGL_DEVICE bool save_first(const Needs& needs, const FirstFound<T>& first, Label label, const Group& group, Sums& out) {
  const bool positive = label == Label::kPositive, exists = label != Label::kUnknown && first.n > 0;
  const bool finite = first.loss == first.loss;
  const Kind kind = positive ? needs.kind[1] : needs.kind[0];
  if (group.rank() == 0) {
    out.kind = !exists                                                 ? Kind::kExcluded
               : !finite                                               ? Kind::kNonFinite
               : positive && needs.constant && first.low == first.high ? Kind::kConstant
                                                                       : kind;
    out.positive = positive;
    out.n = first.n;
    out.extent = {first.low, first.high, needs.nearest ? first.nearest : T(0), 0};
    const bool against_zero = needs.has_instances && !positive;
    out.loss[0] = against_zero ? first.loss : 0;
    out.count[0] = against_zero ? first.n : 0;
    for (int k = 1; k < 3; ++k) out.loss[k] = out.count[k] = 0;
    out.square = 0;
    out.highs = first.ties;
    if (needs.counts_maxima) out.pooled[0] = first.ties;
  }
  return exists && finite && (positive ? needs.others[1] : needs.others[0]);
}

// The other passes of a pair, by the undivided group. `out` has what the first pass found.
template <class T, class In>
SGL_DEVICE void find_others(
    const Settings& settings, const Row<In>& row, T pos_weight, Group& group, SearchShared& search, Sums& out) {
  const bool writes = group.rank() == 0, guided = out.kind == Kind::kPositive;
  const T low = static_cast<T>(out.extent.low), high = static_cast<T>(out.extent.high);
  const int n = static_cast<int>(out.n);
  if (guided) {
    // p is scaled by the same power of e as for any pooling
    const Scale<T> scale = scale_of(low, high);
    const Guide<T> guide = guide_of(low, high, scale, settings.delta_l, settings.rescale);
    const GuidedPass sums = group.reduce(
        scale.any ? guided_pass<true>(row, guide, scale, pos_weight, group)
                  : guided_pass<false>(row, guide, scale, pos_weight, group));
    if (writes) {
      for (int k = 0; k < 3; ++k) out.loss[k] = sums.loss[k];
      out.count[0] = sums.negatives;
      out.count[2] = sums.positives;
      out.count[1] = n - sums.negatives - sums.positives;
      out.square = sums.square;
    }
  } else if (settings.loss == kBagInstanceLoss) {
    if (!out.positive) return;  // its loss is that of the instances
    const double loss = rounded_pass<T>(row, group);
    if (writes) out.loss[0] = loss;
  } else if (settings.loss == kMinMeanMaxLoss) {
    const int lows = rank_of(row, low, group).equal;
    if (writes) out.lows = lows;
  }
  // The median, then the k-th largest logit: one copy of the search.
  const bool has_kth = pooling_reference(settings.pooling) == Reference::kKthLargest;
#pragma unroll 1
  for (int round = guided && settings.weighted ? 0 : 1; round < (has_kth ? 2 : 1); ++round) {
    const int64_t k = round == 0 ? 0 : TopKPooling::places(n, settings.pooling_parameter);
    const T found = ranked(row, n, k, low, high, group, search);
    if (round == 0) {
      if (writes) out.median = found;
    } else {
      const RankPass rank = rank_of(row, found, group);
      if (writes) {
        const int64_t above = n - rank.below - rank.equal;
        out.extent.reference = found;
        out.extent.tie_weight = static_cast<double>(k - above) / static_cast<double>(rank.equal);
      }
    }
  }
  if (!has_sums(settings.pooling) || counts_maxima(settings.pooling)) return;
  // Read from shared memory, to save registers in the passes above.
  group.sync();
  const Extent<T> known = {
      static_cast<T>(out.extent.low), static_cast<T>(out.extent.high), static_cast<T>(out.extent.reference),
      static_cast<T>(out.extent.tie_weight)};
  const Scale<T> pooling_scaled = pooling_scale(settings.pooling, known);
  const PoolingSettings<T> pooling = pooling_settings(settings.pooling, known, settings.pooling_parameter);
  // Not unrolled: nvcc makes a copy of the reduction for each pooling.
  const PooledPass pooled = group.reduce<false>(pooled_sums(settings.pooling, row, pooling_scaled, pooling, group));
  if (writes)
    for (int k = 0; k < 3; ++k) out.pooled[k] = pooled.sum[k];
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

// Pairs that a block finalizes together, one thread per pair, at most: the arithmetic in double of one pair takes as long
// as a pass.
constexpr unsigned kSlots = 32;

// A Batch as numbers, integers first. Thread c adds up number c of all rows: no thread holds a whole Batch.
using BatchRow = uint64_t[kBatchNumbers];

SGL_DEVICE uint64_t plus(uint64_t a, uint64_t b, unsigned number) {
  const uint64_t real = bits_of<uint64_t>(bits_of<double>(a) + bits_of<double>(b));
  return number < kBatchIntegers ? a + b : real;
}

// Number c of the rows first, first + step, and so on, added to `sum`.
SGL_DEVICE uint64_t
add_rows(uint64_t sum, const BatchRow* rows, unsigned first, unsigned end, unsigned step, unsigned number) {
#pragma unroll 4
  for (unsigned k = first; k < end; k += step) sum = plus(sum, rows[k][number], number);
  return sum;
}

struct ForwardShared {
  GroupShared group;
  SearchShared search;
  Sums sums[kSlots];
  BatchRow batch[kSlots];
  BatchRow total;
  Rows rows;  // of the call, if it is not simple
  bool is_last;
};

template <class T>
SGL_DEVICE void finalize_one(
    const Call& call, const Forward& forward, const Divisor& classes, const Sums& sums, unsigned pair,
    BatchRow& batch) {
  const unsigned cls = pair - quotient_of(pair, classes) * classes.by;
  const T* pos_weights = static_cast<const T*>(call.pos_weight);
  const T* class_weights = static_cast<const T*>(forward.class_weight);
  const double pos_weight = pos_weights == nullptr ? 1.0 : pos_weights[cls];
  const double class_weight = class_weights == nullptr ? 1.0 : class_weights[cls];
  const Pair found = finalize_pair(sums, call.settings, pos_weight);
  save_row(sums, found, call.settings, class_weight, static_cast<T*>(forward.saved) + int64_t{pair} * kColumns);
  if (forward.bag_logits != nullptr) static_cast<T*>(forward.bag_logits)[pair] = static_cast<T>(found.bag_logit);
  Batch of_pair = {};
  add(of_pair, found, class_weight);
  std::memcpy(batch, &of_pair, sizeof(of_pair));
}

// The sums over the pairs of this block, to shared.total. In round r, a group processes its r-th pairs, one for each of its
// parts. False if another launch continues.
template <class T, class In>
SGL_DEVICE bool sums_of_block(const Call& call, const Forward& forward, const Work& work, ForwardShared& shared) {
  const Settings& settings = call.settings;
  const T* pos_weights = static_cast<const T*>(call.pos_weight);

  Group group(work.group_bits, shared.group);
  // `pairs`: of this block in a round. `together`: the number of rounds whose pairs are finalized together. Each of these pairs has
  // a slot and a thread.
  const unsigned pairs = 1u << work.pair_bits, together = kSlots >> work.pair_bits;
  // blocks that process pieces of the same pairs count as one
  const int piece_bits = work.stage == Stage::kFirstPass ? work.piece_bits : 0;
  const unsigned block = blockIdx.x >> piece_bits, blocks = gridDim.x >> piece_bits;
  if (threadIdx.x == 0)
    for (int c = 0; c < kBatchNumbers; ++c) shared.total[c] = 0;
  if (!call.is_simple && threadIdx.x == 0) shared.rows = call.rows;
  __syncthreads();  // a block may have no pairs

  // Each round recomputes its indices and addresses, to save registers. The conditions of the loop are the same for the whole block.
  for (unsigned round = 0; (round * blocks + block) * pairs < call.rows.units; ++round) {
    const unsigned waiting = round & (together - 1);
    // First every part of the group has a pair of its own. Then the whole group processes those that need more than the first
    // pass, one after another.
    const unsigned first_index = (threadIdx.x >> work.group_bits) << work.part_bits;
    unsigned index = first_index, left = 0;
#pragma unroll 1
    for (unsigned visit = 0; visit == 0 || left != 0; ++visit) {
      if (visit == 0) {
        group.divide(work.part_bits);
        index += group.part();
      } else {
        const bool skipped = (left & 1) == 0;
        left >>= 1;
        if (skipped) continue;
        index = first_index + visit - 1;
        group.divide(0);
      }
      const unsigned pair = (round * blocks + block) * pairs + index;
      const bool exists = pair < call.rows.units;
      const unsigned bag = exists ? quotient_of(pair, work.classes) : 0,
                     cls = exists ? pair - bag * work.classes.by : 0;
      Sums& sums = shared.sums[waiting * pairs + index];
      Place place = place_of(call.rows, bounds_of(call.rows, bag), cls);
      if (visit > 0) {
        const T pos_weight = pos_weights == nullptr ? T(1) : pos_weights[cls];
        find_others(settings, Row<In>(call, place, group.size(), &shared.rows), pos_weight, group, shared.search, sums);
        continue;
      }
      const Label label = !exists                           ? Label::kUnknown
                          : forward.targets.data == nullptr ? Label::kPositive
                                                            : label_of(forward.targets, bag, cls);
      if (label == Label::kUnknown) place.positions = 0;
      const unsigned piece = blockIdx.x & ((1u << piece_bits) - 1);
      if (piece_bits > 0) place = piece_of(call.rows, place, piece, piece_bits);
      const Row<In> row(call, place, group.size(), &shared.rows);
      // All parts of a group run the same variant of the first pass.
      const bool negative = work.needs.has_instances && (work.part_bits > 0 || label != Label::kPositive);
      FirstFound<T> first;
      const bool continues =
          work.needs.ties ? find_first<true, T>(row, negative, work, forward.partial, pair, piece, group, first)
                          : find_first<false, T>(row, negative, work, forward.partial, pair, piece, group, first);
      if (!continues) return false;
      const bool more = save_first(work.needs, first, label, group, sums);
      // The lanes of a warp begin with one lane of each part. So all warps of a block get the same bits.
      left = __ballot_sync(kAllLanes, more) & ((2u << ((1 << work.part_bits) - 1)) - 1);
      group.sync();
    }
    const unsigned next = (round + 1) * blocks + block;
    if (waiting + 1 < together && next * pairs < call.rows.units) continue;
    __syncthreads();
    const unsigned slot = threadIdx.x, first = ((round - waiting) * blocks + block) * pairs;
    // the pairs of a round follow one another, and those of the next one are `blocks` blocks further on
    const unsigned slots = (waiting + 1) * pairs;
    if (slot < slots) {
      const unsigned later = slot >> work.pair_bits;
      const unsigned of_slot = first + later * blocks * pairs + slot - later * pairs;
      if (of_slot < call.rows.units) {
        finalize_one<T>(call, forward, work.classes, shared.sums[slot], of_slot, shared.batch[slot]);
      } else {
        for (int c = 0; c < kBatchNumbers; ++c) shared.batch[slot][c] = 0;
      }
    }
    __syncthreads();
    const unsigned c = threadIdx.x;
    if (c < kBatchNumbers) shared.total[c] = add_rows(shared.total[c], shared.batch, 0, slots, 1, c);
  }
  return true;
}

// Called by the last block that ends: adds the sums of all blocks.
template <class T>
SGL_DEVICE void save_batch(const Call& call, const Forward& forward, ForwardShared& shared) {
  const BatchRow* of_block = reinterpret_cast<const BatchRow*>(forward.of_block);
  // each row of threads adds the sums of some blocks
  const unsigned rows = blockDim.x / kBatchNumbers;
  const unsigned r = threadIdx.x / kBatchNumbers, c = threadIdx.x - r * kBatchNumbers;
  if (r < rows) shared.batch[r][c] = add_rows(0, of_block, r, gridDim.x, rows, c);
  __syncthreads();
  if (threadIdx.x < kBatchNumbers) shared.total[c] = add_rows(0, shared.batch, 0, rows, 1, c);
  __syncthreads();
  if (threadIdx.x == 0) {
    Batch batch;
    std::memcpy(&batch, shared.total, sizeof(batch));
    if (forward.sums != nullptr) *forward.sums = batch;
    finalize_batch(
        batch, call.settings, 1, static_cast<T*>(forward.total), static_cast<T*>(forward.parts),
        static_cast<T*>(forward.saved) + int64_t{call.rows.units} * kColumns);
  }
}

// By one thread: the loss and the denominators from sums over several batches.
template <class T>
__global__ void finalize_kernel(
    const Batch* sums, const __grid_constant__ Settings settings, double times, T* total, T* parts, T* denominators) {
  finalize_batch(*sums, settings, times, total, parts, denominators);
}

template <class T, class In>
__global__ void __maxnreg__(kRegisters<T>) forward_kernel(
    const __grid_constant__ Call call, const __grid_constant__ Forward forward, const __grid_constant__ Work work) {
  SGL_SHARED(ForwardShared, shared);
  if (!sums_of_block<T, In>(call, forward, work, shared)) return;
  if (threadIdx.x < kBatchNumbers) {
    reinterpret_cast<BatchRow*>(forward.of_block)[blockIdx.x][threadIdx.x] = shared.total[threadIdx.x];
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // counts up to the last block, and that one sets it back to 0
    shared.is_last = atomicInc(forward.blocks_done, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (shared.is_last) save_batch<T>(call, forward, shared);
}

}  // namespace cuda
}  // namespace sgl
