// All decoder blocks of a model of Llama's kind in one call.
//
// Of a step of a 135M model Python and the calls of small operations take a third of the time where each of them is a
// call of its own (`bench profile`).

#pragma once

#include "block.h"

namespace t2app {

struct Decoder : Kept {
  // layers and their edits: those of each block, norms: those of each and the one after the last, as `Block` takes them.
  Decoder(const std::vector<Tensor>& layers, const std::vector<std::optional<Tensor>>& edits,
          const std::vector<Tensor>& norms, double epsilon, int64_t head_size, double scale)
      : layers_(layers), edits_(edits), norm_(norms.at(norms.size() - 1)), epsilon_(static_cast<float>(epsilon)),
        head_size_(head_size) {
    const size_t blocks = layers.size() / Block::kLayers;
    STD_TORCH_CHECK(blocks > 0 && layers.size() == blocks * Block::kLayers && norms.size() == blocks * Block::kNorms + 1,
                    "seven layers and two norms a block were expected, and a norm after the last");
    STD_TORCH_CHECK(edits.size() == layers.size(), "an edit or none was expected for each layer");
    Block::check_norm(norm_);
    for (size_t block = 0; block < blocks; ++block) {
      std::vector<EditedLayer> own;
      for (size_t i = block * Block::kLayers; i < (block + 1) * Block::kLayers; ++i) {
        own.emplace_back(kept_in<Layer>(layers[i]), edits[i] ? &kept_in<RowEdit>(*edits[i]) : nullptr);
      }
      const auto norm = norms.begin() + block * Block::kNorms;
      blocks_.emplace_back(std::move(own), std::vector(norm, norm + Block::kNorms), epsilon, head_size, scale);
    }
  }

  // What the output layer takes, (rows, new tokens, hidden), for embeddings x of that shape.
  //
  // cos, sin (1 or rows, new tokens, head size) are those of the new tokens' positions; keys and values are those of each
  // block, (rows, key heads, more tokens, head size), of which `length` are seen; the new ones are their last and are
  // written. mask (1 or rows, 1, new tokens, length) is true for what one new token attends to, and what is added to the
  // scores of several; where there is none a token attends to itself and all before it.
  Tensor forward(const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys,
                 const std::vector<Tensor>& values, int64_t length, const std::optional<Tensor>& mask) const {
    STD_TORCH_CHECK(x.dim() == 3 && is_bfloat16(x) && x.size(2) == blocks_[0].hidden(),
                    "(rows, tokens, hidden) in bfloat16 was expected");
    STD_TORCH_CHECK(keys.size() == blocks_.size() && values.size() == blocks_.size(),
                    "keys and values of each block were expected");
    const int64_t rows = x.size(0), tokens = x.size(1), elements = x.numel();
    STD_TORCH_CHECK(mask || tokens == 1 || length == tokens, "a mask was expected for several tokens after others");
    const Tensor whole_mask = mask ? torch::stable::contiguous(*mask) : x;
    const Pass pass{
        .rows = rows,
        .tokens = tokens,
        .cos = angles(cos, rows, tokens),
        .sin = angles(sin, rows, tokens),
        .angles_row_stride = cos.size(0) == 1 ? 0 : tokens * head_size_,
        .seen = mask && tokens == 1 ? seen_by(whole_mask, rows, length) : Seen(),
        .added = tokens > 1 ? mask : std::nullopt,
    };
    const Tensor in_order = torch::stable::contiguous(x);
    Scratch<uint16_t> hidden(bits(in_order), bits(in_order) + elements);
    for (size_t block = 0; block < blocks_.size(); ++block) {
      blocks_[block].forward(hidden.data(), pass, seen(keys[block], pass, length), seen(values[block], pass, length));
    }
    const Tensor result = new_bfloat16({rows, tokens, blocks_[0].hidden()});
    normalize_rows(hidden.data(), rows * tokens, norm_, epsilon_, mutable_bits(result));
    return result;
  }

 private:
  const uint16_t* angles(const Tensor& of, int64_t rows, int64_t tokens) const {
    STD_TORCH_CHECK(is_bfloat16(of) && of.is_contiguous() && of.dim() == 3 && of.size(2) == head_size_ &&
                        of.size(1) == tokens && (of.size(0) == 1 || of.size(0) == rows),
                    "a cosine and a sine in bfloat16 were expected for each token and place of a head");
    return bits(of);
  }

  MutableHeads seen(const Tensor& of, const Pass& pass, int64_t length) const {
    const MutableHeads heads = heads_of(of);
    STD_TORCH_CHECK(heads.rows == pass.rows && heads.heads == blocks_[0].key_heads() && heads.size == head_size_ &&
                        pass.tokens <= length && length <= heads.tokens,
                    "keys and values do not match the batch");
    return heads.first(length);
  }

  const std::vector<Tensor> layers_;
  const std::vector<std::optional<Tensor>> edits_;
  std::vector<Block> blocks_;
  const Tensor norm_;
  const float epsilon_;
  const int64_t head_size_;
};

}  // namespace t2app
