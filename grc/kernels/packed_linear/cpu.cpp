// [..., N] = act(x W^T + bias) * mul + add: arguments checked and brought to rows, then one GEMM that writes y once.

#include <memory>
#include <optional>
#include <vector>

#include "grc/gemm.h"
#include "grc/tensor.h"

namespace grc {
namespace {

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

// mul or add: of y's shape.
std::optional<Rows> operand(AtenTensorHandle* handle, const char* name, const View& x, int64_t n) {
  if (handle == nullptr) return std::nullopt;
  const View view(*handle);
  if (view.rank != x.rank || !std::equal(x.sizes, x.sizes + x.rank - 1, view.sizes) || view.sizes[x.rank - 1] != n)
    throw std::invalid_argument(std::string(name) + " does not have the shape of the result");
  return std::optional<Rows>(std::in_place, view, name);
}

const float* weight(AtenTensorHandle handle, int64_t n, int64_t k) {
  const View packed(handle);
  require(packed.dtype == aoti_torch_dtype_float32(), "the packed weight is not float32");
  bool contiguous = false;
  check(aoti_torch_is_contiguous(handle, &contiguous));
  require(contiguous, "the packed weight is not contiguous");
  if (n <= gemm::kNarrow) {
    require(packed.rank == 2 && packed.sizes[0] == n && packed.sizes[1] == k, "the packed weight is not [N, K]");
  } else {
    require(packed.rank == 3 && packed.sizes[2] == gemm::kPanel, "the weight was packed for another ISA");
    require(packed.sizes[0] == at::divup(n, gemm::kPanel) && packed.sizes[1] == k,
            "the packed weight does not fit x and out_features");
  }
  return static_cast<const float*>(packed.data);
}

const float* vector(AtenTensorHandle* handle, int64_t n) {
  if (handle == nullptr) return nullptr;
  const View bias(*handle);
  require(bias.dtype == aoti_torch_dtype_float32(), "bias is not float32");
  require(bias.rank == 1 && bias.sizes[0] == n && (n <= 1 || bias.strides[0] == 1), "bias is not a contiguous [N]");
  return static_cast<const float*>(bias.data);
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle packed,
                                                       AtenTensorHandle* bias, AtenTensorHandle* mul,
                                                       AtenTensorHandle* add, int64_t out_features, int64_t activation,
                                                       AtenTensorHandle* ret0) {
  return grc::guard([&] {
    using namespace grc;
    require(out_features >= 0, "out_features is negative");
    require(activation >= 0 && activation <= static_cast<int64_t>(gemm::Activation::tanh), "activation is 0 to 6");
    const View input(x);
    const Rows rows(input, "x");
    const std::optional<Rows> factor = operand(mul, "mul", input, out_features);
    const std::optional<Rows> term = operand(add, "add", input, out_features);
    Output y({rows.count(), out_features}, aoti_torch_dtype_float32());

    gemm::Gemm g{rows.matrix(), weight(packed, out_features, rows.width()), y.data<float>(), rows.count(),
                 out_features, rows.width(), {}};
    g.epilogue.bias = vector(bias, out_features);
    if (factor) g.epilogue.mul = factor->matrix();
    if (term) g.epilogue.add = term->matrix();
    g.epilogue.activation = static_cast<gemm::Activation>(activation);
    gemm::run(g);

    if (input.rank == 2) {
      *ret0 = y.release();
      return;
    }
    std::vector<int64_t> sizes(input.sizes, input.sizes + input.rank), strides(input.rank, 1);
    sizes.back() = out_features;
    for (int64_t d = input.rank - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    const AtenTensorHandle flat = y.release();
    const AOTITorchError code =
        aoti_torch__reinterpret_tensor(flat, input.rank, sizes.data(), strides.data(), 0, ret0);
    aoti_torch_delete_tensor_object(flat);
    check(code);
  });
}
