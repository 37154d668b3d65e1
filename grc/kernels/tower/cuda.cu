// A tower of dense layers over some rows, in one launch: each cluster of blocks takes ROWS of them through all layers.
//
// Of every layer a block has some columns. It sends what it makes of them to all blocks of its cluster, whose next layer begins
// when all columns have come. What a block needs of the weights is one stream, in the order in which its threads read it; a warp
// of its own keeps it ahead of them, and begins before the kernel before has ended. All sums have one order: the same row has
// the same answer, bit by bit.
//
// Layers are act(x @ W + b), and cross layers x0 * (x @ W + b) + x, with the tower's own input x0 (Wang et al. 2021, eq. 1).
// The last layer may end with final(it + add).
//
// Built for one tower: see the GRC_ macros.
#include <layers.h>

#include "parameters.h"

using grc::TowerParameters;

struct Layer {
  int depth, columns, activation, cross;
};

constexpr Layer LAYERS[] = {GRC_LAYERS};
constexpr int COUNT = sizeof(LAYERS) / sizeof(Layer);
constexpr int ROWS = GRC_ROWS, CLUSTER = GRC_CLUSTER;  // rows and blocks of a cluster
constexpr int HIGH = 16, WIDE = 16;                    // rows of a product, and columns that a warp finishes at once
constexpr int HEIGHT = ROWS / HIGH;
constexpr int WARPS = 16, THREADS = 32 * WARPS;
static_assert(THREADS + 32 == grc::TOWER_THREADS, "one warp more for the stream");
static_assert(ROWS % HIGH == 0 && CHUNK == 2 * WIDE && WIDE == 2 * COLUMNS, "whole products");
constexpr int PRELU = 7;             // slopes for negative numbers, of each column
constexpr int ACROSS = 4, DOWN = 4;  // warps that share the columns of a block, and the depth of a layer
constexpr int BATCH = 4 / HEIGHT;    // chunks that a warp reads at once
constexpr int BUFFERS = 2 / HEIGHT;  // for the parts of products: one has to be read before the next product is in it

CONSTANT int ceil_div(int n, int size) { return (n + size - 1) / size; }
CONSTANT int chunks(int l) { return ceil_div(LAYERS[l].depth, CHUNK); }
CONSTANT int depth(int l) { return chunks(l) * CHUNK; }

// Strips of WIDE columns: of all blocks, of each, of each warp. Those that fill the next layer's last chunk are zeros.
CONSTANT int strips(int l) { return l + 1 < COUNT ? depth(l + 1) / WIDE : ceil_div(LAYERS[l].columns, WIDE); }
CONSTANT int own(int l) { return ceil_div(strips(l), CLUSTER); }
CONSTANT int each(int l) { return ceil_div(own(l), ACROSS); }

// Units of the stream: a chunk for each warp that shares the depth.
CONSTANT int deep(int l) { return ceil_div(chunks(l), DOWN); }
CONSTANT int units_before(int l) { return l == 0 ? 0 : units_before(l - 1) + deep(l - 1); }

// Strips of 16 rows when the parts of a product are added up, each by a warp. More warps would share them for the price of
// reading the parts again, and shared memory is what a layer takes its time for.
CONSTANT int finals(int l) { return own(l) * HEIGHT; }
CONSTANT int turns(int l) { return ceil_div(finals(l), WARPS); }

// Where the weights of a layer begin, of all blocks, and a block's vectors: in strips of a chunk, and in numbers.
CONSTANT int weights_at(int l) { return l == 0 ? 0 : weights_at(l - 1) + CLUSTER * chunks(l - 1) * own(l - 1); }
CONSTANT int vectors_of(int l) { return own(l) * WIDE; }
CONSTANT int vectors_at(int l) { return l == 0 ? 0 : vectors_at(l - 1) + vectors_of(l - 1) * (LAYERS[l - 1].activation == PRELU ? 2 : 1); }

// What is read by layers of odd and of even numbers, at most; and the most strips of a block.
CONSTANT int widest(int l) { return l >= COUNT ? CHUNK : most(depth(l), widest(l + 2)); }
CONSTANT int most_own(int l) { return l == COUNT ? 1 : most(own(l), most_own(l + 1)); }

// 16 rows of a strip, as the threads of a warp hold it when they have made it and when they read it for a product: 16 bytes
// each, which are columns 2 * quad() and the next one of rows lane_row() and that + 8, and the same eight columns on.
using Strip = uint4[32];
template <int WIDTH>
using Matrix = Strip[WIDTH / WIDE][HEIGHT];

using Weights = uint4[2][32];  // of a strip and a chunk: what each thread of a warp reads of both halves of its columns
using Unit = Weights[DOWN * most_own(0)];
constexpr int UNITS = units_before(COUNT), MOST_SLOTS = 16;

struct alignas(16) State {
  Matrix<depth(0)> first;
  Matrix<widest(1)> odd;
  Matrix<widest(2)> even;
  float4 parts[BUFFERS][DOWN][most_own(0) * HEIGHT][2][32];  // of products, by the depth that they are of
  float vectors[vectors_at(COUNT)];
  Barrier mail[COUNT];  // of what a layer reads
  Barrier full[MOST_SLOTS], empty[MOST_SLOTS], vectors_full;
};

constexpr int LEFT = (grc::TOWER_MEMORY - static_cast<int>(sizeof(State))) / static_cast<int>(sizeof(Unit));
constexpr int SLOTS = least(LEFT, least(MOST_SLOTS, UNITS));
static_assert(least(BATCH, UNITS) <= SLOTS, "room for the stream");

struct Shared : State {
  Unit weights[SLOTS];
};
static_assert(sizeof(Shared) <= grc::TOWER_MEMORY, "");

template <int L>
INLINE auto& read_by(Shared& s) {
  if constexpr (L == 0)
    return s.first;
  else if constexpr (L % 2 == 1)
    return s.odd;
  else
    return s.even;
}

// Those that share the columns are of all four schedulers, for each has the same to do then.
INLINE int lane() { return threadIdx.x % 32; }
INLINE int across() { return warp() / DOWN; }
INLINE int down() { return warp() % DOWN; }

// ---- the stream ----

// One thread keeps it going: a slot that all warps have read is filled with what comes next.
template <int L>
INLINE void stream(Shared& s, const uint4* weights, int block) {
  if constexpr (L < COUNT) {
    constexpr int SIZE = sizeof(Weights) / sizeof(uint4);
    const uint4* from = weights + (weights_at(L) + block * chunks(L) * own(L)) * SIZE;
#pragma unroll 1
    for (int d = 0; d < deep(L); d++) {
      const int i = units_before(L) + d, slot = i % SLOTS;
      if (i >= SLOTS) s.empty[slot].wait(i / SLOTS - 1);
      const int bytes = least(DOWN, chunks(L) - d * DOWN) * own(L) * static_cast<int>(sizeof(Weights));
      s.full[slot].expect(bytes);
      copy(s.weights[slot], from + d * DOWN * own(L) * SIZE, bytes, s.full[slot]);
    }
    stream<L + 1>(s, weights, block);
  }
}

// ---- the steps of a layer ----

template <int L>
using Sums = float4[each(L)][HEIGHT][2];

// Of this block's columns in layer L, what a warp has of their depth.
template <int L>
INLINE void multiply(Shared& s, Sums<L>& sums) {
#pragma unroll
  for (int first = 0; first < deep(L); first += BATCH) {
    constexpr int BEFORE = units_before(L);
    const int end = least(first + BATCH, deep(L));
    u32 loaded = 0;
#pragma unroll
    for (int d = first; d < end; d++) s.full[(BEFORE + d) % SLOTS].wait((BEFORE + d) / SLOTS);
#pragma unroll
    for (int d = first; d < end; d++) {
      const int chunk = down() + d * DOWN;
      if (chunk >= chunks(L)) break;
#pragma unroll
      for (int n = 0; n < each(L); n++) {
        const int strip = across() + n * ACROSS;
        if (strip >= own(L)) break;
        const Weights& right = s.weights[(BEFORE + d) % SLOTS][down() * own(L) + strip];
        const uint4 low = right[0][lane()], high = right[1][lane()];
        loaded ^= low.x ^ high.x;
#pragma unroll
        for (int m = 0; m < HEIGHT; m++) {
          const uint4 a = read_by<L>(s)[chunk * 2][m][lane()], b = read_by<L>(s)[chunk * 2 + 1][m][lane()];
          product(sums[n][m][0], a.x, a.y, a.z, a.w, low.x, low.y);
          product(sums[n][m][1], a.x, a.y, a.z, a.w, high.x, high.y);
          product(sums[n][m][0], b.x, b.y, b.z, b.w, low.z, low.w);
          product(sums[n][m][1], b.x, b.y, b.z, b.w, high.z, high.w);
        }
      }
    }
    if (BEFORE + first + SLOTS >= UNITS) continue;  // nothing comes after it
    meet_warp();
#pragma unroll
    for (int d = first; d < end; d++)
      if (lane() == d - first) s.empty[(BEFORE + d) % SLOTS].arrive_after(loaded);
  }
}

// What a warp finishes in a turn: 16 rows of a strip, which is one of all blocks'.
template <int L>
struct Final {
  int in_block, strip, m;
  bool there;

  INLINE Final(int turn, int block) {
    in_block = warp() + turn * WARPS, strip = block * own(L) + in_block / HEIGHT, m = in_block % HEIGHT;
    there = in_block < finals(L) && strip < strips(L);
  }

  INLINE int column() const { return strip * WIDE + 2 * quad(); }
};

INLINE float2 pair(u32 both) { return make_float2(wide(static_cast<u16>(both)), wide(static_cast<u16>(both >> 16))); }
INLINE float2 pair_at(const float* at) { return *reinterpret_cast<const float2*>(at); }

// Two numbers of a row with all that follows the product.
template <int L>
INLINE float2 finished(float a, float b, const float2& slope, u32 factor, u32 term, int column) {
  float2 v;
  if constexpr (LAYERS[L].activation == PRELU)
    v = make_float2(a < 0.f ? a * slope.x : a, b < 0.f ? b * slope.y : b);
  else
    v = make_float2(activated<LAYERS[L].activation>(a), activated<LAYERS[L].activation>(b));
  if constexpr (LAYERS[L].cross) {
    const float2 by = pair(factor), plus = pair(term);
    v = make_float2(v.x * by.x + plus.x, v.y * by.y + plus.y);
  }
  return make_float2(column < LAYERS[L].columns ? v.x : 0.f, column + 1 < LAYERS[L].columns ? v.y : 0.f);
}

INLINE void store(const TowerParameters& p, long long row, int column, const float2& v) {
  constexpr int WIDTH = LAYERS[COUNT - 1].columns;
  const float both[2] = {v.x, v.y};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (column + i >= WIDTH) continue;
    const float more = p.add == nullptr ? 0.f : wide(p.add[row * p.add_row + column + i]);
    p.y[row * WIDTH + column + i] = rounded(activated<GRC_FINAL>(both[i] + more));
  }
}

// The sums of all depth, finished, to where the next layer reads them, or to y: of `there` rows.
template <int L>
INLINE void settle(Shared& s, const TowerParameters& p, const Sums<L>& sums, long long first_row, int there, int block) {
  auto& parts = s.parts[L % BUFFERS];
  if (L >= BUFFERS && BUFFERS == 1) meet<THREADS>();
#pragma unroll
  for (int n = 0; n < each(L); n++) {
    const int strip = across() + n * ACROSS;
    if (strip >= own(L)) break;
#pragma unroll
    for (int m = 0; m < HEIGHT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) parts[down()][strip * HEIGHT + m][h][lane()] = sums[n][m][h];
  }
  meet<THREADS>();
#pragma unroll
  for (int t = 0; t < turns(L); t++) {
    const Final<L> final(t, block);
    if (!final.there) continue;
    const float* vectors = s.vectors + vectors_at(L) + final.column() - block * vectors_of(L);
    uint4 x0 = {}, x = {};
    if constexpr (LAYERS[L].cross) x0 = s.first[final.strip][final.m][lane()], x = read_by<L>(s)[final.strip][final.m][lane()];
    const u32 by[4] = {x0.x, x0.y, x0.z, x0.w}, plus[4] = {x.x, x.y, x.z, x.w};
    float2 made[4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 bias = pair_at(vectors + h * COLUMNS);
      float4 sum = {bias.x, bias.y, bias.x, bias.y};
#pragma unroll
      for (int d = 0; d < DOWN; d++) {
        const float4 part = parts[d][final.in_block][h][lane()];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      float2 slope = {};
      if constexpr (LAYERS[L].activation == PRELU) slope = pair_at(vectors + vectors_of(L) + h * COLUMNS);
      const int column = final.column() + h * COLUMNS;
      made[h * 2] = finished<L>(sum.x, sum.y, slope, by[h * 2], plus[h * 2], column);
      made[h * 2 + 1] = finished<L>(sum.z, sum.w, slope, by[h * 2 + 1], plus[h * 2 + 1], column);
    }
    const int row = final.m * HIGH + lane_row();
    if constexpr (L + 1 == COUNT) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (row + i % 2 * 8 < there) store(p, first_row + row + i % 2 * 8, final.column() + i / 2 * COLUMNS, made[i]);
    } else if (row < there) {
      const uint4 all = make_uint4(packed(made[0].x, made[0].y), packed(made[1].x, made[1].y), packed(made[2].x, made[2].y),
                                   packed(made[3].x, made[3].y));
      uint4* to = &read_by<L + 1>(s)[final.strip][final.m][lane()];
#pragma unroll
      for (int peer = 0; peer < CLUSTER; peer++) send(at_peer(to, peer), at_peer(&s.mail[L + 1], peer), all);
    }
  }
}

// Layer L, and all after it.
template <int L>
INLINE void climb(Shared& s, const TowerParameters& p, long long first_row, int there, int block) {
  if constexpr (L < COUNT) {
    Sums<L> sums = {};
    if constexpr (L > 0) s.mail[L].wait(0);
    multiply<L>(s, sums);
    settle<L>(s, p, sums, first_row, there, block);
    climb<L + 1>(s, p, first_row, there, block);
  }
}

// ---- the kernel ----

// Bytes of a layer's rows, of which a thread sends two at once: the second is the last one's, or nobody's.
INLINE int sent(int there, int width) {
  int lanes = 0;
  for (int m = 0; m < HEIGHT; m++) lanes += most(0, least(there - m * HIGH, 8)) * 4;
  return lanes * width / WIDE * static_cast<int>(sizeof(uint4));
}

// Two numbers of x, and zeros after the last row and the last column.
INLINE u32 read(const TowerParameters& p, long long row, int column, bool whole) {
  constexpr int WIDTH = LAYERS[0].depth;
  const u16* from = p.x + row * p.x_row + column;
  if (row >= p.rows || column >= WIDTH) return 0;
  if (whole && column + 1 < WIDTH) return *reinterpret_cast<const u32*>(from);
  return from[0] | (column + 1 < WIDTH ? static_cast<u32>(from[1]) << 16 : 0);
}

INLINE void begin(Shared& s, const TowerParameters& p, long long first_row) {
  constexpr int PIECES = depth(0) / WIDE * HEIGHT * 32, EACH = ceil_div(PIECES, THREADS);
  const bool whole = p.x_row % 2 == 0 && reinterpret_cast<unsigned long long>(p.x) % 4 == 0;
  uint4 pieces[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = threadIdx.x + e * THREADS, strip = i / (32 * HEIGHT), m = i / 32 % HEIGHT;
    const int column = strip * WIDE + 2 * quad();
    const long long row = first_row + m * HIGH + lane_row();
    pieces[e] = make_uint4(read(p, row, column, whole), read(p, row + 8, column, whole), read(p, row, column + COLUMNS, whole),
                           read(p, row + 8, column + COLUMNS, whole));
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = threadIdx.x + e * THREADS;
    if (i < PIECES) s.first[i / (32 * HEIGHT)][i / 32 % HEIGHT][lane()] = pieces[e];
  }
}

KERNEL(grc::TOWER_THREADS, CLUSTER) grc_tower(PARAMETERS TowerParameters p) {
  Shared& s = *reinterpret_cast<Shared*>(block_memory());
  const int block = rank();
  const long long first_row = static_cast<long long>(blockIdx.x / CLUSTER) * ROWS;
  const int there = least(ROWS, p.rows - static_cast<int>(first_row));
  if (threadIdx.x == THREADS) {
    for (int i = 0; i < SLOTS; i++) s.full[i].open(1), s.empty[i].open(WARPS);
    s.vectors_full.open(1);
    for (int l = 1; l < COUNT; l++) {
      s.mail[l].open(1);
      s.mail[l].expect(sent(there, depth(l)));
    }
    barriers_opened();
  }
  meet_cluster();
  if (warp() == WARPS) {
    if (threadIdx.x == THREADS) {
      s.vectors_full.expect(sizeof(s.vectors));
      copy(s.vectors, p.vectors + block * vectors_at(COUNT), sizeof(s.vectors), s.vectors_full);
      stream<0>(s, reinterpret_cast<const uint4*>(p.weights), block);
    }
    return;
  }
  ready();
  begin(s, p, first_row);
  s.vectors_full.wait(0);
  meet<THREADS>();
  climb<0>(s, p, first_row, there, block);
}
