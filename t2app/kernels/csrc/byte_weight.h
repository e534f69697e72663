// A weight in 8 bits, for decoding, which waits for memory: it is half of what bfloat16 takes.
//
// Of each 32 numbers of a row there are integers and a scale that they have in common; a number is scale · integer. For a
// few rows of x the integers are multiplied as they are by words: a scale's products are summed exactly, and all of a row's
// in float32. For more rows a weight is widened to bfloat16, some of its rows at a time, and multiplied as one that is.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "columns.h"
#include "tensors.h"
#include "tiles.h"
#include "vector.h"
#include "words.h"

namespace t2app {

// Numbers with a scale in common (`SCALED_TOGETHER` in byte_linear.py).
constexpr int64_t kScaledTogether = 32;

// Words by bytes; the sums are float32, which `store_totals` takes.
struct OfWordsByBytes {
  using Words = OfWords::Register;
  using Total = float;
#ifdef __AVX512BW__
  using Sums = __m512;
  static Words widened(const int8_t* bytes) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  }
  static Sums zeros() { return _mm512_setzero_ps(); }
  static void add(Sums& sums, OfWords::Sums products, float scale) {
    sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale), sums);
  }
#else
  using Sums = Floats;
  static Words widened(const int8_t* bytes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static Sums zeros() { return t2app::zeros(); }
  static void add(Sums& sums, OfWords::Sums products, float scale) {
    sums = multiply_add(_mm256_cvtepi32_ps(products), all(scale), sums);
  }
#endif
  static Sums as_lanes(Sums sums) { return sums; }
};

class ByteWeight {
 public:
  // integers (out_features, in_features) in int8, scales (out_features, in_features / 32) in float32.
  ByteWeight(const Tensor& integers, const Tensor& scales)
      : integers_of_all_(integers),
        scales_of_all_(scales),
        integers_(static_cast<const int8_t*>(integers.const_data_ptr())),
        scales_(static_cast<const float*>(scales.const_data_ptr())),
        length_(integers.size(1)) {
    STD_TORCH_CHECK(integers.scalar_type() == ScalarType::Char && integers.is_contiguous() && length_ % kScaledTogether == 0,
                    "a contiguous weight in int8 was expected, with rows of ", kScaledTogether, "·n");
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                        scales.numel() * kScaledTogether == integers.numel(),
                    "a scale in float32 was expected for each ", kScaledTogether, " numbers of a row");
  }

  const int8_t* integers(int64_t row) const { return integers_ + row * length_; }
  const float* scales(int64_t row) const { return scales_ + row * length_ / kScaledTogether; }

  // `count` rows from `first` on in bfloat16.
  void widen(int64_t first, int64_t count, const Ahead& ahead, uint16_t* target) const {
    const int8_t* source = integers(first);
    const float* scale = scales(first);
    for (int64_t i = 0; i < count * length_; i += kWidened) {
      if (i % kCacheLine == 0) ahead.of(source + i);
      store_widened(source + i, scale[i / kScaledTogether], target + i);
    }
  }

 private:
#ifdef __AVX512BF16__
  static constexpr int64_t kWidened = 2 * kWideLanes;
  static void store_widened(const int8_t* source, float scale, uint16_t* target) {
    const auto floats = [&](int64_t i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)) * _mm512_set1_ps(scale);
    };
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(floats(kWideLanes), floats(0)));
  }
#else
  static constexpr int64_t kWidened = kBlock;
  static void store_widened(const int8_t* source, float scale, uint16_t* target) {
    const auto floats = [&](int64_t i) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source + i));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)) * all(scale);
    };
    store_pairs(target, rounded_in_order(floats(0), floats(kLanes)));
  }
#endif

  const Tensor integers_of_all_, scales_of_all_;
  // Asking a tensor for them takes as long as a row.
  const int8_t* integers_;
  const float* scales_;
  const int64_t length_;
};

// result (R, C), its rows `apart`: R rows of x by C rows of the weight, each lacking the step of its row of x.
template <int R, int C>
void dot_bytes(const WordRows& x, int64_t row, const ByteWeight& weight, int64_t column, float* result, int64_t apart,
               const Ahead& ahead) {
  using Of = OfWordsByBytes;
  constexpr int kRegisters = kScaledTogether / OfWords::kBlock;
  const int16_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.row(row + r);
  Of::Sums sums[R * C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    // In `sums` GCC 12 would keep them as memory.
    Of::Sums own[R];
#pragma GCC unroll 4
    for (auto& sum : own) sum = Of::zeros();
    const int8_t* integers = weight.integers(column + c);
    const float* scales = weight.scales(column + c);
    for (int64_t i = 0; i < x.length; i += kScaledTogether) {
      if (i % kCacheLine == 0) ahead.of(integers + i);
      Of::Words words[kRegisters];
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) words[j] = Of::widened(integers + i + j * OfWords::kBlock);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        OfWords::Sums products = OfWords::zeros();
#pragma GCC unroll 4
        for (int j = 0; j < kRegisters; ++j) {
          OfWords::add(products, OfWords::load(rows[r] + i + j * OfWords::kBlock), words[j]);
        }
        Of::add(own[r], products, scales[i / kScaledTogether]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r * C + c] = own[r];
  }
  store_totals<Of, R, C>(sums, result, apart);
}

// Columns begin to end of x Wᵀ for a few rows of x.
inline void multiply_few(const WordRows& x, const ByteWeight& weight, int64_t begin, int64_t end, const Ahead& ahead,
                         const StoreColumns<float>& store) {
  constexpr int64_t kMostRows = 4;
  float values[kMostRows][kSumsAtOnce];
  for (int64_t first = begin; first < end; first += kSumsAtOnce) {
    const int64_t columns = std::min<int64_t>(kSumsAtOnce, end - first);
    for (int64_t row = 0; row < x.count; row += kMostRows) {
      const int64_t rows = std::min(kMostRows, x.count - row);
      const auto products = [&]<int R>() {
        constexpr int C = kSumsAtOnce / R;
        int64_t c = 0;
        for (; c + C <= columns; c += C) dot_bytes<R, C>(x, row, weight, first + c, values[0] + c, kSumsAtOnce, ahead);
        for (; c < columns; ++c) dot_bytes<R, 1>(x, row, weight, first + c, values[0] + c, kSumsAtOnce, ahead);
      };
      switch (rows) {
        case 1: products.template operator()<1>(); break;
        case 2: products.template operator()<2>(); break;
        case 3: products.template operator()<3>(); break;
        default: products.template operator()<4>();
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) values[r][c] *= x.steps[row + r];
        store(row + r, first, columns, values[r]);
      }
    }
  }
}

}  // namespace t2app
