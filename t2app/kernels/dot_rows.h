// A linear layer for several rows, plain or with a spectral edit at its narrow side, on CPUs that multiply bfloat16
// themselves: there is more to compute for each weight than reading it costs.

#pragma once

#include <cstdint>
#include <vector>

#include "dot_products.h"
#include "job.h"
#include "layer.h"

namespace t2app {

// V((z − 1) ⊙ Vᵀ side) for the edited rows of a batch, each thread over its share of V, which stays in its second cache
// between the coordinates and the contributions.
class DotEdit {
 public:
  DotEdit(const Layer& layer, int64_t tokens_of_row, int64_t threads)
      : edited(layer, tokens_of_row),
        rank_(layer.rank()),
        narrow_(layer.narrow()),
        vectors_(bits(*layer.vectors)),
        changes_(threads) {}

  // This thread's part of the change, from all rows' narrow side.
  void compute(const uint16_t* side) {
    const Share share(rank_ / 2);
    const int64_t pairs = share.end - share.begin, begin = 2 * share.begin, count = edited.count;
    std::vector<uint16_t> coefficients(count * 2 * pairs);
    dot_multiply(side + edited.first * narrow_, count, vectors_, begin, begin + 2 * pairs, narrow_,
                 [&](int64_t row, int64_t first, int64_t vectors, const float* coordinates) {
                   const float* factors = edited.factors_of(row) + first;
                   store_rounded(coefficients.data() + row * 2 * pairs + first - begin, vectors,
                                 [&](int64_t i, __mmask16 there) {
                                   return load_some(coordinates + i, there) * load_some(factors + i, there);
                                 });
                 });
    std::vector<float>& change = changes_[omp_get_thread_num()];
    change.resize(count * narrow_);
    combine(count, reinterpret_cast<const uint32_t*>(coefficients.data()), 2 * pairs, vectors_ + begin * narrow_,
            narrow_, change.data());
  }

  // Where this thread's share of V begins.
  const void* beginning() const { return vectors_ + 2 * Share(rank_ / 2).begin * narrow_; }

  // What an edited row is changed by from one place on, after all threads have computed their part.
  __m512 change(int64_t row, int64_t place, __mmask16 there) const {
    const int64_t threads = omp_get_num_threads();
    __m512 value = _mm512_setzero_ps();
    for (int64_t t = 0; t < threads; ++t) {
      value += load_some(changes_[t].data() + (row - edited.first) * narrow_ + place, there);
    }
    return value;
  }

  const EditedTokens edited;

 private:
  const int64_t rank_, narrow_;
  const uint16_t* vectors_;
  std::vector<std::vector<float>> changes_;
};

// `FewRows` for more of them. The edited side is rounded to bfloat16 once more; the rank divides by 32.
class DotRows : public Job {
 public:
  DotRows(const Layer& layer, const at::Tensor& x, int64_t rows, int64_t tokens_of_row, int64_t threads,
          const at::Tensor& y)
      : Job(layer.vectors ? 3 : 1),
        layer_(layer),
        rows_(rows),
        n_(layer.out_features),
        k_(layer.in_features),
        x_(bits(x)),
        weight_(bits(layer.weight)),
        y_(reinterpret_cast<uint16_t*>(y.mutable_data_ptr<at::BFloat16>())) {
    if (!layer.vectors) return;
    edit_.emplace(layer, tokens_of_row, threads);
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
                 [&](int64_t row, int64_t first, int64_t columns, const float* values) {
                   const float* bias = layer_.bias.data() + first;
                   store_rounded(y_ + row * n_ + first, columns, [&](int64_t i, __mmask16 there) {
                     return load_some(values + i, there) + load_some(bias + i, there);
                   });
                 });
  }

  void edit_input() {
    const Share places(k_);
    for (int64_t row = edit_->edited.first; row < edit_->edited.first + edit_->edited.count; ++row) {
      uint16_t* side = side_.data() + row * k_ + places.begin;
      store_rounded(side, places.end - places.begin, [&](int64_t i, __mmask16 there) {
        return load_some(side + i, there) + edit_->change(row, places.begin + i, there);
      });
    }
  }

  void multiply_to_product() {
    const Share share(n_);
    dot_multiply(x_, rows_, weight_, share.begin, share.end, k_,
                 [&](int64_t row, int64_t first, int64_t columns, const float* values) {
                   std::copy_n(values, columns, product_.begin() + row * n_ + first);
                   store_rounded(side_.data() + row * n_ + first, columns,
                                 [&](int64_t i, __mmask16 there) { return load_some(values + i, there); });
                 });
  }

  void store_edited_output() const {
    const Share share(n_);
    for (int64_t row = 0; row < rows_; ++row) {
      const float *product = product_.data() + row * n_ + share.begin, *bias = layer_.bias.data() + share.begin;
      store_rounded(y_ + row * n_ + share.begin, share.end - share.begin, [&](int64_t i, __mmask16 there) {
        const __m512 value = load_some(product + i, there) + load_some(bias + i, there);
        return edit_->edited.has(row) ? value + edit_->change(row, share.begin + i, there) : value;
      });
    }
  }

  const Layer& layer_;
  const int64_t rows_, n_, k_;
  const uint16_t *x_, *weight_;
  uint16_t* y_;
  std::vector<uint16_t> side_;
  std::vector<float> product_;
  std::optional<DotEdit> edit_;
};

}  // namespace t2app
