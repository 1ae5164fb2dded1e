// Projections of the tokens onto the factors of a low-rank update, written once over Simd. By how the factor lies:
//
//   project_rows    few tokens, n contiguous: rows of the factor like the rows of a dense matrix
//   project_lanes   few tokens, ranks adjacent (B as [O, r]): lanes run along the rank
//   project_run     the same with 4 or 8 ranks: a vector holds several n, the tokens' values are spread over its lanes
//   project_panel   many tokens: lanes along the tokens, several clients' factors against one panel
#pragma once

#include "dense_kernels.inc.h"

namespace protoken {
namespace {

// --- few tokens: rows of the factor contiguous, lanes along n -------------------------------------------------------

template <int Dtype, int R, int TB>
void project_rows_tile(const Factor& f, int64_t row, int64_t column, int64_t n, const float* values, int64_t stride,
                       float* out) {
  V acc[R][TB];
  for (int j = 0; j < R; ++j) {
    for (int t = 0; t < TB; ++t) acc[j][t] = Simd::zero();
  }
  Simd::NanFlag nan;  // of float8 only, which no factor is
  const char* rows = f.base + row * f.rank_stride + column * item_size(Dtype);
  // Short factors: the same columns of the next client's rows, which mostly lie there.
  const int64_t ahead = n * item_size(Dtype) <= 8192 ? R * f.rank_stride : 1024;
  accumulate_dots<Singles, Dtype, R, TB>(acc, rows, f.rank_stride, values + column, stride, n, ahead, nan);
  for (int j = 0; j < R; ++j) {
    for (int t = 0; t < TB; ++t) out[t * f.rank + row + j] += Simd::sum(acc[j][t]);
  }
}

template <int Dtype, int TB>
void project_rows(const Factor& f, const float* values, int64_t stride, float* out) {
  constexpr int R = dot_rows<TB>();
  constexpr int64_t block = 4096;
  for (int64_t column = 0; column < f.n; column += block) {
    const int64_t n = column + block < f.n ? block : f.n - column;
    int64_t row = 0;
    for (; row + R <= f.rank; row += R) project_rows_tile<Dtype, R, TB>(f, row, column, n, values, stride, out);
    for (; row < f.rank; ++row) project_rows_tile<Dtype, 1, TB>(f, row, column, n, values, stride, out);
  }
}

// --- few tokens: ranks adjacent in memory, lanes along the rank ------------------------------------------------------

// out[t, rank0 + lane] += sum_i factor[rank0 + lane, i] values[t, i] for RV vectors of lanes, i in [first, last).
template <int Dtype, int TB, int RV>
void project_lanes_tile(const Factor& f, int64_t rank0, int64_t first, int64_t last, const float* values,
                        int64_t stride, float* out) {
  constexpr int U = TB * RV >= 4 ? 1 : TB * RV >= 2 ? 2 : 4;  // independent sums that hide the latency of the adds
  constexpr int64_t size = item_size(Dtype);
  const int64_t ranks = f.rank - rank0 < RV * W ? f.rank - rank0 : RV * W;
  const char* base = f.base + rank0 * size;
  // Full vectors may run over a row's end into the next row, but never over the factor's end.
  const char* end = f.base + (f.n - 1) * f.stride + f.rank * size;
  int64_t safe = last;
  while (safe > first && base + (safe - 1) * f.stride + RV * W * size > end) --safe;
  V acc[U][TB][RV];
  for (int u = 0; u < U; ++u) {
    for (int t = 0; t < TB; ++t) {
      for (int v = 0; v < RV; ++v) acc[u][t][v] = Simd::zero();
    }
  }
  const auto add = [&](int u, int64_t i, const char* p) {
    V lanes[RV];
    for (int v = 0; v < RV; ++v) lanes[v] = Simd::load_as<Dtype>(p + v * W * size);
    for (int t = 0; t < TB; ++t) {
      const V value = Simd::set1(values[t * stride + i]);
      for (int v = 0; v < RV; ++v) acc[u][t][v] = Simd::fma(value, lanes[v], acc[u][t][v]);
    }
  };
  int64_t i = first;
  for (; i + U <= safe; i += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const char* p = base + (i + u) * f.stride;
      prefetch(p + 1024);
      add(u, i + u, p);
    }
  }
  for (; i < safe; ++i) add(0, i, base + i * f.stride);
  for (; i < last; ++i) {
    alignas(64) char padded[RV * W * 4] = {};
    std::memcpy(padded, base + i * f.stride, static_cast<size_t>(ranks * size));
    add(0, i, padded);
  }
  for (int t = 0; t < TB; ++t) {
    alignas(64) float lanes[RV * W];
    for (int v = 0; v < RV; ++v) {
      V sum = acc[0][t][v];
      for (int u = 1; u < U; ++u) sum = Simd::add(sum, acc[u][t][v]);
      Simd::store(lanes + v * W, sum);
    }
    for (int64_t j = 0; j < ranks; ++j) out[t * f.rank + rank0 + j] += lanes[j];
  }
}

// The same where the ranks fill a part of a vector and the next i follows at once: the factor is one run of memory, of
// which a vector holds W / Rank neighbouring i. It is read as up to 8 streams side by side.
template <int Dtype, int TB, int Rank>
void project_run(const Factor& f, int64_t first, int64_t last, const float* values, int64_t stride, float* out) {
  constexpr int P = TB == 1 ? 8 : TB == 2 ? 4 : 2;
  constexpr int64_t size = item_size(Dtype);
  const char* base = f.base + first * Rank * size;
  values += first;
  V acc[TB][P];
#pragma GCC unroll 4
  for (int t = 0; t < TB; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[t][p] = Simd::zero();
  }
  // W numbers i of each of `count` pieces from `at` on, `piece` apart.
  const auto add = [&](auto count, int64_t at, int64_t piece, const char* data) __attribute__((always_inline)) {
    const char* ahead = base + at * Rank * size + 512;
    constexpr int pieces = decltype(count)::value;
    V xs[TB][pieces];
#pragma GCC unroll 4
    for (int t = 0; t < TB; ++t) {
#pragma GCC unroll 8
      for (int p = 0; p < pieces; ++p) xs[t][p] = Simd::load(values + t * stride + at + p * piece);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Rank; ++q) {
#pragma GCC unroll 8
      for (int p = 0; p < pieces; ++p) {
        const int64_t offset = (p * piece * Rank + q * W) * size;
        if (q * W * size % 64 == 0) prefetch(ahead + offset);
        const V ranks = Simd::load_as<Dtype>(data + offset);
#pragma GCC unroll 4
        for (int t = 0; t < TB; ++t) {
          acc[t][p] = Simd::fma(Simd::spread<Rank>(xs[t][p], q * (W / Rank)), ranks, acc[t][p]);
        }
      }
    }
  };
  const int64_t n = last - first;
  const int64_t piece = n / P / W * W;
  for (int64_t i = 0; i < piece; i += W) add(Count<P>{}, i, piece, base + i * Rank * size);
  int64_t i = piece * P;
  const int64_t half = (n - i) / 2 / W * W;
  for (const int64_t end = i + half; i < end; i += W) add(Count<2>{}, i, half, base + i * Rank * size);
  for (i += half; i + W <= n; i += W) add(Count<1>{}, i, 0, base + i * Rank * size);
  if (i < n) {
    alignas(64) char padded[Rank * W * 4] = {};
    std::memcpy(padded, base + i * Rank * size, static_cast<size_t>((n - i) * Rank * size));
    add(Count<1>{}, i, 0, padded);
  }
  for (int t = 0; t < TB; ++t) {
    alignas(64) float lanes[W];
    V sum = acc[t][0];
    for (int p = 1; p < P; ++p) sum = Simd::add(sum, acc[t][p]);
    Simd::store(lanes, sum);
    for (int j = 0; j < W; ++j) out[t * Rank + j % Rank] += lanes[j];
  }
}

template <int Dtype, int TB>
void project_lanes(const Factor& f, int64_t first, int64_t last, const float* values, int64_t stride, float* out) {
  const bool run = f.stride == f.rank * item_size(Dtype);
  if constexpr (W > 8) {
    if (run && f.rank == 8) return project_run<Dtype, TB, 8>(f, first, last, values, stride, out);
  }
  if constexpr (W > 4) {
    if (run && f.rank == 4) return project_run<Dtype, TB, 4>(f, first, last, values, stride, out);
  }
  constexpr int RV = W == 16 ? 4 : 2;
  int64_t rank0 = 0;
  for (; f.rank - rank0 > W; rank0 += RV * W) {
    if (f.rank - rank0 > 2 * W) {
      project_lanes_tile<Dtype, TB, RV>(f, rank0, first, last, values, stride, out);
    } else {
      project_lanes_tile<Dtype, TB, 2>(f, rank0, first, last, values, stride, out);
    }
  }
  if (rank0 < f.rank) project_lanes_tile<Dtype, TB, 1>(f, rank0, first, last, values, stride, out);
}

template <int Dtype>
void project_dot(const Factor& f, const float* values, int64_t stride, int64_t tokens, float* out) {
  for (int64_t e = 0; e < tokens * f.rank; ++e) out[e] = 0.0f;
  const bool rows = f.stride == item_size(Dtype);
  // A block of n stays in cache while all tokens pass.
  const int64_t block = rows ? f.n : ((64 << 10) / (f.stride > 0 ? f.stride : 1) / 16 + 1) * 16;
  for (int64_t first = 0; first < f.n; first += block) {
    const int64_t last = first + block < f.n ? first + block : f.n;
    for (int64_t token = 0; token < tokens; token += 4) {
      const float* v = values + token * stride;
      float* o = out + token * f.rank;
      switch (tokens - token) {
        case 1:
          rows ? project_rows<Dtype, 1>(f, v, stride, o) : project_lanes<Dtype, 1>(f, first, last, v, stride, o);
          break;
        case 2:
          rows ? project_rows<Dtype, 2>(f, v, stride, o) : project_lanes<Dtype, 2>(f, first, last, v, stride, o);
          break;
        case 3:
          rows ? project_rows<Dtype, 3>(f, v, stride, o) : project_lanes<Dtype, 3>(f, first, last, v, stride, o);
          break;
        default: rows ? project_rows<Dtype, 4>(f, v, stride, o) : project_lanes<Dtype, 4>(f, first, last, v, stride, o);
      }
    }
  }
}

// --- many tokens: lanes along the tokens -----------------------------------------------------------------------------

template <typename Steps, int R, int NT, bool Adjacent>
void project_panel_tile(const float* d, int64_t stride, int64_t n, const float* panel, float* out, int64_t padded) {
  V acc[R][NT];
  for (int j = 0; j < R; ++j) {
    for (int v = 0; v < NT; ++v) acc[j][v] = Simd::load(out + j * padded + v * W);
  }
  accumulate_panel<Steps, R, NT, Adjacent, 0, false>(acc, d, stride, n, panel, {});
  for (int j = 0; j < R; ++j) {
    for (int v = 0; v < NT; ++v) Simd::store(out + j * padded + v * W, acc[j][v]);
  }
}

template <typename Steps, int NT, bool Adjacent>
void project_panel_ranks(const float* d, int64_t stride, int64_t rank, int64_t n, const float* panel, float* out,
                         int64_t padded) {
  constexpr int R = Simd::kPanelRows;
  static_assert(R <= 8, "the cases below");
  // Tiles of nearly one size: one of two rows has too few sums to hide the latency of an addition.
  const int64_t tiles = (rank + R - 1) / R;
  for (int64_t tile = 0, j = 0; tile < tiles; ++tile) {
    const int64_t end = (tile + 1) * rank / tiles;
    const float* rows = d + (Adjacent ? j : j * stride);
    const auto step = [&](auto count) {
      constexpr int most = decltype(count)::value;
      project_panel_tile<Steps, (most < R ? most : R), NT, Adjacent>(rows, stride, n, panel, out + j * padded, padded);
    };
    switch (end - j) {
      case 1: step(Count<1>{}); break;
      case 2: step(Count<2>{}); break;
      case 3: step(Count<3>{}); break;
      case 4: step(Count<4>{}); break;
      case 5: step(Count<5>{}); break;
      case 6: step(Count<6>{}); break;
      case 7: step(Count<7>{}); break;
      default: step(Count<8>{}); break;
    }
    j = end;
  }
}

struct Tile {
  const float* data;
  int64_t stride;
  bool adjacent;
};

// Steps [column, column + n) of a factor: where it lies when that is how it is stored, put into scratch otherwise.
template <int Dtype, typename Steps>
Tile factor_tile(const Factor& f, int64_t column, int64_t n, float* scratch) {
  constexpr int64_t size = item_size(Dtype), step = size * Steps::kColumns;
  const bool adjacent = f.stride != size;
  const char* source = f.base + column * Steps::kColumns * f.stride;
  const int64_t left = f.n - column * Steps::kColumns;
  const int64_t elements = n * Steps::kColumns < left ? n * Steps::kColumns : left;
  if constexpr (Steps::template stored<Dtype>) {
    const bool rows =
        elements == n * Steps::kColumns && (reinterpret_cast<uintptr_t>(source) | f.rank_stride) % step == 0;
    if (!adjacent && rows) return {reinterpret_cast<const float*>(source), f.rank_stride / step, false};
  }
  if constexpr (Dtype == kFloat32) {
    return {reinterpret_cast<const float*>(source), f.stride / size, true};
  }
  if (!adjacent) {
    for (int64_t j = 0; j < f.rank; ++j) {
      convert_row<Dtype, Steps>(scratch + j * kTileStride, source + j * f.rank_stride, elements);
    }
    return {scratch, kTileStride, false};
  }
  if constexpr (Steps::kColumns == 2) {
    Steps::interleave(scratch, source, f.stride, elements, f.rank);
  } else if (f.stride == f.rank * size) {
    convert_row<Dtype, Steps>(scratch, source, n * f.rank);
  } else {
    for (int64_t i = 0; i < n; ++i) convert_row<Dtype, Steps>(scratch + i * f.rank, source + i * f.stride, f.rank);
  }
  return {scratch, f.rank, true};
}

// From here on narrow factors are put into rows of one tile first; for fewer tokens that takes longer than it saves.
constexpr int64_t kGatherTokens = 128;

// Whether the ranks of a factor by itself make too few sums to hide the latency of an addition.
inline bool narrow(const Factor& f) { return f.rank * Simd::kPanelVectors < 8; }

// Steps [column, column + n) of the narrow factors that come first, as rows of one tile; returns how many these are.
template <int Dtype, typename Steps>
int64_t gather_narrow(const Factor* factors, int64_t count, int64_t column, int64_t n, float* rows) {
  static_assert(Simd::kPanelVectors >= 2, "a narrow factor has at most 3 ranks");
  alignas(64) float own[3 * kTileStride];
  int64_t f = 0;
  for (; f < count && narrow(factors[f]); ++f) {
    const Tile tile = factor_tile<Dtype, Steps>(factors[f], column, n, own);
    for (int64_t j = 0; j < factors[f].rank; ++j, rows += kTileStride) {
      const float* from = tile.data + (tile.adjacent ? j : j * tile.stride);
      const int64_t step = tile.adjacent ? tile.stride : 1;
      for (int64_t i = 0; i < n; ++i) rows[i] = from[i * step];
    }
  }
  return f;
}

template <typename Steps, int NT>
void project_tile(const Tile& tile, int64_t rank, int64_t n, const float* panel, float* out, int64_t padded) {
  if (tile.adjacent) {
    project_panel_ranks<Steps, NT, true>(tile.data, tile.stride, rank, n, panel, out, padded);
  } else {
    project_panel_ranks<Steps, NT, false>(tile.data, tile.stride, rank, n, panel, out, padded);
  }
}

template <int Dtype, typename Steps = Singles>
void project_panel(const Factor* factors, int64_t count, const float* panels, int64_t tokens, float* out,
                   float* scratch) {
  const int64_t padded = (tokens + W - 1) / W * W;
  const int64_t steps = (factors[0].n + Steps::kColumns - 1) / Steps::kColumns;
  int64_t ranks = 0;
  for (int64_t f = 0; f < count; ++f) ranks += factors[f].rank;
  for (int64_t e = 0; e < ranks * padded; ++e) out[e] = 0.0f;
  for (int64_t column = 0; column < steps; column += kBlock) {
    const int64_t n = column + kBlock < steps ? kBlock : steps - column;
    int64_t row = 0;
    for (int64_t f = 0; f < count;) {
      const bool gathered = padded >= kGatherTokens && narrow(factors[f]);
      const int64_t end = f + (gathered ? gather_narrow<Dtype, Steps>(factors + f, count - f, column, n, scratch) : 1);
      const Tile tile =
          gathered ? Tile{scratch, kTileStride, false} : factor_tile<Dtype, Steps>(factors[f], column, n, scratch);
      int64_t rank = 0;
      for (; f < end; ++f) rank += factors[f].rank;
      for (int64_t token = 0; token < padded; token += kPanelWidth) {
        const int64_t width = padded - token < kPanelWidth ? padded - token : kPanelWidth;
        const float* panel = panels + token * steps + column * width;
        float* o = out + row * padded + token;
        switch (width / W) {
          case 1: project_tile<Steps, 1>(tile, rank, n, panel, o, padded); break;
          case 2: project_tile<Steps, 2>(tile, rank, n, panel, o, padded); break;
          default: project_tile<Steps, Simd::kPanelVectors>(tile, rank, n, panel, o, padded); break;
        }
      }
      row += rank;
    }
  }
}

constexpr Kernels make_kernels() {
  return {
      Simd::kName,
      W,
      kPanelWidth,
      {Simd::kDotTokensFp32, kDotTokens, kDotTokens, kDotTokens, kDotTokens},
      {dense_dot<0>, dense_dot<1>, dense_dot<2>, dense_dot<3>, dense_dot<4>},
      {dense_panel<0>, dense_panel<1>, dense_panel<2>, dense_panel<3>, dense_panel<4>},
      {project_dot<0>, project_dot<1>, project_dot<2>, nullptr, nullptr},
      {project_panel<0>, project_panel<1>, project_panel<2>, nullptr, nullptr},
      {dot<0>, dot<1>, dot<2>, dot<3>, dot<4>},
      {},
      {},
      {},
      {},
      {},
  };
}

}  // namespace
}  // namespace protoken
