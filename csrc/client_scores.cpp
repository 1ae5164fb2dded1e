// client_scores on the CPU: cut a group of layers into tasks, run an instruction set's kernels, add up what they leave.
//
// A task is kChunkRows = 96 rows of one client's matrix of one layer, with all tokens; tasks go layer by layer and
// client by client, so that the bank is read once and in order. Each leaves one number per token in a place of its own,
// and a client's are added in one order: neither the number of threads nor other clients change a bit. A bank stored as
// (in, out) is read along its contiguous dimension with x and grad exchanged; one that is contiguous in neither is
// copied chunk by chunk. The arithmetic is in dense_kernels.inc.h.
#include "client_scores.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu_features.h"
#include "panels.h"
#include "parallel.h"

namespace protoken {
namespace {

constexpr int64_t kPartialBytes = int64_t{64} << 20;  // partial sums held at once; more clients come in further passes

// One layer, turned so that a client's rows are contiguous where its strides allow it: < g, D x > = < x, D^T g >.
struct Layer {
  const ScoresLayer* given;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // bytes
  int64_t size;
  bool gather;  // rows are not contiguous either way: they are copied to fp32 first
  int64_t chunks;
  int64_t first_task;
  int64_t first_partial;
  std::unique_ptr<TokenVectors> x, grad;
};

Layer turn(const Kernels& kernels, const ScoresLayer& given, int64_t clients, int64_t tokens) {
  Layer layer;
  layer.given = &given;
  require(given.rows > 0 && given.columns > 0, "rows and columns must be positive");
  require(given.stride_o >= 0 && given.stride_i >= 0, "strides must not be negative");
  layer.size = check_bank(given.dtype, given.pointers, clients);
  const int64_t stride_o = product(given.stride_o, layer.size), stride_i = product(given.stride_i, layer.size);
  product(stride_o, given.rows);
  product(stride_i, given.columns);
  const bool row_major = given.stride_i == 1 || given.columns == 1;
  const bool column_major = !row_major && (given.stride_o == 1 || given.rows == 1) && given.scale == nullptr;
  layer.gather = !row_major && !column_major;
  layer.rows = column_major ? given.columns : given.rows;
  layer.columns = column_major ? given.rows : given.columns;
  layer.row_stride = column_major ? stride_i : stride_o;
  layer.column_stride = column_major ? stride_o : stride_i;
  layer.chunks = (layer.rows + kChunkRows - 1) / kChunkRows;
  const float* x = column_major ? given.grad : given.x;
  const float* grad = column_major ? given.x : given.grad;
  const int64_t dtype = layer.gather ? kFloat32 : given.dtype;
  const bool pair_panels = tokens > kernels.pair_dot_tokens[dtype];
  const bool pairs = (pair_panels ? kernels.dense_panel_pairs : kernels.dense_dot_pairs)[dtype] != nullptr &&
                     tokens >= kernels.pair_tokens[dtype] && are_bf16(x, product(tokens, layer.columns));
  const bool panels = pairs ? pair_panels : tokens > kernels.dot_tokens[dtype];
  layer.x = std::make_unique<TokenVectors>(kernels, x, tokens, layer.columns, panels, pairs);
  layer.grad = std::make_unique<TokenVectors>(kernels, grad, tokens, layer.rows, panels, false);
  return layer;
}

void gather(const char* matrix, const Layer& layer, int64_t first, int64_t count, float* out) {
  for (int64_t o = 0; o < count; ++o) {
    const char* row = matrix + (first + o) * layer.row_stride;
    for (int64_t i = 0; i < layer.columns; ++i) {
      out[o * layer.columns + i] = load_element(row + i * layer.column_stride, layer.given->dtype);
    }
  }
}

// Partial scores of one chunk of rows of one client.
void score_chunk(const Kernels& kernels, const Layer& layer, int64_t client, int64_t chunk, int64_t tokens,
                 float* partial, float* scratch) {
  const int64_t first = chunk * kChunkRows;
  const char* matrix = reinterpret_cast<const char*>(layer.given->pointers[client]);
  DenseChunk c;
  c.row_count = std::min(kChunkRows, layer.rows - first);
  c.columns = layer.columns;
  c.scale = layer.given->scale ? layer.given->scale + client * layer.rows + first : nullptr;
  c.tokens = tokens;
  c.x = c.x_panels = layer.x->data();
  c.x_stride = layer.x->stride;
  c.grad_panels = layer.grad->data();
  c.grad = layer.grad->data() + first;
  c.grad_stride = layer.grad->stride;
  c.first_row = first;
  c.all_rows = layer.rows;
  int64_t dtype = layer.given->dtype;
  if (layer.gather) {
    float* rows = scratch + kChunkRows * kTileStride;
    gather(matrix, layer, first, c.row_count, rows);
    c.rows = reinterpret_cast<const char*>(rows);
    c.row_stride = layer.columns * static_cast<int64_t>(sizeof(float));
    dtype = kFloat32;
  } else {
    c.rows = matrix + first * layer.row_stride;
    c.row_stride = layer.row_stride;
  }
  const bool pairs = layer.x->pairs;
  const auto& dot = pairs ? kernels.dense_dot_pairs : kernels.dense_dot;
  const auto& panel = pairs ? kernels.dense_panel_pairs : kernels.dense_panel;
  (layer.x->panels ? panel : dot)[dtype](c, partial, scratch);
}

}  // namespace

void client_scores(const ScoresLayer* given, int64_t layer_count, int64_t clients, int64_t tokens, float* out,
                   int64_t threads) {
  require(layer_count > 0 && clients > 0 && tokens > 0, "layers, clients and tokens must be positive");
  const Kernels& kernels = active_kernels();
  const int64_t padded = padded_tokens(kernels, tokens);
  std::vector<Layer> layers;
  int64_t chunks = 0, gathered = 0;
  for (int64_t l = 0; l < layer_count; ++l) {
    layers.push_back(turn(kernels, given[l], clients, tokens));
    layers[l].first_partial = chunks;
    chunks += layers[l].chunks;
    if (layers[l].gather) gathered = std::max(gathered, product(kChunkRows, layers[l].columns));
    for (TokenVectors* vectors : {layers[l].x.get(), layers[l].grad.get()}) {
      parallel_for(vectors->tasks, vectors->panels ? threads : 1, [&](int64_t task, int64_t) { vectors->fill(task); });
    }
  }
  const int64_t per_client = product(chunks, padded);
  const int64_t at_once = std::max<int64_t>(
      1, std::min(clients, kPartialBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(per_client, 1)));
  Floats partials(product(at_once, per_client));
  const int64_t scratch_size = round_up(kChunkRows * kTileStride + gathered, 16);
  Floats scratch(product(std::max<int64_t>(threads, 1), scratch_size));

  for (int64_t start = 0; start < clients; start += at_once) {
    const int64_t count = std::min(at_once, clients - start);
    // Layer by layer and client by client, so that memory is read in order. Every chunk has its own place, and the
    // chunks of a client are added in one order below: neither threads nor other clients can change a bit.
    int64_t tasks = 0;
    for (Layer& layer : layers) {
      layer.first_task = tasks;
      tasks += count * layer.chunks;
    }
    parallel_for(tasks, threads, [&](int64_t task, int64_t member) {
      const Layer* layer = &layers.back();
      while (layer->first_task > task) --layer;
      const int64_t client = (task - layer->first_task) / layer->chunks;
      const int64_t chunk = (task - layer->first_task) % layer->chunks;
      score_chunk(kernels, *layer, start + client, chunk, tokens,
                  partials.data() + (client * chunks + layer->first_partial + chunk) * padded,
                  scratch.data() + member * scratch_size);
    });
    const bool many = count * layer_count * tokens > 65536;
    parallel_for(count * layer_count, many ? threads : 1, [&](int64_t task, int64_t) {
      const int64_t client = task / layer_count, l = task % layer_count;
      const float* partial = partials.data() + (client * chunks + layers[l].first_partial) * padded;
      float* scores = out + (l * clients + start + client) * tokens;
      std::copy(partial, partial + tokens, scores);
      for (int64_t chunk = 1; chunk < layers[l].chunks; ++chunk) {
        for (int64_t t = 0; t < tokens; ++t) scores[t] += partial[chunk * padded + t];
      }
    });
  }
}

}  // namespace protoken
