// A linear layer for a few rows, plain or with a spectral edit at its narrow side.
//
// Decoding multiplies one or two rows by every weight of the model, so a step costs what reading the weights costs, if
// each weight is read and widened once for all rows, and asked for before it is needed.

#pragma once

#include <algorithm>

#include "bfloat16.h"
#include "layer_job.h"
#include "scratch.h"

namespace t2app {

constexpr int64_t kWeightRowsAtOnce = 16;
// This thread's share of the columns of x Wᵀ for x (rows, k) in even-first order and W (n, k); `store` takes row, column
// and value.
template <typename Store>
void multiply_columns(const float* x, int64_t rows, const uint16_t* weight, int64_t n, int64_t k, const Ahead& ahead,
                      const Store& store) {
  const Share share(n);
  for (int64_t tile = share.begin; tile < share.end; tile += kWeightRowsAtOnce) {
    const int64_t tile_end = std::min(tile + kWeightRowsAtOnce, share.end);
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - row);
      for (int64_t o = tile; o < tile_end; ++o) {
        float result[kRowsAtOnce];
        products(count, weight + o * k, x + row * k, k, result, ahead);
        for (int64_t r = 0; r < count; ++r) store(row + r, o, result[r]);
      }
    }
  }
}

// A layer for the rows of x, to y.
class FewRows : public LayerJob {
 public:
  FewRows(const EditedLayer& edited, const at::Tensor& x, int64_t rows, int64_t tokens_of_row, int64_t threads,
          const at::Tensor& y)
      : LayerJob(edited, tokens_of_row, threads),
        rows_(rows),
        n_(layer_.out_features),
        k_(layer_.in_features),
        x_(rows * k_),
        weight_(bits(layer_.weight)),
        y_(y.mutable_data_ptr<at::BFloat16>()) {
    for (int64_t row = 0; row < rows; ++row) put_even_first(bits(x) + row * k_, k_, x_.data() + row * k_);
    if (edited.edits_output()) product_.resize(rows * n_);
  }

 private:
  void multiply(const Ahead& ahead) override { multiply_to_result(x_.data(), ahead); }

  void compute_edit(const Ahead& ahead) override {
    edit_->compute(edits_input_ ? x_.data() : product_.data(), ahead);
  }

  void multiply_to_result(const float* x, const Ahead& ahead) const {
    multiply_columns(x, rows_, weight_, n_, k_, ahead,
                     [&](int64_t row, int64_t o, float value) { y_[row * n_ + o] = value + layer_.bias[o]; });
  }

  void multiply_edited_input(const Ahead& ahead) override {
    // Each thread has its own copy of x, so that none waits for another's.
    Scratch<float> own(x_);
    edit_->apply(own.data(), 0, k_);
    multiply_to_result(own.data(), ahead);
  }

  void multiply_to_product(const Ahead& ahead) override {
    multiply_columns(x_.data(), rows_, weight_, n_, k_, ahead,
                     [&](int64_t row, int64_t o, float value) { product_[row * n_ + place(o)] = value; });
  }

  void store_edited_output() override {
    // Whole blocks, whose elements are in another order here than in the result.
    const Share blocks(n_ / kBlock);
    const int64_t begin = blocks.begin * kBlock, end = blocks.end * kBlock;
    edit_->apply(product_.data(), begin, end);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t o = begin; o < end; ++o) y_[row * n_ + o] = product_[row * n_ + place(o)] + layer_.bias[o];
    }
  }

  const int64_t rows_, n_, k_;
  Scratch<float> x_, product_;
  const uint16_t* weight_;
  at::BFloat16* y_;
};

}  // namespace t2app
