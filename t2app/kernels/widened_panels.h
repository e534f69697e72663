// Matrix products in float32 for many rows: some columns of x Wᵀ at a time, whose weights are widened once for all rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "columns.h"
#include "scratch.h"
#include "vector.h"

namespace t2app {

// Columns of a panel: two registers of float32, by which six rows fill the sixteen that there are.
constexpr int64_t kPanelColumns = 2 * kLanes;
constexpr int kPanelRows = 6;

// Lane i of register j to lane j of register i.
inline void transpose(Pairs (&registers)[kLanes]) {
  Pairs twos[kLanes], fours[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    twos[i] = _mm256_unpacklo_epi32(registers[i], registers[i + 1]);
    twos[i + 1] = _mm256_unpackhi_epi32(registers[i], registers[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm256_unpacklo_epi64(twos[i + half], twos[i + 2 + half]);
      fours[i + 2 * half + 1] = _mm256_unpackhi_epi64(twos[i + half], twos[i + 2 + half]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    registers[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    registers[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}

// panel (k, kPanelColumns) from rows of W (columns, k), their elements in even-first order; zeros where there is no column.
inline void widen_panel(const uint16_t* weights, int64_t columns, int64_t k, float* panel) {
  for (int64_t i = 0; i < k; i += kBlock) {
    for (int64_t first = 0; first < kPanelColumns; first += kLanes) {
      Pairs pairs[kLanes];
      for (int64_t c = 0; c < kLanes; ++c) {
        pairs[c] = first + c < columns ? load_pairs(weights + (first + c) * k + i) : _mm256_setzero_si256();
      }
      transpose(pairs);
      for (int64_t p = 0; p < kLanes; ++p) {
        store(panel + (i + p) * kPanelColumns + first, even_elements(pairs[p]));
        store(panel + (i + kLanes + p) * kPanelColumns + first, odd_elements(pairs[p]));
      }
    }
  }
}

// result (R, kPanelColumns) = x panel for R rows of x (…, k) in even-first order.
template <int R>
void multiply_panel(const float* x, const float* panel, int64_t k, float* result, AskedInPassing& next) {
  Floats sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = zeros();
  for (int64_t block = 0; block < k; block += kBlock) {
    next.ask();
    for (int64_t i = block; i < block + kBlock; ++i) {
      const Floats first = load(panel + i * kPanelColumns), second = load(panel + i * kPanelColumns + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats of_row = all(x[r * k + i]);
        sums[r][0] = multiply_add(first, of_row, sums[r][0]);
        sums[r][1] = multiply_add(second, of_row, sums[r][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    store(result + r * kPanelColumns, sums[r][0]);
    store(result + r * kPanelColumns + kLanes, sums[r][1]);
  }
}

// The same for `rows` rows, of which there are kPanelRows at most.
inline void multiply_panel_by(int64_t rows, const float* x, const float* panel, int64_t k, float* result,
                              AskedInPassing& next) {
  switch (rows) {
    case 1: return multiply_panel<1>(x, panel, k, result, next);
    case 2: return multiply_panel<2>(x, panel, k, result, next);
    case 3: return multiply_panel<3>(x, panel, k, result, next);
    case 4: return multiply_panel<4>(x, panel, k, result, next);
    case 5: return multiply_panel<5>(x, panel, k, result, next);
    case 6: return multiply_panel<6>(x, panel, k, result, next);
  }
}

// Columns begin to end of x Wᵀ for x (rows, k) in even-first order and W (n, k).
inline void multiply_many(const float* x, int64_t rows, const uint16_t* weight, int64_t begin, int64_t end, int64_t k,
                          const Ahead& ahead, const StoreColumns<float>& store) {
  // Of about one height: a panel is loaded once for a tile, so that one of two rows takes as long as one of four.
  const int64_t tiles = (rows + kPanelRows - 1) / kPanelRows, panel_bytes = kPanelColumns * k * sizeof(*weight);
  Scratch<float> panel(k * kPanelColumns), results(rows * kPanelColumns);
  for (int64_t first = begin; first < end; first += kPanelColumns) {
    const int64_t columns = std::min(kPanelColumns, end - first), after = first + kPanelColumns;
    widen_panel(weight + first * k, columns, k, panel.data());
    const char* begin_of_next = after < end ? reinterpret_cast<const char*>(weight + after * k) : ahead.next();
    AskedInPassing next(begin_of_next, begin_of_next == nullptr ? 0 : panel_bytes, tiles * k / kBlock);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
      multiply_panel_by(count, x + row * k, panel.data(), k, results.data() + row * kPanelColumns, next);
    }
    for (int64_t r = 0; r < rows; ++r) store(r, first, columns, results.data() + r * kPanelColumns);
  }
}

}  // namespace t2app
