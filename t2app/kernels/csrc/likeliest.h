// The likeliest token of each row: torch takes several times as long to find the largest of many numbers in bfloat16, and
// a call of its own finds little of what it runs in a cache after all weights have been read.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "tensors.h"

namespace t2app {

// Rows for which a second thread is not worth its start.
constexpr int64_t kRowsPerThread = 2;

// Numbers in bfloat16 as integers of the same order.
inline __m256i ordered(__m256i numbers) {
  const __m256i negative = _mm256_srai_epi16(numbers, 15);
  return _mm256_xor_si256(numbers, _mm256_and_si256(negative, _mm256_set1_epi16(0x7fff)));
}
inline int16_t ordered(uint16_t number) { return static_cast<int16_t>(number & 0x8000 ? number ^ 0x7fff : number); }

// The first place of the largest of `count` numbers in bfloat16.
inline int64_t place_of_largest(const uint16_t* numbers, int64_t count) {
  constexpr int64_t kAtOnce = 16, kTogether = 4 * kAtOnce;
  const auto load = [&](int64_t i) { return ordered(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers + i))); };
  const int64_t whole = count - count % kTogether;
  int16_t most = std::numeric_limits<int16_t>::min();
  if (whole > 0) {
    __m256i largest[kTogether / kAtOnce];
    for (auto& own : largest) own = _mm256_set1_epi16(most);
    for (int64_t i = 0; i < whole; i += kAtOnce) {
      __m256i& own = largest[i % kTogether / kAtOnce];
      own = _mm256_max_epi16(own, load(i));
    }
    int16_t lanes[kTogether];
    std::memcpy(lanes, largest, sizeof(lanes));
    most = *std::max_element(lanes, lanes + kTogether);
  }
  for (int64_t i = whole; i < count; ++i) most = std::max(most, ordered(numbers[i]));
  int64_t place = 0;
  const __m256i wanted = _mm256_set1_epi16(most);
  while (place < whole && _mm256_testz_si256(_mm256_cmpeq_epi16(load(place), wanted), _mm256_set1_epi16(-1))) place += kAtOnce;
  while (ordered(numbers[place]) != most) ++place;
  return place;
}

// That of each row of logits (rows, vocabulary): (rows,) in int64.
inline Tensor likeliest(const uint16_t* logits, int64_t rows, int64_t vocabulary) {
  const Recorded recorded("t2app::likeliest");
  const Tensor result = torch::stable::empty({rows}, ScalarType::Long);
  int64_t* places = result.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) places[row] = place_of_largest(logits + row * vocabulary, vocabulary);
  });
  return result;
}

}  // namespace t2app
