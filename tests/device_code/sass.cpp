// Interpreter of machine code: it executes the kernels of csrc/cuda from the text that nvdisasm prints. Lanes diverge
// at branches and reconverge at BSSY, BSYNC and WARPSYNC, so issue counts are those of a GPU.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <set>
#include <sstream>
#include <unordered_map>

#include "common.h"

namespace device_code {
namespace sass {

constexpr int kRZ = 255, kUR = 256, kURZ = 319, kNowhere = 320, kRows = 322;
constexpr int kPT = 7, kUP = 8, kUPT = 15, kNoPredicate = 16, kPredicates = 17;

enum Kind : uint8_t {
  kSimple,
  kBra,
  kBraDiv,
  kBraConv,
  kExit,
  kCall,
  kRet,
  kBssy,
  kBsync,
  kBreak,
  kBar,
  kWarpsync,
  kCollective,
  kEndCollective,
  kYield_
};

struct Operand {
  enum {
    kReg,
    kImm,
    kConst,
    kPred
  } kind = kReg;
  int reg = kRZ;
  uint32_t imm = 0;
  uint64_t bank = 0, at = 0;  // constants: bank and offset
  int index = -1;  // constants: register added to the offset
  bool neg = false, abs = false, inv = false;
  int half = -1;
  int row = -1;  // immediates and constants: the row that holds 32 copies
};

struct Warp;
struct Instruction {
  void (*run)(Warp&, const Instruction&, uint32_t) = nullptr;
  Kind kind = kSimple;
  uint8_t cls = kOther;
  uint8_t predicate = kPT;
  bool negated = false;
  bool uniform = false;
  bool ftz = false, is_signed = true, x = false, hi = false, wrap = false, left = false, ex = false, nan = false,
       wide = false, sx = false;
  int rounding = FE_TONEAREST;
  int cmp = 0, boolean = 0;  // cmp: a bit each for less, equal, greater, unordered
  int size = 4;
  bool sign_extend = false;
  int d = kNowhere;
  int p1 = kNoPredicate, p2 = kNoPredicate;  // destination predicates
  Operand a, b, c, e;
  uint8_t q1 = kPT, q2 = kPT, q3 = kPT;
  bool n1 = false, n2 = false, n3 = false;
  uint32_t lut = 0, lut2 = 0;
  int64_t offset = 0;
  int base = kRZ, base_u = kURZ;
  bool base64 = false;
  uint32_t scale = 1;  // of the base, in an address of shared memory
  uint32_t target = 0;
  int barrier = 0;
  uint32_t pc = 0;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> text;
  std::vector<std::pair<int, uint32_t>> immediates;  // row, value
  std::vector<std::pair<int, std::pair<int, uint64_t>>> constants;  // row, bank, offset
  int rows = kRows;
  std::map<uint64_t, std::vector<uint8_t>> banks;
  mutable std::vector<uint64_t> issued;  // issue count of each instruction
};

struct Block;
struct Warp {
  Block* block;
  int index;
  std::vector<uint32_t> R;
  uint32_t P[kPredicates];
  uint32_t B[16];
  uint32_t meeting[16][32];  // of each lane in a barrier: the target of its BSSY
  uint32_t pc[32];
  int group[32];
  int groups;
  uint32_t alive, at_block, at_warp, at_conv;
  int conv[32];
  uint32_t collective_target;
  uint64_t issued;
  int current;  // the group that runs next: uniform registers belong to the warp, so a group is not interrupted
  uint32_t* r(int i) { return R.data() + size_t(i) * 32; }
};
struct Block {
  uint32_t index, size, count;
  const uint8_t* constants;  // bank 0
  size_t constant_bytes;
  const Program* program;
  SharedMemory shared;
  std::vector<Warp> warps;
  bool done = false;
};

inline uint32_t pred(Warp& w, int p, bool n) { return n ? ~w.P[p] : w.P[p]; }
inline void set_pred(Warp& w, int p, uint32_t mask, uint32_t v) {
  if (p == kPT || p == kUPT || p == kNoPredicate) return;
  w.P[p] = (w.P[p] & ~mask) | (v & mask);
}
inline const uint32_t* row(Warp& w, const Operand& o) { return w.r(o.kind == Operand::kReg ? o.reg : o.row); }
inline const uint32_t* row_high(Warp& w, const Operand& o) {
  if (o.kind == Operand::kReg) return w.r(o.reg == kRZ || o.reg == kURZ ? o.reg : o.reg + 1);
  return w.r(o.row + 1);
}
inline float flush_to_zero(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float as_float(const Operand& o, uint32_t v, bool ftz = false) {
  if (o.abs) v &= 0x7fffffffu;
  if (o.neg) v ^= 0x80000000u;
  const float x = bits<float>(v);
  return ftz ? flush_to_zero(x) : x;
}
inline uint32_t as_int(const Operand& o, uint32_t v) {
  if (o.abs) v = static_cast<int32_t>(v) < 0 ? 0u - v : v;
  if (o.neg) v = 0u - v;
  if (o.inv) v = ~v;
  return v;
}
inline double as_double(const Operand& o, uint32_t low, uint32_t high) {
  if (o.abs) high &= 0x7fffffffu;
  if (o.neg) high ^= 0x80000000u;
  return bits<double>(uint64_t(high) << 32 | low);
}
inline void put_double(Warp& w, int d, int l, double v) {
  const uint64_t b = bits<uint64_t>(v);
  w.r(d)[l] = uint32_t(b);
  w.r(d == kNowhere ? kNowhere : d + 1)[l] = uint32_t(b >> 32);
}

template <class T>
bool compared(int cmp, T a, T b) {
  if (a < b) return cmp & 1;
  if (a == b) return cmp & 2;
  if (a > b) return cmp & 4;
  return cmp & 8;
}
inline uint32_t joined(int boolean, uint32_t a, uint32_t b) {
  return boolean == 0 ? a & b : boolean == 1 ? a | b : a ^ b;
}

struct Rounding {
  int before = FE_TONEAREST;
  bool changed;
  explicit Rounding(int mode) : changed(mode != FE_TONEAREST) {
    if (changed) fesetround(mode);
  }
  ~Rounding() {
    if (changed) fesetround(FE_TONEAREST);
  }
};
template <class T>
__attribute__((noinline)) T fma_rounded(volatile T a, volatile T b, volatile T c) {
  volatile T r = std::fma(a, b, c);
  return r;
}

#define RUN(name) void name(Warp& w, const Instruction& i, uint32_t m)
#define FLOATS(operand, name) const uint32_t* name##_ = row(w, i.operand);
#define FL(operand, name) as_float(i.operand, name##_[l], i.ftz)

RUN(fadd) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  const Rounding r(i.rounding);
  for_lanes(m, [&](int l) {
    const float v = as_float(i.a, a[l], i.ftz) + as_float(i.b, b[l], i.ftz);
    d[l] = bits<uint32_t>(i.ftz ? flush_to_zero(v) : v);
  });
}
RUN(fmul) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  const Rounding r(i.rounding);
  for_lanes(m, [&](int l) {
    const float v = as_float(i.a, a[l], i.ftz) * as_float(i.b, b[l], i.ftz);
    d[l] = bits<uint32_t>(i.ftz ? flush_to_zero(v) : v);
  });
}
RUN(ffma) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  if (i.rounding != FE_TONEAREST) {
    const Rounding r(i.rounding);
    for_lanes(m, [&](int l) {
      d[l] = bits<uint32_t>(fma_rounded<float>(as_float(i.a, a[l]), as_float(i.b, b[l]), as_float(i.c, c[l])));
    });
    return;
  }
  for_lanes(m, [&](int l) {
    const float v = std::fma(as_float(i.a, a[l], i.ftz), as_float(i.b, b[l], i.ftz), as_float(i.c, c[l], i.ftz));
    d[l] = bits<uint32_t>(i.ftz ? flush_to_zero(v) : v);
  });
}
// The smaller or the larger of two numbers; -0 is smaller than 0. NaN if `nan` and one of them is NaN.
inline float extreme(float x, float y, bool least, bool nan) {
  if (std::isnan(x) || std::isnan(y)) return nan ? bits<float>(0x7fffffffu) : std::isnan(x) ? y : x;
  if (least) return x < y || (x == y && std::signbit(x)) ? x : y;
  return x > y || (x == y && !std::signbit(x)) ? x : y;
}
// Of two numbers, or of three (FMNMX3)
RUN(fmnmx) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = i.wide ? row(w, i.c) : nullptr;
  uint32_t* d = w.r(i.d);
  const uint32_t least = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) {
    const bool smaller = least >> l & 1;
    float v = extreme(as_float(i.a, a[l], i.ftz), as_float(i.b, b[l], i.ftz), smaller, i.nan);
    if (c != nullptr) v = extreme(v, as_float(i.c, c[l], i.ftz), smaller, i.nan);
    d[l] = bits<uint32_t>(v);
  });
}
RUN(fsel) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  const uint32_t p = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) { d[l] = bits<uint32_t>(p >> l & 1 ? as_float(i.a, a[l]) : as_float(i.b, b[l])); });
}
RUN(fsetp) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t v = 0;
  for_lanes(
      m, [&](int l) { v |= uint32_t(compared(i.cmp, as_float(i.a, a[l], i.ftz), as_float(i.b, b[l], i.ftz))) << l; });
  const uint32_t q = pred(w, i.q1, i.n1);
  set_pred(w, i.p2, m, joined(i.boolean, ~v, q));
  set_pred(w, i.p1, m, joined(i.boolean, v, q));
}
RUN(fset) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  uint32_t v = 0;
  for_lanes(
      m, [&](int l) { v |= uint32_t(compared(i.cmp, as_float(i.a, a[l], i.ftz), as_float(i.b, b[l], i.ftz))) << l; });
  v = joined(i.boolean, v, pred(w, i.q1, i.n1));
  for_lanes(m, [&](int l) { d[l] = v >> l & 1 ? 0x3f800000u : 0u; });
}
RUN(fchk) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t v = 0;
  for_lanes(m, [&](int l) {
    // True if the fast path of a / b may be inexact. The slow path is always exact, so all doubtful cases take it.
    const int x = a[l] >> 23 & 255, y = b[l] >> 23 & 255;
    const bool bad = y == 0 || y >= 252 || x == 255 || x <= 26 || x - y >= 124 || x - y <= -124;
    v |= uint32_t(bad) << l;
  });
  set_pred(w, i.p1, m, v);
}
RUN(mufu_ex2) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = bits<uint32_t>(ex2_approx(as_float(i.a, a[l]))); });
}
RUN(mufu_rcp) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = bits<uint32_t>(rcp_approx(as_float(i.a, a[l]))); });
}
RUN(mufu_rsq) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = bits<uint32_t>(rsq_approx(as_float(i.a, a[l]))); });
}
// Works on the upper word of a double; about 20 bits are correct.
RUN(mufu_rcp64h) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) {
    double y = 1.0 / as_double(i.a, 0, a[l]);
    if (std::fabs(y) < 2.2250738585072014e-308) y = std::copysign(0.0, y);
    d[l] = uint32_t(bits<uint64_t>(y) >> 32);
  });
}
RUN(mufu_rsq64h) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = uint32_t(bits<uint64_t>(1.0 / std::sqrt(as_double(i.a, 0, a[l]))) >> 32); });
}
#define DOUBLES(name, expression)                                                                      \
  RUN(name) {                                                                                          \
    const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a), *b = row(w, i.b), *bh = row_high(w, i.b); \
    const uint32_t *c = row(w, i.c), *ch = row_high(w, i.c);                                           \
    (void)c, (void)ch;                                                                                 \
    for_lanes(m, [&](int l) {                                                                          \
      const double x = as_double(i.a, a[l], ah[l]), y = as_double(i.b, b[l], bh[l]);                   \
      const double z = as_double(i.c, c[l], ch[l]);                                                    \
      (void)z;                                                                                         \
      put_double(w, i.d, l, expression);                                                               \
    });                                                                                                \
  }
double add_rounded(int mode, volatile double x, volatile double y) {
  const Rounding r(mode);
  volatile double v = x + y;
  return v;
}
double mul_rounded(int mode, volatile double x, volatile double y) {
  const Rounding r(mode);
  volatile double v = x * y;
  return v;
}
double fma_mode(int mode, double x, double y, double z) {
  const Rounding r(mode);
  return fma_rounded<double>(x, y, z);
}
DOUBLES(dadd, add_rounded(i.rounding, x, y))
DOUBLES(dmul, mul_rounded(i.rounding, x, y))
DOUBLES(dfma, i.rounding == FE_TONEAREST ? std::fma(x, y, z) : fma_mode(i.rounding, x, y, z))
RUN(dsetp) {
  const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a), *b = row(w, i.b), *bh = row_high(w, i.b);
  uint32_t v = 0, second = 0;
  for_lanes(m, [&](int l) {
    const double x = as_double(i.a, a[l], ah[l]), y = as_double(i.b, b[l], bh[l]);
    if (i.cmp >= 16) {  // MIN, MAX: first predicate: x is chosen; second: both are NaN
      const bool less = x < y || (x == y && std::signbit(x)), more = x > y || (x == y && !std::signbit(x));
      const bool first = std::isnan(y) ? !std::isnan(x) : !std::isnan(x) && (i.cmp == 16 ? less : more);
      v |= uint32_t(first) << l;
      second |= uint32_t(std::isnan(x) && std::isnan(y)) << l;
    } else {
      const bool r = compared(i.cmp, x, y);
      v |= uint32_t(r) << l;
      second |= uint32_t(!r) << l;
    }
  });
  const uint32_t q = pred(w, i.q1, i.n1);
  set_pred(w, i.p2, m, joined(i.boolean, second, q));
  set_pred(w, i.p1, m, joined(i.boolean, v, q));
}
float from_half(uint16_t h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return static_cast<float>(v);
}
uint16_t to_half(float f) {
  if (std::isnan(f)) return 0x7fff;
  const _Float16 v = static_cast<_Float16>(f);
  uint16_t h;
  memcpy(&h, &v, 2);
  return h;
}
RUN(hadd2_f32) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) {
    float x = i.a.half < 0 ? bits<float>(a[l]) : from_half(uint16_t(a[l] >> (16 * i.a.half)));
    float y = i.b.half < 0 ? bits<float>(b[l]) : from_half(uint16_t(b[l] >> (16 * i.b.half)));
    if (i.a.neg) x = -x;
    if (i.b.neg) y = -y;
    d[l] = bits<uint32_t>(x + y);
  });
}
RUN(mov) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = as_int(i.a, a[l]); });
}
RUN(zero64) {
  uint32_t *d = w.r(i.d), *h = w.r(i.d + 1);
  for_lanes(m, [&](int l) { d[l] = h[l] = 0; });
}
// One term of a sum in 64 bits: a - b is a + ~b + 1.
inline uint64_t term(const Operand& o, uint32_t v) {
  if (o.neg) return uint64_t(~v) + 1;
  return o.inv ? ~v : v;
}
RUN(iadd3) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  const uint32_t q1 = i.x ? pred(w, i.q1, i.n1) : 0, q2 = i.x ? pred(w, i.q2, i.n2) : 0;
  uint32_t one = 0, two = 0;
  for_lanes(m, [&](int l) {
    const uint64_t s = term(i.a, a[l]) + term(i.b, b[l]) + term(i.c, c[l]) + (q1 >> l & 1) + (q2 >> l & 1);
    d[l] = uint32_t(s);
    one |= uint32_t(s >> 32 >= 1) << l;
    two |= uint32_t(s >> 32 >= 2) << l;
  });
  set_pred(w, i.p1, m, one);
  set_pred(w, i.p2, m, two);
}
RUN(iabs) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = static_cast<int32_t>(a[l]) < 0 ? 0u - a[l] : a[l]; });
}
RUN(imad) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c), *ch = row_high(w, i.c);
  const uint32_t q = i.x ? pred(w, i.q1, i.n1) : 0;
  uint32_t carry = 0;
  for_lanes(m, [&](int l) {
    const uint32_t x = i.a.neg && !i.wide && !i.hi ? 0u - a[l] : a[l], y = b[l];
    if (i.wide || i.hi) {
      if (i.a.neg || i.b.neg || i.c.neg || i.c.inv)
        fail("IMAD.WIDE or IMAD.HI with a negated operand is not supported, pc %u", i.pc);
      const uint64_t product = i.is_signed ? uint64_t(int64_t(int32_t(x)) * int32_t(y)) : uint64_t(x) * y;
      const uint64_t addend = uint64_t(ch[l]) << 32 | c[l];
      const unsigned __int128 sum = (unsigned __int128)product + addend + (q >> l & 1);
      carry |= uint32_t(uint64_t(sum >> 64) != 0) << l;
      const uint64_t s = uint64_t(sum);
      if (i.hi) {
        w.r(i.d)[l] = uint32_t(s >> 32);
      } else {
        w.r(i.d)[l] = uint32_t(s);
        if (i.d != kNowhere) w.r(i.d + 1)[l] = uint32_t(s >> 32);
      }
    } else {
      const uint32_t z = i.c.neg ? 0u - c[l] : i.c.inv ? ~c[l] : c[l];
      const uint64_t s = uint64_t(uint32_t(x * (i.b.neg ? 0u - y : y))) + z + (q >> l & 1);
      w.r(i.d)[l] = uint32_t(s);
      carry |= uint32_t(s >> 32 != 0) << l;
    }
  });
  set_pred(w, i.p1, m, carry);
}
RUN(imnmx) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  const uint32_t least = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) {
    const uint32_t x = as_int(i.a, a[l]), y = as_int(i.b, b[l]);
    const bool less = i.is_signed ? int32_t(x) < int32_t(y) : x < y;
    d[l] = (least >> l & 1) == less ? x : y;
  });
}
RUN(viaddmnmx) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  const uint32_t least = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) {
    const uint32_t x = as_int(i.a, a[l]) + as_int(i.b, b[l]), y = as_int(i.c, c[l]);
    const bool less = i.is_signed ? int32_t(x) < int32_t(y) : x < y;
    d[l] = (least >> l & 1) == less ? x : y;
  });
}
RUN(isetp) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t v = 0;
  const uint32_t low = i.ex ? pred(w, i.q2, i.n2) : 0;
  for_lanes(m, [&](int l) {
    const uint32_t x = as_int(i.a, a[l]), y = as_int(i.b, b[l]);
    bool r;
    if (i.ex && x == y) {
      r = low >> l & 1;
    } else {
      r = i.is_signed ? compared(i.cmp, int32_t(x), int32_t(y)) : compared(i.cmp, x, y);
    }
    v |= uint32_t(r) << l;
  });
  const uint32_t q = pred(w, i.q1, i.n1);
  set_pred(w, i.p2, m, joined(i.boolean, ~v, q));
  set_pred(w, i.p1, m, joined(i.boolean, v, q));
}
RUN(lea) {
  // lut holds the shift.
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  const uint32_t q = i.x ? pred(w, i.q1, i.n1) : 0;
  uint32_t carry = 0;
  for_lanes(m, [&](int l) {
    const uint32_t x = as_int(i.a, a[l]);
    uint64_t first;
    if (i.hi) {
      const uint64_t wide = i.sx ? uint64_t(int64_t(int32_t(x))) : uint64_t(c[l]) << 32 | x;
      first = uint32_t((wide << i.lut) >> 32);
    } else {
      first = uint32_t(x << i.lut);
    }
    const uint64_t s = first + term(i.b, b[l]) + (q >> l & 1);
    d[l] = uint32_t(s);
    carry |= uint32_t(s >> 32 != 0) << l;
  });
  set_pred(w, i.p1, m, carry);
}
inline uint32_t looked_up(uint32_t lut, uint32_t x, uint32_t y, uint32_t z) {
  uint32_t r = 0;
  for (int k = 0; k < 8; ++k)
    if (lut >> k & 1) r |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
  return r;
}
RUN(lop3) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  uint32_t any = 0;
  for_lanes(m, [&](int l) {
    const uint32_t r = looked_up(i.lut, as_int(i.a, a[l]), as_int(i.b, b[l]), as_int(i.c, c[l]));
    d[l] = r;
    any |= uint32_t(r != 0) << l;
  });
  set_pred(w, i.p1, m, any | pred(w, i.q1, i.n1));
}
RUN(plop3) {
  const uint32_t x = pred(w, i.q1, i.n1), y = pred(w, i.q2, i.n2), z = pred(w, i.q3, i.n3);
  const uint32_t first = looked_up(i.lut, x, y, z), second = looked_up(i.lut2, x, y, z);
  set_pred(w, i.p1, m, first);
  set_pred(w, i.p2, m, second);
}
RUN(sel) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  const uint32_t p = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) { d[l] = p >> l & 1 ? as_int(i.a, a[l]) : as_int(i.b, b[l]); });
}
RUN(shf) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) {
    uint32_t s = b[l];
    const uint64_t v = uint64_t(c[l]) << 32 | a[l];
    s = i.wrap ? s & (i.size == 8 ? 63 : 31) : std::min<uint32_t>(s, i.size == 8 ? 64 : 32);
    uint64_t r;
    if (i.left) {
      r = s >= 64 ? 0 : v << s;
    } else if (i.is_signed) {
      r = uint64_t(int64_t(v) >> std::min<uint32_t>(s, 63));
    } else {
      r = s >= 64 ? 0 : v >> s;
    }
    d[l] = i.hi ? uint32_t(r >> 32) : uint32_t(r);
  });
}
RUN(prmt) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) {
    const uint64_t v = uint64_t(c[l]) << 32 | a[l];
    uint32_t r = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t s = b[l] >> (4 * k) & 15;
      uint32_t byte = v >> (8 * (s & 7)) & 255;
      if (s & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * k);
    }
    d[l] = r;
  });
}
RUN(p2r) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) {
    uint32_t v = 0;
    for (int k = 0; k < 7; ++k) v |= (w.P[k] >> l & 1) << k;
    d[l] = (v & b[l]) | (a[l] & ~b[l]);
  });
}
RUN(r2p) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  for_lanes(m, [&](int l) {
    for (int k = 0; k < 7; ++k)
      if (b[l] >> k & 1) w.P[k] = (w.P[k] & ~(1u << l)) | ((a[l] >> k & 1) << l);
  });
}
// Conversions. size, is_signed: the integer; wide: the floating-point type is double.
RUN(i2f) {
  const uint32_t *a = row(w, i.a), *h = row_high(w, i.a);
  const Rounding r(i.rounding);
  for_lanes(m, [&](int l) {
    int64_t s = 0;
    uint64_t u = 0;
    if (i.size == 8) {
      u = uint64_t(h[l]) << 32 | a[l];
      s = int64_t(u);
    } else {
      u = i.size == 1 ? a[l] & 255 : i.size == 2 ? a[l] & 65535 : a[l];
      s = i.size == 1 ? int8_t(u) : i.size == 2 ? int16_t(u) : int32_t(u);
    }
    if (i.wide) {
      volatile double v = i.is_signed ? double(s) : double(u);
      put_double(w, i.d, l, v);
    } else {
      volatile float v;
      if (i.is_signed) {
        volatile int64_t t = s;
        v = float(t);
      } else {
        volatile uint64_t t = u;
        v = float(t);
      }
      w.r(i.d)[l] = bits<uint32_t>(float(v));
    }
  });
}
RUN(f2i) {
  const uint32_t *a = row(w, i.a), *h = row_high(w, i.a);
  for_lanes(m, [&](int l) {
    const bool is_double = i.wide;
    double x = is_double ? as_double(i.a, a[l], h[l]) : double(as_float(i.a, a[l], i.ftz));
    uint64_t r;
    const int n = i.size * 8;
    if (std::isnan(x)) {
      r = is_double || i.size == 8 ? uint64_t(1) << (n - 1) : 0;
    } else {
      x = std::trunc(x);
      if (i.is_signed) {
        const double low = -std::ldexp(1.0, n - 1), high = std::ldexp(1.0, n - 1);
        r = x <= low ? uint64_t(1) << (n - 1) : x >= high ? (uint64_t(1) << (n - 1)) - 1 : uint64_t(int64_t(x));
      } else {
        r = x <= 0 ? 0 : x >= std::ldexp(1.0, n) ? ~uint64_t(0) : uint64_t(x);
      }
    }
    w.r(i.d)[l] = uint32_t(r);
    if (i.size == 8) w.r(i.d + 1)[l] = uint32_t(r >> 32);
  });
}
RUN(f2f_32_64) {
  const uint32_t *a = row(w, i.a), *h = row_high(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = bits<uint32_t>(float(as_double(i.a, a[l], h[l]))); });
}
RUN(f2f_64_32) {
  const uint32_t* a = row(w, i.a);
  for_lanes(m, [&](int l) { put_double(w, i.d, l, as_float(i.a, a[l])); });
}
RUN(f2f_16_32) {
  const uint32_t* a = row(w, i.a);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = to_half(as_float(i.a, a[l])); });
}
RUN(f2fp) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) { d[l] = uint32_t(to_half(as_float(i.a, a[l]))) << 16 | to_half(as_float(i.b, b[l])); });
}
RUN(s2r) {
  uint32_t* d = w.r(i.d);
  const uint32_t what = i.lut;
  for_lanes(m, [&](int l) {
    d[l] = what == 0 ? uint32_t(w.index) * 32 + l : what == 1 ? w.block->index : what == 3 ? uint32_t(l) : 0;
  });
}
RUN(r2ur) {
  const uint32_t v = row(w, i.a)[m == 0 ? 0 : __builtin_ctz(m)];
  uint32_t* d = w.r(i.d);
  for (int l = 0; l < 32; ++l) d[l] = v;
}
RUN(vote) {
  const uint32_t v = pred(w, i.q1, i.n1) & m;
  uint32_t* d = w.r(i.d);
  for_lanes(i.uniform ? ~0u : m, [&](int l) { d[l] = v; });
}
RUN(ldc) {
  for_lanes(i.uniform ? ~0u : m, [&](int l) {
    const uint64_t at = i.a.at + (i.a.index < 0 ? 0 : w.r(i.a.index)[l]);
    const uint8_t* from;
    size_t n;
    if (i.a.bank == 0) {
      from = w.block->constants;
      n = w.block->constant_bytes;
    } else {
      const auto& bank = w.block->program->banks.at(i.a.bank);
      from = bank.data();
      n = bank.size();
    }
    if (at + uint64_t(i.size) > n) fail("constant memory: offset %lu is outside of %zu bytes, pc %u", at, n, i.pc);
    if (at % i.size != 0) fail("constant memory: misaligned load, pc %u", i.pc);
    uint32_t v = 0;
    memcpy(&v, from + at, std::min(i.size, 4));
    if (i.sign_extend) v = i.size == 1 ? uint32_t(int32_t(int8_t(v))) : uint32_t(int32_t(int16_t(v)));
    w.r(i.d)[l] = v;
    for (int k = 1; k < i.size / 4; ++k) {
      memcpy(&v, from + at + 4 * k, 4);
      w.r(i.d + k)[l] = v;
    }
  });
}
// 64-bit integer instructions: sm_100 and later.
inline uint64_t as_int64(const Operand& o, uint32_t low, uint32_t high) {
  const uint64_t v = uint64_t(high) << 32 | low;
  return o.neg ? 0 - v : o.inv ? ~v : v;
}
inline void put64(Warp& w, int d, int l, uint64_t v) {
  w.r(d)[l] = uint32_t(v);
  w.r(d == kNowhere ? d : d + 1)[l] = uint32_t(v >> 32);
}
RUN(add64) {
  const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a), *b = row(w, i.b), *bh = row_high(w, i.b), *c = row(w, i.c),
                 *ch = row_high(w, i.c);
  for_lanes(m, [&](int l) {
    put64(w, i.d, l, as_int64(i.a, a[l], ah[l]) + as_int64(i.b, b[l], bh[l]) + as_int64(i.c, c[l], ch[l]));
  });
}
RUN(mov64) {
  const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a);
  for_lanes(m, [&](int l) { put64(w, i.d, l, as_int64(i.a, a[l], ah[l])); });
}
RUN(sel64) {
  const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a), *b = row(w, i.b), *bh = row_high(w, i.b);
  const uint32_t p = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) { put64(w, i.d, l, p >> l & 1 ? as_int64(i.a, a[l], ah[l]) : as_int64(i.b, b[l], bh[l])); });
}
RUN(imnmx64) {
  const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a), *b = row(w, i.b), *bh = row_high(w, i.b);
  const uint32_t least = pred(w, i.q1, i.n1);
  for_lanes(m, [&](int l) {
    const uint64_t x = as_int64(i.a, a[l], ah[l]), y = as_int64(i.b, b[l], bh[l]);
    const bool less = i.is_signed ? int64_t(x) < int64_t(y) : x < y;
    put64(w, i.d, l, (least >> l & 1) == less ? x : y);
  });
}
RUN(isetp64) {
  const uint32_t *a = row(w, i.a), *ah = row_high(w, i.a), *b = row(w, i.b), *bh = row_high(w, i.b);
  uint32_t v = 0;
  for_lanes(m, [&](int l) {
    const uint64_t x = as_int64(i.a, a[l], ah[l]), y = as_int64(i.b, b[l], bh[l]);
    v |= uint32_t(i.is_signed ? compared(i.cmp, int64_t(x), int64_t(y)) : compared(i.cmp, x, y)) << l;
  });
  const uint32_t q = pred(w, i.q1, i.n1);
  set_pred(w, i.p2, m, joined(i.boolean, ~v, q));
  set_pred(w, i.p1, m, joined(i.boolean, v, q));
}
inline uint32_t shared_address(Warp& w, const Instruction& i, int l) {
  return uint32_t(i.offset) + w.r(i.base)[l] * i.scale + w.r(i.base_u)[l];
}
inline uint64_t global_address(Warp& w, const Instruction& i, int l) {
  uint64_t at = uint64_t(i.offset);
  const int high = i.base == kRZ || i.base == kURZ ? i.base : i.base + 1;
  at += i.base64 ? uint64_t(w.r(high)[l]) << 32 | w.r(i.base)[l] : w.r(i.base)[l];
  if (i.base_u != kURZ) at += uint64_t(w.r(i.base_u + 1)[l]) << 32 | w.r(i.base_u)[l];
  return at;
}
RUN(ldg) {
  uint64_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = global_address(w, i, l);
    check_global(at[l], i.size, "load", i.pc);
    const uint8_t* from = reinterpret_cast<const uint8_t*>(at[l]);
    if (i.size < 4) {
      uint32_t v = 0;
      memcpy(&v, from, size_t(i.size));
      if (i.sign_extend) v = i.size == 1 ? uint32_t(int32_t(int8_t(v))) : uint32_t(int32_t(int16_t(v)));
      w.r(i.d)[l] = v;
    } else {
      for (int k = 0; k < i.size / 4; ++k) memcpy(w.r(i.d == kNowhere ? i.d : i.d + k) + l, from + 4 * k, 4);
    }
  });
  count_global(at, m, i.size, false);
}
RUN(stg) {
  uint64_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = global_address(w, i, l);
    check_global(at[l], i.size, "store", i.pc);
    uint8_t* to = reinterpret_cast<uint8_t*>(at[l]);
    if (i.size < 4) {
      memcpy(to, w.r(i.b.reg) + l, size_t(i.size));
    } else {
      for (int k = 0; k < i.size / 4; ++k) memcpy(to + 4 * k, w.r(i.b.reg == kRZ ? kRZ : i.b.reg + k) + l, 4);
    }
  });
  count_global(at, m, i.size, true);
}
RUN(lds) {
  uint32_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = shared_address(w, i, l);
    const uint8_t* from = w.block->shared.at(at[l], i.size, w.index * 32 + l, false, i.pc);
    if (i.size < 4) {
      uint32_t v = 0;
      memcpy(&v, from, size_t(i.size));
      if (i.sign_extend) v = i.size == 1 ? uint32_t(int32_t(int8_t(v))) : uint32_t(int32_t(int16_t(v)));
      w.r(i.d)[l] = v;
    } else {
      for (int k = 0; k < i.size / 4; ++k) memcpy(w.r(i.d == kNowhere ? i.d : i.d + k) + l, from + 4 * k, 4);
    }
  });
  count_shared(at, m, i.size);
}
RUN(sts) {
  uint32_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = shared_address(w, i, l);
    uint8_t* to = w.block->shared.at(at[l], i.size, w.index * 32 + l, true, i.pc);
    if (i.size < 4) {
      memcpy(to, w.r(i.b.reg) + l, size_t(i.size));
    } else {
      for (int k = 0; k < i.size / 4; ++k) memcpy(to + 4 * k, w.r(i.b.reg == kRZ ? kRZ : i.b.reg + k) + l, 4);
    }
  });
  count_shared(at, m, i.size);
}
RUN(atoms_add) {
  uint32_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = shared_address(w, i, l);
    uint8_t* p = w.block->shared.at(at[l], 4, w.index * 32 + l, true, i.pc, true);
    uint32_t old;
    memcpy(&old, p, 4);
    const uint32_t sum = old + row(w, i.b)[l];
    memcpy(p, &sum, 4);
    w.r(i.d)[l] = old;
  });
  count_shared(at, m, 4);
}
RUN(atomg_inc) {
  uint64_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = global_address(w, i, l);
    check_global(at[l], 4, "atomic", i.pc);
    uint32_t* p = reinterpret_cast<uint32_t*>(at[l]);
    const uint32_t old = *p, most = row(w, i.b)[l];
    *p = old >= most ? 0 : old + 1;
    w.r(i.d)[l] = old;
  });
  count_global(at, m, 4, true);
}
RUN(shfl_bfly) {
  const uint32_t *a = row(w, i.a), *b = row(w, i.b), *c = row(w, i.c);
  uint32_t from[32], valid = 0;
  memcpy(from, a, sizeof from);
  uint32_t* d = w.r(i.d);
  for_lanes(m, [&](int l) {
    const uint32_t clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const uint32_t most = (uint32_t(l) & segment) | (clamp & ~segment);
    uint32_t j = uint32_t(l) ^ (b[l] & 31);
    const bool inside = j <= most;
    if (!inside) j = uint32_t(l);
    if (!(m >> j & 1)) fail("a shuffle reads from a lane that does not take part, pc %u", i.pc);
    d[l] = from[j];
    valid |= uint32_t(inside) << l;
  });
  set_pred(w, i.p1, m, valid);
}
RUN(trap) {
  (void)w, (void)m;
  fail("the kernel executes a trap, pc %u", i.pc);
}
RUN(nothing) { (void)w, (void)i, (void)m; }

// ---------------------------------------------------------------------------------------------------------------------
// Parsing

std::string trimmed(const std::string& s) {
  const size_t b = s.find_first_not_of(" \t"), e = s.find_last_not_of(" \t");
  return b == std::string::npos ? "" : s.substr(b, e - b + 1);
}
std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts(1);
  for (char c : s) {
    if (c == at) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& p : parts) p = trimmed(p);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

enum Flavor {
  kIntImm,
  kFloatImm,
  kDoubleImm,
  kUpperWordImm  // of a double
};

class Section {
 public:
  Program program;

  void add(uint64_t address, const std::string& text) {
    if (address / 16 != program.code.size())
      fail("%s: the addresses of the instructions have a gap", program.name.c_str());
    program.code.emplace_back();
    program.text.push_back(text);
  }
  std::map<std::string, uint32_t> labels;

  // Decodes the section on its first launch: kernels that never run need no support.
  void finish() {
    if (finished_) return;
    for (size_t k = 0; k < program.code.size(); ++k) {
      program.code[k].pc = uint32_t(k);
      try {
        decode(program.code[k], program.text[k]);
      } catch (const Failure& f) {
        fail("%s: %s", program.text[k].c_str(), f.what());
      } catch (const std::logic_error& f) {
        fail("%s: %s", program.text[k].c_str(), f.what());
      }
    }
    finished_ = true;
  }

 private:
  bool finished_ = false;
  int constant_row(int bank, uint64_t at) {
    const int r = program.rows;
    program.rows += 2;
    program.constants.push_back({r, {bank, at}});
    program.constants.push_back({r + 1, {bank, at + 4}});
    return r;
  }
  int immediate_row(uint32_t low, uint32_t high) {
    const int r = program.rows;
    program.rows += 2;
    program.immediates.push_back({r, low});
    program.immediates.push_back({r + 1, high});
    return r;
  }
  static bool is_pred(const std::string& s) {
    size_t k = s[0] == '!' ? 1 : 0;
    if (s.compare(k, 1, "U") == 0) ++k;
    return s[k] == 'P' && k + 2 == s.size() && (isdigit(s[k + 1]) || s[k + 1] == 'T');
  }
  static int pred_of(std::string s, bool* negated) {
    bool n = false;
    if (s[0] == '!') {
      n = true;
      s = s.substr(1);
    }
    if (negated != nullptr) {
      *negated = n;
    } else if (n) {
      fail("a negated predicate is not supported here");
    }
    int base = 0;
    if (s[0] == 'U') {
      base = kUP;
      s = s.substr(1);
    }
    if (s[0] != 'P') fail("not a predicate: %s", s.c_str());
    return s[1] == 'T' ? base + 7 : base + (s[1] - '0');
  }
  static int reg_of(const std::string& s) {
    if (s == "RZ" || s == "SRZ") return kRZ;
    if (s == "URZ") return kURZ;
    if (s[0] == 'R' && isdigit(s[1])) return std::stoi(s.substr(1));
    if (s[0] == 'U' && s[1] == 'R' && isdigit(s[2])) return kUR + std::stoi(s.substr(2));
    fail("not a register: %s", s.c_str());
  }
  static int dest_of(const std::string& s) {
    const int r = reg_of(s);
    return r == kRZ || r == kURZ ? kNowhere : r;
  }
  Operand operand(std::string s, Flavor flavor) {
    Operand o;
    const size_t reuse = s.find(".reuse");
    if (reuse != std::string::npos) s.erase(reuse, 6);
    if (s.find(".H0_H0") != std::string::npos) {
      o.half = 0;
      s.erase(s.find(".H0_H0"), 6);
    } else if (s.find(".H1_H1") != std::string::npos) {
      o.half = 1;
      s.erase(s.find(".H1_H1"), 6);
    }
    s = trimmed(s);
    std::string t = s;
    if ((t[0] == '-' || t[0] == '+') && (t.find("INF") != std::string::npos || t.find("QNAN") != std::string::npos)) {
      const bool negative = t[0] == '-', nan = t.find("QNAN") != std::string::npos;
      const bool is_double = flavor == kDoubleImm || flavor == kUpperWordImm;
      uint32_t v = is_double ? (nan ? 0x7ff80000u : 0x7ff00000u) : (nan ? 0x7fc00000u : 0x7f800000u);
      if (negative) v |= 0x80000000u;
      o.kind = Operand::kImm;
      o.row = flavor == kDoubleImm ? immediate_row(0, v) : immediate_row(v, 0);
      return o;
    }
    if (isdigit(t[0]) || ((t[0] == '-' || t[0] == '+') && isdigit(t[1]))) {
      o.kind = Operand::kImm;
      if (flavor == kIntImm) {
        const int64_t v = std::stoll(t, nullptr, 0);
        o.imm = uint32_t(v);
        o.row = immediate_row(o.imm, v < 0 ? ~0u : uint32_t(uint64_t(v) >> 32));
      } else if (t.find("0x") != std::string::npos) {
        fail("a hexadecimal number is not supported here: %s", t.c_str());
      } else if (flavor == kFloatImm) {
        o.imm = bits<uint32_t>(float(std::strtod(t.c_str(), nullptr)));
        o.row = immediate_row(o.imm, 0);
      } else {
        const uint64_t v = bits<uint64_t>(std::strtod(t.c_str(), nullptr));
        if (uint32_t(v) != 0) fail("the lower word of an immediate double is not 0: %s", t.c_str());
        const uint32_t upper = uint32_t(v >> 32);
        o.row = flavor == kDoubleImm ? immediate_row(0, upper) : immediate_row(upper, 0);
      }
      return o;
    }
    for (;;) {
      if (t[0] == '-') {
        o.neg = true;
      } else if (t[0] == '~') {
        o.inv = true;
      } else {
        break;
      }
      t = t.substr(1);
    }
    if (t[0] == '|') {
      o.abs = true;
      t = t.substr(1, t.size() - 2);
    }
    if (t.compare(0, 2, "c[") == 0) {
      o.kind = Operand::kConst;
      constant(o, t);
      if (o.index >= 0) fail("an indexed constant is not supported as an operand");
      o.row = constant_row(int(o.bank), o.at);
      return o;
    }
    const size_t dot = t.find('.');
    if (dot != std::string::npos) fail("cannot parse %s", t.c_str());
    o.reg = reg_of(t);
    return o;
  }
  static void constant(Operand& o, const std::string& t) {
    const size_t close = t.find(']');
    o.bank = std::stoull(t.substr(2, close - 2), nullptr, 0);
    std::string in = t.substr(close + 2, t.size() - close - 3);
    const size_t plus = in.find('+');
    std::string first = in.substr(0, plus), second = plus == std::string::npos ? "" : in.substr(plus + 1);
    o.at = 0;
    for (const std::string& part : {first, second}) {
      if (part.empty()) continue;
      if (isdigit(part[0]) || part[0] == '-') {
        o.at += uint64_t(std::stoll(part, nullptr, 0));
      } else if (part != "RZ" && part != "URZ") {
        o.index = reg_of(part);
      }
    }
  }
  static void address(Instruction& i, std::string s) {
    if (s.compare(0, 4, "desc") == 0) s = s.substr(s.find("][") + 1);
    s = s.substr(1, s.size() - 2);
    s = trimmed(s);
    for (std::string part : split(s, '+')) {
      if (part.empty()) continue;
      const size_t dot = part.find('.');
      const std::string suffix = dot == std::string::npos ? "" : part.substr(dot);
      part = part.substr(0, dot);
      if (isdigit(part[0]) || part[0] == '-') {
        i.offset += std::stoll(part, nullptr, 0);
      } else if (part[0] == 'U') {
        i.base_u = reg_of(part);
      } else {
        i.base = reg_of(part);
        if (suffix == ".64") i.base64 = true;
        const bool scaled = suffix == ".X4" || suffix == ".X8" || suffix == ".X16";  // shared memory of sm_75
        if (scaled) i.scale = uint32_t(std::stoi(suffix.substr(2)));
        if (suffix != "" && suffix != ".64" && suffix != ".U32" && !scaled)
          fail("cannot parse %s%s", part.c_str(), suffix.c_str());
      }
    }
  }
  uint32_t label(const std::string& s) {
    const size_t b = s.find("`("), e = s.rfind(')');
    const std::string name = s.substr(b + 2, e - b - 2);
    if (!labels.count(name)) fail("no label %s", name.c_str());
    return labels[name];
  }
  static int compare_of(const std::string& s) {
    static const std::map<std::string, int> all = {{"F", 0},    {"LT", 1},   {"EQ", 2},   {"LE", 3},   {"GT", 4},
                                                   {"NE", 5},   {"GE", 6},   {"NUM", 7},  {"NAN", 8},  {"LTU", 9},
                                                   {"EQU", 10}, {"LEU", 11}, {"GTU", 12}, {"NEU", 13}, {"GEU", 14},
                                                   {"T", 15},   {"MIN", 16}, {"MAX", 17}};
    const auto f = all.find(s);
    return f == all.end() ? -1 : f->second;
  }

  void decode(Instruction& i, const std::string& full) {
    std::string s = full;
    if (s[0] == '@') {
      const size_t space = s.find(' ');
      std::string p = s.substr(1, space - 1);
      bool n;
      i.predicate = uint8_t(pred_of(p, &n));
      i.negated = n;
      s = trimmed(s.substr(space));
    }
    const size_t space = s.find(' ');
    std::string op = s.substr(0, space);
    std::vector<std::string> o = space == std::string::npos ? std::vector<std::string>() : split(s.substr(space), ',');
    for (std::string& x : o) {
      const size_t r = x.find(".reuse");
      if (r != std::string::npos) x.erase(r, 6);
    }
    std::vector<std::string> mods = split(op, '.');
    std::string name = mods[0];
    const auto has = [&](const char* m) { return std::find(mods.begin() + 1, mods.end(), m) != mods.end(); };
    i.ftz = has("FTZ");
    if (has("RM")) i.rounding = FE_DOWNWARD;
    if (has("RP")) i.rounding = FE_UPWARD;
    if (has("RZ")) i.rounding = FE_TOWARDZERO;
    if (name[0] == 'U' && name != "ULDC" && name != "UCLEA") {
      i.uniform = true;
      name = name.substr(1);
    }
    if (name == "LDCU") name = "ULDC";
    if (name == "ULDC") {
      i.uniform = true;
      name = "LDC";
    }
    if (name == "S2UR") {
      i.uniform = true;
      name = "S2R";
    }
    if (name == "VOTEU") {
      i.uniform = true;
      name = "VOTE";
    }
    const auto set = [&](void (*run)(Warp&, const Instruction&, uint32_t), Class cls) {
      i.run = run;
      i.cls = i.uniform ? kUniform : cls;
    };
    size_t at = 0;
    const auto next = [&]() -> const std::string& {
      if (at >= o.size()) fail("an operand is missing");
      return o[at++];
    };
    const auto dest = [&] { i.d = dest_of(next()); };
    const auto maybe_dest_pred = [&](int& p) {
      if (at < o.size() && is_pred(o[at])) p = pred_of(o[at++], nullptr);
    };
    const auto src_pred = [&](uint8_t& p, bool& n) { p = uint8_t(pred_of(next(), &n)); };
    const auto none_left = [&] {
      if (at != o.size()) fail("there are too many operands");
    };
    const auto comparison = [&] {
      for (size_t k = 1; k < mods.size(); ++k) {
        const int c = compare_of(mods[k]);
        if (c >= 0) {
          i.cmp = c;
          break;
        }
      }
      i.boolean = has("OR") ? 1 : has("XOR") ? 2 : 0;
      i.is_signed = !has("U32");
    };

    // ---- floating
    if (name == "FADD" || name == "FMUL" || name == "FFMA") {
      set(name == "FADD" ? fadd : name == "FMUL" ? fmul : ffma, kFp32);
      if (has("SAT")) fail("SAT is not supported");
      dest();
      i.a = operand(next(), kFloatImm);
      i.b = operand(next(), kFloatImm);
      if (name == "FFMA") i.c = operand(next(), kFloatImm);
      return none_left();
    }
    if (name == "FMNMX" || name == "FMNMX3" || name == "FSEL") {
      set(name == "FSEL" ? fsel : fmnmx, kAlu);
      i.wide = name == "FMNMX3";
      i.nan = has("NAN");
      dest();
      i.a = operand(next(), kFloatImm);
      i.b = operand(next(), kFloatImm);
      if (i.wide) i.c = operand(next(), kFloatImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "FSETP" || name == "DSETP") {
      set(name == "FSETP" ? fsetp : dsetp, name == "FSETP" ? kAlu : kFp64);
      comparison();
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      const Flavor f = name == "FSETP" ? kFloatImm : kDoubleImm;
      i.a = operand(next(), f);
      i.b = operand(next(), f);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "FSET") {
      set(fset, kAlu);
      if (!has("BF")) fail("FSET without BF is not supported");
      comparison();
      dest();
      i.a = operand(next(), kFloatImm);
      i.b = operand(next(), kFloatImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "FCHK") {
      set(fchk, kAlu);
      i.p1 = pred_of(next(), nullptr);
      i.a = operand(next(), kFloatImm);
      i.b = operand(next(), kFloatImm);
      return none_left();
    }
    if (name == "MUFU") {
      set(mods[1] == "EX2"      ? mufu_ex2
          : mods[1] == "RCP"    ? mufu_rcp
          : mods[1] == "RSQ"    ? mufu_rsq
          : mods[1] == "RCP64H" ? mufu_rcp64h
          : mods[1] == "RSQ64H" ? mufu_rsq64h
                                : nullptr,
          kMufu);
      if (i.run == nullptr) fail("this MUFU is not supported");
      dest();
      i.a = operand(next(), mods[1] == "RCP64H" || mods[1] == "RSQ64H" ? kUpperWordImm : kFloatImm);
      return none_left();
    }
    if (name == "DADD" || name == "DMUL" || name == "DFMA") {
      set(name == "DADD" ? dadd : name == "DMUL" ? dmul : dfma, kFp64);
      dest();
      i.a = operand(next(), kDoubleImm);
      i.b = operand(next(), kDoubleImm);
      if (name == "DFMA") i.c = operand(next(), kDoubleImm);
      return none_left();
    }
    if (name == "HADD2") {
      if (!has("F32")) fail("HADD2 without F32 is not supported");
      set(hadd2_f32, kFp32);
      dest();
      i.a = operand(next(), kFloatImm);
      i.b = operand(next(), kFloatImm);
      return none_left();
    }
    if (name == "HFMA2") {
      // -RZ, RZ, high, low: a move of a constant
      set(mov, kFp32);
      dest();
      if (next() != "-RZ" || next() != "RZ") fail("HFMA2 is supported as a move of a constant only");
      uint16_t half[2];
      for (uint16_t& h : half) {
        const std::string& t = next();
        h = t.find("QNAN") != std::string::npos ? (t[0] == '-' ? 0xffff : 0x7fff)
                                                : to_half(float(std::strtod(t.c_str(), nullptr)));
      }
      i.a.kind = Operand::kImm;
      i.a.row = immediate_row(uint32_t(half[0]) << 16 | half[1], 0);
      return none_left();
    }
    // ---- integers
    const bool wide = has("64") || has("S64") || has("U64");
    if ((name == "IADD" || name == "IADD3") && wide) {
      set(add64, kAlu);
      dest();
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      if ((i.p1 & 7) != 7 && i.p1 != kNoPredicate) fail("a carry is not supported here");
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      if (name == "IADD3") i.c = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "MOV" && wide) {
      set(mov64, kMove);
      dest();
      const std::string& t = next();
      if (isdigit(t[0]) || t[0] == '-') {
        const uint64_t v = t[0] == '-' ? uint64_t(std::stoll(t, nullptr, 0)) : std::stoull(t, nullptr, 0);
        i.a.kind = Operand::kImm;
        i.a.row = immediate_row(uint32_t(v), uint32_t(v >> 32));
      } else {
        i.a = operand(t, kIntImm);
      }
      return none_left();
    }
    if (name == "SEL" && wide) {
      set(sel64, kAlu);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "ISETP" && wide) {
      set(isetp64, kAlu);
      comparison();
      i.is_signed = !has("U64");
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "IMNMX" && wide) {
      set(imnmx64, kAlu);
      i.is_signed = !has("U64");
      int ignored = kNoPredicate;
      maybe_dest_pred(ignored);
      maybe_dest_pred(ignored);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      if (next() != "!PT") fail("expected !PT as the last predicate");
      return none_left();
    }
    if (name == "IADD3") {
      set(iadd3, kAlu);
      i.x = has("X");
      dest();
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      if (i.x) {
        src_pred(i.q1, i.n1);
        if (at < o.size()) {
          src_pred(i.q2, i.n2);
        } else {
          i.q2 = kPT;
          i.n2 = true;
        }
      }
      return none_left();
    }
    if (name == "VIADD" || name == "IADD") {
      set(iadd3, kAlu);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "IABS") {
      set(iabs, kAlu);
      dest();
      i.a = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "IMAD") {
      set(imad, kImad);
      i.wide = has("WIDE");
      i.hi = has("HI");
      i.x = has("X");
      i.is_signed = !has("U32");
      dest();
      maybe_dest_pred(i.p1);
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      if (i.x) src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "IMNMX" || name == "VIMNMX") {
      set(imnmx, kAlu);
      i.is_signed = !has("U32");
      dest();
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      if (i.p1 != kNoPredicate && i.p1 != kPT) fail("a destination predicate is not supported here");
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "VIADDMNMX") {
      set(viaddmnmx, kAlu);
      i.is_signed = !has("U32");
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "ISETP") {
      set(isetp, kAlu);
      comparison();
      i.ex = has("EX");
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      if (i.ex) src_pred(i.q2, i.n2);
      return none_left();
    }
    if (name == "LEA") {
      set(lea, kAlu);
      i.hi = has("HI");
      i.x = has("X");
      i.sx = has("SX32");
      dest();
      maybe_dest_pred(i.p1);
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      if (i.hi && !i.sx) i.c = operand(next(), kIntImm);
      i.lut = uint32_t(std::stoul(next(), nullptr, 0));
      if (i.x) src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "LOP3") {
      set(lop3, kAlu);
      maybe_dest_pred(i.p1);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      i.lut = uint32_t(std::stoul(next(), nullptr, 0));
      src_pred(i.q1, i.n1);
      // the predicate is "not 0, or the predicate operand"; with .PAND it would be "and"
      if (has("PAND")) fail("LOP3 with .PAND is not supported");
      return none_left();
    }
    if (name == "PLOP3") {
      set(plop3, kAlu);
      maybe_dest_pred(i.p1);
      maybe_dest_pred(i.p2);
      src_pred(i.q1, i.n1);
      src_pred(i.q2, i.n2);
      src_pred(i.q3, i.n3);
      i.lut = uint32_t(std::stoul(next(), nullptr, 0));
      i.lut2 = uint32_t(std::stoul(next(), nullptr, 0));
      return none_left();
    }
    if (name == "MOV") {
      set(mov, kMove);
      dest();
      i.a = operand(next(), kIntImm);
      if (at < o.size()) next();  // byte mask, always 0xf
      return none_left();
    }
    if (name == "SEL") {
      set(sel, kAlu);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "SHF") {
      set(shf, kAlu);
      i.left = has("L");
      i.hi = has("HI");
      i.wrap = has("W");
      i.is_signed = has("S32") || has("S64");
      i.size = has("U64") || has("S64") ? 8 : 4;
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "PRMT") {
      set(prmt, kAlu);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "P2R") {
      set(p2r, kAlu);
      dest();
      if (next() != "PR") fail("expected PR");
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "R2P") {
      set(r2p, kAlu);
      if (next() != "PR") fail("expected PR");
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      return none_left();
    }
    // ---- conversions
    if (name == "I2F" || name == "I2FP") {
      set(i2f, name == "I2F" ? kConvert : kAlu);
      i.wide = name == "I2F" && has("F64");
      i.is_signed = !(has("U32") || has("U64") || has("U16") || has("U8"));
      i.size = has("S64") || has("U64") ? 8 : has("S16") || has("U16") ? 2 : has("S8") || has("U8") ? 1 : 4;
      dest();
      i.a = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "F2I") {
      set(f2i, kConvert);
      i.wide = has("F64");
      i.is_signed = !(has("U32") || has("U64"));
      i.size = has("S64") || has("U64") ? 8 : 4;
      if (!has("TRUNC")) fail("F2I without TRUNC is not supported");
      dest();
      i.a = operand(next(), i.wide ? kDoubleImm : kFloatImm);
      return none_left();
    }
    if (name == "F2F") {
      set(mods[1] == "F32"   ? f2f_32_64
          : mods[1] == "F64" ? f2f_64_32
          : mods[1] == "F16" ? f2f_16_32
                             : nullptr,
          kConvert);
      if (i.run == nullptr || mods.size() != 3) fail("this F2F is not supported");
      dest();
      i.a = operand(next(), kFloatImm);
      return none_left();
    }
    if (name == "F2FP") {
      if (op != "F2FP.F16.F32.PACK_AB" && op != "F2FP.PACK_AB") fail("this F2FP is not supported");
      set(f2fp, kAlu);
      dest();
      i.a = operand(next(), kFloatImm);
      i.b = operand(next(), kFloatImm);
      return none_left();
    }
    // ---- moves
    if (name == "S2R") {
      set(s2r, kMove);
      dest();
      const std::string& r = next();
      if (r == "SR_TID.X") {
        i.lut = 0;
      } else if (r == "SR_CTAID.X") {
        i.lut = 1;
      } else if (r == "SR_CgaCtaId") {
        i.lut = 2;
      } else if (r == "SR_LANEID") {
        i.lut = 3;
      } else {
        fail("this special register is not supported");
      }
      return none_left();
    }
    if (name == "CS2R") {
      set(has("32") ? mov : zero64, kMove);
      dest();
      if (next() != "SRZ") fail("this special register is not supported");
      return none_left();
    }
    if (name == "R2UR") {
      set(r2ur, kMove);
      dest();
      i.a = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "VOTE") {
      if (!has("ANY")) fail("this vote is not supported");
      set(vote, kAlu);
      dest();
      maybe_dest_pred(i.p1);
      src_pred(i.q1, i.n1);
      return none_left();
    }
    if (name == "LDC") {
      set(ldc, kConst);
      i.size = has("128") ? 16 : has("64") ? 8 : has("U8") || has("S8") ? 1 : has("U16") || has("S16") ? 2 : 4;
      i.sign_extend = has("S8") || has("S16");
      dest();
      i.a.kind = Operand::kConst;
      constant(i.a, next());
      return none_left();
    }
    if (name == "LDG" || name == "STG" || name == "LDS" || name == "STS") {
      const bool is_load = name[0] == 'L', global = name[2] == 'G';
      set(is_load ? (global ? ldg : lds) : (global ? stg : sts), global ? kGlobal : Class::kShared);
      i.size = has("128") ? 16 : has("64") ? 8 : has("U8") || has("S8") ? 1 : has("U16") || has("S16") ? 2 : 4;
      i.sign_extend = has("S8") || has("S16");
      if (is_load) {
        dest();
        address(i, next());
      } else {
        address(i, next());
        i.b.reg = reg_of(next());
      }
      if (global && i.scale != 1) fail("a scaled address of global memory is not supported");
      if (global && !i.base64 && i.base != kRZ) i.base64 = true;
      return none_left();
    }
    if (name == "ATOMS") {
      const bool increments = has("POPC") && has("INC") && has("32");
      if (!increments && !(has("ADD") && mods.size() == 2)) fail("this ATOMS is not supported");
      set(atoms_add, Class::kShared);
      dest();
      address(i, next());
      if (increments) {
        i.b.kind = Operand::kImm;
        i.b.row = immediate_row(1, 0);
      } else {
        i.b = operand(next(), kIntImm);
      }
      return none_left();
    }
    if (name == "ATOMG") {
      if (!has("INC")) fail("this ATOMG is not supported");
      set(atomg_inc, kGlobal);
      maybe_dest_pred(i.p1);
      dest();
      address(i, next());
      i.base64 = true;
      i.b = operand(next(), kIntImm);
      return none_left();
    }
    if (name == "SHFL") {
      if (!has("BFLY")) fail("this SHFL is not supported");
      set(shfl_bfly, kShuffle);
      maybe_dest_pred(i.p1);
      dest();
      i.a = operand(next(), kIntImm);
      i.b = operand(next(), kIntImm);
      i.c = operand(next(), kIntImm);
      return none_left();
    }
    // ---- control
    if (name == "BRA") {
      i.cls = kBranch;
      i.kind = has("DIV") ? kBraDiv : has("CONV") ? kBraConv : kBra;
      i.q1 = kPT;
      i.a.kind = Operand::kImm;
      i.a.row = immediate_row(~0u, 0);
      while (at + 1 < o.size()) {
        if (is_pred(o[at])) {
          src_pred(i.q1, i.n1);
        } else {
          i.a = operand(next(), kIntImm);
        }
      }
      i.target = label(next());
      return none_left();
    }
    if (name == "EXIT") {
      i.cls = kBranch;
      i.kind = kExit;
      return none_left();
    }
    if (name == "CALL") {
      i.cls = kBranch;
      i.kind = kCall;
      i.target = label(next());
      return none_left();
    }
    if (name == "RET") {
      i.cls = kBranch;
      i.kind = kRet;
      const std::string& r = o[0];
      i.a.reg = reg_of(r.substr(0, r.find(' ')));
      return;
    }
    if (name == "BSSY" || name == "BSYNC" || name == "BREAK") {
      i.cls = kBranch;
      i.kind = name == "BSSY" ? kBssy : name == "BSYNC" ? kBsync : kBreak;
      i.q1 = kPT;
      if (is_pred(o[at])) src_pred(i.q1, i.n1);
      const std::string& b = next();
      if (b[0] != 'B') fail("this barrier is not supported");
      i.barrier = std::stoi(b.substr(1));
      if (name == "BSSY") i.target = label(next());
      return none_left();
    }
    if (name == "BMOV") {
      // BMOV.32.CLEAR RZ, B0
      i.cls = kBranch;
      if (o[0] != "RZ") fail("BMOV to a register is not supported");
      i.kind = kBreak;
      i.q1 = kPT;
      i.barrier = std::stoi(o[1].substr(1));
      return;
    }
    if (name == "BAR") {
      if (o.size() != 1 || o[0] != "0x0" || !has("SYNC")) fail("this barrier is not supported");
      i.cls = kBarrier;
      i.kind = kBar;
      return;
    }
    if (name == "WARPSYNC") {
      i.cls = kBarrier;
      i.kind = has("COLLECTIVE") ? kCollective : kWarpsync;
      i.a.kind = Operand::kImm;
      i.a.row = immediate_row(~0u, 0);
      if (!has("ALL")) i.a = operand(next(), kIntImm);
      if (has("COLLECTIVE")) i.target = label(next());
      return none_left();
    }
    if (name == "ENDCOLLECTIVE") {
      i.cls = kBarrier;
      i.kind = kEndCollective;
      return;
    }
    if (name == "YIELD") {
      i.cls = kBranch;
      i.kind = kYield_;
      return;
    }
    if (name == "BPT") {
      set(trap, kOther);
      return;
    }
    if (name == "NOP" || name == "MEMBAR" || name == "ERRBAR" || name == "CGAERRBAR" || name == "CCTL" ||
        name == "DEPBAR") {
      set(nothing, name == "NOP" ? kOther : kBarrier);
      return;
    }
    fail("this instruction is not supported");
  }
};

class SassDevice : public Device {
 public:
  explicit SassDevice(const std::string& text) {
    std::istringstream lines(text);
    std::string line;
    Section* section = nullptr;
    std::string data_name;
    std::vector<uint8_t>* data = nullptr;
    while (std::getline(lines, line)) {
      std::string s = trimmed(line);
      if (s.compare(0, 7, ".target") == 0 || s.compare(0, 11, ".headerflag") == 0) {
        const size_t k = s.find("sm_");
        if (k != std::string::npos) architecture_ = std::stoi(s.substr(k + 3));
      }
      if (s.compare(0, 9, ".section\t") == 0 || s.compare(0, 9, ".section ") == 0) {
        const size_t b = s.find('.', 8), e = s.find(',', b);
        section = nullptr;
        data = nullptr;
        if (b == std::string::npos) continue;
        const std::string name = s.substr(b, e - b);
        if (name.compare(0, 6, ".text.") == 0) {
          section = &sections_[name.substr(6)];
          section->program.name = name.substr(6);
        } else if (name.compare(0, 13, ".nv.constant2") == 0) {
          data = &sections_[name.substr(14)].program.banks[2];
        }
        continue;
      }
      if (data != nullptr) {
        if (s.compare(0, 2, "/*") == 0) read_data(trimmed(s.substr(s.find("*/") + 2)), *data);
        continue;
      }
      if (section == nullptr) continue;
      if (s.compare(0, 2, "/*") == 0) {
        const size_t close = s.find("*/");
        const uint64_t address = std::stoull(s.substr(2, close - 2), nullptr, 16);
        std::string rest = s.substr(close + 2);
        const size_t semicolon = rest.find(';');
        section->add(address, trimmed(rest.substr(0, semicolon)));
      } else if (!s.empty() && s.back() == ':') {
        section->labels[s.substr(0, s.size() - 1)] = static_cast<uint32_t>(section->program.code.size());
      }
    }
  }

  void profile(const char* path) override {
    FILE* file = fopen(path, "w");
    for (const auto& s : sections_) {
      const Program& p = s.second.program;
      for (size_t k = 0; k < p.issued.size(); ++k)
        fprintf(file, "%s %05zx %lu %d %s\n", s.first.c_str(), k * 16, p.issued[k], p.code[k].cls, p.text[k].c_str());
      p.issued.assign(p.issued.size(), 0);
    }
    fclose(file);
  }

  void run(const std::string& name, const Launch& launch) override {
    if (!sections_.count(name)) fail("no kernel %s", name.c_str());
    sections_.at(name).finish();
    const Program& program = sections_.at(name).program;
    counts.blocks += launch.blocks;
    counts.threads += uint64_t(launch.blocks) * launch.threads;
    const size_t base = architecture_ >= 100 ? 0x380 : architecture_ >= 90 ? 0x210 : 0x160;
    std::vector<uint8_t> constants(base + launch.parameters.size(), 0);
    const auto put = [&](size_t at, uint32_t v) { memcpy(constants.data() + at, &v, 4); };
    put(0, launch.threads), put(4, 1), put(8, 1);
    put(12, launch.blocks), put(16, 1), put(20, 1);
    if (architecture_ >= 100)
      put(0x360, launch.threads), put(0x364, 1), put(0x368, 1), put(0x370, launch.blocks), put(0x374, 1), put(0x378, 1);
    memcpy(constants.data() + base, launch.parameters.data(), launch.parameters.size());

    program.issued.resize(program.code.size());
    std::vector<std::unique_ptr<Block>> resident, spare;
    std::vector<uint32_t> order(launch.blocks);
    for (uint32_t b = 0; b < launch.blocks; ++b) order[b] = b;
    if (options.policy != 0) std::shuffle(order.begin(), order.end(), generator);
    uint32_t next = 0;
    while (next < launch.blocks || !resident.empty()) {
      while (next < launch.blocks && resident.size() < static_cast<size_t>(options.resident)) {
        std::unique_ptr<Block> b;
        if (!spare.empty()) {
          b = std::move(spare.back());
          spare.pop_back();
        } else {
          b = std::make_unique<Block>();
        }
        start(*b, program, launch, order[next++], constants);
        resident.push_back(std::move(b));
      }
      const size_t which = options.policy == 0 ? 0 : generator() % resident.size();
      step(*resident[which], program);
      if (resident[which]->done) {
        spare.push_back(std::move(resident[which]));
        resident.erase(resident.begin() + static_cast<long>(which));
      }
    }
  }

 private:
  std::map<std::string, Section> sections_;
  int architecture_ = 0;

  static void read_data(const std::string& s, std::vector<uint8_t>& data) {
    // .byte 0x00, ... or .word, .dword
    std::istringstream words(s);
    std::string kind;
    words >> kind;
    std::string rest;
    std::getline(words, rest);
    const int size = kind == ".byte" ? 1 : kind == ".short" ? 2 : kind == ".word" ? 4 : kind == ".dword" ? 8 : 0;
    if (size == 0) return;
    for (const std::string& w : split(rest, ',')) {
      const uint64_t v = std::stoull(w, nullptr, 0);
      for (int k = 0; k < size; ++k) data.push_back(uint8_t(v >> (8 * k)));
    }
  }

  void start(Block& b, const Program& p, const Launch& launch, uint32_t index, const std::vector<uint8_t>& constants) {
    b.index = index;
    b.size = launch.threads;
    b.count = launch.blocks;
    b.constants = constants.data();
    b.constant_bytes = constants.size();
    b.program = &p;
    b.done = false;
    const int n = static_cast<int>((launch.threads + 31) / 32);
    b.shared.reset(size_t(architecture_ >= 90 ? 1024 : 0) + 48 * 1024, n);
    b.warps.resize(static_cast<size_t>(n));
    for (int k = 0; k < n; ++k) {
      Warp& w = b.warps[static_cast<size_t>(k)];
      w.block = &b;
      w.index = k;
      w.issued = 0;
      if (w.R.size() != size_t(p.rows) * 32) w.R.assign(size_t(p.rows) * 32, 0);
      std::fill_n(w.r(0), 32 * kRows, 0x7fb7beefu);
      std::fill_n(w.r(kRZ), 32, 0);
      std::fill_n(w.r(kURZ), 32, 0);
      for (const auto& c : p.immediates) std::fill_n(w.r(c.first), 32, c.second);
      for (const auto& c : p.constants) {
        uint32_t v = 0;
        if (c.second.first == 0) {
          if (c.second.second + 4 <= constants.size()) memcpy(&v, constants.data() + c.second.second, 4);
        } else {
          const auto& bank = p.banks.at(uint64_t(c.second.first));
          if (c.second.second + 4 <= bank.size()) memcpy(&v, bank.data() + c.second.second, 4);
        }
        std::fill_n(w.r(c.first), 32, v);
      }
      for (uint32_t& x : w.P) x = 0x5a5a5a5au;
      w.P[kPT] = w.P[kUPT] = ~0u;
      for (uint32_t& x : w.B) x = 0;
      const uint32_t live = std::min<uint32_t>(32, launch.threads - uint32_t(k) * 32);
      w.alive = live == 32 ? ~0u : (1u << live) - 1;
      w.at_block = w.at_warp = w.at_conv = 0;
      w.groups = 1;
      w.current = -1;
      for (int l = 0; l < 32; ++l) w.pc[l] = 0, w.group[l] = 0;
    }
  }

  static void step(Block& b, const Program& p) {
    bool any = false, alive = false;
    const size_t n = b.warps.size();
    const size_t first = options.policy == 0 ? 0 : generator() % n;
    for (size_t j = 0; j < n; ++j) {
      Warp& w = b.warps[(first + j) % n];
      if (w.alive == 0) continue;
      alive = true;
      any |= run_warp(w, p, options.policy == 0 ? 1 << 30 : 1 + static_cast<int>(generator() % 200));
    }
    if (!alive) {
      b.done = true;
      return;
    }
    bool all = true, somebody = false;
    for (Warp& w : b.warps) {
      all &= w.at_block == w.alive;
      somebody |= w.at_block != 0;
    }
    if (all && somebody) {
      for (Warp& w : b.warps) {
        for_lanes(w.at_block, [&](int l) { ++w.pc[l]; });
        w.at_block = 0;
      }
      ++b.shared.block_epoch;
      return;
    }
    bool left = false;
    for (Warp& w : b.warps) left |= w.alive != 0;
    if (!left) {
      b.done = true;
      return;
    }
    if (!any) {
      std::string where;
      for (Warp& w : b.warps)
        if (w.alive != 0) {
          char t[200];
          const uint32_t other = w.alive & ~w.at_block;
          snprintf(
              t, sizeof t, " w%d: %#x bar %#x ws %#x bs %#x pc %u %u;", w.index, w.alive, w.at_block, w.at_warp,
              w.at_conv, w.pc[__builtin_ctz(w.alive)], other ? w.pc[__builtin_ctz(other)] : 0);
          where += t;
          if (w.at_conv == w.alive) {
            std::set<std::pair<uint32_t, int>> seen;
            for_lanes(w.alive, [&](int l) {
              if (!seen.insert({w.pc[l], w.conv[l]}).second) return;
              uint32_t same = 0;
              for_lanes(w.alive, [&](int k) { same |= uint32_t(w.pc[k] == w.pc[l] && w.conv[k] == w.conv[l]) << k; });
              snprintf(t, sizeof t, " [pc %u: %#x for B%d of %#x]", w.pc[l], same, w.conv[l], w.B[w.conv[l]]);
              where += t;
            });
          }
        }
      fail("deadlock in block %u:%s", b.index, where.c_str());
    }
  }

  static bool release(Warp& w, const Program& p) {
    bool any = false;
    for (int x = 0; x < 16; ++x) {
      uint32_t here = 0;
      for_lanes(w.at_conv, [&](int l) { here |= uint32_t(w.conv[l] == x) << l; });
      // Lanes wait for those that meet at the same place.
      uint32_t late = 0;
      for_lanes(w.B[x] & w.alive & ~here, [&](int missing) {
        for_lanes(here, [&](int l) { late |= uint32_t(w.meeting[x][l] == w.meeting[x][missing]) << l; });
      });
      here &= ~late;
      if (here == 0) continue;
      // Lanes that wait at the same instruction continue as one group.
      std::map<uint32_t, int> places;
      for_lanes(here, [&](int l) {
        if (!places.count(w.pc[l])) places[w.pc[l]] = w.groups++;
        w.group[l] = places[w.pc[l]];
        ++w.pc[l];
      });
      w.at_conv &= ~here;
      w.B[x] &= ~here;
      any = true;
    }
    uint32_t left = w.at_warp;
    while (left != 0) {
      const int l0 = __builtin_ctz(left);
      uint32_t same = 0;
      for_lanes(w.at_warp, [&](int l) { same |= uint32_t(w.pc[l] == w.pc[l0]) << l; });
      left &= ~same;
      const Instruction& i = p.code[w.pc[l0]];
      const uint32_t members = row(w, i.a)[l0] & w.alive;
      if ((members & ~w.at_warp) != 0) continue;
      if ((members & ~same) != 0)
        fail("lanes of a warp wait at different instructions: pc %u, lanes %#x of %#x", w.pc[l0], same, members);
      const int g = w.groups++;
      for_lanes(members, [&](int l) {
        ++w.pc[l];
        w.group[l] = g;
      });
      if (i.kind == kCollective) w.collective_target = i.target;
      if (members == w.alive) ++w.block->shared.warp_epoch[w.index];
      w.at_warp &= ~members;
      any = true;
    }
    return any;
  }

  static bool run_warp(Warp& w, const Program& p, int budget) {
    bool any = false;
    const Instruction* code = p.code.data();
    int avoid = -1;
    for (;;) {
      const uint32_t ready = w.alive & ~w.at_block & ~w.at_warp & ~w.at_conv;
      if (ready == 0) {
        if (!release(w, p)) return any;
        any = true;
        continue;
      }
      if (budget <= 0) return any;
      int l0 = __builtin_ctz(ready);
      if (options.policy == 1) l0 = 31 - __builtin_clz(ready);
      if (options.policy == 2) {
        int n = static_cast<int>(generator() % static_cast<unsigned>(__builtin_popcount(ready)));
        uint32_t m = ready;
        while (n-- > 0) m &= m - 1;
        l0 = __builtin_ctz(m);
      }
      for_lanes(ready, [&](int l) {
        if (w.group[l] == w.current) l0 = l;
      });
      if (w.group[l0] == avoid) {
        for_lanes(ready, [&](int l) {
          if (w.group[l] != avoid) l0 = l;
        });
      }
      avoid = -1;
      w.current = -1;
      uint32_t group = 0;
      for_lanes(ready, [&](int l) { group |= uint32_t(w.group[l] == w.group[l0]) << l; });
      uint32_t pc = w.pc[l0];
      any = true;
      const uint32_t size = static_cast<uint32_t>(__builtin_popcount(group));
      for (bool going = true; going;) {
        if (pc >= p.code.size()) fail("pc %u is outside of the code", pc);
        const Instruction& i = code[pc];
        uint32_t m = group & pred(w, i.predicate, i.negated);
        ++counts.warp_instructions;
        longest_warp = std::max(longest_warp, ++w.issued);
        ++p.issued[pc];
        counts.lane_instructions += size;
        ++counts.by_class[i.cls];
        counts.lanes_by_class[i.cls] += static_cast<uint32_t>(__builtin_popcount(m));
        --budget;
        const auto leave = [&] { for_lanes(group, [&](int l) { w.pc[l] = pc; }); };
        switch (i.kind) {
          case kSimple:
            if (i.uniform) {
              // A uniform instruction runs once per warp.
              if (m != 0) i.run(w, i, i.run == vote ? m : ~0u);
            } else if (m != 0) {
              i.run(w, i, m);
            }
            ++pc;
            if (budget <= 0) {
              leave();
              w.current = w.group[l0];
              going = false;
            }
            break;
          case kBra:
          case kBraDiv:
          case kBraConv: {
            ++counts.branches;
            if (i.kind == kBra) {
              m &= pred(w, i.q1, i.n1);
            } else {
              const uint32_t mask = as_int(i.a, row(w, i.a)[l0]) & w.alive;
              if ((mask != group) != (i.kind == kBraDiv)) m = 0;
              // __syncwarp() of converged lanes compiles to a branch around a NOP, which counts as a warp barrier here.
              // sm_75, sm_80: a taken BRA.CONV to a NOP; later: a BRA.DIV before a NOP, not taken.
              const Instruction& then = code[i.kind == kBraDiv ? pc + 1 : i.target];
              if ((m == 0) == (i.kind == kBraDiv) && then.run == nothing && then.cls == kOther)
                ++w.block->shared.warp_epoch[w.index];
            }
            if (m == group) {
              pc = i.target;
            } else if (m == 0) {
              ++pc;
            } else {
              ++counts.divergent;
              const int g1 = w.groups++, g2 = w.groups++;
              for_lanes(group, [&](int l) {
                w.pc[l] = m >> l & 1 ? i.target : pc + 1;
                w.group[l] = m >> l & 1 ? g1 : g2;
              });
              going = false;
            }
            if (going && budget <= 0) {
              leave();
              w.current = w.group[l0];
              going = false;
            }
            break;
          }
          case kExit:
            w.alive &= ~m;
            if (m == group) {
              going = false;
            } else {
              if (m != 0) {  // the remaining lanes continue
                group &= ~m;
              }
              ++pc;
            }
            if (going) {
              leave();
              going = false;
              const int g = w.groups++;
              for_lanes(group, [&](int l) { w.group[l] = g; });
            }
            break;
          case kCall:
          case kRet: {
            if (m == 0) {
              ++pc;
              break;
            }
            const uint32_t* r = row(w, i.a);
            std::map<uint32_t, int> targets;
            for_lanes(group, [&](int l) {
              const uint32_t to = !(m >> l & 1) ? pc + 1 : i.kind == kCall ? i.target : r[l] / 16;
              if (!targets.count(to)) targets[to] = w.groups++;
              w.pc[l] = to;
              w.group[l] = targets[to];
            });
            going = false;
            break;
          }
          case kBssy:
            if (m == group) {
              // |=: lanes of another group may be in it, for another place
              w.B[i.barrier] |= group;
              for_lanes(group, [&](int l) { w.meeting[i.barrier][l] = i.target; });
            } else if (m != 0)
              fail("the predicate of a BSSY is false in some lanes");
            ++pc;
            break;
          case kBsync:
            m &= pred(w, i.q1, i.n1);
            if (m != group) fail("the predicate of a BSYNC is false in some lanes");
            leave();
            for_lanes(group, [&](int l) { w.conv[l] = i.barrier; });
            w.at_conv |= group;
            release(w, p);
            going = false;
            break;
          case kBreak:
            m &= pred(w, i.q1, i.n1);
            w.B[i.barrier] &= ~m;
            ++pc;
            break;
          case kBar:
            if (m == 0) {
              ++pc;
              break;
            }
            if (m != group) fail("the predicate of a barrier is false in some lanes");
            leave();
            w.at_block |= group;
            going = false;
            break;
          case kWarpsync:
          case kCollective:
            if (m == 0) {
              ++pc;
              break;
            }
            if (m != group) fail("the predicate of a barrier is false in some lanes");
            leave();
            w.at_warp |= group;
            release(w, p);
            going = false;
            break;
          case kEndCollective:
            pc = w.collective_target;
            break;
          case kYield_:
            ++pc;
            leave();
            avoid = w.group[l0];
            going = false;
            break;
        }
      }
    }
  }
};

}  // namespace sass

std::unique_ptr<Device> load_sass(const std::string& text) { return std::make_unique<sass::SassDevice>(text); }

}  // namespace device_code
