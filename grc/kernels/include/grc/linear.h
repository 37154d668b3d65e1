// What the linear layers share: tensors read as rows, operands of an epilogue, and their checks.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gemm.h"
#include "tensor.h"

namespace grc {

// A tensor [..., width] as rows one stride apart, read in place where its strides allow that, else copied.
class Rows {
 public:
  Rows(const View& tensor, const char* name) : rank_(tensor.rank), width_(tensor.rank ? tensor.sizes[rank_ - 1] : 0) {
    if (tensor.rank == 0) throw std::invalid_argument(std::string(name) + " has no dimensions");
    if (tensor.dtype != aoti_torch_dtype_float32()) throw std::invalid_argument(std::string(name) + " is not float32");
    for (int64_t d = 0; d + 1 < rank_; ++d) count_ *= tensor.sizes[d];
    data_ = static_cast<const float*>(tensor.data);
    if (count_ > 0 && !in_place(tensor)) copy(tensor);
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  gemm::Matrix matrix() const { return {data_, stride_}; }

 private:
  int64_t rank_, width_, count_ = 1, stride_ = 0;
  const float* data_;
  std::unique_ptr<float[]> owned_;

  bool in_place(const View& tensor) {
    if (width_ > 1 && tensor.strides[rank_ - 1] != 1) return false;
    int64_t expected = -1;
    for (int64_t d = rank_ - 2; d >= 0; --d) {
      if (tensor.sizes[d] == 1) continue;
      if (expected < 0) stride_ = tensor.strides[d];
      else if (tensor.strides[d] != expected) return false;
      expected = tensor.strides[d] * tensor.sizes[d];
    }
    return true;
  }

  void copy(const View& tensor) {
    owned_.reset(new float[count_ * width_]);
    const int64_t step = tensor.strides[rank_ - 1];
    for (int64_t row = 0; row < count_; ++row) {
      const float* source = data_;
      for (int64_t d = rank_ - 2, rest = row; d >= 0; rest /= tensor.sizes[d--])
        source += rest % tensor.sizes[d] * tensor.strides[d];
      for (int64_t i = 0; i < width_; ++i) owned_[row * width_ + i] = source[i * step];
    }
    data_ = owned_.get();
    stride_ = width_;
  }
};

// The epilogue act(. + bias) * mul + add of y [..., N], its operands checked against x and kept while it is used.
class Finish {
 public:
  Finish(const View& x, AtenTensorHandle* bias, AtenTensorHandle* mul, AtenTensorHandle* add, int64_t n,
         int64_t activation)
      : mul_(operand(mul, "mul", x, n)), add_(operand(add, "add", x, n)) {
    require(activation >= 0 && activation <= static_cast<int64_t>(gemm::Activation::tanh), "activation is 0 to 6");
    epilogue_.activation = static_cast<gemm::Activation>(activation);
    if (bias != nullptr) epilogue_.bias = vector(*bias, "bias", n);
    if (mul_) epilogue_.mul = mul_->matrix();
    if (add_) epilogue_.add = add_->matrix();
  }

  const gemm::Epilogue& epilogue() const { return epilogue_; }

  static const float* vector(AtenTensorHandle handle, const char* name, int64_t n) {
    const View view(handle);
    if (view.dtype != aoti_torch_dtype_float32()) throw std::invalid_argument(std::string(name) + " is not float32");
    if (view.rank != 1 || view.sizes[0] != n || (n > 1 && view.strides[0] != 1))
      throw std::invalid_argument(std::string(name) + " is not a contiguous [N]");
    return static_cast<const float*>(view.data);
  }

 private:
  std::optional<Rows> mul_, add_;
  gemm::Epilogue epilogue_;

  // Of y's shape.
  static std::optional<Rows> operand(AtenTensorHandle* handle, const char* name, const View& x, int64_t n) {
    if (handle == nullptr) return std::nullopt;
    const View view(*handle);
    if (view.rank != x.rank || !std::equal(x.sizes, x.sizes + x.rank - 1, view.sizes) || view.sizes[x.rank - 1] != n)
      throw std::invalid_argument(std::string(name) + " does not have the shape of the result");
    return std::optional<Rows>(std::in_place, view, name);
  }
};

// The data of a contiguous weight of this dtype and these sizes. The third size of a packed weight is the ISA's panel.
inline const void* weight_data(AtenTensorHandle handle, int32_t dtype, std::initializer_list<int64_t> sizes) {
  const View packed(handle);
  require(packed.dtype == dtype, "the packed weight has another dtype");
  bool contiguous = false;
  check(aoti_torch_is_contiguous(handle, &contiguous));
  require(contiguous, "the packed weight is not contiguous");
  const int64_t rank = static_cast<int64_t>(sizes.size());
  require(rank < 3 || packed.rank != rank || packed.sizes[2] == sizes.begin()[2],
          "the weight was packed for another ISA");
  require(packed.rank == rank && std::equal(sizes.begin(), sizes.end(), packed.sizes),
          "the packed weight does not fit x and out_features");
  return packed.data;
}

// A float32 weight [n, k] in panels, or as it is where it is narrow.
inline const float* float_weight(AtenTensorHandle handle, int64_t n, int64_t k) {
  const int32_t dtype = aoti_torch_dtype_float32();
  const void* data = n <= gemm::kNarrow ? weight_data(handle, dtype, {n, k})
                                        : weight_data(handle, dtype, {at::divup(n, gemm::kPanel), k, gemm::kPanel});
  return static_cast<const float*>(data);
}

// [rows, n] as the result of an x [..., K]: [..., n].
inline AtenTensorHandle shaped_like(const View& x, Output& y, int64_t n) {
  if (x.rank == 2) return y.release();
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.rank), strides(x.rank, 1);
  sizes.back() = n;
  for (int64_t d = x.rank - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  const AtenTensorHandle flat = y.release();
  AtenTensorHandle shaped = nullptr;
  const AOTITorchError code =
      aoti_torch__reinterpret_tensor(flat, x.rank, sizes.data(), strides.data(), 0, &shaped);
  aoti_torch_delete_tensor_object(flat);
  check(code);
  return shaped;
}

}  // namespace grc
