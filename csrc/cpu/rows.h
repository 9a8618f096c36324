// Gathers the instances of a pair (bag, class) into one contiguous row of floats or doubles, and scatters a row of
// gradients back to the layout of the logits. So the results are bitwise equal in every layout.
#pragma once

#include <cstring>

#include "kernels.h"

namespace sgl {
namespace SGL_LEVEL {

// Copies the instances of `r` to `out` and returns their number. Writes at most one number past them.
template <class T, class In>
int64_t gather(const In* logits, const bool* mask, const Instances& r, T* out) {
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

// The reverse of gather(). Padding gets 0.
template <class T, class Out>
void scatter(const T* values, const bool* mask, const Instances& r, Out* grad) {
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

// Writes `value` to every instance and 0 to padding.
template <class T, class Out>
void fill(T value, const bool* mask, const Instances& r, Out* grad) {
  const Dimension& inner = r.dimensions[r.count - 1];
  if (mask == nullptr && r.count == 1 && inner.grad == 1) {
    Out* g = grad + r.grad;
    for (int64_t j = 0; j < r.inner; ++j) write_as(g + j, value);
    return;
  }
  for (Runs run(r); !run.done(); run.next()) {
    Out* g = grad + run.grad;
    if (mask != nullptr) {
      const bool* real = mask + run.mask;
      for (int64_t j = 0; j < r.inner; ++j) write_as(g + j * inner.grad, real[j * inner.mask] ? value : T(0));
    } else {
      for (int64_t j = 0; j < r.inner; ++j) write_as(g + j * inner.grad, value);
    }
  }
}

template <class T>
struct Row {
  const T* x;
  int64_t n;
};

// Rows of up to this many instances are padded, so that passes may read to the end of the last vector. For longer rows,
// each pass copies the last instances instead, which costs little.
constexpr int64_t kPadded = 1024;

template <class T>
constexpr Type native_type() {
  return sizeof(T) == sizeof(float) ? Type::kFloat : Type::kDouble;
}

// The last piece has more than kPadded instances, because passes must not read past its end.
inline int64_t pieces_of(int64_t n) { return n <= kPiece + kPadded ? 1 : (n - kPadded + kPiece - 1) / kPiece; }

// Calls piece(begin, size) for all pieces of n instances, on the threads of `parallel_for`.
template <class Piece>
void for_pieces(ParallelFor parallel_for, int64_t n, const Piece& piece) {
  const int64_t pieces = pieces_of(n);
  const auto nth = [&](int64_t i) { piece(i * kPiece, i + 1 < pieces ? kPiece : n - i * kPiece); };
  if (parallel_for == nullptr || pieces == 1) {
    for (int64_t i = 0; i < pieces; ++i) nth(i);
  } else {
    using Nth = decltype(nth);
    parallel_for(pieces, [](const void* what, int64_t i) { (*static_cast<const Nth*>(what))(i); }, &nth);
  }
}

// Calls part(begin, instances) for each piece if the instances have no mask and one dimension, otherwise once for all.
template <class Part>
void for_parts(ParallelFor parallel_for, const bool* mask, const Instances& r, const Part& part) {
  if (mask != nullptr || r.count != 1 || pieces_of(r.positions) == 1) return part(0, r);
  for_pieces(parallel_for, r.positions, [&](int64_t begin, int64_t size) {
    Instances some = r;
    some.logits += begin * r.dimensions[0].logits;
    some.grad += begin * r.dimensions[0].grad;
    some.inner = some.positions = size;
    part(begin, some);
  });
}

template <class T, class In>
int64_t gather_row(ParallelFor parallel_for, const In* logits, const bool* mask, const Instances& r, T* out) {
  int64_t n = r.positions;
  for_parts(parallel_for, mask, r, [&](int64_t begin, const Instances& some) {
    const int64_t found = gather(logits, mask, some, out + begin);
    if (mask != nullptr) n = found;  // with a mask, there is only one part
  });
  return n;
}

template <class T, class Out>
void store_row(const T* values, const bool* mask, const Instances& r, Out* grad, ParallelFor parallel_for) {
  for_parts(
      parallel_for, mask, r, [&](int64_t begin, const Instances& some) { scatter(values + begin, mask, some, grad); });
}

template <class T, class Out>
void fill_row(T value, const bool* mask, const Instances& r, Out* grad, ParallelFor parallel_for) {
  for_parts(parallel_for, mask, r, [&](int64_t, const Instances& some) { fill(value, mask, some, grad); });
}

// Fills two vectors behind the row with its first number, so that invalid lanes cause no overflow or NaN. A fixed number of
// stores is faster than to stop at the end of a vector.
template <class T>
void pad(T* row, int64_t n) {
  static_assert(2 * SGL_WIDTH <= kRowPadding, "there is room for them between the rows");
  const T first = row[0];
  for (int64_t i = 0; i < 2 * SGL_WIDTH; ++i) row[n + i] = first;
}

// Whether the instances are a row of T in the memory of the logits.
template <class T>
SGL_HD bool is_row(const Problem<T>& problem, const Instances& r) {
  return problem.type == native_type<T>() && problem.mask == nullptr && r.count == 1 &&
         (r.dimensions[0].logits == 1 || r.inner == 1);
}

// Copies the instances to `scratch`.
template <class T>
Row<T> copy_row(const Problem<T>& problem, const Instances& r, T* scratch, ParallelFor parallel_for) {
  Row<T> row = {scratch, 0};
  if (is_row(problem, r)) {
    row.n = r.positions;
    std::memcpy(scratch, static_cast<const T*>(problem.logits) + r.logits, row.n * sizeof(T));
  } else if (problem.type == native_type<T>()) {
    row.n = gather_row(parallel_for, static_cast<const T*>(problem.logits), problem.mask, r, scratch);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf) {
      row.n = gather_row(parallel_for, static_cast<const Half*>(problem.logits), problem.mask, r, scratch);
    } else {
      row.n = gather_row(parallel_for, static_cast<const BFloat16*>(problem.logits), problem.mask, r, scratch);
    }
  }
  pad(scratch, row.n);
  return row;
}

// The row in the memory of the logits if it needs no padding, otherwise a copy of it.
template <class T>
SGL_HD Row<T> load_row(const Problem<T>& problem, const Instances& r, T* scratch, ParallelFor parallel_for) {
  if (is_row(problem, r) && (r.positions > kPadded || r.positions % (2 * SGL_WIDTH) == 0))
    return {static_cast<const T*>(problem.logits) + r.logits, r.positions};
  return copy_row(problem, r, scratch, parallel_for);
}

// ---------------------------------------------------------------------------------------------------------------------
// If classes are adjacent in memory, gathering a single row reads a cache line per number. So the rows of neighbouring
// classes are gathered together, `step` numbers apart. The loop takes a few instances at a time, which stay in the L1
// cache.

constexpr int64_t kFew = 16;

// gather() for `classes` rows. `r` describes the first row.
template <class T, class In>
int64_t gather_together(
    const In* logits, const bool* mask, const Instances& r, int64_t classes, T* rows, int64_t step) {
  const Dimension& inner = r.dimensions[r.count - 1];
  int64_t n = 0;
  for (Runs run(r); !run.done(); run.next()) {
    const In* x = logits + run.logits;
    if (mask != nullptr) {
      const bool* real = mask + run.mask;
      for (int64_t j = 0; j < r.inner; ++j) {
        for (int64_t k = 0; k < classes; ++k) rows[k * step + n] = read_as(T(), x[j * inner.logits + k]);
        n += real[j * inner.mask];
      }
      continue;
    }
    for (int64_t start = 0; start < r.inner; start += kFew) {
      const int64_t stop = start + kFew < r.inner ? start + kFew : r.inner;
      for (int64_t k = 0; k < classes; ++k)
        for (int64_t j = start; j < stop; ++j) rows[k * step + n + j] = read_as(T(), x[j * inner.logits + k]);
    }
    n += r.inner;
  }
  return n;
}

// The reverse of gather_together(). Padding gets 0.
template <class T, class Out>
void scatter_together(const T* rows, int64_t step, const bool* mask, const Instances& r, int64_t classes, Out* grad) {
  const Dimension& inner = r.dimensions[r.count - 1];
  int64_t n = 0;
  for (Runs run(r); !run.done(); run.next()) {
    Out* g = grad + run.grad;
    const bool* real = mask == nullptr ? nullptr : mask + run.mask;
    for (int64_t j = 0; j < r.inner; ++j) {
      const bool is_real = real == nullptr || real[j * inner.mask];
      for (int64_t k = 0; k < classes; ++k) write_as(g + j * inner.grad + k, is_real ? rows[k * step + n] : T(0));
      n += is_real;
    }
  }
}

// Loads the rows of consecutive pairs.
template <class T>
class RowLoader {
 public:
  // for pairs below `end`
  RowLoader(const Problem<T>& problem, int64_t end, T* scratch, ParallelFor parallel_for)
      : problem_(problem),
        end_(end),
        scratch_(scratch),
        parallel_for_(parallel_for),
        together_(parallel_for == nullptr ? rows_together(*problem.layout) : 1),
        step_(row_step(*problem.layout)) {}

  // Whether several rows are gathered per pass. If so, the caller may write to their memory.
  bool together() const { return together_ > 1; }
  T* memory(int64_t pair) const { return scratch_ + (pair - first_) * step_; }

  SGL_HD Row<T> row(int64_t pair, const Instances& r) {
    if (!together()) return load_row(problem_, r, scratch_, parallel_for_);
    if (pair >= last_) load(pair, r);
    return {memory(pair), n_};
  }

  // The caller has replaced the row of `pair` by its gradient. After the last row of a pass, scatters the gradients.
  template <class Out>
  void replaced(int64_t pair, Out* grad) const {
    if (pair + 1 == last_) scatter_together(scratch_, step_, problem_.mask, where_, last_ - first_, grad);
  }

 private:
  void load(int64_t pair, const Instances& r) {
    const int64_t classes = problem_.layout->classes, next_bag = pair - pair % classes + classes;
    first_ = pair;
    last_ = pair + together_;
    if (last_ > next_bag) last_ = next_bag;
    if (last_ > end_) last_ = end_;
    where_ = r;
    if (problem_.type == native_type<T>()) {
      n_ = gathered(static_cast<const T*>(problem_.logits));
    } else if constexpr (sizeof(T) == sizeof(float)) {
      n_ = problem_.type == Type::kHalf ? gathered(static_cast<const Half*>(problem_.logits))
                                        : gathered(static_cast<const BFloat16*>(problem_.logits));
    }
    for (int64_t k = first_; k < last_; ++k) pad(memory(k), n_);
  }

  template <class In>
  int64_t gathered(const In* logits) const {
    return gather_together(logits, problem_.mask, where_, last_ - first_, scratch_, step_);
  }

  const Problem<T>& problem_;
  const int64_t end_;
  T* const scratch_;
  const ParallelFor parallel_for_;
  const int64_t together_, step_;
  int64_t first_ = 0, last_ = 0, n_ = 0;
  Instances where_{};  // the instances of the first row
};

}  // namespace SGL_LEVEL
}  // namespace sgl
