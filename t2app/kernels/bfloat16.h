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

// One row of a matrix (length k) against R rows of x in even-first order.
template <int R>
inline void products_of(const uint16_t* weights, const float* x, int64_t k, float* result, const Ahead& ahead) {
  // A sum waits for its last addition: two in turn keep up with the memory where one does not.
  constexpr int kTurns = 2;
  Floats even[kTurns][R], odd[kTurns][R];
  for (int turn = 0; turn < kTurns; ++turn)
    for (int r = 0; r < R; ++r) even[turn][r] = odd[turn][r] = zeros();
  const auto add = [&](int turn, int64_t i) {
    ahead.of(weights + i);
    const Pairs pairs = load_pairs(weights + i);
    const Floats first = even_elements(pairs), second = odd_elements(pairs);
    for (int r = 0; r < R; ++r) {
      even[turn][r] = multiply_add(first, load(x + r * k + i), even[turn][r]);
      odd[turn][r] = multiply_add(second, load(x + r * k + i + kLanes), odd[turn][r]);
    }
  };
  int64_t i = 0;
  for (; i + kTurns * kBlock <= k; i += kTurns * kBlock) {
    for (int turn = 0; turn < kTurns; ++turn) add(turn, i + turn * kBlock);
  }
  if (i < k) add(0, i);
  for (int r = 0; r < R; ++r) result[r] = sum((even[0][r] + odd[0][r]) + (even[1][r] + odd[1][r]));
}

constexpr int64_t kRowsAtOnce = 4;

// The same for `rows` rows of x, four at a time; result (rows,).
inline void products(int64_t rows, const uint16_t* weights, const float* x, int64_t k, float* result,
                     const Ahead& ahead = {}) {
  for (; rows >= kRowsAtOnce; rows -= kRowsAtOnce, x += kRowsAtOnce * k, result += kRowsAtOnce) {
    products_of<kRowsAtOnce>(weights, x, k, result, ahead);
  }
  switch (rows) {
    case 1: return products_of<1>(weights, x, k, result, ahead);
    case 2: return products_of<2>(weights, x, k, result, ahead);
    case 3: return products_of<3>(weights, x, k, result, ahead);
  }
}

}  // namespace t2app
