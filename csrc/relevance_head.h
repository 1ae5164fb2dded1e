// softmax-weighted mean of a head's rows and log of the softmax's mass, for few tokens, reading the head once.
#pragma once

#include <cstdint>

namespace protoken {

struct HeadArguments {
  const float* normed;  // [T, d], contiguous
  int64_t tokens;       // T
  int64_t width;        // d
  int64_t vocabulary;   // V
  int64_t dtype;        // DtypeCode of the weight: fp32, bf16 or fp16
  int64_t weight;       // address of W [V, d], rows contiguous
  int64_t row_stride;   // in elements
  const float* bias;    // [V], or null
};
static_assert(sizeof(HeadArguments) == 8 * sizeof(int64_t), "the table has eight int64");

// z = softcap(scale * (W normed + b)); mean[t] = sum_v softmax(z[t])[v] dz/dlogit[v] W[v]  [T, d];
// mass[t] = log sum_v exp(z[t, v])  [T]. softcap 0 means none. Throws std::invalid_argument.
void relevance_head(const HeadArguments& head, float scale, float softcap, float* mean, float* mass, int64_t threads);

constexpr int64_t kHeadTokens = 16;  // more tokens are work for a matrix multiplication

}  // namespace protoken
