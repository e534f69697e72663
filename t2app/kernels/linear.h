// A linear layer for a few rows, plain or with a spectral edit at its narrow side.
//
// Decoding multiplies one or two rows by every weight of the model, so a step costs what reading the weights costs, if
// each weight is read and widened once for all rows, and asked for before it is needed.

#pragma once

#include <ATen/ops/empty.h>
#include <omp.h>

#include <algorithm>

#include "bfloat16.h"

namespace t2app {

constexpr int64_t kWeightRowsAtOnce = 16;
// Below this many weights a second thread costs more than it does.
constexpr int64_t kWeightsPerThread = 1 << 14;
// Singular vectors whose coordinates are taken before their contributions are added: they are still in the first cache
// then, and x and the change are loaded once for all of them.
constexpr int kVectorsAtOnce = 4;

inline void check(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "shapes do not match");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "bfloat16 was expected");
  TORCH_CHECK(weight.is_contiguous() && x.size(-1) % kBlock == 0, "a contiguous weight was expected, its rows of 16·n");
}

inline std::vector<int64_t> shape_of_result(const at::Tensor& x, int64_t n) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  return shape;
}

// The bias in float32, 0 where there is none.
inline std::vector<float> wide_bias(const std::optional<at::Tensor>& bias, int64_t n) {
  std::vector<float> result(n, 0.0f);
  if (!bias) return result;
  const at::Tensor wide = bias->to(at::kFloat).contiguous();
  std::copy_n(wide.const_data_ptr<float>(), n, result.begin());
  return result;
}

// x (rows, k) in float32, in even-first order.
inline std::vector<float> wide_rows(const at::Tensor& x, int64_t rows, int64_t k) {
  const at::Tensor in_order = x.contiguous();
  std::vector<float> result(rows * k);
  for (int64_t row = 0; row < rows; ++row) put_even_first(bits(in_order) + row * k, k, result.data() + row * k);
  return result;
}

inline void check_edit(const at::Tensor& vectors, int64_t narrow, const at::Tensor& delta, int64_t first, int64_t edited,
                       int64_t rows) {
  TORCH_CHECK(vectors.dim() == 2 && vectors.is_contiguous() && vectors.size(1) == narrow,
              "the singular vectors do not match the layer");
  TORCH_CHECK(first >= 0 && edited > 0 && first + edited <= rows, "the edited rows are not in the batch");
  TORCH_CHECK(delta.scalar_type() == at::kFloat && delta.is_contiguous(), "contiguous float32 was expected for z - 1");
  TORCH_CHECK(delta.dim() == 2 && delta.size(1) == vectors.size(0) && (delta.size(0) == 1 || delta.size(0) == edited),
              "z - 1 does not match the rows or the rank");
}

// This thread's share of `count` things.
struct Share {
  int64_t begin, end;

  explicit Share(int64_t count) {
    const int64_t threads = omp_get_num_threads(), each = (count + threads - 1) / threads;
    begin = std::min(count, omp_get_thread_num() * each);
    end = std::min(count, begin + each);
  }
};

// This thread's share of the columns of x Wᵀ for x (rows, k) in even-first order and W (n, k); `store` takes row, column
// and value.
template <typename Store>
void multiply(const float* x, int64_t rows, const uint16_t* weight, int64_t n, int64_t k, const Store& store) {
  const Share share(n);
  for (int64_t tile = share.begin; tile < share.end; tile += kWeightRowsAtOnce) {
    const int64_t tile_end = std::min(tile + kWeightRowsAtOnce, share.end);
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - row);
      for (int64_t o = tile; o < tile_end; ++o) {
        float result[kRowsAtOnce];
        products(count, weight + o * k, x + row * k, k, result);
        for (int64_t r = 0; r < count; ++r) store(row + r, o, result[r]);
      }
    }
  }
}

// Eight integers of a singular vector as float32.
inline __m256 widened(const int8_t* source) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
}

// change += Σ weightᵢ (vᵢ · x) vᵢ over N vectors, one after another in memory.
template <int N>
inline void add_contributions(const int8_t* vectors, const float* weights, const float* x, int64_t narrow, float* change) {
  __m256 even[N], odd[N], factors[N];
  for (int v = 0; v < N; ++v) even[v] = odd[v] = _mm256_setzero_ps();
  for (int64_t i = 0; i < narrow; i += kBlock) {
    const __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + i + 8);
    for (int v = 0; v < N; ++v) {
      const int8_t* vector = vectors + v * narrow + i;
      if (i % kCacheLine == 0) prefetch(vector);
      even[v] = _mm256_fmadd_ps(widened(vector), first, even[v]);
      odd[v] = _mm256_fmadd_ps(widened(vector + 8), second, odd[v]);
    }
  }
  for (int v = 0; v < N; ++v) factors[v] = _mm256_set1_ps(sum(_mm256_add_ps(even[v], odd[v])) * weights[v]);
  for (int64_t i = 0; i < narrow; i += kBlock) {
    __m256 first = _mm256_loadu_ps(change + i), second = _mm256_loadu_ps(change + i + 8);
    for (int v = 0; v < N; ++v) {
      const int8_t* vector = vectors + v * narrow + i;
      first = _mm256_fmadd_ps(widened(vector), factors[v], first);
      second = _mm256_fmadd_ps(widened(vector + 8), factors[v], second);
    }
    _mm256_storeu_ps(change + i, first);
    _mm256_storeu_ps(change + i + 8, second);
  }
}

// V((z − 1) ⊙ Vᵀ side) for the edited rows of a batch, rows `first` to first + count, each thread over its share of V.
class Edit {
 public:
  Edit(const at::Tensor& vectors, const at::Tensor& scales, const at::Tensor& delta, int64_t first, int64_t count,
       int64_t threads)
      : vectors_(vectors.const_data_ptr<int8_t>()),
        rank_(vectors.size(0)),
        narrow_(vectors.size(1)),
        first_(first),
        count_(count),
        shared_(delta.size(0) == 1),
        // Two cache lines between one thread's part and the next one's: they write to theirs all the time.
        stride_(count * narrow_ + 32),
        weights_(delta.numel()),
        changes_(threads * stride_, 0.0f) {
    const float *d = delta.const_data_ptr<float>(), *s = scales.const_data_ptr<float>();
    for (int64_t row = 0; row < delta.size(0); ++row) {
      for (int64_t i = 0; i < rank_; ++i) weights_[row * rank_ + i] = d[row * rank_ + i] * s[i] * s[i];
    }
  }

  // This thread's share of V is going to be read.
  void prefetch_share() const { prefetch_beginning(vectors_ + Share(rank_).begin * narrow_); }

  // This thread's part of the change, from all rows' narrow side in even-first order.
  void compute(const float* side) {
    const Share share(rank_);
    int64_t i = share.begin;
    for (; i + kVectorsAtOnce <= share.end; i += kVectorsAtOnce) contribute<kVectorsAtOnce>(side, i);
    for (; i < share.end; ++i) contribute<1>(side, i);
  }

  // Adds what all threads have computed to the edited rows, from one place of theirs to another.
  void apply(float* side, int64_t begin, int64_t end, int64_t threads) const {
    for (int64_t row = 0; row < count_; ++row) {
      float* edited = side + (first_ + row) * narrow_;
      for (int64_t t = 0; t < threads; ++t) {
        const float* change = changes_.data() + t * stride_ + row * narrow_;
        for (int64_t i = begin; i < end; ++i) edited[i] += change[i];
      }
    }
  }

 private:
  template <int N>
  void contribute(const float* side, int64_t vector) {
    float* change = changes_.data() + omp_get_thread_num() * stride_;
    for (int64_t row = 0; row < count_; ++row) {
      add_contributions<N>(vectors_ + vector * narrow_, weights_.data() + (shared_ ? 0 : row * rank_) + vector,
                           side + (first_ + row) * narrow_, narrow_, change + row * narrow_);
    }
  }

  const int8_t* vectors_;
  const int64_t rank_, narrow_, first_, count_;
  const bool shared_;
  const int64_t stride_;
  std::vector<float> weights_, changes_;
};

inline int threads_for(int64_t weights) {
  return std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), weights / kWeightsPerThread));
}

// y = x Wᵀ + b. x (…, in_features) and weight (out_features, in_features) are bfloat16; in_features divides by 16.
inline at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check(x, weight);
  const int64_t n = weight.size(0), k = weight.size(1), rows = x.numel() / k;
  const std::vector<float> wide = wide_rows(x, rows, k), b = wide_bias(bias, n);
  at::Tensor y = at::empty(shape_of_result(x, n), x.options());
  auto* target = y.mutable_data_ptr<at::BFloat16>();
  const uint16_t* w = bits(weight);
#pragma omp parallel num_threads(threads_for(n* k))
  multiply(wide.data(), rows, w, n, k,
           [&](int64_t row, int64_t o, float value) { target[row * n + o] = value + b[o]; });
  return y;
}

// `few_rows_linear` with W' = U diag(σ ⊙ z) Vᵀ in place of W for the rows from `first` on, and W itself for the others.
// Of the layer's narrow side, vectors (rank, narrow) holds a singular vector a row: scale · integers in int8, in even-first
// order; scales (rank,) are float32. delta (1 or edited rows, rank) is z − 1 in float32. Each vector is read from memory
// once, for its coordinate and for its contribution.
inline at::Tensor few_rows_adapted(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   const at::Tensor& vectors, const at::Tensor& scales, bool edits_input,
                                   const at::Tensor& delta, int64_t first, int64_t edited) {
  check(x, weight);
  const int64_t n = weight.size(0), k = weight.size(1), rows = x.numel() / k;
  TORCH_CHECK(vectors.scalar_type() == at::kChar && vectors.size(1) % kBlock == 0, "8-bit vectors of 16·n were expected");
  check_edit(vectors, edits_input ? k : n, delta, first, edited, rows);
  TORCH_CHECK(scales.scalar_type() == at::kFloat && scales.is_contiguous() && scales.numel() == vectors.size(0),
              "a scale in float32 was expected for each singular vector");
  const std::vector<float> wide = wide_rows(x, rows, k), b = wide_bias(bias, n);
  at::Tensor y = at::empty(shape_of_result(x, n), x.options());
  auto* target = y.mutable_data_ptr<at::BFloat16>();
  const uint16_t* w = bits(weight);
  const int most_threads = threads_for(n * k);
  Edit edit(vectors, scales, delta, first, edited, most_threads);
  std::vector<float> product(edits_input ? 0 : rows * n);
#pragma omp parallel num_threads(most_threads)
  {
    const int64_t threads = omp_get_num_threads();
    if (edits_input) {
      edit.compute(wide.data());
      prefetch_beginning(w + Share(n).begin * k);
#pragma omp barrier
      // Each thread has its own copy of x, so that none waits for another's.
      std::vector<float> own(wide);
      edit.apply(own.data(), 0, k, threads);
      multiply(own.data(), rows, w, n, k,
               [&](int64_t row, int64_t o, float value) { target[row * n + o] = value + b[o]; });
    } else {
      multiply(wide.data(), rows, w, n, k,
               [&](int64_t row, int64_t o, float value) { product[row * n + place(o)] = value; });
      edit.prefetch_share();
#pragma omp barrier
      edit.compute(product.data());
#pragma omp barrier
      // Whole blocks, whose elements are in another order here than in the result.
      const Share blocks(n / kBlock);
      const int64_t begin = blocks.begin * kBlock, end = blocks.end * kBlock;
      edit.apply(product.data(), begin, end, threads);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t o = begin; o < end; ++o) target[row * n + o] = product[row * n + place(o)] + b[o];
      }
    }
  }
  return y;
}

}  // namespace t2app
