// Ids [N] as they are, once each was seen to be in 0..rows-1.

#include <stdexcept>
#include <string>

#include "grc/tensor.h"

namespace grc {
namespace {

template <class Id>
void copy(const View& ids, int64_t rows, Id* out) {
  const Id* source = static_cast<const Id*>(ids.data);
  const int64_t count = ids.sizes[0], step = ids.strides[0];
  bool outside = false;  // one test a vector of ids, and none that leaves the loop
  for (int64_t i = 0; i < count; ++i) {
    out[i] = source[i * step];
    outside |= static_cast<uint64_t>(static_cast<int64_t>(out[i])) >= static_cast<uint64_t>(rows);
  }
  for (int64_t i = 0; outside && i < count; ++i)
    if (out[i] < 0 || out[i] >= rows)
      throw std::out_of_range("id " + std::to_string(out[i]) + " at " + std::to_string(i) + " is outside 0.." +
                              std::to_string(rows - 1));
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_checked_ids(AtenTensorHandle ids, int64_t rows, AtenTensorHandle* ret0) {
  return grc::guard([&] {
    const grc::View view(ids);
    grc::require(view.rank == 1, "checked_ids takes ids [N]");
    const bool wide = view.dtype == aoti_torch_dtype_int64();
    grc::require(wide || view.dtype == aoti_torch_dtype_int32(), "ids are int32 or int64");
    grc::Output out({view.sizes[0]}, view.dtype);
    if (wide) {
      grc::copy(view, rows, out.data<int64_t>());
    } else {
      grc::copy(view, rows, out.data<int32_t>());
    }
    *ret0 = out.release();
  });
}
