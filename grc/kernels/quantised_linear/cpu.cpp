// [..., N] = act(x W^T + bias) * mul + add over a weight of int8 or bfloat16: x brought to its precision, then one GEMM.

#include "grc/linear.h"
#include "grc/low_gemm.h"

namespace grc {
namespace {

template <class Format>
void multiply(const Rows& rows, const void* weight, const float* scale, float* y, int64_t n, int64_t depth,
              const gemm::Epilogue& epilogue) {
  const low::Input<Format> x(rows.matrix(), rows.count(), rows.width());
  low::run<Format>({x.data(), weight, scale, x.row(), y, rows.count(), n, depth, x.stride(), epilogue});
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_quantised_linear(AtenTensorHandle x, AtenTensorHandle packed,
                                                          AtenTensorHandle* scale, AtenTensorHandle* bias,
                                                          AtenTensorHandle* mul, AtenTensorHandle* add,
                                                          int64_t out_features, int64_t activation,
                                                          AtenTensorHandle* ret0) {
  return grc::guard([&] {
    using namespace grc;
    require(out_features >= 0, "out_features is negative");
    const View input(x);
    const Rows rows(input, "x");
    const bool bytes = View(packed).dtype == aoti_torch_dtype_int8();
    require(bytes == (scale != nullptr), "a weight of int8 has a scale, one of bfloat16 has none");
    const int64_t group = bytes ? low::Int8::kGroup : low::Bf16::kGroup;
    const int64_t steps = at::divup(rows.width(), group), depth = steps * group;
    require(!bytes || depth <= low::kMaxDepth, "int8 sums of more than 65536 products may leave 32 bits");
    const void* weight = weight_data(packed, bytes ? aoti_torch_dtype_int8() : aoti_torch_dtype_bfloat16(),
                                     {at::divup(out_features, low::kPanel), steps, low::kPanel, group});
    const float* factor = bytes ? Finish::vector(*scale, "scale", 2 * out_features) : nullptr;
    const Finish finish(input, bias, mul, add, out_features, activation);
    Output y({rows.count(), out_features}, aoti_torch_dtype_float32());
    if (bytes)
      multiply<low::Int8>(rows, weight, factor, y.data<float>(), out_features, depth, finish.epilogue());
    else
      multiply<low::Bf16>(rows, weight, factor, y.data<float>(), out_features, depth, finish.epilogue());
    *ret0 = shaped_like(input, y, out_features);
  });
}
