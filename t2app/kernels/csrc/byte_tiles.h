// What byte_products.h has, by tiles: the same sums, sixteen rows at a time.

#pragma once

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "amx_tiles.h"
#include "byte_rows.h"
#include "columns.h"

namespace t2app {

static_assert(kBytesWidth == kTileBytes);

// `ByteProducts` for many rows.
struct ByteTiles {
  static void multiply(const ByteRows& rows, const int8_t* vectors, int64_t begin, int64_t end, const Ahead& ahead,
                       const StoreColumns<int32_t>& store) {
    const RowTiles tiles(rows.row(0), rows.count, rows.length);
    multiply_by_tiles<TilesOfBytes>(tiles, rows.count, vectors, begin, end, rows.length, ahead, store);
  }

  static void combine(const ByteRows& coefficients, const int8_t* vectors, int64_t narrow, bool adds, float* sums,
                      const char* next) {
    constexpr int kParts = 4;
    if (next != nullptr) next += kFarBytes;
    // Of each part of the places and each kTileBytes vectors a tile, in whose rows four vectors are side by side. What lies
    // after the last vector meets coefficients that are 0.
    const int64_t length = coefficients.apart / kTileBytes;
    Scratch<int8_t> tiles(kParts * coefficients.apart * kTileRows);
    for (int64_t column = 0; column < narrow; column += OfBytes::kBlock) {
      for (int64_t v = 0; v < coefficients.length; v += 4) {
        if (next != nullptr) {
          _mm_prefetch(next, _MM_HINT_T1);
          next += kCacheLine;
        }
        const int8_t* entries = vectors + v * narrow + column;
        OfBytes::Register fours[kParts];
        OfBytes::interleave(OfBytes::load(entries), OfBytes::load(entries + narrow), OfBytes::load(entries + 2 * narrow),
                            OfBytes::load(entries + 3 * narrow), fours);
        for (int64_t part = 0; part < kParts; ++part) {
          _mm512_store_si512(tiles.data() + (part * coefficients.apart + v) * kTileRows, fours[part]);
        }
      }
      for (int64_t first = 0; first < coefficients.count; first += kTileRows) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        for (int64_t i = 0; i < length; ++i) {
          load_tile<4>(coefficients.row(first) + i * kTileBytes, coefficients.apart);
          const auto add = [&]<int Part, int Own>() {
            load_tile<Own>(tiles.data() + (Part * length + i) * kTileRows * kTileBytes, kTileBytes);
            TilesOfBytes::add<Part, 4, Own>();
          };
          add.template operator()<0, 5>();
          add.template operator()<1, 6>();
          add.template operator()<2, 7>();
          add.template operator()<3, 5>();
        }
        alignas(kCacheLine) int32_t parts[kParts][kTileSize];
        store_tile<0>(parts[0]), store_tile<1>(parts[1]), store_tile<2>(parts[2]), store_tile<3>(parts[3]);
        for (int64_t row = first; row < std::min(first + kTileRows, coefficients.count); ++row) {
          OfBytes::Sums of_row[kParts];
          for (int part = 0; part < kParts; ++part) {
            of_row[part] = _mm512_load_si512(parts[part] + (row - first) * kTileLanes);
          }
          OfBytes::store_in_order(of_row, coefficients.scales[row], adds, sums + row * narrow + column);
        }
      }
    }
  }
};

}  // namespace t2app
