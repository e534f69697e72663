// All decoder blocks of a model of Llama's kind in one call.
//
// Of a step of a 135M model Python and the calls of small operations take a third of the time where each of them is a
// call of its own (`bench profile`).

#pragma once

#include <ATen/ops/zeros.h>

#include <limits>

#include "block.h"

namespace t2app {

struct Decoder : torch::CustomClassHolder {
  // layers and their edits: those of each block, norms: those of each and the one after the last, as `Block` takes them.
  Decoder(const std::vector<c10::intrusive_ptr<Layer>>& layers,
          const std::vector<std::optional<c10::intrusive_ptr<RowEdit>>>& edits, const std::vector<at::Tensor>& norms,
          double epsilon, int64_t head_size, double scale)
      : norm_(norms.at(norms.size() - 1)), epsilon_(epsilon) {
    const size_t blocks = layers.size() / Block::kLayers;
    TORCH_CHECK(layers.size() == blocks * Block::kLayers && norms.size() == blocks * Block::kNorms + 1,
                "seven layers and two norms a block were expected, and a norm after the last");
    TORCH_CHECK(edits.size() == layers.size(), "an edit or none was expected for each layer");
    for (size_t block = 0; block < blocks; ++block) {
      const size_t first = block * Block::kLayers;
      std::vector<c10::intrusive_ptr<Layer>> own(layers.begin() + first, layers.begin() + first + Block::kLayers);
      std::vector<c10::intrusive_ptr<RowEdit>> own_edits;
      for (size_t i = first; i < first + Block::kLayers; ++i) own_edits.push_back(edits[i].value_or(nullptr));
      const auto norm = norms.begin() + block * Block::kNorms;
      blocks_.emplace_back(std::move(own), std::move(own_edits), std::vector(norm, norm + Block::kNorms), epsilon,
                           head_size, scale);
    }
  }

  // What the output layer takes, (rows, new tokens, hidden), for embeddings x of that shape; keys and values are those of
  // each block, of which `length` tokens are seen with the new ones; mask (1 or rows, 1, new tokens, tokens) is true for
  // what a token attends to; all else is as for `Block`.
  at::Tensor forward(at::Tensor x, const at::Tensor& cos, const at::Tensor& sin, const std::vector<at::Tensor>& keys,
                     const std::vector<at::Tensor>& values, int64_t length, const std::optional<at::Tensor>& mask) const {
    TORCH_CHECK(keys.size() == blocks_.size() && values.size() == blocks_.size(),
                "keys and values of each block were expected");
    const bool several = x.dim() == 3 && x.size(1) > 1;
    const std::optional<at::Tensor> blocks_mask = mask && several ? std::optional(added_to_scores(*mask, x)) : mask;
    for (size_t block = 0; block < blocks_.size(); ++block) {
      x = blocks_[block].forward(x, cos, sin, keys[block].narrow(2, 0, length), values[block].narrow(2, 0, length),
                                 blocks_mask);
    }
    return rms_norm(x, norm_, epsilon_);
  }

 private:
  // A mask as torch's attention adds it, which makes that of one of bools itself, in every block.
  static at::Tensor added_to_scores(const at::Tensor& mask, const at::Tensor& x) {
    return at::zeros(mask.sizes(), x.options()).masked_fill_(mask.logical_not(), -std::numeric_limits<double>::infinity());
  }

  std::vector<Block> blocks_;
  const at::Tensor norm_;
  const double epsilon_;
};

}  // namespace t2app
