// y = epilogue(x W^T) over a weight of int8 or bfloat16 in panels; x is brought to the weight's precision row by row.
//
// A panel holds kPanel columns, and of each column a group of steps along K side by side, as one lane of 32 bits: the
// operand of the CPU's own instructions where it has them (AMX, VNNI, BF16), which are looked for at run time. Elsewhere
// the same numbers come from widened products, for which x is widened before: int8 sums are exact either way.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "low_formats.h"

namespace grc::low {

using gemm::part;

// Bytes of x that stay in L2 while the panels pass by.
constexpr int64_t kBlockBytes = 192 * 1024;

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
