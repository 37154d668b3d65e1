// Look-up and DLRM's interaction written by hand for one shape, 26 tables of 64 columns beside a dense vector, for AVX-512
// with bfloat16 products; and a clock that calls them and grc's kernels in turns, as an AOTInductor package calls: no Python,
// no dispatcher.

#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

extern "C" AOTITorchError aoti_torch_cpu_bag_dot(
    AtenTensorHandle arena, AtenTensorHandle ids, AtenTensorHandle* offsets, AtenTensorHandle* weights,
    AtenTensorHandle* dense, const int64_t* bases, int64_t bases_len_, const int64_t* rows, int64_t rows_len_,
    int64_t dim, const int64_t* lengths, int64_t lengths_len_, int64_t pooling, const int64_t* padding,
    int64_t padding_len_, int32_t upper, int32_t diagonal, int32_t keep_dense, const int64_t* packing,
    int64_t packing_len_, AtenTensorHandle* ret0);
extern "C" AOTITorchError aoti_torch_cpu_lookup(
    AtenTensorHandle arena, AtenTensorHandle ids, AtenTensorHandle* offsets, AtenTensorHandle* weights,
    const int64_t* bases, int64_t bases_len_, const int64_t* rows, int64_t rows_len_, const int64_t* dims,
    int64_t dims_len_, const int64_t* lengths, int64_t lengths_len_, int64_t pooling, const int64_t* padding,
    int64_t padding_len_, const int64_t* packing, int64_t packing_len_, AtenTensorHandle* ret0);

namespace {

using bfloat = uint16_t;  // its bits

constexpr int kTables = 26, kDim = 64, kRows = kTables + 1, kWidth = kDim + kRows * (kRows - 1) / 2;
constexpr int kAhead = 3;             // samples
constexpr int64_t kWorkPerThread = 16;  // samples

template <class T>
const T* row(const T* tables, const int64_t* ids, int64_t rows, int64_t b, int t) {
  return tables + (t * rows + ids[b * kTables + t]) * kDim;
}

template <class T>
void fetch(const T* tables, const int64_t* ids, int64_t rows, int64_t b) {
  for (int t = 0; t < kTables; ++t)
    for (int d = 0; d < kDim; d += 64 / static_cast<int>(sizeof(T)))
      _mm_prefetch(reinterpret_cast<const char*>(row(tables, ids, rows, b, t) + d), _MM_HINT_T0);
}

// A square of 32-bit words: pairs of lanes, pairs of pairs, then quarters of the registers change places.
void transpose(__m512 (&r)[16]) {
  __m512 s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(s[i + h]), high = _mm512_castps_pd(s[i + h + 2]);
      r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    s[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    s[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    s[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    s[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = s[i];
}

template <class T>
__m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
  if constexpr (std::is_same_v<T, float>)
    return _mm512_fmadd_ps(a, b, sum);
  else
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

template <class T>
void store(T* target, __m512 value, int count) {
  const __mmask16 mask = count >= 16 ? 0xffff : (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(target, mask, value);
  else
    _mm256_mask_storeu_epi16(target, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

// Rows First..First+N-1 of the triangle, from Columns vectors of the transposed tile [kWords, 32].
template <class T, int First, int N, int Columns>
void triangle(const float* tile, const float* transposed, T* out) {
  constexpr int kWords = kDim * sizeof(T) / 4;
  __m512 sum[N][Columns];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int c = 0; c < Columns; ++c) sum[i][c] = _mm512_setzero_ps();
  for (int k = 0; k < kWords; ++k) {
    __m512 right[Columns];
#pragma GCC unroll 2
    for (int c = 0; c < Columns; ++c) right[c] = _mm512_load_ps(transposed + k * 32 + c * 16);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const __m512 left = _mm512_set1_ps(tile[(First + i) * kWords + k]);
#pragma GCC unroll 2
      for (int c = 0; c < Columns; ++c) sum[i][c] = multiply_add<T>(left, right[c], sum[i][c]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    const int r = First + i;
    T* target = out + r * (r - 1) / 2;
#pragma GCC unroll 2
    for (int c = 0; c < Columns; ++c) store(target + c * 16, sum[i][c], r - c * 16);
  }
}

template <class T>
void dot(const T* tables, const int64_t* ids, const T* dense, int64_t batch, int64_t rows, T* out) {
  constexpr int kWords = kDim * sizeof(T) / 4;  // of 32 bits in a row
  at::parallel_for(0, batch, kWorkPerThread, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kRows * kWords], transposed[kWords * 32];
    for (int64_t b = begin; b < end; ++b) {
      if (b + kAhead < end) fetch(tables, ids, rows, b + kAhead);
      T* target = out + b * kWidth;
      for (int d = 0; d < kWords; d += 16) {
        const __m512 words = _mm512_loadu_ps(reinterpret_cast<const float*>(dense + b * kDim) + d);
        _mm512_store_ps(tile + d, words);
        _mm512_storeu_ps(reinterpret_cast<float*>(target) + d, words);
      }
      for (int t = 0; t < kTables; ++t)
        for (int d = 0; d < kWords; d += 16)
          _mm512_store_ps(tile + (t + 1) * kWords + d,
                          _mm512_loadu_ps(reinterpret_cast<const float*>(row(tables, ids, rows, b, t)) + d));
      for (int d = 0; d < kWords; d += 16)
        for (int half = 0; half < 32; half += 16) {
          __m512 square[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i)
            square[i] = half + i < kRows ? _mm512_load_ps(tile + (half + i) * kWords + d) : _mm512_setzero_ps();
          transpose(square);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_store_ps(transposed + (d + i) * 32 + half, square[i]);
        }
      triangle<T, 1, 15, 1>(tile, transposed, target + kDim);
      triangle<T, 16, kRows - 16, 2>(tile, transposed, target + kDim);
    }
  });
}

template <class T>
void look_up(const T* tables, const int64_t* ids, int64_t batch, int64_t rows, T* out) {
  at::parallel_for(0, batch, kWorkPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (b + kAhead < end) fetch(tables, ids, rows, b + kAhead);
      for (int t = 0; t < kTables; ++t) {
        const char* source = reinterpret_cast<const char*>(row(tables, ids, rows, b, t));
        char* target = reinterpret_cast<char*>(out + (b * kTables + t) * kDim);
        for (size_t byte = 0; byte < kDim * sizeof(T); byte += 64)
          _mm512_storeu_si512(target + byte, _mm512_loadu_si512(source + byte));
      }
    }
  });
}

// The interaction, or without `dense` the look-up alone.
template <class T>
void by_hand(const T* tables, const int64_t* ids, const T* dense, int64_t batch, int64_t rows, T* out) {
  if (dense != nullptr)
    dot(tables, ids, dense, batch, rows, out);
  else
    look_up(tables, ids, batch, rows, out);
}

// A tensor over memory that it does not own.
class Borrowed {
 public:
  Borrowed(const void* data, std::vector<int64_t> sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
    aoti_torch_create_tensor_from_blob(const_cast<void*>(data), static_cast<int64_t>(sizes.size()), sizes.data(),
                                       strides.data(), 0, dtype, aoti_torch_device_type_cpu(), 0, &handle_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() { aoti_torch_delete_tensor_object(handle_); }
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

template <class T>
T* data(AtenTensorHandle tensor) {
  void* pointer = nullptr;
  aoti_torch_get_data_ptr(tensor, &pointer);
  return static_cast<T*>(pointer);
}

// What grc's kernels are told of the shape; the hand's know it.
struct Shape {
  std::vector<int64_t> bases, rows, ones, dims, padding;

  explicit Shape(int64_t each)
      : rows(kTables, each), ones(kTables, 1), dims(kTables, kDim), padding(kTables, std::numeric_limits<int64_t>::min()) {
    for (int t = 0; t < kTables; ++t) bases.push_back(t * each);
  }

  AtenTensorHandle call(AtenTensorHandle arena, AtenTensorHandle ids, AtenTensorHandle* dense) const {
    AtenTensorHandle out = nullptr;
    if (dense != nullptr)
      aoti_torch_cpu_bag_dot(arena, ids, nullptr, nullptr, dense, bases.data(), kTables, rows.data(), kTables, kDim,
                             ones.data(), kTables, 0, padding.data(), kTables, 0, 0, 1, nullptr, 0, &out);
    else
      aoti_torch_cpu_lookup(arena, ids, nullptr, nullptr, bases.data(), kTables, rows.data(), kTables, dims.data(), kTables,
                            ones.data(), kTables, 0, padding.data(), kTables, nullptr, 0, &out);
    return out;
  }
};

// Seconds of a call in each round: by hand into `hand_s`, by grc into `grc_s`. A request is written into the ids' tensor
// before each call, off the clock: `pool` is [sets, batch, kTables]. Each call makes its result and frees it, as in a package;
// the hand's first answer is kept in `answer`.
template <class T>
void clock_in_turns(const T* tables, int64_t rows, const int64_t* pool, int64_t sets, int64_t batch, const T* dense,
                    int64_t calls, int64_t rounds, T* answer, double* hand_s, double* grc_s) {
  using Clock = std::chrono::steady_clock;
  const int32_t dtype = std::is_same_v<T, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  const Shape shape(rows);
  std::vector<int64_t> request(batch * kTables);
  const Borrowed arena(tables, {kTables * rows, kDim}, dtype), beside(dense, {batch, kDim}, dtype);
  const Borrowed ids(request.data(), {batch, kTables}, aoti_torch_dtype_int64());
  AtenTensorHandle beside_handle = beside.get();
  int64_t next = 0;
  const auto timed = [&](auto call) {
    Clock::duration spent{};
    for (int64_t i = 0; i < calls; ++i, next = (next + 1) % sets) {
      std::copy_n(pool + next * batch * kTables, batch * kTables, request.data());
      const auto start = Clock::now();
      call();
      spent += Clock::now() - start;
    }
    return std::chrono::duration<double>(spent).count() / static_cast<double>(calls);
  };
  const int64_t sizes[] = {batch, dense != nullptr ? kWidth : kTables * kDim}, strides[] = {sizes[1], 1};
  const auto hand = [&] {
    AtenTensorHandle result = nullptr;
    aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result);
    by_hand(tables, request.data(), dense, batch, rows, data<T>(result));
    return result;
  };
  std::copy_n(pool, batch * kTables, request.data());
  const AtenTensorHandle first = hand();
  std::copy_n(data<T>(first), sizes[0] * sizes[1], answer);
  aoti_torch_delete_tensor_object(first);
  for (int64_t r = 0; r < rounds; ++r) {
    hand_s[r] = timed([&] { aoti_torch_delete_tensor_object(hand()); });
    grc_s[r] = timed([&] {
      aoti_torch_delete_tensor_object(shape.call(arena.get(), ids.get(), dense ? &beside_handle : nullptr));
    });
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void clock_fp32(const float* tables, int64_t rows, const int64_t* pool, int64_t sets, int64_t batch,
                       const float* dense, int64_t calls, int64_t rounds, float* answer, double* hand_s, double* grc_s) {
  clock_in_turns(tables, rows, pool, sets, batch, dense, calls, rounds, answer, hand_s, grc_s);
}

EXPORT void clock_bf16(const bfloat* tables, int64_t rows, const int64_t* pool, int64_t sets, int64_t batch,
                       const bfloat* dense, int64_t calls, int64_t rounds, bfloat* answer, double* hand_s, double* grc_s) {
  clock_in_turns(tables, rows, pool, sets, batch, dense, calls, rounds, answer, hand_s, grc_s);
}
