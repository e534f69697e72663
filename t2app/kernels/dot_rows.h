// Products of several rows on CPUs that multiply bfloat16 themselves (AVX-512 BF16): there is more to compute for each
// weight than reading it costs, and they do twice as much of it at a time as float32 allows.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "job.h"
#include "layer.h"

namespace t2app {

// Elements that are multiplied together; the lengths of all rows divide by it.
constexpr int64_t kDotBlock = 32;
constexpr int kDotRows = 8, kDotColumns = 3;

// result (R, C): R rows of x by C rows of W, both of length k.
template <int R, int C>
void dot_tile(const uint16_t* x, const uint16_t* weights, int64_t k, float* result) {
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
void combine_rows(const uint32_t* coefficients, int64_t pairs, const uint16_t* vectors, int64_t narrow,
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

// V((z − 1) ⊙ Vᵀ side) for the edited rows of a batch, each thread over its share of V, which stays in its second cache
// between the coordinates and the contributions.
class DotEdit {
 public:
  DotEdit(const Layer& layer, int64_t threads)
      : layer_(layer), vectors_(bits(*layer.vectors)), narrow_(layer.narrow()), changes_(threads) {}

  // This thread's part of the change, from all rows' narrow side.
  void compute(const uint16_t* side) {
    const Share share(layer_.rank() / 2);
    const int64_t pairs = share.end - share.begin, begin = 2 * share.begin, count = layer_.edited;
    std::vector<uint16_t> coefficients(count * 2 * pairs);
    dot_multiply(side + layer_.first * narrow_, count, vectors_, begin, begin + 2 * pairs, narrow_,
                 [&](int64_t row, int64_t i, float coordinate) {
                   coefficients[row * 2 * pairs + i - begin] = rounded(coordinate * layer_.factors_of(row)[i]);
                 });
    std::vector<float>& change = changes_[omp_get_thread_num()];
    change.resize(count * narrow_);
    combine(count, reinterpret_cast<const uint32_t*>(coefficients.data()), pairs, vectors_ + begin * narrow_, narrow_,
            change.data());
  }

  // Where this thread's share of V begins.
  const void* beginning() const { return vectors_ + 2 * Share(layer_.rank() / 2).begin * narrow_; }

  bool edits(int64_t row) const { return row >= layer_.first && row < layer_.first + layer_.edited; }

  // What an edited row is changed by at one place, after all threads have computed their part.
  float change(int64_t row, int64_t place) const {
    const int64_t threads = omp_get_num_threads();
    float value = 0.0f;
    for (int64_t t = 0; t < threads; ++t) value += changes_[t][(row - layer_.first) * narrow_ + place];
    return value;
  }

 private:
  const Layer& layer_;
  const uint16_t* vectors_;
  const int64_t narrow_;
  std::vector<std::vector<float>> changes_;
};

// `FewRows` for more of them. The edited side is rounded to bfloat16 once more; the rank divides by 32.
class DotRows : public Job {
 public:
  DotRows(const Layer& layer, const at::Tensor& x, int64_t rows, int64_t threads, const at::Tensor& y)
      : Job(layer.vectors ? 3 : 1),
        layer_(layer),
        rows_(rows),
        n_(layer.out_features),
        k_(layer.in_features),
        x_(bits(x)),
        weight_(bits(layer.weight)),
        y_(y.mutable_data_ptr<at::BFloat16>()) {
    if (!layer.vectors) return;
    edit_.emplace(layer, threads);
    side_.resize(rows * layer.narrow());
    if (layer.edits_input) {
      std::copy_n(x_, rows * k_, side_.begin());
    } else {
      product_.resize(rows * n_);
    }
  }

  const void* beginning(int phase) const override {
    if (edit_ && phase == (layer_.edits_input ? 0 : 1)) return edit_->beginning();
    return phase == (edit_ && layer_.edits_input ? 2 : 0) ? weight_ + Share(n_).begin * k_ : nullptr;
  }

  void run(int phase) override {
    if (!edit_) {
      multiply_to_result(x_);
    } else if (layer_.edits_input) {
      phase == 0 ? edit_->compute(side_.data()) : phase == 1 ? edit_input() : multiply_to_result(side_.data());
    } else {
      phase == 0 ? multiply_to_product() : phase == 1 ? edit_->compute(side_.data()) : store_edited_output();
    }
  }

 private:
  void multiply_to_result(const uint16_t* x) const {
    const Share share(n_);
    dot_multiply(x, rows_, weight_, share.begin, share.end, k_,
                 [&](int64_t row, int64_t o, float value) { y_[row * n_ + o] = value + layer_.bias[o]; });
  }

  void edit_input() {
    const Share places(k_);
    for (int64_t row = layer_.first; row < layer_.first + layer_.edited; ++row) {
      for (int64_t i = places.begin; i < places.end; ++i) {
        uint16_t& value = side_[row * k_ + i];
        value = rounded(widened(value) + edit_->change(row, i));
      }
    }
  }

  void multiply_to_product() {
    const Share share(n_);
    dot_multiply(x_, rows_, weight_, share.begin, share.end, k_, [&](int64_t row, int64_t o, float value) {
      product_[row * n_ + o] = value;
      side_[row * n_ + o] = rounded(value);
    });
  }

  void store_edited_output() const {
    const Share share(n_);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t o = share.begin; o < share.end; ++o) {
        const float change = edit_->edits(row) ? edit_->change(row, o) : 0.0f;
        y_[row * n_ + o] = product_[row * n_ + o] + change + layer_.bias[o];
      }
    }
  }

  const Layer& layer_;
  const int64_t rows_, n_, k_;
  const uint16_t *x_, *weight_;
  at::BFloat16* y_;
  std::vector<uint16_t> side_;
  std::vector<float> product_;
  std::optional<DotEdit> edit_;
};

}  // namespace t2app
