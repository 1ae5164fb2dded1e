// 16 fp32 lanes on AVX-512 (F, BW, DQ, VL). Included only by files compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace protoken {
namespace {

struct Simd {
  using V = __m512;
  static constexpr int W = 16;
  static constexpr int kPanelVectors = 3;  // 8 x 3 accumulators, 3 tokens' vectors, 1 broadcast: 28 of 32 registers
  static constexpr int kPanelRows = 8;
  static constexpr int kDotRegisters = 24;
  static constexpr int kStreams = 16;       // of memory at once, of fp32 rows and one token
  static constexpr int kNarrowStreams = 8;  // the same of narrower formats
  static constexpr bool kDotPieces = true;  // totals read a client as four streams
  static constexpr int kPanelUnroll = 1;
  static constexpr int kDotTokensFp32 = 16;
  static constexpr bool kPanelInPlace = false;
  static constexpr const char* kName = "avx512";
  // Bytes ahead of which `streams` rows are prefetched.
  static constexpr int64_t rows_ahead(int64_t size, int streams) { return size == 1 || streams > 8 ? 512 : 1024; }
  static constexpr int64_t kDotAhead = 1024;  // of totals

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float value) { return _mm512_set1_ps(value); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  // Lane l holds x[first + l / Repeat].
  template <int Repeat>
  static V spread(V x, int first) {
    static_assert(Repeat == 4 || Repeat == 8, "parts of a vector");
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i source = _mm512_srli_epi32(lane, Repeat == 8 ? 3 : 2);
    return _mm512_permutexvar_ps(_mm512_add_epi32(source, _mm512_set1_epi32(first)), x);
  }
  static float sum(V v) { return _mm512_reduce_add_ps(v); }

  // 16 elements as fp32; float8 comes out times 2^-8 (see load_factor), and its NaN as a number (see NanFlag).
  template <int Dtype>
  static V load_as(const void* p) {
    if constexpr (Dtype == kFloat32) {
      return _mm512_loadu_ps(p);
    } else if constexpr (Dtype == kBfloat16) {
      const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    } else if constexpr (Dtype == kFloat16) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    } else if constexpr (Dtype == kInt8) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
    } else {
      // s eeee mmm as fp16 s 0eeee mmm0000000: the same number with the exponent's bias 8 lower.
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
      const __m256i half =
          _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
      return _mm512_cvtph_ps(half);
    }
  }

  // Remembers whether any float8 byte it saw was NaN (0x7f or 0xff).
  struct NanFlag {
    __mmask64 found = 0;

    void line(const void* p) { see(_mm512_loadu_si512(p)); }
    void bytes(const char* p, int64_t n) {
      for (; n >= 64; n -= 64, p += 64) line(p);
      if (n > 0) see(_mm512_maskz_loadu_epi8(~0ull >> (64 - n), p));
    }
    bool any() const { return found != 0; }

   private:
    void see(__m512i line) {
      const __m512i magnitude = _mm512_set1_epi8(0x7f);
      found |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(line, magnitude), magnitude);
    }
  };
};

}  // namespace
}  // namespace protoken
