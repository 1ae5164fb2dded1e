// relevance_head for up to four tokens: the head is read once.
//
// A team of threads holds whole rows of the head between them, a few columns each, in registers. The columns of
// norm(h) and of the running mean that belong to them stay in registers for the length of the kernel. Per tile of
// rows: inner products (one exchange over the team), the running maximum, then the same registers once more for the
// mean, while the next tile is on its way. A block has as many teams as fit; each team has a contiguous part of the
// vocabulary and leaves maximum, mass and mean in the workspace.
#pragma once

#include "relevance_head.cuh"

namespace protoken::cuda {

// Rows of a tile: about 128 bytes per thread with one token, 64 with four.
PT_BOTH constexpr int once_rows(int format, int tokens, int columns) {
  return (tokens == 1 ? 8 : 4) * 2 / format_bytes(format) * 8 / columns;
}
constexpr int kOnceShared = 2 * (kOnceThreads / 32) * 32 * static_cast<int>(sizeof(float));

template <int kFormat, int kTokens, int kColumns>
__global__ void __launch_bounds__(kOnceThreads, 1) head_once_kernel(const __grid_constant__ HeadParams p) {
  constexpr int kE = per_load(kFormat), kLoads = kColumns / kE, kBytes = format_bytes(kFormat),
                kRows = once_rows(kFormat, kTokens, kColumns), kValues = kRows * kTokens, kWarps = kOnceThreads / 32;
  PT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [2, kWarps, 32]
  const int team = threadIdx.x / p.team_threads, member = threadIdx.x % p.team_threads, lane = threadIdx.x % 32,
            warp = threadIdx.x / 32;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * p.teams + team;
  const bool works = team < p.teams;
  const int64_t begin = part * p.vocabulary / p.stat_parts;
  int left = works ? static_cast<int>((part + 1) * p.vocabulary / p.stat_parts - begin) : 0;  // rows not yet read
  int tiles = static_cast<int>(ceil_div(ceil_div(p.vocabulary, p.stat_parts), kRows));        // of the largest part
  const char* at = p.weight + begin * p.stride_v * kBytes;
  const int width = static_cast<int>(p.width);

  int column[kLoads];
  float normed[kTokens][kColumns], mean[kTokens][kColumns];
#pragma unroll
  for (int n = 0; n < kLoads; ++n) {
    column[n] = (member + n * p.team_threads) * kE;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int i = 0; i < kE; ++i) {
        const bool inside = t < p.tokens && column[n] < width;  // a load stays within its row
        normed[t][n * kE + i] = inside ? p.normed[t * p.width + column[n] + i] : 0.0f;
        mean[t][n * kE + i] = 0.0f;
      }
  }
  const auto load = [&](uint4(&rows)[kRows][kLoads]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < kLoads; ++n)
        rows[r][n] = r < left && column[n] < width ? load_stream16(at + (r * p.stride_v + column[n]) * kBytes)
                                                   : make_uint4(0, 0, 0, 0);
  };

  const int mine = lane % kValues, my_row = mine / kTokens;  // the value whose logit this lane computes
  float top = -INFINITY, mass = 0.0f;                        // of token mine % kTokens
  uint4 now[kRows][kLoads], next[kRows][kLoads];
  load(now);
  int64_t row = begin + my_row;
#pragma unroll 1
  for (; tiles > 0; --tiles) {
    const bool inside = my_row < left;
    left -= kRows;
    walk(at, kRows * p.stride_v * kBytes);
    load(next);
    const float bias = p.bias.data && inside ? load_vector(p.bias, row) : 0.0f;
    row += kRows;
    float dots[kValues];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTokens; ++t) dots[r * kTokens + t] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float value = value_of<kFormat>(now[r][c / kE], c % kE);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) dots[r * kTokens + t] = fma_rn(value, normed[t][c], dots[r * kTokens + t]);
      }
    sum_over_lanes<1>(dots, lane);
    const float sum = dots[0];
    float* slots = sums + (tiles & 1) * kWarps * 32;  // two in turn, so that one barrier per tile is enough
    if (lane % (32 / kValues) == 0) slots[warp * 32 + lane / (32 / kValues)] = sum;
    __syncthreads();

    float logit = 0.0f;
    const int warps = p.team_threads / 32, first_warp = works ? team * warps : 0;
    for (int w = 0; w < warps; ++w) logit += slots[(first_warp + w) * 32 + mine];
    Capped z = soft_capped(p.scale * (logit + bias), p.cap);
    if (!inside) z.value = -INFINITY;
    float highest = z.value;
#pragma unroll
    for (int mask = kTokens; mask < kValues; mask *= 2) highest = fmaxf(highest, shuffle_xor(highest, mask));
    highest = fmaxf(highest, top);
    const float shrink = expf(top - base_of(highest)), share = expf(z.value - base_of(highest));
    float total = share;
#pragma unroll
    for (int mask = kTokens; mask < kValues; mask *= 2) total += shuffle_xor(total, mask);
    mass = fma_rn(mass, shrink, total);
    top = highest;

    // Unpacked once more: kept from above, the values would take all registers there are.
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < kLoads; ++n) forget(now[r][n]);
    float weights[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) weights[v] = shuffle_from(share * z.slope, v);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float factor = shuffle_from(shrink, t);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) mean[t][c] *= factor;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float value = value_of<kFormat>(now[r][c / kE], c % kE);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) mean[t][c] = fma_rn(weights[r * kTokens + t], value, mean[t][c]);
      }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < kLoads; ++n) now[r][n] = next[r][n];
  }

  if (!works) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= p.tokens) break;
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
      if (column[n] < width)
        store_values<kE>(p.partial + (part * p.tokens + t) * p.width + column[n], mean[t] + n * kE);
  }
  if (member < kTokens && member < p.tokens) {  // lanes 0, 1, ..: row 0 of each token
    p.stats[(part * p.tokens + member) * 2] = top;
    p.stats[(part * p.tokens + member) * 2 + 1] = mass;
  }
}

}  // namespace protoken::cuda
