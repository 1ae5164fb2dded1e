// The panel form of client_scores for a bf16 bank on 16 x 64 byte tiles, written once over Tiles: the processor's own
// (kernels_amx.cpp) or their emulation (kernels_amx_emulated.cpp), which lets every machine test the layout.
//
// Tiles multiply bf16 by bf16 and add in fp32. The bank is bf16 already; an fp32 x is the exact sum of three bf16 terms
// (8 bits each), so nothing is lost. Terms that are all zero, as for an x that was bf16, are left out.
#pragma once

#include "simd_avx512.h"

#include "dense_kernels.inc.h"

namespace protoken {
namespace {

constexpr int64_t kTile = 16;   // rows of a tile; fp32 columns of a sum
constexpr int64_t kDepth = 32;  // bf16 columns of a tile of the bank
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSteps = kBlock / kDepth;
constexpr int64_t kPad = kBlock * 2 + 64;  // bytes between rows of a padded copy of the bank

struct AmxScratch {
  uint32_t x[3][2][kSteps][kTile][kTile];  // per term, 16 tokens and step: rows of pairs (2 columns) x tokens
  char rows[2 * kTile * kPad];             // rows of the bank that do not fill tiles, zero beyond
  float sums[4][kTile][kTile];
};
static_assert(sizeof(AmxScratch) + 64 <= kChunkRows * kTileStride * sizeof(float), "fits the kernels' scratch");

// Columns [0, n) of 16 tokens as three terms in the tiles' order; returns which terms hold something (bits 0 to 2).
inline unsigned split_tokens(const float* x, int64_t width, int64_t n, int64_t half, AmxScratch& scratch) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512i seen[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t pair = 0; pair < kBlock / 2; ++pair) {
    __m512i word[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t odd = 0; odd < 2; ++odd) {
      const int64_t i = 2 * pair + odd;
      if (i >= n) continue;
      __m512 rest = _mm512_loadu_ps(x + i * width);
      // Infinity and NaN are a first term of their own: their rest would be NaN.
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(rest), infinity, _CMP_LT_OQ);
      const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
      for (int term = 0; term < 3; ++term) {
        __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), high);
        if (term == 0) bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x00400000));
        seen[term] = _mm512_or_si512(seen[term], bits);
        word[term] = _mm512_or_si512(word[term], odd ? bits : _mm512_srli_epi32(bits, 16));
        rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(bits));
      }
    }
    for (int term = 0; term < 3; ++term) {
      _mm512_store_si512(scratch.x[term][half][pair / kTile][pair % kTile], word[term]);
    }
  }
  unsigned terms = 0;
  for (int term = 0; term < 3; ++term) {
    // Zero of either sign: the sign bit does not count.
    const __m512i magnitude = _mm512_and_si512(seen[term], _mm512_set1_epi32(0x7fffffff));
    terms |= (_mm512_test_epi32_mask(magnitude, magnitude) != 0 ? 1u : 0u) << term;
  }
  return terms;
}

// Up to 32 rows of the bank whose tiles can be loaded: where they lie when they fill tiles, else a padded copy.
struct TileRows {
  const char* base;
  int64_t stride;
};

inline TileRows tile_rows(const DenseChunk& c, int64_t row, int64_t column, int64_t n, AmxScratch& scratch) {
  const char* source = c.rows + row * c.row_stride + column * 2;
  if (row + 2 * kTile <= c.row_count && n % kDepth == 0) return {source, c.row_stride};
  std::memset(scratch.rows, 0, sizeof(scratch.rows));
  const int64_t count = c.row_count - row < 2 * kTile ? c.row_count - row : 2 * kTile;
  for (int64_t o = 0; o < count; ++o) {
    std::memcpy(scratch.rows + o * kPad, source + o * c.row_stride, static_cast<size_t>(n * 2));
  }
  return {scratch.rows, kPad};
}

// sums[2 a + h] = rows [16 a, 16 a + 16) times tokens [16 h, 16 h + 16).
template <typename Tiles>
void multiply_tiles(const TileRows& rows, int64_t steps, unsigned terms, AmxScratch& scratch) {
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  Tiles::template zero<2>();
  Tiles::template zero<3>();
  for (int64_t step = 0; step < steps; ++step) {
    Tiles::template load<4>(rows.base + step * 64, rows.stride);
    Tiles::template load<5>(rows.base + kTile * rows.stride + step * 64, rows.stride);
    for (int term = 0; term < 3; ++term) {
      if ((terms >> term & 1u) == 0) continue;
      Tiles::template load<6>(scratch.x[term][0][step], 64);
      Tiles::template load<7>(scratch.x[term][1][step], 64);
      Tiles::template add_products<0, 4, 6>();
      Tiles::template add_products<1, 4, 7>();
      Tiles::template add_products<2, 5, 6>();
      Tiles::template add_products<3, 5, 7>();
    }
  }
  Tiles::template store<0>(scratch.sums[0], 64);
  Tiles::template store<1>(scratch.sums[1], 64);
  Tiles::template store<2>(scratch.sums[2], 64);
  Tiles::template store<3>(scratch.sums[3], 64);
}

// Where 16 tokens stand in panels: [columns, width] per block of kPanelWidth tokens.
struct Lane {
  int64_t panel;  // first token of the block
  int64_t width;
  int64_t offset;

  static Lane of(int64_t token, int64_t padded) {
    const int64_t panel = token / kPanelWidth * kPanelWidth;
    const int64_t width = padded - panel < kPanelWidth ? padded - panel : kPanelWidth;
    return {panel, width, token - panel};
  }
};

template <typename Tiles>
void dense_panel_tiles(const DenseChunk& c, float* partial, float* scratch_floats) {
  auto& scratch = *reinterpret_cast<AmxScratch*>((reinterpret_cast<uintptr_t>(scratch_floats) + 63) / 64 * 64);
  const int64_t padded = (c.tokens + W - 1) / W * W;
  for (int64_t t = 0; t < padded; ++t) partial[t] = 0.0f;
  Tiles::configure();
  for (int64_t column = 0; column < c.columns; column += kBlock) {
    const int64_t n = column + kBlock < c.columns ? kBlock : c.columns - column;
    const int64_t steps = (n + kDepth - 1) / kDepth;
    for (int64_t token = 0; token < padded; token += 2 * kTile) {
      const int64_t halves = token + kTile < padded ? 2 : 1;
      unsigned terms = 0;
      for (int64_t half = 0; half < 2; ++half) {
        // A half that is not there repeats the first one; its sums are not read.
        const Lane lane = Lane::of(token + (half < halves ? half : 0) * kTile, padded);
        const float* x = c.x_panels + lane.panel * c.columns + column * lane.width + lane.offset;
        terms |= split_tokens(x, lane.width, n, half, scratch);
      }
      for (int64_t row = 0; row < c.row_count; row += 2 * kTile) {
        multiply_tiles<Tiles>(tile_rows(c, row, column, n, scratch), steps, terms, scratch);
        for (int64_t half = 0; half < halves; ++half) {
          const Lane lane = Lane::of(token + half * kTile, padded);
          const float* grad = c.grad_panels + lane.panel * c.all_rows + c.first_row * lane.width + lane.offset;
          V sum = Simd::load(partial + token + half * kTile);
          for (int64_t o = row; o < row + 2 * kTile && o < c.row_count; ++o) {
            const V product = Simd::load(scratch.sums[2 * ((o - row) / kTile) + half][(o - row) % kTile]);
            sum = Simd::fma(product, Simd::load(grad + o * lane.width), sum);
          }
          Simd::store(partial + token + half * kTile, sum);
        }
      }
    }
  }
  Tiles::release();
}

// Other kernels with this panel form for bf16.
template <typename Tiles>
Kernels make_amx_kernels(const char* name, const Kernels& others) {
  Kernels kernels = others;
  kernels.name = name;
  kernels.dense_panel[kBfloat16] = dense_panel_tiles<Tiles>;
  kernels.dense_panel_pairs[kBfloat16] = nullptr;
  kernels.pair_dot_tokens[kBfloat16] = 8;
  kernels.dot_tokens[kBfloat16] = 8;
  return kernels;
}

}  // namespace
}  // namespace protoken
