// Products of bfloat16 as it is, summed in float32, on CPUs that have them (AVX-512 BF16): twice as many at a time as
// float32 allows.

#pragma once

#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace t2app {

// What `tiles.h` multiplies.
struct OfBfloat16 {
  using Element = uint16_t;
  using Register = __m512bh;
  using Sums = __m512;
  using Total = float;
  static constexpr int kRows = 8, kColumns = 3;
  static constexpr int64_t kBlock = 32;

  static Register load(const Element* row) { return (Register)_mm512_loadu_si512(row); }
  static Register load_column(const Element* column) { return load(column); }
  static Sums zeros() { return _mm512_setzero_ps(); }
  static void add(Sums& sums, Register row, Register column) { sums = _mm512_dpbf16_ps(sums, row, column); }
  static __m512 as_lanes(Sums sums) { return sums; }
};
// The lengths of all rows of bfloat16 divide by it.
constexpr int64_t kDotBlock = OfBfloat16::kBlock;
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
  some(OfBfloat16::kRows, combine_rows<OfBfloat16::kRows>);
  some(4, combine_rows<4>);
  some(3, combine_rows<3>);
  some(2, combine_rows<2>);
  some(1, combine_rows<1>);
}

// target (count,) in bfloat16; `value` takes a place, the first of sixteen, and a mask of those that there are.
template <typename Value>
void store_rounded(uint16_t* target, int64_t count, const Value& value) {
  int64_t i = 0;
  const auto rounded = [&](__mmask16 there) { return (__m256i)_mm512_cvtneps_pbh(value(i, there)); };
  for (; i + kWideLanes <= count; i += kWideLanes) store_pairs(target + i, rounded(0xffff));
  if (i < count) {
    const __mmask16 there = (1 << (count - i)) - 1;
    _mm256_mask_storeu_epi16(target + i, there, rounded(there));
  }
}

inline __m512 load_some(const float* source, __mmask16 there) { return _mm512_maskz_loadu_ps(there, source); }
inline __m512 load_some(const uint16_t* source, __mmask16 there) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

}  // namespace t2app
