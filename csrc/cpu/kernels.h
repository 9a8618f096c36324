// What the operators (ops.cpp) and the compiled kernels (kernels.cpp) tell each other.
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
  const T* pos_weight;  // null: 1
  const Layout* layout;
  Settings settings;
};

// `scratch` holds scratch_size(longest) numbers.
inline int64_t scratch_size(int64_t longest) { return 2 * (longest + 64); }

template <class T>
struct Kernels {
  // statistics of the bag-classes [begin, end)
  void (*forward)(const Problem<T>&, const Label* labels, BagClass* out, int64_t begin, int64_t end, T* scratch);
  // gradient of the bag-classes [begin, end)
  void (*backward)(
      const Problem<T>&, const T* saved, T grad_output, void* grad, int64_t begin, int64_t end, T* scratch);
  void (*math)(int function, const T* x, T* y, int64_t n);  // 0 exp, 1 log1p_unit, 2 expm1_negative
};

const char* cpu_level();

// for the best instruction set of this machine
template <class T>
const Kernels<T>& kernels();

}  // namespace sgl
