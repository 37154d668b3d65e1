// A row of an arena of bytes: float32, float16, bfloat16, or 8 or 4 bits with a scale and an offset in float16 behind.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace grc {

enum class RowFormat : int64_t { fp32, fp16, bf16, int8, int4 };

// Bytes of a row's numbers, filled up so that the scale lies on a multiple of two.
inline int64_t number_bytes(RowFormat format, int64_t dim) {
  const int64_t size = format == RowFormat::int8 ? dim : (dim + 1) / 2;
  return size + size % 2;
}

// Bytes from one row to the next.
inline int64_t packed_bytes(RowFormat format, int64_t dim) {
  switch (format) {
    case RowFormat::fp32:
      return 4 * dim;
    case RowFormat::fp16:
    case RowFormat::bf16:
      return (2 * dim + 3) / 4 * 4;
    default:
      return (number_bytes(format, dim) + 4 + 3) / 4 * 4;
  }
}

inline float half(const uint8_t* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof(bits));
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
#endif
}

// Eight bits a lane from 16 (or 8) bytes.
inline Lanes from_bytes(const uint8_t* source) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = source[i];
  return Lanes::loadu(lanes);
#endif
}

// Four bits a lane from 8 (or 4) bytes, the low half first.
inline Lanes from_halves(const uint8_t* source) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  uint64_t packed = 0;
  std::memcpy(&packed, source, kLanes / 2);
  const __m128i words = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(packed)));
  const __m128i bytes = _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi16(0x0f0f));
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#else
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#endif
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = source[i / 2] >> (i % 2 * 4) & 15;
  return Lanes::loadu(lanes);
#endif
}

// Columns d..d+count-1 of a row, the rest zeros. d is a multiple of kLanes.
inline Lanes unpacked(RowFormat format, const uint8_t* row, int64_t dim, int64_t d, int64_t count) {
  switch (format) {
    case RowFormat::fp32:
      return load(reinterpret_cast<const float*>(row) + d, count);
    case RowFormat::fp16:
      return load(reinterpret_cast<const c10::Half*>(row) + d, count);
    case RowFormat::bf16:
      return load(reinterpret_cast<const c10::BFloat16*>(row) + d, count);
    default:
      break;
  }
  const bool bytes = format == RowFormat::int8;
  const uint8_t* const ends = row + number_bytes(format, dim);
  const Lanes scale(half(ends)), offset(half(ends + 2));
  const uint8_t* source = row + (bytes ? d : d / 2);
  uint8_t part[kLanes] = {};
  if (__builtin_expect(count < kLanes, 0)) {
    std::memcpy(part, source, bytes ? count : (count + 1) / 2);
    source = part;
  }
  const Lanes value = at::vec::fmadd(bytes ? from_bytes(source) : from_halves(source), scale, offset);
  return count < kLanes ? Lanes::set(Lanes(0.f), value, count) : value;
}

}  // namespace grc
