// Bags of ids over one arena of embedding rows: checked, prefetched and pooled in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "lanes.h"
#include "row_formats.h"
#include "tensor.h"

namespace grc {

enum Pooling : int64_t { kSum = 0, kMean = 1, kMax = 2 };

// `step` 0 is one number, `size` times.
struct Ints {
  const int64_t* data;
  int64_t size, step = 1;
  int64_t operator[](int64_t i) const { return data[i * step]; }
};

// Where feature f's rows start in the arena, in elements, and where its ids and its results lie in a sample.
struct Table {
  int64_t start, stride, rows, dim, padding, column, length, out;
  RowFormat format = RowFormat::fp32;  // of an arena of bytes

  int64_t row_bytes(int64_t element) const { return element == 1 ? stride : dim * element; }
};

// The arguments of a look-up, checked once per call: what they promise about the arena is never checked again.
struct Bags {
  View arena;
  View ids;
  std::optional<View> offsets;
  std::optional<View> weights;
  std::vector<Table> tables;
  int64_t pooling;
  int64_t batch = 0;
  int64_t width = 0;
  bool plain = false;  // one unweighted id per feature: what most models have, and what kernels take a shorter way for

  Bags(AtenTensorHandle arena_, AtenTensorHandle ids_, AtenTensorHandle* offsets_, AtenTensorHandle* weights_,
       Ints bases, Ints rows, Ints dims, Ints lengths, int64_t pooling_, Ints padding, Ints packing)
      : arena(arena_), ids(ids_), pooling(pooling_) {
    if (offsets_ != nullptr) offsets.emplace(*offsets_);
    if (weights_ != nullptr) weights.emplace(*weights_);
    const int64_t features = bases.size;
    require(features > 0, "a look-up has at least one feature");
    require(rows.size == features && dims.size == features && padding.size == features,
            "bases, rows, dims and padding have one entry per feature");
    const bool bytes = arena.dtype == aoti_torch_dtype_uint8();
    require(packing.size == (bytes ? 2 * features : 0), "packing has a format and a start for each feature of bytes");
    require(!bytes || arena.rank == 1, "an arena of bytes is [E]");
    require(arena.rank == 1 || arena.rank == 2, "the arena is [elements] or [rows, dim]");
    require(arena.strides[arena.rank - 1] == 1 || arena.sizes[arena.rank - 1] <= 1, "the arena's rows are contiguous");
    require(pooling >= kSum && pooling <= kMax, "pooling is 0 sum, 1 mean or 2 max");
    if (offsets) {
      require(ids.rank == 1 && offsets->rank == 1 && offsets->strides[0] == 1, "with offsets, ids are [V]");
      require(lengths.size == 0, "with offsets there are no lengths");
      require((offsets->sizes[0] - 1) % features == 0, "offsets are [F * B + 1]");
      batch = (offsets->sizes[0] - 1) / features;
    } else {
      require(ids.rank == 2, "without offsets, ids are [B, T]");
      require(lengths.size == features, "without offsets there is one length per feature");
      batch = ids.sizes[0];
    }
    int64_t column = 0;
    plain = !offsets && !weights;
    tables.reserve(features);
    for (int64_t f = 0; f < features; ++f) {
      const int64_t length = offsets ? 0 : lengths[f];
      Table& table = tables.emplace_back(0, dims[f], rows[f], dims[f], padding[f], column, length, width);
      if (bytes)
        unpack(table, packing[2 * f], packing[2 * f + 1]);
      else
        place(table, bases[f]);
      require(length >= 0, "lengths are not negative");
      plain = plain && length == 1;
      column += length;
      width += dims[f];
    }
    require(offsets || column == ids.sizes[1], "the lengths add up to the columns of ids");
    if (weights) {
      require(pooling == kSum, "weights go with pooling sum");
      require(weights->dtype == value_dtype(), "weights have the arena's dtype");
      require(weights->rank == ids.rank && std::equal(ids.sizes, ids.sizes + ids.rank, weights->sizes),
              "weights have the shape of ids");
    }
  }

  int64_t features() const { return static_cast<int64_t>(tables.size()); }

  // What rows are summed from and results are written in: bytes stand for float32.
  int32_t value_dtype() const {
    return arena.dtype == aoti_torch_dtype_uint8() ? aoti_torch_dtype_float32() : arena.dtype;
  }

  // Rows read per sample, on average: what a thread has to do.
  int64_t rows_per_sample() const { return batch > 0 ? ids.numel() / batch : 0; }

 private:
  void unpack(Table& table, int64_t format, int64_t start) const {
    require(format >= 0 && format <= static_cast<int64_t>(RowFormat::int4), "a row format is 0 to 4");
    require(start >= 0 && start % 4 == 0 && table.rows >= 0 && table.dim > 0, "a start or a table's size is out of range");
    table.format = static_cast<RowFormat>(format);
    table.stride = packed_bytes(table.format, table.dim);
    table.start = start;
    require(start <= arena.sizes[0] && table.rows <= (arena.sizes[0] - start) / table.stride,
            "a table reaches past the arena");
  }

  void place(Table& table, int64_t base) const {
    require(base >= 0 && table.rows >= 0 && table.dim > 0, "a base or a table's size is out of range");
    if (arena.rank == 2) {
      require(table.dim == arena.sizes[1], "every dim is the arena's");
      require(base <= arena.sizes[0] && table.rows <= arena.sizes[0] - base, "a table reaches past the arena");
      table.stride = arena.strides[0];
      table.start = base * table.stride;
    } else {
      require(base <= arena.sizes[0] && table.rows <= (arena.sizes[0] - base) / table.dim,
              "a table reaches past the arena");
      table.start = base;
    }
  }
};

// How many samples ahead rows are fetched, and how many rows of a bag: the rest are fetched when the bag is checked.
constexpr int64_t kAhead = 3;
constexpr int64_t kAheadRows = 4;

// What a table without padding has in its place. It is an id as well, and a usual one: NaN cast to int64.
constexpr int64_t kNoPadding = std::numeric_limits<int64_t>::min();

// Rows of T, ids of Id. T is uint8_t for an arena of bytes, whose rows are unpacked as they are read.
template <class T, class Id>
class Reader {
 public:
  using Value = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;

  struct Bag {
    int64_t first, length;
  };

  explicit Reader(const Bags& bags)
      : bags_(bags),
        arena_(static_cast<const T*>(bags.arena.data)),
        ids_(static_cast<const Id*>(bags.ids.data)),
        weights_(bags.weights ? static_cast<const Value*>(bags.weights->data) : nullptr),
        wide_(bags.offsets && bags.offsets->dtype == aoti_torch_dtype_int64()) {
    require(!bags.offsets || wide_ || bags.offsets->dtype == aoti_torch_dtype_int32(), "offsets are int32 or int64");
    step_ = bags.ids.strides[bags.ids.rank - 1];
    sample_ = bags.offsets ? 0 : bags.ids.strides[0];
    if (weights_ != nullptr) {
      weight_step_ = bags.weights->strides[bags.ids.rank - 1];
      weight_sample_ = bags.offsets ? 0 : bags.weights->strides[0];
    }
  }

  bool weighted() const { return weights_ != nullptr; }

  // Columns d..d+count-1 of a row of feature f, the rest zeros.
  Lanes lanes(int64_t f, const T* row, int64_t d, int64_t count = kLanes) const {
    if constexpr (std::is_same_v<T, uint8_t>)
      return unpacked(bags_.tables[f].format, row, bags_.tables[f].dim, d, count);
    else
      return load(row + d, count);
  }

  // A whole row in float32 into `out`, whose width is dim padded to whole vectors.
  void widen(int64_t f, const T* row, float* out) const {
    const int64_t dim = bags_.tables[f].dim;
    for (int64_t d = 0; d < dim; d += kLanes) lanes(f, row, d, std::min(kLanes, dim - d)).store(out + d);
  }

  Bag bag(int64_t f, int64_t b) const {
    if (!bags_.offsets) return {bags_.tables[f].column, bags_.tables[f].length};
    const int64_t begin = offset(f * bags_.batch + b), end = offset(f * bags_.batch + b + 1);
    if (begin < 0 || end < begin || end > bags_.ids.sizes[0])
      throw std::out_of_range("offsets of feature " + std::to_string(f) + " run from " + std::to_string(begin) +
                              " to " + std::to_string(end) + " over " + std::to_string(bags_.ids.sizes[0]) + " ids");
    return {begin, end - begin};
  }

  // The row of the id at position k of the bag, or null if the id is padding. Throws if the id has no row.
  const T* row(int64_t f, int64_t b, const Bag& bag, int64_t k) const {
    const Table& table = bags_.tables[f];
    const int64_t id = ids_[b * sample_ + (bag.first + k) * step_];
    if (__builtin_expect(id == table.padding, 0)) return id == kNoPadding ? refuse(f, id) : nullptr;
    if (__builtin_expect(static_cast<uint64_t>(id) >= static_cast<uint64_t>(table.rows), 0)) refuse(f, id);
    return arena_ + table.start + id * table.stride;
  }

  int64_t id(int64_t f, int64_t b) const { return ids_[b * sample_ + f * step_]; }

  const T* row(int64_t f, int64_t b) const { return row(f, b, {f, 1}, 0); }

  // For between two rows that are read: asked for at once, a sample's rows would fill the places for loads under way, and what
  // is read next would wait for one. Inlined by force, as `fetch` is: g++ takes a function that only prefetches for one without
  // effect, and drops the calls.
  __attribute__((always_inline)) void prefetch(int64_t f, int64_t b) const {
    if (bags_.plain) return fetch(f, b, {f, 1}, 0);
    const Bag ahead = bag(f, b);
    for (int64_t k = 0; k < std::min(ahead.length, kAheadRows); ++k) fetch(f, b, ahead, k);
  }

  // The first rows of samples begin..end-1.
  __attribute__((always_inline)) void prefetch_first(int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < std::min(begin + kAhead, end); ++b)
      for (int64_t f = 0; f < bags_.features(); ++f) prefetch(f, b);
  }

  // Pools bag (f, b) into `out`, whose width is dim padded to whole vectors; the padding lanes become zero.
  void pool(int64_t f, int64_t b, float* out) const {
    const Table& table = bags_.tables[f];
    const Bag here = bag(f, b);
    int64_t counted = 0;
    for (int64_t k = kAheadRows; k < here.length; ++k) fetch(f, b, here, k);
    for (int64_t k = 0; k < here.length; ++k) counted += row(f, b, here, k) != nullptr;
    if (counted == 0) return std::fill_n(out, padded(table.dim), 0.f), void();
    const bool single = here.length == 1 && !weighted();
    for (int64_t d = 0; d < table.dim; d += kLanes) {
      const int64_t count = std::min(kLanes, table.dim - d);
      const Lanes value = single ? lanes(f, row(f, b, here, 0), d, count) : reduce(f, b, here, d, count, counted);
      value.store(out + d);
    }
  }

 private:
  const Bags& bags_;
  const T* arena_;
  const Id* ids_;
  const Value* weights_;
  bool wide_;
  int64_t step_ = 1, sample_ = 0, weight_step_ = 1, weight_sample_ = 0;

  int64_t offset(int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(bags_.offsets->data)[i]
                 : static_cast<const int32_t*>(bags_.offsets->data)[i];
  }

  // The address of an id not yet checked may lie anywhere: a prefetch never faults, but pointer arithmetic may not
  // leave its array, hence integers. Lines are counted down, since such a row may end beyond the last address there is.
  __attribute__((always_inline)) void fetch(int64_t f, int64_t b, const Bag& bag, int64_t k) const {
    const Table& table = bags_.tables[f];
    const uint64_t id = static_cast<uint64_t>(ids_[b * sample_ + (bag.first + k) * step_]);
    const uint64_t first = reinterpret_cast<uint64_t>(arena_) + (table.start + id * table.stride) * sizeof(T);
    uint64_t line = first & ~63ull;
    for (int64_t left = table.row_bytes(sizeof(T)) + (first & 63); left > 0; left -= 64, line += 64)
      __builtin_prefetch(reinterpret_cast<void*>(line));
  }

  Lanes reduce(int64_t f, int64_t b, const Bag& bag, int64_t d, int64_t count, int64_t counted) const {
    Lanes sum(bags_.pooling == kMax ? -std::numeric_limits<float>::infinity() : 0.f);
    for (int64_t k = 0; k < bag.length; ++k) {
      const T* source = row(f, b, bag, k);
      if (source == nullptr) continue;
      const Lanes value = lanes(f, source, d, count);
      if (weighted()) {
        const Value weight = weights_[b * weight_sample_ + (bag.first + k) * weight_step_];
        sum = at::vec::fmadd(Lanes(static_cast<float>(weight)), value, sum);
      } else if (bags_.pooling == kMax) {
        sum = at::vec::maximum(sum, value);
      } else {
        sum = sum + value;
      }
    }
    if (bags_.pooling == kMean) sum = sum / Lanes(static_cast<float>(counted));
    return sum;
  }

  [[noreturn]] __attribute__((noinline)) const T* refuse(int64_t f, int64_t id) const {
    throw std::out_of_range("id " + std::to_string(id) + " of feature " + std::to_string(f) + " is outside 0.." +
                            std::to_string(bags_.tables[f].rows - 1));
  }
};

}  // namespace grc
