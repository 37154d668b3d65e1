// Products of matrices that are in L1 already, and exp between two of them: what attention is made of.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "lanes.h"

namespace grc::tile {

// Accumulators fill the register file: 6 x 4 of 32 with AVX-512, 6 x 2 of 16 without.
#ifdef CPU_CAPABILITY_AVX512
constexpr int64_t kVecs = 4;
#else
constexpr int64_t kVecs = 2;
#endif
constexpr int64_t kRows = 6;

// exp(x) within 1.01 ulp (every 7th float of -87.3 to 88); below that, where it would be subnormal, 0. NaN stays. Cody
// and Waite's reduction with the polynomial of Cephes' expf; inline, because around a call no accumulator stays in a
// register.
inline Lanes exponential(Lanes x) {
  using Bits = at::vec::Vectorized<int32_t>;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the integer in the low bits of the mantissa
  constexpr float P[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Lanes shifted = at::vec::fmadd(x, Lanes(1.44269504f), Lanes(kRound));
  const Lanes n = shifted - Lanes(kRound);
  const Lanes r = at::vec::fmadd(n, Lanes(2.12194440e-4f), at::vec::fmadd(n, Lanes(-0.693359375f), x));
  Lanes poly(1.9875691500e-4f);
#pragma GCC unroll 5
  for (const float p : P) poly = at::vec::fmadd(poly, r, Lanes(p));
  const Lanes mantissa = at::vec::fmadd(poly, r * r, r) + Lanes(1.f);
  const Bits exponent = (at::vec::cast<int32_t>(shifted) << Bits(23)) + Bits(0x3f800000);
  return Lanes::blendv(mantissa * at::vec::cast<float>(exponent), Lanes(0.f), x < Lanes(-87.3f));
}

// c[ROWS, cols] = (a b) * factors, b a row-major [depth, ...] of whole vectors. `cols` cuts the last vector short.
struct Product {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb, depth;
  float* c;
  int64_t ldc, cols;
  const float* factors;  // one a row, or null
};

template <int ROWS, int VECS>
void tile(const Product& p) {
  // With few accumulators, two steps are kept apart so that the latency of one multiply-add hides behind the other.
  constexpr int STEPS = ROWS * VECS >= 8 ? 1 : 2;
  Lanes acc[STEPS][ROWS][VECS];  // zeros
  const float* a = p.a;
  const float* b = p.b;
  int64_t d = 0;
  for (; d + STEPS <= p.depth; d += STEPS, a += STEPS, b += STEPS * p.ldb) {
#pragma GCC unroll 2
    for (int s = 0; s < STEPS; ++s) {
      Lanes w[VECS];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) w[j] = Lanes::loadu(b + s * p.ldb + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Lanes v(a[i * p.lda + s]);
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) acc[s][i][j] = at::vec::fmadd(v, w[j], acc[s][i][j]);
      }
    }
  }
  if (STEPS > 1 && d < p.depth) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j)
        acc[0][i][j] = at::vec::fmadd(Lanes(a[i * p.lda]), Lanes::loadu(b + j * kLanes), acc[0][i][j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const Lanes factor(p.factors ? p.factors[i] : 1.f);
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      Lanes sum = acc[0][i][j];
      if constexpr (STEPS > 1) sum = sum + acc[1][i][j];
      store(p.c + i * p.ldc + j * kLanes, sum * factor, std::min(kLanes, p.cols - j * kLanes));
    }
  }
}

using TileFunction = void (*)(const Product&);

template <std::size_t... I>
constexpr std::array<TileFunction, sizeof...(I)> tile_table(std::index_sequence<I...>) {
  return {tile<I / kVecs + 1, I % kVecs + 1>...};
}

inline constexpr auto kTiles = tile_table(std::make_index_sequence<kRows * kVecs>());

inline void multiply(Product p, int64_t rows) {
  for (int64_t left = at::divup(p.cols, kLanes); left > 0; left -= kVecs) {
    kTiles[(rows - 1) * kVecs + std::min(kVecs, left) - 1](p);
    p.b += kVecs * kLanes;
    p.c += kVecs * kLanes;
    p.cols -= kVecs * kLanes;
  }
}

}  // namespace grc::tile
