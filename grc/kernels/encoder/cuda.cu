// Transformer layers over users of up to 16 steps: all layers in one launch, each user on a cluster of blocks.
//
// Few rows leave a GPU nothing but waits: for launches, for memory, for other blocks. Here the blocks of a cluster write into
// each other's shared memory, and wait for what they need of each other and for nothing else; what a block needs of the
// weights is one stream, in the order in which its threads read it, and a warp of its own keeps it ahead of them.
//
// A block has, of every layer, some columns of queries, keys and values; the same columns of their projection, whose residual
// it keeps in float32; and some columns of the hidden layer. What it makes of the hidden layer's second weight is a part of
// all columns, which their owners add up. All sums have one order: the same request has the same answer, bit by bit.
//
// Layer norm is (x - mean) / deviation * scale + shift. Scale and shift are in the weights and biases, so a product is of x
// itself, and (product - mean * sum of the weights) / deviation is that of its norm: nothing waits for the mean but the end.
// Layers are pre-norm, or post-norm (GRC_POST), whose residual is the norm too: what is kept is the sum that it is of, as the
// last layer's, which is the answer. What the first layer begins with is no such sum.
//
// Built for one model: see the GRC_ macros.
#include <layers.h>

#include "parameters.h"

using grc::EncoderParameters;

constexpr int WIDTH = GRC_WIDTH, HEAD = GRC_HEAD, HIDDEN = GRC_HIDDEN, STEPS = GRC_STEPS;
constexpr int CLUSTER = GRC_CLUSTER;  // blocks
constexpr int WARPS = 16, THREADS = 32 * WARPS;
static_assert(THREADS + 32 == grc::ENCODER_THREADS, "one warp more for the stream");
constexpr int ROWS = 16;  // of a product of the tensor cores
constexpr int SLICE = WIDTH / CLUSTER, PART = HIDDEN / CLUSTER;  // columns of a block
constexpr int PACKED = 32, SUBS = SLICE / PACKED;                // columns of a packed slice, of which a block has some
constexpr int GROUP = HEAD > SLICE ? HEAD : SLICE;               // columns of all heads that a block has a part in
constexpr int PEERS = GROUP / SLICE;                             // blocks that have a part in them

// Warps share the columns of a product in four, and its depth too; of the last product each has a few columns of all depth.
constexpr int ACROSS = 4, DOWN = 4, QUARTER = WIDTH / DOWN;
constexpr int TILES = SLICE / COLUMNS / ACROSS, HIDDEN_TILES = PART / COLUMNS / ACROSS, LAST_TILES = WIDTH / COLUMNS / WARPS;
constexpr int EACH = HIDDEN_TILES / SUBS;  // of a packed slice
constexpr int WIDE = QUARTER / CHUNK, DEEP = PART / CHUNK;  // chunks
static_assert(PACKED == COLUMNS * ACROSS && SLICE % PACKED == 0 && TILES == SUBS, "a packed slice is a tile for every warp");
static_assert(PART % (PACKED * SUBS) == 0 && QUARTER % CHUNK == 0, "whole tiles and chunks");
static_assert(LAST_TILES % 2 == 0 && SLICE % (LAST_TILES * 2) == 0, "whole pairs of tiles");
static_assert(HEAD % CHUNK == 0 && GROUP % HEAD == 0 && GROUP % SLICE == 0 && WIDTH % GROUP == 0, "whole heads");
static_assert(0 < STEPS && STEPS <= ROWS && ROWS == WARPS && CLUSTER <= 16 && SLICE <= 64, "");

// What a thread reads of a layer's weights, 16 bytes each; so many of them at once.
constexpr int HEADS = WIDE * 3 * TILES, OUT = WIDE * TILES, UP = WIDE * HIDDEN_TILES, LAST = DEEP * LAST_TILES;
constexpr int ALL = HEADS + OUT + UP + LAST;

CONSTANT int largest_divisor(int of, int most) {
  while (of % most) most--;
  return most;
}
constexpr int AT_ONCE = largest_divisor(HEADS, largest_divisor(OUT, largest_divisor(UP, largest_divisor(LAST, 2))));
constexpr int UNITS = ALL / AT_ONCE, MOST_SLOTS = 16;
constexpr int SENT = STEPS * SLICE;  // numbers that a block sends to another, of any kind

// ---- threads, blocks and their memory ----

INLINE int across() { return warp() % ACROSS; }
INLINE int down() { return warp() / ACROSS; }

// Numbers from one row to the next, such that eight threads that read 16 bytes of two rows meet in no bank.
CONSTANT int apart(int columns) { return columns % 64 == 0 ? columns + 32 : columns; }

struct Rows {
  uint4 low, high;  // of rows lane_row() and lane_row() + 8, eight columns
};

// sum += rows @ columns over a chunk of the depth: in which order its numbers come does not matter, if both sides have the same.
INLINE void products(float4& sum, const Rows& left, const uint4& right) {
  product(sum, left.low.x, left.high.x, left.low.y, left.high.y, right.x, right.y);
  product(sum, left.low.z, left.high.z, left.low.w, left.high.w, right.z, right.w);
}

// Where a block waits for bytes from others: for BYTES in every layer.
template <int BYTES>
struct Mail : Barrier {
  INLINE void open() {
    Barrier::open(1);
    expect(BYTES);
  }

  INLINE void wait(int layer) {
    Barrier::wait(layer);
    if (threadIdx.x == 0) expect(BYTES);
  }
};

INLINE void send(u32 to, u32 mail, float a, float b, float c, float d) {
  send(to, mail, make_uint4(bits(a), bits(b), bits(c), bits(d)));
}

// All threads but the stream's have come here.
INLINE void meet_all() { meet<THREADS>(); }

// What is added to the columns of a slice in one layer. Those of norms come with the sums of the weights of each column.
struct alignas(16) Vectors {
  float heads_sum[3][PACKED], heads[3][PACKED], out[PACKED], down[PACKED], up_sum[PART / SUBS], up[PART / SUBS];
#if GRC_POST
  float norm_scale[2][PACKED], norm_shift[2][PACKED];  // of what attention begins with, and the hidden layer
#endif
};

template <int COLUMNS_OF_ROW>
using Matrix = u16[ROWS][COLUMNS_OF_ROW];

struct State {
  Matrix<apart(WIDTH)> rows;  // of all blocks: the residual
  union {
    Matrix<apart(WIDTH)> mixed;            // of all blocks: what attention made
    float received[CLUSTER][ROWS][SLICE];  // from all blocks: their parts of the last product
  };
  Matrix<apart(GROUP)> queries, keys;  // of all peers
  u16 values[SLICE][ROWS];             // step by step within a column
  Matrix<apart(PART)> hidden;
  float kept[ROWS][SLICE];        // the residual
  float2 moments[CLUSTER][ROWS];  // of all blocks: the mean of a row's slice, and the sum of squares around it
  float2 normal[ROWS];            // the mean of a row, and one over its deviation
  union {  // of a product, by the depth that they are of
    float4 parts[DOWN][ACROSS * most(HIDDEN_TILES, 3 * TILES)][32];
    float out_parts[DOWN][ROWS][SLICE];
  };
  Vectors vectors[2][SUBS];
  Barrier full[MOST_SLOTS], empty[MOST_SLOTS], vectors_full[2];
  Mail<2 * PEERS * SENT * 2> heads_mail;
  Mail<CLUSTER * SENT * 2> mixed_mail;
  Mail<CLUSTER * (SENT * 2 + STEPS * 8)> rows_mail, next_mail;
  Mail<CLUSTER * SENT * 4> received_mail;
};

// What is left of the memory is for the stream.
using Unit = uint4[AT_ONCE][THREADS];
constexpr int LEFT = (grc::ENCODER_MEMORY - static_cast<int>(sizeof(State))) / static_cast<int>(sizeof(Unit));
constexpr int SLOTS = least(LEFT, least(MOST_SLOTS, UNITS));  // a layer at most, for the sake of its vectors
static_assert(2 <= SLOTS, "room for the stream");

struct Shared : State {
  Unit weights[SLOTS];
};
static_assert(sizeof(Shared) <= grc::ENCODER_MEMORY, "");

// The parts of a pair of columns, added up in their order, and biases.
template <int PARTS>
INLINE float2 added(const float (&parts)[PARTS][ROWS][SLICE], int row, int column, const float* biases) {
  float2 sum = make_float2(biases[0], biases[1]);
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const float2 part = *reinterpret_cast<const float2*>(&parts[i][row][column]);
    sum.x += part.x, sum.y += part.y;
  }
  return sum;
}

template <int COLUMNS_OF_ROW>
INLINE Rows rows_at(const Matrix<COLUMNS_OF_ROW>& matrix, int column) {
  return {*reinterpret_cast<const uint4*>(&matrix[lane_row()][column]),
          *reinterpret_cast<const uint4*>(&matrix[lane_row() + 8][column])};
}

// ---- the stream ----

// Where piece i of a layer, in the order in which a block reads them, lies in the packed slices: number `at` of slice `sub`.
struct Place {
  int sub, at;

  INLINE explicit Place(int i) {
    int before = 0, each = 1, many = TILES;  // pieces before those of this product, of a slice at once, of all at once
    if (i >= HEADS + OUT + UP)
      before = HEADS + OUT + UP, each = LAST / SUBS, many = LAST;
    else if (i >= HEADS + OUT)
      before = HEADS + OUT, each = EACH, many = HIDDEN_TILES;
    const int within = i - before;
    sub = within % many / each;
    at = before / SUBS + within / many * each + within % each;
  }
};

// One thread keeps it going: a slot that all warps have read is filled with what comes next.
INLINE void stream(Shared& s, const EncoderParameters& p, int block) {
  constexpr int PIECE = sizeof(s.weights[0][0]);
  const char* weights = reinterpret_cast<const char*>(p.weights);
  const Vectors* vectors = reinterpret_cast<const Vectors*>(p.vectors);
#pragma unroll 1
  for (int i = 0; i < p.layers * UNITS; i++) {
    const int slot = i % SLOTS, layer = i / UNITS;
    if (i >= SLOTS) s.empty[slot].wait(i / SLOTS - 1);
    if (i % UNITS == 0) {  // the layer two before this one has ended
      s.vectors_full[layer % 2].expect(sizeof(Vectors) * SUBS);
      for (int sub = 0; sub < SUBS; sub++) {
        const Vectors* from = vectors + (block * SUBS + sub) * p.layers + layer;
        copy(&s.vectors[layer % 2][sub], from, sizeof(Vectors), s.vectors_full[layer % 2]);
      }
    }
    s.full[slot].expect(AT_ONCE * PIECE);
    for (int k = 0; k < AT_ONCE; k++) {
      const Place from(i % UNITS * AT_ONCE + k);
      const long long slice = (block * SUBS + from.sub) * p.layers + layer;
      copy(s.weights[slot][k], weights + (slice * (ALL / SUBS) + from.at) * PIECE, PIECE, s.full[slot]);
    }
  }
}

// ---- the steps of a layer ----

template <int MANY>
using Sums = float4[MANY];

// sums += rows[:, column:] @ weights.T of the next COUNT of the stream, of which `unit` counts what was read
template <int COUNT, int MANY, int COLUMNS_OF_ROW>
INLINE void multiply(Shared& s, Sums<MANY>& sums, const Matrix<COLUMNS_OF_ROW>& rows, int column, int& unit) {
  uint4 right[AT_ONCE];
  Rows left;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int slot = unit % SLOTS, k = i % AT_ONCE;
    if (k == 0) {
      s.full[slot].wait(unit / SLOTS);
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) right[j] = s.weights[slot][j][threadIdx.x];
    }
    if (i % MANY == 0) left = rows_at(rows, column + i / MANY * CHUNK + quad() * 8);
    products(sums[i % MANY], left, right[k]);
    if (k == AT_ONCE - 1) {
      meet_warp();
      if (threadIdx.x % 32 == 0) s.empty[slot].arrive_after(right[0].x ^ right[k].x);
      unit++;
    }
  }
}

// The sums of all depth: each warp adds up those of some tiles, and does `what(tile, sum)` with them.
template <int MANY, class What>
INLINE void join(Shared& s, const Sums<MANY>& sums, What what) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < MANY; n++) s.parts[down()][across() * MANY + n][lane] = sums[n];
  meet_all();
#pragma unroll 1
  for (int tile = warp(); tile < ACROSS * MANY; tile += WARPS) {
    float4 sum = s.parts[0][tile][lane];
#pragma unroll
    for (int d = 1; d < DOWN; d++) {
      const float4 part = s.parts[d][tile][lane];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    what(tile, sum);
  }
}

// What the four threads of a row have, side by side.
INLINE uint4 of_quad(u32 v) {
  const int first = threadIdx.x % 32 / 4 * 4;
  const u32 a = of_lane(v, first), b = of_lane(v, first + 1), c = of_lane(v, first + 2), d = of_lane(v, first + 3);
  return make_uint4(a, b, c, d);
}

template <int LANES>
INLINE float of_lanes(float v) {
#pragma unroll
  for (int m = 1; m < LANES; m *= 2) v += of_other(v, m);
  return v;
}

// The mean and deviation of every row, of its slices' moments (Chan et al. 1979), each by a warp; or such that a norm by
// them is no norm.
INLINE void normalise(Shared& s, bool plain = false) {
  const int lane = threadIdx.x % 32, row = warp();
  if (row >= STEPS) return;
  const float2 part = lane < CLUSTER ? s.moments[lane][row] : make_float2(0.f, 0.f);
  const float mean = of_lanes<16>(part.x) * (1.f / CLUSTER);
  const float off = lane < CLUSTER ? part.x - mean : 0.f;
  const float squares = of_lanes<16>(part.y + SLICE * off * off);
  const float2 found = make_float2(mean, one_over_root(squares * (1.f / WIDTH) + GRC_EPS));
  if (lane == 0) s.normal[row] = plain ? make_float2(0.f, 1.f) : found;
}

INLINE float2 normed(const float2& normal, float a, float b, const float* sums, const float* biases) {
  return make_float2((a - normal.x * sums[0]) * normal.y + biases[0], (b - normal.x * sums[1]) * normal.y + biases[1]);
}

// The residual of a pair of columns, of what is kept, before one of the halves of a layer.
INLINE float2 residual(const State& s, const Vectors (&v)[SUBS], int half, int row, int column) {
  const float2 kept = *reinterpret_cast<const float2*>(&s.kept[row][column]);
#if GRC_POST
  const float* scale = v[column / PACKED].norm_scale[half] + column % PACKED;
  const float* shift = v[column / PACKED].norm_shift[half] + column % PACKED;
  const float2 by = s.normal[row];
  return make_float2((kept.x - by.x) * by.y * scale[0] + shift[0], (kept.y - by.x) * by.y * scale[1] + shift[1]);
#else
  return kept;
#endif
}

// Add to the residual before a half of a layer: `more(row, column)` gives what to add to a pair. Then it goes to all blocks with
// its moments, or to y.
template <class To, class More>
INLINE void settle(Shared& s, const Vectors (&v)[SUBS], int half, To& mail, int block, u32* y, More more) {
  constexpr int LANES = SLICE / 2;  // of a row
#pragma unroll 1
  for (int i = threadIdx.x; i < (STEPS * LANES + 31) / 32 * 32; i += THREADS) {
    const bool there = i < STEPS * LANES;
    const int row = there ? i / LANES : 0, at = i % LANES, column = at * 2;
    const float2 before = residual(s, v, half, row, column), plus = more(row, column);
    const float2 sum = make_float2(before.x + plus.x, before.y + plus.y);
    const u32 both = packed(sum.x, sum.y);
    if (y != nullptr) {
      if (there) y[(row * WIDTH + block * SLICE + column) / 2] = both;
      continue;
    }
    if (there) *reinterpret_cast<float2*>(&s.kept[row][column]) = sum;
    const float a = wide(static_cast<u16>(both)), b = wide(static_cast<u16>(both >> 16));
    const float mean = of_lanes<LANES>(a + b) * (1.f / SLICE);
    const float squares = of_lanes<LANES>((a - mean) * (a - mean) + (b - mean) * (b - mean));
    const uint4 piece = of_quad(both);
    if (!there) continue;
    for (int peer = at % 4; peer < CLUSTER; peer += 4)
      send(at_peer(&s.rows[row][block * SLICE + at / 4 * 8], peer), at_peer(&mail, peer), piece);
    for (int peer = at; peer < CLUSTER; peer += LANES)
      send(at_peer(&s.moments[block][row], peer), at_peer(&mail, peer), mean, squares);
  }
}

// Attention of a head for eight columns of its values, by each of the first warps.
INLINE void attend(Shared& s, int block) {
  const int column = warp() * COLUMNS, first = SLICE < HEAD ? 0 : column / HEAD * HEAD, row = lane_row(), step = quad() * 4;
  if (column >= SLICE) return;
  float4 score[2] = {};  // of keys step, step + 1 and step + 2, step + 3: two of row, two of row + 8
#pragma unroll
  for (int c = 0; c < HEAD; c += CHUNK) {
    const int at = first + c + quad() * 8;
    const Rows queries = rows_at(s.queries, at);
#pragma unroll
    for (int n = 0; n < 2; n++)
      products(score[n], queries, *reinterpret_cast<const uint4*>(&s.keys[row / 2 * 4 + n * 2 + row % 2][at]));
  }
  u32 left[4];
  float gain[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float v[4] = {r ? score[0].z : score[0].x, r ? score[0].w : score[0].y,  //
                  r ? score[1].z : score[1].x, r ? score[1].w : score[1].y};
    float peak = -infinity();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool seen = step + i < STEPS && (!GRC_CAUSAL || step + i <= row + r * 8);
      v[i] = seen ? v[i] * GRC_SCALE : -infinity();
      peak = fmaxf(peak, v[i]);
    }
#if GRC_SOFTMAX
    peak = fmaxf(peak, of_other(peak, 1));
    peak = fmaxf(peak, of_other(peak, 2));
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) total += v[i] = exponential(v[i] - peak);
    gain[r] = GRC_GAIN / of_lanes<4>(total);
#else
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = v[i] == -infinity() ? 0.f : v[i] / (1.f + exponential(-v[i]));
    gain[r] = GRC_GAIN;
#endif
    left[r] = packed(v[0], v[1]);
    left[r + 2] = packed(v[2], v[3]);
  }
  const uint2 values = *reinterpret_cast<const uint2*>(&s.values[column + row][step]);
  float4 out = {};
  product(out, left[0], left[1], left[2], left[3], values.x, values.y);
  const uint4 low = of_quad(packed(out.x * gain[0], out.y * gain[0])), high = of_quad(packed(out.z * gain[1], out.w * gain[1]));
  for (int peer = quad(); peer < CLUSTER; peer += 4) {
    const u32 to = at_peer(&s.mixed[row][block * SLICE + column], peer), mail = at_peer(&s.mixed_mail, peer);
    if (row < STEPS) send(to, mail, low);
    if (row + 8 < STEPS) send(to + 8 * sizeof(s.mixed[0]), mail, high);
  }
}

// ---- the kernel ----

// This block's own row of x for every warp.
INLINE void begin(Shared& s, const u16* x, int block) {
  const int lane = threadIdx.x % 32, row = warp();
  float sum = 0.f, squares = 0.f;
  for (int i = lane; i < WIDTH; i += 32) {
    const u16 v = row < STEPS ? x[row * WIDTH + i] : static_cast<u16>(0);
    s.rows[row][i] = v;
    sum += wide(v);
    if (i / SLICE == block) s.kept[row][i % SLICE] = wide(v);
  }
  const float mean = of_lanes<32>(sum) * (1.f / WIDTH);
  for (int i = lane; i < WIDTH; i += 32) squares += (wide(s.rows[row][i]) - mean) * (wide(s.rows[row][i]) - mean);
  squares = of_lanes<32>(squares);
  if (lane < CLUSTER) s.moments[lane][row] = make_float2(mean, squares * (1.f / CLUSTER));
}

KERNEL(grc::ENCODER_THREADS, CLUSTER) grc_encoder(PARAMETERS EncoderParameters p) {
  Shared& s = *reinterpret_cast<Shared*>(block_memory());
  const int block = rank(), quarter = down() * QUARTER;
  const long long user = blockIdx.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) s.full[i].open(1), s.empty[i].open(WARPS);
    s.vectors_full[0].open(1), s.vectors_full[1].open(1);
    s.heads_mail.open(), s.mixed_mail.open(), s.rows_mail.open(), s.next_mail.open(), s.received_mail.open();
    barriers_opened();
  }
  meet_cluster();
  if (warp() == WARPS) {
    if (threadIdx.x % 32 == 0) stream(s, p, block);
    return;
  }
  ready();
  begin(s, p.x + user * STEPS * WIDTH, block);
  meet_all();
  int unit = 0;
#pragma unroll 1
  for (int l = 0; l < p.layers; l++) {
    const Vectors(&v)[SUBS] = s.vectors[l % 2];
    s.vectors_full[l % 2].wait(l / 2);
    {
      Sums<3 * TILES> sums = {};
      normalise(s, GRC_POST && l == 0);
      multiply<HEADS>(s, sums, s.rows, quarter, unit);
      join<3 * TILES>(s, sums, [&](int tile, const float4& sum) {
        const int which = tile / TILES % 3, sub = tile % TILES, at = tile / (3 * TILES) * COLUMNS + 2 * quad();
        const int row = lane_row(), column = sub * PACKED + at;
        const float2 low = normed(s.normal[row], sum.x, sum.y, v[sub].heads_sum[which] + at, v[sub].heads[which] + at);
        const float2 high = normed(s.normal[row + 8], sum.z, sum.w, v[sub].heads_sum[which] + at, v[sub].heads[which] + at);
        if (which == 2) {
          s.values[column][row] = rounded(row < STEPS ? low.x : 0.f);
          s.values[column + 1][row] = rounded(row < STEPS ? low.y : 0.f);
          s.values[column][row + 8] = rounded(row + 8 < STEPS ? high.x : 0.f);
          s.values[column + 1][row + 8] = rounded(row + 8 < STEPS ? high.y : 0.f);
          return;
        }
        auto& to = which == 0 ? s.queries : s.keys;
        const uint4 a = of_quad(packed(low.x, low.y)), b = of_quad(packed(high.x, high.y));
        for (int i = quad(); i < PEERS; i += 4) {
          const int peer = block - block % PEERS + i, first = block % PEERS * SLICE + column - 2 * quad();
          if (row < STEPS) send(at_peer(&to[row][first], peer), at_peer(&s.heads_mail, peer), a);
          if (row + 8 < STEPS) send(at_peer(&to[row + 8][first], peer), at_peer(&s.heads_mail, peer), b);
        }
      });
    }
    meet_all();
    s.heads_mail.wait(l);
    attend(s, block);

    s.mixed_mail.wait(l);
    {
      Sums<TILES> sums = {};
      multiply<OUT>(s, sums, s.mixed, quarter, unit);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const int row = lane_row(), column = n * PACKED + across() * COLUMNS + 2 * quad();
        *reinterpret_cast<float2*>(&s.out_parts[down()][row][column]) = make_float2(sums[n].x, sums[n].y);
        *reinterpret_cast<float2*>(&s.out_parts[down()][row + 8][column]) = make_float2(sums[n].z, sums[n].w);
      }
    }
    meet_all();
    settle(s, v, 0, s.rows_mail, block, nullptr,
           [&](int row, int column) { return added(s.out_parts, row, column, v[column / PACKED].out + column % PACKED); });

    s.rows_mail.wait(l);
    {
      Sums<HIDDEN_TILES> sums = {};
      normalise(s);
      multiply<UP>(s, sums, s.rows, quarter, unit);
      join<HIDDEN_TILES>(s, sums, [&](int tile, const float4& sum) {
        const int sub = tile % HIDDEN_TILES / EACH, of_sub = tile / HIDDEN_TILES * EACH + tile % EACH;
        const int row = lane_row(), at = of_sub * COLUMNS + 2 * quad(), column = sub * (PART / SUBS) + at;
        const float2 low = normed(s.normal[row], sum.x, sum.y, v[sub].up_sum + at, v[sub].up + at);
        const float2 high = normed(s.normal[row + 8], sum.z, sum.w, v[sub].up_sum + at, v[sub].up + at);
        *reinterpret_cast<u32*>(&s.hidden[row][column]) = packed(activated<GRC_ACTIVATION>(low.x), activated<GRC_ACTIVATION>(low.y));
        *reinterpret_cast<u32*>(&s.hidden[row + 8][column]) = packed(activated<GRC_ACTIVATION>(high.x), activated<GRC_ACTIVATION>(high.y));
      });
    }
    meet_all();
    {
      Sums<LAST_TILES> sums = {};
      multiply<LAST>(s, sums, s.hidden, 0, unit);
      const int first = (warp() * COLUMNS + quad() * 2) * LAST_TILES, peer = first / SLICE, row = lane_row();
      const u32 to = at_peer(&s.received[block][row][first % SLICE], peer), mail = at_peer(&s.received_mail, peer);
#pragma unroll
      for (int n = 0; n < LAST_TILES; n += 2) {
        const float4 a = sums[n], b = sums[n + 1];
        if (row < STEPS) send(to + n * 8, mail, a.x, a.y, b.x, b.y);
        if (row + 8 < STEPS) send(to + n * 8 + 8 * sizeof(s.received[0][0]), mail, a.z, a.w, b.z, b.w);
      }
    }

    const bool ends = l + 1 == p.layers;
    s.received_mail.wait(l);
    settle(s, v, 1, s.next_mail, block, ends ? reinterpret_cast<u32*>(p.y + user * STEPS * WIDTH) : nullptr,
           [&](int row, int column) { return added(s.received, row, column, v[column / PACKED].down + column % PACKED); });
    if (!ends) s.next_mail.wait(l);
  }
}
