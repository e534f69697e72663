// A decoder block of Llama's kind for one new token a row: its layers are those that a plan uses.

#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/silu.h>

#include <cmath>

#include "attention.h"
#include "linear.h"

namespace t2app {

// x / √(mean x² + epsilon) · weight for the rows of x, rounded where transformers rounds.
inline at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  const int64_t length = weight.numel(), rows = x.numel() / length;
  const at::Tensor in_order = x.contiguous();
  at::Tensor y = at::empty(in_order.sizes(), in_order.options());
  const uint16_t *source = bits(in_order), *w = bits(weight);
  auto* target = reinterpret_cast<uint16_t*>(y.mutable_data_ptr<at::BFloat16>());
  for (int64_t row = 0; row < rows; ++row, source += length, target += length) {
    Floats even_squares = zeros(), odd_squares = zeros();
    for (int64_t i = 0; i < length; i += kBlock) {
      const Pairs pairs = load_pairs(source + i);
      const Floats even = even_elements(pairs), odd = odd_elements(pairs);
      even_squares = multiply_add(even, even, even_squares);
      odd_squares = multiply_add(odd, odd, odd_squares);
    }
    const float mean = sum(even_squares + odd_squares) / length;
    const Floats scale = all(1.0f / std::sqrt(mean + static_cast<float>(epsilon)));
    for (int64_t i = 0; i < length; i += kBlock) {
      const Pairs pairs = load_pairs(source + i), weights = load_pairs(w + i);
      const Pairs normed = rounded_pairs(even_elements(pairs) * scale, odd_elements(pairs) * scale);
      store_pairs(target + i, rounded_pairs(even_elements(normed) * even_elements(weights),
                                            odd_elements(normed) * odd_elements(weights)));
    }
  }
  return y;
}

// `of` the elements of x and y, of one shape, rounded.
template <typename Of>
at::Tensor each(const at::Tensor& x, const at::Tensor& y, const Of& of) {
  const at::Tensor in_order = x.contiguous();
  at::Tensor result = at::empty_like(in_order);
  const uint16_t *a = bits(in_order), *b = bits(y);
  auto* target = reinterpret_cast<uint16_t*>(result.mutable_data_ptr<at::BFloat16>());
  for (int64_t i = 0; i < result.numel(); i += kBlock) {
    const Pairs first = load_pairs(a + i), second = load_pairs(b + i);
    store_pairs(target + i, rounded_pairs(of(even_elements(first), even_elements(second)),
                                          of(odd_elements(first), odd_elements(second))));
  }
  return result;
}

inline at::Tensor sum_of(const at::Tensor& x, const at::Tensor& y) {
  return each(x, y, [](Floats a, Floats b) { return a + b; });
}

inline at::Tensor product_of(const at::Tensor& x, const at::Tensor& y) {
  return each(x, y, [](Floats a, Floats b) { return a * b; });
}

// A head's vector turned by its position: the first half a and the second b become a·cos − b·sin and b·cos + a·sin.
inline void rotate(const uint16_t* head, const uint16_t* cos, const uint16_t* sin, int64_t size, uint16_t* target) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += kBlock) {
    const Pairs a = load_pairs(head + i), b = load_pairs(head + half + i);
    const Pairs cos_a = load_pairs(cos + i), cos_b = load_pairs(cos + half + i);
    const Pairs sin_a = load_pairs(sin + i), sin_b = load_pairs(sin + half + i);
    store_pairs(target + i, rounded_pairs(even_elements(a) * even_elements(cos_a) - even_elements(b) * even_elements(sin_a),
                                          odd_elements(a) * odd_elements(cos_a) - odd_elements(b) * odd_elements(sin_a)));
    store_pairs(target + half + i,
                rounded_pairs(even_elements(b) * even_elements(cos_b) + even_elements(a) * even_elements(sin_b),
                              odd_elements(b) * odd_elements(cos_b) + odd_elements(a) * odd_elements(sin_b)));
  }
}

class Block {
 public:
  static constexpr int64_t kLayers = 7, kNorms = 2;

  // layers: query, key, value, output, gate, up and down; norms: before attention and before the MLP, bfloat16.
  Block(std::vector<c10::intrusive_ptr<Layer>> layers, std::vector<at::Tensor> norms, double epsilon, int64_t head_size,
        double scale)
      : layers_(std::move(layers)), norms_(std::move(norms)), epsilon_(epsilon), size_(head_size), scale_(scale) {
    TORCH_CHECK(size_ % (2 * kBlock) == 0, "heads of 32·n were expected");
    for (const at::Tensor& norm : norms_) {
      TORCH_CHECK(norm.scalar_type() == at::kBFloat16 && norm.is_contiguous() && norm.numel() % kBlock == 0,
                  "norms in bfloat16 of 16·n were expected");
    }
  }

  // The block's output (rows, 1, hidden) for x of that shape.
  //
  // cos, sin (1 or rows, 1, head size) are those of the new tokens' positions; keys and values (rows, key heads, tokens,
  // head size) have room for the new token at the end, which is written; mask as for `one_token_attention`.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& keys,
                     const at::Tensor& values, const std::optional<at::Tensor>& mask) const {
    const int64_t rows = x.size(0), tokens = keys.size(2);
    TORCH_CHECK(x.dim() == 3 && x.size(1) == 1 && x.scalar_type() == at::kBFloat16, "one token a row was expected");
    TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(0) == rows && keys.size(3) == size_ && tokens > 0,
                "keys and values do not match the batch");
    check_angles(cos, rows);
    check_angles(sin, rows);

    const std::vector<at::Tensor> projected = linear(these(kQuery, kKey, kValue), rms_norm(x, norms_[0], epsilon_));
    at::Tensor queries = projected[kQuery];
    turn(queries, cos, sin, bits_of(queries), size_, queries.size(2));
    turn(projected[kKey], cos, sin, bits_of(keys) + (tokens - 1) * keys.stride(2), keys.stride(1), keys.stride(0));
    keep(projected[kValue], bits_of(values) + (tokens - 1) * values.stride(2), values.stride(1), values.stride(0));
    const at::Tensor attended = attend(queries.view({rows, -1, 1, size_}), keys, values, mask).view({rows, 1, -1});
    const at::Tensor between = sum_of(x, linear(these(kOutput), attended)[0]);

    const std::vector<at::Tensor> gated = linear(these(kGate, kUp), rms_norm(between, norms_[1], epsilon_));
    const at::Tensor activated = product_of(at::silu(gated[0]), gated[1]);
    return sum_of(between, linear(these(kDown), activated)[0]);
  }

 private:
  enum Place { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown };

  template <typename... Places>
  std::vector<const Layer*> these(Places... places) const {
    return {layers_[places].get()...};
  }

  void check_angles(const at::Tensor& angles, int64_t rows) const {
    TORCH_CHECK(angles.scalar_type() == at::kBFloat16 && angles.is_contiguous() && angles.size(-1) == size_ &&
                    (angles.numel() == size_ || angles.numel() == rows * size_),
                "a cosine and a sine in bfloat16 were expected for each row and place of a head");
  }

  static uint16_t* bits_of(const at::Tensor& tensor) {
    return reinterpret_cast<uint16_t*>(tensor.mutable_data_ptr<at::BFloat16>());
  }

  // The heads of `projected` (rows, 1, heads · size), turned, to `target`, whose heads and rows are so far apart.
  void turn(const at::Tensor& projected, const at::Tensor& cos, const at::Tensor& sin, uint16_t* target,
            int64_t head_stride, int64_t row_stride) const {
    const int64_t angle_stride = cos.numel() == size_ ? 0 : size_;
    each_head(projected, target, head_stride, row_stride, [&](int64_t row, const uint16_t* head, uint16_t* place) {
      rotate(head, bits(cos) + row * angle_stride, bits(sin) + row * angle_stride, size_, place);
    });
  }

  void keep(const at::Tensor& projected, uint16_t* target, int64_t head_stride, int64_t row_stride) const {
    each_head(projected, target, head_stride, row_stride,
              [&](int64_t, const uint16_t* head, uint16_t* place) { std::copy_n(head, size_, place); });
  }

  template <typename Do>
  void each_head(const at::Tensor& projected, uint16_t* target, int64_t head_stride, int64_t row_stride,
                 const Do& act) const {
    const int64_t rows = projected.size(0), heads = projected.size(2) / size_;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        act(row, bits(projected) + (row * heads + head) * size_, target + row * row_stride + head * head_stride);
      }
    }
  }

  at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                    const std::optional<at::Tensor>& mask) const {
    RECORD_FUNCTION("t2app::attention", {});
    return one_token_attention(queries, keys, values, mask, scale_);
  }

  const std::vector<c10::intrusive_ptr<Layer>> layers_;
  const std::vector<at::Tensor> norms_;
  const double epsilon_;
  const int64_t size_;
  const double scale_;
};

}  // namespace t2app
