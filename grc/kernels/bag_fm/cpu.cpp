// Rows go straight to the result; their sum and the sum of their squares stay in registers on the way.

#include <ATen/Parallel.h>

#include "grc/rows.h"

namespace grc {
namespace {

// Scattered rows that take about 5 us to read; below that a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 24 << 10;

template <class T, class Id>
void bag_fm(const Bags& bags, const std::optional<View>& linear, const int64_t* bases, int64_t dim, T* out,
            T* fm) {
  const Reader<T, Id> reader(bags);
  const T* weights = linear ? static_cast<const T*>(linear->data) : nullptr;
  const int64_t weight_step = linear ? linear->strides[0] : 0;
  const int64_t features = bags.features();
  const int64_t bytes = features * (dim + 16) * static_cast<int64_t>(sizeof(T));
  at::parallel_for(0, bags.batch, kBytesPerThread / bytes + 1, [&](int64_t begin, int64_t end) {
    const std::vector<T> zeros(dim, T(0.f));
    std::vector<const T*> rows(features);
    for (int64_t b = begin; b < std::min(begin + kAhead, end); ++b) reader.prefetch(b);
    for (int64_t b = begin; b < end; ++b) {
      if (b + kAhead < end) reader.prefetch(b + kAhead);
      float first = 0.f;
      for (int64_t f = 0; f < features; ++f) {
        const T* row = reader.row(f, b);
        rows[f] = row != nullptr ? row : zeros.data();
        if (row != nullptr && weights != nullptr)
          first += static_cast<float>(weights[(bases[f] + reader.id(f, b)) * weight_step]);
      }
      T* target = out + b * features * dim;
      Lanes second(0.f);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t count = std::min(kLanes, dim - d);
        // Two chains, because one would wait on the latency of every addition.
        Lanes sum[2] = {Lanes(0.f), Lanes(0.f)}, square[2] = {Lanes(0.f), Lanes(0.f)};
        const auto add = [&](int64_t f, int chain) {
          const Lanes value = load(rows[f] + d, count);
          store(target + f * dim + d, value, count);
          sum[chain] = sum[chain] + value;
          square[chain] = at::vec::fmadd(value, value, square[chain]);
        };
        int64_t f = 0;
        for (; f + 1 < features; f += 2) add(f, 0), add(f + 1, 1);
        if (f < features) add(f, 0);
        const Lanes total = sum[0] + sum[1];
        second = second + (total * total - (square[0] + square[1]));
      }
      const float pairs = at::vec::vec_reduce_all<float>([](Lanes a, Lanes c) { return a + c; }, second);
      fm[b] = static_cast<T>(0.5f * pairs + first);
    }
  });
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_bag_fm(
    AtenTensorHandle arena, AtenTensorHandle* linear, AtenTensorHandle ids, const int64_t* bases, int64_t bases_len_,
    const int64_t* rows, int64_t rows_len_, int64_t dim, const int64_t* padding, int64_t padding_len_,
    AtenTensorHandle* ret0, AtenTensorHandle* ret1) {
  return grc::guard([&] {
    const std::vector<int64_t> dims(bases_len_, dim), lengths(bases_len_, 1);
    const grc::Bags bags(arena, ids, nullptr, nullptr, {bases, bases_len_}, {rows, rows_len_},
                         {dims.data(), bases_len_}, {lengths.data(), bases_len_}, grc::kSum, {padding, padding_len_});
    grc::require(bags.arena.rank == 2, "the arena is [rows, dim]");
    std::optional<grc::View> weights;
    if (linear != nullptr) {
      weights.emplace(*linear);
      grc::require(weights->rank >= 1 && weights->sizes[0] == bags.arena.sizes[0] &&
                       weights->numel() == weights->sizes[0], "linear is [R] or [R, 1]");
      grc::require(weights->dtype == bags.arena.dtype, "linear has the arena's dtype");
    }
    grc::Output out({bags.batch, bags.width}, bags.arena.dtype), fm({bags.batch, 1}, bags.arena.dtype);
    grc::by_float_type(bags.arena.dtype, [&](auto value) {
      grc::by_id_type(bags.ids.dtype, [&](auto id) {
        using T = typename decltype(value)::type;
        grc::bag_fm<T, typename decltype(id)::type>(bags, weights, bases, dim, out.data<T>(), fm.data<T>());
      });
    });
    *ret0 = out.release();
    *ret1 = fm.release();
  });
}
