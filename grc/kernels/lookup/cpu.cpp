// [B, sum(dims)]: each feature's bag pooled into its own columns.

#include <ATen/Parallel.h>

#include "grc/rows.h"

namespace grc {
namespace {

// Scattered rows that take about 5 us to read; below that a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

template <class T>
void copy(T* target, const T* source, int64_t width) {
  using Vector = at::vec::Vectorized<T>;
  int64_t d = 0;
  for (; d + Vector::size() <= width; d += Vector::size()) Vector::loadu(source + d).store(target + d);
  if (d < width) std::memcpy(target + d, source + d, (width - d) * sizeof(T));
}

template <class T, class Id>
void lookup(const Bags& bags, T* out) {
  const Reader<T, Id> reader(bags);
  int64_t widest = 0;
  for (const Table& table : bags.tables) widest = std::max(widest, table.dim);
  const int64_t bytes = bags.rows_per_sample() * widest * static_cast<int64_t>(sizeof(T)) + 1;
  at::parallel_for(0, bags.batch, kBytesPerThread / bytes + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> pooled(padded(widest));
    for (int64_t b = begin; b < std::min(begin + kAhead, end); ++b) reader.prefetch(b);
    for (int64_t b = begin; b < end; ++b) {
      if (b + kAhead < end) reader.prefetch(b + kAhead);
      for (int64_t f = 0; f < bags.features(); ++f) {
        const int64_t width = bags.tables[f].dim;
        T* target = out + b * bags.width + bags.tables[f].out;
        if (reader.plain()) {
          const T* row = reader.row(f, b);
          if (row != nullptr)
            copy(target, row, width);
          else
            std::fill_n(target, width, T(0.f));
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
    int64_t padding_len_, AtenTensorHandle* ret0) {
  return grc::guard([&] {
    const grc::Bags bags(arena, ids, offsets, weights, {bases, bases_len_}, {rows, rows_len_}, {dims, dims_len_},
                         {lengths, lengths_len_}, pooling, {padding, padding_len_});
    grc::Output out({bags.batch, bags.width}, bags.arena.dtype);
    grc::by_float_type(bags.arena.dtype, [&](auto value) {
      grc::by_id_type(bags.ids.dtype, [&](auto id) {
        using T = typename decltype(value)::type;
        grc::lookup<T, typename decltype(id)::type>(bags, out.data<T>());
      });
    });
    *ret0 = out.release();
  });
}
