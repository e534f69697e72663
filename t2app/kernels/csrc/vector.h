// Registers of AVX2: eight float32, or sixteen bfloat16 in pairs.
//
// Sixteen bits times sixteen bits is nothing that most CPUs do: bfloat16 is widened where it is used. Of a register of
// pairs the even elements (the low halves of 32-bit lanes) and the odd ones are two cheap instructions away, where
// widening in order takes a shuffle for each; so what meets them is put in this order once.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace t2app {

constexpr int64_t kCacheLine = 64;

using Floats = __m256;
using Pairs = __m256i;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats load(const float* source) { return _mm256_loadu_ps(source); }
inline void store(float* target, Floats values) { _mm256_storeu_ps(target, values); }
// a · b + c
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Floats values) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline Pairs load_pairs(const uint16_t* source) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)); }
inline void store_pairs(uint16_t* target, Pairs pairs) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), pairs);
}
inline Floats even_elements(Pairs pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Floats odd_elements(Pairs pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
// Lanes whose high halves are bfloat16, rounded to the nearest, to even where two are as near.
inline Pairs rounded_lanes(Floats values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
}
inline Pairs rounded_pairs(Floats even, Floats odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded_lanes(even), 16), rounded_lanes(odd), 0xaa);
}

// Sixteen in order, from eight float32 and the next eight.
inline Pairs rounded_in_order(Floats first, Floats second) {
  const __m256i halves = _mm256_packus_epi32(_mm256_srli_epi32(rounded_lanes(first), 16),
                                             _mm256_srli_epi32(rounded_lanes(second), 16));
  return _mm256_permute4x64_epi64(halves, 0xd8);
}

constexpr int64_t kLanes = 8;
// Elements that are widened together; the lengths of all rows divide by it (`WIDTH` in build.py).
constexpr int64_t kBlock = 2 * kLanes;
// Where element i of a row stands once each block holds its even elements first.
inline int64_t place(int64_t i) { return i - i % kBlock + i % 2 * kLanes + i % kBlock / 2; }

inline float largest_magnitude(const float* values, int64_t length) {
  const Floats sign = all(-0.0f);
  Floats largest = zeros();
  for (int64_t i = 0; i < length; i += kLanes) largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, load(values + i)));
  float lanes[kLanes];
  store(lanes, largest);
  return *std::max_element(lanes, lanes + kLanes);
}

// exp of what is not above 0, within float32's rounding; exactly 0 below -87, where float32 ends, and of what is no number.
inline Floats exponential(Floats x) {
  const Floats least = all(-87.0f);
  const Floats bounded = _mm256_max_ps(x, least);
  // exp x = 2ⁿ exp r with |r| ≤ ln 2 / 2; ln 2 in two parts, so that n · ln 2 is not rounded.
  const Floats n = _mm256_round_ps(bounded * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), bounded));
  Floats series = all(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    series = multiply_add(series, r, all(coefficient));
  }
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const Floats result = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(series), power));
  return _mm256_and_ps(result, _mm256_cmp_ps(x, least, _CMP_GT_OQ));
}

// x / (1 + exp −x), by an exponential of what is not above 0.
inline Floats silu(Floats x) {
  const Floats sign = all(-0.0f), small = exponential(_mm256_or_ps(x, sign));
  const Floats one = all(1.0f), numerator = _mm256_blendv_ps(one, small, x);
  return x * (numerator / (one + small));
}

// A block in order, from even-first.
inline void put_in_order(const float* even_first, float* target) {
  const Floats even = load(even_first), odd = load(even_first + kLanes);
  const Floats low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  store(target, _mm256_permute2f128_ps(low, high, 0x20));
  store(target + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
}

#ifdef __AVX512F__
// And of AVX-512: sixteen float32.
constexpr int64_t kWideLanes = 16;
inline __m512 load_wide(const float* source) { return _mm512_loadu_ps(source); }
inline void store(float* target, __m512 values) { _mm512_storeu_ps(target, values); }
#endif

}  // namespace t2app
