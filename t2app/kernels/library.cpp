// What Python sees of the kernels, as torch.ops.t2app.…

#include <torch/library.h>

#include "attention.h"
#include "dot.h"
#include "linear.h"

TORCH_LIBRARY(t2app, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "few_rows_adapted(Tensor x, Tensor weight, Tensor? bias, Tensor vectors, Tensor scales, bool edits_input, Tensor "
      "delta, int first, int edited) -> Tensor");
  library.def("dot_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "dot_adapted(Tensor x, Tensor weight, Tensor? bias, Tensor vectors, bool edits_input, Tensor delta, int first, int "
      "edited) -> Tensor");
  library.def("one_token_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(t2app, CPU, library) {
  library.impl("few_rows_linear", &t2app::few_rows_linear);
  library.impl("few_rows_adapted", &t2app::few_rows_adapted);
  library.impl("dot_linear", &t2app::dot_linear);
  library.impl("dot_adapted", &t2app::dot_adapted);
  library.impl("one_token_attention", &t2app::one_token_attention);
}
