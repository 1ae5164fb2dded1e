// relevance_head for many tokens, or a head whose rows cannot be read 16 bytes at a time: logits, then the mean.
//
// head_logits_kernel leaves [T, V] logits of a group of tokens, head_stats maximum and mass, head_mean_kernel the
// mean of the head's rows; so the head is read twice per group. Both products go to the matrix units, with norm(h)
// and the probabilities in three bf16 planes.
#pragma once

#include "relevance_head.cuh"

namespace protoken::cuda {

// logits[t, v] = scale (W[v] . norm(h)[t] + b[v]) for 128 rows and one tile of tokens.
template <int kFormat, bool kVectors, int kTokens>
__global__ void __launch_bounds__(kHeadThreads, 2) head_logits_kernel(const __grid_constant__ HeadParams p) {
  constexpr int kBytes = format_bytes(kFormat), kE = per_load(kFormat), kPlanes = format_planes(kFormat);
  PT_SHARED(shared);
  const int lane = threadIdx.x % 32, tile = static_cast<int>(blockIdx.x % p.tiles);
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.tiles) * kLogitRows + threadIdx.x / 32 * 16 + lane / 4;
  const ImageShape shape = {kTokens, kHeadPlanes, stage_columns(kFormat), kE, 0};
  const int image_bytes = static_cast<int>(shape.elements() * 2);
  const uint16_t* images = p.images + static_cast<int64_t>(tile) * p.stages * shape.elements();
  const int64_t step = kVectors ? kBytes : p.stride_d * kBytes, high = 8 * p.stride_v * kBytes;
  const char* at = p.weight + row * p.stride_v * kBytes + lane % 4 * kE * step;
  const bool low_in = row < p.vocabulary, high_in = row + 8 < p.vocabulary;

  uint4 now[kGroups][2], next[kGroups][2];
  const auto load = [&](uint4(&to)[kGroups][2], int stage) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const int64_t column = static_cast<int64_t>(stage) * stage_columns(kFormat) + q * group_columns(kFormat);
      const int left = static_cast<int>(most(0, least(kE, p.width - column - lane % 4 * kE)));
      to[q][0] = load_values<kFormat, kVectors>(at + column * step, low_in ? left : 0, step);
      to[q][1] = load_values<kFormat, kVectors>(at + column * step + high, high_in ? left : 0, step);
    }
  };
  fetch_image(shared, images, image_bytes);
  if constexpr (kVectors) load(now, 0);
  float acc[kTokens / 8][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < p.stages; ++stage) {
    copy_wait<0>();
    __syncthreads();  // this stage's image is there, and nobody reads the other buffer any more
    const int turn = stage & 1;
    if (stage + 1 < p.stages) {
      fetch_image(shared + (turn ^ 1) * image_bytes, images + (stage + 1) * shape.elements(), image_bytes);
      if constexpr (kVectors) load(next, stage + 1);
    }
    if constexpr (!kVectors) load(now, stage);
    const uint16_t* image = reinterpret_cast<const uint16_t*>(shared + turn * image_bytes);
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      uint32_t a[products(kFormat)][kPlanes][4];
#pragma unroll
      for (int j = 0; j < products(kFormat); ++j) decode<kFormat>(now[q][0], now[q][1], j, a[j]);
      multiply_group<kFormat, kHeadPlanes, kTokens>(acc, a, image, stage_columns(kFormat), q * group_columns(kFormat),
                                                    lane);
    }
    if constexpr (kVectors) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) now[q][0] = next[q][0], now[q][1] = next[q][1];
    }
  }
  const float bias[2] = {p.bias.data && low_in ? load_vector(p.bias, row) : 0.0f,
                         p.bias.data && high_in ? load_vector(p.bias, row + 8) : 0.0f};
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = static_cast<int64_t>(tile) * kTokens + n * 8 + lane % 4 * 2 + i % 2;
      if (token < p.tokens && (i < 2 ? low_in : high_in))
        p.logits[token * p.vocabulary + row + i / 2 * 8] = p.scale * (acc[n][i] + bias[i / 2]);
    }
}

// Rows 4 c + {0, 1, 2, 3} of 16, 16 bytes each: column j of them as B of m16n8k16, c the lane's place in its quad.
template <int kFormat>
__device__ __forceinline__ void column_pairs(const uint4 (&rows)[4], int j, uint32_t (&b)[2][format_planes(kFormat)]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kFormat == kBF16) {
      const uint4 &first = rows[2 * i], &second = rows[2 * i + 1];
      const uint32_t words[2][4] = {{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
      b[i][0] = byte_permute(words[0][j / 2], words[1][j / 2], j % 2 ? 0x7632 : 0x5410);
    } else {
      split_pair<format_planes(kFormat)>(value_of<kFormat>(rows[2 * i], j), value_of<kFormat>(rows[2 * i + 1], j),
                                         b[i]);
    }
  }
}

constexpr int kSharePitch = kMeanRows + 16;  // 160 bytes: a quarter warp's reads meet different banks
PT_BOTH constexpr int mean_shared(int tokens) { return kHeadPlanes * tokens * kSharePitch * 2 + tokens * 4; }
PT_BOTH constexpr int mean_columns(int format) { return kHeadThreads / 32 * 8 * per_load(format); }  // of a block

// acc[m][j] += probabilities of 16 tokens x these 16 rows x column j of the E that each lane has loaded.
template <int kFormat, int kTokens>
__device__ __forceinline__ void add_rows(float (&acc)[kTokens / 16][per_load(kFormat)][4], const uint4 (&rows)[4],
                                         const uint16_t* shares) {
  constexpr int kPlanes = format_planes(kFormat), kTiles = kTokens / 16;
  const int lane = threadIdx.x % 32;
  uint32_t a[kHeadPlanes][kTiles][4];
#pragma unroll
  for (int plane = 0; plane < kHeadPlanes; ++plane)
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = plane * kTokens + m * 16 + lane / 4 + 8 * half;
        const uint2 words = *reinterpret_cast<const uint2*>(shares + token * kSharePitch + lane % 4 * 4);
        a[plane][m][half] = words.x, a[plane][m][half + 2] = words.y;
      }
#pragma unroll
  for (int j = 0; j < per_load(kFormat); ++j) {
    uint32_t b[2][kPlanes];
    column_pairs<kFormat>(rows, j, b);
#pragma unroll
    for (int pp = 0; pp < kHeadPlanes; ++pp)
#pragma unroll
      for (int pw = 0; pw < kPlanes; ++pw)
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
          if (pw + pp <= 2) mma_16x8x16<false>(acc[m][j], a[pp][m], b[0][pw], b[1][pw]);
  }
}

// partial[split, t, :] = sum of exp(z - top) dz/dlogit W[v] over the split's rows v, for a warp's 8 E columns.
template <int kFormat, bool kVectors, int kTokens>
__global__ void __launch_bounds__(kHeadThreads, kTokens == 16 ? 2 : 1)
    head_mean_kernel(const __grid_constant__ HeadParams p) {
  constexpr int kBytes = format_bytes(kFormat), kE = per_load(kFormat), kTiles = kTokens / 16,
                kShares = kTokens * kMeanRows / kHeadThreads;
  PT_SHARED(shared);
  uint16_t* shares = reinterpret_cast<uint16_t*>(shared);  // [kHeadPlanes, kTokens, kSharePitch]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile = static_cast<int>(blockIdx.x % p.tiles);
  const int64_t rest = blockIdx.x / p.tiles, split = rest / p.column_blocks;
  const int64_t column = rest % p.column_blocks * mean_columns(kFormat) + (warp * 8 + lane / 4) * kE;
  const int64_t begin = split * p.split_rows, end = least(begin + p.split_rows, p.vocabulary);
  const int64_t step = kVectors ? kBytes : p.stride_d * kBytes;
  const int left = static_cast<int>(most(0, least(kE, p.width - column)));
  const char* at = p.weight + column * step + (begin + lane % 4 * 4) * p.stride_v * kBytes;
  int64_t rows_left = end - begin - lane % 4 * 4;  // from `at` on

  // This thread's probabilities: row threadIdx.x % 64 of every fourth token.
  const int my_row = threadIdx.x % kMeanRows, my_token = threadIdx.x / kMeanRows;
  float logits[kShares];
  float* tops = reinterpret_cast<float*>(shares + kHeadPlanes * kTokens * kSharePitch);  // [kTokens]
  if (threadIdx.x < kTokens) {
    const int64_t token = static_cast<int64_t>(tile) * kTokens + threadIdx.x;
    float top = -INFINITY;
    for (int64_t part = 0; token < p.tokens && part < p.stat_parts; ++part)
      top = fmaxf(top, p.stats[(part * p.tokens + token) * 2]);
    tops[threadIdx.x] = base_of(top);
  }
  __syncthreads();
  const auto load_logits = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kShares; ++i) {
      const int64_t token = static_cast<int64_t>(tile) * kTokens + my_token + i * (kHeadThreads / kMeanRows);
      const bool inside = token < p.tokens && first + my_row < end;
      logits[i] = inside ? p.logits[token * p.vocabulary + first + my_row] : -INFINITY;
    }
  };
  const auto load = [&](uint4(&rows)[4]) {  // the next 16 rows
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = load_values<kFormat, kVectors>(at + i * p.stride_v * kBytes, rows_left > i ? left : 0, step);
    rows_left -= 16;
    walk(at, 16 * p.stride_v * kBytes);
  };

  float acc[kTiles][kE][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int j = 0; j < kE; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.0f;
  constexpr int kAhead = kVectors ? 2 : 1;  // steps of 16 rows under way
  uint4 rows[kAhead][4];
#pragma unroll
  for (int a = 0; a < kAhead; ++a)
    if constexpr (kVectors) load(rows[a]);
  load_logits(begin);
#pragma unroll 1
  for (int64_t first = begin; first < end; first += kMeanRows) {
#pragma unroll
    for (int i = 0; i < kShares; ++i) {
      const Capped z = soft_capped(logits[i], p.cap);
      // 0 where there is no row: its logit is -inf.
      float share = expf(z.value - tops[my_token + i * (kHeadThreads / kMeanRows)]) * z.slope;
      uint16_t* to = shares + (my_token + i * (kHeadThreads / kMeanRows)) * kSharePitch + my_row;
#pragma unroll
      for (int plane = 0; plane < kHeadPlanes; ++plane) {
        to[plane * kTokens * kSharePitch] = static_cast<uint16_t>(float_bits(share) >> 16);
        share -= bits_float(float_bits(share) & 0xffff0000u);
      }
    }
    __syncthreads();
    load_logits(first + kMeanRows);
#pragma unroll 1
    for (int k = 0; k < kMeanRows; k += 16 * kAhead)
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if constexpr (!kVectors) load(rows[a]);
        add_rows<kFormat, kTokens>(acc, rows[a], shares + k + 16 * a);
        if constexpr (kVectors) load(rows[a]);
      }
    __syncthreads();  // nobody reads the probabilities any more
  }

  // acc[m][j][i]: token m 16 + g + 8 (i / 2), column j of the E that lane group 2 c + i % 2 loaded.
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = static_cast<int64_t>(tile) * kTokens + m * 16 + lane / 4 + 8 * (i / 2);
      const int64_t to = rest % p.column_blocks * mean_columns(kFormat) + (warp * 8 + lane % 4 * 2 + i % 2) * kE;
      if (token >= p.tokens) continue;
#pragma unroll
      for (int j = 0; j < kE; ++j)
        if (to + j < p.width) p.partial[(split * p.tokens + token) * p.width + to + j] = acc[m][j][i];
    }
}

}  // namespace protoken::cuda
