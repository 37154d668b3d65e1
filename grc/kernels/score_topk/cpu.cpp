// The best k items of each row: scores of some rows and items at a time in a cache-sized block, and of those only what
// beats the row's k-th best so far is kept.

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "grc/gemm.h"
#include "grc/linear.h"
#include "grc/low_gemm.h"

namespace grc {
namespace {

// Scores held at once: they stay in L2. Half and twice as many of either are within 5%.
constexpr int64_t kBlockRows = 16 * gemm::kRows;
constexpr int64_t kBlockItems = 256;

// Bytes of candidates that the rows of a block may hold together, so that they stay in L2.
constexpr int64_t kCandidateBytes = 512 * 1024;

// Candidates beside 2k, so that a small k does not cut its few after every vector.
constexpr int64_t kSpareCandidates = 64;

// Rows for which a thread of its own pays more than a share of the items does: below, the table is read too often.
constexpr int64_t kShareRows = 4 * gemm::kRows;

// A score as an integer of the same order, NaN above all: the answer's order. Zeros of both signs are equal.
int32_t order_of(float score) {
  const int32_t bits = std::bit_cast<int32_t>(score + 0.f);
  return score != score ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}

float score_of(int32_t order) {
  return std::bit_cast<float>(order ^ (order >> 31 & INT32_MAX));
}

// The candidates of one row, items rising. What is not <= threshold enters: with NaN everything does, with infinity
// only NaN.
struct Candidates {
  int32_t* orders;
  int32_t* items;
  int64_t count = 0;
  int32_t floor = order_of(-std::numeric_limits<float>::infinity());
  float threshold = std::numeric_limits<float>::quiet_NaN();

  void add(float score, int64_t item) {
    orders[count] = order_of(score);
    items[count++] = static_cast<int32_t>(item);
  }

  int64_t at_least(int32_t bound) const {
    int32_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += orders[i] >= bound;
    return found;
  }

  int32_t highest() const {
    int32_t top = floor;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, orders[i]);
    return top;
  }

  // Drops candidates that are not among the best k, until at most `most` >= k stay. Bisection counts whole vectors,
  // where std::nth_element takes a branch, often mispredicted, for each candidate.
  void keep_best(int64_t k, int64_t most) {
    if (count <= most) return;
    int64_t low = floor, high = highest() + int64_t{1};
    int64_t held = count, above = 0;
    while (held > most && high - low > 1) {
      const int64_t middle = (low + high) >> 1, found = at_least(static_cast<int32_t>(middle));
      if (found >= k) {
        low = middle;
        held = found;
      } else {
        high = middle;
        above = found;
      }
    }
    // Too many are left only if they tie: the first stay.
    int64_t ties = held > most ? k - above : held, kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t order = orders[i];
      orders[kept] = order;
      items[kept] = items[i];
      kept += (order > low) | ((order == low) & (ties > 0));
      ties -= order == low;
    }
    count = kept;
    floor = static_cast<int32_t>(low);
    threshold = score_of(floor);
    if (threshold != threshold) threshold = std::numeric_limits<float>::infinity();
  }
};

// A candidate in one integer: falling keys are falling scores, then rising items. 0 is below every candidate's.
using Key = uint64_t;

Key key_of(int32_t order, int32_t item) {
  return static_cast<Key>(static_cast<uint32_t>(order) ^ 1u << 31) << 32 | ~static_cast<uint32_t>(item);
}

struct Request {
  const View& x;
  const float* bias;
  int64_t rows, items, width, k;

  // Copies rows m0..m1-1 of x, which may have any strides: D floats against N x D products.
  void gather(int64_t m0, int64_t m1, float* out) const {
    const float* data = static_cast<const float*>(x.data);
    const int64_t step = x.strides[x.rank - 1];
    for (int64_t m = m0; m < m1; ++m) {
      const float* source = data;
      for (int64_t d = x.rank - 2, rest = m; d >= 0; rest /= x.sizes[d--]) source += rest % x.sizes[d] * x.strides[d];
      for (int64_t i = 0; i < width; ++i) *out++ = source[i * step];
    }
  }
};

// What the rows of a block keep: at most `room` candidates each, cut to between k and `most` when there are more.
struct Limits {
  int64_t k, most, room;
};

// Items of float32 in panels, or [items, width] when there are at most gemm::kNarrow.
struct FloatItems {
  const float* weight;

  // Some rows of x [rows, width], and their scores of `count` items from `item` on, a whole block after the first.
  struct Block {
    const Request& r;
    const FloatItems& items;
    const float* x;
    int64_t rows;

    void score(int64_t item, int64_t count, float* scores) const {
      gemm::Gemm g{{x, r.width}, items.weight + item * r.width, scores, rows, count, r.width, {}};
      g.epilogue.bias = r.bias == nullptr ? nullptr : r.bias + item;
      if (r.items <= gemm::kNarrow) gemm::narrow(g, 0, rows);
      else gemm::panels(g, 0, rows, 0, at::divup(count, kLanes));
    }
  };
};

// Items of int8 or bfloat16 in panels.
template <class Format>
struct LowItems {
  low::Weight weight;

  struct Block {
    const Request& r;
    const LowItems& items;
    low::Input<Format> x;
    int64_t rows;

    Block(const Request& request, const LowItems& given, const float* rows_of_x, int64_t count)
        : r(request), items(given), x({rows_of_x, request.width}, count, request.width), rows(count) {}

    void score(int64_t item, int64_t count, float* scores) const {
      const low::Weight& w = items.weight;
      low::Gemm g{x.data(), static_cast<const typename Format::Weight*>(w.data) + item * w.depth, nullptr, nullptr,
                  x.row(), scores, rows, count, w.depth, x.stride(), {}};
      if (w.scale != nullptr) g.scale = w.scale + item, g.sums = w.sums + item;
      g.epilogue.bias = r.bias == nullptr ? nullptr : r.bias + item;
      low::panels<Format>(g, 0, rows, 0, at::divup(count, kLanes));
    }
  };
};

// Scores looked at together: their hits fit one integer, whose bits are taken without a branch for each vector.
constexpr int64_t kGroup = 4 * kLanes;

void filter(Candidates& best, const float* scores, int64_t count, int64_t item, const Limits& limits) {
  Lanes threshold(best.threshold);
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t left = std::min(kGroup, count - i);
    if (__builtin_expect(left == kGroup, 1)) {
      const auto below = [&](int64_t j) { return Lanes::loadu(scores + i + j * kLanes) <= threshold; };
      if (((below(0) & below(1)) & (below(2) & below(3))).zero_mask() == 0) continue;
    }
    uint64_t hits = 0;
    for (int64_t j = 0; j < left; j += kLanes) {
      const int64_t valid = std::min(kLanes, left - j);
      const uint64_t above = (Lanes::loadu(scores + i + j, valid) <= threshold).zero_mask();
      hits |= (above & ((1u << valid) - 1)) << j;
    }
    for (; hits; hits &= hits - 1) {
      const int64_t at = i + std::countr_zero(hits);
      best.add(scores[at], item + at);
    }
    if (best.count > limits.room) {
      best.keep_best(limits.k, limits.most);
      threshold = Lanes(best.threshold);
    }
  }
}

// Writes the best k keys of rows m0..m1-1 among items n0..n1-1, in no order, `stride` keys apart; missing ones are 0.
template <class Items>
void rank(const Request& r, const Items& items, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Key* out, int64_t stride) {
  // Twice k: candidates enter for about log2(N / 2k) rounds of k each, and 1.4 times as many as if the threshold were
  // raised with every one.
  const int64_t room = std::min(n1 - n0, 2 * r.k + kSpareCandidates);
  const Limits limits{r.k, r.k + (room - r.k) / 4, room};
  const int64_t capacity = room + kGroup;  // the last group may overshoot
  const int64_t fit = kCandidateBytes / (2 * capacity * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t block = std::min(m1 - m0, std::clamp(fit / gemm::kRows * gemm::kRows, gemm::kRows, kBlockRows));
  const std::unique_ptr<float[]> x(new float[block * r.width]), scores(new float[block * kBlockItems]);
  const std::unique_ptr<int32_t[]> storage(new int32_t[2 * block * capacity]);
  std::vector<Candidates> best(block);
  for (int64_t b0 = m0; b0 < m1; b0 += block) {
    const int64_t rows = std::min(block, m1 - b0);
    r.gather(b0, b0 + rows, x.get());
    for (int64_t i = 0; i < rows; ++i) {
      int32_t* const orders = storage.get() + 2 * i * capacity;
      best[i] = {orders, orders + capacity};
    }
    const typename Items::Block scorer{r, items, x.get(), rows};
    for (int64_t item = n0; item < n1; item += kBlockItems) {
      const int64_t count = std::min(kBlockItems, n1 - item);
      scorer.score(item, count, scores.get());
      for (int64_t i = 0; i < rows; ++i) filter(best[i], scores.get() + i * count, count, item, limits);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Candidates& row = best[i];
      row.keep_best(r.k, r.k);
      Key* const target = out + (b0 - m0 + i) * stride;
      for (int64_t j = 0; j < r.k; ++j) target[j] = j < row.count ? key_of(row.orders[j], row.items[j]) : 0;
    }
  }
}

// How many parts rows and items are dealt in: rows to threads as long as each gets enough of them, then items.
gemm::Split split(const Request& r) {
  const int64_t blocks = at::divup(r.items, kBlockItems);
  const int64_t useful = std::min(r.rows * r.items * r.width / gemm::kStreamGrain, r.rows * blocks);
  const int64_t threads = at::in_parallel_region() ? 1 : std::clamp<int64_t>(useful, 1, at::get_num_threads());
  int64_t rows = std::clamp<int64_t>(r.rows / kShareRows, 1, threads);
  while (threads % rows) --rows;
  return {rows, std::min(threads / rows, blocks)};
}

template <class Items>
void run(const Request& r, const Items& items, float* values, int64_t* indices) {
  const gemm::Split s = split(r);
  const int64_t stride = s.cols * r.k;
  const std::unique_ptr<Key[]> keys(new Key[r.rows * stride]);
  at::parallel_for(0, s.rows * s.cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [m0, m1] = gemm::part(r.rows, s.rows, i / s.cols);
      const auto [b0, b1] = gemm::part(at::divup(r.items, kBlockItems), s.cols, i % s.cols);
      rank(r, items, m0, m1, b0 * kBlockItems, std::min(r.items, b1 * kBlockItems), &keys[m0 * stride + i % s.cols * r.k],
           stride);
    }
  });
  at::parallel_for(0, r.rows, kShareRows, [&](int64_t m0, int64_t m1) {
    for (int64_t m = m0; m < m1; ++m) {
      Key* const first = &keys[m * stride];
      if (s.cols > 1) std::nth_element(first, first + r.k - 1, first + stride, std::greater<>());
      std::sort(first, first + r.k, std::greater<>());
      for (int64_t i = 0; i < r.k; ++i) {
        values[m * r.k + i] = score_of(static_cast<int32_t>(first[i] >> 32 ^ 1u << 31));
        indices[m * r.k + i] = static_cast<uint32_t>(~first[i]);
      }
    }
  });
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_packed_score_topk(AtenTensorHandle x, AtenTensorHandle packed,
                                                           AtenTensorHandle* scale, AtenTensorHandle* bias,
                                                           int64_t out_features, int64_t k, AtenTensorHandle* ret0,
                                                           AtenTensorHandle* ret1) {
  return grc::guard([&] {
    using namespace grc;
    const View input(x);
    require(input.rank > 0 && input.dtype == aoti_torch_dtype_float32(), "x is not float32 of [..., D]");
    require(out_features >= 0 && out_features <= std::numeric_limits<int32_t>::max(), "out_features is out of range");
    require(k >= 0 && k <= out_features, "k is 0 to out_features");
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < input.rank; ++d) rows *= input.sizes[d];
    const int64_t width = input.sizes[input.rank - 1];
    const float* offsets = bias == nullptr ? nullptr : Finish::vector(*bias, "bias", out_features);
    const Request request{input, offsets, rows, out_features, width, k};
    Output values({rows, k}, aoti_torch_dtype_float32()), indices({rows, k}, aoti_torch_dtype_int64());
    const auto best = [&](const auto& items) {
      if (rows > 0 && k > 0) run(request, items, values.data<float>(), indices.data<int64_t>());
    };
    if (scale == nullptr && View(packed).dtype == aoti_torch_dtype_float32()) {
      best(FloatItems{float_weight(packed, out_features, width)});
    } else {
      const low::Weight weight(packed, scale, out_features, width);
      low::with_format(scale != nullptr, rows, [&](auto format) { best(LowItems<decltype(format)>{weight}); });
    }
    *ret0 = shaped_like(input, values, k);
    *ret1 = shaped_like(input, indices, k);
  });
}
