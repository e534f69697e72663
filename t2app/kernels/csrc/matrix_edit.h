// An edit of one mixture by its matrix E = V diag(z − 1) Vᵀ in 8 bits: x + Ex, in one pass over half of a matrix.
//
// E is symmetric. Its lower triangle is half of what the singular vectors are, each entry is used twice as it is read, and
// no product waits for another. A mixture has a matrix of its own, so this is for few rows, all of the same one.

#pragma once

#include <algorithm>
#include <cstring>

#include "byte_rows.h"
#include "row_edit.h"
#include "scratch.h"
#include "triangle.h"

namespace t2app {

// The sum of sixteen bytes.
inline int32_t sum_of_block(const int8_t* bytes) {
  // Of unsigned bytes there is an instruction: 128 more each.
  const __m128i more = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), _mm_set1_epi8(-128));
  const __m128i halves = _mm_sad_epu8(more, _mm_setzero_si128());
  return _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - 128 * static_cast<int32_t>(kBlock);
}

class MatrixEdit : public RowEdit {
 public:
  // E = diag(diagonal) + diag(scales) · integers · diag(scales), with no diagonal in the integers, its rows and columns in
  // even-first order. scales, diagonal (narrow,) in float32.
  //
  // integers in int8, from −127 on, of the lower triangle, in the order of `triangle.h`.
  MatrixEdit(const Tensor& integers, const Tensor& scales, const Tensor& diagonal, bool edits_input, int64_t first,
             int64_t edited)
      : RowEdit(scales.numel(), edits_input, first, edited), integers_(integers), scales_(scales), diagonal_(diagonal) {
    STD_TORCH_CHECK(narrow > 0 && narrow % kBlock == 0 && integers.is_contiguous() &&
                        integers.scalar_type() == ScalarType::Char && integers.numel() == entries_before(all_blocks()),
                    "the lower triangle of a matrix of ", kBlock, "·n in int8 was expected");
    for (const Tensor& of_rows : {scales, diagonal}) {
      STD_TORCH_CHECK(of_rows.scalar_type() == ScalarType::Float && of_rows.is_contiguous() && of_rows.numel() == narrow,
                      "scales and a diagonal in float32 were expected for each row of the matrix");
    }
  }

  Stretch reads() const override {
    const Share blocks = share_of_triangle(all_blocks());
    return {integers() + entries_before(blocks.begin), entries_before(blocks.end) - entries_before(blocks.begin)};
  }

  void compute(const EditedTokens& tokens, const SideOf& side, const Ahead& ahead, float* change) const override {
    const float *scales = scales_.const_data_ptr<float>(), *diagonal = diagonal_.const_data_ptr<float>();
    const Share blocks = share_of_triangle(all_blocks());
    ByteRows rows(tokens.count, narrow);
    Scratch<float> scaled(narrow);
    for (int64_t token = 0; token < tokens.count; ++token) {
      const float* values = side(token);
      for (int64_t i = 0; i < narrow; ++i) scaled[i] = values[i] * scales[i];
      rows.set(token, scaled.data());
      float* own = change + token * narrow;
      std::fill_n(own, narrow, 0.0f);
      for (int64_t i = blocks.begin * kBlock; i < blocks.end * kBlock; ++i) own[i] = values[i] * diagonal[i];
    }
    int64_t token = 0;
    const auto some = [&]<int R>() {
      for (; token + R <= tokens.count; token += R) multiply<R>(rows, token, blocks.begin, blocks.end, ahead, change);
    };
    some.template operator()<2>();
    some.template operator()<1>();
  }

 private:
  // Registers of four columns of a block, and 32-bit lanes of a register.
  static constexpr int64_t kOfFour = 4 * kBlock / OfBytes::kBlock, kLanesOfBytes = OfBytes::kBlock / 4;

  int64_t all_blocks() const { return narrow / kBlock; }
  const int8_t* integers() const { return integers_.const_data_ptr<int8_t>(); }

  // What the blocks of rows from begin to end give R tokens from `first` on, added to their change; left of the
  // diagonal's block their columns are rows of E too.
  template <int R>
  void multiply(const ByteRows& sides, int64_t first, int64_t begin, int64_t end, const Ahead& ahead, float* change) const {
    const float* scales = scales_.const_data_ptr<float>();
    const int64_t lanes = narrow / 4 * kLanesOfBytes;
    // Of each four columns a register of sums, whose lanes hold each column several times, for different rows.
    Scratch<int32_t> columns(R * lanes, 0);
    const int8_t* bytes[R];
    int32_t *of_columns[R], too_much[R];
    for (int r = 0; r < R; ++r) {
      bytes[r] = sides.row(first + r);
      of_columns[r] = columns.data() + r * lanes;
      too_much[r] = 0;
      for (int64_t block = 0; block < begin; ++block) too_much[r] += offset_of(bytes[r] + block * kBlock);
    }
    for (int64_t block = begin; block < end; ++block) {
      const int8_t* entries = integers() + entries_before(block);
      const int64_t left = block * kBlock;
      OfBytes::Register coefficients[R * kOfFour];
      for (int r = 0; r < R; ++r) repeat_fours(bytes[r] + left, coefficients + r * kOfFour);
      OfBytes::Sums sums[R * kOfFour];
      // Else they would be set, and copied, as memory.
#pragma GCC unroll 4
      for (auto& sum : sums) sum = OfBytes::zeros();
      for (int64_t column = 0; column < left; column += 4) {
        meet<R, true>(entries, column, bytes, coefficients, ahead, sums, of_columns);
      }
      for (int64_t column = left; column < left + kBlock; column += 4) {
        meet<R, false>(entries, column, bytes, coefficients, ahead, sums, of_columns);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t of_rows[kBlock];
#pragma GCC unroll 2
        for (int half = 0; half < kOfFour; ++half) {
          OfBytes::store(reinterpret_cast<int8_t*>(of_rows + half * kLanesOfBytes), sums[r * kOfFour + half]);
        }
        too_much[r] += offset_of(bytes[r] + left);
        float* target = change + (first + r) * narrow + left;
        for (int64_t i = 0; i < kBlock; ++i) {
          target[i] += static_cast<float>(of_rows[i] - too_much[r]) * scales[left + i] * sides.scales[first + r];
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      add_columns(sides, first + r, begin, end, of_columns[r], change + (first + r) * narrow);
    }
  }

  // Of a block's rows four columns, and R sides. Where it is left of the diagonal's block, they are rows too.
  template <int R, bool IsLeft>
  [[gnu::always_inline]] static void meet(const int8_t* entries, int64_t column, const int8_t* const (&bytes)[R],
                                          const OfBytes::Register (&coefficients)[R * kOfFour], const Ahead& ahead,
                                          OfBytes::Sums (&sums)[R * kOfFour], int32_t* const (&columns)[R]) {
#pragma GCC unroll 2
    for (int half = 0; half < kOfFour; ++half) {
      const int8_t* here = entries + column * kBlock + half * OfBytes::kBlock;
      const OfBytes::Register four = OfBytes::load_column(here);
      ahead.of(here);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t of_side;
        std::memcpy(&of_side, bytes[r] + column, sizeof(of_side));
        OfBytes::add(sums[r * kOfFour + half], OfBytes::all(of_side), four);
        if constexpr (IsLeft) {
          auto* place = reinterpret_cast<int8_t*>(columns[r] + column / 4 * kLanesOfBytes);
          OfBytes::Sums of_columns = OfBytes::load(place);
          OfBytes::add(of_columns, coefficients[r * kOfFour + half], OfBytes::turned_fours(four));
          OfBytes::store(place, of_columns);
        }
      }
    }
  }

  // By how much a product with sixteen bytes is too much, for what is added to the entries that they meet.
  static int32_t offset_of(const int8_t* bytes) {
    return OfBytes::kOffset == 0 ? 0 : OfBytes::kOffset * sum_of_block(bytes);
  }

  // Each four bytes of sixteen, four times.
  static void repeat_fours(const int8_t* bytes, OfBytes::Register* registers) {
    alignas(kCacheLine) int32_t repeated[4 * kBlock / 4];
    for (int64_t four = 0; four < 4; ++four) {
      int32_t value;
      std::memcpy(&value, bytes + 4 * four, sizeof(value));
      std::fill_n(repeated + 4 * four, 4, value);
    }
    for (int64_t half = 0; half < kOfFour; ++half) {
      registers[half] = OfBytes::load(reinterpret_cast<const int8_t*>(repeated + half * kLanesOfBytes));
    }
  }

  // What the columns left of the blocks from begin to end have, added to a token's change.
  void add_columns(const ByteRows& sides, int64_t token, int64_t begin, int64_t end, const int32_t* columns,
                   float* change) const {
    const float* scales = scales_.const_data_ptr<float>();
    int32_t too_much = 0;
    for (int64_t block = end - 2; block >= 0; --block) {
      // By all rows below.
      if (block + 1 >= begin) too_much += offset_of(sides.row(token) + (block + 1) * kBlock);
      for (int64_t column = block * kBlock; column < (block + 1) * kBlock; column += 4) {
        __m128i sums = _mm_set1_epi32(-too_much);
        for (int64_t lane = 0; lane < kLanesOfBytes; lane += 4) {
          const int32_t* lanes = columns + column / 4 * kLanesOfBytes + lane;
          sums = _mm_add_epi32(sums, _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
        }
        const __m128 scale = _mm_loadu_ps(scales + column) * _mm_set1_ps(sides.scales[token]);
        _mm_storeu_ps(change + column, _mm_loadu_ps(change + column) + _mm_cvtepi32_ps(sums) * scale);
      }
    }
  }

  const Tensor integers_, scales_, diagonal_;
};

}  // namespace t2app
