// client_totals on CUDA: S[k] = <m, delta_k>, a streaming dot product.
//
// A block keeps its piece of m in registers and walks the clients, so m is read once and the bank is what moves.
// Pieces do not depend on K, so totals are the same bits for any split of the clients.
#include <stdexcept>

#include "cuda_ops.h"
#include "cuda_tiles.cuh"

namespace protoken::cuda {

constexpr int kTotalsLayers = 64, kThreads = 256, kWarps = kThreads / 32, kLoads = 4, kBatch = 64;

struct TotalsLayer {
  const char* base;
  const int64_t* table;
  const float* scale;
  float* partial;  // [pieces, K]
  float* out;
  Matrix m;
  int64_t client_stride, stride_o, stride_i, rows, columns, pieces, first_piece;
};
struct TotalsParams {
  TotalsLayer layers[kTotalsLayers];
  int64_t clients, pieces;
  int32_t count, unused;
};

PT_BOTH constexpr int64_t piece_values(int format) { return kThreads * kLoads * per_load(format); }

// Value number i of the matrix, rows one after another.
struct Place {
  int64_t row, column;
};
PT_BOTH Place place_of(int64_t i, int64_t columns) { return {i / columns, i % columns}; }

template <int kFormat, bool kVectors>
__device__ __forceinline__ uint4 load_bank(const TotalsLayer& layer, const char* client, int64_t offset, int64_t first,
                                           bool inside) {
  constexpr int kBytes = format_bytes(kFormat);
  if constexpr (kVectors) {
    return load_stream16_or_zeros(client + offset, inside);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = 0; i < per_load(kFormat); ++i) {
      if (first + i >= layer.rows * layer.columns) break;
      const Place at = place_of(first + i, layer.columns);
      const char* from = client + (at.row * layer.stride_o + at.column * layer.stride_i) * kBytes;
      uint32_t bits;
      if constexpr (kBytes == 4) bits = *reinterpret_cast<const uint32_t*>(from);
      if constexpr (kBytes == 2) bits = *reinterpret_cast<const uint16_t*>(from);
      if constexpr (kBytes == 1) bits = *reinterpret_cast<const uint8_t*>(from);
      const int shift = i * kBytes % 4 * 8, word = i * kBytes / 4;
      words[0] |= word == 0 ? bits << shift : 0, words[1] |= word == 1 ? bits << shift : 0;
      words[2] |= word == 2 ? bits << shift : 0, words[3] |= word == 3 ? bits << shift : 0;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <int kFormat, bool kVectors>
__global__ void __launch_bounds__(kThreads) client_totals_kernel(const __grid_constant__ TotalsParams p) {
  constexpr int kE = per_load(kFormat);
  PT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [kBatch, kWarps]
  int l = 0;
  while (l + 1 < p.count && static_cast<int64_t>(blockIdx.x) >= p.layers[l + 1].first_piece) ++l;
  const TotalsLayer& layer = p.layers[l];
  const int64_t piece = blockIdx.x - layer.first_piece, size = layer.rows * layer.columns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  float m[kLoads][kE];
  int64_t offset[kLoads], first[kLoads], scale_row[kLoads];
#pragma unroll
  for (int q = 0; q < kLoads; ++q) {
    first[q] = piece * piece_values(kFormat) + (static_cast<int64_t>(q) * kThreads + threadIdx.x) * kE;
    const Place start = place_of(least(first[q], size - 1), layer.columns);
    scale_row[q] = start.row;
    offset[q] = (start.row * layer.stride_o + start.column * layer.stride_i) * format_bytes(kFormat);
#pragma unroll
    for (int i = 0; i < kE; ++i) {
      Place at = {start.row, start.column + i};  // with vectors a load stays within its row
      if (!kVectors) at = place_of(least(first[q] + i, size - 1), layer.columns);
      m[q][i] = first[q] + i < size
                    ? load_float(layer.m.data, at.row * layer.m.stride_t + at.column * layer.m.stride_c, layer.m.dtype)
                    : 0.0f;
    }
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kBatch, end = least(begin + kBatch, p.clients);
  const auto client_base = [&](int64_t client) {
    return layer.table ? reinterpret_cast<const char*>(layer.table[client]) : layer.base + client * layer.client_stride;
  };
  uint4 now[kLoads], next[kLoads];
#pragma unroll
  for (int q = 0; q < kLoads; ++q)
    now[q] = load_bank<kFormat, kVectors>(layer, client_base(begin), offset[q], first[q], first[q] < size);
#pragma unroll 1
  for (int64_t client = begin; client < end; ++client) {
    const bool more = client + 1 < end;
    const char* base = client_base(more ? client + 1 : client);
#pragma unroll
    for (int q = 0; q < kLoads; ++q)
      next[q] = load_bank<kFormat, kVectors>(layer, base, offset[q], first[q], more && first[q] < size);
    float sum = 0.0f;
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kE; ++i) {
        float value = value_of<kFormat>(now[q], i);
        if constexpr (format_bytes(kFormat) == 1 && !kVectors) {
          if (first[q] + i < size)
            value *= layer.scale[client * layer.rows + place_of(first[q] + i, layer.columns).row];
        }
        dot = fma_rn(value, m[q][i], dot);
      }
      if constexpr (format_bytes(kFormat) == 1 && kVectors) dot *= layer.scale[client * layer.rows + scale_row[q]];
      sum += dot;
    }
#pragma unroll
    for (int mask = 16; mask >= 1; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) sums[(client - begin) * kWarps + warp] = sum;
#pragma unroll
    for (int q = 0; q < kLoads; ++q) now[q] = next[q];
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < end - begin; i += kThreads) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[i * kWarps + w];
    layer.partial[piece * p.clients + begin + i] = total;
  }
}

__global__ void __launch_bounds__(1024) reduce_totals(const __grid_constant__ TotalsParams p) {
  PT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [32, 32]
  const TotalsLayer& layer = p.layers[blockIdx.y];
  const int column = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t client = static_cast<int64_t>(blockIdx.x) * 32 + column;
  float sum = 0.0f;
  if (client < p.clients) {
#pragma unroll 8
    for (int64_t piece = slice; piece < layer.pieces; piece += 32) sum += layer.partial[piece * p.clients + client];
  }
  sums[slice * 32 + column] = sum;
  __syncthreads();
  if (slice == 0 && client < p.clients) {
    for (int s = 1; s < 32; ++s) sum += sums[s * 32 + column];
    layer.out[client] = sum;
  }
}

static int64_t plan(TotalsParams& p, const TotalsCall& call, int64_t first_layer) {
  p.clients = call.clients;
  p.count = static_cast<int32_t>(least(kTotalsLayers, call.layers - first_layer));
  p.pieces = 0;
  int64_t end = 0;
  for (int l = 0; l < p.count; ++l) {
    const int64_t* row = call.table + (first_layer + l) * kTotalsColumns;
    TotalsLayer& layer = p.layers[l];
    layer.m = {reinterpret_cast<const void*>(row[0]), row[1], row[2], static_cast<int32_t>(row[3]), 0};
    layer.rows = row[4], layer.columns = row[5];
    layer.base = reinterpret_cast<const char*>(row[6]), layer.client_stride = row[7];
    layer.table = reinterpret_cast<const int64_t*>(row[8]);
    layer.stride_o = row[9], layer.stride_i = row[10];
    layer.scale = reinterpret_cast<const float*>(row[11]);
    layer.out = reinterpret_cast<float*>(row[12]);
    layer.pieces = ceil_div(layer.rows * layer.columns, piece_values(call.format));
    layer.first_piece = p.pieces;
    p.pieces += layer.pieces;
    layer.partial = reinterpret_cast<float*>(end);
    end = round_up(end + layer.pieces * call.clients * 4, 256);
  }
  if (p.pieces > (int64_t{1} << 31) - 1)
    throw std::invalid_argument("client_totals: matrices too large for one launch");
  if (ceil_div(call.clients, kBatch) > kMostBlocksYZ)
    throw std::invalid_argument("K: at most " + std::to_string(kMostBlocksYZ * kBatch) + " clients in one call, got " +
                                std::to_string(call.clients));
  return end;
}

int64_t client_totals_workspace(const TotalsCall& call) {
  int64_t bytes = 0;
  auto p = std::make_unique<TotalsParams>();
  for (int64_t first = 0; first < call.layers; first += kTotalsLayers) bytes = most(bytes, plan(*p, call, first));
  return bytes;
}

template <int kFormat>
static void launch(const TotalsParams& p, bool vectors, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.pieces), static_cast<unsigned>(ceil_div(p.clients, kBatch)));
  const int shared = kBatch * kWarps * sizeof(float);
  if (vectors) {
    const auto kernel = client_totals_kernel<kFormat, true>;
    PT_LAUNCH(kernel, grid, dim3(kThreads), shared, stream, p);
  } else {
    const auto kernel = client_totals_kernel<kFormat, false>;
    PT_LAUNCH(kernel, grid, dim3(kThreads), shared, stream, p);
  }
  check_launch("client_totals_kernel");
}

void client_totals(const TotalsCall& call, const Device&, void* workspace, int64_t bytes, cudaStream_t stream) {
  auto p = std::make_unique<TotalsParams>();
  for (int64_t first = 0; first < call.layers; first += kTotalsLayers) {
    const int64_t needed = plan(*p, call, first);
    if (needed > bytes)
      throw std::invalid_argument("workspace of " + std::to_string(bytes) + " bytes, needed " + std::to_string(needed));
    for (int l = 0; l < p->count; ++l)
      p->layers[l].partial =
          reinterpret_cast<float*>(static_cast<char*>(workspace) + reinterpret_cast<intptr_t>(p->layers[l].partial));
    switch (call.format) {
      case kF32: launch<kF32>(*p, call.vectors, stream); break;
      case kBF16: launch<kBF16>(*p, call.vectors, stream); break;
      case kF16: launch<kF16>(*p, call.vectors, stream); break;
      case kI8: launch<kI8>(*p, call.vectors, stream); break;
      case kE4M3: launch<kE4M3>(*p, call.vectors, stream); break;
      default: throw std::invalid_argument("unknown format code " + std::to_string(call.format));
    }
    PT_LAUNCH(reduce_totals, dim3(static_cast<unsigned>(ceil_div(p->clients, 32)), p->count), dim3(1024), 4096, stream,
              *p);
    check_launch("reduce_totals");
  }
}

}  // namespace protoken::cuda
