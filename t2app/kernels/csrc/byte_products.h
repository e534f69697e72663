// Products of bytes, summed in 32-bit integers: more of them at a time than float32 allows, and singular vectors of 8 bits are
// multiplied as they lie in memory. `OfBytes` is how a CPU does that; beside what `tiles.h` takes of it:
//
//   kOffset: what it adds to an entry of a vector before it is multiplied.
//   kRowsTogether: rows whose contributions are summed together.
//   all: an integer in all places; interleave, store_in_order: four vectors at a time, place by place, and back.
//   store; turned_fours: what a matrix's columns are multiplied by (matrix_edit.h).

#pragma once

#include <cstdint>
#include <cstring>

#include "ahead.h"
#include "byte_rows.h"
#include "columns.h"
#include "tiles.h"

namespace t2app {

// sums (R, narrow) = coefficients · vectors for R rows of coefficients from `first` on, and as many vectors, (…, narrow),
// as a row has; where `adds`, that much more. Memory is asked for from `next` on, in passing; null asks for none.
template <int R>
void combine_byte_rows(const ByteRows& coefficients, int64_t first, const int8_t* vectors, int64_t narrow, bool adds,
                       float* sums, const char* next) {
  for (int64_t column = 0; column < narrow; column += OfBytes::kBlock) {
    OfBytes::Sums parts[R][4];
    for (int r = 0; r < R; ++r) {
      for (OfBytes::Sums& part : parts[r]) part = OfBytes::all(-OfBytes::kOffset * coefficients.sums[first + r]);
    }
    for (int64_t v = 0; v < coefficients.length; v += 4) {
      if (next != nullptr) {
        _mm_prefetch(next, _MM_HINT_T1);
        next += kCacheLine;
      }
      const int8_t* entries = vectors + v * narrow + column;
      OfBytes::Register fours[4];
      OfBytes::interleave(OfBytes::load_column(entries), OfBytes::load_column(entries + narrow),
                          OfBytes::load_column(entries + 2 * narrow), OfBytes::load_column(entries + 3 * narrow), fours);
      for (int r = 0; r < R; ++r) {
        int32_t of_row;
        std::memcpy(&of_row, coefficients.row(first + r) + v, sizeof(of_row));
        const OfBytes::Register four = OfBytes::all(of_row);
        for (int part = 0; part < 4; ++part) OfBytes::add(parts[r][part], four, fours[part]);
      }
    }
    for (int r = 0; r < R; ++r) {
      OfBytes::store_in_order(parts[r], coefficients.scales[first + r], adds, sums + r * narrow + column);
    }
  }
}

// Both products of an edit, a few rows at a time.
struct ByteProducts {
  // Columns begin to end of x Vᵀ for rows of x and vectors (rank, narrow), exactly.
  static void multiply(const ByteRows& rows, const int8_t* vectors, int64_t begin, int64_t end, const Ahead& ahead,
                       const StoreColumns<int32_t>& store) {
    dot_multiply<OfBytes>(rows.row(0), rows.count, vectors, begin, end, rows.length, ahead,
                          [&](int64_t row, int64_t first, int64_t columns, int32_t* values) {
                            for (int64_t i = 0; i < columns; ++i) values[i] -= OfBytes::kOffset * rows.sums[row];
                            store(row, first, columns, values);
                          });
  }

  // sums (rows of coefficients, narrow) = coefficients · vectors for as many vectors, (…, narrow), as a row has
  // coefficients; where `adds`, that much more. `next` is where the thread reads on afterwards, which it has begun to ask
  // for; null where that is not known.
  static void combine(const ByteRows& coefficients, const int8_t* vectors, int64_t narrow, bool adds, float* sums,
                      const char* next) {
    if (next != nullptr) next += kFarBytes;
    int64_t row = 0;
    const auto some = [&]<int R>() {
      for (; row + R <= coefficients.count; row += R) {
        combine_byte_rows<R>(coefficients, row, vectors, narrow, adds, sums + row * narrow, next);
        next = nullptr;
      }
    };
    some.template operator()<OfBytes::kRowsTogether>();
    if constexpr (OfBytes::kRowsTogether > 3) some.template operator()<3>();
    if constexpr (OfBytes::kRowsTogether > 2) some.template operator()<2>();
    some.template operator()<1>();
  }
};

}  // namespace t2app
