// client_scores of some rows, and inner products of whole matrices, written once over Simd; included by each
// instruction set's file after its Simd. Three forms:
//
//   dense_dot     up to kDotTokens = 16 tokens (fp32 on AVX2: 10): lanes run along the row. A register tile is R rows
//                 by TB tokens, with as many rows as registers hold (at most 8; for one token, which waits for memory
//                 alone, as many as make the fastest streams: Simd::kStreams). The R rows are not neighbours but R
//                 streams a step apart.
//   dense_panel   more: lanes run along the tokens, tiles of 8 rows by 3 vectors (AVX-512) or 6 by 2 (AVX2), over
//                 blocks of kBlock = 256 steps that are converted once for all tokens. A step is a column as fp32
//                 (Singles), or two neighbours as bf16 where the processor multiplies such pairs and the tokens'
//                 vectors are bf16 (Pairs, pair_kernels.inc.h). Rows that are stored as steps may be read where they
//                 lie.
//   dot           client_totals: up to 4 clients against one read of m, each in 4 running sums.
//
// How far ahead rows are prefetched is the instruction set's matter (rows_ahead): where the hardware's own streams end
// with every page it pays, elsewhere it takes a sixth of the speed.
#pragma once

#include "kernels.h"

namespace protoken {
namespace {

template <int N>
struct Count {
  static constexpr int value = N;
};

using V = Simd::V;
constexpr int W = Simd::W;
constexpr int kPanelWidth = W * Simd::kPanelVectors;

template <int Dtype>
constexpr float load_factor() {  // what load_as leaves out
  return Dtype == kFloat8E4M3 ? 256.0f : 1.0f;
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// The last n elements of a row, fewer than a vector of Steps holds, the lanes beyond them zero.
template <int Dtype, typename Steps>
inline V load_tail(const char* p, int64_t n) {
  alignas(64) char padded[W * 4] = {};
  static_assert(W * Steps::kColumns * item_size(Dtype) <= sizeof(padded), "a whole vector");
  std::memcpy(padded, p, static_cast<size_t>(n * item_size(Dtype)));
  return Steps::template load<Dtype>(padded);
}

// n contiguous elements as steps into dst, load_factor left out; a last step that is no whole one has zeros beyond.
template <int Dtype, typename Steps>
inline void convert_row(float* dst, const char* src, int64_t n) {
  constexpr int64_t columns = Steps::kColumns, size = item_size(Dtype);
  int64_t i = 0;
  for (; i + W * columns <= n; i += W * columns)
    Simd::store(dst + i / columns, Steps::template load<Dtype>(src + i * size));
  if (i < n) {
    alignas(64) float last[W];
    Simd::store(last, load_tail<Dtype, Steps>(src + i * size, n - i));
    std::memcpy(dst + i / columns, last, static_cast<size_t>((n - i + columns - 1) / columns) * sizeof(float));
  }
}

// What is multiplied in one step: a column as fp32.
struct Singles {
  static constexpr int64_t kColumns = 1;
  static constexpr int kDotBlock = W == 16 ? 6 : 4;  // tokens that one pass of the dot form takes
  static constexpr bool kInPlace = Simd::kPanelInPlace;
  template <int Dtype>
  static constexpr bool stored = Dtype == kFloat32;  // a row in memory is a row of steps

  template <int Dtype>
  static V load(const char* p) {
    return Simd::load_as<Dtype>(p);
  }
  static V add(V value, V x, V sum) { return Simd::fma(value, x, sum); }
};

// acc[j][t] += row j * x[t], lane by lane, over n columns. A turn takes one cache line of every row and fetches one
// `ahead` bytes further, if that is not 0.
template <typename Steps, int Dtype, int R, int TB>
inline __attribute__((always_inline)) void accumulate_dots(V (&acc)[R][TB], const char* rows, int64_t row_stride,
                                                           const float* x, int64_t x_stride, int64_t n, int64_t ahead,
                                                           Simd::NanFlag& nan) {
  constexpr int64_t size = item_size(Dtype) * Steps::kColumns;
  constexpr int U = W * size >= 64 ? 1 : 64 / (W * size);
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
    // What is fewer of the two stays in registers: all R + TB would not fit beside the sums.
    if constexpr (TB <= R) {
      V xs[TB];
#pragma GCC unroll 16
      for (int t = 0; t < TB; ++t) xs[t] = Simd::load(x + t * x_stride + i);
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        const V values = Steps::template load<Dtype>(rows + j * row_stride + i * size);
#pragma GCC unroll 16
        for (int t = 0; t < TB; ++t) acc[j][t] = Steps::add(values, xs[t], acc[j][t]);
      }
    } else {
      V values[R];
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) values[j] = Steps::template load<Dtype>(rows + j * row_stride + i * size);
#pragma GCC unroll 16
      for (int t = 0; t < TB; ++t) {
        const V xs = Simd::load(x + t * x_stride + i);
#pragma GCC unroll 16
        for (int j = 0; j < R; ++j) acc[j][t] = Steps::add(values[j], xs, acc[j][t]);
      }
    }
  };
  const int64_t whole = n / Steps::kColumns;
  int64_t i = 0;  // steps
  for (; i + U * W <= whole; i += U * W) {
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      if (ahead != 0) prefetch(rows + j * row_stride + i * size + ahead);
      if constexpr (Dtype == kFloat8E4M3) nan.line(rows + j * row_stride + i * size);
    }
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) add(i + u * W);
  }
  if constexpr (Dtype == kFloat8E4M3) {
    for (int j = 0; j < R; ++j) nan.bytes(rows + j * row_stride + i * size, n - i * Steps::kColumns);
  }
  for (; i + W <= whole; i += W) add(i);
  if (i * Steps::kColumns < n) {
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      const V values = load_tail<Dtype, Steps>(rows + j * row_stride + i * size, n - i * Steps::kColumns);
#pragma GCC unroll 16
      for (int t = 0; t < TB; ++t) acc[j][t] = Steps::add(values, Simd::load(x + t * x_stride + i), acc[j][t]);
    }
  }
}

// Rows row, row + step, ... row + (R - 1) step: R streams that each run on where the next tile begins, so that short
// rows are read as well as long ones.
template <typename Steps, int Dtype, int R, int TB>
void dense_dot_tile(const DenseChunk& c, int64_t row, int64_t step, int64_t column, int64_t n, int64_t token, V* sums,
                    Simd::NanFlag& nan) {
  V acc[R][TB];
  for (int j = 0; j < R; ++j) {
    for (int t = 0; t < TB; ++t) acc[j][t] = Simd::zero();
  }
  const char* rows = c.rows + row * c.row_stride + column * item_size(Dtype);
  constexpr int64_t ahead = Simd::rows_ahead(item_size(Dtype), R);
  const float* x = c.x + token * c.x_stride + column / Steps::kColumns;
  accumulate_dots<Steps, Dtype, R, TB>(acc, rows, step * c.row_stride, x, c.x_stride, n, ahead, nan);
  // A token's sum stays in a register while its rows join: this is a good part of the work where rows are short.
#pragma GCC unroll 16
  for (int t = 0; t < TB; ++t) {
    const float* grad = c.grad + (token + t) * c.grad_stride + row;
    V sum = sums[token + t];
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      const float weight = c.scale ? grad[j * step] * c.scale[row + j * step] : grad[j * step];
      sum = Simd::fma(acc[j][t], Simd::set1(weight), sum);
    }
    sums[token + t] = sum;
  }
}

// Rows of an accumulator tile for TB tokens: as many as the registers hold, at most `most`.
template <int TB>
constexpr int dot_rows(int most = 8) {
  return Simd::kDotRegisters / TB > most ? most : Simd::kDotRegisters / TB < 1 ? 1 : Simd::kDotRegisters / TB;
}

template <int Dtype, int TB>
constexpr int dot_streams() {
  return TB > 1 ? 8 : Dtype == kFloat32 ? Simd::kStreams : Simd::kNarrowStreams;
}

template <typename Steps, int Dtype, int TB, int R = dot_rows<TB>(dot_streams<Dtype, TB>())>
void dense_dot_block(const DenseChunk& c, int64_t row, int64_t row_end, int64_t column, int64_t n, int64_t token,
                     V* sums, Simd::NanFlag& nan) {
  const int64_t step = (row_end - row) / R;
  const int64_t last = row + step * R;
  for (int64_t end = row + step; row < end; ++row) {
    dense_dot_tile<Steps, Dtype, R, TB>(c, row, step, column, n, token, sums, nan);
  }
  if constexpr (R > 1) {
    if (last < row_end)
      dense_dot_block<Steps, Dtype, TB, (R > 8 ? 4 : 1)>(c, last, row_end, column, n, token, sums, nan);
  }
}

constexpr int64_t kDotTokens = 16;   // that the dot form is given, at most
constexpr int64_t kPairTokens = 32;  // the same of pairs

// The next `count` tokens, at most TB, in one pass.
template <int Dtype, typename Steps, int TB>
void dense_dot_pass(const DenseChunk& c, int64_t row, int64_t row_end, int64_t column, int64_t n, int64_t token,
                    int64_t count, V* sums, Simd::NanFlag& nan) {
  if (count == TB) return dense_dot_block<Steps, Dtype, TB>(c, row, row_end, column, n, token, sums, nan);
  if constexpr (TB > 1) {
    dense_dot_pass<Dtype, Steps, TB - 1>(c, row, row_end, column, n, token, count, sums, nan);
  }
}

template <int Dtype, typename Steps = Singles>
void dense_dot(const DenseChunk& c, float* partial, float*) {
  constexpr int64_t most = Steps::kDotBlock;
  V sums[Steps::kColumns == 2 ? kPairTokens : kDotTokens];
  for (int64_t t = 0; t < c.tokens; ++t) sums[t] = Simd::zero();
  // Columns per block: the tokens' values stay in the first-level cache while all rows of the chunk pass.
  const int64_t block = c.tokens == 1 ? c.columns : (4096 * Steps::kColumns / c.tokens) / 64 * 64;
  const int64_t group = c.tokens <= most ? c.row_count : 24;  // rows that every pass over tokens finds in cache
  Simd::NanFlag nan;
  for (int64_t column = 0; column < c.columns; column += block) {
    const int64_t n = column + block < c.columns ? block : c.columns - column;
    for (int64_t row = 0; row < c.row_count; row += group) {
      const int64_t row_end = row + group < c.row_count ? row + group : c.row_count;
      const int64_t passes = (c.tokens + most - 1) / most;
      for (int64_t pass = 0, token = 0; pass < passes; ++pass) {
        const int64_t next = (pass + 1) * c.tokens / passes;
        dense_dot_pass<Dtype, Steps, most>(c, row, row_end, column, n, token, next - token, sums, nan);
        token = next;
      }
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    partial[t] = nan.any() ? std::numeric_limits<float>::quiet_NaN() : Simd::sum(sums[t]) * load_factor<Dtype>();
  }
}

// Memory that a later step will read: pieces of 1 KiB, `stride` bytes apart.
struct Ahead {
  const char* base;
  int64_t stride;
};

// acc[j][v] += d(j, i) * panel[i] over n steps; d(j, i) = d[j * stride + i], or d[i * stride + j] when Adjacent.
// Stride, where not 0, is the stride known to the compiler. One line of `ahead` is fetched per step, if it Fetches.
template <typename Steps, int R, int NT, bool Adjacent, int64_t Stride = 0, bool Fetches = true>
inline __attribute__((always_inline)) void accumulate_panel(V (&acc)[R][NT], const float* d, int64_t given, int64_t n,
                                                            const float* panel, Ahead ahead) {
  const int64_t stride = Stride ? Stride : given;
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
    V xs[NT];
#pragma GCC unroll 4
    for (int v = 0; v < NT; ++v) xs[v] = Simd::load(panel + i * (NT * W) + v * W);
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      const V value = Simd::set1(Adjacent ? d[i * stride + j] : d[j * stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < NT; ++v) acc[j][v] = Steps::add(value, xs[v], acc[j][v]);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const char* line = ahead.base;
#pragma GCC unroll Simd::kPanelUnroll
    for (int64_t k = i; k < i + 16; ++k, line += 64) {
      if (Fetches) __builtin_prefetch(line, 0, 2);
      add(k);
    }
    ahead.base += ahead.stride;
  }
  for (; i < n; ++i) add(i);
}

template <typename Steps, int R, int NT, int64_t Stride>
void dense_panel_tile(const float* rows, int64_t stride, int64_t n, const float* x, const float* grad,
                      const float* scale, float* sums, Ahead ahead) {
  V acc[R][NT];
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < NT; ++v) acc[j][v] = Simd::zero();
  }
  accumulate_panel<Steps, R, NT, false, Stride>(acc, rows, stride, n, x, ahead);
#pragma GCC unroll 4
  for (int v = 0; v < NT; ++v) {
    V sum = Simd::load(sums + v * W);
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      const V weight = Simd::load(grad + j * (NT * W) + v * W);
      sum = Simd::fma(acc[j][v], scale ? Simd::mul(weight, Simd::set1(scale[j])) : weight, sum);
    }
    Simd::store(sums + v * W, sum);
  }
}

// Rows of an accumulator tile for NT vectors of tokens; a stride unknown to the compiler needs a pointer per row.
template <int NT, int64_t Stride>
constexpr int panel_rows() {
  if (Stride == 0) return Simd::kPanelRows;
  return Simd::kPanelRows * Simd::kPanelVectors / NT > 16 ? 16 : Simd::kPanelRows * Simd::kPanelVectors / NT;
}

// What a tile of rows fetches while it computes: its own next columns while the first tokens pass (not where rows are
// read in place, whose streams the hardware follows by itself), else its share of the next tokens' panel.
struct Fetch {
  const char* rows;  // the chunk's next columns, or null
  int64_t row_stride;
  const float* panel;  // the next panel, or null
  int64_t panel_bytes;

  Ahead tile(int64_t row, int64_t all_rows, const float* self) const {
    if (rows != nullptr) return {rows + row * row_stride, row_stride};
    if (panel == nullptr) return {reinterpret_cast<const char*>(self), 0};
    return {reinterpret_cast<const char*>(panel) + panel_bytes / 1024 * row / all_rows * 1024, 1024};
  }
};

template <typename Steps, int NT, int64_t Stride = kTileStride>
void dense_panel_rows(const DenseChunk& c, const float* rows, int64_t n, const float* x, const float* grad, float* sums,
                      const Fetch& fetch) {
  constexpr int R = panel_rows<NT, Stride>();
  const int64_t stride = Stride ? Stride : c.row_stride / static_cast<int64_t>(sizeof(float));
  int64_t row = 0;
  const auto step = [&](auto tile) {
    (void)tile;
    constexpr int count = decltype(tile)::value;
    dense_panel_tile<Steps, count, NT, Stride>(rows + row * stride, stride, n, x, grad + row * (NT * W),
                                               c.scale ? c.scale + row : nullptr, sums,
                                               fetch.tile(row, c.row_count, rows));
    row += count;
  };
  while (row + R <= c.row_count) step(Count<R>{});
  if (R > 8 && row + 8 <= c.row_count) step(Count<8>{});
  while (row + 4 <= c.row_count) step(Count<4>{});
  while (row < c.row_count) step(Count<1>{});
}

template <int Dtype, typename Steps = Singles>
void dense_panel(const DenseChunk& c, float* partial, float* scratch) {
  constexpr int64_t size = item_size(Dtype) * Steps::kColumns;
  const int64_t steps = (c.columns + Steps::kColumns - 1) / Steps::kColumns;
  const int64_t padded = (c.tokens + W - 1) / W * W;
  for (int64_t t = 0; t < padded; ++t) partial[t] = 0.0f;
  Simd::NanFlag nan;
  // Rows are read where they lie, unless several panels would find them in a few sets of the cache, since they are
  // whole pages apart, or they are no whole number of steps.
  constexpr bool may_stay = Steps::kInPlace && Steps::template stored<Dtype>;
  const bool whole = c.columns % Steps::kColumns == 0 && c.row_stride % static_cast<int64_t>(sizeof(float)) == 0;
  const bool in_place = may_stay && whole && (padded == kPanelWidth || c.row_stride % 4096 != 0);
  for (int64_t column = 0; column < steps; column += kBlock) {
    const int64_t n = column + kBlock < steps ? kBlock : steps - column;
    const char* source = c.rows + column * size;
    const int64_t left = c.columns - column * Steps::kColumns;
    const int64_t elements = n * Steps::kColumns < left ? n * Steps::kColumns : left;
    for (int64_t o = 0; o < c.row_count && !in_place; ++o) {
      if constexpr (Dtype == kFloat8E4M3) {
        nan.bytes(source + o * c.row_stride, elements);
      }
      convert_row<Dtype, Steps>(scratch + o * kTileStride, source + o * c.row_stride, elements);
    }
    for (int64_t token = 0; token < padded; token += kPanelWidth) {
      const int64_t width = padded - token < kPanelWidth ? padded - token : kPanelWidth;
      const float* x = c.x_panels + token * steps + column * width;
      const float* grad = c.grad_panels + token * c.all_rows + c.first_row * width;
      Fetch fetch{nullptr, c.row_stride, nullptr, 0};
      if (!in_place && token == 0 && column + n < steps) {
        fetch.rows = source + n * size;
      } else if (token + width < padded) {
        fetch.panel = x + width * steps;
        fetch.panel_bytes = n * width * static_cast<int64_t>(sizeof(float));
      }
      if constexpr (may_stay) {
        const float* rows = reinterpret_cast<const float*>(source);
        if (in_place && width == kPanelWidth) {
          dense_panel_rows<Steps, Simd::kPanelVectors, 0>(c, rows, n, x, grad, partial + token, fetch);
          continue;
        }
        if (in_place && width == W) {
          dense_panel_rows<Steps, 1, 0>(c, rows, n, x, grad, partial + token, fetch);
          continue;
        }
      }
      switch (width / W) {
        case 1: dense_panel_rows<Steps, 1>(c, scratch, n, x, grad, partial + token, fetch); break;
        case 2: dense_panel_rows<Steps, 2>(c, scratch, n, x, grad, partial + token, fetch); break;
        default: dense_panel_rows<Steps, Simd::kPanelVectors>(c, scratch, n, x, grad, partial + token, fetch); break;
      }
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    partial[t] = nan.any() ? std::numeric_limits<float>::quiet_NaN() : partial[t] * load_factor<Dtype>();
  }
}

// acc[c][u] += < piece u of d[c], piece u of m >, for U pieces side by side: R * U streams of memory keep more of it
// under way than R. Returns how far they reach; n must be the same for every group of clients, so that their bits are.
template <int Dtype, int R, int U>
int64_t dot_pieces(V (&acc)[R][U], const char* const* d, const float* m, int64_t n) {
  constexpr int64_t size = item_size(Dtype);
  constexpr int64_t line = W * size >= 64 ? W : 64 / size;
  const int64_t piece = n / U / line * line;
  for (int64_t i = 0; i < piece; i += line) {
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) prefetch(d[c] + (i + u * piece) * size + 512);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int64_t v = i + u * piece; v < i + u * piece + line; v += W) {
        const V values = Simd::load(m + v);
#pragma GCC unroll 4
        for (int c = 0; c < R; ++c) acc[c][u] = Simd::fma(Simd::load_as<Dtype>(d[c] + v * size), values, acc[c][u]);
      }
    }
  }
  return piece * U;
}

// acc[c][u] += the products of n neighbours of d[c] and m, for R clients at once: one read of m for all.
template <int Dtype, int R, int U>
inline __attribute__((always_inline)) void dot_row(V (&acc)[R][U], Simd::NanFlag (&nan)[R], const char* const* d,
                                                   const float* m, int64_t n) {
  constexpr int64_t size = item_size(Dtype);
  constexpr int64_t lines = U * W * size / 64 > 0 ? U * W * size / 64 : 1;
  int64_t i = 0;
  if constexpr (size > 1 && Simd::kDotPieces) {
    if (n * size >= 8192) i = dot_pieces<Dtype, R, U>(acc, d, m, n);
  }
  for (; i + U * W <= n; i += U * W) {
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      const char* p = d[c] + i * size;
#pragma GCC unroll 4
      for (int64_t line = 0; line < lines; ++line) {
        prefetch(p + Simd::kDotAhead + line * 64);
        if (Dtype == kFloat8E4M3 && U * W * size >= 64) nan[c].line(p + line * 64);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const V values = Simd::load(m + i + u * W);
#pragma GCC unroll 4
      for (int c = 0; c < R; ++c) {
        acc[c][u] = Simd::fma(Simd::load_as<Dtype>(d[c] + (i + u * W) * size), values, acc[c][u]);
      }
    }
  }
  [[maybe_unused]] const int64_t whole = U * W * size >= 64 ? i : 0;
  for (; i + W <= n; i += W) {
    const V values = Simd::load(m + i);
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) acc[c][0] = Simd::fma(Simd::load_as<Dtype>(d[c] + i * size), values, acc[c][0]);
  }
  if (i < n) {
    alignas(64) float last[W] = {};
    std::memcpy(last, m + i, static_cast<size_t>(n - i) * sizeof(float));
    const V values = Simd::load(last);
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      acc[c][0] = Simd::fma(load_tail<Dtype, Singles>(d[c] + i * size, n - i), values, acc[c][0]);
    }
  }
  if constexpr (Dtype == kFloat8E4M3) {
    for (int c = 0; c < R; ++c) nan[c].bytes(d[c] + whole, n - whole);
  }
}

// Clients first ... first + R - 1 of a tile. Each has four running sums of its own: who stands beside it changes no
// bit. A row's sums are weighed lane by lane and joined at the end of the tile, not of the row, of which short ones
// would take more to join than to multiply.
template <int Dtype, int R>
void dot_clients(const DotTile& tile, int64_t first, double* out) {
  constexpr int U = 4;
  V totals[R];
  Simd::NanFlag nan[R];
  const char* d[R];
#pragma GCC unroll 4
  for (int c = 0; c < R; ++c) {
    totals[c] = Simd::zero();
    d[c] = tile.d[first + c];
  }
  for (int64_t o = 0; o < tile.rows; ++o) {
    V acc[R][U];
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) acc[c][u] = Simd::zero();
    }
    dot_row<Dtype, R, U>(acc, nan, d, tile.m + o * tile.m_stride, tile.columns);
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      const float scale = tile.scale ? tile.scale[(first + c) * tile.scale_stride + o] : 1.0f;
      const V sum = Simd::add(Simd::add(acc[c][0], acc[c][1]), Simd::add(acc[c][2], acc[c][3]));
      totals[c] = Simd::fma(sum, Simd::set1(scale), totals[c]);
      d[c] += tile.row_stride;
    }
  }
  for (int c = 0; c < R; ++c) {
    out[first + c] = nan[c].any() ? std::numeric_limits<double>::quiet_NaN()
                                  : static_cast<double>(Simd::sum(totals[c])) * load_factor<Dtype>();
  }
}

template <int Dtype>
void dot(const DotTile& tile, double* out) {
  constexpr int R = Simd::kDotRegisters / 4 > 4 ? 4 : Simd::kDotRegisters / 4;
  // Groups of nearly one size: a client that is read alone leaves half of the bandwidth unused.
  const int64_t groups = (tile.clients + R - 1) / R;
  for (int64_t g = 0, c = 0; g < groups; ++g) {
    const int64_t end = (g + 1) * tile.clients / groups;
    switch (end - c) {
      case 1: dot_clients<Dtype, 1>(tile, c, out); break;
      case 2: dot_clients<Dtype, 2>(tile, c, out); break;
      case 3: dot_clients<Dtype, (R < 3 ? R : 3)>(tile, c, out); break;
      default: dot_clients<Dtype, R>(tile, c, out);
    }
    c = end;
  }
}

}  // namespace
}  // namespace protoken
