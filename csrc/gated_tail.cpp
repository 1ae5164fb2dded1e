// gated_tail on the CPU: three vector-matrix products, W_down first, then W_gate and W_up side by side.
//
// Each is v^T W: 16 parts of a matrix's rows are pulled, each for itself and along the rows as they lie, and joined in
// order, so that sums do not depend on the number of threads. Sums over a norm's d numbers are doubles.
#include "gated_tail.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "cpu_features.h"
#include "panels.h"
#include "parallel.h"

namespace protoken {
namespace {

constexpr int64_t kSize = sizeof(float);
constexpr int64_t kParts = 16;  // of a matrix's rows, whatever the number of threads: sums must not depend on it

// y = w a r with r = (mean a^2 + eps)^(-1/2):   v^T dy/da = r (u - a r^2 <u, a> / d),   u = v w
void through_rms_norm(const float* a, const float* weight, float epsilon, const float* v, int64_t width, float* out) {
  double squares = 0, along = 0;
  for (int64_t i = 0; i < width; ++i) squares += static_cast<double>(a[i]) * a[i];
  for (int64_t i = 0; i < width; ++i) along += static_cast<double>(v[i]) * weight[i] * a[i];
  const double inverse = 1 / std::sqrt(squares / static_cast<double>(width) + epsilon);
  const double back = along * inverse * inverse / static_cast<double>(width);
  for (int64_t i = 0; i < width; ++i) {
    out[i] = static_cast<float>(inverse * (static_cast<double>(v[i]) * weight[i] - back * a[i]));
  }
}

struct Matrix {
  const float* weight;
  int64_t stride, rows, columns;
};

// sums[part] = values[part's rows]^T weight[part's rows]: every part reads its rows as they lie in memory.
void pull_part(const Kernels& kernels, const Matrix& m, const float* values, int64_t part, float* sums) {
  const int64_t first = part * m.rows / kParts, count = (part + 1) * m.rows / kParts - first;
  const char* base = reinterpret_cast<const char*>(m.weight + first * m.stride);
  float* out = sums + part * m.columns;
  if (count == 0) {
    std::fill(out, out + m.columns, 0.0f);
  } else {
    kernels.project_dot[kFloat32]({base, kSize, m.stride * kSize, m.columns, count}, values + first, count, 1, out);
  }
}

// out[i] = sum over parts, in their order.
void join_parts(const float* sums, int64_t parts, int64_t columns, float* out) {
  std::copy(sums, sums + columns, out);
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < columns; ++i) out[i] += sums[part * columns + i];
  }
}

}  // namespace

void gated_tail(const GatedTail& tail, float epsilon, float final_epsilon, float* at_leaving, float* at_entering,
                int64_t threads) {
  const int64_t width = tail.width, inner = tail.inner;
  require(width > 1 && inner > 1, "a width and an inner width above 1");
  require(tail.gate_up_stride[0] >= width && tail.gate_up_stride[1] >= width && tail.down_stride >= inner,
          "the matrices' rows must be contiguous");
  product(product(inner, std::max(tail.gate_up_stride[0], tail.gate_up_stride[1])), kSize);
  product(product(width, tail.down_stride), kSize);
  const Kernels& kernels = active_kernels();
  Floats to_gate(inner), to_up(inner), through_mlp(width);
  Floats sums(kParts * std::max(inner, 2 * width));

  through_rms_norm(tail.leaving, tail.final_norm, final_epsilon, tail.upstream, width, at_leaving);
  const Matrix down{tail.down_weight, tail.down_stride, width, inner};
  parallel_for(kParts, threads,
               [&](int64_t part, int64_t) { pull_part(kernels, down, at_leaving, part, sums.data()); });
  join_parts(sums.data(), kParts, inner, to_gate.data());
  for (int64_t i = 0; i < inner; ++i) {
    const float z = tail.gate[i], sigmoid = 1 / (1 + std::exp(-z)), pulled = to_gate.data()[i];
    to_up.data()[i] = pulled * z * sigmoid;
    to_gate.data()[i] = pulled * tail.up[i] * sigmoid * (1 + z * (1 - sigmoid));
  }
  const Matrix gate{tail.gate_weight, tail.gate_up_stride[0], inner, width};
  const Matrix up{tail.up_weight, tail.gate_up_stride[1], inner, width};
  parallel_for(2 * kParts, threads, [&](int64_t task, int64_t) {
    if (task < kParts) {
      pull_part(kernels, gate, to_gate.data(), task, sums.data());
    } else {
      pull_part(kernels, up, to_up.data(), task - kParts, sums.data() + kParts * width);
    }
  });
  join_parts(sums.data(), 2 * kParts, width, through_mlp.data());
  through_rms_norm(tail.entering, tail.norm, epsilon, through_mlp.data(), width, at_entering);
  for (int64_t i = 0; i < width; ++i) at_entering[i] += at_leaving[i];
}

}  // namespace protoken
