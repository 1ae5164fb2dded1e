// S[k] = < m, delta_k > for every client of a group of layers, on the CPU.
#pragma once

#include <cstdint>

namespace protoken {

struct TotalsLayer {
  const float* m;           // [O, I], contiguous
  int64_t rows;             // O
  int64_t columns;          // I
  int64_t dtype;            // DtypeCode of the bank
  const int64_t* pointers;  // [K] addresses of the clients' matrices
  int64_t stride_o;         // in elements
  int64_t stride_i;         // in elements
  const float* scale;       // [K, O] contiguous, or null
};
static_assert(sizeof(TotalsLayer) == 8 * sizeof(int64_t), "a row of the table has eight int64");

// out [layers, clients]. Throws std::invalid_argument.
void client_totals(const TotalsLayer* layers, int64_t layer_count, int64_t clients, float* out, int64_t threads);

}  // namespace protoken
