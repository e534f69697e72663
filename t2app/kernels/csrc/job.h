// Work that all threads share, in phases with a barrier between two of them.

#pragma once

#include <omp.h>

#include <memory>
#include <utility>
#include <vector>

#include "ahead.h"
#ifdef __AMX_TILE__
#include "amx_tiles.h"
#endif
#include "share.h"

namespace t2app {

class Job {
 public:
  explicit Job(int phases) : phases(phases) {}
  virtual ~Job() = default;
  // This thread's share of a phase, of which there are `phases`, counted from 0.
  virtual void run(int phase, const Ahead& ahead) = 0;
  // What this thread reads in a phase.
  virtual Stretch reads(int phase) const = 0;

  const int phases;
};

// Runs several jobs side by side: starting threads and waiting for the last of them costs what reading 100 KB of weights
// does, however much they have done.
inline void run(const std::vector<std::unique_ptr<Job>>& jobs, int threads) {
  std::vector<std::pair<Job*, int>> steps;  // in the order of their phases
  for (int phase = 0, left = 1; left > 0; ++phase) {
    left = 0;
    for (const auto& job : jobs) {
      if (phase < job->phases) steps.emplace_back(job.get(), phase);
      if (phase + 1 < job->phases) ++left;
    }
  }
#pragma omp parallel num_threads(threads)
  {
#ifdef __AMX_TILE__
    const TileShapes shapes;
#endif
    for (size_t i = 0; i < steps.size(); ++i) {
      const auto [job, phase] = steps[i];
      if (i > 0 && phase != steps[i - 1].second) {
#pragma omp barrier
      }
      const Ahead ahead(job->reads(phase), i + 1 < steps.size() ? steps[i + 1].first->reads(steps[i + 1].second) : Stretch());
      ahead.of_beginning();
      job->run(phase, ahead);
    }
  }
}

}  // namespace t2app
