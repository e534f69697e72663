// Products of several rows on CPUs that multiply bfloat16 themselves (AVX-512 BF16): there is more to compute for each
// weight than reading it costs, and they do twice as much of it at a time as float32 allows.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "linear.h"

namespace t2app {

#define T2APP_DOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

// Elements that are multiplied together; the lengths of all rows divide by it.
constexpr int64_t kDotBlock = 32;
constexpr int kDotRows = 8, kDotColumns = 3;

// result (R, C): R rows of x by C rows of W, both of length k.
template <int R, int C>
T2APP_DOT void dot_tile(const uint16_t* x, const uint16_t* weights, int64_t k, float* result) {
  __m512 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += kDotBlock) {
    __m512bh columns[C];
    for (int c = 0; c < C; ++c) {
      columns[c] = (__m512bh)_mm512_loadu_si512(weights + c * k + i);
      prefetch(weights + c * k + i);
    }
    for (int r = 0; r < R; ++r) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(x + r * k + i);
      for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, columns[c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) result[r * C + c] = _mm512_reduce_add_ps(sums[r][c]);
}

template <int C, typename Store>
void dot_columns(const uint16_t* x, int64_t rows, const uint16_t* weights, int64_t k, const Store& store) {
  float result[kDotRows * C];
  int64_t row = 0;
  const auto tile = [&](auto count, auto multiply) {
    for (; row + count <= rows; row += count) {
      multiply(x + row * k, weights, k, result);
      for (int64_t r = 0; r < count; ++r)
        for (int c = 0; c < C; ++c) store(row + r, c, result[r * C + c]);
    }
  };
  tile(kDotRows, dot_tile<kDotRows, C>);
  tile(4, dot_tile<4, C>);
  tile(2, dot_tile<2, C>);
  tile(1, dot_tile<1, C>);
}

// Columns begin to end of x Wᵀ for x (rows, k) and W (n, k); `store` takes row, column and value.
template <typename Store>
void dot_multiply(const uint16_t* x, int64_t rows, const uint16_t* weight, int64_t begin, int64_t end, int64_t k,
                  const Store& store) {
  int64_t o = begin;
  const auto stored = [&](int64_t row, int64_t c, float value) { store(row, o + c, value); };
  for (; o + kDotColumns <= end; o += kDotColumns) dot_columns<kDotColumns>(x, rows, weight + o * k, k, stored);
  for (; o < end; ++o) dot_columns<1>(x, rows, weight + o * k, k, stored);
}

// sums (R, narrow) = coefficients (R, 2 · pairs) · vectors (2 · pairs, narrow), the coefficients in pairs of bfloat16.
template <int R>
T2APP_DOT void combine_rows(const uint32_t* coefficients, int64_t pairs, const uint16_t* vectors, int64_t narrow,
                            float* sums) {
  for (int64_t column = 0; column < narrow; column += kDotBlock) {
    // Of every eight columns the first four and the last four, as interleaving two vectors leaves them.
    __m512 low[R], high[R];
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
      const __m512i first = _mm512_loadu_si512(vectors + 2 * p * narrow + column);
      const __m512i second = _mm512_loadu_si512(vectors + (2 * p + 1) * narrow + column);
      const __m512bh lows = (__m512bh)_mm512_unpacklo_epi16(first, second);
      const __m512bh highs = (__m512bh)_mm512_unpackhi_epi16(first, second);
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(coefficients[r * pairs + p]));
        low[r] = _mm512_dpbf16_ps(low[r], pair, lows);
        high[r] = _mm512_dpbf16_ps(high[r], pair, highs);
      }
    }
    for (int r = 0; r < R; ++r) {
      float lows[16], highs[16];
      _mm512_storeu_ps(lows, low[r]);
      _mm512_storeu_ps(highs, high[r]);
      for (int lane = 0; lane < 4; ++lane) {
        std::memcpy(sums + r * narrow + column + 8 * lane, lows + 4 * lane, 4 * sizeof(float));
        std::memcpy(sums + r * narrow + column + 8 * lane + 4, highs + 4 * lane, 4 * sizeof(float));
      }
    }
  }
}

inline void combine(int64_t rows, const uint32_t* coefficients, int64_t pairs, const uint16_t* vectors, int64_t narrow,
                    float* sums) {
  int64_t row = 0;
  const auto some = [&](int count, auto combined) {
    for (; row + count <= rows; row += count) {
      combined(coefficients + row * pairs, pairs, vectors, narrow, sums + row * narrow);
    }
  };
  some(kDotRows, combine_rows<kDotRows>);
  some(4, combine_rows<4>);
  some(2, combine_rows<2>);
  some(1, combine_rows<1>);
}

inline uint16_t rounded(float value) { return at::BFloat16(value).x; }

inline void check_dot(const at::Tensor& x, const at::Tensor& weight) {
  check(x, weight);
  TORCH_CHECK(__builtin_cpu_supports("avx512bf16"), "this CPU does not multiply bfloat16");
  TORCH_CHECK(x.size(-1) % kDotBlock == 0, "rows of 32·n were expected");
}

// y = x Wᵀ + b, as `few_rows_linear`; in_features divides by 32.
inline at::Tensor dot_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_dot(x, weight);
  const int64_t n = weight.size(0), k = weight.size(1), rows = x.numel() / k;
  const at::Tensor in_order = x.contiguous();
  const std::vector<float> b = wide_bias(bias, n);
  at::Tensor y = at::empty(shape_of_result(x, n), x.options());
  auto* target = y.mutable_data_ptr<at::BFloat16>();
#pragma omp parallel num_threads(threads_for(n* k))
  {
    const Share share(n);
    dot_multiply(bits(in_order), rows, bits(weight), share.begin, share.end, k,
                 [&](int64_t row, int64_t o, float value) { target[row * n + o] = value + b[o]; });
  }
  return y;
}

// V((z − 1) ⊙ Vᵀ side) for the edited rows of a batch, each thread over its share of V, which stays in its second cache
// between the coordinates and the contributions.
class DotEdit {
 public:
  DotEdit(const at::Tensor& vectors, const at::Tensor& delta, int64_t first, int64_t count, int64_t threads)
      : vectors_(bits(vectors)),
        rank_(vectors.size(0)),
        narrow_(vectors.size(1)),
        first_(first),
        count_(count),
        delta_(delta.const_data_ptr<float>()),
        delta_stride_(delta.size(0) == 1 ? 0 : rank_),
        changes_(threads, std::vector<float>()) {}

  // This thread's part of the change, from all rows' narrow side.
  void compute(const uint16_t* side) {
    const Share share(rank_ / 2);
    const int64_t pairs = share.end - share.begin, begin = 2 * share.begin;
    std::vector<uint16_t> coefficients(count_ * 2 * pairs);
    dot_multiply(side + first_ * narrow_, count_, vectors_, begin, begin + 2 * pairs, narrow_,
                 [&](int64_t row, int64_t i, float coordinate) {
                   coefficients[row * 2 * pairs + i - begin] = rounded(coordinate * delta_[row * delta_stride_ + i]);
                 });
    std::vector<float>& change = changes_[omp_get_thread_num()];
    change.resize(count_ * narrow_);
    combine(count_, reinterpret_cast<const uint32_t*>(coefficients.data()), pairs, vectors_ + begin * narrow_, narrow_,
            change.data());
  }

  bool edits(int64_t row) const { return row >= first_ && row < first_ + count_; }

  // What an edited row is changed by at one place, after all threads have computed their part.
  float change(int64_t row, int64_t place, int64_t threads) const {
    float value = 0.0f;
    for (int64_t t = 0; t < threads; ++t) value += changes_[t][(row - first_) * narrow_ + place];
    return value;
  }

 private:
  const uint16_t* vectors_;
  const int64_t rank_, narrow_, first_, count_;
  const float* delta_;
  const int64_t delta_stride_;
  std::vector<std::vector<float>> changes_;
};

// `dot_linear` with W' in place of W for the rows from `first` on, as `few_rows_adapted`; vectors (rank, narrow) are
// bfloat16, since here it is not reading them that takes the time, and in_features and the rank divide by 32.
inline at::Tensor dot_adapted(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              const at::Tensor& vectors, bool edits_input, const at::Tensor& delta, int64_t first,
                              int64_t edited) {
  check_dot(x, weight);
  const int64_t n = weight.size(0), k = weight.size(1), rows = x.numel() / k, narrow = edits_input ? k : n;
  TORCH_CHECK(vectors.scalar_type() == at::kBFloat16 && vectors.size(1) % kDotBlock == 0, "bfloat16 was expected");
  check_edit(vectors, narrow, delta, first, edited, rows);
  const at::Tensor in_order = x.contiguous();
  const std::vector<float> b = wide_bias(bias, n);
  at::Tensor y = at::empty(shape_of_result(x, n), x.options());
  auto* target = y.mutable_data_ptr<at::BFloat16>();
  const int most_threads = threads_for(n * k);
  DotEdit edit(vectors, delta, first, edited, most_threads);
  std::vector<float> product(edits_input ? 0 : rows * n);
  std::vector<uint16_t> side(rows * narrow);
  if (edits_input) std::copy_n(bits(in_order), rows * k, side.begin());
#pragma omp parallel num_threads(most_threads)
  {
    const int64_t threads = omp_get_num_threads();
    const Share share(n);
    if (edits_input) {
      edit.compute(side.data());
#pragma omp barrier
      const Share places(k);
      for (int64_t row = first; row < first + edited; ++row) {
        for (int64_t i = places.begin; i < places.end; ++i) {
          uint16_t& value = side[row * k + i];
          value = rounded(widened(value) + edit.change(row, i, threads));
        }
      }
#pragma omp barrier
      dot_multiply(side.data(), rows, bits(weight), share.begin, share.end, k,
                   [&](int64_t row, int64_t o, float value) { target[row * n + o] = value + b[o]; });
    } else {
      dot_multiply(bits(in_order), rows, bits(weight), share.begin, share.end, k,
                   [&](int64_t row, int64_t o, float value) {
                     product[row * n + o] = value;
                     side[row * n + o] = rounded(value);
                   });
#pragma omp barrier
      edit.compute(side.data());
#pragma omp barrier
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t o = share.begin; o < share.end; ++o) {
          const float change = edit.edits(row) ? edit.change(row, o, threads) : 0.0f;
          target[row * n + o] = product[row * n + o] + change + b[o];
        }
      }
    }
  }
  return y;
}

}  // namespace t2app
