// [..., N] = act(x W^T + bias) * mul + add: arguments checked and brought to rows, then one GEMM that writes y once.

#include "grc/gemm.h"
#include "grc/linear.h"

GRC_EXPORT AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle packed,
                                                       AtenTensorHandle* bias, AtenTensorHandle* mul,
                                                       AtenTensorHandle* add, int64_t out_features, int64_t activation,
                                                       AtenTensorHandle* ret0) {
  return grc::guard([&] {
    using namespace grc;
    require(out_features >= 0, "out_features is negative");
    const View input(x);
    const Rows rows(input, "x");
    const float* weight = float_weight(packed, out_features, rows.width());
    const Finish finish(input, bias, mul, add, out_features, activation);
    Output y({rows.count(), out_features}, aoti_torch_dtype_float32());
    gemm::run({rows.matrix(), weight, y.data<float>(), rows.count(), out_features, rows.width(), finish.epilogue()});
    *ret0 = shaped_like(input, y, out_features);
  });
}
