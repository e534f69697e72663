// What torch hands over and is handed: tensors of its stable interface, whose headers take the compiler 1.5 s on an AMD
// EPYC, in place of 10 s for those of its own tensors.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tokens.h"

namespace t2app {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }
inline const uint16_t* bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }
inline uint16_t* mutable_bits(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }
inline Tensor new_bfloat16(const std::vector<int64_t>& shape) { return torch::stable::empty(shape, ScalarType::BFloat16); }

// The vectors of a tensor (rows, heads, tokens, size).
inline MutableHeads heads_of(const Tensor& tensor) {
  STD_TORCH_CHECK(is_bfloat16(tensor) && tensor.dim() == 4 && tensor.stride(3) == 1,
                  "(rows, heads, tokens, size) in bfloat16 was expected, of contiguous vectors");
  return {.data = mutable_bits(tensor),
          .rows = tensor.size(0),
          .heads = tensor.size(1),
          .tokens = tensor.size(2),
          .size = tensor.size(3),
          .row_stride = tensor.stride(0),
          .head_stride = tensor.stride(1),
          .token_stride = tensor.stride(2)};
}

// And such a tensor of memory that is another's.
inline Tensor tensor_of(const Heads& heads) {
  const std::vector<int64_t> shape{heads.rows, heads.heads, heads.tokens, heads.size};
  const std::vector<int64_t> strides{heads.row_stride, heads.head_stride, heads.token_stride, 1};
  return torch::stable::from_blob(const_cast<uint16_t*>(heads.data), shape, strides, kCpu, ScalarType::BFloat16);
}

// What Python keeps of the kernels. There each is a tensor of bytes, which ends it when it ends itself.
struct Kept {
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  virtual ~Kept() = default;
};

template <typename Of, typename... Arguments>
Tensor kept(Arguments&&... arguments) {
  Kept* object = new Of(std::forward<Arguments>(arguments)...);
  const std::vector<int64_t> shape{sizeof(Kept)}, strides{1};
  const auto end = [](void* memory) { delete static_cast<Kept*>(memory); };
  return torch::stable::from_blob(object, shape, strides, kCpu, ScalarType::Byte, end);
}

template <typename Of>
const Of& kept_in(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.numel() == sizeof(Kept), "a kernel was expected");
  const auto* object = dynamic_cast<const Of*>(static_cast<const Kept*>(tensor.const_data_ptr()));
  STD_TORCH_CHECK(object != nullptr, "another kernel was expected");
  return *object;
}

// For as long as it lives, what is computed has a name in torch's profiler.
class Recorded {
 public:
  explicit Recorded(const char* name) { aoti_record_function_start(name, nullptr, nullptr, 0, &handle_); }
  ~Recorded() { aoti_record_function_end(handle_); }
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;

 private:
  AtenRecordFunctionHandle handle_ = nullptr;
};

}  // namespace t2app
