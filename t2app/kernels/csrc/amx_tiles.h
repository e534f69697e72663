// Products of tiles on CPUs that have them (AMX): sixteen rows of 64 bytes by sixteen others in one instruction, so that
// sixteen rows of a batch take hardly longer than reading the weights does. Up to two of them take less without.
//
// A tile of W is loaded as it lies in memory. What it is multiplied by has to have its 64 bytes four by four, those of
// sixteen rows side by side: x, of which there is less, is put in that order first.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "columns.h"
#include "scratch.h"

namespace t2app {

constexpr int64_t kTileRows = 16, kTileBytes = 64;
// Numbers of 32 bits in a tile's row: so many rows of x are multiplied at a time.
constexpr int64_t kTileLanes = kTileBytes / 4;
constexpr int64_t kTileSize = kTileRows * kTileLanes;

// Of the compiler's own intrinsics GCC 12 does not know what memory they read.
template <int Tile>
[[gnu::always_inline]] inline void load_tile(const void* first, int64_t bytes_apart) {
  asm volatile("tileloadd (%0, %1), %%tmm%c2" ::"r"(first), "r"(bytes_apart), "i"(Tile) : "memory");
}
template <int Tile>
[[gnu::always_inline]] inline void store_tile(int32_t* target) {
  asm volatile("tilestored %%tmm%c2, (%0, %1)" ::"r"(target), "r"(kTileBytes), "i"(Tile) : "memory");
}
template <int Tile>
[[gnu::always_inline]] inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// What tiles hold: `Sums` becomes as much more as A times B gives.
struct TilesOfBfloat16 {
  using Element = uint16_t;
  using Total = float;
  template <int Sums, int A, int B>
  [[gnu::always_inline]] static void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
  }
};
struct TilesOfBytes {
  using Element = int8_t;
  using Total = int32_t;
  template <int Sums, int A, int B>
  [[gnu::always_inline]] static void add() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
  }
};

// What a thread's tiles are like for as long as this lives: all of them as large as they can be. torch's library has
// shapes of its own, and finds them again afterwards.
class TileShapes {
 public:
  TileShapes() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Shapes whole{.palette = 1};
    std::fill_n(whole.row_bytes, kTiles, kTileBytes);
    std::fill_n(whole.rows, kTiles, kTileRows);
    load(whole);
  }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
  ~TileShapes() { load(before_); }

 private:
  static constexpr int kTiles = 8;
  // As the CPU reads it.
  struct alignas(kCacheLine) Shapes {
    uint8_t palette = 0, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  static void load(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }

  Shapes before_;
};

// Lane i of register j to lane j of register i.
inline void transpose(__m512i (&registers)[kTileRows]) {
  __m512i twos[kTileRows], fours[kTileRows];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(registers[i], registers[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(registers[i], registers[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm512_unpacklo_epi64(twos[i + half], twos[i + 2 + half]);
      fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(twos[i + half], twos[i + 2 + half]);
    }
  }
  // Register 4a + b of these has in its quarter q the lanes 4q + b of the registers from 4a on.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i low = _mm512_shuffle_i32x4(fours[b], fours[4 + b], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(fours[b], fours[4 + b], 0xdd);
    const __m512i other_low = _mm512_shuffle_i32x4(fours[8 + b], fours[12 + b], 0x88);
    const __m512i other_high = _mm512_shuffle_i32x4(fours[8 + b], fours[12 + b], 0xdd);
    registers[b] = _mm512_shuffle_i32x4(low, other_low, 0x88);
    registers[4 + b] = _mm512_shuffle_i32x4(high, other_high, 0x88);
    registers[8 + b] = _mm512_shuffle_i32x4(low, other_low, 0xdd);
    registers[12 + b] = _mm512_shuffle_i32x4(high, other_high, 0xdd);
  }
}

// Rows of `bytes` bytes, which kTileBytes divides, as tiles to multiply by: for each sixteen rows a tile for each 64
// bytes.
class RowTiles {
 public:
  RowTiles(const void* rows, int64_t count, int64_t bytes)
      : groups((count + kTileLanes - 1) / kTileLanes), length(bytes / kTileBytes), tiles_(groups * length * kTileSize) {
    for (int64_t group = 0; group < groups; ++group) {
      const char* first = static_cast<const char*>(rows) + group * kTileLanes * bytes;
      const int64_t there = std::min(kTileLanes, count - group * kTileLanes);
      for (int64_t i = 0; i < length; ++i) {
        __m512i lanes[kTileRows];
        for (int64_t row = 0; row < kTileLanes; ++row) {
          lanes[row] = row < there ? _mm512_loadu_si512(first + row * bytes + i * kTileBytes) : _mm512_setzero_si512();
        }
        transpose(lanes);
        int32_t* tile = tiles_.data() + (group * length + i) * kTileSize;
        for (int64_t lane = 0; lane < kTileLanes; ++lane) _mm512_storeu_si512(tile + lane * kTileLanes, lanes[lane]);
      }
    }
  }

  const int32_t* of_group(int64_t group) const { return tiles_.data() + group * length * kTileSize; }

  // Groups of sixteen rows, the last with zeros where there is none, and tiles of each.
  const int64_t groups, length;

 private:
  Scratch<int32_t> tiles_;
};

// The sums of W rows of tiles of weights by those of G groups of rows, `length` tiles each, to `results`, of which each
// of these rows has one.
template <typename Of, int W, int G>
void sum_tiles(const char* weights, int64_t bytes_apart, const int32_t* rows, int64_t length, AskedInPassing& next,
               typename Of::Total* results, int64_t apart) {
  static_assert(W <= 2 && G <= 2);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t i = 0; i < length; ++i) {
    next.ask();
    load_tile<6>(rows + i * kTileSize, kTileBytes);
    load_tile<4>(weights + i * kTileBytes, bytes_apart);
    Of::template add<0, 4, 6>();
    if constexpr (W > 1) {
      load_tile<5>(weights + kTileRows * bytes_apart + i * kTileBytes, bytes_apart);
      Of::template add<1, 5, 6>();
    }
    if constexpr (G > 1) {
      load_tile<7>(rows + (length + i) * kTileSize, kTileBytes);
      Of::template add<2, 4, 7>();
      if constexpr (W > 1) Of::template add<3, 5, 7>();
    }
  }
  const auto store = [&]<int Tile>() {
    alignas(kCacheLine) int32_t sums[kTileSize];
    store_tile<Tile>(sums);
    __m512i columns[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) columns[i] = _mm512_load_si512(sums + i * kTileLanes);
    transpose(columns);
    auto* target = results + Tile / 2 * kTileLanes * apart + Tile % 2 * kTileRows;
    for (int64_t row = 0; row < kTileLanes; ++row) _mm512_storeu_si512(target + row * apart, columns[row]);
  };
  store.template operator()<0>();
  if constexpr (W > 1) store.template operator()<1>();
  if constexpr (G > 1) store.template operator()<2>();
  if constexpr (W > 1 && G > 1) store.template operator()<3>();
}

// Columns begin to end of x Wᵀ for `rows` rows of x as tiles and W (n, k).
template <typename Of>
void multiply_by_tiles(const RowTiles& tiles, int64_t rows, const typename Of::Element* weight, int64_t begin, int64_t end,
                       int64_t k, const Ahead& ahead, const StoreColumns<typename Of::Total>& store) {
  constexpr int64_t kColumns = 2 * kTileRows;
  const int64_t bytes_apart = k * sizeof(*weight);
  Scratch<typename Of::Total> results(tiles.groups * kTileLanes * kColumns);
  Scratch<char> filled_up;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t columns = std::min(kColumns, end - first), after = first + kColumns;
    auto* weights = reinterpret_cast<const char*>(weight + first * k);
    if (columns % kTileRows != 0) {
      filled_up.assign(kColumns * bytes_apart, 0);
      std::copy_n(weights, columns * bytes_apart, filled_up.begin());
      weights = filled_up.data();
    }
    const char* next_begin = after < end ? reinterpret_cast<const char*>(weight + after * k) : ahead.next();
    const int64_t asked_bytes = next_begin == nullptr ? 0 : kColumns * bytes_apart;
    AskedInPassing next(next_begin, asked_bytes, tiles.length * ((tiles.groups + 1) / 2));
    for (int64_t group = 0; group < tiles.groups; group += 2) {
      const auto summed = [&]<int W, int G>() {
        sum_tiles<Of, W, G>(weights, bytes_apart, tiles.of_group(group), tiles.length, next,
                            results.data() + group * kTileLanes * kColumns, kColumns);
      };
      const bool two = columns > kTileRows;
      if (group + 1 < tiles.groups) {
        two ? summed.template operator()<2, 2>() : summed.template operator()<1, 2>();
      } else {
        two ? summed.template operator()<2, 1>() : summed.template operator()<1, 1>();
      }
    }
    for (int64_t row = 0; row < rows; ++row) store(row, first, columns, results.data() + row * kColumns);
  }
}

}  // namespace t2app
