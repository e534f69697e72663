// Numbers rounded to bytes, a row at a time.

#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __AVX512VNNI__
#include "byte_quadruples.h"
#else
#include "byte_pairs.h"
#endif
#include "scratch.h"

namespace t2app {

// What the length of a singular vector divides by (`_BYTES_WIDTH` in edits.py): the most bytes that any CPU multiplies
// together.
constexpr int64_t kBytesWidth = 64;

// Rows rounded to integers from −127 to 127 under a scale each; their length divides by 16.
//
// Zeros fill them up to kBytesWidth bytes, and there is memory for whole sixteens of rows: what is multiplied together.
class ByteRows {
 public:
  ByteRows(int64_t count, int64_t length)
      : count(count),
        length(length),
        apart(whole(length, kBytesWidth)),
        scales(count),
        sums(count),
        bytes_(whole(count, 16) * apart) {}

  void set(int64_t row, const float* values) {
    const float scale = largest_magnitude(values, length) / 127, inverse = scale > 0 ? 1 / scale : 0;
    scales[row] = scale;
    int8_t* bytes = bytes_.data() + row * apart;
    sums[row] = round_to_bytes(values, length, inverse, bytes);
    std::fill(bytes + length, bytes + apart, 0);
  }

  const int8_t* row(int64_t row) const { return bytes_.data() + row * apart; }

  // Rows, numbers of each, and how far from one to the next.
  const int64_t count, length, apart;
  Scratch<float> scales;
  Scratch<int32_t> sums;

 private:
  static int64_t whole(int64_t count, int64_t block) { return (count + block - 1) / block * block; }

  Scratch<int8_t> bytes_;
};

}  // namespace t2app
