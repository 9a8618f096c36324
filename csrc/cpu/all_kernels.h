// All kernels of one instruction set, and its math functions for tests.
#pragma once

#include "backward.h"
#include "forward.h"

namespace sgl {
namespace SGL_LEVEL {

template <class T>
void math(int function, const T* x, T* y, int64_t n) {
  using F = typename VectorOf<T>::F;
  T room[kPadded + 2 * SGL_WIDTH] = {};
  if (n <= kPadded) x = static_cast<const T*>(std::memcpy(room, x, n * sizeof(T)));
  if (function == 0) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return exp(v); });
  if (function == 1) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return log1p_unit(v); });
  if (function == 2) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return expm1_negative(v); });
  if (function == 3) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return log1p_any(v); });
  if (function == 4) map_vectors<F>(x, n, y, [](F v) SGL_INLINED { return reciprocal(v); });
}

template <class T>
Kernels<T> all_kernels() {
  return {&forward_range<T>, &backward_range<T>, &math<T>};
}

}  // namespace SGL_LEVEL
}  // namespace sgl
