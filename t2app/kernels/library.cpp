// What Python sees of the kernels, as torch.ops.t2app.…

#include <torch/library.h>

#include "attention.h"
#include "linear.h"

TORCH_LIBRARY(t2app, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", &t2app::few_rows_linear);
  library.def(
      "few_rows_adapted(Tensor x, Tensor weight, Tensor? bias, Tensor vectors, Tensor scales, bool edits_input, Tensor "
      "delta, int first, int edited) -> Tensor",
      &t2app::few_rows_adapted);
  library.def("one_token_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor",
              &t2app::one_token_attention);
}
