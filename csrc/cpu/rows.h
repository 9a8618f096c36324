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

// The last piece is one of more than kPadded instances: it cannot be read past its end.
inline int64_t pieces_of(int64_t n) { return n <= kPiece + kPadded ? 1 : (n - kPadded + kPiece - 1) / kPiece; }

// piece(begin, size), for all pieces of n instances, by whom `spread` finds.
template <class Piece>
void for_pieces(Spread spread, int64_t n, const Piece& piece) {
  const int64_t pieces = pieces_of(n);
  const auto nth = [&](int64_t i) { piece(i * kPiece, i + 1 < pieces ? kPiece : n - i * kPiece); };
  if (spread == nullptr || pieces == 1) {
    for (int64_t i = 0; i < pieces; ++i) nth(i);
  } else {
    using Nth = decltype(nth);
    spread(pieces, [](const void* what, int64_t i) { (*static_cast<const Nth*>(what))(i); }, &nth);
  }
}

// part(begin, instances of a piece), where there is no padding in between, else part(0, all of them).
template <class Part>
void for_parts(Spread spread, const bool* mask, const Instances& r, const Part& part) {
  if (mask != nullptr || r.count != 1) return part(0, r);
  for_pieces(spread, r.positions, [&](int64_t begin, int64_t size) {
    Instances some = r;
    some.logits += begin * r.dimensions[0].logits;
    some.grad += begin * r.dimensions[0].grad;
    some.inner = some.positions = size;
    part(begin, some);
  });
}

template <class T, class In>
int64_t gather_row(Spread spread, const In* logits, const bool* mask, const Instances& r, T* out) {
  int64_t n = r.positions;
  for_parts(spread, mask, r, [&](int64_t begin, const Instances& some) {
    const int64_t found = gather(logits, mask, some, out + begin);
    if (mask != nullptr) n = found;  // there is one part
  });
  return n;
}

template <class T, class Out>
void store_row(const T* values, const bool* mask, const Instances& r, Out* grad, Spread spread) {
  for_parts(spread, mask, r, [&](int64_t begin, const Instances& some) { scatter(values + begin, mask, some, grad); });
}

template <class T>
Row<T> load_row(const Problem<T>& problem, const Instances& r, T* scratch, Spread spread) {
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
      row.n = gather_row(spread, logits, problem.mask, r, scratch);
    }
  } else if constexpr (sizeof(T) == sizeof(float)) {
    if (problem.type == Type::kHalf) {
      row.n = gather_row(spread, static_cast<const Half*>(problem.logits), problem.mask, r, scratch);
    } else {
      row.n = gather_row(spread, static_cast<const BFloat16*>(problem.logits), problem.mask, r, scratch);
    }
  }
  // with what is there anyway, so that lanes that do not count compute nothing strange
  for (int64_t i = row.n; i % (2 * SGL_WIDTH) != 0; ++i) scratch[i] = scratch[0];
  return row;
}

}  // namespace SGL_LEVEL
}  // namespace sgl
