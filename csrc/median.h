// Order statistics by passes that only compare and count: the lower median (Eq. 8) and the k-th largest logit.
#pragma once

#include "vector_math.h"

namespace sgl {

// Maps a float to an integer with the same order, and back
SGL_HD int32_t order_of(float x) {
  const int32_t bits = bits_of<int32_t>(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
SGL_HD int64_t order_of(double x) {
  const int64_t bits = bits_of<int64_t>(x);
  return bits < 0 ? bits ^ 0x7fffffffffffffff : bits;
}
SGL_HD float at_order(int32_t order) { return bits_of<float>(order < 0 ? order ^ 0x7fffffff : order); }
SGL_HD double at_order(int64_t order) { return bits_of<double>(order < 0 ? order ^ 0x7fffffffffffffff : order); }

// The `wanted`-th smallest of n numbers, counted from 1. The passes only compare and count. This is several times
// faster than a selection that moves numbers, and it gives the same result on every device.
//
// The search keeps an interval that contains the result. For both ends it knows how many numbers are less than or
// equal. The first pass tries `guess`. Most passes interpolate linearly between the ends; a smooth distribution takes
// five to eight passes. Two other kinds of passes bound the number of passes: some bisect the floats of the interval,
// and some try the float just below the largest number in the interval, because several numbers may equal the result.
//
// count_up_to(pivot): the number of values <= pivot; largest_up_to(pivot): the largest of these values.
template <class T, class Count, class Largest>
SGL_HD T order_statistic(
    int64_t n, int64_t wanted, T smallest, T largest, T guess, const Count& count_up_to, const Largest& largest_up_to) {
  if (wanted >= n) return largest;
  auto low = order_of(smallest), high = order_of(largest);
  T left = smallest, right = largest, count_left = T(0), count_right = static_cast<T>(n);
  for (int step = 0; low < high; ++step) {
    auto middle = (low & high) + ((low ^ high) >> 1);  // rounded down, without overflow
    if (step % 8 == 7) {
      right = largest_up_to(right);
      const auto order = order_of(right);
      high = order < high ? order : high;  // keep `high` if it is -0 and the new value is 0
      if (low >= high) break;
      middle = high - 1;
    } else if (step % 4 != 3 && (step < 8 || step % 2 == 0)) {
      const T share = (static_cast<T>(wanted) - T(0.5) - count_left) / (count_right - count_left);
      const auto order = order_of(step == 0 ? guess : left + (right - left) * share);
      if (order >= low && order < high) middle = order;
    }
    const T pivot = at_order(middle);
    const int64_t count = count_up_to(pivot);
    if (count == wanted) return largest_up_to(pivot);
    if (count > wanted) {
      high = middle;
      right = pivot;
      count_right = static_cast<T>(count);
    } else {
      low = middle + 1;
      left = pivot;
      count_left = static_cast<T>(count);
    }
  }
  return at_order(low);
}

// Rank of the lower median, which torch.median returns. The mean is a good `guess` for it.
SGL_HD int64_t median_rank(int64_t n) { return (n + 1) / 2; }

// First guess of order_statistic() for the k-th largest of n numbers, from the tail of a normal distribution.
template <class T>
SGL_HD T guess_kth_largest(int64_t n, int64_t k, T mean, T largest) {
  const double all = static_cast<double>(n);
  if (k >= n) return mean;
  return mean + (largest - mean) * static_cast<T>(std::sqrt(log(all / static_cast<double>(k)) / log(all)));
}

}  // namespace sgl
