// What a plan does to some rows of a batch at the narrow side of one layer, checked and prepared once.

#pragma once

#include <functional>

#include "ahead.h"
#include "tensors.h"

namespace t2app {

// The tokens of the rows that are edited, of which each row has as many, one after another.
struct EditedTokens {
  bool has(int64_t token) const { return token >= first && token < first + count; }

  const int64_t first, count;
  const int64_t of_row;  // how many of them a row has
};

// One token's narrow side in float32, in even-first order, for an edited token counted from the first of them; until the
// next one is asked for.
using SideOf = std::function<const float*(int64_t token)>;

// What changes the narrow side s of `edited` rows from `first` on to s + V((z − 1) ⊙ Vᵀs): `VectorEdit` or `MatrixEdit`.
//
// narrow: the length of s. edits_input: whether s is the layer's input, or its output.
struct RowEdit : Kept {
  RowEdit(int64_t narrow, bool edits_input, int64_t first, int64_t edited)
      : narrow(narrow), first(first), edited(edited), edits_input(edits_input) {
    STD_TORCH_CHECK(first >= 0 && edited > 0, "rows to edit were expected");
  }

  // What this thread reads for its part of a change.
  virtual Stretch reads() const = 0;
  // This thread's part of the change of each edited token, (tokens, narrow) in even-first order.
  virtual void compute(const EditedTokens& tokens, const SideOf& side, const Ahead& ahead, float* change) const = 0;

  EditedTokens tokens(int64_t of_row) const { return {first * of_row, edited * of_row, of_row}; }

  const int64_t narrow, first, edited;
  const bool edits_input;
};

}  // namespace t2app
