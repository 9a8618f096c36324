// What the operators (ops.cpp) and the compiled kernels (kernels.cpp) tell each other.
#pragma once

#include "../sgl_math.h"
#include "layout.h"

namespace sgl {

enum class Type {
  kFloat,
  kDouble,
  kHalf,
  kBFloat16
};

enum class Kind : int8_t {
  kAbsent = 0,  // unknown label or no instance: takes no part
  kNegative = 1,
  kPositive = 2,
  kUnranked = 3,  // positive, its instances all alike: only the bag loss sees it
  kBroken = 4,  // holds a NaN or an infinity: loss and gradient are NaN
};

enum class Label : int8_t {
  kUnknown,
  kNegative,
  kPositive
};

// What backward needs of a bag-class besides its logits: a row of `saved`.
enum Column {
  kColumnKind,
  kColumnLow,  // smallest, largest and nearest to zero of its logits
  kColumnHigh,
  kColumnNearest,
  kColumnNegative,  // weight of the BCE of an instance in each part
  kColumnAmbiguous,
  kColumnPositive,
  kColumnMask,  // weight of the mask penalty
  kColumnPooling,  // weight of dz/dx; lies before its two slopes
  kColumnSlope1,
  kColumnSlope2,
  kColumns
};

// What forward finds out about one bag-class; the batch's denominators are not known yet.
struct BagClass {
  Kind kind;
  bool positive;  // its label
  double low, high, nearest;
  double weight;  // w of Eq. 8
  double loss[3];  // sum of the BCE of the negative, ambiguous and positive instances
  int64_t count[3];
  double bag_loss, bag_slope;  // BCE(P, y) and its derivative by z
  BagLogit bag_logit;
  double mask;  // sqrt(mean (p [M > 0])^2)
  double mask_slope;  // d mask / dx = mask_slope * scaled_p^2 * q
};

template <class T>
struct Problem {
  const void* logits;
  Type type;
  const bool* mask;  // null: every position is an instance
  const T* pos_weight;  // null: 1
  const Layout* layout;
  double delta_l;
  int64_t pooling;
  double pooling_parameter;
  bool rescale, weighted;
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
