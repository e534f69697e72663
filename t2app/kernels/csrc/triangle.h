// The lower triangle of a symmetric matrix of 16·n rows, as it lies in memory.
//
// By blocks of 16 rows: of each its columns up to the diagonal's 16, four together, (4 · (block + 1), 16, 4).

#pragma once

#include <omp.h>

#include <cstdint>

#include "share.h"
#include "vector.h"

namespace t2app {

constexpr int64_t kColumnsTogether = 4, kEntriesTogether = kBlock * kColumnsTogether;

// Entries of all blocks before one.
inline int64_t entries_before(int64_t block) { return kBlock * kBlock * block * (block + 1) / 2; }

// This thread's of so many blocks, with as many entries as another's.
inline Share share_of_triangle(int64_t blocks) {
  const auto until = [&](int64_t threads) {
    int64_t block = 0;
    while (entries_before(block) * omp_get_num_threads() < entries_before(blocks) * threads) ++block;
    return block;
  };
  return {until(omp_get_thread_num()), until(omp_get_thread_num() + 1)};
}

}  // namespace t2app
