// A linear layer and what a plan does to it, checked and prepared once.

#pragma once

#include <torch/custom_class.h>

#include "bfloat16.h"

namespace t2app {

// Whether this is compiled for a CPU that does (AVX-512 BF16).
#ifdef __AVX512BF16__
constexpr bool kMultipliesBfloat16 = true;
#else
constexpr bool kMultipliesBfloat16 = false;
#endif

// What the length of a singular vector divides by (`_BYTES_WIDTH` in linear.py): the bytes that are multiplied together.
#ifdef __AVX512VNNI__
constexpr int64_t kEditBlock = 64;
#else
constexpr int64_t kEditBlock = kBlock;
#endif

struct Layer : torch::CustomClassHolder {
  // y = x Wᵀ + b, or W' = U diag(σ ⊙ z) Vᵀ in place of W for the rows of a batch from `first` on.
  //
  // weight (out_features, in_features) and bias (out_features,) are bfloat16. dot: multiply bfloat16 as it is, on CPUs that
  // can. Without singular vectors no row is edited. With them, they are of the layer's narrow side, (rank, narrow), a
  // vector a row, as scale · integers in int8, in even-first order, the scales (rank,) in float32. delta (1 or edited
  // rows, rank) is z − 1 in float32.
  Layer(const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool dot,
        const std::optional<at::Tensor>& vectors, const std::optional<at::Tensor>& scales,
        const std::optional<at::Tensor>& delta, bool edits_input, int64_t first, int64_t edited)
      : weight(weight),
        out_features(weight.size(0)),
        in_features(weight.size(1)),
        bias(out_features, 0.0f),
        dot(dot),
        vectors(vectors),
        edits_input(edits_input),
        first(first),
        edited(edited) {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.dim() == 2,
                "a contiguous weight in bfloat16 was expected");
    TORCH_CHECK(!dot || kMultipliesBfloat16, "this CPU does not multiply bfloat16");
    TORCH_CHECK(in_features % block() == 0, "rows of a weight were expected to be of ", block(), "·n");
    if (bias) {
      const at::Tensor wide = bias->to(at::kFloat).contiguous();
      TORCH_CHECK(wide.numel() == out_features, "the bias does not match the weight");
      std::copy_n(wide.const_data_ptr<float>(), out_features, this->bias.begin());
    }
    if (vectors) prepare_edit(scales, delta);
  }

  int64_t narrow() const { return edits_input ? in_features : out_features; }
  int64_t rank() const { return vectors->size(0); }
  // By what the coordinates of an edited row, counted from 0, along each vector are multiplied: (rank,).
  const float* factors_of(int64_t row) const { return factors.data() + (shared ? 0 : row * rank()); }

  const at::Tensor weight;
  const int64_t out_features, in_features;
  std::vector<float> bias;
  const bool dot;
  const std::optional<at::Tensor> vectors;
  const bool edits_input;
  const int64_t first, edited;
  std::vector<float> factors;
  bool shared = false;

 private:
  int64_t block() const { return dot ? 2 * kBlock : kBlock; }

  void prepare_edit(const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& delta) {
    TORCH_CHECK(vectors->dim() == 2 && vectors->is_contiguous() && vectors->size(1) == narrow() &&
                    vectors->scalar_type() == at::kChar && narrow() % kEditBlock == 0 && rank() % kBlock == 0,
                "singular vectors in int8 that match the layer, of ", kEditBlock, "·n, were expected");
    TORCH_CHECK(delta && delta->scalar_type() == at::kFloat && delta->dim() == 2 && delta->size(1) == rank() &&
                    (delta->size(0) == 1 || delta->size(0) == edited),
                "z - 1 does not match the rows or the rank");
    TORCH_CHECK(first >= 0 && edited > 0, "rows to edit were expected");
    TORCH_CHECK(scales && scales->scalar_type() == at::kFloat && scales->is_contiguous() && scales->numel() == rank(),
                "a scale in float32 was expected for each singular vector");
    const at::Tensor in_order = delta->contiguous();
    const float *d = in_order.const_data_ptr<float>(), *s = scales->const_data_ptr<float>();
    shared = delta->size(0) == 1;
    factors.resize(delta->numel());
    for (int64_t row = 0; row < delta->size(0); ++row) {
      // The coordinate and the contribution both lack a vector's scale.
      for (int64_t i = 0; i < rank(); ++i) factors[row * rank() + i] = d[row * rank() + i] * s[i] * s[i];
    }
  }
};

// The tokens of the rows that a layer edits, of which each row has as many, one after another.
struct EditedTokens {
  EditedTokens(const Layer& layer, int64_t tokens)
      : first(layer.first * tokens), count(layer.edited * tokens), layer_(layer), of_row_(tokens) {}

  bool has(int64_t token) const { return token >= first && token < first + count; }
  // Those of its row, for a token counted from the first of these.
  const float* factors_of(int64_t token) const { return layer_.factors_of(token / of_row_); }

  const int64_t first, count;

 private:
  const Layer& layer_;
  const int64_t of_row_;
};

}  // namespace t2app
