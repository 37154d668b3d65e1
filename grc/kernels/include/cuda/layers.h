// What kernels share that take 16-bit rows through layers on the tensor cores.
#pragma once

#include <hopper.h>

constexpr int COLUMNS = 8;  // of a product, which has 16 rows
constexpr int CHUNK = 32;   // numbers of a row that a warp reads at once

CONSTANT int least(int a, int b) { return a < b ? a : b; }
CONSTANT int most(int a, int b) { return a > b ? a : b; }

INLINE int warp() { return threadIdx.x / 32; }
INLINE int lane_row() { return threadIdx.x % 32 / 4; }
INLINE int quad() { return threadIdx.x % 4; }

INLINE u16 rounded(float v) { return static_cast<u16>(packed(v, 0.f)); }

// The activations of grc.kernels.packed_linear, by their places.
template <int KIND>
INLINE float activated(float v) {
  static_assert(0 <= KIND && KIND <= 6, "an activation that kernels do not know");
  if constexpr (KIND == 1) return v < 0.f ? 0.f : v;  // max(v, 0) that keeps NaN
  if constexpr (KIND == 2) return 0.5f * v * (1.f + erff(v * 0.70710678f));
  if constexpr (KIND == 3) return v / (1.f + exponential(-1.5957691f * (v + 0.044715f * v * v * v)));
  if constexpr (KIND == 4) return v / (1.f + exponential(-v));
  if constexpr (KIND == 5) return 1.f / (1.f + exponential(-v));
  if constexpr (KIND == 6) return 2.f / (1.f + exponential(-2.f * v)) - 1.f;
  return v;
}
