// Selects the kernels of the best instruction set of this machine.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "levels.h"

namespace sgl {
namespace {

enum Level {
  kBaseline,
  kAVX2,
  kAVX512
};

constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512"};  // by Level

// SGL_OPS_CPU=baseline|avx2|avx512 selects a lower level than the machine supports, so that each can be tested.
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
  for (int lower = 0; wanted != nullptr && lower < best; ++lower)
    if (std::strcmp(wanted, kLevelNames[lower]) == 0) best = lower;
  return static_cast<Level>(best);
}

Level level() {
  static const Level chosen = detect();
  return chosen;
}

template <class T>
Kernels<T> choose() {
#if defined(__x86_64__)
  if (level() == kAVX512) return avx512_kernels(T());
  if (level() == kAVX2) return avx2_kernels(T());
#endif
  return baseline_kernels(T());
}

}  // namespace

const char* cpu_level() { return kLevelNames[level()]; }

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = choose<T>();
  return chosen;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace sgl
