// relevance_head's sums over the vocabulary on the CPU, for up to 16 tokens: each row of the head is read once.
//
// The vocabulary is cut into at most 64 spans, a task each, whatever the number of threads: so results are the same
// bits for any. A span goes through its rows in pieces of about 192 KB: their logits, the running maximum, then the
// same rows again, still in cache, for the mean of rows under the softmax. Spans are joined in order, each rescaled to
// the common maximum. More tokens are left to the torch backend. Norm and own rows are done by Python around this
// (ops/cpp.py).
#include "relevance_head.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.h"
#include "cpu_features.h"
#include "panels.h"
#include "parallel.h"

namespace protoken {
namespace {

constexpr int64_t kPieceBytes = 192 << 10;  // of the head at once: still in cache for the second look at its rows
constexpr int64_t kSpans = 64;              // parts of the vocabulary, whatever the number of threads

// A span's running maximum, mass and mean for every token.
struct Span {
  float* top;   // [T]
  float* mass;  // [T]
  float* mean;  // [T, d]
};

// What exponents are taken relative to: the maximum, or 0 where nothing but masked rows has been seen (exp(-inf) is 0).
float base_of(float top) { return top == -std::numeric_limits<float>::infinity() ? 0.0f : top; }

void rescale(const Span& span, int64_t t, float higher, int64_t width) {
  const float shrink = std::exp(span.top[t] - base_of(higher));
  span.top[t] = higher;
  span.mass[t] *= shrink;
  for (int64_t i = 0; i < width; ++i) span.mean[t * width + i] *= shrink;
}

// Rows [first, first + count) join the span. logits [T, count] and sums [T, d] are scratch.
void join_rows(const Kernels& kernels, const HeadArguments& head, const TokenVectors& tokens, float scale,
               float softcap, int64_t first, int64_t count, const Span& span, float* logits, float* sums) {
  const int64_t size = item_size(head.dtype);
  const char* rows = reinterpret_cast<const char*>(head.weight) + first * head.row_stride * size;
  kernels.project_dot[head.dtype]({rows, head.row_stride * size, size, count, head.width}, tokens.data(), tokens.stride,
                                  head.tokens, logits);
  for (int64_t t = 0; t < head.tokens; ++t) {
    float* z = logits + t * count;
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < count; ++j) {
      z[j] = scale * (z[j] + (head.bias ? head.bias[first + j] : 0.0f));
      const float capped = softcap > 0 ? softcap * std::tanh(z[j] / softcap) : z[j];
      highest = std::max(highest, capped);
      if (std::isnan(capped)) highest = capped;
    }
    if (!(highest <= span.top[t])) rescale(span, t, highest, head.width);
    const float base = base_of(span.top[t]);
    for (int64_t j = 0; j < count; ++j) {
      const float inner = softcap > 0 ? z[j] / softcap : 0.0f;
      const float mass = std::exp((softcap > 0 ? softcap * std::tanh(inner) : z[j]) - base);
      span.mass[t] += mass;
      const float cosine = softcap > 0 ? std::cosh(inner) : 1.0f;  // 1 - tanh^2 would cancel
      z[j] = mass / (cosine * cosine);
    }
  }
  // The same rows once more, lanes along the row: sums[t] = sum_j z[t, j] W[j].
  kernels.project_dot[head.dtype]({rows, size, head.row_stride * size, head.width, count}, logits, count, head.tokens,
                                  sums);
  for (int64_t e = 0; e < head.tokens * head.width; ++e) span.mean[e] += sums[e];
}

}  // namespace

void relevance_head(const HeadArguments& head, float scale, float softcap, float* mean, float* mass, int64_t threads) {
  if (head.tokens <= 0 || head.tokens > kHeadTokens) {
    throw std::invalid_argument("from 1 to 16 tokens, got " + std::to_string(head.tokens));
  }
  require(head.width > 1 && head.vocabulary > 0 && head.row_stride >= head.width, "the head's rows must be contiguous");
  require(head.dtype == kFloat32 || head.dtype == kBfloat16 || head.dtype == kFloat16,
          "the head must be fp32, bf16 or fp16");
  check_bank(head.dtype, &head.weight, 1);
  const Kernels& kernels = active_kernels();
  const int64_t size = item_size(head.dtype), width = head.width, tokens = head.tokens;
  product(product(head.vocabulary, head.row_stride), size);
  const TokenVectors vectors(kernels, head.normed, tokens, width, false, false);
  for (int64_t task = 0; task < vectors.tasks; ++task) vectors.fill(task);

  const int64_t piece = std::max<int64_t>(16, kPieceBytes / (width * size));
  const int64_t pieces = (head.vocabulary + piece - 1) / piece;
  const int64_t spans = std::min(kSpans, pieces);
  const int64_t per_span = round_up(tokens * (2 + width), 16);
  const int64_t per_member = round_up(tokens * (piece + width), 16);
  Floats held(product(spans, per_span)), scratch(product(std::max<int64_t>(threads, 1), per_member));
  const auto span_at = [&](int64_t s) {
    float* base = held.data() + s * per_span;
    return Span{base, base + tokens, base + 2 * tokens};
  };
  parallel_for(spans, threads, [&](int64_t s, int64_t member) {
    const Span span = span_at(s);
    std::fill(span.top, span.top + tokens, -std::numeric_limits<float>::infinity());
    std::fill(span.mass, span.mass + tokens * (1 + width), 0.0f);
    float* logits = scratch.data() + member * per_member;
    for (int64_t p = s * pieces / spans; p < (s + 1) * pieces / spans; ++p) {
      const int64_t first = p * piece;
      join_rows(kernels, head, vectors, scale, softcap, first, std::min(piece, head.vocabulary - first), span, logits,
                logits + tokens * piece);
    }
  });
  const Span total = span_at(0);
  for (int64_t s = 1; s < spans; ++s) {
    const Span span = span_at(s);
    for (int64_t t = 0; t < tokens; ++t) {
      const float higher = span.top[t] > total.top[t] || std::isnan(span.top[t]) ? span.top[t] : total.top[t];
      rescale(total, t, higher, width);
      rescale(span, t, higher, width);
      total.mass[t] += span.mass[t];
      for (int64_t i = 0; i < width; ++i) total.mean[t * width + i] += span.mean[t * width + i];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    mass[t] = total.top[t] + std::log(total.mass[t]);
    for (int64_t i = 0; i < width; ++i) mean[t * width + i] = scale * total.mean[t * width + i] / total.mass[t];
  }
}

}  // namespace protoken
