// softmax(q k^T * scale + bias) v, or silu in softmax's place: one head at a time, six queries at a time, so that their
// scores never leave L1. Whole rows of scores fit there at the lengths of user histories, so softmax needs no rescaling
// as in FlashAttention (Dao et al. 2022).

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "grc/tensor.h"
#include "grc/tile.h"

namespace grc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Multiply-adds for which one more thread pays: half of grc/gemm.h's, since exp and the transposition come on top.
constexpr int64_t kGrain = 128 * 1024;

enum class Kind : int64_t { softmax, strict, silu };

// A tensor [batch, length, heads, width] of any strides.
struct Operand {
  const float* data;
  int64_t batch, length, heads, width;
  const int64_t* strides;

  Operand(const View& view, const char* name) {
    if (view.dtype != aoti_torch_dtype_float32()) throw std::invalid_argument(std::string(name) + " is not float32");
    if (view.rank != 4) throw std::invalid_argument(std::string(name) + " is not [batch, length, heads, width]");
    data = static_cast<const float*>(view.data);
    std::tie(batch, length, heads, width) = std::make_tuple(view.sizes[0], view.sizes[1], view.sizes[2], view.sizes[3]);
    strides = view.strides;
  }

  const float* at(int64_t b, int64_t h) const { return data + b * strides[0] + h * strides[2]; }
  int64_t step() const { return strides[1]; }
  bool rows_are_contiguous() const { return width <= 1 || strides[3] == 1; }
};

// A tensor that broadcasts to [batch, heads, queries, keys], read one row of keys at a time. Booleans read as
// `off` and `on`.
class Rows {
 public:
  Rows(AtenTensorHandle* handle, const char* name, std::array<int64_t, 4> wanted, float off, float on)
      : keys_(wanted[3]), off_(off), on_(on) {
    if (handle == nullptr) return;
    const View view(*handle);
    const bool boolean = view.dtype == aoti_torch_dtype_bool();
    if (!boolean && view.dtype != aoti_torch_dtype_float32())
      throw std::invalid_argument(std::string(name) + " is neither float32 nor bool");
    if (view.rank > 4) throw std::invalid_argument(std::string(name) + " has more than 4 dimensions");
    for (int64_t d = 0; d < view.rank; ++d) {
      const int64_t to = 4 - view.rank + d;
      if (view.sizes[d] != wanted[to] && view.sizes[d] != 1)
        throw std::invalid_argument(std::string(name) + " does not broadcast to [batch, heads, queries, keys]");
      strides_[to] = view.sizes[d] == 1 ? 0 : view.strides[d];
    }
    if (boolean)
      bools_ = static_cast<const bool*>(view.data);
    else
      floats_ = static_cast<const float*>(view.data);
  }

  bool given() const { return floats_ != nullptr || bools_ != nullptr; }

  // Written to `scratch` where the row is not contiguous floats; `last` holds which row is there already.
  const float* row(int64_t b, int64_t h, int64_t i, float* scratch, int64_t& last) const {
    const int64_t start = b * strides_[0] + h * strides_[1] + i * strides_[2];
    if (floats_ != nullptr && (strides_[3] == 1 || keys_ == 1)) return floats_ + start;
    if (last == start) return scratch;
    for (int64_t j = 0; j < keys_; ++j) {
      const int64_t at = start + j * strides_[3];
      scratch[j] = bools_ != nullptr ? (bools_[at] ? on_ : off_) : floats_[at];
    }
    last = start;
    return scratch;
  }

 private:
  const float* floats_ = nullptr;
  const bool* bools_ = nullptr;
  int64_t strides_[4] = {};
  int64_t keys_;
  float off_, on_;
};

struct Attention {
  Operand q, k, v;
  Rows bias, factor;
  float scale, gain;
  Kind kind;
  bool causal;
  float* out;

  int64_t blocks() const { return at::divup(q.length, tile::kRows); }
};

// One thread's memory: k transposed, v if its rows can't be read in place, six rows of scores, and rows of masks.
class Worker {
 public:
  explicit Worker(const Attention& a)
      : a_(a), keys_(padded(a.k.length)), wide_(padded(a.v.width)), deep_(padded(a.k.width)) {
    static thread_local std::vector<float> store;
    const int64_t need = keys_ * deep_ + keys_ * wide_ + tile::kRows * (keys_ + a.q.width) + 2 * keys_ + 16;
    if (static_cast<int64_t>(store.size()) < need) store.resize(need);
    transposed_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(store.data()) + 63) & ~uintptr_t{63});
    values_ = transposed_ + keys_ * deep_;
    scores_ = values_ + keys_ * wide_;
    bias_ = scores_ + tile::kRows * keys_;
    factor_ = bias_ + keys_;
    queries_ = factor_ + keys_;
  }

  // Blocks first..last-1 of the queries of one head.
  void run(int64_t b, int64_t h, int64_t first, int64_t last) {
    last_bias_ = last_factor_ = -1;
    transpose(b, h);
    const float* v = a_.v.at(b, h);
    int64_t step = a_.v.step();
    if (a_.v.width % kLanes || !a_.v.rows_are_contiguous()) {
      copy(a_.v, v, a_.v.length, values_, wide_);
      std::tie(v, step) = std::make_tuple(values_, wide_);
    }
    const int64_t pitch = a_.v.heads * a_.v.width;
    for (int64_t block = first; block < last; ++block) {
      const int64_t i0 = a_.q.length * block / a_.blocks(), i1 = a_.q.length * (block + 1) / a_.blocks();
      const int64_t limit = a_.causal ? std::min(i1, a_.k.length) : a_.k.length;
      const float* q = a_.q.at(b, h) + i0 * a_.q.step();
      int64_t stride = a_.q.step();
      if (!a_.q.rows_are_contiguous()) {
        copy(a_.q, q, i1 - i0, queries_, a_.q.width);
        std::tie(q, stride) = std::make_tuple(queries_, a_.q.width);
      }
      tile::multiply({q, stride, transposed_, keys_, a_.q.width, scores_, keys_, padded(limit), nullptr}, i1 - i0);
      float factors[tile::kRows];
      for (int64_t i = i0; i < i1; ++i) factors[i - i0] = weigh(b, h, i, limit, scores_ + (i - i0) * keys_);
      float* out = a_.out + (b * a_.q.length + i0) * pitch + h * a_.v.width;
      tile::multiply({scores_, keys_, v, step, limit, out, pitch, a_.v.width, factors}, i1 - i0);
    }
  }

 private:
  const Attention& a_;
  int64_t keys_, wide_, deep_;
  float *transposed_, *values_, *scores_, *bias_, *factor_, *queries_;
  int64_t last_bias_ = -1, last_factor_ = -1;

  static void copy(const Operand& x, const float* source, int64_t rows, float* target, int64_t pitch) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < x.width; ++d) target[i * pitch + d] = source[i * x.step() + d * x.strides[3]];
      std::fill(target + i * pitch + x.width, target + (i + 1) * pitch, 0.f);
    }
  }

  // Interleaving the first half of the vectors with the second, log2(kLanes) times over, transposes a square of them.
  void transpose(int64_t b, int64_t h) {
    const float* k = a_.k.at(b, h);
    if (!a_.k.rows_are_contiguous()) {
      for (int64_t d = 0; d < a_.k.width; ++d) {
        for (int64_t j = 0; j < a_.k.length; ++j)
          transposed_[d * keys_ + j] = k[j * a_.k.step() + d * a_.k.strides[3]];
        std::fill(transposed_ + d * keys_ + a_.k.length, transposed_ + (d + 1) * keys_, 0.f);
      }
      return;
    }
    for (int64_t j = 0; j < keys_; j += kLanes)
      for (int64_t d = 0; d < a_.k.width; d += kLanes) {
        const int64_t count = std::min(kLanes, a_.k.width - d);
        Lanes x[kLanes], y[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          if (j + r < a_.k.length) x[r] = load(k + (j + r) * a_.k.step() + d, count);
#pragma GCC unroll 4
        for (int step = kLanes; step > 1; step /= 2) {
#pragma GCC unroll 8
          for (int r = 0; r < kLanes / 2; ++r)
            std::tie(y[2 * r], y[2 * r + 1]) = at::vec::interleave2(x[r], x[r + kLanes / 2]);
#pragma GCC unroll 16
          for (int r = 0; r < kLanes; ++r) x[r] = y[r];
        }
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) x[r].store(transposed_ + (d + r) * keys_ + j);
      }
  }

  // The scores of one query, of which it may see `count` keys, become weights; those up to `limit` that it may not see
  // become 0. Returns what the weighted sum of v is to be multiplied with.
  float weigh(int64_t b, int64_t h, int64_t i, int64_t limit, float* row) {
    const int64_t count = a_.causal ? std::min(i + 1, limit) : limit;
    const float* bias = a_.bias.given() ? a_.bias.row(b, h, i, bias_, last_bias_) : nullptr;
    std::fill(row + std::min(padded(count), limit), row + limit, 0.f);
    const Lanes scale(a_.scale);
    const auto score = [&](int64_t j) {
      const int64_t here = std::min(kLanes, count - j);
      Lanes x = Lanes::loadu(row + j) * scale;
      if (bias != nullptr) x = x + load(bias + j, here);
      return here == kLanes ? x : Lanes::set(Lanes(-kInfinity), x, here);
    };
    if (a_.kind == Kind::silu) {
      const float* factor = a_.factor.given() ? a_.factor.row(b, h, i, factor_, last_factor_) : nullptr;
      for (int64_t j = 0; j < count; j += kLanes) {
        const Lanes x = score(j);
        Lanes w = x / (Lanes(1.f) + tile::exponential(at::vec::clamp_max(x.neg(), Lanes(87.f))));
        w = Lanes::blendv(w, Lanes(0.f), x == Lanes(-kInfinity));
        if (factor != nullptr) w = w * load(factor + j, std::min(kLanes, count - j));
        w.store(row + j);
      }
      return a_.gain;
    }
    const auto larger = [](const Lanes& x, const Lanes& y) { return at::vec::maximum(x, y); };
    Lanes most(-kInfinity), total(0.f);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Lanes x = score(j);
      x.store(row + j);
      most = larger(most, x);
    }
    const float top = at::vec::vec_reduce_all<float>(larger, most);
    if (top == -kInfinity && a_.kind == Kind::softmax) {
      std::fill(row, row + limit, 0.f);
      return 0.f;
    }
    for (int64_t j = 0; j < count; j += kLanes) {
      const Lanes e = tile::exponential(Lanes::loadu(row + j) - Lanes(top));
      e.store(row + j);
      total = total + e;
    }
    return a_.gain / at::vec::vec_reduce_all<float>([](const Lanes& x, const Lanes& y) { return x + y; }, total);
  }
};

void run(const Attention& a) {
  const int64_t heads = a.q.batch * a.q.heads;
  if (heads * a.q.length * a.v.width == 0) return;
  const int64_t pairs = a.q.length * a.k.length / (a.causal ? 2 : 1);
  const int64_t useful = heads * pairs * (a.q.width + a.v.width) / kGrain;
  const int64_t threads = at::in_parallel_region() ? 1 : std::clamp<int64_t>(useful, 1, at::get_num_threads());
  const int64_t shares = std::min(at::divup(threads, heads), a.blocks());
  const int64_t tasks = heads * shares;
  at::parallel_for(0, tasks, at::divup(tasks, threads), [&](int64_t begin, int64_t end) {
    Worker worker(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / shares, share = task % shares;
      worker.run(head / a.q.heads, head % a.q.heads, a.blocks() * share / shares, a.blocks() * (share + 1) / shares);
    }
  });
}

}  // namespace
}  // namespace grc

GRC_EXPORT AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                   AtenTensorHandle* bias, AtenTensorHandle* factor, double scale,
                                                   double gain, int64_t kind, int32_t causal, AtenTensorHandle* ret0) {
  return grc::guard([&] {
    using namespace grc;
    const View query(q), key(k), value(v);
    const Operand a(query, "q"), b(key, "k"), c(value, "v");
    require(a.batch == b.batch && a.heads == b.heads && a.width == b.width, "k does not fit q");
    require(a.batch == c.batch && a.heads == c.heads && b.length == c.length, "v does not fit q and k");
    require(kind >= 0 && kind <= static_cast<int64_t>(Kind::silu), "kind is 0 to 2");
    require(factor == nullptr || kind == static_cast<int64_t>(Kind::silu), "factor belongs to silu");
    const std::array<int64_t, 4> scores{a.batch, a.heads, a.length, b.length};
    Output out({a.batch, a.length, a.heads * c.width}, aoti_torch_dtype_float32());
    run({a, b, c, Rows(bias, "bias", scores, -kInfinity, 0.f), Rows(factor, "factor", scores, 0.f, 1.f),
         static_cast<float>(scale), static_cast<float>(gain), static_cast<Kind>(kind), causal != 0,
         out.data<float>()});
    *ret0 = out.release();
  });
}
