// One register tile, written once and compiled for each way to multiply: included by low_gemm.h inside a namespace that
// has the CPU's instructions, or not. Hence no include guard.

template <class Dot, int ROWS, int VECS>
void tile(const Gemm& g, const Tile& t) {
  constexpr int64_t GROUP = Dot::kGroup;
  // Panels come from L3 or memory when rows are few: lines this far ahead arrive in time.
  constexpr int64_t AHEAD = 4096 / static_cast<int64_t>(sizeof(typename Dot::Weight));
  // With few rows, steps along K are kept apart so that the latency of one product hides behind the other.
  constexpr int STEPS = ROWS * VECS >= 8 ? 1 : 2;

  const auto* a = static_cast<const typename Dot::Input*>(g.x) + t.row * g.stride;
  const auto* b = static_cast<const typename Dot::Weight*>(g.weight) + t.col / kPanel * kPanel * g.depth +
                  t.col % kPanel * GROUP;
  const int64_t steps = g.depth / GROUP;
  typename Dot::Sum acc[STEPS][ROWS][VECS];
#pragma GCC unroll 2
  for (int s = 0; s < STEPS; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[s][i][j] = typename Dot::Sum(0);
  int64_t k = 0;
  for (; k + STEPS <= steps; k += STEPS) {
#pragma GCC unroll 2
    for (int s = 0; s < STEPS; ++s, a += GROUP, b += kPanel * GROUP) {
      decltype(Dot::weights(b)) w[VECS];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) {
        w[j] = Dot::weights(b + j * kLanes * GROUP);
        __builtin_prefetch(b + j * kLanes * GROUP + AHEAD);
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const auto x = Dot::inputs(a + i * g.stride);
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) acc[s][i][j] = Dot::dot(acc[s][i][j], x, w[j]);
      }
    }
  }
  for (; k < steps; ++k, a += GROUP, b += kPanel * GROUP)
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j)
        acc[0][i][j] = Dot::dot(acc[0][i][j], Dot::inputs(a + i * g.stride), Dot::weights(b + j * kLanes * GROUP));
  alignas(64) std::conditional_t<std::is_same_v<typename Dot::Sum, Ints>, int32_t, float> sums[ROWS * VECS * kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      typename Dot::Sum sum = acc[0][i][j];
      if constexpr (STEPS > 1) sum = sum + acc[1][i][j];
      sum.store(sums + (i * VECS + j) * kLanes);
    }
  write(g, t, sums, ROWS, VECS);
}

template <class Dot, std::size_t... I>
constexpr std::array<void (*)(const Gemm&, const Tile&), sizeof...(I)> tile_table(std::index_sequence<I...>) {
  return {tile<Dot, I / kVecs + 1, I % kVecs + 1>...};
}

template <class Dot>
inline constexpr auto kTiles = tile_table<Dot>(std::make_index_sequence<kRows * kVecs>());
