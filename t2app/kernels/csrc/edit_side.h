// An edit by itself, for a layer that something else multiplies, as one of 4 bits.

#pragma once

#include "edit.h"
#include "job.h"
#include "linear.h"

namespace t2app {

class EditSide : public Job {
 public:
  // bias (narrow,): what of `side` is no part of the product that is edited; null where there is none.
  EditSide(const RowEdit& edit, const Tokens& side, const uint16_t* bias, int64_t threads, uint16_t* result)
      : Job(2),
        edit_(edit, side.of_row, threads),
        tokens_(side.count()),
        narrow_(side.size),
        source_(side.data),
        side_(tokens_ * narrow_),
        bias_(narrow_, 0.0f),
        target_(result) {
    if (bias != nullptr) put_even_first(bias, narrow_, bias_.data());
    for (int64_t token = edit_.edited.first; token < edit_.edited.first + edit_.edited.count; ++token) {
      float* own = side_.data() + token * narrow_;
      put_even_first(source_ + token * narrow_, narrow_, own);
      for (int64_t i = 0; i < narrow_; ++i) own[i] -= bias_[i];
    }
  }

  Stretch reads(int phase) const override { return phase == 0 ? edit_.reads() : Stretch(); }

  void run(int phase, const Ahead& ahead) override { phase == 0 ? edit_.compute(side_.data(), ahead) : store_edited(); }

 private:
  void store_edited() {
    // Whole blocks, whose elements are in another order here than in the result.
    const Share blocks(narrow_ / kBlock);
    const int64_t begin = blocks.begin * kBlock, end = blocks.end * kBlock;
    edit_.apply(side_.data(), begin, end);
    for (int64_t token = 0; token < tokens_; ++token) {
      uint16_t* target = target_ + token * narrow_;
      if (!edit_.edited.has(token)) {
        std::copy(source_ + token * narrow_ + begin, source_ + token * narrow_ + end, target + begin);
        continue;
      }
      float own[kBlock], bias[kBlock];
      for (int64_t i = begin; i < end; i += kBlock) {
        put_in_order(side_.data() + token * narrow_ + i, own);
        put_in_order(bias_.data() + i, bias);
        store_rounded_sums(own, bias, kBlock, target + i);
      }
    }
  }

  Edit edit_;
  const int64_t tokens_, narrow_;
  const uint16_t* source_;
  Scratch<float> side_, bias_;
  uint16_t* target_;
};

// A layer's narrow side with its edited rows changed, to `result`; bias as above.
inline void edited_side(const RowEdit& edit, const Tokens& side, const uint16_t* bias, uint16_t* result) {
  const int64_t threads = threads_for(edit.narrow * edit.narrow);
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.push_back(std::make_unique<EditSide>(edit, side, bias, threads, result));
  run(jobs, threads);
}

}  // namespace t2app
