// Gradients behind the last attention of a block with a gated MLP and RMS norms, for one token: see gated_tail.py.
#pragma once

#include <cstdint>

namespace protoken {

// All fp32. A matrix is [rows, columns] with contiguous rows at `stride` elements.
struct GatedTail {
  int64_t width;  // d
  int64_t inner;  // I
  int64_t gate_up_stride[2];
  int64_t down_stride;
  const float* upstream;     // [d] gradient at the final norm's output
  const float* entering;     // [d] what entered the block's second norm
  const float* leaving;      // [d] what entered the final norm
  const float* gate;         // [I] the gate's output, before the activation
  const float* up;           // [I]
  const float* norm;         // [d] weight of the block's second norm
  const float* final_norm;   // [d]
  const float* gate_weight;  // [I, d]
  const float* up_weight;    // [I, d]
  const float* down_weight;  // [d, I]
};
static_assert(sizeof(GatedTail) == 15 * sizeof(int64_t), "the table has fifteen int64");

// at_leaving [d]: d f / d leaving, which is the gradient at down_proj's output; at_entering [d]: d f / d entering, that
// at the out-projection's, with activation(z) = z sigmoid(z). Throws std::invalid_argument.
void gated_tail(const GatedTail& tail, float epsilon, float final_epsilon, float* at_leaving, float* at_entering,
                int64_t threads);

}  // namespace protoken
