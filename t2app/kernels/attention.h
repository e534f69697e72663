// Attention of one new token a row to the keys and values that are kept: softmax(q Kᵀ · scale) V.
//
// torch's attention for many queries divides such work into products too small to be worth their calls.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bfloat16.h"
#ifdef __AVX512BF16__
#include "dot_products.h"
#endif
#include "scratch.h"

namespace t2app {

// The queries (count, size) of a row that share a head of keys and values, each (tokens, size), and where their outputs
// go. A token's vector begins a stride after the one's before it.
struct Group {
  const uint16_t *queries, *keys, *values;
  int64_t count, size, tokens, key_stride, value_stride;
  const bool* seen;  // (tokens,), or null where all are
  float scale;
  at::BFloat16* outputs;
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

// exp of what is not above 0, within float32's rounding; exactly 0 below -87, where float32 ends.
inline Floats exponential(Floats x) {
  const Floats least = all(-87.0f);
  const Floats bounded = _mm256_max_ps(x, least);
  // exp x = 2ⁿ exp r with |r| ≤ ln 2 / 2; ln 2 in two parts, so that n · ln 2 is not rounded.
  const Floats n = _mm256_round_ps(bounded * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), bounded));
  Floats series = all(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    series = multiply_add(series, r, all(coefficient));
  }
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const Floats result = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(series), power));
  return _mm256_and_ps(result, _mm256_cmp_ps(x, least, _CMP_GT_OQ));
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

// Of the tokens that a row is padded with, as many as leave the others in their lanes, and so their sums as they are.
inline int64_t whole_lanes(int64_t tokens) { return tokens - tokens % kLanes; }

// Groups of one size, in float32.
class WideAttention {
 public:
  WideAttention(int64_t count, int64_t size, int64_t tokens)
      : queries_(count * size), scores_(count * tokens), outputs_(count * size), of_token_(count) {}

  void attend(const Group& group) {
    const int64_t count = group.count, size = group.size, tokens = group.tokens;
    for (int64_t g = 0; g < count; ++g) put_even_first(group.queries + g * size, size, queries_.data() + g * size);
    for (int64_t t = 0; t < tokens; ++t) {
      products(count, group.keys + t * group.key_stride, queries_.data(), size, of_token_.data());
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
    for (int64_t i = 0; i < count * size; ++i) group.outputs[i] = outputs_[i - i % size + place(i % size)];
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
    std::copy_n(outputs_.begin(), count * size, group.outputs);
  }

 private:
  Scratch<float> scores_;
  Scratch<uint16_t> weights_;
  Scratch<float> outputs_;
};
#endif

// The outputs (rows, 1, heads, size) for query (rows, heads, 1, size) and keys and values (rows, key heads, tokens,
// size), all bfloat16, size divides by 16; mask (1 or rows, 1, 1, tokens) is true for what a row attends to.
inline at::Tensor one_token_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                               const std::optional<at::Tensor>& mask, double scale, MakeTensor make = new_tensor) {
  const int64_t rows = query.size(0), heads = query.size(1), size = query.size(3);
  const int64_t key_heads = keys.size(1), tokens = keys.size(2), count = heads / key_heads;
  TORCH_CHECK(query.dim() == 4 && query.size(2) == 1 && heads % key_heads == 0, "one query a row was expected");
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(0) == rows && keys.size(3) == size && size % kBlock == 0,
              "keys and values do not match the query");
  TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1, "keys and values were expected with contiguous vectors");
  for (const at::Tensor& tensor : {query, keys, values}) {
    TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, "bfloat16 was expected");
  }
  TORCH_CHECK(scale > 0, "a scale above 0 was expected");
  const at::Tensor queries = query.contiguous();
  const at::Tensor seen = mask ? mask->contiguous() : at::Tensor();
  TORCH_CHECK(!mask || (seen.scalar_type() == at::kBool && seen.numel() == seen.size(0) * tokens &&
                        (seen.size(0) == rows || seen.size(0) == 1)),
              "a mask of one bool a row and token was expected");
  at::Tensor result = make({rows, 1, heads, size}, query.options());
  at::BFloat16* outputs = result.mutable_data_ptr<at::BFloat16>();
  const auto group_of = [&](int64_t task) {
    const int64_t row = task / key_heads, head = task % key_heads, first = (row * heads + head * count) * size;
    const bool* row_seen = mask ? seen.const_data_ptr<bool>() + (seen.size(0) == 1 ? 0 : row * tokens) : nullptr;
    const int64_t padding = mask ? whole_lanes(std::find(row_seen, row_seen + tokens, true) - row_seen) : 0;
    return Group{
        .queries = bits(queries) + first,
        .keys = bits(keys) + row * keys.stride(0) + head * keys.stride(1) + padding * keys.stride(2),
        .values = bits(values) + row * values.stride(0) + head * values.stride(1) + padding * values.stride(2),
        .count = count,
        .size = size,
        .tokens = tokens - padding,
        .key_stride = keys.stride(2),
        .value_stride = values.stride(2),
        .seen = mask ? row_seen + padding : nullptr,
        .scale = static_cast<float>(scale),
        .outputs = outputs + first,
    };
  };
  const auto attend_by = [&]<typename Way>() {
    at::parallel_for(0, rows * key_heads, 1, [&](int64_t begin, int64_t end) {
      Way way(count, size, tokens);
      for (int64_t task = begin; task < end; ++task) way.attend(group_of(task));
    });
  };
#ifdef __AVX512BF16__
  if (rows * key_heads > 0 && DotAttention::takes(group_of(0))) {
    attend_by.template operator()<DotAttention>();
    return result;
  }
#endif
  attend_by.template operator()<WideAttention>();
  return result;
}

}  // namespace t2app
