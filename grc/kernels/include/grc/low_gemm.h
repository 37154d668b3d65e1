// y = epilogue(x W^T) over a weight of int8 or bfloat16 in panels; x is brought to the weight's precision row by row.
//
// A panel holds kPanel columns, and of each column a group of steps along K side by side, as one lane of 32 bits: the
// operand of the CPU's own instructions where it has them (AMX, VNNI, BF16), which are looked for at run time. Elsewhere
// the same numbers come from widened products, for which x is widened before: int8 sums are exact either way.
#pragma once

#include <ATen/Parallel.h>
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif
#ifdef CPU_CAPABILITY_AVX512
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>

#include "gemm.h"
#include "lanes.h"
#include "linear.h"

namespace grc::low {

using gemm::kPanel;
using gemm::kRows;
using gemm::kVecs;
using gemm::part;
using Ints = at::vec::Vectorized<int32_t>;
static_assert(Ints::size() == kLanes);

// K at which a sum of 255 * 127 could leave 32 bits is 66311.
constexpr int64_t kMaxDepth = 65536;

// Bytes of x that stay in L2 while the panels pass by.
constexpr int64_t kBlockBytes = 192 * 1024;

inline int32_t as_lane(const void* source) {
  int32_t lane;
  std::memcpy(&lane, source, sizeof(lane));
  return lane;
}

// How a row of x became bytes: what a step is worth, and which step is zero.
struct Row {
  float step;
  int32_t zero;
};

struct Gemm {
  const void* x;         // [m, depth] of the format's Input, `stride` of them from row to row
  const void* weight;    // [ceil(n / kPanel), depth / kGroup, kPanel, kGroup]
  const float* scale;    // int8: [n] of the columns
  const float* sums;     // int8: [n] of the weights of each column
  const Row* row;        // int8: [m]
  float* y;              // [m, n]
  int64_t m, n, depth, stride;
  gemm::Epilogue epilogue;
};

struct Tile {
  int64_t row, col, rows;
};

// How a format takes rows: a tile has up to kUnits units of kUnit rows, x is padded to whole units, and its rows to kAlign
// elements, an odd multiple where kOdd is 1, so that those of a tile fall into different sets of the cache. A Scope stands
// while a thread multiplies.
struct ByRow {
  static constexpr int64_t kUnit = 1, kUnits = kRows, kAlign = kLanes, kOdd = 0;
  struct Scope {};
};

// Weights of 8 bits, symmetric, a scale a column; x of 8 bits with a scale and a zero a row.
struct Int8 : ByRow {
  using Weight = int8_t;
  using Sum = Ints;
  static constexpr int64_t kGroup = 4;
};

// Weights and x of bfloat16, sums of float32.
struct Bf16 : ByRow {
  using Weight = uint16_t;
  using Sum = Lanes;
  static constexpr int64_t kGroup = 2;
};

// A weight [n, k] as its packer left it, checked. Without a scale it is bfloat16.
struct Weight {
  const void* data;
  const float* scale = nullptr;
  const float* sums = nullptr;
  int64_t depth;  // k, padded to whole groups

  Weight(AtenTensorHandle packed, AtenTensorHandle* factors, int64_t n, int64_t k) {
    const bool bytes = View(packed).dtype == aoti_torch_dtype_int8();
    require(bytes == (factors != nullptr), "a weight of int8 has a scale, one of bfloat16 has none");
    const int64_t group = bytes ? Int8::kGroup : Bf16::kGroup, steps = at::divup(k, group);
    depth = steps * group;
    require(!bytes || depth <= kMaxDepth, "int8 sums of more than 65536 products may leave 32 bits");
    data = weight_data(packed, bytes ? aoti_torch_dtype_int8() : aoti_torch_dtype_bfloat16(),
                       {at::divup(n, kPanel), steps, kPanel, group});
    if (!bytes) return;
    scale = Finish::vector(*factors, "scale", 2 * n);
    sums = scale + n;
  }
};

// v * Phi(v) within 9.2e-5, a hundredth of what the rounding of its factors to 8 bits moves it by, in a quarter of the time
// of gemm::gelu: Phi(v) - 1/2 as an odd polynomial of degree 17, fitted on |v| <= 4.2 and constant beyond.
inline Lanes gelu(Lanes v) {
  constexpr float P[] = {-4.79655755e-09f, 2.07278240e-07f, -5.29013191e-06f, 8.98421182e-05f,
                         -1.08649884e-03f, 9.74108600e-03f, -6.62223458e-02f, 3.98834761e-01f};
  const Lanes u = at::vec::clamp(v, Lanes(-4.2f), Lanes(4.2f));
  const Lanes t = u * u;
  Lanes poly(4.92491577e-11f);
#pragma GCC unroll 8
  for (const float p : P) poly = at::vec::fmadd(poly, t, Lanes(p));
  return v * at::vec::fmadd(u, poly, Lanes(0.5f));
}

inline Lanes finished(Lanes v, const gemm::Epilogue& e, int64_t row, int64_t col, int64_t count) {
  if (e.activation != gemm::Activation::gelu) return gemm::finish(v, e, row, col, count);
  if (e.bias) v = v + Lanes::loadu(e.bias + col, count);
  v = gelu(v);
  if (e.mul.data) v = v * Lanes::loadu(e.mul.data + row * e.mul.stride + col, count);
  if (e.add.data) v = v + Lanes::loadu(e.add.data + row * e.add.stride + col, count);
  return v;
}

// Writes `rows` x `vecs` sums that lie side by side, finished.
[[gnu::noinline]] inline void write(const Gemm& g, const Tile& t, const int32_t* sums, int64_t rows, int64_t vecs) {
  const gemm::Epilogue& e = g.epilogue;
  const bool plain = e.activation == gemm::Activation::none && !e.mul.data && !e.add.data;
  const bool smooth = e.activation == gemm::Activation::gelu && !e.mul.data && !e.add.data;
  for (int64_t j = 0; j < vecs; ++j) {
    const int64_t col = t.col + j * kLanes, count = std::min(kLanes, g.n - col);
    const Lanes scale = Lanes::loadu(g.scale + col, count);
    const Ints weights = at::vec::convert_to_int_of_same_size(Lanes::loadu(g.sums + col, count));
    const Row* row = g.row + t.row;
    const int32_t* sum = sums + j * kLanes;
    const auto value = [&](int64_t i) {
      const Ints whole = Ints::loadu(sum + i * vecs * kLanes) - Ints(row[i].zero) * weights;
      return at::vec::convert_to_fp_of_same_size<float>(whole) * (scale * Lanes(row[i].step));
    };
    float* y = g.y + t.row * g.n + col;
    if (count == kLanes && (plain || smooth)) {  // what most tiles are, without a branch in them
      const Lanes bias = e.bias ? Lanes::loadu(e.bias + col) : Lanes(0.f);
      if (plain)
        for (int64_t i = 0; i < rows; ++i) (value(i) + bias).store(y + i * g.n);
      else
        for (int64_t i = 0; i < rows; ++i) gelu(value(i) + bias).store(y + i * g.n);
    } else {
      for (int64_t i = 0; i < rows; ++i) finished(value(i), e, t.row + i, col, count).store(y + i * g.n, count);
    }
  }
}

[[gnu::noinline]] inline void write(const Gemm& g, const Tile& t, const float* sums, int64_t rows, int64_t vecs) {
  for (int64_t j = 0; j < vecs; ++j) {
    const int64_t col = t.col + j * kLanes, count = std::min(kLanes, g.n - col);
    for (int64_t i = 0; i < rows; ++i) {
      const Lanes v = finished(Lanes::loadu(sums + (i * vecs + j) * kLanes), g.epilogue, t.row + i, col, count);
      v.store(g.y + (t.row + i) * g.n + col, count);
    }
  }
}

// The tiles of a format by their units and vectors.
template <class Format>
using Tiles = std::array<void (*)(const Gemm&, const Tile&), Format::kUnits * kVecs>;

// The way to multiply a format: a group of steps along K in `kParts` products of weights and an input, and how lanes of a
// row, which are whole numbers or will be rounded, are kept as Input.
namespace widened {

// Even and odd bytes apart, in 16 bits: two products of pairs. Without intrinsics one product for each byte. The empty asm
// keeps GCC from summing products among themselves first, for which it has no registers.
struct Int8 : low::Int8 {
  using Input = int16_t;
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int kParts = 2;
  static __m512i weights(const int8_t* source, int part) {
    const __m512i w = _mm512_loadu_si512(source);
    return _mm512_srai_epi16(part ? w : _mm512_slli_epi16(w, 8), 8);
  }
  static __m512i input(const Input* source, int part) { return _mm512_set1_epi32(as_lane(source + 2 * part)); }
  static Ints dot(Ints sum, __m512i x, __m512i w) {
    __m512i next = _mm512_add_epi32(sum, _mm512_madd_epi16(x, w));
    asm("" : "+v"(next));
    return next;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  static constexpr int kParts = 2;
  static __m256i weights(const int8_t* source, int part) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm256_srai_epi16(part ? w : _mm256_slli_epi16(w, 8), 8);
  }
  static __m256i input(const Input* source, int part) { return _mm256_set1_epi32(as_lane(source + 2 * part)); }
  static Ints dot(Ints sum, __m256i x, __m256i w) {
    __m256i next = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
    asm("" : "+x"(next));
    return next;
  }
#else
  static constexpr int kParts = 4;
  static Ints weights(const int8_t* source, int part) {
    int32_t lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = source[i * 4 + byte(part)];
    return Ints::loadu(lanes);
  }
  static Ints input(const Input* source, int part) { return Ints(source[part]); }
  static Ints dot(Ints sum, Ints x, Ints w) { return sum + x * w; }
#endif

  // The bytes of a group lie in the order 0, 2, 1, 3.
  static int64_t byte(int64_t place) { return (place & 1) << 1 | place >> 1; }

  static void keep(Lanes whole, Input* out) {
#ifdef CPU_CAPABILITY_AVX2
    const __m256i lanes = _mm256_shuffle_epi32(_mm256_cvtps_epi32(whole), _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i low = _mm256_castsi256_si128(lanes), high = _mm256_extracti128_si256(lanes, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packs_epi32(low, high));
#else
    float lanes[kLanes];
    whole.store(lanes);
    for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<Input>(lanes[i / 4 * 4 + byte(i % 4)]);
#endif
  }
};

// The low and the high half of each pair, as float32.
struct Bf16 : low::Bf16 {
  using Input = float;
  static constexpr int kParts = 2;
  static Lanes weights(const uint16_t* source, int part) {
    const Ints pair = Ints::loadu(source);
    return at::vec::cast<float>(part ? pair & Ints(static_cast<int32_t>(0xffff0000)) : pair << Ints(16));
  }
  static Lanes input(const Input* source, int part) { return Lanes(source[part]); }
  static Lanes dot(Lanes sum, Lanes x, Lanes w) { return at::vec::fmadd(x, w, sum); }

  static void keep(Lanes v, Input* out) {
    std::get<0>(at::vec::convert_to_float(at::vec::convert_from_float<c10::BFloat16>(v, Lanes(0.f)))).store(out);
  }
};

#include "low_tile.h"

}  // namespace widened

#ifdef CPU_CAPABILITY_AVX512

// x for the CPU's own products, kept outside of their target so that it is inlined.
struct Bytes : Int8 {
  using Input = uint8_t;
  static void keep(Lanes whole, Input* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(whole)));
  }
};

struct Halves : Bf16 {
  using Input = uint16_t;
  static void keep(Lanes v, Input* out) {
    const auto halves = at::vec::convert_from_float<c10::BFloat16>(v, Lanes(0.f));
    halves.store(reinterpret_cast<c10::BFloat16*>(out), kLanes);
  }
};

#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512bf16")

namespace native {

struct Int8 : Bytes {
  static constexpr int kParts = 1;
  static __m512i weights(const int8_t* source, int) { return _mm512_loadu_si512(source); }
  static __m512i input(const Input* source, int) { return _mm512_set1_epi32(as_lane(source)); }
  static Ints dot(Ints sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
};

struct Bf16 : Halves {
  static constexpr int kParts = 1;
  static __m512bh weights(const uint16_t* source, int) { return (__m512bh)_mm512_loadu_si512(source); }
  static __m512bh input(const Input* source, int) { return (__m512bh)_mm512_set1_epi32(as_lane(source)); }
  static Lanes dot(Lanes sum, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(sum, x, w); }
};

#include "low_tile.h"

}  // namespace native

#pragma GCC pop_options

#include "low_amx.h"
#endif

// Calls `use` with a format by which this CPU multiplies `rows` rows by a weight of int8 (`bytes`) or bfloat16.
template <class Use>
void with_format(bool bytes, int64_t rows, Use use) {
#ifdef CPU_CAPABILITY_AVX512
  static const bool int8_tiles = amx::usable(amx::Int8::kFeature), bf16_tiles = amx::usable(amx::Bf16::kFeature);
  if (bytes && int8_tiles && rows >= amx::Int8::kFewest) return use(amx::Int8{});
  if (!bytes && bf16_tiles && rows >= amx::Bf16::kFewest) return use(amx::Bf16{});
  static const bool vnni = __builtin_cpu_supports("avx512vnni"), bf16 = __builtin_cpu_supports("avx512bf16");
  if (bytes && vnni) return use(native::Int8{});
  if (!bytes && bf16) return use(native::Bf16{});
#endif
  if (bytes) use(widened::Int8{});
  else use(widened::Bf16{});
}

// y[m0:m1] at vectors v0..v1-1 of its columns, by one thread.
template <class Format>
void panels(const Gemm& g, int64_t m0, int64_t m1, int64_t v0, int64_t v1) {
  [[maybe_unused]] const typename Format::Scope scope;
  const Tiles<Format>& table = tiles(Format{});
  const auto row = [&](int64_t unit) { return std::min(m1, m0 + unit * Format::kUnit); };
  const int64_t units = at::divup(m1 - m0, Format::kUnit);
  const int64_t width = g.depth * static_cast<int64_t>(sizeof(typename Format::Input)) * Format::kUnit;
  const int64_t blocks = at::divup(units, std::max(4 * Format::kUnits, kBlockBytes / std::max<int64_t>(width, 1)));
  for (int64_t block = 0; block < blocks; ++block) {
    const auto [b0, b1] = part(units, blocks, block);
    const int64_t count = at::divup(b1 - b0, Format::kUnits);
    for (int64_t v = v0; v < v1;) {
      const int64_t vecs = std::min(kVecs - v % kVecs, v1 - v);
      for (int64_t i = 0; i < count; ++i) {
        const auto [u0, u1] = part(b1 - b0, count, i);
        const int64_t first = row(b0 + u0);
        table[(u1 - u0 - 1) * kVecs + vecs - 1](g, {first, v * kLanes, row(b0 + u1) - first});
      }
      v += vecs;
    }
  }
}

// Rows of x in the format's type, padded to whole groups; of int8, each with its own scale and zero.
template <class Format>
class Input {
 public:
  using Element = typename Format::Input;

  Input(gemm::Matrix x, int64_t m, int64_t k)
      : stride_((at::divup(k, Format::kAlign) | Format::kOdd) * Format::kAlign),
        owned_(new Element[at::divup(m, Format::kUnit) * Format::kUnit * stride_ + 2 * 64]) {
    data_ = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(owned_.get()) + 63) & ~uintptr_t{63});
    if constexpr (kBytes) row_.reset(new Row[m]);
    // A row of 2048 takes about half a microsecond.
    at::parallel_for(0, m, at::divup(int64_t{64 * 1024}, std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convert(x.data + i * x.stride, k, i);
    });
  }

  const Element* data() const { return data_; }
  const Row* row() const { return row_.get(); }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<Element[]> owned_;
  Element* data_;  // on a cache line: tiles are read by lines
  std::unique_ptr<Row[]> row_;
  static constexpr bool kBytes = std::is_base_of_v<Int8, Format>;

  void convert(const float* x, int64_t k, int64_t i) {
    Element* out = data_ + i * stride_;
    for (int64_t d = padded(k); d < stride_; ++d) out[d] = 0;
    if constexpr (kBytes) {
      Lanes low(0.f), high(0.f);
      for (int64_t d = 0; d < k; d += kLanes) {
        const Lanes v = Lanes::loadu(x + d, std::min(kLanes, k - d));
        low = at::vec::minimum(low, v);  // NaN stays
        high = at::vec::maximum(high, v);
      }
      const float least = at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return at::vec::minimum(a, b); }, low);
      const float most = at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return at::vec::maximum(a, b); }, high);
      float step = (most - least) / 255.f;
      float inverse = step > 0.f ? 1.f / step : 0.f;
      if (!std::isfinite(step) || !std::isfinite(inverse)) {
        // A row with NaN or infinity, or whose values span more than float32 or next to nothing: its answer is NaN, or 0.
        step = std::isfinite(step) ? 0.f : std::numeric_limits<float>::quiet_NaN();
        inverse = 0.f;
      }
      const float zero = std::nearbyint(-least * inverse);
      row_[i] = {step, inverse == 0.f ? 0 : static_cast<int32_t>(zero)};
      if (inverse == 0.f) return std::fill_n(out, stride_, Element{0}), void();
      const Lanes factor(inverse), offset(zero);
      for (int64_t d = 0; d < k; d += kLanes) {
        const Lanes v = Lanes::loadu(x + d, std::min(kLanes, k - d));
        Format::keep(at::vec::clamp((v * factor).round() + offset, Lanes(0.f), Lanes(255.f)), out + d);
      }
    } else {
      for (int64_t d = 0; d < k; d += kLanes) {
        const Lanes v = Lanes::loadu(x + d, std::min(kLanes, k - d));
        Format::keep(v, out + d);
      }
    }
  }
};

// Multiply-adds for which one more thread pays: those of float32, times what an instruction does more.
template <class Format>
void run(Gemm g) {
  if (g.m == 0 || g.n == 0) return;
  const int64_t grain = (g.m <= kRows ? gemm::kStreamGrain : gemm::kGrain) * Format::kGroup / 2;
  const int64_t useful = g.m * g.n * g.depth / grain;
  const int64_t threads = at::in_parallel_region() ? 1 : std::clamp<int64_t>(useful, 1, at::get_num_threads());
  const int64_t vecs = at::divup(g.n, kLanes);
  gemm::Gemm like{{}, nullptr, nullptr, g.m, g.n, g.depth, {}};
  const gemm::Split s = gemm::split(like, vecs, threads);
  const int64_t unit = g.m > kRows && vecs >= 8 * kVecs * s.cols ? kVecs : 1;
  const int64_t units = at::divup(vecs, unit), heights = at::divup(g.m, Format::kUnit);
  at::parallel_for(0, s.rows * s.cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [h0, h1] = part(heights, s.rows, i / s.cols);
      const auto [u0, u1] = part(units, s.cols, i % s.cols);
      const int64_t m0 = h0 * Format::kUnit, m1 = std::min(g.m, h1 * Format::kUnit);
      if (m0 < m1) panels<Format>(g, m0, m1, u0 * unit, std::min(vecs, u1 * unit));
    }
  });
}

}  // namespace grc::low
