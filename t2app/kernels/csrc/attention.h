// Attention of one new token a row to the keys and values that are kept: softmax(q Kᵀ · scale) V.
//
// torch's attention for many queries divides such work into products too small to be worth their calls.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "bfloat16.h"
#ifdef __AVX512BF16__
#include "dot_products.h"
#endif
#include "scratch.h"
#include "tensors.h"
#include "tokens.h"

namespace t2app {

// The queries (count, size) of a row that share a head of keys and values, each (tokens, size), and where their outputs
// go. A token's vector begins a stride after the one's before it.
struct Group {
  const uint16_t *queries, *keys, *values;
  int64_t count, size, tokens, key_stride, value_stride;
  const bool* seen;  // (tokens,), or null where all are
  float scale;
  uint16_t* outputs;
};

// result (count, size) = weights (count, tokens) · values, even-first; `values` has its tokens `stride` apart.
template <int R>
void weighted_values(const float* weights, int64_t tokens, const uint16_t* values, int64_t stride, int64_t size,
                     float* result) {
  for (int64_t i = 0; i < size; i += kBlock) {
    Floats even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = zeros();
    for (int64_t t = 0; t < tokens; ++t) {
      const Pairs pairs = load_pairs(values + t * stride + i);
      const Floats first = even_elements(pairs), second = odd_elements(pairs);
      for (int r = 0; r < R; ++r) {
        const Floats weight = all(weights[r * tokens + t]);
        even[r] = multiply_add(first, weight, even[r]);
        odd[r] = multiply_add(second, weight, odd[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      store(result + r * size + i, even[r]);
      store(result + r * size + i + kLanes, odd[r]);
    }
  }
}

inline float largest_of(const float* values, int64_t count) {
  Floats most = all(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = _mm256_max_ps(most, load(values + i));
  float lanes[kLanes];
  store(lanes, most);
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (; i < count; ++i) largest = std::max(largest, values[i]);
  return largest;
}

// In place: scores (tokens,) to weights that sum to 1; tokens that `seen` leaves out get 0, scale is above 0.
inline void softmax(float* scores, int64_t tokens, float scale, const bool* seen) {
  if (seen != nullptr) {
    for (int64_t t = 0; t < tokens; ++t) {
      if (!seen[t]) scores[t] = -std::numeric_limits<float>::infinity();
    }
  }
  const float largest = largest_of(scores, tokens);
  Floats totals = zeros();
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    const Floats weights = exponential((load(scores + t) - all(largest)) * all(scale));
    store(scores + t, weights);
    totals = totals + weights;
  }
  float total = sum(totals);
  for (; t < tokens; ++t) total += scores[t] = std::exp((scores[t] - largest) * scale);
  for (t = 0; t < tokens; ++t) scores[t] /= total;
}

// Groups of one size, in float32.
class WideAttention {
 public:
  WideAttention(int64_t count, int64_t size, int64_t tokens)
      : queries_(count * size), scores_(count * tokens), outputs_(count * size), of_token_(count) {}

  void attend(const Group& group) {
    const int64_t count = group.count, size = group.size, tokens = group.tokens;
    for (int64_t g = 0; g < count; ++g) put_even_first(group.queries + g * size, size, queries_.data() + g * size);
    for (int64_t t = 0; t < tokens; ++t) {
      products(count, 1, group.keys + t * group.key_stride, queries_.data(), size, of_token_.data(), 1);
      for (int64_t g = 0; g < count; ++g) scores_[g * tokens + t] = of_token_[g];
    }
    for (int64_t g = 0; g < count; ++g) softmax(scores_.data() + g * tokens, tokens, group.scale, group.seen);
    int64_t g = 0;
    const auto some = [&](int64_t together, auto weighted) {
      for (; g + together <= count; g += together) {
        weighted(scores_.data() + g * tokens, tokens, group.values, group.value_stride, size, outputs_.data() + g * size);
      }
    };
    some(3, weighted_values<3>);
    some(1, weighted_values<1>);
    for (int64_t i = 0; i < count * size; ++i) group.outputs[i] = rounded(outputs_[i - i % size + place(i % size)]);
  }

 private:
  Scratch<float> queries_, scores_, outputs_, of_token_;
};

#ifdef __AVX512BF16__
// The same on CPUs that multiply bfloat16; the weights of the values are rounded to it.
class DotAttention {
 public:
  // Whether it can be done this way.
  static bool takes(const Group& group) {
    return group.size % kDotBlock == 0 && group.key_stride == group.size && group.value_stride == group.size;
  }

  DotAttention(int64_t count, int64_t size, int64_t tokens)
      : scores_(count * tokens), weights_(count * (tokens + 1)), outputs_(count * size) {}

  void attend(const Group& group) {
    const int64_t count = group.count, size = group.size, tokens = group.tokens, even_tokens = tokens + tokens % 2;
    for (int64_t g = 0; g < count; ++g) {
      const uint16_t* query = group.queries + g * size;
      float* scores = scores_.data() + g * tokens;
      int64_t t = 0;
      for (; t + kSumsAtOnce <= tokens; t += kSumsAtOnce) {
        dot_tile<OfBfloat16, 1, kSumsAtOnce>(query, group.keys + t * size, size, scores + t, tokens);
      }
      for (; t < tokens; ++t) dot_tile<OfBfloat16, 1, 1>(query, group.keys + t * size, size, scores + t, tokens);
      softmax(scores, tokens, group.scale, group.seen);
      uint16_t* weights = weights_.data() + g * even_tokens;
      store_rounded(weights, tokens, [&](int64_t i, __mmask16 there) { return load_some(scores + i, there); });
      if (tokens < even_tokens) weights[tokens] = 0;
    }
    combine(count, reinterpret_cast<const uint32_t*>(weights_.data()), tokens, group.values, size, outputs_.data());
    std::transform(outputs_.begin(), outputs_.end(), group.outputs, rounded);
  }

 private:
  Scratch<float> scores_;
  Scratch<uint16_t> weights_;
  Scratch<float> outputs_;
};
#endif

// The name of all attention in a profile.
constexpr const char* kAttention = "t2app::attention";

// Which tokens a row attends to: (1 or rows, tokens), all where there is none.
struct Seen {
  const bool* tokens = nullptr;
  int64_t row_stride = 0;

  const bool* of_row(int64_t row) const { return tokens == nullptr ? nullptr : tokens + row * row_stride; }
};

// That of a contiguous mask, which outlives it.
inline Seen seen_by(const Tensor& mask, int64_t rows, int64_t tokens) {
  const int64_t masked_rows = mask.size(0);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.numel() == masked_rows * tokens &&
                      (masked_rows == rows || masked_rows == 1),
                  "a mask of one bool a row and token was expected");
  return {static_cast<const bool*>(mask.const_data_ptr()), masked_rows == 1 ? 0 : tokens};
}

// The outputs (rows, heads, size) for one query a row, whose heads lie one after another, and keys and values (rows, key
// heads, tokens, size); size divides by 16, scale is above 0.
inline void one_token_attention(const Heads& queries, const Heads& keys, const Heads& values, const Seen& seen, float scale,
                                uint16_t* outputs) {
  const Recorded recorded(kAttention);
  const int64_t rows = queries.rows, size = queries.size, key_heads = keys.heads, count = queries.heads / key_heads;
  const auto group_of = [&](int64_t task) {
    const int64_t row = task / key_heads, head = task % key_heads;
    const bool* of_row = seen.of_row(row);
    // What a row is padded with is left out, so that its sums do not depend on how long the others of its batch are.
    const int64_t padding = of_row == nullptr ? 0 : std::find(of_row, of_row + keys.tokens, true) - of_row;
    return Group{
        .queries = queries.at(row, head * count, 0),
        .keys = keys.at(row, head, padding),
        .values = values.at(row, head, padding),
        .count = count,
        .size = size,
        .tokens = keys.tokens - padding,
        .key_stride = keys.token_stride,
        .value_stride = values.token_stride,
        .seen = of_row == nullptr ? nullptr : of_row + padding,
        .scale = scale,
        .outputs = outputs + (row * queries.heads + head * count) * size,
    };
  };
  const auto attend_by = [&]<typename Way>() {
    torch::stable::parallel_for(0, rows * key_heads, 1, [&](int64_t begin, int64_t end) {
      Way way(count, size, keys.tokens);
      for (int64_t task = begin; task < end; ++task) way.attend(group_of(task));
    });
  };
#ifdef __AVX512BF16__
  if (rows * key_heads > 0 && DotAttention::takes(group_of(0))) return attend_by.template operator()<DotAttention>();
#endif
  attend_by.template operator()<WideAttention>();
}

}  // namespace t2app
