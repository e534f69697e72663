// A decoder block of Llama's kind, as a plan edits it, for the new tokens of a batch.

#pragma once

#include <array>
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

// `normalize` for each of `rows` rows of x.
inline void normalize_rows(const uint16_t* x, int64_t rows, const Tensor& weight, float epsilon, uint16_t* target) {
  const int64_t length = weight.numel();
  const uint16_t* weights = bits(weight);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(kElementsPerThread / length, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      normalize(x + row * length, weights, length, epsilon, target + row * length);
    }
  });
}

// target = of(x, y), rounded, for `length` elements; target may be x or y.
template <typename Of>
void each(const uint16_t* x, const uint16_t* y, int64_t length, const Of& of, uint16_t* target) {
  torch::stable::parallel_for(0, length / kBlock, kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < end * kBlock; i += kBlock) {
      const Pairs first = load_pairs(x + i), second = load_pairs(y + i);
      store_pairs(target + i, of(first, second));
    }
  });
}

inline Pairs sums(Pairs x, Pairs y) {
  return rounded_pairs(even_elements(x) + even_elements(y), odd_elements(x) + odd_elements(y));
}

// silu(gate) · up, rounded where transformers rounds.
inline Pairs gated(Pairs gate, Pairs up) {
  const Pairs activated = rounded_pairs(silu(even_elements(gate)), silu(odd_elements(gate)));
  return rounded_pairs(even_elements(activated) * even_elements(up), odd_elements(activated) * odd_elements(up));
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

// torch's attention of several tokens a row, (rows, tokens, heads, size). added: what is added to the scores, (1 or rows, 1,
// tokens, all tokens) in bfloat16; where there is none a token attends to itself and all before it.
inline Tensor attention_of_several(const Heads& queries, const Heads& keys, const Heads& values,
                                   const std::optional<Tensor>& added, double scale) {
  const Recorded recorded(kAttention);
  using torch::stable::detail::from;
  const bool is_causal = !added, shares_heads = queries.heads != keys.heads;
  std::array stack{from(tensor_of(queries)), from(tensor_of(keys)), from(tensor_of(values)), from(added),
                   from(0.0), from(is_causal), from(std::optional(scale)), from(shares_heads)};
  const auto error = torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch's attention failed");
  Tensor attended = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::contiguous(torch::stable::transpose(attended, 1, 2));
}

// What all blocks take of a batch beside its vectors and its keys and values.
struct Pass {
  int64_t rows, tokens;         // new ones of each row
  const uint16_t *cos, *sin;    // of their positions, (1 or rows, tokens, head size)
  int64_t angles_row_stride;    // 0 where all rows have the same
  Seen seen;                    // by one new token a row
  std::optional<Tensor> added;  // as `attention_of_several` takes it, for several new tokens
};

class Block {
 public:
  static constexpr int64_t kLayers = 7, kNorms = 2;

  // layers: query, key, value, output, gate, up and down, and what is done to each; norms: before attention and before the
  // MLP, bfloat16.
  Block(std::vector<EditedLayer> layers, std::vector<Tensor> norms, double epsilon, int64_t head_size, double scale)
      : layers_(std::move(layers)),
        norms_(std::move(norms)),
        epsilon_(static_cast<float>(epsilon)),
        size_(head_size),
        scale_(scale) {
    STD_TORCH_CHECK(size_ % (2 * kBlock) == 0, "heads of 32·n were expected");
    STD_TORCH_CHECK(scale_ > 0, "a scale above 0 was expected");
    for (const Tensor& norm : norms_) check_norm(norm);
    STD_TORCH_CHECK(width_of(kQuery) % size_ == 0 && width_of(kKey) % size_ == 0 && width_of(kKey) == width_of(kValue) &&
                        width_of(kGate) == width_of(kUp) && width_of(kOutput) == hidden() && width_of(kDown) == hidden(),
                    "layers that fit each other were expected");
  }

  static void check_norm(const Tensor& norm) {
    STD_TORCH_CHECK(is_bfloat16(norm) && norm.is_contiguous() && norm.numel() % kBlock == 0,
                    "norms in bfloat16 of 16·n were expected");
  }

  int64_t hidden() const { return layers_[kQuery].layer.in_features; }
  int64_t key_heads() const { return width_of(kKey) / size_; }

  // Takes the vectors `x` (rows, new tokens, hidden) through the block, in place. keys and values have the new tokens last,
  // which are written.
  void forward(uint16_t* x, const Pass& pass, const MutableHeads& keys, const MutableHeads& values) const {
    const int64_t count = pass.rows * pass.tokens, elements = count * hidden();
    Scratch<uint16_t> normed(elements), change(elements);

    normalize_rows(x, count, norms_[0], epsilon_, normed.data());
    attend(normed.data(), pass, keys, values, change.data());
    each(x, change.data(), elements, sums, x);

    normalize_rows(x, count, norms_[1], epsilon_, normed.data());
    Scratch<uint16_t> gate(count * width_of(kGate)), up(count * width_of(kUp));
    multiply({normed.data(), pass.rows, pass.tokens, hidden()}, {kGate, kUp}, {gate.data(), up.data()});
    each(gate.data(), up.data(), count * width_of(kUp), gated, gate.data());
    multiply({gate.data(), pass.rows, pass.tokens, width_of(kUp)}, {kDown}, {change.data()});
    each(x, change.data(), elements, sums, x);
  }

 private:
  enum Place { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown };

  int64_t width_of(Place place) const { return layers_[place].layer.out_features; }

  void multiply(const Tokens& x, const std::vector<Place>& places, const std::vector<uint16_t*>& results) const {
    std::vector<EditedLayer> layers;
    for (const Place place : places) layers.push_back(layers_[place]);
    linear(layers, x, results);
  }

  // What attention adds to the vectors, for x before it.
  void attend(const uint16_t* x, const Pass& pass, const MutableHeads& keys, const MutableHeads& values,
              uint16_t* result) const {
    const int64_t rows = pass.rows, tokens = pass.tokens, count = rows * tokens;
    Scratch<uint16_t> query(count * width_of(kQuery)), key(count * width_of(kKey)), value(count * width_of(kValue));
    multiply({x, rows, tokens, hidden()}, {kQuery, kKey, kValue}, {query.data(), key.data(), value.data()});
    const auto heads_of = [&](Scratch<uint16_t>& of, Place place) {
      return heads_of_tokens(of.data(), rows, width_of(place) / size_, tokens, size_);
    };
    const MutableHeads queries = heads_of(query, kQuery);
    each_head(queries, [&](int64_t row, int64_t head, int64_t token) { turn(queries, queries, pass, row, head, token); });
    const MutableHeads new_keys = heads_of(key, kKey), new_values = heads_of(value, kValue);
    const MutableHeads kept_keys = keys.last(tokens), kept_values = values.last(tokens);
    each_head(new_keys, [&](int64_t row, int64_t head, int64_t token) {
      turn(new_keys, kept_keys, pass, row, head, token);
      std::copy_n(new_values.at(row, head, token), size_, kept_values.at(row, head, token));
    });
    if (tokens > 1) {
      const Tensor attended = attention_of_several(queries, keys, values, pass.added, scale_);
      multiply({bits(attended), rows, tokens, width_of(kQuery)}, {kOutput}, {result});
      return;
    }
    Scratch<uint16_t> attended(count * width_of(kQuery));
    one_token_attention(queries, keys, values, pass.seen, static_cast<float>(scale_), attended.data());
    multiply({attended.data(), rows, tokens, width_of(kQuery)}, {kOutput}, {result});
  }

  template <typename Do>
  static void each_head(const MutableHeads& heads, const Do& act) {
    for (int64_t row = 0; row < heads.rows; ++row) {
      for (int64_t token = 0; token < heads.tokens; ++token) {
        for (int64_t head = 0; head < heads.heads; ++head) act(row, head, token);
      }
    }
  }

  void turn(const MutableHeads& heads, const MutableHeads& target, const Pass& pass, int64_t row, int64_t head,
            int64_t token) const {
    const int64_t angle = row * pass.angles_row_stride + token * size_;
    rotate(heads.at(row, head, token), pass.cos + angle, pass.sin + angle, size_, target.at(row, head, token));
  }

  const std::vector<EditedLayer> layers_;
  const std::vector<Tensor> norms_;
  const float epsilon_;
  const int64_t size_;
  const double scale_;
};

}  // namespace t2app
