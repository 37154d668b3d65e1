// Products of 16-bit matrices on the tensor cores: rows [16, depth] in shared memory times columns [8, depth] in registers.
#pragma once

#include <hopper.h>

constexpr int COLUMNS = 8;  // of a product, which has 16 rows
constexpr int CHUNK = 32;   // numbers of a row that four threads read at once, 16 bytes each

CONSTANT int least(int a, int b) { return a < b ? a : b; }
CONSTANT int most(int a, int b) { return a > b ? a : b; }

// Numbers from one row to the next, such that eight threads that read 16 bytes of two rows meet in no bank.
CONSTANT int apart(int columns) { return columns % 64 == 0 ? columns + 32 : columns; }

INLINE int warp() { return threadIdx.x / 32; }
INLINE int lane_row() { return threadIdx.x % 32 / 4; }
INLINE int quad() { return threadIdx.x % 4; }

INLINE u16 rounded(float v) { return static_cast<u16>(packed(v, 0.f)); }

struct Rows {
  uint4 low, high;  // of rows lane_row() and lane_row() + 8, eight columns
};

template <int HEIGHT, int WIDTH_OF_ROW>
INLINE Rows rows_at(const u16 (&matrix)[HEIGHT][WIDTH_OF_ROW], int column, int first = 0) {
  return {*reinterpret_cast<const uint4*>(&matrix[first + lane_row()][column]),
          *reinterpret_cast<const uint4*>(&matrix[first + lane_row() + 8][column])};
}

// sum += rows @ columns over a chunk of the depth: in which order its numbers come does not matter, if both sides have the same.
INLINE void products(float4& sum, const Rows& left, const uint4& right) {
  product(sum, left.low.x, left.high.x, left.low.y, left.high.y, right.x, right.y);
  product(sum, left.low.z, left.high.z, left.low.w, left.high.w, right.z, right.w);
}

// What the four threads of a row have, side by side.
INLINE uint4 of_quad(u32 v) {
  const int first = threadIdx.x % 32 / 4 * 4;
  const u32 a = of_lane(v, first), b = of_lane(v, first + 1), c = of_lane(v, first + 2), d = of_lane(v, first + 3);
  return make_uint4(a, b, c, d);
}

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
