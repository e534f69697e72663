// What Python sees of the kernels, as torch.ops.t2app.… and torch.classes.t2app.…

#include <torch/library.h>

#include "attention.h"
#include "decoder.h"
#include "layer.h"
#include "linear.h"

TORCH_LIBRARY(t2app, library) {
  library.def("one_token_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor");

  using t2app::Decoder;
  using t2app::Layer;
  using Optional = std::optional<at::Tensor>;
  library.class_<Layer>("Layer")
      .def(torch::init<at::Tensor, Optional, bool, Optional, Optional, Optional, bool, int64_t, int64_t>())
      .def("forward", [](const c10::intrusive_ptr<Layer>& self, const at::Tensor& x) {
        return t2app::linear({self.get()}, x)[0];
      });
  library.class_<Decoder>("Decoder")
      .def(torch::init<std::vector<c10::intrusive_ptr<Layer>>, std::vector<at::Tensor>, double, int64_t, double>())
      .def("forward", &Decoder::forward);
}

TORCH_LIBRARY_IMPL(t2app, CPU, library) {
  library.impl("one_token_attention", &t2app::one_token_attention);
}
