// Pairwise dot products of the rows of a tile in L1: G = T T^T, one triangle of it, packed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

#include "lanes.h"

namespace grc {

// Rows whose accumulators stay in registers beside the operands, for one and for two vectors of columns: AVX-512 has 32
// registers, AVX2 has 16.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRows[] = {0, 16, 12};
#else
constexpr int kRows[] = {0, 12, 6};
#endif

// What a row is made of, in words of a lane each, and how the products of two vectors of them are added up.
struct Floats {
  using Element = float;
  static constexpr int64_t kElements = 1;
  static Lanes add(Lanes sum, Lanes a, Lanes b) { return at::vec::fmadd(a, b, sum); }
};

#ifdef CPU_CAPABILITY_AVX512
// Two numbers of bfloat16 in a word, multiplied as they are and added in float32; subnormal ones count as zeros. By its name
// in the assembler, because the rest is built for CPUs without this instruction too.
struct BfloatPairs {
  using Element = c10::BFloat16;
  static constexpr int64_t kElements = 2;
  static Lanes add(Lanes sum, Lanes a, Lanes b) {
    __m512 total = sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(static_cast<__m512>(a)), "v"(static_cast<__m512>(b)));
    return total;
  }
  static bool usable() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
  }
};
#endif

// All dot products of N rows of D. A row is given by address, or written into `tile(i)`.
template <class Words>
class Gram {
 public:
  Gram(int64_t rows, int64_t dim)
      : n_(rows),
        dim_(dim),
        words_((dim + Words::kElements - 1) / Words::kElements),
        stride_(padded(words_)),
        columns_(padded(rows)),
        store_(new float[(rows + 1) * stride_ + (stride_ + columns_) * columns_ + 2 * columns_ + 16]),
        tile_(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(store_.get()) + 63) & ~uintptr_t{63})),
        transposed_(tile_ + (rows + 1) * stride_),
        products_(transposed_ + stride_ * columns_),
        rows_(reinterpret_cast<const float**>(products_ + columns_ * columns_)) {
    std::fill_n(rows_, columns_, zeros());
    // The rest is written before it is read, and clearing it would cost as much as a small batch.
    std::fill_n(tile_ + n_ * stride_, stride_, 0.f);
  }
  Gram(const Gram&) = delete;
  Gram& operator=(const Gram&) = delete;

  // [padded(D)] of floats, of which the lanes past D must be zero.
  float* tile(int64_t i) {
    rows_[i] = tile_ + i * stride_;
    return tile_ + i * stride_;
  }

  // `source` must live until `pairs`; null stands for zeros.
  template <class T>
  void set(int64_t i, const T* source) {
    if (source == nullptr) {
      rows_[i] = zeros();
      return;
    }
    constexpr bool as_it_is = std::is_same_v<T, typename Words::Element>;
    if (as_it_is && dim_ == stride_ * Words::kElements) {
      rows_[i] = reinterpret_cast<const float*>(source);
      return;
    }
    float* target = tile(i);
    if constexpr (as_it_is) {
      std::memcpy(target, source, dim_ * sizeof(T));
      std::memset(reinterpret_cast<T*>(target) + dim_, 0, (stride_ * Words::kElements - dim_) * sizeof(T));
    } else {
      for (int64_t d = 0; d < dim_; d += kLanes) load(source + d, std::min(kLanes, dim_ - d)).store(target + d);
    }
  }

  // Columns j < i, or with upper j > i, and with diagonal j == i too.
  template <class T>
  void pairs(bool upper, bool diagonal, T* out) {
    transpose();
    for (int64_t i = upper || diagonal ? 0 : 1; i < n_;)
      i += upper ? block(i, i / kLanes, columns_ / kLanes) : block(i, 0, i / kLanes + 1);
    pack(upper, diagonal, out);
  }

 private:
  int64_t n_, dim_, words_, stride_, columns_;
  std::unique_ptr<float[]> store_;
  float *tile_, *transposed_, *products_;
  const float** rows_;

  const float* zeros() const { return tile_ + n_ * stride_; }

  // Interleaving the first half of the vectors with the second, log2(kLanes) times over, transposes a square of them.
  void transpose() {
    for (int64_t i = 0; i < columns_; i += kLanes) {
      const float* const* rows = rows_ + i;
      float* target = transposed_ + i;
      for (int64_t d = 0; d < stride_; d += kLanes) {
        Lanes a[kLanes], b[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) a[r] = Lanes::loadu(rows[r] + d);
#pragma GCC unroll 4
        for (int step = kLanes; step > 1; step /= 2) {
#pragma GCC unroll 8
          for (int r = 0; r < kLanes / 2; ++r)
            std::tie(b[2 * r], b[2 * r + 1]) = at::vec::interleave2(a[r], a[r + kLanes / 2]);
#pragma GCC unroll 16
          for (int r = 0; r < kLanes; ++r) a[r] = b[r];
        }
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) a[r].store(target + (d + r) * columns_);
      }
    }
  }

  template <int R, int C>
  void products(int64_t i, int64_t column) {
    // Unrolled in full, or the accumulators would live on the stack.
    Lanes sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c] = Lanes(0.f);
    // Both factors come from the transposed tile: the scalars of R rows then lie side by side, and need one address.
    const float* left = transposed_ + i;
    const float* right = transposed_ + column * kLanes;
    const int64_t columns = columns_;
    for (int64_t k = 0; k < words_; ++k, left += columns, right += columns) {
      Lanes operand[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) operand[c] = Lanes::loadu(right + c * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Lanes scalar(left[r]);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sum[r][c] = Words::add(sum[r][c], scalar, operand[c]);
      }
    }
    float* target = products_ + i * columns + column * kLanes;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c].store(target + r * columns + c * kLanes);
  }

  using Kernel = void (Gram::*)(int64_t, int64_t);

  template <int C, size_t... R>
  static constexpr auto kernels(std::index_sequence<R...>) {
    return std::array<Kernel, sizeof...(R)>{&Gram::products<static_cast<int>(R) + 1, C>...};
  }

  // Products of as many rows from i on as share the columns [first, last), which are counted in vectors.
  int64_t block(int64_t i, int64_t first, int64_t last) {
    static constexpr auto one = kernels<1>(std::make_index_sequence<kRows[1]>());
    static constexpr auto two = kernels<2>(std::make_index_sequence<kRows[2]>());
    const int64_t rows = std::min({n_ - i, kLanes - i % kLanes, int64_t{last - first > 1 ? kRows[2] : kRows[1]}});
    for (int64_t c = first; c < last; c += 2) {
      if (last - c > 1)
        (this->*two[rows - 1])(i, c);
      else
        (this->*one[rows - 1])(i, c);
    }
    return rows;
  }

  // A row's last vector may run past its end: the next row, written later, covers that. Only where it would leave the
  // sample is the store cut short.
  template <class T>
  void pack(bool upper, bool diagonal, T* out) {
    const int64_t total = n_ * (n_ - 1) / 2 + (diagonal ? n_ : 0);
    int64_t at = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t begin = upper ? i + !diagonal : 0;
      const int64_t end = upper ? n_ : i + diagonal;
      const float* source = products_ + i * columns_;
      for (int64_t j = begin; j < end; j += kLanes) {
        const int64_t position = at + j - begin;
        const Lanes value = Lanes::loadu(source + j);
        store(out + position, value, position + kLanes <= total ? kLanes : std::min(end - j, total - position));
      }
      at += std::max<int64_t>(end - begin, 0);
    }
  }
};

}  // namespace grc
