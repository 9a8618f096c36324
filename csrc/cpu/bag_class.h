// Forward and backward of one bag-class: its logits are brought into one contiguous row, and everything after that is
// loops over the row while it lies in the cache. So value and gradient are bitwise the same in every layout.
//
// Everything here is inlined into the wrappers of kernels.cpp and compiled once for each instruction set.
#pragma once

#include "kernels.h"

namespace sgl {

// Sums of floats run over this many instances, then continue in double: enough digits for a bag of a million.
constexpr int64_t kChunk = 256;
// Loops run over a multiple of this, so that no instance is computed by other instructions than its neighbours.
constexpr int64_t kLanes = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Rows

// Instances one after the other. Returns how many there are. Writes at most one number past them.
template <class T, class In>
SGL_HD int64_t gather(const In* logits, const bool* mask, const Instances& r, T* out) {
  const Dimension& inner = r.dimensions[r.count - 1];
  int64_t n = 0;
  for (Runs run(r); !run.done(); run.next()) {
    const In* x = logits + run.logits;
    if (mask != nullptr) {
      const bool* real = mask + run.mask;
      for (int64_t j = 0; j < r.inner; ++j) {
        out[n] = read_as(T(), x[j * inner.logits]);
        n += real[j * inner.mask];
      }
    } else if (inner.logits == 1) {
      T* __restrict__ to = out + n;
      for (int64_t j = 0; j < r.inner; ++j) to[j] = read_as(T(), x[j]);
      n += r.inner;
    } else {
      for (int64_t j = 0; j < r.inner; ++j) out[n + j] = read_as(T(), x[j * inner.logits]);
      n += r.inner;
    }
  }
  return n;
}

// The mirror of gather: padding gets 0.
template <class T, class Out>
SGL_HD void scatter(const T* values, const bool* mask, const Instances& r, Out* grad) {
  const Dimension& inner = r.dimensions[r.count - 1];
  int64_t n = 0;
  for (Runs run(r); !run.done(); run.next()) {
    Out* g = grad + run.grad;
    if (mask != nullptr) {
      const bool* real = mask + run.mask;
      for (int64_t j = 0; j < r.inner; ++j) {
        const bool is_real = real[j * inner.mask];
        write_as(g + j * inner.grad, is_real ? values[n] : T(0));
        n += is_real;
      }
    } else if (inner.grad == 1) {
      const T* __restrict__ from = values + n;
      for (int64_t j = 0; j < r.inner; ++j) write_as(g + j, from[j]);
      n += r.inner;
    } else {
      for (int64_t j = 0; j < r.inner; ++j) write_as(g + j * inner.grad, values[n + j]);
      n += r.inner;
    }
  }
}

// The same number to every instance.
template <class T, class Out>
SGL_HD void fill(T value, const bool* mask, const Instances& r, Out* grad) {
  const Dimension& inner = r.dimensions[r.count - 1];
  for (Runs run(r); !run.done(); run.next()) {
    Out* g = grad + run.grad;
    const bool* real = mask == nullptr ? nullptr : mask + run.mask;
    for (int64_t j = 0; j < r.inner; ++j)
      write_as(g + j * inner.grad, real == nullptr || real[j * inner.mask] ? value : T(0));
  }
}

template <class T>
struct Row {
  const T* x;
  int64_t n;
};

template <class T>
constexpr Type native_type() {
  return sizeof(T) == sizeof(float) ? Type::kFloat : Type::kDouble;
}

template <class T>
SGL_HD Row<T> load_row(const Problem<T>& problem, const Instances& r, T* scratch) {
  const bool one_run = r.count == 1 && (r.dimensions[0].logits == 1 || r.inner == 1);
  if (problem.type == native_type<T>()) {
    const T* logits = static_cast<const T*>(problem.logits);
    if (one_run && problem.mask == nullptr) return {logits + r.logits, r.positions};
    return {scratch, gather(logits, problem.mask, r, scratch)};
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf)
      return {scratch, gather(static_cast<const Half*>(problem.logits), problem.mask, r, scratch)};
    return {scratch, gather(static_cast<const BFloat16*>(problem.logits), problem.mask, r, scratch)};
  }
  return {scratch, 0};
}

// A piece of a row: `padded` numbers, a multiple of kLanes, may be read, and the first `n` of them count.
template <class T>
struct Chunk {
  const T* x;
  int64_t n, padded;
};

template <class T>
SGL_HD Chunk<T> chunk_of(const Row<T>& row, int64_t start, T* buffer) {
  const int64_t left = row.n - start;
  const int64_t n = left < kChunk ? left : kChunk;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  if (n == padded) return {row.x + start, n, n};
  for (int64_t j = 0; j < n; ++j) buffer[j] = row.x[start + j];
  // with what is there anyway, so that dead lanes compute nothing strange
  for (int64_t j = n; j < padded; ++j) buffer[j] = row.x[start];
  return {buffer, n, padded};
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <class T>
struct Extremes {
  T low, high, nearest;
  bool finite;
};

template <class T>
SGL_HD Extremes<T> extremes(const Row<T>& row) {
  T low = row.x[0], high = row.x[0], nearest = infinity_of(T()), zero = T(0);
  const T* __restrict__ x = row.x;
#pragma omp simd reduction(min : low, nearest) reduction(max : high) reduction(+ : zero)
  for (int64_t j = 0; j < row.n; ++j) {
    const T v = x[j];
    const T magnitude = v < T(0) ? -v : v;
    low = v < low ? v : low;
    high = v > high ? v : high;
    nearest = magnitude < nearest ? magnitude : nearest;
    zero += v - v;  // NaN from then on if v is NaN or infinite
  }
  return {low, high, nearest, zero == T(0)};
}

// An unlabelled instance of a negative bag is negative: M = 0, weight 1.
template <class T>
SGL_HD void negative_loss(const Row<T>& row, T* buffer, Sums& out) {
  double total = 0;
  for (int64_t start = 0; start < row.n; start += kChunk) {
    const Chunk<T> chunk = chunk_of(row, start, buffer);
    const T* __restrict__ x = chunk.x;
    T sum = T(0);
#pragma omp simd reduction(+ : sum)
    for (int32_t j = 0; j < static_cast<int32_t>(chunk.padded); ++j) {
      const T v = x[j];
      const T l = softplus(v, exp(v < T(0) ? v : -v));
      sum += j < static_cast<int32_t>(chunk.n) ? l : T(0);
    }
    total += sum;
  }
  out.loss[0] = total;
  out.count[0] = row.n;
}

template <bool scaled, class T>
SGL_HD void positive_loss(
    const Row<T>& row, const Guide<T> guide, const Scale<T> scale, T pos_weight, T* buffer, Sums& out) {
  double loss[3] = {}, negatives = 0, positives = 0, square = 0;
  for (int64_t start = 0; start < row.n; start += kChunk) {
    const Chunk<T> chunk = chunk_of(row, start, buffer);
    const T* __restrict__ x = chunk.x;
    T l0 = T(0), l1 = T(0), l2 = T(0), n0 = T(0), n2 = T(0), s = T(0);
#pragma omp simd reduction(+ : l0, l1, l2, n0, n2, s)
    for (int32_t j = 0; j < static_cast<int32_t>(chunk.padded); ++j) {
      const T live = j < static_cast<int32_t>(chunk.n) ? T(1) : T(0);
      const T v = x[j];
      const Probability<T> o = probability<scaled>(v, scale);
      const Target<T> t = target_of(theta_of(v, o, guide), guide);
      const T l = live * bce(v, o, t.m, pos_weight);
      l0 += l * t.negative;
      l1 += l * t.ambiguous;
      l2 += l * t.positive;
      n0 += live * t.negative;
      n2 += live * t.positive;
      s += t.m > T(0) ? live * (o.scaled_p * o.scaled_p) : T(0);
    }
    loss[0] += l0;
    loss[1] += l1;
    loss[2] += l2;
    negatives += n0;
    positives += n2;
    square += s;
  }
  for (int k = 0; k < 3; ++k) out.loss[k] = loss[k];
  out.count[0] = static_cast<int64_t>(negatives);
  out.count[2] = static_cast<int64_t>(positives);
  out.count[1] = row.n - out.count[0] - out.count[2];
  out.square = square;
}

template <class T>
SGL_HD int64_t count_up_to(const Row<T>& row, T pivot) {
  const T* __restrict__ x = row.x;
  int64_t total = 0;
  for (int64_t start = 0; start < row.n; start += 1 << 20) {  // pieces that a count as wide as a float can hold
    const int32_t n = static_cast<int32_t>(row.n - start < 1 << 20 ? row.n - start : 1 << 20);
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int32_t j = 0; j < n; ++j) count += x[start + j] <= pivot ? 1 : 0;
    total += count;
  }
  return total;
}

template <class T>
SGL_HD T largest_up_to(const Row<T>& row, T pivot, T smallest) {
  const T* __restrict__ x = row.x;
  T largest = smallest;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < row.n; ++j) {
    const T v = x[j] <= pivot ? x[j] : smallest;
    largest = v > largest ? v : largest;
  }
  return largest;
}

template <int64_t pooling, bool scaled, class T>
SGL_HD void pool(
    const Row<T>& row, const Scale<T> scale, const PoolingSettings<T> settings, T* buffer, double (&pooled)[3]) {
  for (int64_t start = 0; start < row.n; start += kChunk) {
    const Chunk<T> chunk = chunk_of(row, start, buffer);
    const T* __restrict__ x = chunk.x;
    T sum_a = T(0), sum_b = T(0), sum_c = T(0);
#pragma omp simd reduction(+ : sum_a, sum_b, sum_c)
    for (int32_t j = 0; j < static_cast<int32_t>(chunk.padded); ++j) {
      const T v = x[j];
      const PoolingTerms<T> t = pooling_terms<pooling, scaled>(v, probability<scaled>(v, scale), scale, settings);
      const bool live = j < static_cast<int32_t>(chunk.n);
      sum_a += live ? t.a : T(0);
      sum_b += live ? t.b : T(0);
      sum_c += live ? t.c : T(0);
    }
    pooled[0] += sum_a;
    pooled[1] += sum_b;
    pooled[2] += sum_c;
  }
}

template <bool scaled, class T>
SGL_HD void pool(
    int64_t pooling, const Row<T>& row, const Scale<T>& scale, const PoolingSettings<T>& settings, T* buffer,
    double (&pooled)[3]) {
  switch (pooling) {
    case kMax:
      return pool<kMax, false>(row, scale, settings, buffer, pooled);
    case kMean:
      return pool<kMean, scaled>(row, scale, settings, buffer, pooled);
    case kMeanLogits:
      return pool<kMeanLogits, false>(row, scale, settings, buffer, pooled);
    case kSoftmax:
      return pool<kSoftmax, scaled>(row, scale, settings, buffer, pooled);
    case kLinearSoftmax:
      return pool<kLinearSoftmax, scaled>(row, scale, settings, buffer, pooled);
    case kLSE:
      return pool<kLSE, scaled>(row, scale, settings, buffer, pooled);
    case kNoisyOr:
      return pool<kNoisyOr, scaled>(row, scale, settings, buffer, pooled);
    default:
      return;
  }
}

template <class T>
SGL_HD Sums sums_of(const Settings& settings, Label label, T pos_weight, const Row<T>& row, T* buffer) {
  Sums out = {};
  if (label == Label::kUnknown || row.n == 0) return out;
  out.n = row.n;
  out.positive = label == Label::kPositive;
  const Extremes<T> e = extremes(row);
  if (!e.finite) {
    out.kind = Kind::kBroken;
    return out;
  }
  out.low = e.low;
  out.high = e.high;
  out.nearest = e.nearest;
  const Scale<T> scale = scale_of(e.low, e.high, e.nearest, settings.pooling);
  if (!out.positive) {
    out.kind = Kind::kNegative;
    negative_loss(row, buffer, out);
  } else if (settings.rescale && e.low == e.high) {
    out.kind = Kind::kUnranked;
  } else {
    out.kind = Kind::kPositive;
    // before the loss: behind it gcc 12 mixes the two up, and the loss's loop is no longer one of vectors
    if (settings.weighted)
      out.median = lower_median(
          row.n, e.low, e.high, [&](T pivot) __attribute__((always_inline)) { return count_up_to(row, pivot); },
          [&](T pivot) __attribute__((always_inline)) { return largest_up_to(row, pivot, e.low); });
    const Guide<T> guide = guide_of(e.low, e.high, scale, settings.delta_l, settings.rescale);
    if (scale.any) {
      positive_loss<true>(row, guide, scale, pos_weight, buffer, out);
    } else {
      positive_loss<false>(row, guide, scale, pos_weight, buffer, out);
    }
  }
  const PoolingSettings<T> pooling = pooling_settings(e.low, e.high, settings.pooling_parameter);
  if (scale.any) {
    pool<true>(settings.pooling, row, scale, pooling, buffer, out.pooled);
  } else {
    pool<false>(settings.pooling, row, scale, pooling, buffer, out.pooled);
  }
  return out;
}

template <class T>
SGL_HD void forward_range(
    const Problem<T>& problem, const Label* labels, BagClass* out, int64_t begin, int64_t end, T* scratch) {
  const Layout& layout = *problem.layout;
  alignas(64) T buffer[kChunk];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t cls = unit % layout.classes;
    Row<T> row{nullptr, 0};
    if (labels[unit] != Label::kUnknown)
      row = load_row(problem, instances_of(layout, unit / layout.classes, cls), scratch);
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[cls];
    out[unit] = finish(sums_of(problem.settings, labels[unit], pos_weight, row, buffer), problem.settings, pos_weight);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <bool is_positive, bool scaled, class T>
SGL_HD void instance_gradient(const Chunk<T>& chunk, const Coefficients<T> k, T* grad) {
  const T* __restrict__ x = chunk.x;
  T* __restrict__ g = grad;
#pragma omp simd
  for (int32_t j = 0; j < static_cast<int32_t>(chunk.padded); ++j) {
    const T v = x[j];
    g[j] = instance_slope<is_positive, scaled>(v, probability<scaled>(v, k.scale), k);
  }
}

template <int64_t pooling, bool scaled, class T>
SGL_HD void add_pooling_gradient(const Chunk<T>& chunk, const Coefficients<T> k, T* grad) {
  const T* __restrict__ x = chunk.x;
  T* __restrict__ g = grad;
#pragma omp simd
  for (int32_t j = 0; j < static_cast<int32_t>(chunk.padded); ++j) {
    const T v = x[j];
    g[j] += pooling_slope<pooling, scaled>(v, probability<scaled>(v, k.scale), k.pooling, k.slope1, k.slope2);
  }
}

template <bool scaled, class T>
SGL_HD void chunk_gradient(int64_t pooling, const Chunk<T>& chunk, const Coefficients<T>& k, T* grad) {
  if (k.kind == Kind::kNegative) {
    instance_gradient<false, scaled>(chunk, k, grad);
  } else if (k.kind == Kind::kPositive) {
    instance_gradient<true, scaled>(chunk, k, grad);
  } else {
    for (int64_t j = 0; j < chunk.padded; ++j) grad[j] = T(0);
  }
  switch (pooling) {
    case kMax:
      return add_pooling_gradient<kMax, false>(chunk, k, grad);
    case kMean:
      return add_pooling_gradient<kMean, scaled>(chunk, k, grad);
    case kMeanLogits:
      return add_pooling_gradient<kMeanLogits, false>(chunk, k, grad);
    case kSoftmax:
      return add_pooling_gradient<kSoftmax, scaled>(chunk, k, grad);
    case kLinearSoftmax:
      return add_pooling_gradient<kLinearSoftmax, scaled>(chunk, k, grad);
    case kLSE:
      return add_pooling_gradient<kLSE, scaled>(chunk, k, grad);
    case kNoisyOr:
      return add_pooling_gradient<kNoisyOr, scaled>(chunk, k, grad);
    default:
      return;
  }
}

template <class T>
SGL_HD void backward_row(
    int64_t pooling, const Coefficients<T>& k, const Row<T>& row, T* grad, T* buffer, T* grad_buffer) {
  for (int64_t start = 0; start < row.n; start += kChunk) {
    const Chunk<T> chunk = chunk_of(row, start, buffer);
    T* g = chunk.n == chunk.padded ? grad + start : grad_buffer;
    if (k.scale.any) {
      chunk_gradient<true>(pooling, chunk, k, g);
    } else {
      chunk_gradient<false>(pooling, chunk, k, g);
    }
    if (g == grad_buffer)
      for (int64_t j = 0; j < chunk.n; ++j) grad[start + j] = grad_buffer[j];
  }
}

template <class T, class Out>
SGL_HD void backward_range_as(
    const Problem<T>& problem, const T* saved, T grad_output, Out* grad, int64_t begin, int64_t end, T* scratch) {
  const Layout& layout = *problem.layout;
  const T* shares = saved + layout.bags * layout.classes * kColumns;
  T* row_grad = scratch + layout.longest + 64;
  alignas(64) T buffer[kChunk], grad_buffer[kChunk];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t cls = unit % layout.classes;
    const Instances r = instances_of(layout, unit / layout.classes, cls);
    if (r.positions == 0) continue;
    const T* columns = saved + unit * kColumns;
    const Kind kind = static_cast<Kind>(static_cast<int>(columns[kColumnKind]));
    if (kind == Kind::kAbsent || kind == Kind::kBroken) {
      // not a product with 0 or NaN: what takes no part may hold anything, what is broken is so for any weight
      fill(kind == Kind::kAbsent ? T(0) : nan_of(T()), problem.mask, r, grad);
      continue;
    }
    const Row<T> row = load_row(problem, r, scratch);
    const T pos_weight = problem.pos_weight == nullptr ? T(1) : problem.pos_weight[cls];
    T* direct = nullptr;
    if constexpr (sizeof(Out) == sizeof(T)) {
      if (problem.mask == nullptr && r.count == 1 && (r.dimensions[0].grad == 1 || r.inner == 1))
        direct = grad + r.grad;
    }
    T* target = direct != nullptr ? direct : row_grad;
    const Coefficients<T> k = coefficients(columns, shares, grad_output, pos_weight, problem.settings);
    backward_row(problem.settings.pooling, k, row, target, buffer, grad_buffer);
    if (direct == nullptr) scatter(row_grad, problem.mask, r, grad);
  }
}

template <class T>
SGL_HD void backward_range(
    const Problem<T>& problem, const T* saved, T grad_output, void* grad, int64_t begin, int64_t end, T* scratch) {
  if (problem.type == native_type<T>())
    return backward_range_as(problem, saved, grad_output, static_cast<T*>(grad), begin, end, scratch);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf)
      return backward_range_as(problem, saved, grad_output, static_cast<Half*>(grad), begin, end, scratch);
    return backward_range_as(problem, saved, grad_output, static_cast<BFloat16*>(grad), begin, end, scratch);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
SGL_HD void math_range(int function, const T* __restrict__ x, T* __restrict__ y, int64_t n) {
  if (function == 0) {
    for (int64_t j = 0; j < n; ++j) y[j] = exp(x[j]);
  } else if (function == 1) {
    for (int64_t j = 0; j < n; ++j) y[j] = log1p_unit(x[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) y[j] = expm1_negative(x[j]);
  }
}

}  // namespace sgl
