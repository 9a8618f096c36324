// The kernels of bag_class.h, compiled once for each instruction set; the best one of the machine is chosen at run time.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "bag_class.h"

namespace sgl {
namespace {

#define SGL_LEVEL(NAME, ATTRIBUTE)                                                                              \
  template <class T>                                                                                            \
  ATTRIBUTE void forward_##NAME(                                                                                \
      const Problem<T>& p, const Label* labels, BagClass* out, int64_t begin, int64_t end, T* scratch) {        \
    forward_range(p, labels, out, begin, end, scratch);                                                         \
  }                                                                                                             \
  template <class T>                                                                                            \
  ATTRIBUTE void backward_##NAME(                                                                               \
      const Problem<T>& p, const T* saved, T grad_output, void* grad, int64_t begin, int64_t end, T* scratch) { \
    backward_range(p, saved, grad_output, grad, begin, end, scratch);                                           \
  }                                                                                                             \
  template <class T>                                                                                            \
  ATTRIBUTE void math_##NAME(int function, const T* x, T* y, int64_t n) {                                       \
    math_range(function, x, y, n);                                                                              \
  }                                                                                                             \
  template <class T>                                                                                            \
  constexpr Kernels<T> kernels_##NAME = {&forward_##NAME<T>, &backward_##NAME<T>, &math_##NAME<T>};

SGL_LEVEL(baseline, )
#if defined(__x86_64__)
SGL_LEVEL(avx2, __attribute__((target("avx2,fma"))))
SGL_LEVEL(avx512, __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))))
#endif

enum Level {
  kBaseline,
  kAVX2,
  kAVX512
};

// SGL_OPS_CPU=baseline|avx2|avx512 forces a lower level than the machine has, so that each can be tested.
Level detect() {
  int best = kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = kAVX2;
  if (best == kAVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    best = kAVX512;
#endif
  const char* wanted = std::getenv("SGL_OPS_CPU");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "baseline") == 0) best = kBaseline;
    if (std::strcmp(wanted, "avx2") == 0 && best > kAVX2) best = kAVX2;
  }
  return static_cast<Level>(best);
}

Level level() {
  static const Level chosen = detect();
  return chosen;
}

}  // namespace

const char* cpu_level() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[level()];
}

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  if (level() == kAVX512) return kernels_avx512<T>;
  if (level() == kAVX2) return kernels_avx2<T>;
#endif
  return kernels_baseline<T>;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace sgl
