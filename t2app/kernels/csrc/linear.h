// Linear layers of one input, as a plan edits them, each by its own kernel.

#pragma once

#ifdef __AVX512BF16__
#include "dot_rows.h"
#endif
#include "job.h"
#include "layer.h"
#include "share.h"
#include "widened_rows.h"

namespace t2app {

inline std::unique_ptr<Job> job_of(const EditedLayer& edited, const Tokens& x, int64_t threads, uint16_t* y) {
#ifdef __AVX512BF16__
  if (edited.layer.multiplies_bfloat16()) return std::make_unique<DotRows>(edited, x, threads, y);
#endif
  return std::make_unique<WidenedRows>(edited, x, threads, y);
}

// What each of the layers gives for x goes to its own place, (tokens, out_features). For the kernels every token is a row
// of its own.
inline void linear(const std::vector<EditedLayer>& layers, const Tokens& x, const std::vector<uint16_t*>& results) {
  const Recorded recorded("t2app::linear");
  int64_t weights = 0;
  for (const auto& [layer, edit] : layers) {
    STD_TORCH_CHECK(x.size == layer.in_features, "x does not match the weight");
    STD_TORCH_CHECK(edit == nullptr || edit->first + edit->edited <= x.rows, "the edited rows are not in the batch");
    weights += layer.out_features * layer.in_features;
  }
  const int64_t threads = threads_for(weights);
  std::vector<std::unique_ptr<Job>> jobs;
  for (size_t i = 0; i < layers.size(); ++i) jobs.push_back(job_of(layers[i], x, threads, results[i]));
  run(jobs, threads);
}

}  // namespace t2app
