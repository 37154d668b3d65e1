// [B, sum(dims)]: each feature's bag pooled into its own columns.

#include <ATen/Parallel.h>

#include "grc/rows.h"

namespace grc {
namespace {

// Scattered rows that take about 5 us to read; below that a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

template <class T>
void copy(T* target, const T* source, int64_t width) {
  if (width == 1) {  // a weight of a linear term, for which memcpy would be called
    *target = *source;
    return;
  }
  using Vector = at::vec::Vectorized<T>;
  int64_t d = 0;
  for (; d + Vector::size() <= width; d += Vector::size()) Vector::loadu(source + d).store(target + d);
  if (d < width) std::memcpy(target + d, source + d, (width - d) * sizeof(T));
}

template <class T, class Id>
void lookup(const Bags& bags, typename Reader<T, Id>::Value* out) {
  using Value = typename Reader<T, Id>::Value;
  const Reader<T, Id> reader(bags);
  int64_t widest = 0;
  for (const Table& table : bags.tables) widest = std::max(widest, table.dim);
  const int64_t bytes = bags.rows_per_sample() * widest * static_cast<int64_t>(sizeof(T)) + 1;
  at::parallel_for(0, bags.batch, kBytesPerThread / bytes + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> pooled(padded(widest));
    reader.prefetch_first(begin, end);
    for (int64_t b = begin; b < end; ++b) {
      const bool more = b + kAhead < end;
      for (int64_t f = 0; f < bags.features(); ++f) {
        if (more) reader.prefetch(f, b + kAhead);
        const int64_t width = bags.tables[f].dim;
        Value* target = out + b * bags.width + bags.tables[f].out;
        if (bags.plain) {
          const T* row = reader.row(f, b);
          if (row == nullptr) {
            std::fill_n(target, width, Value(0.f));
          } else if constexpr (std::is_same_v<T, Value>) {
            copy(target, row, width);
          } else {
            for (int64_t d = 0; d < width; d += kLanes) {
              const int64_t count = std::min(kLanes, width - d);
              store(target + d, reader.lanes(f, row, d, count), count);
            }
          }
          continue;
        }
        reader.pool(f, b, pooled.data());
        for (int64_t d = 0; d < width; d += kLanes)
          store(target + d, load(pooled.data() + d), std::min(kLanes, width - d));
      }
    }
  });
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_lookup(
    AtenTensorHandle arena, AtenTensorHandle ids, AtenTensorHandle* offsets, AtenTensorHandle* weights,
    const int64_t* bases, int64_t bases_len_, const int64_t* rows, int64_t rows_len_, const int64_t* dims,
    int64_t dims_len_, const int64_t* lengths, int64_t lengths_len_, int64_t pooling, const int64_t* padding,
    int64_t padding_len_, const int64_t* packing, int64_t packing_len_, AtenTensorHandle* ret0) {
  return grc::guard([&] {
    const grc::Bags bags(arena, ids, offsets, weights, {bases, bases_len_}, {rows, rows_len_}, {dims, dims_len_},
                         {lengths, lengths_len_}, pooling, {padding, padding_len_}, {packing, packing_len_});
    grc::Output out({bags.batch, bags.width}, bags.value_dtype());
    grc::by_row_type(bags.arena.dtype, [&](auto value) {
      grc::by_id_type(bags.ids.dtype, [&](auto id) {
        using T = typename decltype(value)::type;
        using Id = typename decltype(id)::type;
        grc::lookup<T, Id>(bags, out.data<typename grc::Reader<T, Id>::Value>());
      });
    });
    *ret0 = out.release();
  });
}
