// How many threads there are, and what each takes of what all of them do.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace t2app {

// Below this many weights a second thread costs more than it does.
constexpr int64_t kWeightsPerThread = 1 << 14;
inline int64_t threads_for(int64_t weights) {
  return std::clamp<int64_t>(weights / kWeightsPerThread, 1, omp_get_max_threads());
}

// This thread's share of `count` things.
struct Share {
  int64_t begin, end;

  Share(int64_t begin, int64_t end) : begin(begin), end(end) {}
  explicit Share(int64_t count) {
    const int64_t threads = omp_get_num_threads(), each = (count + threads - 1) / threads;
    begin = std::min(count, omp_get_thread_num() * each);
    end = std::min(count, begin + each);
  }
};

}  // namespace t2app
