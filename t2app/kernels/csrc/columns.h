// Where the columns of a product go.

#pragma once

#include <cstdint>
#include <functional>

namespace t2app {

// Takes some columns of a row as they are ready: the row, the first of them, how many they are, and their values, which
// it may change. It is no type of its own for each caller, since every product would be compiled again for each.
template <typename Value>
using StoreColumns = std::function<void(int64_t row, int64_t first, int64_t columns, Value* values)>;

}  // namespace t2app
