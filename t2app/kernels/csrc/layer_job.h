// What a linear layer does in each phase, whichever kernel multiplies: an edit of the input comes before the product, one
// of the output after it.

#pragma once

#include <optional>

#include "bfloat16.h"
#include "edit.h"
#include "job.h"
#include "layer.h"
#include "tokens.h"

namespace t2app {

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
        weight_(bits(layer_.weight)),
        y_(y) {
    if (edited.edit != nullptr) edit_.emplace(*edited.edit, x.of_row, threads);
  }

  Stretch reads(int phase) const override {
    if (phase == edit_phase()) return edit_->reads();
    if (phase != product_phase()) return {};
    const Share rows(n_);
    return {weight_ + rows.begin * k_, (rows.end - rows.begin) * k_ * static_cast<int64_t>(sizeof(*weight_))};
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

  const Layer& layer_;
  const bool edits_input_;
  const int64_t rows_, n_, k_;
  const uint16_t* weight_;
  uint16_t* y_;
  std::optional<Edit> edit_;

 private:
  int product_phase() const { return edits_input_ ? 1 : 0; }
  int edit_phase() const { return !edit_ ? -1 : edits_input_ ? 0 : 1; }
};

}  // namespace t2app
