// Attention of one new token a row to the keys and values that are kept: softmax(q Kᵀ · scale) V.
//
// torch's attention for many queries divides such work into products too small to be worth their calls.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bfloat16.h"

namespace t2app {

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

// In place: scores (tokens,) to weights that sum to 1; tokens that `seen` leaves out get 0.
inline void softmax(float* scores, int64_t tokens, float scale, const bool* seen) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < tokens; ++t) {
    scores[t] = seen == nullptr || seen[t] ? scores[t] * scale : -std::numeric_limits<float>::infinity();
    largest = std::max(largest, scores[t]);
  }
  float total = 0.0f;
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    const Floats weights = exponential(load(scores + t) - all(largest));
    store(scores + t, weights);
    total += sum(weights);
  }
  for (; t < tokens; ++t) total += scores[t] = std::exp(scores[t] - largest);
  for (t = 0; t < tokens; ++t) scores[t] /= total;
}

// The outputs (rows, 1, heads, size) for query (rows, heads, 1, size) and keys and values (rows, key heads, tokens,
// size), all bfloat16, size divides by 16; mask (1 or rows, 1, 1, tokens) is true for what a row attends to.
inline at::Tensor one_token_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                               const std::optional<at::Tensor>& mask, double scale) {
  const int64_t rows = query.size(0), heads = query.size(1), size = query.size(3);
  const int64_t key_heads = keys.size(1), tokens = keys.size(2), group = heads / key_heads;
  TORCH_CHECK(query.dim() == 4 && query.size(2) == 1 && heads % key_heads == 0, "one query a row was expected");
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(0) == rows && keys.size(3) == size && size % kBlock == 0,
              "keys and values do not match the query");
  TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1, "keys and values were expected with contiguous vectors");
  for (const at::Tensor& tensor : {query, keys, values}) {
    TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, "bfloat16 was expected");
  }
  const at::Tensor queries = query.contiguous();
  const at::Tensor seen = mask ? mask->contiguous() : at::Tensor();
  TORCH_CHECK(!mask || (seen.scalar_type() == at::kBool && seen.numel() == seen.size(0) * tokens &&
                        (seen.size(0) == rows || seen.size(0) == 1)),
              "a mask of one bool a row and token was expected");
  at::Tensor result = at::empty({rows, 1, heads, size}, query.options());
  auto* target = result.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, rows * key_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> q(group * size), scores(group * tokens), products_of_token(group), output(group * size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / key_heads, head = task % key_heads;
      const int64_t first = (row * heads + head * group) * size;
      for (int64_t g = 0; g < group; ++g) put_even_first(bits(queries) + first + g * size, size, q.data() + g * size);
      const uint16_t* k = bits(keys) + row * keys.stride(0) + head * keys.stride(1);
      for (int64_t t = 0; t < tokens; ++t) {
        products(group, k + t * keys.stride(2), q.data(), size, products_of_token.data());
        for (int64_t g = 0; g < group; ++g) scores[g * tokens + t] = products_of_token[g];
      }
      const bool* row_seen = mask ? seen.const_data_ptr<bool>() + (seen.size(0) == 1 ? 0 : row * tokens) : nullptr;
      for (int64_t g = 0; g < group; ++g) softmax(scores.data() + g * tokens, tokens, scale, row_seen);
      const uint16_t* v = bits(values) + row * values.stride(0) + head * values.stride(1);
      int64_t g = 0;
      for (; g + 3 <= group; g += 3) {
        weighted_values<3>(scores.data() + g * tokens, tokens, v, values.stride(2), size, output.data() + g * size);
      }
      for (; g < group; ++g) {
        weighted_values<1>(scores.data() + g * tokens, tokens, v, values.stride(2), size, output.data() + g * size);
      }
      for (int64_t head_in_group = 0; head_in_group < group; ++head_in_group) {
        for (int64_t i = 0; i < size; ++i) {
          target[first + head_in_group * size + i] = output[head_in_group * size + place(i)];
        }
      }
    }
  });
  return result;
}

}  // namespace t2app
