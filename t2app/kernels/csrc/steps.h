// Decoding steps of the same rows, each of which is one call: the tokens of all rows in, the logits after them out.
//
// What a step takes beside its tokens is prepared once for as many steps as the keys and values have room for.

#pragma once

#include <algorithm>
#include <tuple>

#include "decoder.h"
#include "likeliest.h"

namespace t2app {

struct Steps : Kept {
  // decoder and head: a `Decoder`, and the `Layer` after it; embedding (vocabulary, hidden) in bfloat16.
  //
  // keys and values are those of each block, (rows, key heads, room, head size), of whose tokens the first `seen` are
  // there; cos, sin (rows, room − seen, head size) are those of the positions of all others. mask (rows, room) is true
  // for what a row attends to, where that is not all.
  Steps(const Tensor& decoder, const Tensor& head, const Tensor& embedding, const Tensor& cos, const Tensor& sin,
        const std::vector<Tensor>& keys, const std::vector<Tensor>& values, int64_t seen, const std::optional<Tensor>& mask)
      : decoder_(decoder), head_(head), embedding_(embedding), cos_(cos), sin_(sin), keys_(keys), values_(values),
        mask_(mask), own_(kept_in<Decoder>(decoder)), layer_(kept_in<Layer>(head)), rows_(cos.size(0)),
        steps_(cos.size(1)), seen_(seen) {
    STD_TORCH_CHECK(is_bfloat16(embedding) && embedding.is_contiguous() && embedding.size(1) == own_.hidden() &&
                        layer_.in_features == own_.hidden(),
                    "an embedding in bfloat16 and an output layer that match the decoder were expected");
    const int64_t room = seen + steps_;
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->dim() == 2 &&
                          mask->size(0) == rows_ && mask->size(1) == room,
                      "a mask of one bool a row and token was expected");
      attended_ = {static_cast<const bool*>(mask->const_data_ptr()), room};
    }
    cos_data_ = own_.angles(cos, rows_, steps_);
    sin_data_ = own_.angles(sin, rows_, steps_);
    rooms_ = own_.rooms(keys, values, rows_, room);
  }

  // The logits (rows, vocabulary) in bfloat16 after `ids`, a token of each row, of which the keys and values are at place
  // `length` − 1; and the likeliest token of each row, (rows,) in int64.
  std::tuple<Tensor, Tensor> step(const std::vector<int64_t>& ids, int64_t length) const {
    const int64_t number = length - 1 - seen_, hidden = own_.hidden();
    STD_TORCH_CHECK(static_cast<int64_t>(ids.size()) == rows_ && number >= 0 && number < steps_,
                    "a token of each row was expected, and room for it");
    Scratch<uint16_t> x(rows_ * hidden);
    for (int64_t row = 0; row < rows_; ++row) {
      STD_TORCH_CHECK(ids[row] >= 0 && ids[row] < embedding_.size(0), "a token of the vocabulary was expected");
      std::copy_n(bits(embedding_) + ids[row] * hidden, hidden, x.data() + row * hidden);
    }
    const int64_t angle = number * own_.head_size();
    const Pass pass{
        .rows = rows_,
        .tokens = 1,
        .cos = cos_data_ + angle,
        .sin = sin_data_ + angle,
        .angles_row_stride = steps_ * own_.head_size(),
        .seen = attended_,
        .added = std::nullopt,
    };
    own_.run(x.data(), pass, rooms_, length);
    const Tensor logits = new_bfloat16({rows_, layer_.out_features});
    {
      const Recorded recorded("t2app::head");
      linear({{layer_, nullptr}}, {x.data(), rows_, 1, hidden}, {mutable_bits(logits)});
    }
    return {logits, likeliest(bits(logits), rows_, layer_.out_features)};
  }

 private:
  // What the rest points into.
  const Tensor decoder_, head_, embedding_, cos_, sin_;
  const std::vector<Tensor> keys_, values_;
  const std::optional<Tensor> mask_;

  const Decoder& own_;
  const Layer& layer_;
  const int64_t rows_, steps_, seen_;
  Seen attended_;
  const uint16_t *cos_data_, *sin_data_;
  std::vector<Room> rooms_;
};

}  // namespace t2app
