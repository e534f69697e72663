// Bytes on CPUs that multiply 32 at a time and sum the products of each two to 16 bits (AVX2).

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <numeric>

#include "vector.h"

namespace t2app {

// What `tiles.h` multiplies: rows of x by vectors. They are products of an unsigned byte and a signed one: |x|, and an entry
// that has taken the sign of x. No sum of two such products overflows.
struct OfBytes {
  using Element = int8_t;
  using Register = __m256i;
  using Sums = __m256i;
  using Total = int32_t;
  static constexpr int kRows = 4, kColumns = 2;
  static constexpr int64_t kBlock = 32;
  static constexpr int32_t kOffset = 0;
  static constexpr int kRowsTogether = 2;

  static Register load(const Element* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
  static Register load_column(const Element* column) { return load(column); }
  static void store(Element* target, Register values) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), values); }
  static Sums zeros() { return _mm256_setzero_si256(); }
  static Sums all(int32_t value) { return _mm256_set1_epi32(value); }
  static void add(Sums& sums, Register row, Register column) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(column, row));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Floats as_lanes(Sums sums) { return _mm256_castsi256_ps(sums); }

  // The entries of four vectors in each place, side by side: half h of part p has the places from 16h + 4p on.
  static void interleave(Register a, Register b, Register c, Register d, Register (&parts)[4]) {
    const __m256i ab = _mm256_unpacklo_epi8(a, b), other_ab = _mm256_unpackhi_epi8(a, b);
    const __m256i cd = _mm256_unpacklo_epi8(c, d), other_cd = _mm256_unpackhi_epi8(c, d);
    parts[0] = _mm256_unpacklo_epi16(ab, cd);
    parts[1] = _mm256_unpackhi_epi16(ab, cd);
    parts[2] = _mm256_unpacklo_epi16(other_ab, other_cd);
    parts[3] = _mm256_unpackhi_epi16(other_ab, other_cd);
  }

  // Of four by four bytes side by side each column as a row.
  static Register turned_fours(Register values) {
    return _mm256_shuffle_epi8(values, _mm256_broadcastsi128_si256(
                                           _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
  }

  // scale · such parts in the order of their places; where `adds`, that much more.
  static void store_in_order(const Sums (&parts)[4], float scale, bool adds, float* target) {
    Floats s[4];
    for (int part = 0; part < 4; ++part) s[part] = _mm256_cvtepi32_ps(parts[part]) * scale;
    const Floats in_order[4] = {_mm256_permute2f128_ps(s[0], s[1], 0x20), _mm256_permute2f128_ps(s[2], s[3], 0x20),
                                _mm256_permute2f128_ps(s[0], s[1], 0x31), _mm256_permute2f128_ps(s[2], s[3], 0x31)};
    for (int part = 0; part < 4; ++part) {
      float* place = target + part * kLanes;
      t2app::store(place, adds ? t2app::load(place) + in_order[part] : in_order[part]);
    }
  }
};

// target = values · inverse, rounded; returns their sum.
inline int32_t round_to_bytes(const float* values, int64_t length, float inverse, int8_t* target) {
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < length; i += kBlock) {
    const __m256i first = _mm256_cvtps_epi32(load(values + i) * inverse);
    const __m256i second = _mm256_cvtps_epi32(load(values + i + kLanes) * inverse);
    const __m256i in_order = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), bytes);
    total = _mm256_add_epi32(total, _mm256_add_epi32(first, second));
  }
  int32_t lanes[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total);
  return std::accumulate(lanes, lanes + kLanes, 0);
}

}  // namespace t2app
