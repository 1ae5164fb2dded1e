// The two layouts in which kernels read the tokens' vectors (see DenseChunk).
#pragma once

#include "checks.h"
#include "kernels.h"

namespace protoken {

// Whether bf16 holds every value exactly.
bool are_bf16(const float* values, int64_t count);

// values [tokens, columns] contiguous, laid out for `kernels`: rows padded with zeros for few tokens, panels (blocks of
// tokens side by side, [steps, width] each) for many. A step is a column, or two neighbouring ones as bf16 in `pairs`,
// which ask for values that are bf16. `fill` is cut into `tasks` pieces.
struct TokenVectors {
  TokenVectors(const Kernels& kernels, const float* values, int64_t tokens, int64_t columns, bool panels, bool pairs);

  const float* data() const { return in_place ? values : copy.data(); }
  void fill(int64_t task) const;

  const float* values;
  int64_t tokens, columns;
  bool panels, pairs;
  bool in_place;  // a single row that needs no padding is read where it lies
  int64_t steps;
  int64_t stride;  // of rows
  int64_t width;   // of a full panel
  int64_t lanes;
  int64_t tasks;
  Floats copy;

 private:
  void fill_row(int64_t token) const;
  void fill_panel(int64_t panel) const;
};

}  // namespace protoken
