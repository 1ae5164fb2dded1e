// What the kernels of relevance_head share: the parameters of one group of tokens, the soft-cap, the running maximum.
#pragma once

#include "cuda_ops.h"
#include "cuda_tiles.cuh"

#ifdef PROTOKEN_EMULATE
#include <cmath>
#endif

namespace protoken::cuda {

constexpr int kHeadThreads = 256;  // of every kernel but head_once_kernel
constexpr int kHeadPlanes = 3;     // norm(h) and the probabilities are fp32
constexpr int kGroupTokens = 128;  // whose logits are held at once
constexpr int kStatParts = 32;     // parts of the vocabulary in head_stats
constexpr int kOnceThreads = 512;  // head_once_kernel
constexpr int kOnceTokens = 4;     // at most this many per pass
constexpr int kLogitRows = 128;    // rows of a block of head_logits_kernel, 16 per warp
constexpr int kMeanRows = 64;      // rows whose probabilities a block of head_mean_kernel holds at once
constexpr int kMeanBlocks = 256;   // about so many blocks per token tile in head_mean_kernel
constexpr int64_t kMostSplits = 256;

struct Vector {  // a float vector of any stride and dtype, or null
  const void* data;
  int64_t stride;
  int32_t dtype, unused;
};
enum HeadNorm : int { kNoNorm = 0, kRmsNorm = 1, kLayerNorm = 2 };

struct HeadParams {
  Matrix hidden;  // [T, d]
  const int64_t* targets;
  int64_t target_stride;
  const char* weight;          // [V, d]
  int64_t stride_v, stride_d;  // elements
  Vector bias, norm_weight, norm_bias;
  float *grad, *value;  // [T, d], [T]
  float eps, scale, cap;
  int32_t norm, tokens, logprob;
  int64_t width, vocabulary;
  // Workspace.
  float* normed;   // [T, d]
  float* moments;  // [T, 2]: mean, reciprocal root mean square
  float* own;      // [T]: scaled logit of the target
  float* mass;     // [T]: log sum_v exp z[v]
  float* mean;     // [T, d]: sum_v softmax(z)[v] dz/dlogit[v] W[v]
  float* stats;    // [stat_parts, T, 2]: maximum, sum of exp(z - maximum)
  float* partial;  // [mean_parts, T, d]
  int64_t stat_parts, mean_parts;
  int32_t relative;  // 1: a part of `partial` is relative to its own maximum (once), 0: to the whole one's (twice)
  // once
  int32_t teams, team_threads, unused;
  // twice
  float* logits;     // [T, V], scaled, before the soft-cap
  uint16_t* images;  // [tiles, stages] images of norm(h)
  int32_t tile_tokens, tiles, stages, column_blocks;
  int64_t split_rows;
};

struct Capped {
  float value, slope;
};
// cap * tanh(z / cap) and its slope 1 / cosh^2, since 1 - tanh^2 cancels; no cap: z and 1.
__device__ __forceinline__ Capped soft_capped(float z, float cap) {
  if (!(cap > 0.0f)) return {z, 1.0f};
  const float inner = z / cap, cosine = coshf(inner);
  return {cap * tanhf(inner), 1.0f / (cosine * cosine)};
}

// What exponents are taken relative to: the maximum, or 0 where nothing has been seen yet (exp(-inf) is 0 then).
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

__device__ __forceinline__ float load_vector(const Vector& v, int64_t index) {
  return load_float(v.data, index * v.stride, v.dtype);
}

}  // namespace protoken::cuda
