// What an instruction set offers: plain functions over raw pointers, one per dtype of the bank.
// Each set lives in a file of its own, compiled for it, and is chosen at run time (cpu_features.h).
#pragma once

#include <cstdint>

namespace protoken {

constexpr int64_t kDtypes = 5;
constexpr int64_t kChunkRows = 96;  // rows of a client's matrix per task: fixed, so that sums never depend on threads
constexpr int64_t kBlock = 256;     // columns that the panel form multiplies at once
constexpr int64_t kTileStride = kBlock + 16;  // of converted rows; not a power of two, or they would share cache sets
constexpr int64_t kRankMax = 64;              // ranks that one low-rank projection handles at once

// Some rows of one client's matrix, each contiguous, and the inputs in the two layouts the kernels read.
struct DenseChunk {
  const char* rows;    // the first row
  int64_t row_stride;  // bytes
  int64_t row_count;
  int64_t columns;     // I
  const float* scale;  // [row_count], or null
  int64_t tokens;      // T
  const float* x;      // dot form: [T, x_stride], zero beyond I; pairs: (I + 1) / 2 steps
  int64_t x_stride;
  const float* grad;  // dot form: [T, grad_stride], at the chunk's first row
  int64_t grad_stride;
  const float* x_panels;     // panel form: per block of tokens [I, width]; pairs: [(I + 1) / 2, width]
  const float* grad_panels;  // panel form: per block of tokens [all rows, width]
  int64_t first_row;         // of the chunk within grad_panels
  int64_t all_rows;
};

// One factor of a low-rank update as [rank, n]: element (j, i) at base + j * rank_stride + i * stride, in bytes.
// One of the two strides is the element size.
struct Factor {
  const char* base;
  int64_t rank_stride;
  int64_t stride;
  int64_t rank;
  int64_t n;
};

// A tile of m, and the same tile of several clients' matrices, whose rows are contiguous.
struct DotTile {
  const char* const* d;  // [clients]: the first row of each
  int64_t row_stride;    // bytes
  int64_t clients;
  int64_t rows, columns;
  const float* m;  // [rows, columns]
  int64_t m_stride;
  const float* scale;  // of client k and row o at k * scale_stride + o; or null
  int64_t scale_stride;
};

struct Kernels {
  const char* name;
  int64_t lanes;                // panels are padded to a multiple of this many tokens
  int64_t panel;                // tokens in a full panel
  int64_t dot_tokens[kDtypes];  // up to this many tokens the dot form is used

  // partial[t] = sum over the chunk's rows o of grad[t, o] scale[o] < row o, x[t] >. The dot form runs lanes along the
  // row and fits few tokens; the panel form runs lanes along the tokens. scratch: kChunkRows * kTileStride floats.
  void (*dense_dot[kDtypes])(const DenseChunk& chunk, float* partial, float* scratch);
  void (*dense_panel[kDtypes])(const DenseChunk& chunk, float* partial, float* scratch);

  // out[t, j] = sum_i factor[j, i] values[t, i]; values [tokens, stride] zero beyond n, out [tokens, rank].
  void (*project_dot[kDtypes])(const Factor& factor, const float* values, int64_t stride, int64_t tokens, float* out);
  // The same for several factors of one n, from panels: out[f][j, t] with padded tokens, the factors' rows one after
  // the other. scratch: (sum of ranks) * kTileStride floats.
  void (*project_panel[kDtypes])(const Factor* factors, int64_t count, const float* panels, int64_t tokens, float* out,
                                 float* scratch);

  // out[c] = sum over the tile's rows o of scale[c, o] < row o of d[c], row o of m >.
  void (*dot[kDtypes])(const DotTile& tile, double* out);

  // The same for tokens' vectors that bf16 holds exactly, on a processor that multiplies bf16 by bf16: two neighbouring
  // columns are one 32-bit step, the odd one the upper half. From pair_tokens tokens on, up to pair_dot_tokens in the
  // dot form; null where there is none.
  int64_t pair_tokens[kDtypes];
  int64_t pair_dot_tokens[kDtypes];
  void (*dense_dot_pairs[kDtypes])(const DenseChunk& chunk, float* partial, float* scratch);
  void (*dense_panel_pairs[kDtypes])(const DenseChunk& chunk, float* partial, float* scratch);
  void (*project_panel_pairs[kDtypes])(const Factor* factors, int64_t count, const float* panels, int64_t tokens,
                                       float* out, float* scratch);
};

// Tokens rounded up to whole lanes, and the width of the block of tokens that starts at `token`.
inline int64_t padded_tokens(const Kernels& kernels, int64_t tokens) {
  return (tokens + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();          // null where the compiler's target is not x86-64
const Kernels* avx512_kernels();        // likewise
const Kernels* avx512_bf16_kernels();   // likewise
const Kernels* amx_kernels();           // likewise
const Kernels* amx_emulated_kernels();  // AMX's layout on AVX-512 alone, for tests

}  // namespace protoken
