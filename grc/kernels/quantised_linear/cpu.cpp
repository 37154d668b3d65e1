// [..., N] = act(x W^T + bias) * mul + add over a weight of int8 or bfloat16: x brought to its precision, then one GEMM.

#include "grc/linear.h"
#include "grc/low_gemm.h"

namespace grc {
namespace {

template <class Format>
void multiply(const Rows& rows, const low::Weight& w, float* y, int64_t n, const gemm::Epilogue& epilogue) {
  const low::Input<Format> x(rows.matrix(), rows.count(), rows.width());
  low::run<Format>({x.data(), w.data, w.scale, w.sums, x.row(), y, rows.count(), n, w.depth, x.stride(), epilogue});
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
    const low::Weight weight(packed, scale, out_features, rows.width());
    const Finish finish(input, bias, mul, add, out_features, activation);
    Output y({rows.count(), out_features}, aoti_torch_dtype_float32());
    low::with_format(weight.scale != nullptr, rows.count(), [&](auto format) {
      multiply<decltype(format)>(rows, weight, y.data<float>(), out_features, finish.epilogue());
    });
    *ret0 = shaped_like(input, y, out_features);
  });
}
