// s[k, t] = scale[k] < B_k^T grad[t], A_k x[t] > for every client and token of a group of layers, on the CPU.
#pragma once

#include <cstdint>

namespace protoken {

struct LowRankClient {  // strides in elements
  int64_t a;            // address of A [rank, I]
  int64_t a_stride_r, a_stride_i;
  int64_t b;  // address of B [O, rank]
  int64_t b_stride_o, b_stride_r;
  int64_t rank;
};
static_assert(sizeof(LowRankClient) == 7 * sizeof(int64_t), "a row of the bank's table has seven int64");

struct LowRankLayer {
  const float* x;                // [T, I], contiguous
  const float* grad;             // [T, O], contiguous
  int64_t rows;                  // O
  int64_t columns;               // I
  int64_t dtype;                 // DtypeCode of the factors: fp32, bf16 or fp16
  const LowRankClient* clients;  // [K]
  const float* scale;            // [K]
};
static_assert(sizeof(LowRankLayer) == 7 * sizeof(int64_t), "a row of the table has seven int64");

// out [layers, clients, tokens]. Throws std::invalid_argument.
void client_scores_lowrank(const LowRankLayer* layers, int64_t layer_count, int64_t clients, int64_t tokens, float* out,
                           int64_t threads);

}  // namespace protoken
