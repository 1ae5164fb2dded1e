// The kernels over pairs: two neighbouring columns as bf16 in 32 bits, multiplied and added in fp32 by one instruction.
// Nothing is rounded on the way there: the tokens' vectors are bf16 already (are_bf16), and bf16 holds every int8 and
// every float8. Subnormal numbers count as zero.
#pragma once

#include "lowrank_kernels.inc.h"

namespace protoken {
namespace {

struct Pairs {
  static constexpr int64_t kColumns = 2;
  static constexpr int kDotBlock = 8;
  static constexpr bool kInPlace = false;
  template <int Dtype>
  static constexpr bool stored = Dtype == kBfloat16;

  template <int Dtype>
  static V load(const char* p) {
    if constexpr (Dtype == kBfloat16) {
      return _mm512_loadu_ps(p);
    } else {
      const V low = Simd::load_as<Dtype>(p), high = Simd::load_as<Dtype>(p + W * item_size(Dtype));
      return reinterpret_cast<V>(_mm512_cvtne2ps_pbh(high, low));
    }
  }
  static V add(V value, V x, V sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(value), reinterpret_cast<__m512bh>(x));
  }

  // Rows of `rank` bf16, `stride` bytes apart, every two as `rank` steps; a row that is missing at the end is zero.
  static void interleave(float* dst, const char* rows, int64_t stride, int64_t count, int64_t rank) {
    int64_t i = 0;
    if (stride == rank * 2 && 16 % rank == 0) {
      const __m512i order = pairs_of_rows(rank);
      for (const int64_t lines = 32 / rank; i + lines <= count; i += lines) {
        const __m512i words = _mm512_loadu_si512(rows + i * stride);
        _mm512_storeu_si512(dst + i / 2 * rank, _mm512_permutexvar_epi16(order, words));
      }
    }
    for (; i < count; i += 2) {
      const char* even = rows + i * stride;
      for (int64_t j = 0; j < rank; j += W) {
        const __mmask16 lanes = static_cast<__mmask16>(rank - j < W ? (1u << (rank - j)) - 1 : 0xffff);
        const __mmask16 odd = i + 1 < count ? lanes : static_cast<__mmask16>(0);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even + j * 2));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, even + stride + j * 2));
        const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        _mm512_mask_storeu_epi32(dst + i / 2 * rank + j, lanes, both);
      }
    }
  }

 private:
  // Where the words of a line come from that holds whole pairs of rows.
  static __m512i pairs_of_rows(int64_t rank) {
    alignas(64) uint16_t order[2 * W];
    for (int64_t word = 0; word < 2 * W; ++word) {
      const int64_t pair = word / (2 * rank), within = word % (2 * rank);
      order[word] = static_cast<uint16_t>(pair * 2 * rank + within % 2 * rank + within / 2);
    }
    return _mm512_load_si512(order);
  }
};

template <int Dtype>
void use_pairs(Kernels& kernels, int64_t from, int64_t dot_tokens) {
  kernels.pair_tokens[Dtype] = from;
  kernels.pair_dot_tokens[Dtype] = dot_tokens;
  kernels.dense_dot_pairs[Dtype] = dense_dot<Dtype, Pairs>;
  kernels.dense_panel_pairs[Dtype] = dense_panel<Dtype, Pairs>;
}

// Other kernels with these for vectors that are bf16.
inline Kernels make_pair_kernels(const char* name, const Kernels& others) {
  Kernels kernels = others;
  kernels.name = name;
  use_pairs<kBfloat16>(kernels, 2, kPairTokens);
  // Narrower rows are converted once per pass of the dot form, which takes longer than a whole panel from here on.
  use_pairs<kInt8>(kernels, 4, 12);
  use_pairs<kFloat8E4M3>(kernels, 4, 12);
  kernels.project_panel_pairs[kBfloat16] = project_panel<kBfloat16, Pairs>;
  return kernels;
}

}  // namespace
}  // namespace protoken
