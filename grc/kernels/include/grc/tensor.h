// Tensors across AOTInductor's C ABI: a view of an argument, and an owned result.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

// Private to the package or library that a kernel is linked into. Its exceptions rise to who called it there, so that their
// message is kept: AOTInductor's own handler, or the one that grc links before it.
#define GRC_EXPORT extern "C" __attribute__((visibility("hidden")))

namespace grc {

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call into libtorch failed");
}

template <class Body>
AOTITorchError guard(const Body& body) {
  body();
  return AOTI_TORCH_SUCCESS;
}

// Borrows the tensor: valid while the caller's handle is.
struct View {
  AtenTensorHandle handle;
  void* data = nullptr;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int64_t rank = 0;
  int32_t dtype = 0;

  explicit View(AtenTensorHandle tensor) : handle(tensor) {
    check(aoti_torch_get_data_ptr(tensor, &data));
    check(aoti_torch_get_sizes(tensor, &sizes));
    check(aoti_torch_get_strides(tensor, &strides));
    check(aoti_torch_get_dim(tensor, &rank));
    check(aoti_torch_get_dtype(tensor, &dtype));
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t d = 0; d < rank; ++d) product *= sizes[d];
    return product;
  }
};

// Owns a new contiguous tensor until `release`, so that an exception in the kernel does not leak it.
class Output {
 public:
  Output(std::initializer_list<int64_t> sizes, int32_t dtype) {
    int64_t strides[8];
    int64_t step = 1;
    require(sizes.size() <= 8, "a result has at most 8 dimensions");
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
      strides[d] = step;
      step *= sizes.begin()[d] > 0 ? sizes.begin()[d] : 1;
    }
    check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                   aoti_torch_device_type_cpu(), 0, &handle_));
    check(aoti_torch_get_data_ptr(handle_, &data_));
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace grc
