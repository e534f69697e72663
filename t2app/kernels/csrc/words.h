// Words, integers of 16 bits: numbers rounded to them, a row at a time, and what multiplies them. CPUs that do not multiply
// bfloat16 multiply twice as many words at a time as float32, and more where they have AVX-512 VNNI.
//
// The sum of a row's products is exact from there on, in whichever order, since no sum of products of two rows, or of
// parts of them, leaves 32 bits: by Cauchy-Schwarz it is no larger than the product of both norms, which are bounded.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "scratch.h"
#include "vector.h"

namespace t2app {

// What `tiles.h` multiplies.
#ifdef __AVX512BW__
struct OfWords {
  using Element = int16_t;
  using Register = __m512i;
  using Sums = __m512i;
  using Total = int32_t;
  static constexpr int kRows = 8, kColumns = 3;
  static constexpr int64_t kBlock = 32;

  static Register load(const Element* row) { return _mm512_loadu_si512(row); }
  static Register load_column(const Element* column) { return load(column); }
  static Sums zeros() { return _mm512_setzero_si512(); }
  static void add(Sums& sums, Register row, Register column) {
#ifdef __AVX512VNNI__
    // As an intrinsic GCC 12 keeps copies of the sums on the stack.
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(row), "v"(column));
#else
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(row, column));
#endif
  }
  static __m512 as_lanes(Sums sums) { return _mm512_castsi512_ps(sums); }
};
#else
struct OfWords {
  using Element = int16_t;
  using Register = __m256i;
  using Sums = __m256i;
  using Total = int32_t;
  static constexpr int kRows = 4, kColumns = 2;
  static constexpr int64_t kBlock = 16;

  static Register load(const Element* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
  static Register load_column(const Element* column) { return load(column); }
  static Sums zeros() { return _mm256_setzero_si256(); }
  static void add(Sums& sums, Register row, Register column) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(row, column));
  }
  static Floats as_lanes(Sums sums) { return _mm256_castsi256_ps(sums); }
};
#endif

// A little below what 32 and 16 bits allow: rounding to words makes a norm larger by half of the root of a row's length at
// most, and a number by a half.
constexpr float kLargestNorm = 46000, kLargestWord = 32766;
constexpr int64_t kLongestRowOfWords = 1 << 18;
// A row of smaller numbers is one of zeros.
constexpr float kSmallestOfRow = 1e-30f;

// By what a row in whole blocks is multiplied before it is rounded to words; 0 where it has nothing but zeros, and no number
// where it holds one that is none. A power of two: bfloat16 has eight bits, so that all of a row but the least stays as it is.
inline float word_scale(const float* values, int64_t length) {
  const float largest = largest_magnitude(values, length);
  const float inverse = largest > kSmallestOfRow ? 1 / largest : 0;
  Floats squares = zeros();
  for (int64_t i = 0; i < length; i += kLanes) {
    const Floats value = load(values + i) * inverse;
    squares = multiply_add(value, value, squares);
  }
  const float norm = std::sqrt(sum(squares));
  // In this order the smaller of a number and what is none is what is none.
  return norm == 0 ? 0 : std::exp2(std::floor(std::log2(std::min(kLargestNorm / norm, kLargestWord) * inverse)));
}

// A block of words in order, from its even and its odd elements.
inline void store_words(int16_t* target, Floats even, Floats odd, float scale) {
  const __m256i low = _mm256_cvtps_epi32(even * scale), high = _mm256_slli_epi32(_mm256_cvtps_epi32(odd * scale), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_blend_epi16(low, high, 0xaa));
}

// Rows of numbers that are step · word, with a step for each row; zeros fill them up to what is multiplied together.
class WordRows {
 public:
  WordRows(int64_t count, int64_t length)
      : count(count),
        length(length),
        apart((length + OfWords::kBlock - 1) / OfWords::kBlock * OfWords::kBlock),
        steps(count),
        words_(count * apart) {
    for (int64_t row = 0; row < count; ++row) std::fill_n(words_.data() + row * apart + length, apart - length, 0);
  }

  // A row in even-first order.
  void set(int64_t row, const float* values) {
    const float scale = word_scale(values, length);
    for (int64_t i = 0; i < length; i += kBlock) {
      store_words(place(row) + i, load(values + i), load(values + i + kLanes), scale);
    }
    steps[row] = step_of(scale);
  }

  // A row of bfloat16, whose scale is known.
  void set(int64_t row, const uint16_t* values, float scale) {
    for (int64_t i = 0; i < length; i += kBlock) {
      const Pairs pairs = load_pairs(values + i);
      store_words(place(row) + i, even_elements(pairs), odd_elements(pairs), scale);
    }
    steps[row] = step_of(scale);
  }

  const int16_t* row(int64_t row) const { return words_.data() + row * apart; }

  // Rows, numbers of each, and how far from one to the next.
  const int64_t count, length, apart;
  Scratch<float> steps;

 private:
  static float step_of(float scale) { return scale == 0 ? 0 : 1 / scale; }
  int16_t* place(int64_t row) { return words_.data() + row * apart; }

  Scratch<int16_t> words_;
};

}  // namespace t2app
