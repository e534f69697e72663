// Linear layers of one input, as a plan edits them, each by its own kernel.

#pragma once

#include <ATen/record_function.h>

#ifdef __AVX512BF16__
#include "dot_rows.h"
#endif
#include "job.h"
#include "layer.h"
#include "scratch.h"
#include "widened_rows.h"

namespace t2app {

// Below this many weights a second thread costs more than it does.
constexpr int64_t kWeightsPerThread = 1 << 14;
inline int64_t threads_for(int64_t weights) {
  return std::clamp<int64_t>(weights / kWeightsPerThread, 1, omp_get_max_threads());
}

inline std::unique_ptr<Job> job_of(const EditedLayer& edited, const at::Tensor& x, int64_t rows, int64_t tokens_of_row,
                                   int64_t threads, const at::Tensor& y) {
#ifdef __AVX512BF16__
  if (edited.layer.multiplies_bfloat16()) return std::make_unique<DotRows>(edited, x, rows, tokens_of_row, threads, y);
#endif
  return std::make_unique<WidenedRows>(edited, x, rows, tokens_of_row, threads, y);
}

// What each of the layers gives, (…, out_features), for x (…, in_features) in bfloat16; where rows are edited, x is
// (rows, tokens, in_features). For the kernels every token is a row of its own.
inline std::vector<at::Tensor> linear(const std::vector<EditedLayer>& layers, const at::Tensor& x,
                                      MakeTensor make = new_tensor) {
  RECORD_FUNCTION("t2app::linear", {});
  const int64_t rows = x.numel() / std::max<int64_t>(x.size(-1), 1), tokens_of_row = x.dim() == 3 ? x.size(1) : 1;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "bfloat16 was expected");
  const at::Tensor in_order = x.contiguous();
  int64_t weights = 0;
  for (const auto& [layer, edit] : layers) {
    TORCH_CHECK(x.size(-1) == layer.in_features, "x does not match the weight");
    TORCH_CHECK(edit == nullptr || (x.dim() == 3 && edit->first + edit->edited <= x.size(0)),
                "the edited rows are not in the batch");
    weights += layer.weight.numel();
  }
  const int64_t threads = threads_for(weights);
  std::vector<at::Tensor> results;
  for (const EditedLayer& edited : layers) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = edited.layer.out_features;
    results.push_back(make(shape, x.options()));
  }
  std::vector<std::unique_ptr<Job>> jobs;
  for (size_t i = 0; i < layers.size(); ++i) {
    jobs.push_back(job_of(layers[i], in_order, rows, tokens_of_row, threads, results[i]));
  }
  run(jobs, threads);
  return results;
}

}  // namespace t2app
