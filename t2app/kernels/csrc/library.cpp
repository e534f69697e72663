// What Python calls of the kernels, as torch.ops.t2app.…

#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "byte_weight.h"
#include "decoder.h"
#include "edit_side.h"
#include "layer.h"
#include "linear.h"
#include "matrix_edit.h"
#include "matrix_packing.h"
#include "share.h"
#include "steps.h"
#include "tensors.h"
#include "vector_edit.h"

namespace t2app {

using MaybeTensor = std::optional<Tensor>;

Tensor make_layer(const Tensor& weight, const MaybeTensor& scales, const MaybeTensor& bias, int64_t kind) {
  return kept<Layer>(weight, scales, bias, static_cast<Kind>(kind));
}

// The weight (out_features, in_features) in bfloat16 that a `ByteWeight` is.
Tensor unpack_weight(const Tensor& integers, const Tensor& scales) {
  const ByteWeight weight(integers, scales);
  const int64_t rows = integers.size(0), length = integers.size(1);
  const Tensor result = new_bfloat16({rows, length});
  uint16_t* target = mutable_bits(result);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(kWeightsPerThread / length, 1), [&](int64_t begin, int64_t end) {
    weight.widen(begin, end - begin, Ahead(), target + begin * length);
  });
  return result;
}

Tensor make_vector_edit(const Tensor& vectors, const Tensor& scales, const Tensor& delta, bool edits_input, int64_t first,
                        int64_t edited) {
  return kept<VectorEdit>(vectors, scales, delta, edits_input, first, edited);
}

Tensor make_matrix_edit(const Tensor& integers, const Tensor& scales, const Tensor& diagonal, bool edits_input,
                        int64_t first, int64_t edited) {
  return kept<MatrixEdit>(integers, scales, diagonal, edits_input, first, edited);
}

Tensor make_decoder(const std::vector<Tensor>& layers, const std::vector<MaybeTensor>& edits,
                    const std::vector<Tensor>& norms, double epsilon, int64_t head_size, double scale) {
  return kept<Decoder>(layers, edits, norms, epsilon, head_size, scale);
}

// A layer's output (…, out_features) for x (…, in_features) in bfloat16, which is (rows, tokens, in_features) where rows
// are edited.
Tensor multiply(const Tensor& layer, const Tensor& x, const MaybeTensor& edit) {
  const Layer& own = kept_in<Layer>(layer);
  STD_TORCH_CHECK(is_bfloat16(x) && x.dim() > 0, "bfloat16 was expected");
  STD_TORCH_CHECK(!edit || x.dim() == 3, "(rows, tokens, in_features) was expected");
  const Tensor in_order = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t size = shape.back(), of_row = x.dim() == 3 ? shape[1] : 1;
  shape.back() = own.out_features;
  const Tensor result = new_bfloat16(shape);
  const int64_t count = x.numel() / std::max<int64_t>(size, 1);
  const Tokens tokens{bits(in_order), count / std::max<int64_t>(of_row, 1), of_row, size};
  linear({{own, edit ? &kept_in<RowEdit>(*edit) : nullptr}}, tokens, {mutable_bits(result)});
  return result;
}

// A layer's narrow side (rows, tokens, narrow) in bfloat16 with its edited rows changed; bias (narrow,): what of it is no
// part of the product that is edited.
Tensor edit_side(const Tensor& edit, const Tensor& side, const MaybeTensor& bias) {
  const RowEdit& own = kept_in<RowEdit>(edit);
  STD_TORCH_CHECK(is_bfloat16(side) && side.dim() == 3 && side.size(2) == own.narrow &&
                      own.first + own.edited <= side.size(0),
                  "the narrow side (rows, tokens, narrow) of all rows was expected in bfloat16");
  STD_TORCH_CHECK(!bias || (is_bfloat16(*bias) && bias->numel() == own.narrow),
                  "the bias does not match the side");
  const Tensor in_order = torch::stable::contiguous(side), result = torch::stable::empty_like(in_order);
  const Tokens tokens{bits(in_order), side.size(0), side.size(1), side.size(2)};
  const Tensor whole_bias = bias ? torch::stable::contiguous(*bias) : side;
  edited_side(own, tokens, bias ? bits(whole_bias) : nullptr, mutable_bits(result));
  return result;
}

Tensor decode(const Tensor& decoder, const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys,
              const std::vector<Tensor>& values, int64_t length, const MaybeTensor& mask) {
  return kept_in<Decoder>(decoder).forward(x, cos, sin, keys, values, length, mask);
}

Tensor make_steps(const Tensor& decoder, const Tensor& head, const Tensor& embedding, const Tensor& cos, const Tensor& sin,
                  const std::vector<Tensor>& keys, const std::vector<Tensor>& values, int64_t seen, const MaybeTensor& mask) {
  return kept<Steps>(decoder, head, embedding, cos, sin, keys, values, seen, mask);
}

std::tuple<Tensor, Tensor> step(const Tensor& steps, const std::vector<int64_t>& ids, int64_t length) {
  return kept_in<Steps>(steps).step(ids, length);
}

// The outputs (rows, 1, heads, size) for query (rows, heads, 1, size) and keys and values (rows, key heads, tokens,
// size), all bfloat16, size divides by 16; mask (1 or rows, 1, 1, tokens) is true for what a row attends to.
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const MaybeTensor& mask, double scale) {
  const Tensor in_order = torch::stable::contiguous(query);
  const Heads queries = heads_of(in_order), all_keys = heads_of(keys), all_values = heads_of(values);
  STD_TORCH_CHECK(queries.tokens == 1 && queries.heads % all_keys.heads == 0, "one query a row was expected");
  for (const Heads& heads : {all_keys, all_values}) {
    STD_TORCH_CHECK(heads.rows == queries.rows && heads.heads == all_keys.heads && heads.tokens == all_keys.tokens &&
                        heads.size == queries.size && heads.size % kBlock == 0,
                    "keys and values do not match the query");
  }
  STD_TORCH_CHECK(scale > 0, "a scale above 0 was expected");
  const Tensor result = new_bfloat16({queries.rows, 1, queries.heads, queries.size});
  const Tensor whole_mask = mask ? torch::stable::contiguous(*mask) : query;
  one_token_attention(queries, all_keys, all_values, mask ? seen_by(whole_mask, queries.rows, all_keys.tokens) : Seen(),
                      static_cast<float>(scale), mutable_bits(result));
  return result;
}

}  // namespace t2app

STABLE_TORCH_LIBRARY(t2app, library) {
  library.def("make_layer(Tensor weight, Tensor? scales, Tensor? bias, int kind) -> Tensor");
  library.def(
      "make_vector_edit(Tensor vectors, Tensor scales, Tensor delta, bool edits_input, int first, int edited) -> Tensor");
  library.def(
      "make_matrix_edit(Tensor integers, Tensor scales, Tensor diagonal, bool edits_input, int first, int edited) -> Tensor");
  library.def("sum_triangles(Tensor[] integers, Tensor scales, Tensor factors) -> Tensor");
  library.def("pack_triangle(Tensor triangle, int narrow) -> (Tensor, Tensor)");
  library.def(
      "make_decoder(Tensor[] layers, Tensor?[] edits, Tensor[] norms, float epsilon, int head_size, float scale) -> Tensor");
  library.def("unpack_weight(Tensor integers, Tensor scales) -> Tensor");
  library.def("multiply(Tensor layer, Tensor x, Tensor? edit) -> Tensor");
  library.def("edit_side(Tensor edit, Tensor side, Tensor? bias) -> Tensor");
  library.def(
      "decode(Tensor decoder, Tensor x, Tensor cos, Tensor sin, Tensor[] keys, Tensor[] values, int length, Tensor? mask) "
      "-> Tensor");
  library.def(
      "make_steps(Tensor decoder, Tensor head, Tensor embedding, Tensor cos, Tensor sin, Tensor[] keys, Tensor[] values, "
      "int seen, Tensor? mask) -> Tensor");
  library.def("step(Tensor steps, int[] ids, int length) -> (Tensor, Tensor)");
  library.def("attend(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(t2app, CPU, library) {
  library.impl("make_layer", TORCH_BOX(&t2app::make_layer));
  library.impl("make_vector_edit", TORCH_BOX(&t2app::make_vector_edit));
  library.impl("make_matrix_edit", TORCH_BOX(&t2app::make_matrix_edit));
  library.impl("sum_triangles", TORCH_BOX(&t2app::sum_of_triangles));
  library.impl("pack_triangle", TORCH_BOX(&t2app::packed_triangle));
  library.impl("make_decoder", TORCH_BOX(&t2app::make_decoder));
  library.impl("unpack_weight", TORCH_BOX(&t2app::unpack_weight));
  library.impl("multiply", TORCH_BOX(&t2app::multiply));
  library.impl("edit_side", TORCH_BOX(&t2app::edit_side));
  library.impl("decode", TORCH_BOX(&t2app::decode));
  library.impl("make_steps", TORCH_BOX(&t2app::make_steps));
  library.impl("step", TORCH_BOX(&t2app::step));
  library.impl("attend", TORCH_BOX(&t2app::attend));
}
