// One register tile, written once and compiled for each way to multiply: included by low_formats.h inside a namespace that
// has the CPU's instructions, or not. Hence no include guard.

template <class Format, int ROWS, int VECS>
void tile(const Gemm& g, const Tile& t) {
  constexpr int64_t GROUP = Format::kGroup;
  // With few rows, steps along K are summed apart so that the latency of one product hides behind the other.
  constexpr int APART = ROWS * VECS >= 8 ? 1 : 2;
  constexpr int STEPS = 2;  // before the loop turns
  // Panels come from L3 or memory when rows are few: lines this far ahead arrive in time. Full tiles pass over the same
  // panel many times.
  constexpr int64_t AHEAD = ROWS == kRows ? 0 : 4096 / static_cast<int64_t>(sizeof(typename Format::Weight));

  const typename Format::Input* x[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    x[i] = static_cast<const typename Format::Input*>(g.x) + (t.row + i) * g.stride;
    asm("" : "+r"(x[i]));  // a pointer of its own: GCC would keep an offset for each row and step, and spill
  }
  const auto* w = static_cast<const typename Format::Weight*>(g.weight) + t.col / kPanel * kPanel * g.depth +
                  t.col % kPanel * GROUP;
  typename Format::Sum acc[APART][ROWS][VECS];
#pragma GCC unroll 2
  for (int s = 0; s < APART; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[s][i][j] = typename Format::Sum(0);

  int64_t k = 0;
  const auto step = [&](int s) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int part = 0; part < Format::kParts; ++part) {  // one after another: registers hold the weights of one
      decltype(Format::weights(w, 0)) cols[VECS];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) {
        const auto* line = w + s * kPanel * GROUP + j * kLanes * GROUP;
        cols[j] = Format::weights(line, part);
        if (AHEAD > 0 && part == 0) __builtin_prefetch(line + AHEAD);
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const auto value = Format::input(x[i] + k + s * GROUP, part);
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) acc[s % APART][i][j] = Format::dot(acc[s % APART][i][j], value, cols[j]);
      }
    }
  };
  for (; k + STEPS * GROUP <= g.depth; k += STEPS * GROUP, w += STEPS * kPanel * GROUP) {
#pragma GCC unroll 2
    for (int s = 0; s < STEPS; ++s) step(s);
  }
  if (k < g.depth) step(0);
  alignas(64) std::conditional_t<std::is_same_v<typename Format::Sum, Ints>, int32_t, float> sums[ROWS * VECS * kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      typename Format::Sum sum = acc[0][i][j];
      if constexpr (APART > 1) sum = sum + acc[1][i][j];
      sum.store(sums + (i * VECS + j) * kLanes);
    }
  write(g, t, sums, ROWS, VECS);
}

#include "low_table.h"
