// What torch hands over and is handed: tensors of its stable interface, whose headers compile in a tenth of the time that
// those of its own tensors take.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace t2app {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }
inline const uint16_t* bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }
inline uint16_t* mutable_bits(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }
inline Tensor new_bfloat16(const std::vector<int64_t>& shape) { return torch::stable::empty(shape, ScalarType::BFloat16); }

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
  return torch::stable::from_blob(object, shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte, end);
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
