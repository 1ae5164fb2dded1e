// Few tokens: rows, padded by one cache line more than needed. Many: panels, [columns, width] of tokens side by side,
// transposed 16 columns at a time so that each token's cache line is read once.
#include "panels.h"

#include <algorithm>
#include <cstring>

namespace protoken {

TokenVectors::TokenVectors(const Kernels& kernels, const float* source, int64_t token_count, int64_t column_count,
                           bool as_panels)
    : values(source),
      tokens(token_count),
      columns(column_count),
      panels(as_panels),
      in_place(!as_panels && token_count == 1 && column_count % kernels.lanes == 0),
      // One line more than needed: rows a power of two apart would share the same few sets of the cache.
      stride(round_up(column_count, 16) + 16),
      width(kernels.panel),
      lanes(kernels.lanes),
      tasks(as_panels  ? (token_count + kernels.panel - 1) / kernels.panel
            : in_place ? 0
                       : token_count),
      copy(in_place    ? 0
           : as_panels ? product(padded_tokens(kernels, token_count), column_count)
                       : product(token_count, stride)) {}

void TokenVectors::fill(int64_t task) const {
  if (!panels) {
    float* row = copy.data() + task * stride;
    std::memcpy(row, values + task * columns, static_cast<size_t>(columns) * sizeof(float));
    std::fill(row + columns, row + stride, 0.0f);
    return;
  }
  const int64_t first = task * width;
  const int64_t count = std::min(width, tokens - first);
  const int64_t across = std::min(width, round_up(tokens - first, lanes));
  float* panel = copy.data() + first * columns;
  const float* source = values + first * columns;
  constexpr int64_t block = 16;  // columns at once: each token's cache line is read once
  for (int64_t column = 0; column < columns; column += block) {
    const int64_t end = std::min(column + block, columns);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = column; i < end; ++i) panel[i * across + t] = source[t * columns + i];
    }
    for (int64_t i = column; i < end; ++i) std::fill(panel + i * across + count, panel + (i + 1) * across, 0.0f);
  }
}

}  // namespace protoken
