// A linear layer, checked and prepared once, and what a plan does to it.

#pragma once

#include <algorithm>
#include <optional>

#include "bfloat16.h"
#include "byte_weight.h"
#include "row_edit.h"
#include "words.h"

namespace t2app {

// Whether this is compiled for a CPU that does (AVX-512 BF16).
#ifdef __AVX512BF16__
constexpr bool kMultipliesBfloat16 = true;
#else
constexpr bool kMultipliesBfloat16 = false;
#endif

// Whether it is compiled for one that multiplies tiles.
#ifdef __AMX_BF16__
constexpr bool kMultipliesTiles = true;
#else
constexpr bool kMultipliesTiles = false;
#endif

// How a layer multiplies, as `Kind` in linear.py: for few rows, for many, of which there is more to compute for each weight
// than reading it costs, or by tiles.
enum class Kind : int64_t { kFew, kMany, kTiles };

struct Layer : Kept {
  // y = x Wᵀ + b for weight (out_features, in_features) and bias (out_features,) in bfloat16, or a weight of integers and
  // the scales of a `ByteWeight`.
  Layer(const Tensor& weight, const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, Kind kind)
      : weight(weight),
        out_features(weight.size(0)),
        in_features(weight.size(1)),
        bias(out_features, 0.0f),
        kind(kind) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && (scales || is_bfloat16(weight)),
                    "a contiguous weight in bfloat16 was expected");
    if (scales) bytes.emplace(weight, *scales);
    STD_TORCH_CHECK(in_features > 0 && in_features % kBlock == 0, "rows of a weight were expected to be of ", kBlock, "·n");
    STD_TORCH_CHECK(kind != Kind::kTiles || (kMultipliesTiles && multiplies_bfloat16()),
                    "there are no tiles on this CPU, or none for rows of this length");
    if (bias) {
      STD_TORCH_CHECK(is_bfloat16(*bias) && bias->numel() == out_features, "the bias does not match the weight");
      const Tensor in_order = torch::stable::contiguous(*bias);
      std::transform(bits(in_order), bits(in_order) + out_features, this->bias.begin(), widened);
    }
    if (multiplies_words()) find_word_scales();
  }

  const Tensor weight;
  std::optional<ByteWeight> bytes;
  const int64_t out_features, in_features;
  std::vector<float> bias;
  std::vector<float> word_scales;  // of each row of the weight, where it multiplies words
  const Kind kind;

  bool multiplies_bfloat16() const { return kMultipliesBfloat16 && kind != Kind::kFew && in_features % (2 * kBlock) == 0; }
  bool multiplies_words() const {
    return kind == Kind::kMany && !multiplies_bfloat16() && in_features <= kLongestRowOfWords;
  }

  // Where rows begin to end of the weight lie.
  Stretch stretch(int64_t begin, int64_t end) const {
    const int64_t row = in_features * static_cast<int64_t>(bytes ? sizeof(int8_t) : sizeof(uint16_t));
    return {static_cast<const char*>(weight.const_data_ptr()) + begin * row, (end - begin) * row};
  }

  // Rows begin to end in bfloat16, which for a weight of integers are put into `widened`.
  const uint16_t* rows(int64_t begin, int64_t end, const Ahead& ahead, Scratch<uint16_t>& widened) const {
    if (!bytes) return bits(weight) + begin * in_features;
    widened.resize((end - begin) * in_features);
    bytes->widen(begin, end - begin, ahead, widened.data());
    return widened.data();
  }

 private:
  void find_word_scales() {
    word_scales.resize(out_features);
#pragma omp parallel
    {
      Scratch<float> row(in_features);
      Scratch<uint16_t> widened;
#pragma omp for
      for (int64_t o = 0; o < out_features; ++o) {
        put_even_first(rows(o, o + 1, Ahead(), widened), in_features, row.data());
        word_scales[o] = word_scale(row.data(), in_features);
      }
    }
  }
};

// A layer with W' in place of W for the rows that `edit` names, which is null where there are none.
struct EditedLayer {
  EditedLayer(const Layer& layer, const RowEdit* edit) : layer(layer), edit(edit) {
    STD_TORCH_CHECK(edit == nullptr || edit->narrow == (edit->edits_input ? layer.in_features : layer.out_features),
                    "singular vectors that match the layer were expected");
  }

  bool edits_input() const { return edit != nullptr && edit->edits_input; }
  bool edits_output() const { return edit != nullptr && !edit->edits_input; }

  const Layer& layer;
  const RowEdit* const edit;
};

}  // namespace t2app
