// Matrices as `MatrixEdit` takes them: adding several, and rounding one to 8 bits.
//
// A mixture is z' − 1 = Σ αₖ (zₖ − 1), so its matrix V diag(z' − 1) Vᵀ is the same sum of its experts' matrices, which
// costs what reading them does, where to make one of the singular vectors takes a product of theirs.

#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "scratch.h"
#include "tensors.h"
#include "triangle.h"

namespace t2app {

// How often rows and columns are scaled before entries are rounded: an edit gets a little more exact each time, and ever
// less.
constexpr int kScalings = 3;
constexpr float kLargestByte = 127;
// Entries that lie together, a register for each two rows.
constexpr int64_t kRegistersTogether = kEntriesTogether / kLanes;

// Factors of a block's sixteen rows, as the registers of entries that lie together are multiplied by them; and of four
// columns.
struct RowFactors {
  explicit RowFactors(const float* rows) {
    for (int64_t i = 0; i < kRegistersTogether; ++i) {
      registers[i] = _mm256_set_m128(_mm_set1_ps(rows[2 * i + 1]), _mm_set1_ps(rows[2 * i]));
    }
  }
  Floats registers[kRegistersTogether];
};
inline Floats column_factors(const float* columns) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(columns)); }

inline Floats widened_bytes(const int8_t* bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
}

inline void store_bytes(int8_t* target, Floats values) {
  const __m256i integers = _mm256_cvtps_epi32(values);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packs_epi16(words, words));
}

// Σ factor · diag(scales) · integers · diag(scales) over triangles of int8, one of float32 (entries,).
//
// scales (terms, narrow) and factors (terms,) in float32.
inline Tensor sum_of_triangles(const std::vector<Tensor>& integers, const Tensor& scales, const Tensor& factors) {
  const int64_t terms = integers.size();
  for (const Tensor& of_terms : {scales, factors}) {
    STD_TORCH_CHECK(of_terms.scalar_type() == ScalarType::Float && of_terms.is_contiguous() && of_terms.size(0) == terms,
                    "scales and a factor in float32 were expected for each triangle");
  }
  STD_TORCH_CHECK(terms > 0 && scales.dim() == 2 && factors.dim() == 1 && scales.size(1) % kBlock == 0,
                  "triangles of matrices of ", kBlock, "·n were expected");
  const int64_t narrow = scales.size(1), blocks = narrow / kBlock, entries = entries_before(blocks);
  for (const Tensor& triangle : integers) {
    STD_TORCH_CHECK(triangle.scalar_type() == ScalarType::Char && triangle.is_contiguous() && triangle.numel() == entries,
                    "triangles in int8 were expected, of matrices of the same size");
  }
  const Tensor sums = torch::stable::empty({entries}, ScalarType::Float);
  float* target = sums.mutable_data_ptr<float>();
#pragma omp parallel num_threads(threads_for(entries))
  {
    const Share share = share_of_triangle(blocks);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const int64_t begin = entries_before(block), end = entries_before(block + 1);
      std::fill(target + begin, target + end, 0.0f);
      for (int64_t term = 0; term < terms; ++term) {
        const float* own = scales.const_data_ptr<float>() + term * narrow;
        float of_rows[kBlock];
        for (int64_t i = 0; i < kBlock; ++i) of_rows[i] = factors.const_data_ptr<float>()[term] * own[block * kBlock + i];
        const RowFactors rows(of_rows);
        const int8_t* bytes = integers[term].const_data_ptr<int8_t>();
        for (int64_t first = begin; first < end; first += kEntriesTogether, own += kColumnsTogether) {
          const Floats columns = column_factors(own);
          for (int64_t i = 0; i < kRegistersTogether; ++i) {
            float* place = target + first + i * kLanes;
            const Floats value = widened_bytes(bytes + first + i * kLanes) * rows.registers[i];
            store(place, multiply_add(value, columns, load(place)));
          }
        }
      }
    }
  }
  return sums;
}

// The largest magnitude in each row of a symmetric matrix once row and column i are multiplied by factors[i], as far as this
// thread's share of its triangle shows it: (narrow,).
inline void find_largest(const float* entries, const Share& share, const float* factors, float* largest) {
  const Floats sign = all(-0.0f);
  for (int64_t block = share.begin; block < share.end; ++block) {
    const RowFactors rows(factors + block * kBlock);
    Floats of_rows[kRegistersTogether];
    for (Floats& of_two : of_rows) of_two = zeros();
    const int64_t begin = entries_before(block), end = entries_before(block + 1);
    for (int64_t first = begin, column = 0; first < end; first += kEntriesTogether, column += kColumnsTogether) {
      const Floats columns = column_factors(factors + column);
      Floats of_columns = zeros();
      for (int64_t i = 0; i < kRegistersTogether; ++i) {
        const Floats value = load(entries + first + i * kLanes) * rows.registers[i] * columns;
        const Floats magnitude = _mm256_andnot_ps(sign, value);
        of_rows[i] = _mm256_max_ps(of_rows[i], magnitude);
        of_columns = _mm256_max_ps(of_columns, magnitude);
      }
      const __m128 four = _mm_max_ps(_mm256_castps256_ps128(of_columns), _mm256_extractf128_ps(of_columns, 1));
      _mm_storeu_ps(largest + column, _mm_max_ps(_mm_loadu_ps(largest + column), four));
    }
    for (int64_t row = 0; row < kBlock; ++row) {
      float four[kLanes];
      store(four, of_rows[row / 2]);
      const float* own = four + row % 2 * kColumnsTogether;
      largest[block * kBlock + row] = std::max(largest[block * kBlock + row], *std::max_element(own, own + kColumnsTogether));
    }
  }
}

// A triangle of float32 (entries,) of a matrix (narrow, narrow) as diag(scales) · integers · diag(scales): the integers, in
// int8, and the scales (narrow,).
//
// Rows and columns are scaled alike until the largest entry of each is near 127; none is ever larger.
inline std::tuple<Tensor, Tensor> packed_triangle(const Tensor& triangle, int64_t narrow) {
  STD_TORCH_CHECK(narrow > 0 && narrow % kBlock == 0, "a matrix of ", kBlock, "·n rows was expected");
  const int64_t blocks = narrow / kBlock, entries = entries_before(blocks), threads = threads_for(entries);
  STD_TORCH_CHECK(triangle.scalar_type() == ScalarType::Float && triangle.is_contiguous() && triangle.numel() == entries,
                  "the lower triangle of a matrix of that many rows in float32 was expected");
  const float* values = triangle.const_data_ptr<float>();
  const Tensor integers = torch::stable::empty({entries}, ScalarType::Char);
  const Tensor scales = torch::stable::empty({narrow}, ScalarType::Float);
  int8_t* bytes = integers.mutable_data_ptr<int8_t>();
  float* own_scales = scales.mutable_data_ptr<float>();
  std::fill_n(own_scales, narrow, 1.0f);
  Scratch<float> factors(narrow, 1.0f), largest(threads * narrow);
#pragma omp parallel num_threads(threads)
  {
    const Share share = share_of_triangle(blocks);
    float* own_largest = largest.data() + omp_get_thread_num() * narrow;
    for (int scaling = 0; scaling < kScalings; ++scaling) {
      std::fill_n(own_largest, narrow, 0.0f);
      find_largest(values, share, factors.data(), own_largest);
#pragma omp barrier
#pragma omp single
      for (int64_t i = 0; i < narrow; ++i) {
        float of_row = 0;
        for (int64_t thread = 0; thread < omp_get_num_threads(); ++thread) {
          of_row = std::max(of_row, largest[thread * narrow + i]);
        }
        if (of_row > 0) own_scales[i] *= std::sqrt(of_row);
        factors[i] = 1 / own_scales[i];
      }
    }
    const Floats most = all(kLargestByte);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const RowFactors rows(factors.data() + block * kBlock);
      const float* of_columns = factors.data();
      const int64_t end = entries_before(block + 1);
      for (int64_t first = entries_before(block); first < end; first += kEntriesTogether, of_columns += kColumnsTogether) {
        const Floats columns = column_factors(of_columns) * most;
        for (int64_t i = 0; i < kRegistersTogether; ++i) {
          const int64_t place = first + i * kLanes;
          store_bytes(bytes + place, load(values + place) * rows.registers[i] * columns);
        }
      }
    }
  }
  for (int64_t i = 0; i < narrow; ++i) own_scales[i] /= std::sqrt(kLargestByte);
  return {integers, scales};
}

}  // namespace t2app
