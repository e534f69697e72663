// An edit by itself, for a layer that something else multiplies, as one of 4 bits.

#pragma once

#include <ATen/ops/empty_like.h>

#include "edit.h"
#include "job.h"
#include "linear.h"

namespace t2app {

class EditSide : public Job {
 public:
  // bias: what of `side` is no part of the product that is edited; there may be none.
  EditSide(const RowEdit& edit, const at::Tensor& side, const std::optional<at::Tensor>& bias, int64_t threads,
           const at::Tensor& result)
      : Job(2),
        edit_(edit, side.size(1), threads),
        tokens_(side.size(0) * side.size(1)),
        narrow_(side.size(2)),
        source_(bits(side)),
        side_(tokens_ * narrow_),
        bias_(narrow_, 0.0f),
        target_(reinterpret_cast<uint16_t*>(result.mutable_data_ptr<at::BFloat16>())) {
    if (bias) put_even_first(bits(*bias), narrow_, bias_.data());
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

// A layer's narrow side (rows, tokens, narrow) in bfloat16 with its edited rows changed; bias (narrow,) as above.
inline at::Tensor edited_side(const RowEdit& edit, const at::Tensor& side, const std::optional<at::Tensor>& bias) {
  RECORD_FUNCTION("t2app::linear", {});
  TORCH_CHECK(side.scalar_type() == at::kBFloat16 && side.dim() == 3 && side.size(2) == edit.narrow() &&
                  edit.first + edit.edited <= side.size(0),
              "the narrow side (rows, tokens, narrow) of all rows was expected in bfloat16");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->numel() == edit.narrow()),
              "the bias does not match the side");
  const at::Tensor in_order = side.contiguous();
  const std::optional<at::Tensor> whole_bias = bias ? std::optional(bias->contiguous()) : std::nullopt;
  const int64_t threads = threads_for(edit.vectors.numel());
  at::Tensor result = at::empty_like(in_order);
  std::vector<std::unique_ptr<Job>> jobs;
  jobs.push_back(std::make_unique<EditSide>(edit, in_order, whole_bias, threads, result));
  run(jobs, threads);
  return result;
}

}  // namespace t2app
