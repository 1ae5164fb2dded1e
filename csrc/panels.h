// The two layouts in which kernels read the tokens' vectors (see DenseChunk).
#pragma once

#include "checks.h"
#include "kernels.h"

namespace protoken {

// values [tokens, columns] contiguous, laid out for `kernels`: rows padded with zeros for few tokens, panels
// (blocks of tokens side by side, [columns, width] each) for many. `fill` is cut into `tasks` pieces.
struct TokenVectors {
  TokenVectors(const Kernels& kernels, const float* values, int64_t tokens, int64_t columns, bool panels);

  const float* data() const { return in_place ? values : copy.data(); }
  void fill(int64_t task) const;

  const float* values;
  int64_t tokens, columns;
  bool panels;
  bool in_place;   // a single row that needs no padding is read where it lies
  int64_t stride;  // of rows
  int64_t width;   // of a full panel
  int64_t lanes;
  int64_t tasks;
  Floats copy;
};

}  // namespace protoken
