// client_scores_lowrank on the CPU: A x and B^T grad of some clients, one after the other, and their product per token.
//
// A task is as many whole clients as fit 96 ranks. Up to kFewTokens tokens it passes through all A of its clients, then
// all B: each is one piece of memory where the clients lie in one tensor, and both products stay in cache. With more
// tokens these come in blocks of 384, whose products a core can hold, and a panel of tokens, once in cache, serves all
// clients of the task. Ranks above 64 are taken in parts. A client's sum never depends on who shares its task, nor on
// threads. Factors that are contiguous in neither dimension are copied first. The arithmetic is in
// lowrank_kernels.inc.h.
#include "client_scores_lowrank.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu_features.h"
#include "panels.h"
#include "parallel.h"

namespace protoken {
namespace {

constexpr int64_t kTaskRanks = 96;    // ranks, of one or more clients, per task
constexpr int64_t kTokenBlock = 384;  // tokens whose projections a core holds at once
constexpr int64_t kFewTokens = 8;     // up to here lanes run along the factors, beyond along the tokens

struct Layer {
  const LowRankLayer* given;
  int64_t max_rank;
  int64_t group;  // clients per task
  int64_t tasks;
  int64_t first_task;
  bool gather;
  std::unique_ptr<TokenVectors> x, grad;
};

// Where a thread keeps what it computes.
struct Scratch {
  float* left;    // A x
  float* right;   // B^T grad
  float* tiles;   // converted columns of factors
  float* copies;  // factors whose strides no kernel reads
};

int64_t check_client(const LowRankClient& client, const LowRankLayer& layer, int64_t size) {
  require(client.rank >= 0, "a rank must not be negative");
  for (int64_t stride : {client.a_stride_r, client.a_stride_i, client.b_stride_o, client.b_stride_r}) {
    require(stride >= 0, "strides must not be negative");
  }
  product(product(client.a_stride_i, layer.columns), size);
  product(product(client.b_stride_o, layer.rows), size);
  product(product(std::max(client.a_stride_r, client.b_stride_r), client.rank), size);
  return client.rank;
}

// The ranks [first, first + count) of a factor, with one of its strides the element size.
Factor part_of(int64_t address, int64_t rank_stride, int64_t stride, int64_t first, int64_t count, int64_t n,
               int64_t dtype, float* copies, bool* copied) {
  const int64_t size = item_size(dtype);
  const char* base = reinterpret_cast<const char*>(address) + first * rank_stride * size;
  if (n == 1) stride = 1;
  if (stride == 1 || rank_stride == 1 || count == 1) {
    if (count == 1 && stride != 1) rank_stride = 1;
    return {base, rank_stride * size, stride * size, count, n};
  }
  *copied = true;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      copies[j * n + i] = load_element(base + (j * rank_stride + i * stride) * size, dtype);
    }
  }
  const int64_t item = sizeof(float);
  return {reinterpret_cast<const char*>(copies), n * item, item, count, n};
}

// Factors one behind the other in memory, each of whose rows is contiguous, are one: ranks of several clients then fill
// a register tile. A row's sums are the same bits in any tile. Returns how many factors there are then.
int64_t join(Factor* factors, int64_t count, int64_t size) {
  int64_t last = 0;
  for (int64_t f = 1; f < count; ++f) {
    Factor& before = factors[last];
    const Factor& next = factors[f];
    const int64_t gap = next.base - before.base;
    const int64_t step = before.rank > 1 ? before.rank_stride : gap;  // from row to row
    const bool behind = step > 0 && gap == before.rank * step && (next.rank == 1 || next.rank_stride == step);
    if (behind && before.stride == size && next.stride == size && before.rank + next.rank <= kRankMax) {
      before.rank_stride = step;
      before.rank += next.rank;
    } else {
      factors[++last] = next;
    }
  }
  return last + 1;
}

// scores[t] (+)= scale * sum_j left(j, t) right(j, t)
void combine(const float* left, const float* right, int64_t ranks, int64_t rank_stride, int64_t token_stride,
             int64_t tokens, float* scores) {
  for (int64_t t = 0; t < tokens; ++t) {
    float sum = 0;
    for (int64_t j = 0; j < ranks; ++j) {
      sum += left[j * rank_stride + t * token_stride] * right[j * rank_stride + t * token_stride];
    }
    scores[t] += sum;
  }
}

class Job {
 public:
  Job(const Kernels& kernels, const Layer& layer, int64_t tokens, const Scratch& scratch)
      : kernels_(kernels), layer_(layer), tokens_(tokens), scratch_(scratch) {}

  // Scores of the clients [first, last); scores [client - first, tokens].
  void run(int64_t first, int64_t last, float* scores) const {
    std::fill(scores, scores + (last - first) * tokens_, 0.0f);
    if (layer_.x->panels) {
      run_panels(first, last, scores);
    } else {
      run_dots(first, last, scores);
    }
    for (int64_t client = first; client < last; ++client) {
      const float scale = layer_.given->scale[client];
      float* row = scores + (client - first) * tokens_;
      for (int64_t t = 0; t < tokens_; ++t) row[t] *= scale;
    }
  }

 private:
  Factor a_part(const LowRankClient& c, int64_t rank, int64_t count, bool* copied) const {
    return part_of(c.a, c.a_stride_r, c.a_stride_i, rank, count, layer_.given->columns, layer_.given->dtype,
                   scratch_.copies, copied);
  }
  Factor b_part(const LowRankClient& c, int64_t rank, int64_t count, bool* copied) const {
    return part_of(c.b, c.b_stride_r, c.b_stride_o, rank, count, layer_.given->rows, layer_.given->dtype,
                   scratch_.copies, copied);
  }

  // All factors A of the clients, then all factors B: each is memory in one piece where the clients lie in one tensor.
  void run_dots(int64_t first, int64_t last, float* scores) const {
    for (int64_t rank = 0; rank < layer_.max_rank; rank += kRankMax) {
      float* left = scratch_.left;
      for (int64_t client = first; client < last; ++client) {
        const LowRankClient& c = layer_.given->clients[client];
        const int64_t count = std::min(kRankMax, c.rank - rank);
        if (count <= 0) continue;
        bool copied = false;
        const Factor a = a_part(c, rank, count, &copied);
        kernels_.project_dot[copied ? kFloat32 : layer_.given->dtype](a, layer_.x->data(), layer_.x->stride, tokens_,
                                                                      left);
        left += tokens_ * count;
      }
      left = scratch_.left;
      for (int64_t client = first; client < last; ++client) {
        const LowRankClient& c = layer_.given->clients[client];
        const int64_t count = std::min(kRankMax, c.rank - rank);
        if (count <= 0) continue;
        bool copied = false;
        const Factor b = b_part(c, rank, count, &copied);
        kernels_.project_dot[copied ? kFloat32 : layer_.given->dtype](b, layer_.grad->data(), layer_.grad->stride,
                                                                      tokens_, scratch_.right);
        combine(left, scratch_.right, count, 1, count, tokens_, scores + (client - first) * tokens_);
        left += tokens_ * count;
      }
    }
  }

  void run_panels(int64_t first, int64_t last, float* scores) const {
    // Tokens come in blocks, each a whole number of panels.
    const int64_t block = kTokenBlock / kernels_.panel * kernels_.panel;
    for (int64_t token = 0; token < tokens_; token += block) {
      const int64_t count = std::min(block, tokens_ - token);
      const float* x = layer_.x->data() + token * layer_.x->steps;
      const float* grad = layer_.grad->data() + token * layer_.grad->steps;
      // Clients pass together so that a panel of tokens, once in cache, serves all of them.
      for (int64_t client = first; client < last;) {
        client = run_group(client, last, x, grad, count, scores + (client - first) * tokens_ + token);
      }
    }
  }

  // As many clients as fit kTaskRanks (at least one, whose ranks may come in parts); returns the next client.
  int64_t run_group(int64_t first, int64_t last, const float* x, const float* grad, int64_t count,
                    float* scores) const {
    const int64_t padded = padded_tokens(kernels_, count);
    Factor a[kTaskRanks], b[kTaskRanks];
    const LowRankClient* clients = layer_.given->clients;
    if (layer_.gather || clients[first].rank > kRankMax) {
      for (int64_t rank = 0; rank < clients[first].rank; rank += kRankMax) {
        const int64_t ranks = std::min(kRankMax, clients[first].rank - rank);
        bool copied = false;
        a[0] = a_part(clients[first], rank, ranks, &copied);
        project(a, 1, copied, *layer_.x, x, count, scratch_.left);
        copied = false;
        b[0] = b_part(clients[first], rank, ranks, &copied);
        project(b, 1, copied, *layer_.grad, grad, count, scratch_.right);
        combine(scratch_.left, scratch_.right, ranks, padded, 1, count, scores);
      }
      return first + 1;
    }
    int64_t ranks = 0, factors = 0, client = first;
    for (; client < last && ranks + clients[client].rank <= kTaskRanks && clients[client].rank <= kRankMax; ++client) {
      if (clients[client].rank == 0) continue;
      bool copied = false;
      a[factors] = a_part(clients[client], 0, clients[client].rank, &copied);
      b[factors++] = b_part(clients[client], 0, clients[client].rank, &copied);
      ranks += clients[client].rank;
    }
    if (factors > 0) {
      const int64_t size = item_size(layer_.given->dtype);
      project(a, join(a, factors, size), false, *layer_.x, x, count, scratch_.left);
      project(b, join(b, factors, size), false, *layer_.grad, grad, count, scratch_.right);
    }
    int64_t row = 0;
    for (int64_t k = first; k < client; row += clients[k++].rank) {
      combine(scratch_.left + row * padded, scratch_.right + row * padded, clients[k].rank, padded, 1, count,
              scores + (k - first) * tokens_);
    }
    return client;
  }

  void project(const Factor* factors, int64_t count, bool copied, const TokenVectors& vectors, const float* panels,
               int64_t tokens, float* out) const {
    const auto& forms = vectors.pairs ? kernels_.project_panel_pairs : kernels_.project_panel;
    forms[copied ? kFloat32 : layer_.given->dtype](factors, count, panels, tokens, out, scratch_.tiles);
  }

  const Kernels& kernels_;
  const Layer& layer_;
  const int64_t tokens_;
  const Scratch scratch_;
};

bool unit_stride(int64_t rank_stride, int64_t stride, int64_t rank, int64_t n) {
  return stride == 1 || rank_stride == 1 || rank <= 1 || n == 1;
}

Layer prepare(const Kernels& kernels, const LowRankLayer& given, int64_t clients, int64_t tokens) {
  Layer layer;
  layer.given = &given;
  require(given.rows > 0 && given.columns > 0, "rows and columns must be positive");
  require(given.dtype == kFloat32 || given.dtype == kBfloat16 || given.dtype == kFloat16,
          "low-rank factors must be fp32, bf16 or fp16");
  const int64_t step = sizeof(LowRankClient) / sizeof(int64_t);
  const int64_t size = item_size(given.dtype);
  layer.max_rank = 0;
  layer.gather = false;
  for (int64_t k = 0; k < clients; ++k) {
    const LowRankClient& c = given.clients[k];
    layer.max_rank = std::max(layer.max_rank, check_client(c, given, size));
    layer.gather |= !unit_stride(c.a_stride_r, c.a_stride_i, c.rank, given.columns) ||
                    !unit_stride(c.b_stride_r, c.b_stride_o, c.rank, given.rows);
    if (c.rank > 0) {
      check_bank(given.dtype, &c.a, 1, step);
      check_bank(given.dtype, &c.b, 1, step);
    }
  }
  layer.group = std::max<int64_t>(1, kTaskRanks / std::max<int64_t>(layer.max_rank, 1));
  layer.tasks = (clients + layer.group - 1) / layer.group;
  const bool panels = tokens > kFewTokens;
  // Factors that are copied first are fp32.
  const bool may_pair = panels && !layer.gather && kernels.project_panel_pairs[given.dtype] != nullptr;
  const auto vectors = [&](const float* values, int64_t n) {
    const bool pairs = may_pair && are_bf16(values, product(tokens, n));
    return std::make_unique<TokenVectors>(kernels, values, tokens, n, panels, pairs);
  };
  layer.x = vectors(given.x, given.columns);
  layer.grad = vectors(given.grad, given.rows);
  return layer;
}

}  // namespace

void client_scores_lowrank(const LowRankLayer* given, int64_t layer_count, int64_t clients, int64_t tokens, float* out,
                           int64_t threads) {
  require(layer_count > 0 && clients > 0 && tokens > 0, "layers, clients and tokens must be positive");
  const Kernels& kernels = active_kernels();
  std::vector<Layer> layers;
  int64_t tasks = 0, copies = 0;
  for (int64_t l = 0; l < layer_count; ++l) {
    layers.push_back(prepare(kernels, given[l], clients, tokens));
    layers[l].first_task = tasks;
    tasks += layers[l].tasks;
    if (layers[l].gather) copies = std::max(copies, product(kRankMax, std::max(given[l].rows, given[l].columns)));
    for (TokenVectors* vectors : {layers[l].x.get(), layers[l].grad.get()}) {
      parallel_for(vectors->tasks, vectors->panels ? threads : 1, [&](int64_t task, int64_t) { vectors->fill(task); });
    }
  }
  const int64_t held = kTaskRanks * std::min(padded_tokens(kernels, tokens), round_up(kTokenBlock, kernels.lanes));
  const int64_t tiles = kTaskRanks * kTileStride;
  const int64_t per_member = round_up(2 * held + tiles + copies, 16);
  Floats memory(product(std::max<int64_t>(threads, 1), per_member));
  parallel_for(tasks, threads, [&](int64_t task, int64_t member) {
    const Layer* layer = &layers.back();
    while (layer->first_task > task) --layer;
    const int64_t first = (task - layer->first_task) * layer->group;
    float* own = memory.data() + member * per_member;
    const Scratch scratch{own, own + held, own + 2 * held, own + 2 * held + tiles};
    Job(kernels, *layer, tokens, scratch)
        .run(first, std::min(first + layer->group, clients),
             out + ((layer - layers.data()) * clients + first) * tokens);
  });
}

}  // namespace protoken
