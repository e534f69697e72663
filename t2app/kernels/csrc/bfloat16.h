// Rows of bfloat16 in memory, float32 in registers.
//
// Every row sums in the same order whatever the number of rows: what a row gets does not depend on its company.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "ahead.h"
#include "vector.h"

namespace t2app {

using torch::headeronly::BFloat16;

inline float widened(uint16_t value) { return BFloat16(value, BFloat16::from_bits()); }
inline uint16_t rounded(float value) { return BFloat16(value).x; }

// bfloat16 in a cache line.
constexpr int64_t kOfCacheLine = kCacheLine / sizeof(uint16_t);

inline void put_even_first(const uint16_t* row, int64_t length, float* result) {
  for (int64_t i = 0; i < length; i += kBlock) {
    const Pairs pairs = load_pairs(row + i);
    store(result + i, even_elements(pairs));
    store(result + i + kLanes, odd_elements(pairs));
  }
}

// target = a + b, rounded.
inline void store_rounded_sums(const float* a, const float* b, int64_t count, uint16_t* target) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    store_pairs(target + i, rounded_in_order(load(a + i) + load(b + i), load(a + i + kLanes) + load(b + i + kLanes)));
  }
  for (; i < count; ++i) target[i] = rounded(a[i] + b[i]);
}

// C rows of a matrix (length k), one after another, against R rows of x in even-first order: result (R, C), whose rows are
// `apart`. What is loaded serves several sums, and no sum waits for its last addition while others are there.
template <int R, int C>
inline void products_of(const uint16_t* weights, const float* x, int64_t k, float* result, int64_t apart,
                        const Ahead& ahead) {
  Floats even[C][R], odd[C][R];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) even[c][r] = odd[c][r] = zeros();
  }
  for (int64_t i = 0; i < k; i += kBlock) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const uint16_t* block = weights + c * k + i;
      if (i % kOfCacheLine == 0) ahead.of(block);
      const Pairs pairs = load_pairs(block);
      const Floats first = even_elements(pairs), second = odd_elements(pairs);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        even[c][r] = multiply_add(first, load(x + r * k + i), even[c][r]);
        odd[c][r] = multiply_add(second, load(x + r * k + i + kLanes), odd[c][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) result[r * apart + c] = sum(even[c][r] + odd[c][r]);
  }
}

constexpr int64_t kRowsAtOnce = 4;

// The same for `rows` rows of x and `columns` rows of the matrix, some of them at a time.
inline void products(int64_t rows, int64_t columns, const uint16_t* weights, const float* x, int64_t k, float* result,
                     int64_t apart, const Ahead& ahead = {}) {
  const auto some = [&]<int R, int C>() {
    int64_t c = 0;
    for (; c + C <= columns; c += C) products_of<R, C>(weights + c * k, x, k, result + c, apart, ahead);
    for (; c < columns; ++c) products_of<R, 1>(weights + c * k, x, k, result + c, apart, ahead);
  };
  for (; rows >= kRowsAtOnce; rows -= kRowsAtOnce, x += kRowsAtOnce * k, result += kRowsAtOnce * apart) {
    some.template operator()<kRowsAtOnce, 1>();
  }
  switch (rows) {
    case 1: return some.template operator()<1, 4>();
    case 2: return some.template operator()<2, 2>();
    case 3: return some.template operator()<3, 1>();
  }
}

}  // namespace t2app
