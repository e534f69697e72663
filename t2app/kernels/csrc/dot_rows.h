// A linear layer for several rows, plain or with a spectral edit at its narrow side, on CPUs that multiply bfloat16
// themselves.

#pragma once

#include <cstdint>

#ifdef __AMX_BF16__
#include "amx_tiles.h"
#endif
#include "dot_products.h"
#include "layer_job.h"

namespace t2app {

// `WidenedRows` without widening. The edited side is rounded to bfloat16 once more.
class DotRows : public LayerJob {
 public:
  DotRows(const EditedLayer& edited, const Tokens& x, int64_t threads, uint16_t* y)
      : LayerJob(edited, x, threads, y), x_(x.data) {
    if (!edited.edits_output()) return;
    product_.resize(rows_ * n_);
    rounded_product_.resize(rows_ * n_);
  }

 private:
  void multiply(const Ahead& ahead) override { multiply_to_result(x_, ahead); }

  void compute_edit(const Ahead& ahead) override {
    edit_->compute(edits_input_ ? x_ : rounded_product_.data(), ahead);
  }

  // This thread's columns of x Wᵀ.
  void product(const uint16_t* x, const Ahead& ahead, const StoreColumns<float>& store) const {
    const Share share(n_);
#ifdef __AMX_BF16__
    if (layer_.kind == Kind::kTiles) {
      const RowTiles tiles(x, rows_, k_ * sizeof(*x));
      by_rows_in_bfloat16(share, ahead, store, [&](const Rows& rows, const Ahead& own, const StoreColumns<float>& put) {
        multiply_by_tiles<TilesOfBfloat16>(tiles, rows_, rows.weights, 0, rows.count, k_, own, put);
      });
      return;
    }
#endif
    by_rows_in_bfloat16(share, ahead, store, [&](const Rows& rows, const Ahead& own, const StoreColumns<float>& put) {
      dot_multiply<OfBfloat16>(x, rows_, rows.weights, 0, rows.count, k_, own, put);
    });
  }

  void multiply_to_result(const uint16_t* x, const Ahead& ahead) const {
    product(x, ahead, [&](int64_t row, int64_t first, int64_t columns, const float* values) {
      const float* bias = layer_.bias.data() + first;
      store_rounded(y_ + row * n_ + first, columns, [&](int64_t i, __mmask16 there) {
        return load_some(values + i, there) + load_some(bias + i, there);
      });
    });
  }

  void multiply_edited_input(const Ahead& ahead) override {
    // Each thread has its own copy of x, so that none waits for another's.
    Scratch<uint16_t> own(x_, x_ + rows_ * k_);
    for (int64_t row = edit_->edited.first; row < edit_->edited.first + edit_->edited.count; ++row) {
      uint16_t* side = own.data() + row * k_;
      store_rounded(side, k_, [&](int64_t i, __mmask16 there) {
        return load_some(side + i, there) + edit_->change(row, i);
      });
    }
    multiply_to_result(own.data(), ahead);
  }

  void multiply_to_product(const Ahead& ahead) override {
    product(x_, ahead, [&](int64_t row, int64_t first, int64_t columns, const float* values) {
      std::copy_n(values, columns, product_.begin() + row * n_ + first);
      store_rounded(rounded_product_.data() + row * n_ + first, columns,
                    [&](int64_t i, __mmask16 there) { return load_some(values + i, there); });
    });
  }

  void store_edited_output() override {
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

  const uint16_t* x_;
  Scratch<float> product_;
  Scratch<uint16_t> rounded_product_;
};

}  // namespace t2app
