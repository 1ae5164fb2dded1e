// Few tokens: rows, padded by one cache line more than needed. Many: panels, [steps, width] of tokens side by side,
// transposed 16 columns at a time so that each token's cache line is read once.
#include "panels.h"

#include <algorithm>
#include <cstring>

#include "dtypes.h"

namespace protoken {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Two values that are bf16 as one step, whose bits are no number of their own.
float pair_of(float even, float odd) { return bits_to_float(bits_of(odd) | bits_of(even) >> 16); }

}  // namespace

bool are_bf16(const float* values, int64_t count) {
  constexpr int64_t block = 1024;
  for (int64_t start = 0; start < count; start += block) {
    const int64_t end = std::min(start + block, count);
    uint32_t seen = 0;
    for (int64_t i = start; i < end; ++i) seen |= bits_of(values[i]);
    if ((seen & 0xffffu) != 0) return false;
  }
  return true;
}

TokenVectors::TokenVectors(const Kernels& kernels, const float* source, int64_t token_count, int64_t column_count,
                           bool as_panels, bool as_pairs)
    : values(source),
      tokens(token_count),
      columns(column_count),
      panels(as_panels),
      pairs(as_pairs),
      in_place(!as_panels && !as_pairs && token_count == 1 && column_count % kernels.lanes == 0),
      steps(as_pairs ? (column_count + 1) / 2 : column_count),
      // One line more than needed: rows a power of two apart would share the same few sets of the cache.
      stride(round_up(steps, 16) + 16),
      width(kernels.panel),
      lanes(kernels.lanes),
      tasks(as_panels  ? (token_count + kernels.panel - 1) / kernels.panel
            : in_place ? 0
                       : token_count),
      copy(in_place    ? 0
           : as_panels ? product(padded_tokens(kernels, token_count), steps)
                       : product(token_count, stride)) {}

void TokenVectors::fill(int64_t task) const { panels ? fill_panel(task) : fill_row(task); }

void TokenVectors::fill_row(int64_t token) const {
  float* row = copy.data() + token * stride;
  const float* source = values + token * columns;
  if (pairs) {
    for (int64_t i = 0; i < columns / 2; ++i) row[i] = pair_of(source[2 * i], source[2 * i + 1]);
    if (columns % 2 != 0) row[steps - 1] = pair_of(source[columns - 1], 0.0f);
  } else {
    std::memcpy(row, source, static_cast<size_t>(columns) * sizeof(float));
  }
  std::fill(row + steps, row + stride, 0.0f);
}

void TokenVectors::fill_panel(int64_t task) const {
  const int64_t first = task * width;
  const int64_t count = std::min(width, tokens - first);
  const int64_t across = std::min(width, round_up(tokens - first, lanes));
  float* panel = copy.data() + first * steps;
  const float* source = values + first * columns;
  constexpr int64_t block = 16;  // columns at once: each token's cache line is read once
  const int64_t each = pairs ? block / 2 : block;
  for (int64_t step = 0; step < steps; step += each) {
    const int64_t end = std::min(step + each, steps);
    for (int64_t t = 0; t < count; ++t) {
      const float* row = source + t * columns;
      if (!pairs) {
        for (int64_t i = step; i < end; ++i) panel[i * across + t] = row[i];
      } else {
        for (int64_t i = step; i < end; ++i) {
          panel[i * across + t] = pair_of(row[2 * i], 2 * i + 1 < columns ? row[2 * i + 1] : 0.0f);
        }
      }
    }
    for (int64_t i = step; i < end; ++i) std::fill(panel + i * across + count, panel + (i + 1) * across, 0.0f);
  }
}

}  // namespace protoken
