// A decoder block of Llama's kind, as a plan edits it, for the new tokens of a batch.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <c10/core/InferenceMode.h>

#include <cmath>

#include "attention.h"
#include "linear.h"

namespace t2app {

// Below this many elements a second thread costs more than it does.
constexpr int64_t kElementsPerThread = 1 << 14;

// x / √(mean x² + epsilon) · weight, rounded where transformers rounds.
inline void normalize(const uint16_t* x, const uint16_t* weight, int64_t length, float epsilon, uint16_t* target) {
  Floats even_squares = zeros(), odd_squares = zeros();
  for (int64_t i = 0; i < length; i += kBlock) {
    const Pairs pairs = load_pairs(x + i);
    const Floats even = even_elements(pairs), odd = odd_elements(pairs);
    even_squares = multiply_add(even, even, even_squares);
    odd_squares = multiply_add(odd, odd, odd_squares);
  }
  const float mean = sum(even_squares + odd_squares) / length;
  const Floats scale = all(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < length; i += kBlock) {
    const Pairs pairs = load_pairs(x + i), weights = load_pairs(weight + i);
    const Pairs normed = rounded_pairs(even_elements(pairs) * scale, odd_elements(pairs) * scale);
    store_pairs(target + i, rounded_pairs(even_elements(normed) * even_elements(weights),
                                          odd_elements(normed) * odd_elements(weights)));
  }
}

// `normalize` for the rows of x.
inline at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon,
                           MakeTensor make = new_tensor) {
  const int64_t length = weight.numel(), rows = x.numel() / length;
  const at::Tensor in_order = x.contiguous();
  at::Tensor y = make(in_order.sizes(), in_order.options());
  const uint16_t *source = bits(in_order), *w = bits(weight);
  auto* target = reinterpret_cast<uint16_t*>(y.mutable_data_ptr<at::BFloat16>());
  at::parallel_for(0, rows, std::max<int64_t>(kElementsPerThread / length, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      normalize(source + row * length, w, length, static_cast<float>(epsilon), target + row * length);
    }
  });
  return y;
}

// Of `length` elements, `of` each of x and of y, rounded.
template <typename Of>
void each(const uint16_t* x, const uint16_t* y, int64_t length, const Of& of, uint16_t* target) {
  for (int64_t i = 0; i < length; i += kBlock) {
    const Pairs first = load_pairs(x + i), second = load_pairs(y + i);
    store_pairs(target + i, rounded_pairs(of(even_elements(first), even_elements(second)),
                                          of(odd_elements(first), odd_elements(second))));
  }
}

// A tensor of x's shape in whose parts `some` writes: it takes where one begins, its length and its place.
template <typename Some>
at::Tensor in_parts(const at::Tensor& x, MakeTensor make, const Some& some) {
  at::Tensor result = make(x.sizes(), x.options());
  auto* target = reinterpret_cast<uint16_t*>(result.mutable_data_ptr<at::BFloat16>());
  at::parallel_for(0, result.numel() / kBlock, kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
    some(begin * kBlock, (end - begin) * kBlock, target + begin * kBlock);
  });
  return result;
}

inline at::Tensor sum_of(const at::Tensor& x, const at::Tensor& y, MakeTensor make) {
  const at::Tensor in_order = x.contiguous();
  return in_parts(in_order, make, [&](int64_t first, int64_t length, uint16_t* target) {
    each(bits(in_order) + first, bits(y) + first, length, [](Floats a, Floats b) { return a + b; }, target);
  });
}

// silu(gate) · up. torch's own silu, of as many elements as each thread has: it would leave so few to one thread.
inline at::Tensor gated(const at::Tensor& gate, const at::Tensor& up) {
  const at::Tensor flat = gate.view(-1);
  return in_parts(gate, scratch_tensor, [&](int64_t first, int64_t length, uint16_t* target) {
    const c10::InferenceMode of_this_thread;
    const at::Tensor activated = at::silu(flat.narrow(0, first, length));
    each(bits(activated), bits(up) + first, length, [](Floats a, Floats b) { return a * b; }, target);
  });
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

  // layers: query, key, value, output, gate, up and down, and what is done to each; norms: before attention and before the
  // MLP, bfloat16.
  Block(std::vector<c10::intrusive_ptr<Layer>> layers, std::vector<c10::intrusive_ptr<RowEdit>> edits,
        std::vector<at::Tensor> norms, double epsilon, int64_t head_size, double scale)
      : layers_(std::move(layers)),
        edits_(std::move(edits)),
        norms_(std::move(norms)),
        epsilon_(epsilon),
        size_(head_size),
        scale_(scale) {
    TORCH_CHECK(size_ % (2 * kBlock) == 0, "heads of 32·n were expected");
    for (const at::Tensor& norm : norms_) {
      TORCH_CHECK(norm.scalar_type() == at::kBFloat16 && norm.is_contiguous() && norm.numel() % kBlock == 0,
                  "norms in bfloat16 of 16·n were expected");
    }
  }

  // The block's output (rows, new tokens, hidden) for x of that shape.
  //
  // cos, sin (1 or rows, new tokens, head size) are those of the new tokens' positions; keys and values (rows, key heads,
  // tokens, head size) have room for the new tokens at the end, which are written; mask (1 or rows, 1, new tokens, tokens)
  // is true for what one new token attends to, and what is added to the scores of several; where there is none a token
  // attends to itself and all before it.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& keys,
                     const at::Tensor& values, const std::optional<at::Tensor>& mask) const {
    TORCH_CHECK(x.dim() == 3 && x.scalar_type() == at::kBFloat16, "(rows, tokens, hidden) in bfloat16 was expected");
    const int64_t rows = x.size(0), added = x.size(1), first = keys.size(2) - added;
    TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(0) == rows && keys.size(3) == size_ && first >= 0,
                "keys and values do not match the batch");
    TORCH_CHECK(mask || added == 1 || first == 0, "a mask was expected for several tokens after others");
    check_angles(cos, rows, added);
    check_angles(sin, rows, added);

    const std::vector<at::Tensor> projected = multiplied(normed(x, 0), kQuery, kKey, kValue);
    at::Tensor queries = projected[kQuery].view({rows, added, -1, size_}).transpose(1, 2);
    turn(projected[kQuery], cos, sin, queries);
    turn(projected[kKey], cos, sin, keys.narrow(2, first, added));
    keep(projected[kValue], values.narrow(2, first, added));
    const at::Tensor attended = attend(queries, keys, values, mask).view({rows, added, -1});
    const at::Tensor between = sum_of(x, multiplied(attended, kOutput)[0], scratch_tensor);

    const std::vector<at::Tensor> gate_and_up = multiplied(normed(between, 1), kGate, kUp);
    const at::Tensor activated = gated(gate_and_up[0], gate_and_up[1]);
    return sum_of(between, multiplied(activated, kDown)[0], new_tensor);
  }

 private:
  enum Place { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown };

  at::Tensor normed(const at::Tensor& x, size_t norm) const { return rms_norm(x, norms_[norm], epsilon_, scratch_tensor); }

  template <typename... Places>
  std::vector<at::Tensor> multiplied(const at::Tensor& x, Places... places) const {
    return linear({EditedLayer(*layers_[places], edits_[places].get())...}, x, scratch_tensor);
  }

  void check_angles(const at::Tensor& angles, int64_t rows, int64_t added) const {
    TORCH_CHECK(angles.scalar_type() == at::kBFloat16 && angles.is_contiguous() && angles.size(-1) == size_ &&
                    (angles.numel() == added * size_ || angles.numel() == rows * added * size_),
                "a cosine and a sine in bfloat16 were expected for each token and place of a head");
  }

  // The heads of `projected` (rows, new tokens, heads · size), turned, to `target` (rows, heads, new tokens, size).
  void turn(const at::Tensor& projected, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& target) const {
    const int64_t added = projected.size(1), of_row = cos.numel() == added * size_ ? 0 : added * size_;
    each_head(projected, target, [&](int64_t row, int64_t token, const uint16_t* head, uint16_t* place) {
      const int64_t angle = row * of_row + token * size_;
      rotate(head, bits(cos) + angle, bits(sin) + angle, size_, place);
    });
  }

  void keep(const at::Tensor& projected, const at::Tensor& target) const {
    each_head(projected, target, [&](int64_t, int64_t, const uint16_t* head, uint16_t* place) {
      std::copy_n(head, size_, place);
    });
  }

  template <typename Do>
  void each_head(const at::Tensor& projected, const at::Tensor& target, const Do& act) const {
    const int64_t rows = target.size(0), heads = target.size(1), added = target.size(2);
    const uint16_t* head = bits(projected);
    auto* first = reinterpret_cast<uint16_t*>(target.mutable_data_ptr<at::BFloat16>());
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t token = 0; token < added; ++token) {
        uint16_t* place = first + row * target.stride(0) + token * target.stride(2);
        for (int64_t h = 0; h < heads; ++h, head += size_) act(row, token, head, place + h * target.stride(1));
      }
    }
  }

  // (rows, new tokens, heads, size)
  at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                    const std::optional<at::Tensor>& mask) const {
    RECORD_FUNCTION("t2app::attention", {});
    if (queries.size(2) == 1) return one_token_attention(queries, keys, values, mask, scale_, scratch_tensor);
    const bool shares_heads = queries.size(1) != keys.size(1);
    return at::scaled_dot_product_attention(queries, keys, values, mask, 0.0, !mask, scale_, shares_heads).transpose(1, 2);
  }

  const std::vector<c10::intrusive_ptr<Layer>> layers_;
  const std::vector<c10::intrusive_ptr<RowEdit>> edits_;  // null where no row is edited
  const std::vector<at::Tensor> norms_;
  const double epsilon_;
  const int64_t size_;
  const double scale_;
};

}  // namespace t2app
