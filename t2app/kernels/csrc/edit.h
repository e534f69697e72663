// The edit beside a layer, each thread's part of it and then all of them together.

#pragma once

#include <type_traits>

#include "bfloat16.h"
#include "job.h"
#include "row_edit.h"
#include "scratch.h"

namespace t2app {

// The change of the edited rows of a batch, to which each thread gives its part. All floats of a row are in even-first
// order.
class Edit {
 public:
  Edit(const RowEdit& edit, int64_t tokens_of_row, int64_t threads)
      : edited(edit.tokens(tokens_of_row)), edit_(edit), narrow_(edit.narrow), changes_(threads * edited.count * narrow_) {}

  Stretch reads() const { return edit_.reads(); }

  // This thread's part of the change, from all rows' narrow side: float32, or bfloat16 as it comes.
  template <typename Value>
  void compute(const Value* side, const Ahead& ahead) {
    Scratch<float> row(narrow_);
    const auto side_of = [&](int64_t token) {
      const Value* values = side + (edited.first + token) * narrow_;
      if constexpr (std::is_same_v<Value, float>) {
        return values;
      } else {
        put_even_first(values, narrow_, row.data());
        return static_cast<const float*>(row.data());
      }
    };
    edit_.compute(edited, side_of, ahead, changes_.data() + place_of(omp_get_thread_num(), 0));
  }

  // Adds what all threads have computed to the edited rows, in whole blocks from one place of theirs to another. The
  // changes are summed before they are added, so that one thread rounds as two do.
  void apply(float* side, int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < edited.count; ++row) {
      float* target = side + (edited.first + row) * narrow_;
      for (int64_t i = begin; i < end; i += kLanes) {
        Floats change = zeros();
        for (int64_t t = 0; t < omp_get_num_threads(); ++t) {
          change = change + load(changes_.data() + place_of(t, row) + i);
        }
        store(target + i, load(target + i) + change);
      }
    }
  }

#ifdef __AVX512F__
  // What an edited row is changed by in sixteen places from a multiple of sixteen on, as they come.
  __m512 change(int64_t row, int64_t place) const {
    __m512 value = _mm512_setzero_ps();
    for (int64_t t = 0; t < omp_get_num_threads(); ++t) {
      value += _mm512_loadu_ps(changes_.data() + place_of(t, row - edited.first) + place);
    }
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), value);
  }
#endif

  const EditedTokens edited;

 private:
  // Where a thread's part of the change of an edited row, counted from 0, begins in `changes_`.
  int64_t place_of(int64_t thread, int64_t row) const { return (thread * edited.count + row) * narrow_; }

  const RowEdit& edit_;
  const int64_t narrow_;
  Scratch<float> changes_;  // of each thread and row
};

}  // namespace t2app
