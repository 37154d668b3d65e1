// y = epilogue(x W^T) in float32 over a weight packed in panels: the register tile, the cache blocks, the thread split.
//
// A panel holds kPanel columns of the output: [ceil(N / kPanel), K, kPanel], zero-padded, so that a tile reads one
// stream. The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008); x
// is small here and stays unpacked.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <utility>

#include "lanes.h"

namespace grc::gemm {

// Accumulators fill the register file: 6 x 4 of 32 with AVX-512, 6 x 2 of 16 without.
#ifdef CPU_CAPABILITY_AVX512
constexpr int64_t kVecs = 4;
#else
constexpr int64_t kVecs = 2;
#endif
constexpr int64_t kRows = 6;
constexpr int64_t kPanel = kVecs * kLanes;

// Heads of up to this many outputs keep their weight as [N, K] and take dot products: a panel would be mostly padding.
constexpr int64_t kNarrow = 4;

// Steps along K that one accumulator sums before it is added to y: short chains round less than one long one.
// 512 is 3% faster and rounds up to 2.9x worse than MKL, 256 at most 1.9x (K 400 to 2048).
constexpr int64_t kDepth = 256;

// Floats of x that stay in L2 while the panels pass by: 192 KiB leave room for a panel in the 512 KiB of older cores.
constexpr int64_t kBlock = 48 * 1024;

enum class Activation : int64_t { none, relu, gelu, gelu_tanh, silu, sigmoid, tanh, prelu, dice };

// A matrix whose rows are contiguous and lie `stride` floats apart. Null data: not given.
struct Matrix {
  const float* data = nullptr;
  int64_t stride = 0;
};

// Numbers for each column that an activation reads: alpha, and dice's scale and shift.
inline int64_t gate_rows(Activation activation) {
  return activation == Activation::prelu ? 1 : activation == Activation::dice ? 3 : 0;
}

struct Epilogue {
  const float* bias = nullptr;
  Matrix mul;
  Matrix add;
  Activation activation = Activation::none;
  Matrix gate;  // [gate_rows, n]
};

struct Gemm {
  Matrix x;             // [m, k]
  const float* weight;  // panels, or [n, k] when n <= kNarrow
  float* y;             // [m, n]
  int64_t m, n, k;
  Epilogue epilogue;
};

// exp(v) to a unit in the last place, for v in -87 to 89 and at the nearer end of that beyond it: 2^n exp(r) with |r| <=
// ln(2) / 2 and the series' first terms, refitted. It is inlined so that the many of a tile overlap, which calls of Sleef's
// do not.
inline Lanes bounded_exp(Lanes v) {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));
  // within this range 2^n is a normal number or, at its end, infinity; NaN stays NaN
  const Lanes x = at::vec::clamp_max(at::vec::clamp_min(v, Lanes(-87.f)), Lanes(89.f));
  const Lanes rounder(12582912.f);  // 1.5 * 2^23: adding it leaves n in the lowest bits
  const Lanes shifted = at::vec::fmadd(x, Lanes(1.44269504f), rounder);
  const Lanes n = shifted - rounder;
  const Lanes r = at::vec::fmadd(n, Lanes(-1.42860677e-6f), at::vec::fmadd(n, Lanes(-0.693145752f), x));
  constexpr float P[] = {0.00836872f, 0.04166839f, 0.16666521f, 0.49999993f, 1.f, 1.f};
  Lanes poly(0.00138146f);
  for (const float c : P) poly = at::vec::fmadd(poly, r, Lanes(c));
  const Ints power = (std::bit_cast<Ints>(shifted) + 127) << 23;
  return poly * std::bit_cast<Lanes>(std::bit_cast<Floats>(power));
}

// 1 / (1 + exp(-v)) to three units in the last place.
inline Lanes sigmoid(Lanes v) {
  return Lanes(1.f) / (Lanes(1.f) + bounded_exp(v.neg()));
}

// 1 - 2 / (exp(2 |v|) + 1) with the sign of v, and below 0.625, where that loses digits, the polynomial of Cephes' tanhf.
inline Lanes tanh(Lanes v) {
  constexpr float P[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  const Lanes size = v.abs(), square = v * v;
  Lanes poly(-5.70498872745e-3f);
  for (const float c : P) poly = at::vec::fmadd(poly, square, Lanes(c));
  const Lanes small = at::vec::fmadd(poly * square, v, v);
  const Lanes large = Lanes(1.f) - Lanes(2.f) / (bounded_exp(size + size) + Lanes(1.f));
  return Lanes::blendv(small, Lanes::blendv(large, large.neg(), v < Lanes(0.f)), size > Lanes(0.625f));
}

// v * Phi(v). Phi(-|v|) = erfc(z) / 2, z = |v| / sqrt(2), is t P(t) exp(-z^2) with t = 1 / (1 + 0.42 z): the form of
// Hastings, "Approximations for Digital Computers" (1955), with 8 terms refitted to a relative error of 2e-7. His 5, as
// in at::vec's erf, lose small results to 1 - erf.
inline Lanes gelu(Lanes v) {
  constexpr float P[] = {-0.16009606f, 0.22028021f, -0.065210700f, 0.13434306f, 0.097371807f, 0.11979148f, 0.11841221f};
  const Lanes z = v.abs() * Lanes(0.70710678f);
  const Lanes t = Lanes(1.f) / at::vec::fmadd(z, Lanes(0.42f), Lanes(1.f));
  Lanes poly(0.035107922f);
  for (const float p : P) poly = at::vec::fmadd(poly, t, Lanes(p));
  const Lanes power = v * v * Lanes(-0.5f);
  const Lanes tail = Lanes::blendv(poly * t * bounded_exp(power), Lanes(0.f), power < Lanes(-87.f));
  return v * Lanes::blendv(Lanes(1.f) - tail, tail, v < Lanes(0.f));
}

// Out of line: it is long, and the call costs little beside what it computes.
[[gnu::noinline]] inline Lanes transcendental(Lanes v, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu(v);
    case Activation::gelu_tanh: {
      const Lanes cubic = Lanes(0.044715f) * v * v * v;
      return Lanes(0.5f) * v * (Lanes(1.f) + tanh(Lanes(0.79788456080286536f) * (v + cubic)));
    }
    case Activation::silu:
      return v * sigmoid(v);
    case Activation::sigmoid:
      return sigmoid(v);
    case Activation::tanh:
      return tanh(v);
    default:
      return v;
  }
}

inline Lanes activate(Lanes v, Activation activation) {
  if (activation == Activation::none) return v;
  if (activation == Activation::relu) return at::vec::clamp_min(v, Lanes(0.f));  // max(v, 0) that keeps NaN
  return transcendental(v, activation);
}

// PReLU, and the Dice of DIN, v * (alpha + (1 - alpha) * sigmoid(scale * v + shift)), for some columns.
struct Gate {
  bool dice;
  Lanes alpha, rest, scale, shift;

  Gate(const Epilogue& e, int64_t col, int64_t count) : dice(e.activation == Activation::dice) {
    const auto row = [&](int64_t i) { return Lanes::loadu(e.gate.data + i * e.gate.stride + col, count); };
    alpha = row(0);
    if (dice) rest = Lanes(1.f) - alpha, scale = row(1), shift = row(2);
  }

  Lanes operator()(Lanes v) const {
    if (!dice) return Lanes::blendv(v * alpha, v, v > Lanes(0.f));
    return v * at::vec::fmadd(rest, sigmoid(at::vec::fmadd(v, scale, shift)), alpha);
  }
};

inline Lanes finish(Lanes v, const Epilogue& e, int64_t row, int64_t col, int64_t count) {
  if (e.bias) v = v + Lanes::loadu(e.bias + col, count);
  v = e.gate.data ? Gate(e, col, count)(v) : activate(v, e.activation);
  if (e.mul.data) v = v * Lanes::loadu(e.mul.data + row * e.mul.stride + col, count);
  if (e.add.data) v = v + Lanes::loadu(e.add.data + row * e.add.stride + col, count);
  return v;
}

// One tile of y: `ROWS` rows at `row`, `VECS` vectors at column `col`, over x[:, k0:k1].
struct Tile {
  int64_t row, col, k0, k1;
};

// Adds a tile's sums to y, with the epilogue at the end of K. Apart from the tiles, of which there are many.
[[gnu::noinline]] inline void write(const Gemm& g, const Tile& t, const float* sums, int64_t rows, int64_t vecs) {
  const Epilogue& e = g.epilogue;
  const bool first = t.k0 == 0, last = t.k1 == g.k;
  const bool relu = last && e.activation == Activation::relu;
  // Tiles may be short, and then this is a good part of their time: what is common runs without a branch.
  const bool common = !last || (!e.mul.data && !e.add.data && (relu || e.activation == Activation::none));
  const bool gated = last && e.gate.data && !e.mul.data && !e.add.data;
  const Lanes floor(relu ? 0.f : -std::numeric_limits<float>::infinity());
  const int64_t step = vecs * kLanes;
  for (int64_t j = 0; j < vecs; ++j, sums += kLanes) {
    const int64_t col = t.col + j * kLanes;
    const int64_t count = std::min(kLanes, g.n - col);
    float* y = g.y + t.row * g.n + col;
    const auto sum = [&](int64_t i, Lanes bias) {
      return Lanes::loadu(sums + i * step) + (first ? Lanes(0.f) : Lanes::loadu(y)) + bias;
    };
    if (common && count == kLanes) {
      const Lanes bias = last && e.bias ? Lanes::loadu(e.bias + col) : Lanes(0.f);
      for (int64_t i = 0; i < rows; ++i, y += g.n) at::vec::clamp_min(sum(i, bias), floor).store(y);
    } else if (gated && count == kLanes) {
      const Gate gate(e, col, count);
      const Lanes bias = e.bias ? Lanes::loadu(e.bias + col) : Lanes(0.f);
      for (int64_t i = 0; i < rows; ++i, y += g.n) gate(sum(i, bias)).store(y);
    } else {
      for (int64_t i = 0; i < rows; ++i, y += g.n) {
        Lanes v = Lanes::loadu(sums + i * step);
        if (!first) v = v + Lanes::loadu(y, count);
        if (last) v = finish(v, e, t.row + i, col, count);
        v.store(y, count);
      }
    }
  }
}

template <int ROWS, int VECS>
void tile(const Gemm& g, const Tile& t) {
  // With few rows, steps along K are summed apart so that the latency of one multiply-add hides behind the others.
  constexpr int APART = ROWS * VECS >= 8 ? 1 : ROWS * VECS >= 4 ? 2 : 4;
  constexpr int STEPS = 4;  // before the loop turns: a core that shares its front end has no instruction to spare
  // Panels come from L3 or memory when rows are few: lines this far ahead arrive in time (2 KiB: 30% slower). Full tiles
  // pass over the same panel many times.
  constexpr int64_t AHEAD = ROWS == kRows ? 0 : 8192 / (kPanel * sizeof(float)) * kPanel;

  const float* x[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    x[i] = g.x.data + (t.row + i) * g.x.stride;
    asm("" : "+r"(x[i]));  // a pointer of its own: GCC would keep an offset for each row and step, and spill
  }
  const float* w = g.weight + t.col / kPanel * kPanel * g.k + t.col % kPanel + t.k0 * kPanel;
  int64_t k = t.k0;

  Lanes acc[APART][ROWS][VECS];  // zeros
  const auto step = [&](int s) __attribute__((always_inline)) {
    Lanes cols[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      const float* line = w + s * kPanel + j * kLanes;
      cols[j] = Lanes::loadu(line);
      if (AHEAD > 0 && j * kLanes % 16 == 0) __builtin_prefetch(line + AHEAD);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Lanes value(x[i][k + s]);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[s % APART][i][j] = at::vec::fmadd(value, cols[j], acc[s % APART][i][j]);
    }
  };
  for (; k + STEPS <= t.k1; k += STEPS, w += STEPS * kPanel) {
#pragma GCC unroll 4
    for (int s = 0; s < STEPS; ++s) step(s);
  }
  for (; k < t.k1; ++k, w += kPanel) step(0);
  alignas(64) float sums[ROWS][VECS][kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      Lanes sum = acc[0][i][j];
#pragma GCC unroll 4
      for (int s = 1; s < APART; ++s) sum = sum + acc[s][i][j];
      sum.store(sums[i][j]);
    }
  write(g, t, &sums[0][0][0], ROWS, VECS);
}

using TileFunction = void (*)(const Gemm&, const Tile&);

template <std::size_t... I>
constexpr std::array<TileFunction, sizeof...(I)> tile_table(std::index_sequence<I...>) {
  return {tile<I / kVecs + 1, I % kVecs + 1>...};
}

inline constexpr auto kTiles = tile_table(std::make_index_sequence<kRows * kVecs>());

// Part `i` of `parts` nearly equal parts of 0..size-1.
inline std::pair<int64_t, int64_t> part(int64_t size, int64_t parts, int64_t i) {
  return {size * i / parts, size * (i + 1) / parts};
}

// y[m0:m1] at vectors v0..v1-1 of its columns, by one thread.
inline void panels(const Gemm& g, int64_t m0, int64_t m1, int64_t v0, int64_t v1) {
  const int64_t rows = m1 - m0;
  const int64_t blocks = at::divup(rows, std::max(4 * kRows, kBlock / std::max<int64_t>(g.k, 1)));
  const int64_t passes = std::max<int64_t>(1, at::divup(g.k, kDepth));
  for (int64_t block = 0; block < blocks; ++block) {
    const auto [b0, b1] = part(rows, blocks, block);
    const int64_t tiles = at::divup(b1 - b0, kRows);
    for (int64_t v = v0; v < v1;) {
      const int64_t vecs = std::min(kVecs - v % kVecs, v1 - v);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const auto [k0, k1] = part(g.k, passes, pass);
        for (int64_t i = 0; i < tiles; ++i) {
          const auto [r0, r1] = part(b1 - b0, tiles, i);
          kTiles[(r1 - r0 - 1) * kVecs + vecs - 1](g, {m0 + b0 + r0, v * kLanes, k0, k1});
        }
      }
      v += vecs;
    }
  }
}

template <int ROWS>
void dots(const Gemm& g, int64_t row) {
  float sums[ROWS][kLanes] = {};
  for (int64_t col = 0; col < g.n; ++col) {
    const float* x = g.x.data + row * g.x.stride;
    const float* w = g.weight + col * g.k;
    Lanes acc[2][ROWS];
    int64_t k = 0;
    for (; k + 2 * kLanes <= g.k; k += 2 * kLanes) {
      const Lanes w0 = Lanes::loadu(w + k), w1 = Lanes::loadu(w + k + kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        acc[0][i] = at::vec::fmadd(Lanes::loadu(x + i * g.x.stride + k), w0, acc[0][i]);
        acc[1][i] = at::vec::fmadd(Lanes::loadu(x + i * g.x.stride + k + kLanes), w1, acc[1][i]);
      }
    }
    for (; k < g.k; k += kLanes) {
      const int64_t count = std::min(kLanes, g.k - k);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
        acc[0][i] = at::vec::fmadd(Lanes::loadu(x + i * g.x.stride + k, count), Lanes::loadu(w + k, count), acc[0][i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
      sums[i][col] = at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return a + b; }, acc[0][i] + acc[1][i]);
  }
  for (int i = 0; i < ROWS; ++i)
    finish(Lanes::loadu(sums[i], g.n), g.epilogue, row + i, 0, g.n).store(g.y + (row + i) * g.n, g.n);
}

inline void narrow(const Gemm& g, int64_t m0, int64_t m1) {
  for (; m1 - m0 >= 4; m0 += 4) dots<4>(g, m0);
  for (; m0 < m1; ++m0) dots<1>(g, m0);
}

// How rows and columns are dealt to threads.
struct Split {
  int64_t rows, cols;
};

// Cycles of one thread's share: 1 multiply-add of a vector each, and 8 bytes a cycle of x and W from the shared cache.
inline Split split(const Gemm& g, int64_t vecs, int64_t threads) {
  Split best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t rows = 1; rows <= threads; ++rows) {
    if (threads % rows) continue;
    const int64_t m = at::divup(g.m, rows), n = at::divup(vecs, threads / rows);
    const int64_t cycles = 2 * m * n + m + n * kLanes;
    if (cycles < least) {
      least = cycles;
      best = {rows, threads / rows};
    }
  }
  return best;
}

// Multiply-adds for which one more thread pays: a warm parallel region costs 1 us, a cooler one 4. Where each weight is
// read for few of them, they take three times as long.
constexpr int64_t kGrain = 256 * 1024;
constexpr int64_t kStreamGrain = 64 * 1024;

inline void run(const Gemm& g) {
  if (g.m == 0 || g.n == 0) return;
  const int64_t grain = g.m <= kRows || g.n <= kNarrow ? kStreamGrain : kGrain;
  const int64_t useful = g.m * g.n * g.k / grain;
  const int64_t threads = at::in_parallel_region() ? 1 : std::clamp<int64_t>(useful, 1, at::get_num_threads());
  if (g.n <= kNarrow) {
    at::parallel_for(0, g.m, at::divup(g.m, threads), [&](int64_t m0, int64_t m1) { narrow(g, m0, m1); });
    return;
  }
  const int64_t vecs = at::divup(g.n, kLanes);
  const Split s = split(g, vecs, threads);
  // Whole panels make the fullest tiles; with few rows or panels even shares count for more.
  const int64_t unit = g.m > kRows && vecs >= 8 * kVecs * s.cols ? kVecs : 1;
  const int64_t units = at::divup(vecs, unit);
  at::parallel_for(0, s.rows * s.cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [m0, m1] = part(g.m, s.rows, i / s.cols);
      const auto [u0, u1] = part(units, s.cols, i % s.cols);
      if (m0 < m1) panels(g, m0, m1, u0 * unit, std::min(vecs, u1 * unit));
    }
  });
}

}  // namespace grc::gemm
