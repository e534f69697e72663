// Matrix products in tiles whose sums stay in registers. What is multiplied is a type's affair:
//
//   Element: of a row, as it lies in memory.
//   Register, Sums: kBlock elements together, and what their products are summed in.
//   kRows, kColumns: a tile's rows of x and of W, whose sums fit in the registers that there are.
//   load, load_column: of a row of x, and of W, which is read once for several of x; add: their products to the sums;
//       zeros, as_lanes: no sums yet, and sums as a register of float32, whose lanes are a Total each.
//   Total: what is summed in the end, float or int32_t.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ahead.h"
#include "columns.h"
#include "vector.h"
#include "scratch.h"

namespace t2app {

constexpr int kSumsAtOnce = 8;
// Columns of a result that are stored together.
constexpr int64_t kColumnsAtOnce = 48;

// Sums of lanes of 32 bits that are `Total`: float or int32_t.
template <typename Total>
inline __m256 lane_sums(__m256 a, __m256 b) {
  if constexpr (std::is_same_v<Total, float>) return _mm256_add_ps(a, b);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

// The sum of each of eight registers, in a quarter of the instructions that eight sums take one by one.
template <typename Total>
[[gnu::always_inline]] inline __m256 sums_of_eight(const __m256* values) {
  const auto added = [](__m256 a, __m256 b) {
    return lane_sums<Total>(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  };
  const auto added_pairs = [](__m256 first, __m256 second) {
    const __m256d a = _mm256_castps_pd(first), b = _mm256_castps_pd(second);
    return lane_sums<Total>(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  };
  // Each half of these holds four sums over that half.
  const __m256 four = added_pairs(added(values[0], values[1]), added(values[2], values[3]));
  const __m256 others = added_pairs(added(values[4], values[5]), added(values[6], values[7]));
  return lane_sums<Total>(_mm256_permute2f128_ps(four, others, 0x20), _mm256_permute2f128_ps(four, others, 0x31));
}

#ifdef __AVX512F__
template <typename Total>
inline __m512 lane_sums(__m512 a, __m512 b) {
  if constexpr (std::is_same_v<Total, float>) return _mm512_add_ps(a, b);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

template <typename Total>
[[gnu::always_inline]] inline __m256 sums_of_eight(const __m512* values) {
  const auto added = [](__m512 a, __m512 b) {
    return lane_sums<Total>(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const auto added_pairs = [](__m512 first, __m512 second) {
    const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    return lane_sums<Total>(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  // Each quarter of these holds four sums over that quarter.
  const __m512 four = added_pairs(added(values[0], values[1]), added(values[2], values[3]));
  const __m512 others = added_pairs(added(values[4], values[5]), added(values[6], values[7]));
  const __m512 halves =
      lane_sums<Total>(_mm512_shuffle_f32x4(four, others, 0x44), _mm512_shuffle_f32x4(four, others, 0xee));
  const __m512 sums = lane_sums<Total>(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
  return _mm512_castps512_ps256(_mm512_shuffle_f32x4(sums, sums, 0x08));
}
#endif

// result (R, C), its rows `apart` from each other, from the sums of each row of x by each of W.
template <typename Of, int R, int C>
[[gnu::always_inline]] inline void store_totals(const typename Of::Sums (&sums)[R * C], typename Of::Total* result, int64_t apart) {
  // Registers of zeros fill up the last eight, so that every sum is taken in the same order, whatever R and C are.
  using Register = decltype(Of::as_lanes(sums[0]));
  constexpr int kSums = (R * C + kSumsAtOnce - 1) / kSumsAtOnce * kSumsAtOnce;
  typename Of::Total totals[kSums];
#pragma GCC unroll 4
  for (int first = 0; first < kSums; first += kSumsAtOnce) {
    Register eight[kSumsAtOnce];
#pragma GCC unroll 8
    for (int i = 0; i < kSumsAtOnce; ++i) eight[i] = first + i < R * C ? Of::as_lanes(sums[first + i]) : Register{};
    _mm256_storeu_ps(reinterpret_cast<float*>(totals + first), sums_of_eight<typename Of::Total>(eight));
  }
  for (int r = 0; r < R; ++r) std::copy_n(totals + r * C, C, result + r * apart);
}

// R rows of x by C rows of W, both of length k, side by side. `ahead` asks for rows of W before they are read.
template <typename Of, int R, int C, typename Asks = Ahead>
void dot_tile(const typename Of::Element* x, const typename Of::Element* weights, int64_t k, typename Of::Total* result, int64_t apart,
              const Asks& ahead = {}) {
  typename Of::Sums sums[R * C];
  // Else they would be set, and copied, as memory.
#pragma GCC unroll 32
  for (auto& sum : sums) sum = Of::zeros();
  for (int64_t i = 0; i < k; i += Of::kBlock) {
    typename Of::Register columns[C];
    for (int c = 0; c < C; ++c) {
      columns[c] = Of::load_column(weights + c * k + i);
      ahead.of(weights + c * k + i);
    }
    for (int r = 0; r < R; ++r) {
      const auto row = Of::load(x + r * k + i);
      for (int c = 0; c < C; ++c) Of::add(sums[r * C + c], row, columns[c]);
    }
  }
  store_totals<Of, R, C>(sums, result, apart);
}

// The same with the rows of W one after another, as they lie in memory, which gives them faster so.
template <typename Of, int R, int C>
void dot_tile_in_turn(const typename Of::Element* x, const typename Of::Element* weights, int64_t k, typename Of::Total* result,
                      int64_t apart, const Ahead& ahead) {
  typename Of::Sums sums[R * C];
#pragma GCC unroll 32
  for (auto& sum : sums) sum = Of::zeros();
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    for (int64_t i = 0; i < k; i += Of::kBlock) {
      const auto column = Of::load_column(weights + c * k + i);
      ahead.of(weights + c * k + i);
      for (int r = 0; r < R; ++r) Of::add(sums[r * C + c], Of::load(x + r * k + i), column);
    }
  }
  store_totals<Of, R, C>(sums, result, apart);
}

// C rows of W by all rows of x.
template <typename Of, int C>
void dot_columns(const typename Of::Element* x, int64_t rows, const typename Of::Element* weights, int64_t k, typename Of::Total* result,
                 int64_t apart, const Ahead& ahead) {
  int64_t row = 0;
  const auto tiles = [&](int count, auto tile) {
    for (; row + count <= rows; row += count) tile(x + row * k, weights, k, result + row * apart, apart, ahead);
  };
  tiles(Of::kRows, dot_tile<Of, Of::kRows, C>);
  tiles(4, dot_tile<Of, 4, C>);
  tiles(2, dot_tile<Of, 2, C>);
  tiles(1, dot_tile<Of, 1, C>);
}

// kSumsAtOnce rows of W by all rows of x, of which there are fewer than Of::kRows.
template <typename Of>
void dot_columns_in_turn(const typename Of::Element* x, int64_t rows, const typename Of::Element* weights, int64_t k,
                         typename Of::Total* result, int64_t apart, const Ahead& ahead) {
  int64_t row = 0;
  const auto tiles = [&]<int R>() {
    constexpr int kColumns = kSumsAtOnce / R;
    for (; row + R <= rows; row += R) {
      for (int c = 0; c < kSumsAtOnce; c += kColumns) {
        dot_tile_in_turn<Of, R, kColumns>(x + row * k, weights + c * k, k, result + row * apart + c, apart, ahead);
      }
    }
  };
  tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// Columns begin to end of x Wᵀ for x (rows, k) and W (n, k).
template <typename Of>
void dot_multiply(const typename Of::Element* x, int64_t rows, const typename Of::Element* weight, int64_t begin,
                  int64_t end, int64_t k, const Ahead& ahead, const StoreColumns<typename Of::Total>& store) {
  static_assert(kColumnsAtOnce % Of::kColumns == 0);
  Scratch<typename Of::Total> results(rows * kColumnsAtOnce);
  for (int64_t first = begin; first < end; first += kColumnsAtOnce) {
    const int64_t count = std::min(kColumnsAtOnce, end - first);
    const auto* weights = weight + first * k;
    int64_t c = 0;
    for (; rows < Of::kRows && c + kSumsAtOnce <= count; c += kSumsAtOnce) {
      dot_columns_in_turn<Of>(x, rows, weights + c * k, k, results.data() + c, kColumnsAtOnce, ahead);
    }
    for (; c + Of::kColumns <= count; c += Of::kColumns) {
      dot_columns<Of, Of::kColumns>(x, rows, weights + c * k, k, results.data() + c, kColumnsAtOnce, ahead);
    }
    for (; c < count; ++c) {
      dot_columns<Of, 1>(x, rows, weights + c * k, k, results.data() + c, kColumnsAtOnce, ahead);
    }
    for (int64_t row = 0; row < rows; ++row) store(row, first, count, results.data() + row * kColumnsAtOnce);
  }
}

}  // namespace t2app
