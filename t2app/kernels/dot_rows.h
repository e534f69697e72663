// A linear layer for several rows, plain or with a spectral edit at its narrow side, on CPUs that multiply bfloat16
// themselves: there is more to compute for each weight than reading it costs.

#pragma once

#include <cstdint>
#include <vector>

#include "dot_products.h"
#include "edit.h"
#include "job.h"
#include "layer.h"

namespace t2app {

// `FewRows` for more of them. The edited side is rounded to bfloat16 once more.
class DotRows : public Job {
 public:
  DotRows(const Layer& layer, const at::Tensor& x, int64_t rows, int64_t tokens_of_row, int64_t threads,
          const at::Tensor& y)
      : Job(!layer.edit ? 1 : layer.edits_input() ? 2 : 3),
        layer_(layer),
        rows_(rows),
        n_(layer.out_features),
        k_(layer.in_features),
        x_(bits(x)),
        weight_(bits(layer.weight)),
        y_(reinterpret_cast<uint16_t*>(y.mutable_data_ptr<at::BFloat16>())) {
    if (!layer.edit) return;
    edit_.emplace(*layer.edit, tokens_of_row, threads);
    if (layer.edits_input()) return;
    product_.resize(rows * n_);
    rounded_product_.resize(rows * n_);
  }

  const void* beginning(int phase) const override {
    if (edit_ && phase == (layer_.edits_input() ? 0 : 1)) return edit_->beginning();
    return phase == (edit_ && layer_.edits_input() ? 1 : 0) ? weight_ + Share(n_).begin * k_ : nullptr;
  }

  void run(int phase) override {
    if (!edit_) {
      multiply_to_result(x_);
    } else if (layer_.edits_input()) {
      phase == 0 ? edit_->compute(x_) : multiply_edited_input();
    } else {
      phase == 0 ? multiply_to_product() : phase == 1 ? edit_->compute(rounded_product_.data()) : store_edited_output();
    }
  }

 private:
  void multiply_to_result(const uint16_t* x) const {
    const Share share(n_);
    dot_multiply<OfBfloat16>(x, rows_, weight_, share.begin, share.end, k_,
                             [&](int64_t row, int64_t first, int64_t columns, const float* values) {
                               const float* bias = layer_.bias.data() + first;
                               store_rounded(y_ + row * n_ + first, columns, [&](int64_t i, __mmask16 there) {
                                 return load_some(values + i, there) + load_some(bias + i, there);
                               });
                             });
  }

  void multiply_edited_input() const {
    // Each thread has its own copy of x, so that none waits for another's.
    std::vector<uint16_t> own(x_, x_ + rows_ * k_);
    for (int64_t row = edit_->edited.first; row < edit_->edited.first + edit_->edited.count; ++row) {
      uint16_t* side = own.data() + row * k_;
      store_rounded(side, k_, [&](int64_t i, __mmask16 there) {
        return load_some(side + i, there) + edit_->change(row, i);
      });
    }
    multiply_to_result(own.data());
  }

  void multiply_to_product() {
    const Share share(n_);
    dot_multiply<OfBfloat16>(x_, rows_, weight_, share.begin, share.end, k_,
                             [&](int64_t row, int64_t first, int64_t columns, const float* values) {
                               std::copy_n(values, columns, product_.begin() + row * n_ + first);
                               store_rounded(rounded_product_.data() + row * n_ + first, columns,
                                             [&](int64_t i, __mmask16 there) { return load_some(values + i, there); });
                             });
  }

  void store_edited_output() const {
    const Share blocks(n_ / kBlock);
    const int64_t begin = blocks.begin * kBlock, count = blocks.end * kBlock - begin;
    for (int64_t row = 0; row < rows_; ++row) {
      const float *product = product_.data() + row * n_ + begin, *bias = layer_.bias.data() + begin;
      store_rounded(y_ + row * n_ + begin, count, [&](int64_t i, __mmask16 there) {
        const __m512 value = load_some(product + i, there) + load_some(bias + i, there);
        return edit_->edited.has(row) ? value + edit_->change(row, begin + i) : value;
      });
    }
  }

  const Layer& layer_;
  const int64_t rows_, n_, k_;
  const uint16_t *x_, *weight_;
  uint16_t* y_;
  std::vector<float> product_;
  std::vector<uint16_t> rounded_product_;
  std::optional<Edit> edit_;
};

}  // namespace t2app
