// Matrix products in words for many rows: some columns of x Wᵀ at a time, whose weights are rounded once for all rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "columns.h"
#include "scratch.h"
#include "tiles.h"
#include "words.h"

namespace t2app {

// Columns of a panel, in whole tiles: it stays in the second cache at least.
constexpr int64_t kPanelColumns = 8 * OfWords::kColumns;

// totals (x.count, kPanelColumns) = x panelᵀ.
inline void multiply_panel(const WordRows& x, const WordRows& panel, int32_t* totals, AskedInPassing& next) {
  int64_t row = 0;
  const auto tiles = [&]<int R>() {
    for (; row + R <= x.count; row += R) {
      for (int64_t column = 0; column < kPanelColumns; column += OfWords::kColumns) {
        next.ask();
        dot_tile<OfWords, R, OfWords::kColumns>(x.row(row), panel.row(column), x.apart,
                                                totals + row * kPanelColumns + column, kPanelColumns, InCache());
      }
    }
  };
  tiles.template operator()<OfWords::kRows>();
  tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// x Wᵀ for W (n, x.length) in bfloat16, whose rows have such `scales`.
inline void multiply_many(const WordRows& x, const uint16_t* weight, const float* scales, int64_t n, const Ahead& ahead,
                          const StoreColumns<float>& store) {
  const int64_t k = x.length, panel_bytes = kPanelColumns * k * sizeof(*weight);
  WordRows panel(kPanelColumns, k);
  Scratch<int32_t> totals(x.count * kPanelColumns);
  float values[kPanelColumns];
  for (int64_t first = 0; first < n; first += kPanelColumns) {
    const int64_t columns = std::min(kPanelColumns, n - first), after = first + kPanelColumns;
    for (int64_t c = 0; c < columns; ++c) panel.set(c, weight + (first + c) * k, scales[first + c]);
    const char* begin_of_next = after < n ? reinterpret_cast<const char*>(weight + after * k) : ahead.next();
    AskedInPassing next(begin_of_next, begin_of_next == nullptr ? 0 : panel_bytes, x.count);
    multiply_panel(x, panel, totals.data(), next);
    for (int64_t row = 0; row < x.count; ++row) {
      for (int64_t c = 0; c < columns; ++c) {
        values[c] = static_cast<float>(totals[row * kPanelColumns + c]) * (x.steps[row] * panel.steps[c]);
      }
      store(row, first, columns, values);
    }
  }
}

}  // namespace t2app
