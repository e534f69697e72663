// Memory for what a call computes in between, which is the last call's again, and so may still be in a cache.
//
// On an AMD EPYC, in turns with malloc and a fill with zeros, a step of two rows of a 135M model takes 5 % less so, one of
// 16 rows 3 to 9 %.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "vector.h"

namespace t2app {

// A thread's scratch memory: a stack, of which what is given back is free once all above it is.
class ScratchMemory {
 public:
  static ScratchMemory& of_this_thread() {
    static thread_local ScratchMemory memory;
    return memory;
  }

  ScratchMemory() = default;
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  ~ScratchMemory() { release(begin_); }

  void* take(size_t bytes) {
    // A load that meets two cache lines takes twice as long.
    const size_t lines = (bytes / kCacheLine + 1) * kCacheLine;
    char* begin = used_ + lines <= capacity_ ? begin_ + used_ : acquire(lines);
    used_ += lines;
    most_ = std::max(most_, used_);
    blocks_.push_back({begin, lines, false});
    return begin;
  }

  void give_back(void* memory) {
    std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const Block& block) { return block.begin == memory; })->free = true;
    for (; !blocks_.empty() && blocks_.back().free; blocks_.pop_back()) {
      const auto [begin, bytes, free] = blocks_.back();
      used_ -= bytes;
      if (begin < begin_ || begin >= begin_ + capacity_) release(begin);
    }
    if (blocks_.empty() && most_ > capacity_) grow();
  }

 private:
  struct Block {
    char* begin;
    size_t bytes;
    bool free;
  };

  static char* acquire(size_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t(kCacheLine))); }
  static void release(char* memory) { ::operator delete(memory, std::align_val_t(kCacheLine)); }

  void grow() {
    release(std::exchange(begin_, nullptr));
    capacity_ = 0;
    begin_ = acquire(most_);
    capacity_ = most_;
  }

  // The stack, and what lies beside it until it is as large as was needed once.
  std::vector<Block> blocks_;
  char* begin_ = nullptr;
  size_t capacity_ = 0, used_ = 0, most_ = 0;
};

template <typename T>
struct ScratchAllocator {
  using value_type = T;
  ScratchAllocator() = default;
  template <typename Other>
  ScratchAllocator(const ScratchAllocator<Other>&) {}
  T* allocate(size_t count) { return static_cast<T*>(ScratchMemory::of_this_thread().take(count * sizeof(T))); }
  void deallocate(T* memory, size_t) { ScratchMemory::of_this_thread().give_back(memory); }
  // What is not given a value has none, in place of zero.
  template <typename Of>
  void construct(Of* place) { ::new (static_cast<void*>(place)) Of; }
  template <typename Of, typename... Values>
  void construct(Of* place, Values&&... values) { ::new (static_cast<void*>(place)) Of(std::forward<Values>(values)...); }
  bool operator==(const ScratchAllocator&) const { return true; }
};

template <typename T>
using Scratch = std::vector<T, ScratchAllocator<T>>;

}  // namespace t2app
