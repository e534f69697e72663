// What a linear layer does in each phase, whichever kernel multiplies: an edit of the input comes before the product, one
// of the output after it.

#pragma once

#include <algorithm>
#include <optional>

#include "bfloat16.h"
#include "columns.h"
#include "edit.h"
#include "job.h"
#include "layer.h"
#include "tokens.h"

namespace t2app {

// Rows of a weight of integers that are widened together: whole ones of all kernels' columns at once.
constexpr int64_t kWidenedRows = 96;

class LayerJob : public Job {
 public:
  // A layer for x, to y (tokens, out_features).
  LayerJob(const EditedLayer& edited, const Tokens& x, int64_t threads, uint16_t* y)
      : Job(edited.edit == nullptr ? 1 : edited.edits_input() ? 2 : 3),
        layer_(edited.layer),
        edits_input_(edited.edits_input()),
        rows_(x.count()),
        n_(layer_.out_features),
        k_(layer_.in_features),
        y_(y) {
    if (edited.edit != nullptr) edit_.emplace(*edited.edit, x.of_row, threads);
  }

  Stretch reads(int phase) const override {
    if (phase == edit_phase()) return edit_->reads();
    if (phase != product_phase()) return {};
    const Share rows(n_);
    return layer_.stretch(rows.begin, rows.end);
  }

  void run(int phase, const Ahead& ahead) override {
    if (phase == edit_phase()) {
      compute_edit(ahead);
    } else if (phase != product_phase()) {
      store_edited_output();
    } else if (!edit_) {
      multiply(ahead);
    } else {
      edits_input_ ? multiply_edited_input(ahead) : multiply_to_product(ahead);
    }
  }

 protected:
  virtual void multiply(const Ahead& ahead) = 0;
  virtual void compute_edit(const Ahead& ahead) = 0;
  virtual void multiply_edited_input(const Ahead& ahead) = 0;
  virtual void multiply_to_product(const Ahead& ahead) = 0;
  virtual void store_edited_output() = 0;

  // Some rows of the weight in bfloat16.
  struct Rows {
    const uint16_t* weights;
    int64_t first, count;
  };

  // Hands these rows of the weight to `multiply`, which counts columns from the first of them: all together or, where they
  // are widened, some at a time.
  template <typename Multiply>
  void by_rows_in_bfloat16(const Share& share, const Ahead& ahead, const StoreColumns<float>& store,
                           const Multiply& multiply) const {
    const int64_t at_once = layer_.bytes ? kWidenedRows : n_;
    Scratch<uint16_t> widened;
    for (int64_t first = share.begin; first < share.end; first += at_once) {
      const int64_t end = std::min(first + at_once, share.end);
      const Rows rows{layer_.rows(first, end, ahead, widened), first, end - first};
      multiply(rows, layer_.bytes ? Ahead() : ahead, [&](int64_t row, int64_t column, int64_t columns, float* values) {
        store(row, first + column, columns, values);
      });
    }
  }

  const Layer& layer_;
  const bool edits_input_;
  const int64_t rows_, n_, k_;
  uint16_t* y_;
  std::optional<Edit> edit_;

 private:
  int product_phase() const { return edits_input_ ? 1 : 0; }
  int edit_phase() const { return !edit_ ? -1 : edits_input_ ? 0 : 1; }
};

}  // namespace t2app
