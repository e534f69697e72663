// A linear layer, plain or with a spectral edit at its narrow side, on CPUs that do not multiply bfloat16 themselves: each
// weight is read once for several rows, and widened to float32 or, for many rows, rounded to words.

#pragma once

#include <algorithm>
#include <cstdint>

#include "ahead.h"
#include "bfloat16.h"
#include "job.h"
#include "layer_job.h"
#include "scratch.h"
#include "word_panels.h"

namespace t2app {

// Columns of a result that are stored together.
constexpr int64_t kFewColumnsAtOnce = 16;

// `multiply_many` for a few rows: decoding multiplies one or two by every weight of the model, so a step costs what reading
// the weights costs, if they are asked for before they are needed.
inline void multiply_few(const float* x, int64_t rows, const uint16_t* weight, int64_t begin, int64_t end, int64_t k,
                         const Ahead& ahead, const StoreColumns<float>& store) {
  float results[kRowsAtOnce][kFewColumnsAtOnce];
  for (int64_t tile = begin; tile < end; tile += kFewColumnsAtOnce) {
    const int64_t columns = std::min(kFewColumnsAtOnce, end - tile);
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - row);
      products(count, columns, weight + tile * k, x + row * k, k, results[0], kFewColumnsAtOnce, ahead);
      for (int64_t r = 0; r < count; ++r) store(row + r, tile, columns, results[r]);
    }
  }
}

class WidenedRows : public LayerJob {
 public:
  WidenedRows(const EditedLayer& edited, const Tokens& x, int64_t threads, uint16_t* y)
      : LayerJob(edited, x, threads, y), x_(rows_ * k_) {
    for (int64_t row = 0; row < rows_; ++row) put_even_first(x.data + row * k_, k_, x_.data() + row * k_);
    if (edited.edits_output()) product_.resize(rows_ * n_);
  }

 private:
  // This thread's share of the columns of x Wᵀ.
  void multiply_columns(const float* x, const Ahead& ahead, const StoreColumns<float>& store) const {
    const Share share(n_);
    if (layer_.multiplies_words()) {
      const WordRows words = words_of(x);
      by_rows_in_bfloat16(share, ahead, store, [&](const Rows& rows, const Ahead& own, const StoreColumns<float>& put) {
        multiply_many(words, rows.weights, layer_.word_scales.data() + rows.first, rows.count, own, put);
      });
    } else if (layer_.bytes) {
      multiply_few(words_of(x), *layer_.bytes, share.begin, share.end, ahead, store);
    } else {
      multiply_few(x, rows_, bits(layer_.weight), share.begin, share.end, k_, ahead, store);
    }
  }

  WordRows words_of(const float* x) const {
    WordRows words(rows_, k_);
    for (int64_t row = 0; row < rows_; ++row) words.set(row, x + row * k_);
    return words;
  }

  void multiply(const Ahead& ahead) override { multiply_to_result(x_.data(), ahead); }

  void compute_edit(const Ahead& ahead) override {
    edit_->compute(edits_input_ ? x_.data() : product_.data(), ahead);
  }

  void multiply_to_result(const float* x, const Ahead& ahead) const {
    multiply_columns(x, ahead, [&](int64_t row, int64_t first, int64_t columns, const float* values) {
      store_rounded_sums(values, layer_.bias.data() + first, columns, y_ + row * n_ + first);
    });
  }

  void multiply_edited_input(const Ahead& ahead) override {
    // Each thread has its own copy of x, so that none waits for another's.
    Scratch<float> own(x_);
    edit_->apply(own.data(), 0, k_);
    multiply_to_result(own.data(), ahead);
  }

  void multiply_to_product(const Ahead& ahead) override {
    multiply_columns(x_.data(), ahead, [&](int64_t row, int64_t first, int64_t columns, const float* values) {
      for (int64_t o = 0; o < columns; ++o) product_[row * n_ + place(first + o)] = values[o];
    });
  }

  void store_edited_output() override {
    // Whole blocks, whose elements are in another order here than in the result.
    const Share blocks(n_ / kBlock);
    const int64_t begin = blocks.begin * kBlock, end = blocks.end * kBlock;
    edit_->apply(product_.data(), begin, end);
    float in_order[kBlock];
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t o = begin; o < end; o += kBlock) {
        put_in_order(product_.data() + row * n_ + o, in_order);
        store_rounded_sums(in_order, layer_.bias.data() + o, kBlock, y_ + row * n_ + o);
      }
    }
  }

  Scratch<float> x_, product_;
};

}  // namespace t2app
