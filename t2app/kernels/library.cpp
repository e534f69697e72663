// What Python sees of the kernels, as torch.ops.t2app.… and torch.classes.t2app.…

#include <torch/library.h>

#include "attention.h"
#include "decoder.h"
#include "edit_side.h"
#include "layer.h"
#include "linear.h"
#include "row_edit.h"

TORCH_LIBRARY(t2app, library) {
  library.def("one_token_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor");

  using t2app::Decoder;
  using t2app::Layer;
  using t2app::RowEdit;
  using Bias = std::optional<at::Tensor>;
  using Edit = std::optional<c10::intrusive_ptr<RowEdit>>;
  library.class_<RowEdit>("RowEdit")
      .def(torch::init<at::Tensor, at::Tensor, at::Tensor, bool, int64_t, int64_t>())
      .def("forward", [](const c10::intrusive_ptr<RowEdit>& self, const at::Tensor& side, const Bias& bias) {
        return t2app::edited_side(*self, side, bias);
      });
  library.class_<Layer>("Layer")
      .def(torch::init<at::Tensor, Bias, bool>())
      .def("forward", [](const c10::intrusive_ptr<Layer>& self, const at::Tensor& x, const Edit& edit) {
        return t2app::linear({{*self, edit ? edit->get() : nullptr}}, x)[0];
      });
  library.class_<Decoder>("Decoder")
      .def(torch::init<std::vector<c10::intrusive_ptr<Layer>>, std::vector<Edit>, std::vector<at::Tensor>, double, int64_t,
                       double>())
      .def("forward", &Decoder::forward);
}

TORCH_LIBRARY_IMPL(t2app, CPU, library) {
  library.impl("one_token_attention", [](const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                                         const std::optional<at::Tensor>& mask, double scale) {
    return t2app::one_token_attention(query, keys, values, mask, scale);
  });
}
