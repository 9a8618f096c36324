// Loops over the vectors of a row of instances, and over the pieces of a long row.
//
// Compiled once per instruction set, each in a separate namespace (SGL_LEVEL), with SGL_WIDTH floats per vector.
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

struct All {};  // in place of a condition: all lanes are valid

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

// Floats are summed over this many vectors; these sums are added up in double. This is precise enough for a bag of a
// million instances.
constexpr int64_t kBlock = 16;
static_assert(kBlock <= LogOfProduct<float>::kFactors, "the factors of a block must fit into one product");

// The last n % kCount of n numbers as a full vector. Invalid lanes contain one of the numbers again. `room` is scratch
// memory for one vector.
template <class F, class T>
SGL_HD const T* last_vector(const T* x, int64_t n, T* room) {
  constexpr int64_t kWidth = Lanes<F>::kCount;
  const int64_t whole = n / kWidth * kWidth;
  if (n <= kPadded) return x + whole;
  for (int64_t i = 0; i < kWidth; ++i) room[i] = x[whole + i < n ? whole + i : whole];
  return room;
}

// Calls each(v, live) for each vector v of the n > 0 numbers at x, and end() after every kBlock vectors and after the
// last. `live` marks the valid lanes of the last vector; its invalid lanes contain one of the numbers again.
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

// Merges the results of the pieces in their order.
template <class Pass>
auto over_several_pieces(ParallelFor parallel_for, int64_t n, const Pass& pass) {
  using Found = decltype(pass(n, n));
  const int64_t pieces = pieces_of(n);
  std::unique_ptr<Found[]> found(new Found[pieces]);
  for_pieces(parallel_for, n, [&](int64_t begin, int64_t size) { found[begin / kPiece] = pass(begin, size); });
  for (int64_t i = 1; i < pieces; ++i) found[0].merge(found[i]);
  return found[0];
}

// Calls pass(begin, size) for each piece of n instances and merges the results. Inlined where there is one piece: on
// small bags the call is a measurable part of a pass.
template <class Pass>
SGL_HD auto over_pieces(ParallelFor parallel_for, int64_t n, const Pass& pass) {
  return pieces_of(n) == 1 ? pass(0, n) : over_several_pieces(parallel_for, n, pass);
}

}  // namespace SGL_LEVEL
}  // namespace sgl
