// Products of bytes, summed in 32-bit integers, on CPUs that have them (AVX-512 VNNI): four times as many at a time as
// float32 allows, and singular vectors of 8 bits are multiplied as they lie in memory.

#pragma once

#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace t2app {

// They are products of a signed byte and an unsigned one: an entry of a vector is met as entry + 128.
constexpr int32_t kByteOffset = 128;
inline __m512i load_unsigned(const int8_t* entries) {
  return _mm512_xor_si512(_mm512_loadu_si512(entries), _mm512_set1_epi8(static_cast<char>(kByteOffset)));
}

// sums += the products of each four unsigned and signed bytes, side by side. As an intrinsic GCC 12 keeps copies of many such
// sums on the stack, which halves the speed.
inline void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// What `tiles.h` multiplies: rows of x by vectors, with kByteOffset · Σ x too much.
struct OfBytes {
  using Element = int8_t;
  using Register = __m512i;
  using Sums = __m512i;
  static constexpr int64_t kBlock = 64;

  static Register load(const Element* row) { return _mm512_loadu_si512(row); }
  static Register load_column(const Element* column) { return load_unsigned(column); }
  static Sums zeros() { return _mm512_setzero_si512(); }
  static void add(Sums& sums, Register row, Register column) { add_products(sums, column, row); }
  static __m512 as_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
};

// Rows rounded to integers from −127 to 127 under a scale each; their length divides by 16.
class ByteRows {
 public:
  ByteRows(int64_t count, int64_t length) : count(count), length(length), scales(count), sums(count), bytes_(count * length) {}

  void set(int64_t row, const float* values) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += kWideLanes) largest = _mm512_max_ps(largest, _mm512_abs_ps(load_wide(values + i)));
    const float scale = _mm512_reduce_max_ps(largest) / 127, inverse = scale > 0 ? 1 / scale : 0;
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < length; i += kWideLanes) {
      const __m512i integers = _mm512_cvtps_epi32(load_wide(values + i) * inverse);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes_.data() + row * length + i), _mm512_cvtepi32_epi8(integers));
      total = _mm512_add_epi32(total, integers);
    }
    scales[row] = scale;
    sums[row] = _mm512_reduce_add_epi32(total);
  }

  const int8_t* row(int64_t row) const { return bytes_.data() + row * length; }

  const int64_t count, length;
  Scratch<float> scales;
  Scratch<int32_t> sums;

 private:
  Scratch<int8_t> bytes_;
};

// sums (R, narrow) = coefficients · vectors for R rows of coefficients from `first` on, and as many vectors, (…, narrow),
// as a row has; where `adds`, that much more. Memory is asked for from `next` on, in passing; null asks for none.
template <int R>
void combine_byte_rows(const ByteRows& coefficients, int64_t first, const int8_t* vectors, int64_t narrow, bool adds,
                       float* sums, const char* next) {
  for (int64_t column = 0; column < narrow; column += OfBytes::kBlock) {
    __m512i parts[R][4];
    for (int r = 0; r < R; ++r) {
      for (__m512i& part : parts[r]) part = _mm512_set1_epi32(-kByteOffset * coefficients.sums[first + r]);
    }
    for (int64_t v = 0; v < coefficients.length; v += 4) {
      if (next != nullptr) {
        _mm_prefetch(next, _MM_HINT_T1);
        next += kCacheLine;
      }
      // A place's entries of four vectors, side by side.
      const int8_t* entries = vectors + v * narrow + column;
      const __m512i a = load_unsigned(entries), b = load_unsigned(entries + narrow);
      const __m512i c = load_unsigned(entries + 2 * narrow), d = load_unsigned(entries + 3 * narrow);
      const __m512i ab = _mm512_unpacklo_epi8(a, b), other_ab = _mm512_unpackhi_epi8(a, b);
      const __m512i cd = _mm512_unpacklo_epi8(c, d), other_cd = _mm512_unpackhi_epi8(c, d);
      const __m512i fours[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                                _mm512_unpacklo_epi16(other_ab, other_cd), _mm512_unpackhi_epi16(other_ab, other_cd)};
      for (int r = 0; r < R; ++r) {
        int32_t of_row;
        std::memcpy(&of_row, coefficients.row(first + r) + v, sizeof(of_row));
        const __m512i four = _mm512_set1_epi32(of_row);
        for (int part = 0; part < 4; ++part) add_products(parts[r][part], fours[part], four);
      }
    }
    for (int r = 0; r < R; ++r) {
      // Quarter q of part p has the places from 16q + 4p on.
      __m512 s[4];
      for (int part = 0; part < 4; ++part) s[part] = _mm512_cvtepi32_ps(parts[r][part]) * coefficients.scales[first + r];
      const __m512 low = _mm512_shuffle_f32x4(s[0], s[1], 0x44), other_low = _mm512_shuffle_f32x4(s[2], s[3], 0x44);
      const __m512 high = _mm512_shuffle_f32x4(s[0], s[1], 0xee), other_high = _mm512_shuffle_f32x4(s[2], s[3], 0xee);
      const __m512 in_order[4] = {_mm512_shuffle_f32x4(low, other_low, 0x88), _mm512_shuffle_f32x4(low, other_low, 0xdd),
                                  _mm512_shuffle_f32x4(high, other_high, 0x88), _mm512_shuffle_f32x4(high, other_high, 0xdd)};
      for (int part = 0; part < 4; ++part) {
        float* target = sums + r * narrow + column + part * kWideLanes;
        store(target, adds ? load_wide(target) + in_order[part] : in_order[part]);
      }
    }
  }
}

// The same for all rows of coefficients. `next` is where the thread reads on afterwards, which it has begun to ask for;
// null where that is not known.
inline void combine_bytes(const ByteRows& coefficients, const int8_t* vectors, int64_t narrow, bool adds, float* sums,
                          const char* next) {
  if (next != nullptr) next += kFarBytes;
  int64_t row = 0;
  const auto some = [&](int together, auto combined) {
    for (; row + together <= coefficients.count; row += together) {
      combined(coefficients, row, vectors, narrow, adds, sums + row * narrow, next);
      next = nullptr;
    }
  };
  some(4, combine_byte_rows<4>);
  some(3, combine_byte_rows<3>);
  some(2, combine_byte_rows<2>);
  some(1, combine_byte_rows<1>);
}

}  // namespace t2app
