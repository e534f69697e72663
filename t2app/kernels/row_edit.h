// What a plan does to some rows of a batch at the narrow side of one layer, checked and prepared once.

#pragma once

#include "tensors.h"
#include "vector.h"

namespace t2app {

// What the length of a singular vector divides by (`_BYTES_WIDTH` in linear.py): the most bytes that any CPU multiplies
// together.
constexpr int64_t kEditBlock = 64;

struct RowEdit : Kept {
  // s + V((z − 1) ⊙ Vᵀs) for the narrow side s of `edited` rows from `first` on.
  //
  // vectors (rank, narrow) in int8, from −127 on, a singular vector a row, in even-first order; a vector is scale · integers, with the
  // scales (rank,) in float32. delta (1 or edited rows, rank) is z − 1 in float32. edits_input: whether the narrow side
  // is the layer's input, or its output.
  RowEdit(const Tensor& vectors, const Tensor& scales, const Tensor& delta, bool edits_input, int64_t first, int64_t edited)
      : vectors(vectors), edits_input(edits_input), first(first), edited(edited), shared_(delta.size(0) == 1) {
    STD_TORCH_CHECK(vectors.dim() == 2 && vectors.is_contiguous() && vectors.scalar_type() == ScalarType::Char &&
                        narrow() % kEditBlock == 0 && rank() % kBlock == 0,
                    "singular vectors in int8, of ", kEditBlock, "·n, were expected");
    STD_TORCH_CHECK(delta.scalar_type() == ScalarType::Float && delta.dim() == 2 && delta.size(1) == rank() &&
                        (shared_ || delta.size(0) == edited),
                    "z - 1 does not match the rows or the rank");
    STD_TORCH_CHECK(first >= 0 && edited > 0, "rows to edit were expected");
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.numel() == rank(),
                    "a scale in float32 was expected for each singular vector");
    const Tensor in_order = torch::stable::contiguous(delta);
    const float *d = in_order.const_data_ptr<float>(), *s = scales.const_data_ptr<float>();
    factors_.resize(delta.numel());
    for (int64_t row = 0; row < delta.size(0); ++row) {
      // The coordinate and the contribution both lack a vector's scale.
      for (int64_t i = 0; i < rank(); ++i) factors_[row * rank() + i] = d[row * rank() + i] * s[i] * s[i];
    }
  }

  int64_t rank() const { return vectors.size(0); }
  int64_t narrow() const { return vectors.size(1); }
  // By what the coordinates of an edited row, counted from 0, along each vector are multiplied: (rank,).
  const float* factors_of(int64_t row) const { return factors_.data() + (shared_ ? 0 : row * rank()); }

  const Tensor vectors;
  const bool edits_input;
  const int64_t first, edited;

 private:
  const bool shared_;
  std::vector<float> factors_;
};

// The tokens of the rows that are edited, of which each row has as many, one after another.
struct EditedTokens {
  EditedTokens(const RowEdit& edit, int64_t tokens)
      : first(edit.first * tokens), count(edit.edited * tokens), edit_(edit), of_row_(tokens) {}

  bool has(int64_t token) const { return token >= first && token < first + count; }
  // Those of its row, for a token counted from the first of these.
  const float* factors_of(int64_t token) const { return edit_.factors_of(token / of_row_); }

  const int64_t first, count;

 private:
  const RowEdit& edit_;
  const int64_t of_row_;
};

}  // namespace t2app
