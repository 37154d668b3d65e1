// Rows go straight to the result, if anything reads it; their sum and the sum of their squares stay in registers on the way.

#include <ATen/Parallel.h>

#include "grc/rows.h"

namespace grc {
namespace {

// Scattered rows that take about 5 us to read; below that a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 24 << 10;

template <class T, class Id, class Value = typename Reader<T, Id>::Value>
void bag_fm(const Bags& bags, const std::optional<View>& linear, const int64_t* bases, int64_t dim, bool summed,
            bool keep, Value* out, Value* fm) {
  const Reader<T, Id> reader(bags);
  const Value* weights = linear ? static_cast<const Value*>(linear->data) : nullptr;
  const int64_t weight_step = linear ? linear->strides[0] : 0;
  const int64_t features = bags.features();
  const int64_t bytes = features * (dim + 16) * static_cast<int64_t>(sizeof(T));
  at::parallel_for(0, bags.batch, kBytesPerThread / bytes + 1, [&](int64_t begin, int64_t end) {
    // A row of zero bytes is zeros in every format.
    const std::vector<uint64_t> zeros((dim * 4 + 4) / 8 + 1);
    std::vector<const T*> rows(features);
    reader.prefetch_first(begin, end);
    for (int64_t b = begin; b < end; ++b) {
      const bool more = b + kAhead < end;
      float first = 0.f;
      for (int64_t f = 0; f < features; ++f) {
        if (more) reader.prefetch(f, b + kAhead);
        const T* row = reader.row(f, b);
        rows[f] = row != nullptr ? row : reinterpret_cast<const T*>(zeros.data());
        if (row != nullptr && weights != nullptr)
          first += static_cast<float>(weights[(bases[f] + reader.id(f, b)) * weight_step]);
      }
      Value* target = out + b * features * dim;
      Lanes second(0.f);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t count = std::min(kLanes, dim - d);
        // Two chains, because one would wait on the latency of every addition.
        Lanes sum[2] = {Lanes(0.f), Lanes(0.f)}, square[2] = {Lanes(0.f), Lanes(0.f)};
        const auto add = [&](int64_t f, int chain) {
          const Lanes value = reader.lanes(f, rows[f], d, count);
          if (keep) store(target + f * dim + d, value, count);
          sum[chain] = sum[chain] + value;
          square[chain] = at::vec::fmadd(value, value, square[chain]);
        };
        int64_t f = 0;
        for (; f + 1 < features; f += 2) add(f, 0), add(f + 1, 1);
        if (f < features) add(f, 0);
        const Lanes total = sum[0] + sum[1];
        const Lanes pairs = total * total - (square[0] + square[1]);
        if (summed)
          second = second + pairs;
        else
          store(fm + b * dim + d, Lanes(0.5f) * pairs, count);
      }
      if (!summed) continue;
      const float pairs = at::vec::vec_reduce_all<float>([](Lanes a, Lanes c) { return a + c; }, second);
      fm[b] = static_cast<Value>(0.5f * pairs + first);
    }
  });
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_bag_fm(
    AtenTensorHandle arena, AtenTensorHandle* linear, AtenTensorHandle ids, const int64_t* bases, int64_t bases_len_,
    const int64_t* rows, int64_t rows_len_, int64_t dim, const int64_t* padding, int64_t padding_len_,
    const int64_t* packing, int64_t packing_len_, int32_t summed, int32_t keep, AtenTensorHandle* ret0,
    AtenTensorHandle* ret1) {
  return grc::guard([&] {
    const int64_t one = 1;
    const grc::Bags bags(arena, ids, nullptr, nullptr, {bases, bases_len_}, {rows, rows_len_},
                         {&dim, bases_len_, 0}, {&one, bases_len_, 0}, grc::kSum, {padding, padding_len_},
                         {packing, packing_len_});
    const bool bytes = packing_len_ > 0;
    grc::require(bytes || bags.arena.rank == 2, "the arena is [rows, dim]");
    std::optional<grc::View> weights;
    if (linear != nullptr) {
      grc::require(summed, "a linear term belongs to the sum over the width");
      weights.emplace(*linear);
      grc::require(weights->rank >= 1 && (bytes || weights->sizes[0] == bags.arena.sizes[0]) &&
                       weights->numel() == weights->sizes[0], "linear is [R] or [R, 1]");
      for (int64_t f = 0; f < bases_len_; ++f)
        grc::require(bases[f] >= 0 && rows[f] <= weights->sizes[0] - bases[f], "a table reaches past linear");
      grc::require(weights->dtype == bags.value_dtype(), "linear has the arena's dtype");
    }
    grc::Output out({bags.batch, keep ? bags.width : 0}, bags.value_dtype());
    grc::Output fm({bags.batch, summed ? 1 : dim}, bags.value_dtype());
    grc::by_row_type(bags.arena.dtype, [&](auto value) {
      grc::by_id_type(bags.ids.dtype, [&](auto id) {
        using T = typename decltype(value)::type;
        using Id = typename decltype(id)::type;
        using Value = typename grc::Reader<T, Id>::Value;
        grc::bag_fm<T, Id>(bags, weights, bases, dim, summed, keep, out.data<Value>(), fm.data<Value>());
      });
    });
    *ret0 = out.release();
    *ret1 = fm.release();
  });
}
