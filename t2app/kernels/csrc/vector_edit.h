// An edit by singular vectors of 8 bits, for as many tokens as there are and rows of different mixtures.
//
// The side and the coordinates are rounded to 8 bits too, each row under a scale of its own: of an edit, which is a few
// percent of what a layer gives, that is as much as bfloat16 rounds off the whole (`bench edit`).

#pragma once

#include <algorithm>

#include "byte_products.h"
#ifdef __AMX_INT8__
#include "byte_tiles.h"
#endif
#include "row_edit.h"
#include "scratch.h"
#include "share.h"

namespace t2app {

// From so many edited rows on tiles are no slower: on two cores of a Xeon the edits of nine rows of a 135M model take 9.5 ms
// either way, of 64 rows 33 in place of 44.
constexpr int64_t kLeastRowsOfTiles = 9;

// Of vectors that are read for their coordinates and again for their contributions: they stay in the second cache.
constexpr int64_t kVectorBytesAtOnce = 1 << 18;

static_assert(kBytesWidth % OfBytes::kBlock == 0);

class VectorEdit : public RowEdit {
 public:
  // vectors (rank, narrow) in int8, from −127 on, a singular vector a row, in even-first order; a vector is
  // scale · integers, with the scales (rank,) in float32. delta (1 or edited rows, rank) is z − 1 in float32.
  VectorEdit(const Tensor& vectors, const Tensor& scales, const Tensor& delta, bool edits_input, int64_t first,
             int64_t edited)
      : RowEdit(vectors.size(1), edits_input, first, edited),
        vectors_(vectors),
        rank_(vectors.size(0)),
        shared_(delta.size(0) == 1) {
    STD_TORCH_CHECK(vectors.dim() == 2 && vectors.is_contiguous() && vectors.scalar_type() == ScalarType::Char &&
                        narrow % kBytesWidth == 0 && rank_ % kBlock == 0,
                    "singular vectors in int8, of ", kBytesWidth, "·n, were expected");
    STD_TORCH_CHECK(delta.scalar_type() == ScalarType::Float && delta.dim() == 2 && delta.size(1) == rank_ &&
                        (shared_ || delta.size(0) == edited),
                    "z - 1 does not match the rows or the rank");
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.numel() == rank_,
                    "a scale in float32 was expected for each singular vector");
    const Tensor in_order = torch::stable::contiguous(delta);
    const float *d = in_order.const_data_ptr<float>(), *s = scales.const_data_ptr<float>();
    factors_.resize(delta.numel());
    for (int64_t row = 0; row < delta.size(0); ++row) {
      // The coordinate and the contribution both lack a vector's scale.
      for (int64_t i = 0; i < rank_; ++i) factors_[row * rank_ + i] = d[row * rank_ + i] * s[i] * s[i];
    }
  }

  Stretch reads() const override {
    const Share share = this->share();
    return {first_vector() + share.begin * narrow, (share.end - share.begin) * narrow};
  }

  void compute(const EditedTokens& tokens, const SideOf& side, const Ahead& ahead, float* change) const override {
    ByteRows rows(tokens.count, narrow);
    for (int64_t token = 0; token < tokens.count; ++token) rows.set(token, side(token));
#ifdef __AMX_INT8__
    if (tokens.count >= kLeastRowsOfTiles) return compute_by<ByteTiles>(tokens, rows, ahead, change);
#endif
    compute_by<ByteProducts>(tokens, rows, ahead, change);
  }

 private:
  template <typename Bytes>
  void compute_by(const EditedTokens& tokens, const ByteRows& rows, const Ahead& ahead, float* change) const {
    const Share share = this->share();
    // Their coefficients share a scale: with half the vectors at most, one thread rounds an edit as two threads do.
    const int64_t at_once = std::max(std::min(kVectorBytesAtOnce / narrow, rank_ / 2) / kBlock, int64_t{1}) * kBlock;
    if (share.begin == share.end) std::fill_n(change, tokens.count * narrow, 0.0f);
    for (int64_t begin = share.begin; begin < share.end; begin += at_once) {
      const int64_t end = std::min(begin + at_once, share.end), count = end - begin;
      Scratch<float> weights(tokens.count * count);
      const auto store = [&](int64_t token, int64_t first, int64_t vectors, const int32_t* products) {
        const float* factors = factors_of(token / tokens.of_row);
        float* own = weights.data() + token * count + first - begin;
        for (int64_t v = 0; v < vectors; ++v) {
          own[v] = static_cast<float>(products[v]) * rows.scales[token] * factors[first + v];
        }
      };
      Bytes::multiply(rows, first_vector(), begin, end, ahead, store);
      ByteRows coefficients(tokens.count, count);
      for (int64_t token = 0; token < tokens.count; ++token) coefficients.set(token, weights.data() + token * count);
      // These vectors are in the cache: what comes after them is asked for in passing.
      const char* next = end < share.end ? reinterpret_cast<const char*>(first_vector() + end * narrow) : ahead.next();
      Bytes::combine(coefficients, first_vector() + begin * narrow, narrow, begin > share.begin, change, next);
    }
  }

  // This thread's share of the singular vectors, in whole blocks.
  Share share() const {
    const Share blocks(rank_ / kBlock);
    return {blocks.begin * kBlock, blocks.end * kBlock};
  }

  // By what the coordinates of an edited row, counted from 0, along each vector are multiplied: (rank,).
  const float* factors_of(int64_t row) const { return factors_.data() + (shared_ ? 0 : row * rank_); }

  const int8_t* first_vector() const { return vectors_.const_data_ptr<int8_t>(); }

  const Tensor vectors_;
  const int64_t rank_;
  const bool shared_;
  std::vector<float> factors_;
};

}  // namespace t2app
