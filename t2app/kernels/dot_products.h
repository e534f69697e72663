// Products of bfloat16 as it is, summed in float32, on CPUs that have them (AVX-512 BF16): twice as many at a time as
// float32 allows.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "bfloat16.h"

namespace t2app {

// Elements that are multiplied together; the lengths of all rows divide by it.
constexpr int64_t kDotBlock = 32;
// A tile's rows of x and of W: their sums are most of the registers that there are.
constexpr int kDotRows = 8, kDotColumns = 3;
constexpr int kSumsAtOnce = 8;
// Columns of a result that are stored together.
constexpr int64_t kColumnsAtOnce = kDotColumns * kWideLanes;

// The sum of each of eight registers, in a quarter of the instructions that eight sums take one by one.
[[gnu::always_inline]] inline __m256 sums_of_eight(const __m512* values) {
  const auto added = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto added_pairs = [](__m512 first, __m512 second) {
    const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  // Each quarter of these holds four sums over that quarter.
  const __m512 four = added_pairs(added(values[0], values[1]), added(values[2], values[3]));
  const __m512 others = added_pairs(added(values[4], values[5]), added(values[6], values[7]));
  const __m512 halves = _mm512_add_ps(_mm512_shuffle_f32x4(four, others, 0x44), _mm512_shuffle_f32x4(four, others, 0xee));
  const __m512 sums = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
  return _mm512_castps512_ps256(_mm512_shuffle_f32x4(sums, sums, 0x08));
}

// result (R, C), its rows `apart` from each other: R rows of x by C rows of W, both of length k.
template <int R, int C>
void dot_tile(const uint16_t* x, const uint16_t* weights, int64_t k, float* result, int64_t apart) {
  // Registers of zeros fill up the last eight, so that every sum is taken in the same order, whatever R and C are.
  constexpr int kSums = (R * C + kSumsAtOnce - 1) / kSumsAtOnce * kSumsAtOnce;
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += kDotBlock) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      columns[c] = (__m512bh)_mm512_loadu_si512(weights + c * k + i);
      prefetch(weights + c * k + i);
    }
    for (int r = 0; r < R; ++r) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(x + r * k + i);
      for (int c = 0; c < C; ++c) sums[r * C + c] = _mm512_dpbf16_ps(sums[r * C + c], row, columns[c]);
    }
  }
  float totals[kSums];
  for (int i = 0; i < kSums; i += kSumsAtOnce) _mm256_storeu_ps(totals + i, sums_of_eight(sums + i));
  for (int r = 0; r < R; ++r) std::copy_n(totals + r * C, C, result + r * apart);
}

// The same for `rows` rows of x.
template <int C>
void dot_columns(const uint16_t* x, int64_t rows, const uint16_t* weights, int64_t k, float* result, int64_t apart) {
  int64_t row = 0;
  const auto tiles = [&](int count, auto tile) {
    for (; row + count <= rows; row += count) tile(x + row * k, weights, k, result + row * apart, apart);
  };
  tiles(kDotRows, dot_tile<kDotRows, C>);
  tiles(4, dot_tile<4, C>);
  tiles(2, dot_tile<2, C>);
  tiles(1, dot_tile<1, C>);
}

// Columns begin to end of x Wᵀ for x (rows, k) and W (n, k); `store` takes a row, the first of some columns that follow
// one another, how many they are, and their values.
template <typename Store>
void dot_multiply(const uint16_t* x, int64_t rows, const uint16_t* weight, int64_t begin, int64_t end, int64_t k,
                  const Store& store) {
  const std::unique_ptr<float[]> results(new float[rows * kColumnsAtOnce]);
  for (int64_t first = begin; first < end; first += kColumnsAtOnce) {
    const int64_t count = std::min(kColumnsAtOnce, end - first);
    const uint16_t* weights = weight + first * k;
    int64_t c = 0;
    for (; c + kDotColumns <= count; c += kDotColumns) {
      dot_columns<kDotColumns>(x, rows, weights + c * k, k, results.get() + c, kColumnsAtOnce);
    }
    for (; c < count; ++c) dot_columns<1>(x, rows, weights + c * k, k, results.get() + c, kColumnsAtOnce);
    for (int64_t row = 0; row < rows; ++row) store(row, first, count, results.get() + row * kColumnsAtOnce);
  }
}

// sums (R, narrow) = coefficients (R, count) · vectors (count, narrow); the coefficients are bfloat16 in pairs, of which
// the last one of an odd count has a zero.
template <int R>
void combine_rows(const uint32_t* coefficients, int64_t count, const uint16_t* vectors, int64_t narrow, float* sums) {
  const int64_t pairs = (count + 1) / 2;
  for (int64_t column = 0; column < narrow; column += kDotBlock) {
    // Of every eight columns the first four and the last four, as interleaving two vectors leaves them.
    __m512 low[R], high[R];
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
      const __m512i first = _mm512_loadu_si512(vectors + 2 * p * narrow + column);
      const __m512i second = _mm512_loadu_si512(vectors + std::min(2 * p + 1, count - 1) * narrow + column);
      const __m512bh lows = (__m512bh)_mm512_unpacklo_epi16(first, second);
      const __m512bh highs = (__m512bh)_mm512_unpackhi_epi16(first, second);
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(coefficients[r * pairs + p]));
        low[r] = _mm512_dpbf16_ps(low[r], pair, lows);
        high[r] = _mm512_dpbf16_ps(high[r], pair, highs);
      }
    }
    for (int r = 0; r < R; ++r) {
      float lows[16], highs[16];
      _mm512_storeu_ps(lows, low[r]);
      _mm512_storeu_ps(highs, high[r]);
      for (int lane = 0; lane < 4; ++lane) {
        std::memcpy(sums + r * narrow + column + 8 * lane, lows + 4 * lane, 4 * sizeof(float));
        std::memcpy(sums + r * narrow + column + 8 * lane + 4, highs + 4 * lane, 4 * sizeof(float));
      }
    }
  }
}

// The same for `rows` rows of coefficients.
inline void combine(int64_t rows, const uint32_t* coefficients, int64_t count, const uint16_t* vectors, int64_t narrow,
                    float* sums) {
  int64_t row = 0;
  const auto some = [&](int together, auto combined) {
    for (; row + together <= rows; row += together) {
      combined(coefficients + row * ((count + 1) / 2), count, vectors, narrow, sums + row * narrow);
    }
  };
  some(kDotRows, combine_rows<kDotRows>);
  some(4, combine_rows<4>);
  some(3, combine_rows<3>);
  some(2, combine_rows<2>);
  some(1, combine_rows<1>);
}

// target (count,) in bfloat16; `value` takes a place, the first of sixteen, and a mask of those that there are.
template <typename Value>
void store_rounded(uint16_t* target, int64_t count, const Value& value) {
  for (int64_t i = 0; i < count; i += kWideLanes) {
    const __mmask16 there = count - i < kWideLanes ? (1 << (count - i)) - 1 : 0xffff;
    _mm256_mask_storeu_epi16(target + i, there, (__m256i)_mm512_cvtneps_pbh(value(i, there)));
  }
}

inline __m512 load_some(const float* source, __mmask16 there) { return _mm512_maskz_loadu_ps(there, source); }
inline __m512 load_some(const uint16_t* source, __mmask16 there) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

}  // namespace t2app
