// What the operators (ops.cpp) and the compiled kernels (bag_class.h, once for each level) tell each other.
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

// How many rows are filled together: where classes lie side by side, those of a cache line, as long as they fit a cache.
// Of few classes a row by itself is as fast.
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

// Has task(what, i) called for i in [0, tasks), by several threads.
using Spread = void (*)(int64_t tasks, void (*task)(const void* what, int64_t i), const void* what);

template <class T>
struct Kernels {
  // sums over the bag-classes [begin, end), and their rows of what is saved; `spread` is for the pieces of long ones,
  // null where every thread has bag-classes of its own
  Batch (*forward)(
      const Problem<T>&, const Label* labels, T* saved, int64_t begin, int64_t end, T* scratch, Spread spread);
  // gradient of the bag-classes [begin, end)
  void (*backward)(
      const Problem<T>&, const T* saved, T grad_output, void* grad, int64_t begin, int64_t end, T* scratch,
      Spread spread);
  // 0 exp, 1 log1p_unit, 2 expm1_negative, 3 log1p_any, 4 reciprocal
  void (*math)(int function, const T* x, T* y, int64_t n);
};

const char* cpu_level();

// for the best instruction set of this machine
template <class T>
const Kernels<T>& kernels();

}  // namespace sgl
