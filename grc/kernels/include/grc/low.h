// What products with a weight of int8 or bfloat16 share: their operands, their formats, and how sums are finished.
#pragma once

#include <array>
#include <cstdint>

#include "gemm.h"
#include "lanes.h"
#include "linear.h"

namespace grc::low {

using gemm::kPanel;
using gemm::kRows;
using gemm::kVecs;
using Ints = at::vec::Vectorized<int32_t>;
static_assert(Ints::size() == kLanes);

// K at which a sum of 255 * 127 could leave 32 bits is 66311.
constexpr int64_t kMaxDepth = 65536;

// How a row of x became bytes: what a step is worth, and which step is zero.
struct Row {
  float step;
  int32_t zero;
};

struct Gemm {
  const void* x;         // [m, depth] of the format's Input, `stride` of them from row to row
  const void* weight;    // [ceil(n / kPanel), depth / kGroup, kPanel, kGroup]
  const float* scale;    // int8: [n] of the columns
  const float* sums;     // int8: [n] of the weights of each column
  const Row* row;        // int8: [m]
  float* y;              // [m, n]
  int64_t m, n, depth, stride;
  gemm::Epilogue epilogue;
};

struct Tile {
  int64_t row, col, rows;
};

// How a format takes rows: a tile has up to kUnits units of kUnit rows, x is padded to whole units, and its rows to kAlign
// elements, an odd multiple where kOdd is 1, so that those of a tile fall into different sets of the cache. A Scope stands
// while a thread multiplies.
struct ByRow {
  static constexpr int64_t kUnit = 1, kUnits = kRows, kAlign = kLanes, kOdd = 0;
  struct Scope {};
};

// Weights of 8 bits, symmetric, a scale a column; x of 8 bits with a scale and a zero a row.
struct Int8 : ByRow {
  using Weight = int8_t;
  using Sum = Ints;
  static constexpr int64_t kGroup = 4;
};

// Weights and x of bfloat16, sums of float32.
struct Bf16 : ByRow {
  using Weight = uint16_t;
  using Sum = Lanes;
  static constexpr int64_t kGroup = 2;
};

// A weight [n, k] as its packer left it, checked. Without a scale it is bfloat16.
struct Weight {
  const void* data;
  const float* scale = nullptr;
  const float* sums = nullptr;
  int64_t depth;  // k, padded to whole groups

  Weight(AtenTensorHandle packed, AtenTensorHandle* factors, int64_t n, int64_t k) {
    const bool bytes = View(packed).dtype == aoti_torch_dtype_int8();
    require(bytes == (factors != nullptr), "a weight of int8 has a scale, one of bfloat16 has none");
    const int64_t group = bytes ? Int8::kGroup : Bf16::kGroup, steps = at::divup(k, group);
    depth = steps * group;
    require(!bytes || depth <= kMaxDepth, "int8 sums of more than 65536 products may leave 32 bits");
    data = weight_data(packed, bytes ? aoti_torch_dtype_int8() : aoti_torch_dtype_bfloat16(),
                       {at::divup(n, kPanel), steps, kPanel, group});
    if (!bytes) return;
    scale = Finish::vector(*factors, "scale", 2 * n);
    sums = scale + n;
  }
};

// v * Phi(v) within 9.2e-5, a hundredth of what the rounding of its factors to 8 bits moves it by, in a quarter of the time
// of gemm::gelu: Phi(v) - 1/2 as an odd polynomial of degree 17, fitted on |v| <= 4.2 and constant beyond.
inline Lanes gelu(Lanes v) {
  constexpr float P[] = {-4.79655755e-09f, 2.07278240e-07f, -5.29013191e-06f, 8.98421182e-05f,
                         -1.08649884e-03f, 9.74108600e-03f, -6.62223458e-02f, 3.98834761e-01f};
  const Lanes u = at::vec::clamp(v, Lanes(-4.2f), Lanes(4.2f));
  const Lanes t = u * u;
  Lanes poly(4.92491577e-11f);
#pragma GCC unroll 8
  for (const float p : P) poly = at::vec::fmadd(poly, t, Lanes(p));
  return v * at::vec::fmadd(u, poly, Lanes(0.5f));
}

inline Lanes finished(Lanes v, const gemm::Epilogue& e, int64_t row, int64_t col, int64_t count) {
  if (e.activation != gemm::Activation::gelu) return gemm::finish(v, e, row, col, count);
  if (e.bias) v = v + Lanes::loadu(e.bias + col, count);
  v = gelu(v);
  if (e.mul.data) v = v * Lanes::loadu(e.mul.data + row * e.mul.stride + col, count);
  if (e.add.data) v = v + Lanes::loadu(e.add.data + row * e.add.stride + col, count);
  return v;
}

// Writes `rows` x `vecs` sums that lie side by side, finished.
[[gnu::noinline]] inline void write(const Gemm& g, const Tile& t, const int32_t* sums, int64_t rows, int64_t vecs) {
  const gemm::Epilogue& e = g.epilogue;
  const bool plain = e.activation == gemm::Activation::none && !e.mul.data && !e.add.data;
  const bool smooth = e.activation == gemm::Activation::gelu && !e.mul.data && !e.add.data;
  for (int64_t j = 0; j < vecs; ++j) {
    const int64_t col = t.col + j * kLanes, count = std::min(kLanes, g.n - col);
    const Lanes scale = Lanes::loadu(g.scale + col, count);
    const Ints weights = at::vec::convert_to_int_of_same_size(Lanes::loadu(g.sums + col, count));
    const Row* row = g.row + t.row;
    const int32_t* sum = sums + j * kLanes;
    const auto value = [&](int64_t i) {
      const Ints whole = Ints::loadu(sum + i * vecs * kLanes) - Ints(row[i].zero) * weights;
      return at::vec::convert_to_fp_of_same_size<float>(whole) * (scale * Lanes(row[i].step));
    };
    float* y = g.y + t.row * g.n + col;
    if (count == kLanes && (plain || smooth)) {  // what most tiles are, without a branch in them
      const Lanes bias = e.bias ? Lanes::loadu(e.bias + col) : Lanes(0.f);
      if (plain)
        for (int64_t i = 0; i < rows; ++i) (value(i) + bias).store(y + i * g.n);
      else
        for (int64_t i = 0; i < rows; ++i) gelu(value(i) + bias).store(y + i * g.n);
    } else {
      for (int64_t i = 0; i < rows; ++i) finished(value(i), e, t.row + i, col, count).store(y + i * g.n, count);
    }
  }
}

[[gnu::noinline]] inline void write(const Gemm& g, const Tile& t, const float* sums, int64_t rows, int64_t vecs) {
  for (int64_t j = 0; j < vecs; ++j) {
    const int64_t col = t.col + j * kLanes, count = std::min(kLanes, g.n - col);
    for (int64_t i = 0; i < rows; ++i) {
      const Lanes v = finished(Lanes::loadu(sums + (i * vecs + j) * kLanes), g.epilogue, t.row + i, col, count);
      v.store(g.y + (t.row + i) * g.n + col, count);
    }
  }
}

// The tiles of a format by their units and vectors.
template <class Format>
using Tiles = std::array<void (*)(const Gemm&, const Tile&), Format::kUnits * kVecs>;

}  // namespace grc::low
