// Rows of a sample go into a tile in L1, all pairwise dot products of the tile into the result: nothing else is written.

#include <ATen/Parallel.h>

#include "grc/gram.h"
#include "grc/rows.h"

namespace grc {
namespace {

// Multiplications that take about 5 us, a row's fetch counted as 64 of them. Two Zen 4 cores gain from a second thread
// above that, and lose below.
constexpr int64_t kWorkPerThread = 80'000;

struct Pairs {
  bool upper, diagonal, keep_dense;
};

template <class Words, class T, class Id>
void bag_dot(const Bags& bags, const std::optional<View>& dense, int64_t dim, const Pairs& pairs, int64_t width,
             typename Reader<T, Id>::Value* out) {
  using Value = typename Reader<T, Id>::Value;
  const Reader<T, Id> reader(bags);
  const int64_t extra = dense ? 1 : 0;
  const int64_t rows = bags.features() + extra;
  const int64_t work = bags.rows_per_sample() * (dim + 64) + rows * rows * dim / 2 + 1;
  at::parallel_for(0, bags.batch, kWorkPerThread / work + 1, [&](int64_t begin, int64_t end) {
    Gram<Words> gram(rows, dim);
    reader.prefetch_first(begin, end);
    for (int64_t b = begin; b < end; ++b) {
      const bool more = b + kAhead < end;
      Value* target = out + b * width;
      if (dense) {
        const Value* source = static_cast<const Value*>(dense->data) + b * dense->strides[0];
        gram.set(0, source);
        if (pairs.keep_dense) std::memcpy(target, source, dim * sizeof(Value));
        if (pairs.keep_dense) target += dim;
      }
      for (int64_t f = 0; f < bags.features(); ++f) {
        if (more) reader.prefetch(f, b + kAhead);
        const T* row = bags.plain ? reader.row(f, b) : nullptr;
        if (!bags.plain)  // never where words are pairs
          reader.pool(f, b, gram.tile(f + extra));
        else if constexpr (std::is_same_v<T, Value>)
          gram.set(f + extra, row);
        else if (row != nullptr)
          reader.widen(f, row, gram.tile(f + extra));
        else
          gram.set(f + extra, static_cast<const float*>(nullptr));
      }
      gram.pairs(pairs.upper, pairs.diagonal, target);
    }
  });
}

// Plain rows of bfloat16 are multiplied as they are where the CPU can.
template <class T, class Id, class... Rest>
void by_words(const Bags& bags, const Rest&... rest) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    if (BfloatPairs::usable() && bags.plain) return bag_dot<BfloatPairs, T, Id>(bags, rest...);
#endif
  bag_dot<Floats, T, Id>(bags, rest...);
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_bag_dot(
    AtenTensorHandle arena, AtenTensorHandle ids, AtenTensorHandle* offsets, AtenTensorHandle* weights,
    AtenTensorHandle* dense, const int64_t* bases, int64_t bases_len_, const int64_t* rows, int64_t rows_len_,
    int64_t dim, const int64_t* lengths, int64_t lengths_len_, int64_t pooling, const int64_t* padding,
    int64_t padding_len_, int32_t upper, int32_t diagonal, int32_t keep_dense, const int64_t* packing,
    int64_t packing_len_, AtenTensorHandle* ret0) {
  return grc::guard([&] {
    const grc::Bags bags(arena, ids, offsets, weights, {bases, bases_len_}, {rows, rows_len_},
                         {&dim, bases_len_, 0}, {lengths, lengths_len_}, pooling, {padding, padding_len_},
                         {packing, packing_len_});
    std::optional<grc::View> first;
    if (dense != nullptr) {
      first.emplace(*dense);
      grc::require(first->rank == 2 && first->sizes[0] == bags.batch && first->sizes[1] == dim, "dense is [B, dim]");
      grc::require(first->strides[1] == 1 || dim == 1, "dense's rows are contiguous");
      grc::require(first->dtype == bags.value_dtype(), "dense has the arena's dtype");
    }
    grc::require(first || keep_dense == 0, "keep_dense needs dense");
    const int64_t n = bags.features() + (first ? 1 : 0);
    const int64_t width = n * (n - 1) / 2 + (diagonal ? n : 0) + (keep_dense ? dim : 0);
    grc::Output out({bags.batch, width}, bags.value_dtype());
    grc::by_row_type(bags.arena.dtype, [&](auto value) {
      grc::by_id_type(bags.ids.dtype, [&](auto id) {
        using T = typename decltype(value)::type;
        using Id = typename decltype(id)::type;
        const grc::Pairs pairs{upper != 0, diagonal != 0, keep_dense != 0};
        grc::by_words<T, Id>(bags, first, dim, pairs, width, out.data<typename grc::Reader<T, Id>::Value>());
      });
    });
    *ret0 = out.release();
  });
}
