// Bytes on CPUs that multiply 64 at a time and sum the products of each four (AVX-512 VNNI).

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vector.h"

namespace t2app {

// sums += the products of each four unsigned and signed bytes, side by side. As an intrinsic GCC 12 keeps copies of many such
// sums on the stack, which halves the speed.
inline void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// What `tiles.h` multiplies: rows of x by vectors, with kOffset · Σ x too much. They are products of a signed byte and an
// unsigned one: to an entry of a vector kOffset is added.
struct OfBytes {
  using Element = int8_t;
  using Register = __m512i;
  using Sums = __m512i;
  using Total = int32_t;
  static constexpr int kRows = 8, kColumns = 3;
  static constexpr int64_t kBlock = 64;
  static constexpr int32_t kOffset = 128;
  static constexpr int kRowsTogether = 4;

  static Register load(const Element* row) { return _mm512_loadu_si512(row); }
  static Register load_column(const Element* column) {
    return _mm512_xor_si512(_mm512_loadu_si512(column), _mm512_set1_epi8(static_cast<char>(kOffset)));
  }
  static void store(Element* target, Register values) { _mm512_storeu_si512(target, values); }
  static Sums zeros() { return _mm512_setzero_si512(); }
  static Sums all(int32_t value) { return _mm512_set1_epi32(value); }
  static void add(Sums& sums, Register row, Register column) { add_products(sums, column, row); }
  static __m512 as_lanes(Sums sums) { return _mm512_castsi512_ps(sums); }

  // The entries of four vectors in each place, side by side: quarter q of part p has the places from 16q + 4p on.
  static void interleave(Register a, Register b, Register c, Register d, Register (&parts)[4]) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), other_ab = _mm512_unpackhi_epi8(a, b);
    const __m512i cd = _mm512_unpacklo_epi8(c, d), other_cd = _mm512_unpackhi_epi8(c, d);
    parts[0] = _mm512_unpacklo_epi16(ab, cd);
    parts[1] = _mm512_unpackhi_epi16(ab, cd);
    parts[2] = _mm512_unpacklo_epi16(other_ab, other_cd);
    parts[3] = _mm512_unpackhi_epi16(other_ab, other_cd);
  }

  // Of four by four bytes side by side each column as a row.
  static Register turned_fours(Register values) {
    return _mm512_shuffle_epi8(values, _mm512_broadcast_i32x4(
                                           _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
  }

  // scale · such parts in the order of their places; where `adds`, that much more.
  static void store_in_order(const Sums (&parts)[4], float scale, bool adds, float* target) {
    __m512 s[4];
    for (int part = 0; part < 4; ++part) s[part] = _mm512_cvtepi32_ps(parts[part]) * scale;
    const __m512 low = _mm512_shuffle_f32x4(s[0], s[1], 0x44), other_low = _mm512_shuffle_f32x4(s[2], s[3], 0x44);
    const __m512 high = _mm512_shuffle_f32x4(s[0], s[1], 0xee), other_high = _mm512_shuffle_f32x4(s[2], s[3], 0xee);
    const __m512 in_order[4] = {_mm512_shuffle_f32x4(low, other_low, 0x88), _mm512_shuffle_f32x4(low, other_low, 0xdd),
                                _mm512_shuffle_f32x4(high, other_high, 0x88), _mm512_shuffle_f32x4(high, other_high, 0xdd)};
    for (int part = 0; part < 4; ++part) {
      float* place = target + part * kWideLanes;
      t2app::store(place, adds ? load_wide(place) + in_order[part] : in_order[part]);
    }
  }
};

// target = values · inverse, rounded; returns their sum.
inline int32_t round_to_bytes(const float* values, int64_t length, float inverse, int8_t* target) {
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < length; i += kWideLanes) {
    const __m512i integers = _mm512_cvtps_epi32(load_wide(values + i) * inverse);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm512_cvtepi32_epi8(integers));
    total = _mm512_add_epi32(total, integers);
  }
  return _mm512_reduce_add_epi32(total);
}

}  // namespace t2app
