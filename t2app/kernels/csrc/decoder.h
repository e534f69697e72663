// All decoder blocks of a model of Llama's kind in one call.
//
// Of a step of a 135M model Python and the calls of small operations take a third of the time where each of them is a
// call of its own (`bench profile`).

#pragma once

#include "block.h"

namespace t2app {

// Where the keys and values of a block lie.
struct Room {
  MutableHeads keys, values;
};

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

  int64_t hidden() const { return blocks_[0].hidden(); }
  int64_t head_size() const { return head_size_; }

  // What the output layer takes, (rows, new tokens, hidden), for embeddings x of that shape.
  //
  // cos, sin (1 or rows, new tokens, head size) are those of the new tokens' positions; keys and values are those of each
  // block, (rows, key heads, more tokens, head size), of which `length` are seen; the new ones are their last and are
  // written. mask (1 or rows, 1, new tokens, length) is true for what one new token attends to, and what is added to the
  // scores of several; where there is none a token attends to itself and all before it.
  Tensor forward(const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys,
                 const std::vector<Tensor>& values, int64_t length, const std::optional<Tensor>& mask) const {
    STD_TORCH_CHECK(x.dim() == 3 && is_bfloat16(x) && x.size(2) == hidden(),
                    "(rows, tokens, hidden) in bfloat16 was expected");
    const int64_t rows = x.size(0), tokens = x.size(1), elements = x.numel();
    STD_TORCH_CHECK(tokens <= length, "a length with the new tokens was expected");
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
    const Tensor in_order = torch::stable::contiguous(x), result = new_bfloat16({rows, tokens, hidden()});
    std::copy_n(bits(in_order), elements, mutable_bits(result));
    run(mutable_bits(result), pass, rooms(keys, values, rows, length), length);
    return result;
  }

  // Takes embeddings (rows, new tokens, hidden), in place, to what the output layer takes; of `rooms` so many tokens are
  // seen.
  void run(uint16_t* x, const Pass& pass, const std::vector<Room>& rooms, int64_t length) const {
    for (size_t block = 0; block < blocks_.size(); ++block) {
      blocks_[block].forward(x, pass, rooms[block].keys.first(length), rooms[block].values.first(length));
    }
    normalize_rows(x, pass.rows * pass.tokens, norm_, epsilon_, x);
  }

  // The keys and values of each block, with room for so many tokens at least.
  std::vector<Room> rooms(const std::vector<Tensor>& keys, const std::vector<Tensor>& values, int64_t rows,
                          int64_t tokens) const {
    STD_TORCH_CHECK(keys.size() == blocks_.size() && values.size() == blocks_.size(),
                    "keys and values of each block were expected");
    const auto heads = [&](const Tensor& of) {
      const MutableHeads own = heads_of(of);
      STD_TORCH_CHECK(own.rows == rows && own.heads == blocks_[0].key_heads() && own.size == head_size_ &&
                          tokens <= own.tokens,
                      "keys and values do not match the batch");
      return own;
    };
    std::vector<Room> all;
    for (size_t block = 0; block < blocks_.size(); ++block) all.push_back({heads(keys[block]), heads(values[block])});
    return all;
  }

  // Those of each row, or of all rows alike, and of so many tokens, (1 or rows, tokens, head size).
  const uint16_t* angles(const Tensor& of, int64_t rows, int64_t tokens) const {
    STD_TORCH_CHECK(is_bfloat16(of) && of.is_contiguous() && of.dim() == 3 && of.size(2) == head_size_ &&
                        of.size(1) == tokens && (of.size(0) == 1 || of.size(0) == rows),
                    "a cosine and a sine in bfloat16 were expected for each token and place of a head");
    return bits(of);
  }

 private:
  const std::vector<Tensor> layers_;
  const std::vector<std::optional<Tensor>> edits_;
  std::vector<Block> blocks_;
  const Tensor norm_;
  const float epsilon_;
  const int64_t head_size_;
};

}  // namespace t2app
