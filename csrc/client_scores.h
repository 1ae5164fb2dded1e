// s[k, t] = < grad[t], delta_k x[t] > for every client and token of a group of layers, on the CPU.
#pragma once

#include <cstdint>

namespace protoken {

// One layer of the group. The Python side fills it as a row of int64, so every field is 8 bytes.
struct ScoresLayer {
  const float* x;           // [T, I], contiguous
  const float* grad;        // [T, O], contiguous
  int64_t rows;             // O
  int64_t columns;          // I
  int64_t dtype;            // DtypeCode of the bank
  const int64_t* pointers;  // [K] addresses of the clients' matrices
  int64_t stride_o;         // in elements
  int64_t stride_i;         // in elements
  const float* scale;       // [K, O] contiguous, or null
};
static_assert(sizeof(ScoresLayer) == 9 * sizeof(int64_t), "a row of the table has nine int64");

// out [layers, clients, tokens]. Throws std::invalid_argument.
void client_scores(const ScoresLayer* layers, int64_t layer_count, int64_t clients, int64_t tokens, float* out,
                   int64_t threads);

}  // namespace protoken
