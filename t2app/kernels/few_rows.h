// A linear layer for a few rows, plain or with a spectral edit at its narrow side.
//
// Decoding multiplies one or two rows by every weight of the model, so a step costs what reading the weights costs, if
// each weight is read and widened once for all rows, and asked for before it is needed.

#pragma once

#include <algorithm>

#include "bfloat16.h"
#include "job.h"
#include "layer.h"

namespace t2app {

constexpr int64_t kWeightRowsAtOnce = 16;
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

// Singular vectors whose coordinates are taken before their contributions are added: they are still in the first cache
// then, x and the change are loaded once for all of them, and a sum of each fits in a register.
constexpr int kVectorsAtOnce = kWideLanes / 2;

// change += Σ weightᵢ (vᵢ · x) vᵢ over N vectors, one after another in memory.
template <int N>
inline void add_contributions(const int8_t* vectors, const float* weights, const float* x, int64_t narrow, float* change) {
  WideFloats coordinates[N], factors[N];
  for (int v = 0; v < N; ++v) coordinates[v] = all_wide(0.0f);
  for (int64_t i = 0; i < narrow; i += kWideLanes) {
    const WideFloats side = load_wide(x + i);
    for (int v = 0; v < N; ++v) {
      const int8_t* vector = vectors + v * narrow + i;
      if (i % kCacheLine == 0) prefetch(vector);
      coordinates[v] = multiply_add(load_wide(vector), side, coordinates[v]);
    }
  }
  for (int v = 0; v < N; ++v) factors[v] = all_wide(sum(coordinates[v]) * weights[v]);
  for (int64_t i = 0; i < narrow; i += kWideLanes) {
    WideFloats total = load_wide(change + i);
    for (int v = 0; v < N; ++v) total = multiply_add(load_wide(vectors + v * narrow + i), factors[v], total);
    store(change + i, total);
  }
}

// V((z − 1) ⊙ Vᵀ side) for the edited rows of a batch, each thread over its share of V. Each vector is read from memory
// once, for its coordinate and for its contribution.
class Edit {
 public:
  Edit(const Layer& layer, int64_t tokens_of_row, int64_t threads)
      : edited_(layer, tokens_of_row),
        vectors_(layer.vectors->const_data_ptr<int8_t>()),
        rank_(layer.rank()),
        narrow_(layer.narrow()),
        // Two cache lines between one thread's part and the next one's: they write to theirs all the time.
        stride_(edited_.count * narrow_ + 2 * kCacheLine / sizeof(float)),
        changes_(threads * stride_, 0.0f) {}

  // Where this thread's share of V begins.
  const void* beginning() const { return vectors_ + Share(rank_).begin * narrow_; }

  // This thread's part of the change, from all rows' narrow side in even-first order.
  void compute(const float* side) {
    const Share share(rank_);
    int64_t i = share.begin;
    for (; i + kVectorsAtOnce <= share.end; i += kVectorsAtOnce) contribute<kVectorsAtOnce>(side, i);
    for (; i < share.end; ++i) contribute<1>(side, i);
  }

  // Adds what all threads have computed to the edited rows, from one place of theirs to another.
  void apply(float* side, int64_t begin, int64_t end) const {
    const int64_t threads = omp_get_num_threads();
    for (int64_t row = 0; row < edited_.count; ++row) {
      float* edited = side + (edited_.first + row) * narrow_;
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
    for (int64_t row = 0; row < edited_.count; ++row) {
      add_contributions<N>(vectors_ + vector * narrow_, edited_.factors_of(row) + vector,
                           side + (edited_.first + row) * narrow_, narrow_, change + row * narrow_);
    }
  }

  const EditedTokens edited_;
  const int8_t* vectors_;
  const int64_t rank_, narrow_, stride_;
  AlignedFloats changes_;
};

// A layer for the rows of x, to y. An edit of the input comes before the product, one of the output after it.
class FewRows : public Job {
 public:
  FewRows(const Layer& layer, const at::Tensor& x, int64_t rows, int64_t tokens_of_row, int64_t threads,
          const at::Tensor& y)
      : Job(!layer.vectors ? 1 : layer.edits_input ? 2 : 3),
        layer_(layer),
        rows_(rows),
        n_(layer.out_features),
        k_(layer.in_features),
        x_(rows * k_),
        weight_(bits(layer.weight)),
        y_(y.mutable_data_ptr<at::BFloat16>()) {
    for (int64_t row = 0; row < rows; ++row) put_even_first(bits(x) + row * k_, k_, x_.data() + row * k_);
    if (layer.vectors) edit_.emplace(layer, tokens_of_row, threads);
    if (edits_output()) product_.resize(rows * n_);
  }

  const void* beginning(int phase) const override {
    if (edit_ && phase == (layer_.edits_input ? 0 : 1)) return edit_->beginning();
    return phase < 2 ? weight_ + Share(n_).begin * k_ : nullptr;
  }

  void run(int phase) override {
    if (!edit_) {
      multiply_to_result(x_.data());
    } else if (layer_.edits_input) {
      phase == 0 ? edit_->compute(x_.data()) : multiply_edited_input();
    } else {
      phase == 0 ? multiply_to_product() : phase == 1 ? edit_->compute(product_.data()) : store_edited_output();
    }
  }

 private:
  bool edits_output() const { return layer_.vectors && !layer_.edits_input; }

  void multiply_to_result(const float* x) const {
    multiply(x, rows_, weight_, n_, k_,
             [&](int64_t row, int64_t o, float value) { y_[row * n_ + o] = value + layer_.bias[o]; });
  }

  void multiply_edited_input() const {
    // Each thread has its own copy of x, so that none waits for another's.
    AlignedFloats own(x_);
    edit_->apply(own.data(), 0, k_);
    multiply_to_result(own.data());
  }

  void multiply_to_product() {
    multiply(x_.data(), rows_, weight_, n_, k_,
             [&](int64_t row, int64_t o, float value) { product_[row * n_ + place(o)] = value; });
  }

  void store_edited_output() {
    // Whole blocks, whose elements are in another order here than in the result.
    const Share blocks(n_ / kBlock);
    const int64_t begin = blocks.begin * kBlock, end = blocks.end * kBlock;
    edit_->apply(product_.data(), begin, end);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t o = begin; o < end; ++o) y_[row * n_ + o] = product_[row * n_ + place(o)] + layer_.bias[o];
    }
  }

  const Layer& layer_;
  const int64_t rows_, n_, k_;
  AlignedFloats x_, product_;
  const uint16_t* weight_;
  at::BFloat16* y_;
  std::optional<Edit> edit_;
};

}  // namespace t2app
