// Interpreter of PTX: it executes the kernels of csrc/cuda, with a program counter for each of the 32 lanes of a warp.
#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <sstream>
#include <unordered_map>

#include "common.h"

namespace device_code {
namespace ptx {

constexpr uint32_t kFull = ~0u;

enum Kind : uint8_t {
  kSimple,
  kJump,
  kReturn,
  kCall,
  kShuffle_,
  kBallot,
  kWarpSync,
  kBlockSync
};

struct Warp;
struct Instruction {
  void (*run)(Warp&, const Instruction&, uint32_t mask) = nullptr;
  Kind kind = kSimple;
  uint8_t cls = kOther;
  int16_t size = 0;  // bytes of an element in memory
  int32_t predicate = -1;
  bool negated = false;  // the predicate
  bool negated_source = false;  // the predicate that is voted on
  uint8_t vector = 1;
  uint8_t space = 0;  // 'g' global, 's' shared, 'p' parameter
  int32_t d = -1, d2 = -1, a = -1, b = -1, c = -1, e = -1;
  int32_t v[4] = {-1, -1, -1, -1};  // vector operands, or parameter registers of a call
  int64_t offset = 0;
  uint32_t target = 0;
  int32_t function = -1;
};

struct Function {
  std::string name;
  uint32_t begin = 0;
  int32_t result = -1;
  std::vector<int32_t> parameters;
};

// A kernel and the functions that it calls.
struct Program {
  std::vector<Instruction> code;
  std::vector<std::string> text;
  std::vector<Function> functions;
  int registers = 0, predicates = 0;
  std::vector<std::pair<int, uint64_t>> constants;  // register, value
  size_t shared = 0;
  std::string maxnreg;
};

struct Block;
struct Warp {
  Block* block;
  int index;
  std::vector<uint64_t> R;
  std::vector<uint32_t> P;
  uint32_t pc[32];
  uint8_t depth[32];
  uint32_t back[32][4];
  uint32_t alive, at_block, at_warp;  // lanes that have not exited; lanes that wait at a barrier
  uint64_t* r(int i) { return R.data() + size_t(i) * 32; }
};
struct Block {
  uint32_t index, size, count;
  const uint8_t* parameters;
  SharedMemory shared;
  std::vector<Warp> warps;
  bool done = false;
  std::vector<uint8_t> finished;
};

template <class T>
T get(Warp& w, int reg, int l) {
  T v;
  memcpy(&v, w.r(reg) + l, sizeof v);
  return v;
}
template <class T>
void put(Warp& w, int reg, int l, T v) {
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  w.r(reg)[l] = u;
}

using Run = void (*)(Warp&, const Instruction&, uint32_t);
struct Entry {
  Run run;
  Class cls;
};
std::unordered_map<std::string, Entry>& table() {
  static std::unordered_map<std::string, Entry> t;
  return t;
}

template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}
template <class To, class From>
To to_integer(From x) {
  if (std::isnan(x)) return sizeof(From) == 8 || sizeof(To) == 8 ? To(uint64_t(1) << (8 * sizeof(To) - 1)) : To(0);
  const double low = static_cast<double>(std::numeric_limits<To>::min()),
               high = static_cast<double>(std::numeric_limits<To>::max());
  const double t = std::trunc(static_cast<double>(x));
  if (t <= low) return std::numeric_limits<To>::min();
  if (t >= high) return std::numeric_limits<To>::max();
  return static_cast<To>(t);
}
float from_half(uint16_t h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return static_cast<float>(v);
}
uint16_t to_half(float f) {
  const _Float16 v = static_cast<_Float16>(f);
  uint16_t h;
  memcpy(&h, &v, 2);
  if (std::isnan(f)) h = 0x7fff;
  return h;
}

struct Slot {
  std::string name;
  Class cls;
  void operator=(Run run) { table()[name] = Entry{run, cls}; }
};
#define DEF(name, cls) Slot{name, cls} = [](Warp& w, const Instruction& i, uint32_t m) { (void)w, (void)i, (void)m;
#define END \
  }         \
  ;
#define BIN(name, T, cls, expression)                     \
  DEF(name, cls)                                          \
  for_lanes(m, [&](int l) {                               \
    const T x = get<T>(w, i.a, l), y = get<T>(w, i.b, l); \
    put<T>(w, i.d, l, static_cast<T>(expression));        \
  });                                                     \
  END
#define UN(name, T, F, cls, expression)            \
  DEF(name, cls)                                   \
  for_lanes(m, [&](int l) {                        \
    const F x = get<F>(w, i.a, l);                 \
    put<T>(w, i.d, l, static_cast<T>(expression)); \
  });                                              \
  END
#define TRI(name, T, A, C, cls, expression)               \
  DEF(name, cls)                                          \
  for_lanes(m, [&](int l) {                               \
    const A x = get<A>(w, i.a, l), y = get<A>(w, i.b, l); \
    const C z = get<C>(w, i.c, l);                        \
    put<T>(w, i.d, l, static_cast<T>(expression));        \
  });                                                     \
  END
#define COMPARE(name, T, expression)                      \
  DEF(name, kAlu) uint32_t r = 0;                         \
  for_lanes(m, [&](int l) {                               \
    const T x = get<T>(w, i.a, l), y = get<T>(w, i.b, l); \
    r |= static_cast<uint32_t>(expression) << l;          \
  });                                                     \
  w.P[i.d] = (w.P[i.d] & ~m) | (r & m);                   \
  END

template <class T>
struct Shared {};

void load(Warp& w, const Instruction& i, uint32_t m);
void store(Warp& w, const Instruction& i, uint32_t m);

template <class T>
void integer(const std::string& t, bool is_signed) {
  using U = std::make_unsigned_t<T>;
  (void)is_signed;
  BIN("add." + t, T, kImad, U(x) + U(y))
  BIN("sub." + t, T, kImad, U(x) - U(y))
  BIN("mul.lo." + t, T, kImad, uint64_t(x) * uint64_t(y))
  if constexpr (sizeof(T) <= 4) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    BIN("mul.hi." + t, T, kImad, Wide(x) * Wide(y) >> 8 * sizeof(T))
  }
  TRI("mad.lo." + t, T, T, T, kImad, uint64_t(x) * uint64_t(y) + uint64_t(z))
  BIN("div." + t, T, kImad, y == 0 ? T(-1) : T(-1) < 0 && y == T(-1) ? T(U(0) - U(x)) : T(x / y))
  BIN("rem." + t, T, kImad, y == 0 ? x : T(-1) < 0 && y == T(-1) ? T(0) : T(x % y))
  BIN("min." + t, T, kImad, minimum(x, y))
  BIN("max." + t, T, kImad, maximum(x, y))
  UN("neg." + t, T, T, kImad, U(0) - U(x))
  UN("abs." + t, T, T, kImad, x < 0 ? U(0) - U(x) : x)
  constexpr int n = 8 * sizeof(T);
  DEF("shr." + t, kImad)
  for_lanes(m, [&](int l) {
    const T x = get<T>(w, i.a, l);
    const uint32_t s = get<uint32_t>(w, i.b, l);
    put<T>(w, i.d, l, s >= n ? (x < 0 ? T(-1) : T(0)) : T(x >> s));
  });
  END for (const std::string& s : {t}) {
    COMPARE("setp.eq." + s, T, x == y)
    COMPARE("setp.ne." + s, T, x != y)
    COMPARE("setp.lt." + s, T, x < y)
    COMPARE("setp.le." + s, T, x <= y)
    COMPARE("setp.gt." + s, T, x > y)
    COMPARE("setp.ge." + s, T, x >= y)
  }
}
template <class U>
void untyped(const std::string& t) {
  BIN("and." + t, U, kImad, x & y)
  BIN("or." + t, U, kImad, x | y)
  BIN("xor." + t, U, kImad, x ^ y)
  UN("not." + t, U, U, kImad, ~x)
  DEF("shl." + t, kImad)
  for_lanes(m, [&](int l) {
    const U x = get<U>(w, i.a, l);
    const uint32_t s = get<uint32_t>(w, i.b, l);
    put<U>(w, i.d, l, s >= 8 * sizeof(U) ? U(0) : U(x << s));
  });
  END COMPARE("setp.eq." + t, U, x == y) COMPARE("setp.ne." + t, U, x != y)
}
template <class T>
void floating(const std::string& t, Class cls) {
  BIN("add." + t, T, cls, x + y)
  BIN("add.rn." + t, T, cls, x + y)
  BIN("sub." + t, T, cls, x - y)
  BIN("mul." + t, T, cls, x * y)
  BIN("mul.rn." + t, T, cls, x * y)
  TRI("fma.rn." + t, T, T, T, cls, std::fma(x, y, z))
  BIN("div.rn." + t, T, cls, x / y)
  UN("rcp.rn." + t, T, T, cls, T(1) / x)
  UN("sqrt.rn." + t, T, T, cls, std::sqrt(x))
  UN("neg." + t, T, T, cls, -x)
  UN("abs." + t, T, T, cls, std::fabs(x))
  BIN("min." + t, T, cls, minimum(x, y))
  BIN("max." + t, T, cls, maximum(x, y))
  BIN("max.NaN." + t, T, cls, std::isnan(x) || std::isnan(y) ? T(NAN) : maximum(x, y))
  COMPARE("setp.eq." + t, T, x == y)
  COMPARE("setp.ne." + t, T, x < y || x > y)
  COMPARE("setp.lt." + t, T, x < y)
  COMPARE("setp.le." + t, T, x <= y)
  COMPARE("setp.gt." + t, T, x > y)
  COMPARE("setp.ge." + t, T, x >= y)
  COMPARE("setp.equ." + t, T, !(x < y || x > y))
  COMPARE("setp.neu." + t, T, !(x == y))
  COMPARE("setp.ltu." + t, T, !(x >= y))
  COMPARE("setp.leu." + t, T, !(x > y))
  COMPARE("setp.gtu." + t, T, !(x <= y))
  COMPARE("setp.geu." + t, T, !(x < y))
  COMPARE("setp.nan." + t, T, std::isnan(x) || std::isnan(y))
  COMPARE("setp.num." + t, T, !std::isnan(x) && !std::isnan(y))
}
template <class U>
void moves(const std::string& t) {
  UN("mov." + t, U, U, kMove, x)
  DEF("selp." + t, kMove) const uint32_t p = w.P[i.c];
  for_lanes(m, [&](int l) { put<U>(w, i.d, l, get<U>(w, p >> l & 1 ? i.a : i.b, l)); });
  END
}
template <class To, class From>
void convert(const std::string& name) {
  UN(name, To, From, kConvert, x)
}
void fill_table() {
  integer<int16_t>("s16", true);
  integer<uint16_t>("u16", false);
  integer<int32_t>("s32", true);
  integer<uint32_t>("u32", false);
  integer<int64_t>("s64", true);
  integer<uint64_t>("u64", false);
  untyped<uint16_t>("b16");
  untyped<uint32_t>("b32");
  untyped<uint64_t>("b64");
  floating<float>("f32", kFp32);
  floating<double>("f64", kFp64);
  for (const char* t : {"u16", "s16", "b16"}) moves<uint16_t>(t);
  for (const char* t : {"u32", "s32", "b32", "f32"}) moves<uint32_t>(t);
  for (const char* t : {"u64", "s64", "b64", "f64"}) moves<uint64_t>(t);
  TRI("bfe.u32", uint32_t, uint32_t, uint32_t, kAlu,
      (y & 255) > 31 ? 0 : (x >> (y & 255)) & ((z & 255) > 31 ? ~0u : (1u << (z & 255)) - 1))
  DEF("mul.wide.s32", kImad)
  for_lanes(m, [&](int l) { put<int64_t>(w, i.d, l, int64_t(get<int32_t>(w, i.a, l)) * get<int32_t>(w, i.b, l)); });
  END DEF("mul.wide.u32", kImad) for_lanes(
      m, [&](int l) { put<uint64_t>(w, i.d, l, uint64_t(get<uint32_t>(w, i.a, l)) * get<uint32_t>(w, i.b, l)); });
  END UN("ex2.approx.ftz.f32", float, float, kMufu, ex2_approx(x))
      UN("rcp.approx.ftz.f32", float, float, kMufu, rcp_approx(x)) DEF("rcp.approx.ftz.f64", kMufu)
          for_lanes(m, [&](int l) {
            // Works on the upper word of a double; the lower one is 0.
            const double x = bits<double>(get<uint64_t>(w, i.a, l) & 0xffffffff00000000u);
            double y = 1.0 / x;
            if (std::fabs(y) < 2.2250738585072014e-308) y = std::copysign(0.0, y);
            put<uint64_t>(w, i.d, l, bits<uint64_t>(y) & 0xffffffff00000000u);
          });
  END UN("cvt.f64.f32", double, float, kConvert, x) UN("cvt.rn.f32.f64", float, double, kConvert, x)
      UN("cvt.f32.f16", float, uint16_t, kConvert, from_half(x))
          UN("cvt.rn.f16.f32", uint16_t, float, kConvert, to_half(x)) UN("cvt.rn.f64.s64", double, int64_t, kConvert, x)
              UN("cvt.rn.f64.u64", double, uint64_t, kConvert, x) UN("cvt.rn.f64.s32", double, int32_t, kConvert, x) UN(
                  "cvt.rn.f64.s16", double, int16_t, kConvert, x) UN("cvt.rn.f32.s32", float, int32_t, kConvert, x)
                  UN("cvt.rn.f32.s64", float, int64_t, kConvert, x) UN("cvt.rn.f32.s16", float, int16_t, kConvert, x)
                      UN("cvt.rn.f32.u32", float, uint32_t, kConvert, x)
                          UN("cvt.rzi.s32.f64", int32_t, double, kConvert, (to_integer<int32_t, double>(x)))
                              UN("cvt.rzi.s64.f64", int64_t, double, kConvert, (to_integer<int64_t, double>(x)))
                                  UN("cvt.rzi.s32.f32", int32_t, float, kConvert, (to_integer<int32_t, float>(x)))
                                      UN("cvt.s64.s32", int64_t, int32_t, kConvert, x)
                                          UN("cvt.u64.u32", uint64_t, uint32_t, kConvert, x)
                                              UN("cvt.u64.u16", uint64_t, uint16_t, kConvert, x)
                                                  UN("cvt.u32.u64", uint32_t, uint64_t, kConvert, x)
                                                      UN("cvt.u32.u16", uint32_t, uint16_t, kConvert, x)
                                                          UN("cvt.u16.u32", uint16_t, uint32_t, kConvert, x)
                                                              UN("cvt.s16.s8", int16_t, int8_t, kConvert, x)
                                                                  UN("cvta.to.global.u64", uint64_t, uint64_t, kMove, x)
      // predicate logic
      DEF("and.pred", kAlu) w.P[i.d] = (w.P[i.d] & ~m) | (w.P[i.a] & w.P[i.b] & m);
  END DEF("or.pred", kAlu) w.P[i.d] = (w.P[i.d] & ~m) | ((w.P[i.a] | w.P[i.b]) & m);
  END DEF("xor.pred", kAlu) w.P[i.d] = (w.P[i.d] & ~m) | ((w.P[i.a] ^ w.P[i.b]) & m);
  END DEF("not.pred", kAlu) w.P[i.d] = (w.P[i.d] & ~m) | (~w.P[i.a] & m);
  END DEF("mov.pred", kAlu) w.P[i.d] = (w.P[i.d] & ~m) | (w.P[i.a] & m);
  END
      // packing and unpacking of pairs
      DEF("pack", kMove) for_lanes(m, [&](int l) {
        put<uint64_t>(w, i.d, l, get<uint32_t>(w, i.v[0], l) | uint64_t(get<uint32_t>(w, i.v[1], l)) << 32);
      });
  END DEF("unpack", kMove) for_lanes(m, [&](int l) {
    const uint64_t x = get<uint64_t>(w, i.a, l);
    put<uint32_t>(w, i.v[0], l, uint32_t(x));
    put<uint32_t>(w, i.v[1], l, uint32_t(x >> 32));
  });
  END DEF("pack32", kMove) for_lanes(m, [&](int l) {
    put<uint32_t>(w, i.d, l, get<uint16_t>(w, i.v[0], l) | uint32_t(get<uint16_t>(w, i.v[1], l)) << 16);
  });
  END DEF("unpack32", kMove) for_lanes(m, [&](int l) {
    const uint32_t x = get<uint32_t>(w, i.a, l);
    put<uint16_t>(w, i.v[0], l, uint16_t(x));
    put<uint16_t>(w, i.v[1], l, uint16_t(x >> 16));
  });
  END DEF("bfi.b64", kAlu) for_lanes(m, [&](int l) {
    const uint32_t at = get<uint32_t>(w, i.c, l) & 255, length = get<uint32_t>(w, i.v[0], l) & 255;
    uint64_t field = length >= 64 ? ~uint64_t(0) : (uint64_t(1) << length) - 1;
    field = at >= 64 ? 0 : field << at;
    const uint64_t inserted = at >= 64 ? 0 : get<uint64_t>(w, i.a, l) << at;
    put<uint64_t>(w, i.d, l, (get<uint64_t>(w, i.b, l) & ~field) | (inserted & field));
  });
  END DEF("prmt.b32", kAlu) for_lanes(m, [&](int l) {
    const uint64_t bytes = get<uint32_t>(w, i.a, l) | uint64_t(get<uint32_t>(w, i.b, l)) << 32;
    const uint32_t selectors = get<uint32_t>(w, i.c, l);
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t selector = selectors >> 4 * k & 15;
      uint32_t byte = uint32_t(bytes >> 8 * (selector & 7)) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * k;
    }
    put<uint32_t>(w, i.d, l, result);
  });
  END DEF("trap", kOther) for_lanes(m, [&](int) { fail("the kernel executes a trap"); });
  END DEF("nothing", kBarrier) END DEF("atom.global.inc.u32", kGlobal) uint64_t at[32];
  for_lanes(m, [&](int l) {
    const uint64_t address = at[l] = get<uint64_t>(w, i.a, l) + i.offset;
    check_global(address, 4, "atomic", 0);
    uint32_t* p = reinterpret_cast<uint32_t*>(address);
    const uint32_t old = *p, most = get<uint32_t>(w, i.b, l);
    *p = old >= most ? 0 : old + 1;
    put<uint32_t>(w, i.d, l, old);
  });
  count_global(at, m, 4, true);
  END
}

void atomic_add_shared(Warp& w, const Instruction& i, uint32_t m) {
  uint32_t at[32];
  for_lanes(m, [&](int l) {
    at[l] = (i.a < 0 ? 0 : get<uint32_t>(w, i.a, l)) + static_cast<uint32_t>(i.offset);
    uint8_t* p = w.block->shared.at(at[l], 4, w.index * 32 + l, true, 0, true);
    uint32_t old;
    memcpy(&old, p, 4);
    const uint32_t sum = old + get<uint32_t>(w, i.b, l);
    memcpy(p, &sum, 4);
    put<uint32_t>(w, i.d, l, old);
  });
  count_shared(at, m, 4);
}

// ld and st in any state space; the opcode holds the type.
template <class T>
void load_as(Warp& w, const Instruction& i, uint32_t m) {
  const uint32_t pc = static_cast<uint32_t>(i.target);
  const auto take = [&](int l, const uint8_t* p) {
    for (int k = 0; k < i.vector; ++k) {
      T v;
      memcpy(&v, p + k * sizeof(T), sizeof v);
      const int d = i.vector == 1 ? i.d : i.v[k];
      if constexpr (sizeof(T) < 4) {
        put<int32_t>(w, d, l, static_cast<int32_t>(v));  // sign-extended to the register
      } else {
        put<T>(w, d, l, v);
      }
    }
  };
  const int size = i.vector * sizeof(T);
  if (i.space == 'g') {
    uint64_t at[32];
    for_lanes(m, [&](int l) {
      at[l] = get<uint64_t>(w, i.a, l) + i.offset;
      check_global(at[l], size, "load", pc);
      take(l, reinterpret_cast<const uint8_t*>(at[l]));
    });
    count_global(at, m, size, false);
  } else if (i.space == 's') {
    uint32_t at[32];
    for_lanes(m, [&](int l) {
      at[l] = (i.a < 0 ? 0 : get<uint32_t>(w, i.a, l)) + static_cast<uint32_t>(i.offset);
      take(l, w.block->shared.at(at[l], size, w.index * 32 + l, false, pc));
    });
    count_shared(at, m, size);
  } else {
    for_lanes(m, [&](int l) { take(l, w.block->parameters + (i.a < 0 ? 0 : get<uint64_t>(w, i.a, l)) + i.offset); });
  }
}
template <class T>
void store_as(Warp& w, const Instruction& i, uint32_t m) {
  const uint32_t pc = static_cast<uint32_t>(i.target);
  const auto give = [&](int l, uint8_t* p) {
    for (int k = 0; k < i.vector; ++k) {
      const T v = get<T>(w, i.vector == 1 ? i.b : i.v[k], l);
      memcpy(p + k * sizeof(T), &v, sizeof v);
    }
  };
  const int size = i.vector * sizeof(T);
  if (i.space == 'g') {
    uint64_t at[32];
    for_lanes(m, [&](int l) {
      at[l] = get<uint64_t>(w, i.a, l) + i.offset;
      check_global(at[l], size, "store", pc);
      give(l, reinterpret_cast<uint8_t*>(at[l]));
    });
    count_global(at, m, size, true);
  } else {
    uint32_t at[32];
    for_lanes(m, [&](int l) {
      at[l] = (i.a < 0 ? 0 : get<uint32_t>(w, i.a, l)) + static_cast<uint32_t>(i.offset);
      give(l, w.block->shared.at(at[l], size, w.index * 32 + l, true, pc));
    });
    count_shared(at, m, size);
  }
}
Run memory_run(const std::string& type, bool is_store) {
#define TYPE(name, T) \
  if (type == name) return is_store ? &store_as<T> : &load_as<T>;
  TYPE("u8", uint8_t)
  TYPE("s8", int8_t)
  TYPE("b8", uint8_t)
  TYPE("u16", uint16_t)
  TYPE("s16", int16_t)
  TYPE("b16", uint16_t)
  TYPE("u32", uint32_t)
  TYPE("s32", int32_t)
  TYPE("b32", uint32_t)
  TYPE("f32", uint32_t)
  TYPE("u64", uint64_t)
  TYPE("s64", int64_t)
  TYPE("b64", uint64_t)
  TYPE("f64", uint64_t)
#undef TYPE
  fail("unsupported type of a memory access: %s", type.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Parsing

std::string without_comments(const std::string& text) {
  std::string out;
  for (size_t k = 0; k < text.size(); ++k) {
    if (text.compare(k, 2, "//") == 0) {
      while (k < text.size() && text[k] != '\n') ++k;
    }
    if (k < text.size()) out += text[k] == '\n' || text[k] == '\t' ? ' ' : text[k];
  }
  return out;
}
std::string trimmed(const std::string& s) {
  const size_t b = s.find_first_not_of(' '), e = s.find_last_not_of(' ');
  return b == std::string::npos ? "" : s.substr(b, e - b + 1);
}
std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == at && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& p : parts) p = trimmed(p);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}
int size_of(const std::string& type) { return std::stoi(type.substr(type.find_first_of("0123456789"))) / 8; }

struct Declared {
  std::string name;
  int size, alignment;
};
// ".param .align 8 .b8 name[432]", ".param .u64 .ptr .align 1 name", ".reg .f32 %f<9>", ".shared .align 8 .b8 name[9]"
Declared declared(const std::string& text) {
  std::istringstream words(text);
  std::string w;
  Declared d{"", 0, 0};
  int element = 0;
  while (words >> w) {
    if (w == ".align") {
      int n;
      words >> n;
      if (element == 0) d.alignment = n;  // a later one is the alignment of the pointee
    } else if (w[0] == '.') {
      if (w.find_first_of("0123456789") != std::string::npos && element == 0) element = size_of(w);
    } else {
      d.name = w;
    }
  }
  int n = 1;
  const size_t bracket = d.name.find('[');
  if (bracket != std::string::npos) {
    n = std::stoi(d.name.substr(bracket + 1));
    d.name = d.name.substr(0, bracket);
  }
  d.size = n * element;
  if (d.alignment == 0) d.alignment = element;
  return d;
}

// The source text of a function or kernel.
struct Source {
  std::string name, body;
  std::vector<Declared> parameters;
  std::string result;
  bool is_kernel;
};

std::vector<Source> sources_of(const std::string& raw) {
  const std::string text = without_comments(raw);
  std::vector<Source> all;
  size_t at = 0;
  for (;;) {
    const size_t entry = text.find(".entry ", at), func = text.find(".func ", at);
    const size_t from = std::min(entry, func);
    if (from == std::string::npos) break;
    const size_t open = text.find('{', from), end = text.find(';', from);
    if (end < open) {  // a declaration
      at = end + 1;
      continue;
    }
    std::string head = text.substr(from, open - from);
    Source s;
    s.is_kernel = entry == from;
    size_t k = head.find(' ');
    if (!s.is_kernel) {
      const size_t o = head.find('('), c = head.find(')');
      const std::string result = trimmed(head.substr(o + 1, c - o - 1));
      s.result = declared(result).name;
      k = c + 1;
    }
    const size_t o = head.find('(', k), c = head.find(')', o);
    s.name = trimmed(head.substr(k, o - k));
    for (const std::string& p : split(head.substr(o + 1, c - o - 1), ',')) s.parameters.push_back(declared(p));
    int depth = 0;
    size_t close = open;
    for (;; ++close) {
      if (text[close] == '{') ++depth;
      if (text[close] == '}' && --depth == 0) break;
    }
    s.body = text.substr(open + 1, close - open - 1);
    all.push_back(s);
    at = close + 1;
  }
  return all;
}

std::vector<Parameter> laid_out(const Source& s) {
  std::vector<Parameter> all;
  int at = 0;
  for (const Declared& d : s.parameters) {
    at = (at + d.alignment - 1) / d.alignment * d.alignment;
    all.push_back({at, d.size});
    at += d.size;
  }
  return all;
}

class Builder {
 public:
  Program program;

  void add_kernel(const Source& kernel, const std::vector<Source>& all) {
    for (const Source& s : all)
      if (!s.is_kernel) {
        Function f;
        f.name = s.name;
        f.result = reg(s.name + ":" + s.result);
        for (const Declared& p : s.parameters) f.parameters.push_back(reg(s.name + ":" + p.name));
        program.functions.push_back(f);
      }
    add(kernel, -1);
    for (const Source& s : all)
      if (!s.is_kernel) {
        int f = 0;
        while (program.functions[f].name != s.name) ++f;
        program.functions[f].begin = static_cast<uint32_t>(program.code.size());
        add(s, f);
      }
  }

 private:
  std::unordered_map<std::string, int> registers_, predicates_;
  std::unordered_map<std::string, int64_t> space_;  // offsets of parameters and shared variables by name
  std::unordered_map<std::string, char> which_;
  std::string scope_;
  int function_ = -1;

  int reg(const std::string& name) {
    const auto found = registers_.find(name);
    if (found != registers_.end()) return found->second;
    return registers_[name] = program.registers++;
  }
  int pred(const std::string& name) {
    const auto found = predicates_.find(name);
    if (found != predicates_.end()) return found->second;
    return predicates_[name] = program.predicates++;
  }
  int constant(uint64_t value) {
    const std::string name = "=" + std::to_string(value);
    const bool is_new = registers_.find(name) == registers_.end();
    const int r = reg(name);
    if (is_new) program.constants.push_back({r, value});
    return r;
  }
  static bool is_predicate(const std::string& s) { return s.compare(0, 2, "%p") == 0 && isdigit(s[2]); }

  int operand(const std::string& s) {
    if (s[0] == '%') {
      if (s == "%tid.x" || s == "%ntid.x" || s == "%ctaid.x" || s == "%nctaid.x") return reg(s);
      return reg(scope_ + s);
    }
    if (s.compare(0, 2, "0f") == 0) return constant(std::stoull(s.substr(2), nullptr, 16));
    if (s.compare(0, 2, "0d") == 0) return constant(std::stoull(s.substr(2), nullptr, 16));
    if (isdigit(s[0]) || s[0] == '-')
      return constant(s[0] == '-' ? uint64_t(std::stoll(s, nullptr, 0)) : std::stoull(s, nullptr, 0));
    if (space_.count(s)) return constant(uint64_t(space_[s]));
    if (symbols().count(s)) return constant(symbols().at(s).first);
    // Parameters of calls are kept in registers.
    return reg(scope_ + s);
  }

  void address(Instruction& i, std::string s) {
    s = s.substr(1, s.size() - 2);
    const size_t plus = s.find('+');
    std::string base = s.substr(0, plus);
    if (plus != std::string::npos) i.offset = std::stoll(s.substr(plus + 1), nullptr, 0);
    if (space_.count(base)) {
      i.offset += space_[base];
    } else {
      i.a = operand(base);
    }
  }

  void add(const Source& s, int function) {
    function_ = function;
    scope_ = s.name + ":";
    space_.clear();
    if (function < 0) {
      const std::vector<Parameter> where = laid_out(s);
      for (size_t k = 0; k < where.size(); ++k) space_[s.parameters[k].name] = where[k].offset;
    }
    std::unordered_map<std::string, uint32_t> labels;
    std::vector<std::pair<uint32_t, std::string>> jumps;
    const std::string& t = s.body;
    size_t k = 0;
    for (;;) {
      while (k < t.size() && (t[k] == ' ' || t[k] == '{' || t[k] == '}')) ++k;
      if (k >= t.size()) break;
      size_t end = k;
      while (t[end] != ';' && t[end] != ':') ++end;
      const std::string statement = trimmed(t.substr(k, end - k));
      if (t[end] == ':') {
        labels[statement] = static_cast<uint32_t>(program.code.size());
      } else if (statement[0] == '.') {
        if (statement.compare(0, 7, ".shared") == 0) {
          const Declared d = declared(statement);
          program.shared = (program.shared + d.alignment - 1) / d.alignment * d.alignment;
          space_[d.name] = static_cast<int64_t>(program.shared);
          program.shared += d.size;
        }
      } else {
        translate(statement, jumps);
      }
      k = end + 1;
    }
    for (const auto& j : jumps) {
      if (!labels.count(j.second)) fail("no label %s", j.second.c_str());
      program.code[j.first].target = labels[j.second];
    }
  }

  void translate(const std::string& statement, std::vector<std::pair<uint32_t, std::string>>& jumps) {
    std::string s = statement;
    Instruction i;
    if (s[0] == '@') {
      const size_t space = s.find(' ');
      std::string p = s.substr(1, space - 1);
      if (p[0] == '!') {
        i.negated = true;
        p = p.substr(1);
      }
      i.predicate = pred(scope_ + p);
      s = trimmed(s.substr(space));
    }
    const size_t space = s.find(' ');
    const std::string op = s.substr(0, space);
    std::vector<std::string> o = space == std::string::npos ? std::vector<std::string>() : split(s.substr(space), ',');
    const auto emit = [&] {
      if (i.kind != kJump && i.kind != kCall) i.target = static_cast<uint32_t>(program.code.size());
      program.code.push_back(i);
      program.text.push_back(statement);
    };
    if (op == "bra" || op == "bra.uni") {
      i.kind = kJump;
      i.cls = kBranch;
      jumps.push_back({static_cast<uint32_t>(program.code.size()), o[0]});
      return emit();
    }
    if (op == "ret") {
      i.kind = kReturn;
      i.cls = kBranch;
      i.function = function_;
      return emit();
    }
    if (op == "bfi.b64") {
      i.d = operand(o[0]);
      i.a = operand(o[1]);
      i.b = operand(o[2]);
      i.c = operand(o[3]);
      i.v[0] = operand(o[4]);
      i.run = table().at(op).run;
      i.cls = table().at(op).cls;
      return emit();
    }
    if (op == "trap") {
      i.run = table().at(op).run;
      i.cls = kBranch;
      return emit();
    }
    if (op == "call.uni") {
      i.kind = kCall;
      i.cls = kBranch;
      int f = 0;
      while (program.functions[f].name != o[1]) ++f;
      i.function = f;
      i.d = operand(trimmed(o[0].substr(1, o[0].size() - 2)));
      int n = 0;
      for (const std::string& p : split(trimmed(o[2].substr(1, o[2].size() - 2)), ',')) i.v[n++] = operand(p);
      return emit();
    }
    if (op == "shfl.sync.bfly.b32") {
      i.kind = kShuffle_;
      i.cls = kShuffle;
      const size_t bar = o[0].find('|');
      i.d = operand(o[0].substr(0, bar));
      if (bar != std::string::npos) i.d2 = pred(scope_ + o[0].substr(bar + 1));
      i.a = operand(o[1]);
      i.b = operand(o[2]);
      i.c = operand(o[3]);
      i.e = operand(o[4]);
      return emit();
    }
    if (op == "vote.sync.ballot.b32") {
      i.kind = kBallot;
      i.cls = kAlu;
      i.d = operand(o[0]);
      i.negated_source = o[1][0] == '!';
      i.a = pred(scope_ + o[1].substr(i.negated_source));
      i.e = operand(o[2]);
      return emit();
    }
    if (op == "bar.warp.sync") {
      i.kind = kWarpSync;
      i.cls = kBarrier;
      i.e = operand(o[0]);
      return emit();
    }
    if (op == "bar.sync" || op == "barrier.sync" || op == "bar.cta.sync") {
      i.kind = kBlockSync;
      i.cls = kBarrier;
      return emit();
    }
    if (op == "membar.gl" || op == "fence.sc.gpu" || op == "fence.acq_rel.gpu" || op == "membar.sc.gpu") {
      i.run = table().at("nothing").run;
      i.cls = kBarrier;
      return emit();
    }
    std::vector<std::string> parts = split(op, '.');
    if (parts[0] == "ld" || parts[0] == "st") {
      if (parts.size() > 3 && parts[2] == "nc") parts.erase(parts.begin() + 2);  // a cache for constants, not counted
      const bool is_store = parts[0] == "st";
      const std::string type = parts.back();
      const std::string space_name = parts[1];
      if (parts.size() > 3 && parts[2][0] == 'v') i.vector = static_cast<uint8_t>(parts[2][1] - '0');
      if (parts.size() > 3 && parts[2][0] != 'v') fail("unsupported PTX: %s", op.c_str());
      const std::string& where = is_store ? o[0] : o[1];
      const std::string& what = is_store ? o[1] : o[0];
      // Parameters of calls and of the current function are registers.
      const std::string inside = where.substr(1, where.find_first_of("+]") - 1);
      if (space_name == "param" && (is_store || inside[0] != '%') && !space_.count(inside)) {
        i.run = table().at("mov.b64").run;
        i.cls = kMove;
        i.d = is_store ? operand(inside) : operand(what);
        i.a = is_store ? operand(what) : operand(inside);
        return emit();
      }
      i.space = static_cast<uint8_t>(space_name[0]);
      if (space_name != "global" && space_name != "shared" && space_name != "param")
        fail("unsupported PTX: %s", op.c_str());
      i.cls = i.space == 'g' ? kGlobal : i.space == 's' ? Class::kShared : kConst;
      i.run = memory_run(type, is_store);
      address(i, where);
      if (i.vector > 1) {
        int n = 0;
        for (const std::string& v : split(what.substr(1, what.size() - 2), ',')) i.v[n++] = operand(v);
      } else {
        (is_store ? i.b : i.d) = operand(what);
      }
      return emit();
    }
    if (op == "mov.b64" || op == "mov.b32") {
      if (o[1][0] == '{') {
        int n = 0;
        for (const std::string& v : split(o[1].substr(1, o[1].size() - 2), ',')) i.v[n++] = operand(v);
        if (n != 2) fail("unsupported PTX: %s", statement.c_str());
        i.d = operand(o[0]);
        i.run = table().at(op == "mov.b64" ? "pack" : "pack32").run;
        i.cls = kMove;
        return emit();
      }
      if (o[0][0] == '{') {
        int n = 0;
        for (const std::string& v : split(o[0].substr(1, o[0].size() - 2), ','))
          i.v[n++] = operand(v == "_" ? "%nowhere" : v);
        if (n != 2) fail("unsupported PTX: %s", statement.c_str());
        i.a = operand(o[1]);
        i.run = table().at(op == "mov.b64" ? "unpack" : "unpack32").run;
        i.cls = kMove;
        return emit();
      }
    }
    if (op.compare(0, 5, "atom.") == 0) {
      const bool shared = op == "atom.shared.add.u32";
      if (!shared && op != "atom.global.inc.u32") fail("unsupported PTX: %s", op.c_str());
      i.d = operand(o[0]);
      address(i, o[1]);
      i.b = operand(o[2]);
      i.run = shared ? &atomic_add_shared : table().at(op).run;
      i.cls = shared ? Class::kShared : kGlobal;
      return emit();
    }
    const auto found = table().find(op);
    if (found == table().end()) fail("unsupported instruction %s in: %s", op.c_str(), statement.c_str());
    i.run = found->second.run;
    i.cls = found->second.cls;
    const bool of_predicates = op.size() > 5 && op.compare(op.size() - 5, 5, ".pred") == 0;
    const auto predicate_operand = [&](const std::string& p) {
      if (p[0] != '%') {  // a number: -1, 0
        return pred(p == "0" ? "=0" : "=1");
      }
      return pred(scope_ + p);
    };
    if (of_predicates) {
      i.d = predicate_operand(o[0]);
      i.a = predicate_operand(o[1]);
      if (o.size() > 2) i.b = predicate_operand(o[2]);
      return emit();
    }
    i.d = parts[0] == "setp" ? pred(scope_ + o[0]) : operand(o[0]);
    i.a = operand(o[1]);
    if (o.size() > 2) i.b = operand(o[2]);
    if (o.size() > 3) i.c = parts[0] == "selp" ? pred(scope_ + o[3]) : operand(o[3]);
    emit();
  }

 public:
  int tid() { return reg("%tid.x"); }
  int ntid() { return reg("%ntid.x"); }
  int ctaid() { return reg("%ctaid.x"); }
  int nctaid() { return reg("%nctaid.x"); }
  int one() { return pred("=1"); }
  int zero() { return pred("=0"); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Execution

struct Kernel {
  Program program;
  int tid, ntid, ctaid, nctaid, one, zero;
};

class PtxDevice : public Device {
 public:
  explicit PtxDevice(const std::string& text) {
    if (table().empty()) fill_table();
    const std::vector<Source> all = sources_of(text);
    for (const Source& s : all) {
      if (!s.is_kernel) continue;
      Builder b;
      b.add_kernel(s, all);
      Kernel k{{}, b.tid(), b.ntid(), b.ctaid(), b.nctaid(), b.one(), b.zero()};
      k.program = std::move(b.program);
      kernels_[s.name] = std::move(k);
    }
  }

  void run(const std::string& name, const Launch& launch) override {
    if (!kernels_.count(name)) fail("no kernel %s", name.c_str());
    const Kernel& kernel = kernels_.at(name);
    counts.blocks += launch.blocks;
    counts.threads += uint64_t(launch.blocks) * launch.threads;
    std::vector<std::unique_ptr<Block>> resident;
    std::vector<std::unique_ptr<Block>>& spare = spare_[name];
    // CUDA does not define the order of blocks.
    std::vector<uint32_t> order(launch.blocks);
    for (uint32_t b = 0; b < launch.blocks; ++b) order[b] = b;
    if (options.policy != 0) std::shuffle(order.begin(), order.end(), generator);
    uint32_t next = 0;
    while (next < launch.blocks || !resident.empty()) {
      while (next < launch.blocks && resident.size() < static_cast<size_t>(options.resident)) {
        std::unique_ptr<Block> b;
        if (!spare.empty() && spare.back()->size == launch.threads) {
          b = std::move(spare.back());
          spare.pop_back();
        } else {
          b = std::make_unique<Block>();
        }
        start(*b, kernel, launch, order[next++]);
        resident.push_back(std::move(b));
      }
      const size_t which = options.policy == 0 ? 0 : generator() % resident.size();
      step(*resident[which], kernel);
      if (resident[which]->done) {
        spare.push_back(std::move(resident[which]));
        resident.erase(resident.begin() + static_cast<long>(which));
      }
    }
    if (spare.size() > 8) spare.resize(8);
  }

 private:
  std::map<std::string, Kernel> kernels_;
  std::map<std::string, std::vector<std::unique_ptr<Block>>> spare_;

  static void start(Block& b, const Kernel& k, const Launch& launch, uint32_t index) {
    b.index = index;
    b.size = launch.threads;
    b.count = launch.blocks;
    b.parameters = launch.parameters.data();
    b.done = false;
    const int n = static_cast<int>((launch.threads + 31) / 32);
    b.shared.reset(k.program.shared, n);
    if (b.warps.size() != static_cast<size_t>(n)) b.warps.assign(static_cast<size_t>(n), Warp());
    for (int w = 0; w < n; ++w) {
      Warp& warp = b.warps[static_cast<size_t>(w)];
      warp.block = &b;
      warp.index = w;
      const bool is_new = warp.R.empty();
      if (is_new || options.policy != 0) warp.R.assign(size_t(k.program.registers) * 32, 0x7ff7dead7fb7beefull);
      warp.P.assign(size_t(k.program.predicates), 0x5a5a5a5au);
      warp.P[k.one] = ~0u;
      warp.P[k.zero] = 0;
      if (is_new || options.policy != 0)
        for (const auto& c : k.program.constants) std::fill_n(warp.r(c.first), 32, c.second);
      const uint32_t live = std::min<uint32_t>(32, launch.threads - uint32_t(w) * 32);
      warp.alive = live == 32 ? ~0u : (1u << live) - 1;
      warp.at_block = warp.at_warp = 0;
      for (int l = 0; l < 32; ++l) {
        warp.pc[l] = 0;
        warp.depth[l] = 0;
        warp.r(k.tid)[l] = uint32_t(w) * 32 + l;
        warp.r(k.ntid)[l] = launch.threads;
        warp.r(k.ctaid)[l] = index;
        warp.r(k.nctaid)[l] = launch.blocks;
      }
    }
  }

  // Runs each warp for a limited number of instructions.
  static void step(Block& b, const Kernel& k) {
    bool any = false, alive = false;
    const size_t n = b.warps.size();
    const size_t first = options.policy == 0 ? 0 : generator() % n;
    for (size_t j = 0; j < n; ++j) {
      Warp& w = b.warps[(first + j) % n];
      if (w.alive == 0) continue;
      alive = true;
      any |= run_warp(w, k.program, options.policy == 0 ? 1 << 30 : 1 + static_cast<int>(generator() % 200));
    }
    if (!alive) {
      b.done = true;
      return;
    }
    // __syncthreads()
    bool all = true;
    for (Warp& w : b.warps) all &= w.at_block == w.alive;
    if (all) {
      bool somebody = false;
      for (Warp& w : b.warps) {
        for_lanes(w.at_block, [&](int l) { ++w.pc[l]; });
        somebody |= w.at_block != 0;
        w.at_block = 0;
      }
      if (somebody) {
        ++b.shared.block_epoch;
        return;
      }
    }
    bool left = false;
    for (Warp& w : b.warps) left |= w.alive != 0;
    if (!left) {
      b.done = true;
      return;
    }
    if (!any) fail("deadlock in block %u", b.index);
  }

  // Releases lanes that wait at a shuffle or a warp barrier once all members of its mask have arrived.
  static bool release(Warp& w, const Program& p) {
    uint32_t left = w.at_warp;
    bool any = false;
    while (left != 0) {
      const int l0 = __builtin_ctz(left);
      const Instruction& i = p.code[w.pc[l0]];
      const uint32_t members = get<uint32_t>(w, i.e, l0) & w.alive;
      uint32_t same = 0;
      for_lanes(w.at_warp, [&](int l) {
        same |= static_cast<uint32_t>(w.pc[l] == w.pc[l0] && w.depth[l] == w.depth[l0]) << l;
      });
      left &= ~same;
      if ((members & ~w.at_warp) != 0) continue;
      if ((members & ~same) != 0)
        fail("lanes of a warp wait at different instructions: pc %u, lanes %#x of %#x", w.pc[l0], same, members);
      if (!(members >> l0 & 1)) fail("a lane is not in the mask with which it waits");
      if (i.kind == kShuffle_) {
        uint32_t from[32], valid = 0;
        for_lanes(members, [&](int l) { from[l] = get<uint32_t>(w, i.a, l); });
        for_lanes(members, [&](int l) {
          const uint32_t b = get<uint32_t>(w, i.b, l) & 31, c = get<uint32_t>(w, i.c, l);
          const uint32_t clamp = c & 31, segment = c >> 8 & 31;
          const uint32_t max_lane = (l & segment) | (clamp & ~segment);
          uint32_t j = uint32_t(l) ^ b;
          const bool inside = j <= max_lane;
          if (!inside) j = uint32_t(l);
          if (!(members >> j & 1)) fail("a shuffle reads from a lane that does not take part, pc %u", w.pc[l0]);
          put<uint32_t>(w, i.d, l, from[j]);
          valid |= static_cast<uint32_t>(inside) << l;
        });
        if (i.d2 >= 0) w.P[i.d2] = (w.P[i.d2] & ~members) | valid;
      } else if (i.kind == kBallot) {
        const uint32_t votes = (i.negated_source ? ~w.P[i.a] : w.P[i.a]) & members;
        for_lanes(members, [&](int l) { put<uint32_t>(w, i.d, l, votes); });
      } else {
        if (members == w.alive) ++w.block->shared.warp_epoch[w.index];
      }
      for_lanes(members, [&](int l) { ++w.pc[l]; });
      w.at_warp &= ~members;
      any = true;
    }
    return any;
  }

  static bool run_warp(Warp& w, const Program& p, int budget) {
    bool any = false;
    const Instruction* code = p.code.data();
    for (;;) {
      uint32_t ready = w.alive & ~w.at_block & ~w.at_warp;
      if (ready == 0) {
        if (w.at_warp == 0 || !release(w, p)) return any;
        any = true;
        continue;
      }
      if (budget <= 0) return any;
      // Chooses the lanes that run next.
      uint32_t group = 0, limit = ~0u, pc;
      int first;
      if (options.policy == 2) {
        int n = static_cast<int>(generator() % static_cast<unsigned>(__builtin_popcount(ready)));
        uint32_t m = ready;
        while (n-- > 0) m &= m - 1;
        first = __builtin_ctz(m);
        pc = w.pc[first];
        for_lanes(
            ready, [&](int l) { group |= static_cast<uint32_t>(w.pc[l] == pc && w.depth[l] == w.depth[first]) << l; });
        // At random, only a part of the group runs.
        if (generator() % 4 == 0) group = (group & generator()) | 1u << first;
      } else {
        first = -1;
        for_lanes(ready, [&](int l) {
          if (first < 0) {
            first = l;
          } else {
            const bool deeper = w.depth[l] > w.depth[first], same = w.depth[l] == w.depth[first];
            const bool earlier = options.policy == 0 ? w.pc[l] < w.pc[first] : w.pc[l] > w.pc[first];
            if (deeper || (same && earlier)) first = l;
          }
        });
        pc = w.pc[first];
        for_lanes(ready, [&](int l) {
          if (w.depth[l] != w.depth[first]) return;
          if (w.pc[l] == pc) {
            group |= 1u << l;
          } else if (w.pc[l] > pc && w.pc[l] < limit) {
            limit = w.pc[l];
          }
        });
      }
      any = true;
      const uint32_t size = static_cast<uint32_t>(__builtin_popcount(group));
      for (;;) {
        const Instruction& i = code[pc];
        uint32_t m = group;
        if (i.predicate >= 0) m &= i.negated ? ~w.P[i.predicate] : w.P[i.predicate];
        ++counts.warp_instructions;
        counts.lane_instructions += size;
        ++counts.by_class[i.cls];
        counts.lanes_by_class[i.cls] += static_cast<uint32_t>(__builtin_popcount(m));
        --budget;
        if (i.kind == kSimple) {
          if (m != 0) i.run(w, i, m);
          ++pc;
          if (pc >= limit || budget <= 0 || (options.policy == 2 && generator() % 64 == 0)) {
            for_lanes(group, [&](int l) { w.pc[l] = pc; });
            break;
          }
          continue;
        }
        if (i.kind == kJump) {
          ++counts.branches;
          if (m == group) {
            pc = i.target;
          } else if (m == 0) {
            ++pc;
          } else {
            ++counts.divergent;
            for_lanes(group, [&](int l) { w.pc[l] = m >> l & 1 ? i.target : pc + 1; });
            break;
          }
          if (pc >= limit || budget <= 0) {
            for_lanes(group, [&](int l) { w.pc[l] = pc; });
            break;
          }
          continue;
        }
        for_lanes(group, [&](int l) { w.pc[l] = pc; });
        if (i.kind == kCall) {
          const Function& f = p.functions[static_cast<size_t>(i.function)];
          for_lanes(m, [&](int l) {
            for (size_t n = 0; n < f.parameters.size(); ++n) w.r(f.parameters[n])[l] = w.r(i.v[n])[l];
            w.back[l][w.depth[l]++] = pc;
            w.pc[l] = f.begin;
          });
          for_lanes(group & ~m, [&](int l) { ++w.pc[l]; });
        } else if (i.kind == kReturn) {
          if (i.function < 0) {
            w.alive &= ~m;
          } else {
            const Function& f = p.functions[static_cast<size_t>(i.function)];
            for_lanes(m, [&](int l) {
              const uint32_t from = w.back[l][--w.depth[l]];
              w.r(code[from].d)[l] = w.r(f.result)[l];
              w.pc[l] = from + 1;
            });
          }
          for_lanes(group & ~m, [&](int l) { ++w.pc[l]; });
        } else {
          if (m != group) fail("the predicate of a barrier is false in some lanes");
          (i.kind == kBlockSync ? w.at_block : w.at_warp) |= m;
        }
        break;
      }
    }
  }
};

}  // namespace ptx

std::unique_ptr<Device> load_ptx(const std::string& text) { return std::make_unique<ptx::PtxDevice>(text); }

std::map<std::string, std::vector<Parameter>> parameters_of(const std::string& text) {
  std::map<std::string, std::vector<Parameter>> all;
  for (const ptx::Source& s : ptx::sources_of(text))
    if (s.is_kernel) all[s.name] = ptx::laid_out(s);
  return all;
}

}  // namespace device_code
