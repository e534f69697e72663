// The edit beside a layer, from singular vectors of 8 bits.
//
// The side and the coordinates are rounded to 8 bits too, each row under a scale of its own: of an edit, which is a few
// percent of what a layer gives, that is as much as bfloat16 rounds off the whole (`bench edit`).

#pragma once

#include <algorithm>
#include <type_traits>

#include "byte_products.h"
#ifdef __AMX_INT8__
#include "byte_tiles.h"
#endif
#include "job.h"
#include "row_edit.h"
#include "scratch.h"

namespace t2app {

// From so many edited rows on tiles are no slower: on two cores of a Xeon the edits of nine rows of a 135M model take 9.5 ms
// either way, of 64 rows 33 in place of 44.
constexpr int64_t kLeastRowsOfTiles = 9;

// V((z − 1) ⊙ Vᵀ side) for the edited rows of a batch, each thread over its share of V. All floats of a row are in
// even-first order.
class Edit {
 public:
  Edit(const RowEdit& edit, int64_t tokens_of_row, int64_t threads)
      : edited(edit, tokens_of_row),
        vectors_(edit.vectors.const_data_ptr<int8_t>()),
        rank_(edit.rank()),
        narrow_(edit.narrow()),
        changes_(threads * edited.count * narrow_) {}

  // This thread's share of V.
  Stretch reads() const {
    const Share share = this->share();
    return {vectors_ + share.begin * narrow_, (share.end - share.begin) * narrow_};
  }

  // This thread's part of the change, from all rows' narrow side: float32, or bfloat16 as it comes.
  template <typename Value>
  void compute(const Value* side, const Ahead& ahead) {
    ByteRows rows(edited.count, narrow_);
    Scratch<float> row(narrow_);
    for (int64_t r = 0; r < edited.count; ++r) {
      const Value* values = side + (edited.first + r) * narrow_;
      if constexpr (std::is_same_v<Value, float>) {
        rows.set(r, values);
      } else {
        put_even_first(values, narrow_, row.data());
        rows.set(r, row.data());
      }
    }
#ifdef __AMX_INT8__
    if (edited.count >= kLeastRowsOfTiles) return compute_by<ByteTiles>(rows, ahead);
#endif
    compute_by<ByteProducts>(rows, ahead);
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
  template <typename Bytes>
  void compute_by(const ByteRows& rows, const Ahead& ahead);

  // This thread's share of the singular vectors, in whole blocks.
  Share share() const {
    Share share(rank_ / kBlock);
    share.begin *= kBlock;
    share.end *= kBlock;
    return share;
  }

  // Where a thread's part of the change of an edited row, counted from 0, begins in `changes_`.
  int64_t place_of(int64_t thread, int64_t row) const { return (thread * edited.count + row) * narrow_; }
  float* own_change() { return changes_.data() + place_of(omp_get_thread_num(), 0); }

  const int8_t* vectors_;
  const int64_t rank_, narrow_;
  Scratch<float> changes_;  // of each thread and row
};

static_assert(kEditBlock % OfBytes::kBlock == 0);

// Of vectors that are read for their coordinates and again for their contributions: they stay in the second cache.
constexpr int64_t kVectorBytesAtOnce = 1 << 18;

template <typename Bytes>
void Edit::compute_by(const ByteRows& rows, const Ahead& ahead) {
  const Share share = this->share();
  // Their coefficients share a scale: with half the vectors at most, one thread rounds an edit as two threads do.
  const int64_t at_once = std::max(std::min(kVectorBytesAtOnce / narrow_, rank_ / 2) / kBlock, int64_t{1}) * kBlock;
  if (share.begin == share.end) std::fill_n(own_change(), edited.count * narrow_, 0.0f);
  for (int64_t begin = share.begin; begin < share.end; begin += at_once) {
    const int64_t count = std::min(at_once, share.end - begin);
    Scratch<float> weights(edited.count * count);
    const auto store = [&](int64_t r, int64_t first, int64_t vectors, const int32_t* products) {
      const float* factors = edited.factors_of(r);
      for (int64_t v = 0; v < vectors; ++v) {
        weights[r * count + first - begin + v] = static_cast<float>(products[v]) * rows.scales[r] * factors[first + v];
      }
    };
    Bytes::multiply(rows, vectors_, begin, begin + count, ahead, store);
    ByteRows coefficients(edited.count, count);
    for (int64_t r = 0; r < edited.count; ++r) coefficients.set(r, weights.data() + r * count);
    // These vectors are in the cache: what comes after them is asked for in passing.
    const int64_t end = begin + count;
    const char* next = end < share.end ? reinterpret_cast<const char*>(vectors_ + end * narrow_) : ahead.next();
    Bytes::combine(coefficients, vectors_ + begin * narrow_, narrow_, begin > share.begin, own_change(), next);
  }
}

}  // namespace t2app
