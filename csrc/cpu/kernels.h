// The interface between the operators (ops.cpp) and the kernels (all_kernels.h, compiled once for each level).
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

// In scratch memory there is room for a row and its padding every so many numbers.
inline int64_t row_step(const Layout& layout) { return layout.longest + 64; }

// Rows gathered per pass: where classes lie side by side, those of a cache line, as long as they fit a cache. With few
// classes, one row at a time is as fast.
inline int64_t rows_together(const Layout& layout) {
  if (!layout.classes_inside() || layout.classes < 8) return 1;
  const int64_t fit = 65536 / row_step(layout);
  return fit < 1 ? 1 : fit < 16 ? fit : 16;
}

// In numbers: the rows, and where there is one, that of its gradient.
inline int64_t scratch_size(const Layout& layout) {
  const int64_t together = rows_together(layout);
  return (together < 2 ? 2 : together) * row_step(layout);
}

// Long rows are worked on in pieces of so many instances, by several threads where there are more threads than rows. The
// same pieces whoever works on them, put together in the same order: the number of threads changes nothing.
constexpr int64_t kPiece = 16384;

// Calls task(what, i) for each i in [0, tasks), on several threads.
using ParallelFor = void (*)(int64_t tasks, void (*task)(const void* what, int64_t i), const void* what);

// What forward writes.
template <class T>
struct Forward {
  T* saved;  // a row for each pair
  T* bag_logits;  // one for each pair; null: not wanted
};

// What backward reads, besides the logits.
template <class T>
struct Backward {
  const T* rows;  // that forward saved
  const T* grad_output;  // one number, or one for each pair
  bool per_pair;
};

template <class T>
struct Kernels {
  // Sums over the pairs [begin, end), and their rows of what is saved. `labels` is null for the bag logits, which have
  // none. `parallel_for` is for the pieces of long rows, null where every thread has pairs of its own.
  Batch (*forward)(
      const Problem<T>&, const Label* labels, const Forward<T>&, int64_t begin, int64_t end, T* scratch, ParallelFor);
  // gradient of the pairs [begin, end)
  void (*backward)(
      const Problem<T>&, const Backward<T>&, void* grad, int64_t begin, int64_t end, T* scratch, ParallelFor);
  // 0 exp, 1 log1p_unit, 2 expm1_negative, 3 log1p_any, 4 reciprocal
  void (*math)(int function, const T* x, T* y, int64_t n);
};

const char* cpu_level();

// for the best instruction set of this machine
template <class T>
const Kernels<T>& kernels();

}  // namespace sgl
