#include "common.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>

namespace device_code {

const char* const class_names[kClasses] = {"fp32",    "mufu",    "fp64",   "imad",    "alu",
                                           "move",    "convert", "const",  "global",  "shared",
                                           "shuffle", "barrier", "branch", "uniform", "other"};
Counts counts;
std::vector<LaunchCounts> launches;
uint64_t longest_warp = 0;
std::vector<Range> ranges;
Options options;
std::mt19937 generator;
std::map<std::string, std::pair<uint64_t, uint64_t>>& symbols() {
  static std::map<std::string, std::pair<uint64_t, uint64_t>> all;
  return all;
}

// The type of guard_find() in memory_guard.cpp, which finds the bounds of an allocation. It exists only if that library
// is preloaded.
using Find = bool (*)(uint64_t, uint64_t*, uint64_t*);
void check_global(uint64_t address, int size, const char* what, uint32_t pc) {
  if (address % size != 0) fail("misaligned %s of %d bytes at %#lx, pc %u", what, size, address, pc);
  static Find find = reinterpret_cast<Find>(dlsym(RTLD_DEFAULT, "guard_find"));
  if (find == nullptr) return;
  thread_local uint64_t low[4] = {}, high[4] = {};
  thread_local unsigned next = 0;
  extern thread_local bool allocations_changed;
  if (allocations_changed) {
    for (int k = 0; k < 4; ++k) low[k] = high[k] = 0;
    allocations_changed = false;
  }
  for (int k = 0; k < 4; ++k)
    if (address >= low[k] && address + size <= high[k]) return;
  for (const auto& s : symbols())
    if (address >= s.second.first && address + size <= s.second.first + s.second.second) return;
  uint64_t l, h;
  if (!find(address, &l, &h) || address + size > h)
    fail("%s of %d bytes at %#lx is outside of every allocation, pc %u", what, size, address, pc);
  low[next % 4] = l;
  high[next % 4] = h;
  ++next;
}
thread_local bool allocations_changed = false;

void count_global(const uint64_t* a, uint32_t mask, int size, bool store) {
  uint64_t sector[64];
  int n = 0;
  int tag = 0;
  bool first = true;
  uint64_t bytes = 0;
  for_lanes(mask, [&](int l) {
    if (first) {
      first = false;
      for (const Range& r : ranges)
        if (a[l] >= r.low && a[l] < r.high) tag = r.tag;
    }
    bytes += size;
    const uint64_t s = a[l] >> 5;
    sector[n++] = s;
  });
  std::sort(sector, sector + n);
  n = static_cast<int>(std::unique(sector, sector + n) - sector);
  MemoryCount& c = counts.memory[tag][store];
  ++c.requests;
  c.bytes += bytes;
  c.sectors += n;
  c.ideal_sectors += (bytes + 31) / 32;
}

void count_shared(const uint32_t* a, uint32_t mask, int size) {
  // A wavefront serves half a warp for 8 bytes per lane, and a quarter for 16 bytes.
  const int parts = size <= 4 ? 1 : size / 4;
  uint64_t waves = 0, ideal = 0;
  for (int p = 0; p < parts; ++p) {
    uint32_t lanes = mask;
    if (parts > 1) lanes &= ((parts == 2 ? 0xffffu : 0xffu) << (p * 32 / parts));
    if (lanes == 0) continue;
    ++ideal;
    std::vector<uint32_t> words[32];
    size_t most = 1;
    for_lanes(lanes, [&](int l) {
      for (int k = 0; k < std::max(1, size / 4); ++k) {
        const uint32_t w = a[l] / 4 + k;
        auto& v = words[w % 32];
        if (std::find(v.begin(), v.end(), w) == v.end()) v.push_back(w);
        most = std::max(most, v.size());
      }
    });
    waves += most;
  }
  ++counts.shared_requests;
  counts.shared_wavefronts += waves;
  counts.shared_ideal += ideal;
}

static float with_error(float y) {
  if (options.ulp == 0 || !(std::fabs(y) > 0) || std::isinf(y)) return y;
  int32_t b = bits<int32_t>(y);
  const uint32_t hash = (static_cast<uint32_t>(b) * 2654435761u) >> 16;  // equal inputs get equal errors
  b += static_cast<int>(hash % static_cast<unsigned>(2 * options.ulp + 1)) - options.ulp;
  return bits<float>(b);
}
static float flush_to_zero(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
float ex2_approx(float x) {
  x = flush_to_zero(x);
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)));
  if (x == 0 || std::isnan(y)) return y;
  return flush_to_zero(std::floor(x) == x ? y : with_error(y));
}
float rcp_approx(float x) {
  x = flush_to_zero(x);
  float y = 1.0f / x;
  if (options.ulp != 0 && std::isfinite(y) && y != 0 && (bits<uint32_t>(x) * 2654435761u >> 20) % 2) {
    // The float on the other side of the exact value: its error is below 1 ulp.
    const double right = 1.0 / static_cast<double>(x);
    if (static_cast<double>(y) != right) y = std::nextafter(y, static_cast<double>(y) < right ? INFINITY : -INFINITY);
  }
  return flush_to_zero(y);
}
float rsq_approx(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(flush_to_zero(x)))); }

}  // namespace device_code
