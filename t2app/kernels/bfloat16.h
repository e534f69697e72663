// bfloat16 in memory, float32 in registers (AVX2): no 16-bit arithmetic in the CPU is needed.
//
// Every row sums in the same order whatever the number of rows: what a row gets does not depend on its company.

#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <vector>

namespace t2app {

// How far ahead of its use memory is asked for. Left to itself the CPU reads the weights of a 135M model a fifth slower.
constexpr int64_t kPrefetchBytes = 4096;
inline void prefetch(const void* used_now) {
  _mm_prefetch(reinterpret_cast<const char*>(used_now) + kPrefetchBytes, _MM_HINT_T0);
}

constexpr int64_t kCacheLine = 64;
// What comes before `prefetch` asks for anything.
inline void prefetch_beginning(const void* used_soon) {
  for (int64_t i = 0; i < kPrefetchBytes; i += kCacheLine) {
    _mm_prefetch(reinterpret_cast<const char*>(used_soon) + i, _MM_HINT_T0);
  }
}

// Elements that are widened together; the lengths of all rows divide by it.
constexpr int64_t kBlock = 16;

// Sixteen bfloat16 as two vectors of float32: the even elements (the low halves of 32-bit lanes) and the odd ones.
// Two cheap instructions where widening in order takes a shuffle for every eight; x is put in this order once instead.
inline __m256 even_elements(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd_elements(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline __m256i load_pairs(const uint16_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}

// Where element i of a row stands once each block of sixteen holds its even elements first.
inline int64_t place(int64_t i) { return (i & ~int64_t{15}) + (i & 1) * 8 + ((i & 15) >> 1); }

inline void put_even_first(const uint16_t* row, int64_t length, float* result) {
  for (int64_t i = 0; i < length; i += kBlock) {
    const __m256i pairs = load_pairs(row + i);
    _mm256_storeu_ps(result + i, even_elements(pairs));
    _mm256_storeu_ps(result + i + 8, odd_elements(pairs));
  }
}

inline float widened(uint16_t value) { return at::BFloat16(value, at::BFloat16::from_bits()); }

inline float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// One row of a matrix (length k) against R rows of x in even-first order.
template <int R>
inline void products_of(const uint16_t* weights, const float* x, int64_t k, float* result) {
  __m256 even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i += kBlock) {
    prefetch(weights + i);
    const __m256i pairs = load_pairs(weights + i);
    const __m256 first = even_elements(pairs), second = odd_elements(pairs);
    for (int r = 0; r < R; ++r) {
      even[r] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x + r * k + i), even[r]);
      odd[r] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + r * k + i + 8), odd[r]);
    }
  }
  for (int r = 0; r < R; ++r) result[r] = sum(_mm256_add_ps(even[r], odd[r]));
}

constexpr int64_t kRowsAtOnce = 4;

// The same for `rows` rows of x, four at a time; result (rows,).
inline void products(int64_t rows, const uint16_t* weights, const float* x, int64_t k, float* result) {
  for (; rows >= kRowsAtOnce; rows -= kRowsAtOnce, x += kRowsAtOnce * k, result += kRowsAtOnce) {
    products_of<kRowsAtOnce>(weights, x, k, result);
  }
  switch (rows) {
    case 1: return products_of<1>(weights, x, k, result);
    case 2: return products_of<2>(weights, x, k, result);
    case 3: return products_of<3>(weights, x, k, result);
  }
}

inline const uint16_t* bits(const at::Tensor& tensor) {
  return reinterpret_cast<const uint16_t*>(tensor.const_data_ptr<at::BFloat16>());
}

}  // namespace t2app
