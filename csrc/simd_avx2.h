// 8 fp32 lanes on AVX2 with FMA and F16C. Included only by files compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace protoken {
namespace {

struct Simd {
  using V = __m256;
  static constexpr int W = 8;
  static constexpr int kPanelVectors = 2;  // 6 x 2 accumulators, 2 tokens' vectors, 1 broadcast: 15 of 16 registers
  static constexpr int kPanelRows = 6;
  static constexpr int kDotRegisters = 12;
  static constexpr int kStreams = 4;           // of memory at once, of fp32 rows and one token
  static constexpr int kNarrowStreams = 4;     // the same of narrower formats
  static constexpr bool kDotPieces = false;    // totals read a client as one stream
  static constexpr int kPanelUnroll = 4;       // columns of the panel form in one turn of its loop
  static constexpr int kDotTokensFp32 = 10;    // beyond, panels of 16 tokens are faster
  static constexpr bool kPanelInPlace = true;  // a panel reads fp32 rows where they lie
  static constexpr const char* kName = "avx2";
  // Bytes ahead of which rows are prefetched; fp32 is left to the hardware (0).
  static constexpr int64_t rows_ahead(int64_t size, int) { return size == 4 ? 0 : 256; }
  static constexpr int64_t kDotAhead = 256;  // of totals

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float value) { return _mm256_set1_ps(value); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  // Lane l holds x[first + l / Repeat].
  template <int Repeat>
  static V spread(V x, int first) {
    static_assert(Repeat == 4, "a part of a vector");
    const __m256i source = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    return _mm256_permutevar8x32_ps(x, _mm256_add_epi32(source, _mm256_set1_epi32(first)));
  }
  static float sum(V v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  // 8 elements as fp32; float8 comes out times 2^-8 (see load_factor), and its NaN as a number (see NanFlag).
  template <int Dtype>
  static V load_as(const void* p) {
    if constexpr (Dtype == kFloat32) {
      return _mm256_loadu_ps(static_cast<const float*>(p));
    } else if constexpr (Dtype == kBfloat16) {
      const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(p));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    } else if constexpr (Dtype == kFloat16) {
      return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    } else if constexpr (Dtype == kInt8) {
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
    } else {
      // s eeee mmm as fp16 s 0eeee mmm0000000: the same number with the exponent's bias 8 lower.
      const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
      return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
    }
  }

  // Remembers whether any float8 byte it saw was NaN (0x7f or 0xff).
  struct NanFlag {
    __m256i found = _mm256_setzero_si256();

    void line(const void* p) {
      const __m256i magnitude = _mm256_set1_epi8(0x7f);
      for (int half = 0; half < 2; ++half) {
        const __m256i bytes = _mm256_loadu_si256(static_cast<const __m256i*>(p) + half);
        found = _mm256_or_si256(found, _mm256_cmpeq_epi8(_mm256_and_si256(bytes, magnitude), magnitude));
      }
    }
    void bytes(const char* p, int64_t n) {
      for (; n >= 64; n -= 64, p += 64) line(p);
      alignas(32) char last[64] = {};
      std::memcpy(last, p, static_cast<size_t>(n > 0 ? n : 0));
      line(last);
    }
    bool any() const { return _mm256_movemask_epi8(found) != 0; }
  };
};

}  // namespace
}  // namespace protoken
