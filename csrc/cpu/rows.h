// The instances of one bag-class brought into one contiguous row of floats or doubles, and a row of gradients back to
// where the instances lie. So everything between is the same, bitwise, in every layout.
#pragma once

#include <cstring>

#include "kernels.h"

namespace sgl {
namespace SGL_LEVEL {

// Instances one after the other. Returns how many there are. Writes at most one number past them.
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

// The mirror of gather: padding gets 0.
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

// The same number to every instance.
template <class T, class Out>
void fill(T value, const bool* mask, const Instances& r, Out* grad) {
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

// Rows of up to so many instances may be read to the end of their last vector, past their own: of what is there, nothing
// counts. Longer ones do not mind that every pass copies the last instances.
constexpr int64_t kPadded = 1024;

template <class T>
constexpr Type native_type() {
  return sizeof(T) == sizeof(float) ? Type::kFloat : Type::kDouble;
}

template <class T>
Row<T> load_row(const Problem<T>& problem, const Instances& r, T* scratch) {
  Row<T> row = {scratch, 0};
  if (problem.type == native_type<T>()) {
    const T* logits = static_cast<const T*>(problem.logits);
    const bool one_run = r.count == 1 && (r.dimensions[0].logits == 1 || r.inner == 1);
    if (one_run && problem.mask == nullptr) {
      row = {logits + r.logits, r.positions};
      if (row.n > kPadded || row.n % (2 * SGL_WIDTH) == 0) return row;
      std::memcpy(scratch, row.x, row.n * sizeof(T));
      row.x = scratch;
    } else {
      row.n = gather(logits, problem.mask, r, scratch);
    }
  } else if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf) {
      row.n = gather(static_cast<const Half*>(problem.logits), problem.mask, r, scratch);
    } else {
      row.n = gather(static_cast<const BFloat16*>(problem.logits), problem.mask, r, scratch);
    }
  }
  // with what is there anyway, so that lanes that do not count compute nothing strange
  for (int64_t i = row.n; i % (2 * SGL_WIDTH) != 0; ++i) scratch[i] = scratch[0];
  return row;
}

}  // namespace SGL_LEVEL
}  // namespace sgl
