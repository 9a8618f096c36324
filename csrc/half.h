// Conversions between float and float16 or bfloat16 bit patterns, without branches or tables so that loops vectorize.
#pragma once

#include "vector_math.h"

namespace sgl {

enum class Type {  // dtype of the logits
  kFloat,
  kDouble,
  kHalf,
  kBFloat16
};

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

SGL_HD float read_as(float, float v) { return v; }
SGL_HD double read_as(double, double v) { return v; }

SGL_HD float read_as(float, BFloat16 v) { return bits_of<float>(static_cast<uint32_t>(v.bits) << 16); }

SGL_HD float read_as(float, Half v) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
#else
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  // The exponent bias is 15, that of float is 127. The product also converts subnormals.
  const float finite = bits_of<float>(magnitude) * bits_of<float>((127u + 112u) << 23);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = magnitude >= (31u << 23) ? special : bits_of<uint32_t>(finite);
  return bits_of<float>(bits | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
#endif
}

SGL_HD void write_as(float* to, float v) { *to = v; }
SGL_HD void write_as(double* to, double v) { *to = v; }

SGL_HD void write_as(BFloat16* to, float v) {
  const uint32_t bits = bits_of<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

SGL_HD void write_as(Half* to, float v) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#else
  const uint32_t bits = bits_of<uint32_t>(v);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Round to nearest, ties to even. A carry of the mantissa increments the exponent, up to infinity.
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The last bit of a float near 0.5 has the value of the last bit of a subnormal half.
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - (126u << 23);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t bounded = magnitude >= (143u << 23) ? 0x7c00u : finite;
  const uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : bounded;
  to->bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
#endif
}

}  // namespace sgl
