// The interface between the operators (ops.cpp) and the kernels (all_kernels.h, compiled once per instruction set).
#pragma once

#include "../batch.h"
#include "../half.h"
#include "../layout.h"

namespace sgl {

template <class T>
struct Problem {
  const void* logits;
  Type type;
  const bool* mask;  // null: every position is an instance
  const T *class_weight, *pos_weight;  // null: 1
  const Layout* layout;
  Settings settings;
};

// Room for the padding of a row in scratch memory, in numbers.
constexpr int64_t kRowPadding = 64;

// Distance between rows in scratch memory, in numbers: the longest row and its padding.
inline int64_t row_step(const Layout& layout) { return layout.longest + kRowPadding; }

// Rows gathered per pass. If classes are adjacent in memory, the rows of a cache line are gathered together as far as
// they fit into the cache. With few classes, one row at a time is as fast.
inline int64_t rows_together(const Layout& layout) {
  if (!layout.classes_inside() || layout.classes < 8) return 1;
  const int64_t fit = 65536 / row_step(layout);
  return fit < 1 ? 1 : fit < 16 ? fit : 16;
}

// Size of the scratch memory of a thread, in numbers: the rows of a pass, but at least a row and its gradient.
inline int64_t scratch_size(const Layout& layout) {
  const int64_t together = rows_together(layout);
  return (together < 2 ? 2 : together) * row_step(layout);
}

// Long rows are divided into pieces of this many instances. Several threads share the pieces if there are more threads
// than rows. The pieces and the order of their merge are fixed, so results do not depend on the number of threads.
constexpr int64_t kPiece = 16384;

// Calls task(what, i) for each i in [0, tasks), on several threads.
using ParallelFor = void (*)(int64_t tasks, void (*task)(const void* what, int64_t i), const void* what);

// Outputs of forward.
template <class T>
struct Forward {
  T* saved;  // one row per pair
  T* bag_logits;  // one per pair; null: not needed
};

// Inputs of backward besides the logits.
template <class T>
struct Backward {
  const T* rows;  // saved by forward
  const T* grad_output;  // one number, or one per pair
  bool per_pair;
};

template <class T>
struct Kernels {
  // Returns the sums over the pairs [begin, end) and writes their saved rows. `labels` is null for bag logits, which
  // need no labels. ParallelFor distributes the pieces of long rows; it is null if each thread works on separate pairs.
  Batch (*forward)(
      const Problem<T>&, const Label* labels, const Forward<T>&, int64_t begin, int64_t end, T* scratch, ParallelFor);
  // writes the gradient of the pairs [begin, end)
  void (*backward)(
      const Problem<T>&, const Backward<T>&, void* grad, int64_t begin, int64_t end, T* scratch, ParallelFor);
  // 0 exp, 1 log1p_unit, 2 expm1_negative, 3 log1p_any, 4 reciprocal
  void (*math)(int function, const T* x, T* y, int64_t n);
};

const char* cpu_level();

// The kernels for the best instruction set of this machine.
template <class T>
const Kernels<T>& kernels();

}  // namespace sgl
