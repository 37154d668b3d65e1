// The ways to multiply by a weight of int8 or bfloat16: widened products on any CPU, and the instructions that some have.
#pragma once

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif
#ifdef CPU_CAPABILITY_AVX512
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

#include "low.h"

namespace grc::low {

inline int32_t as_lane(const void* source) {
  int32_t lane;
  std::memcpy(&lane, source, sizeof(lane));
  return lane;
}

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

}  // namespace grc::low
