// Vectors of bfloat16 by token, and by head and token, as they lie in memory.

#pragma once

#include <cstdint>
#include <type_traits>

namespace t2app {

// A vector for each token of a batch, of which each row has as many, one after another.
struct Tokens {
  const uint16_t* data;
  int64_t rows, of_row, size;

  int64_t count() const { return rows * of_row; }
};

// A vector for each token of each head, (rows, heads, tokens, size), its numbers one after another.
template <typename Bits>
struct HeadsOf {
  Bits* data;
  int64_t rows, heads, tokens, size, row_stride, head_stride, token_stride;

  Bits* at(int64_t row, int64_t head, int64_t token) const {
    return data + row * row_stride + head * head_stride + token * token_stride;
  }
  // The first `count` tokens, and the last.
  HeadsOf first(int64_t count) const {
    HeadsOf some = *this;
    some.tokens = count;
    return some;
  }
  HeadsOf last(int64_t count) const {
    HeadsOf some = first(count);
    some.data = at(0, 0, tokens - count);
    return some;
  }
  operator HeadsOf<const Bits>() const
    requires(!std::is_const_v<Bits>)
  {
    return {data, rows, heads, tokens, size, row_stride, head_stride, token_stride};
  }
};
using Heads = HeadsOf<const uint16_t>;
using MutableHeads = HeadsOf<uint16_t>;

// Heads that lie in one vector for each token.
inline MutableHeads heads_of_tokens(uint16_t* data, int64_t rows, int64_t heads, int64_t tokens, int64_t size) {
  return {data, rows, heads, tokens, size, tokens * heads * size, size, heads * size};
}

}  // namespace t2app
