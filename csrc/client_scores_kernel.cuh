// The streaming kernel behind client_scores: bank rows from global memory straight into matrix fragments.
//
// Work is cut into units: unit_rows rows of one client in one chunk of columns. A block walks a contiguous run of
// units, with the chunk's image of x resident in shared memory; a team of 4 warps multiplies 64 rows at a time with
// all tokens of the tile, weighs the result with the relevance while it is still in registers, and reduces it over
// the rows. Each unit leaves one number per token in the workspace; `reduce_scores` adds them in a fixed order. What
// a unit computes depends neither on the grid nor on K, so scores are the same bits for any split of the clients.
#pragma once

#include <stdexcept>

#include "client_scores.cuh"
#include "cuda_wgmma.cuh"

namespace protoken::cuda {

struct Stage {  // what a lane holds of rows g and g + 8 for one stage of columns
  uint4 low[kGroups], high[kGroups];
};

// Where a lane's two rows (g and g + 8 of its warp's 16) begin in this chunk, and how many rows are left from g on.
struct LaneRows {
  const char* at;
  int left;
};

// Of V values that went into sum_over_lanes<4>, the first that this lane ends with.
template <int kValues>
PT_BOTH int first_value(int lane) {
  return (lane / 16 % 2) * (kValues / 2) + (lane / 8 % 2) * (kValues / 4) + (lane / 4 % 2) * (kValues / 8);
}

// Of rows g and g + 8: two tokens each.
struct Relevance {
  float2 low, high;
};
__device__ __forceinline__ float2 bf16_pair(uint32_t pair) {
  return make_float2(bits_float(pair << 16), bits_float(pair & 0xffff0000u));
}
__device__ __forceinline__ Relevance load_relevance(const ScoreLayer& layer, int64_t index) {
  if (layer.relevance_bf16) {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(layer.relevance) + index);
    return {bf16_pair(v.x), bf16_pair(v.y)};
  }
  const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const float*>(layer.relevance) + index);
  return {make_float2(bits_float(v.x), bits_float(v.y)), make_float2(bits_float(v.z), bits_float(v.w))};
}

// The scales of rows g and g + 8 of a client, on their way while the rows are multiplied; 1 where there are none.
template <int kFormat>
__device__ __forceinline__ float2 load_scales(const ScoreLayer& layer, int client, int row) {
  if constexpr (format_bytes(kFormat) > 1) return make_float2(1.0f, 1.0f);
  const float* at = layer.scale + client * layer.rows + row;
  return make_float2(row < layer.rows ? bits_float(load_stream4(at)) : 0.0f,
                     row + 8 < layer.rows ? bits_float(load_stream4(at + 8)) : 0.0f);
}

// sum[i] += over this warp's 16 rows of acc * relevance (* scale). `row` is the lane's row g.
template <int kFormat, int kTokens>
__device__ __forceinline__ void weigh(const float (&acc)[kTokens / 8][4],
                                      float (&sum)[kTokens >= 32 ? kTokens / 32 : 1], const ScoreLayer& layer,
                                      float2 scales, int row) {
  const int lane = threadIdx.x % 32;
  float values[kTokens / 4];
  const int64_t row_blocks = ceil_div(layer.rows, kTeamRows) * (kTeamRows / 16),
                at = (blockIdx.y * row_blocks + row / 16) * (kTokens / 8) * 128 + lane * 4;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
    const auto [low, high] = load_relevance(layer, at + n * 128);
    if constexpr (format_bytes(kFormat) == 1) {
      values[2 * n] = acc[n][0] * scales.x * low.x + acc[n][2] * scales.y * high.x;
      values[2 * n + 1] = acc[n][1] * scales.x * low.y + acc[n][3] * scales.y * high.y;
    } else {
      values[2 * n] = acc[n][0] * low.x + acc[n][2] * high.x;
      values[2 * n + 1] = acc[n][1] * low.y + acc[n][3] * high.y;
    }
  }
  sum_over_lanes<4>(values, lane);  // the 8 rows that the lanes of equal l % 4 hold
#pragma unroll
  for (int i = 0; i < (kTokens >= 32 ? kTokens / 32 : 1); ++i) sum[i] += values[i];
}

// The image of one chunk into shared memory; every thread of the block calls it and may read the image after it.
__device__ __forceinline__ void load_image(unsigned char* shared, const uint16_t* image, int64_t bytes,
                                           uint64_t* barrier, uint32_t& parity) {
  const char* from = reinterpret_cast<const char*>(image);
#if defined(PROTOKEN_EMULATE) || __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, static_cast<uint32_t>(bytes));
    for (int64_t done = 0; done < bytes; done += 32768)
      bulk_copy(shared + done, from + done, static_cast<uint32_t>(least(32768, bytes - done)), barrier);
  }
  mbarrier_wait(barrier, parity);
  parity ^= 1;
#else
  for (int64_t done = threadIdx.x * 16; done < bytes; done += blockDim.x * 16) copy16_async(shared + done, from + done);
  copy_commit();
  copy_wait<0>();
#endif
  __syncthreads();
}

template <int kFormat, int kPlanesX, int kTokens, bool kWgmma>
__device__ __forceinline__ void multiply_stage(float (&acc)[kTokens / 8][4], const Stage& stage, const uint16_t* image,
                                               int width, int column) {
  constexpr int kProducts = products(kFormat), kPlanes = format_planes(kFormat);
  if constexpr (kWgmma) {
#if PT_HAS_WGMMA
    const uint32_t start = shared_address(image);
    uint32_t a[kGroups][kProducts][kPlanes][4];
    const auto decode_group = [&](int q) {
#pragma unroll
      for (int j = 0; j < kProducts; ++j) decode<kFormat>(stage.low[q], stage.high[q], j, a[q][j]);
    };
    // One-byte values take as long to decode as 128 tokens to multiply: a group is decoded while the one before is
    // multiplied. Narrower tiles need it less, and have no registers for it.
    constexpr bool kOverlap = format_bytes(kFormat) == 1 && kTokens == 128;
#pragma unroll
    for (int q = 0; q < (kOverlap ? 1 : kGroups); ++q) decode_group(q);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(acc[n][i]);
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      if (kOverlap && q > 0) {
        decode_group(q);
        wgmma_fence();
      }
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
        const int slots = column + q * group_columns(kFormat) + 16 * j;
#pragma unroll
        for (int px = 0; px < kPlanesX; ++px) {
          const uint64_t b =
              wgmma_descriptor(start + static_cast<uint32_t>((px * width + slots) * kTokens * 2), kTokens);
#pragma unroll
          for (int p = 0; p < kPlanes; ++p)
            if (p + px <= 2) Wgmma<kTokens, kFormat == kHalf>::run(acc, a[q][j][p], b);
        }
      }
    }
    wgmma_commit();
    wgmma_wait();
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(acc[n][i]);
#endif
  } else {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      uint32_t a[kProducts][kPlanes][4];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) decode<kFormat>(stage.low[q], stage.high[q], j, a[j]);
      multiply_group<kFormat, kPlanesX, kTokens>(acc, a, image, width, column + q * group_columns(kFormat),
                                                 static_cast<int>(threadIdx.x % 32));
    }
  }
}

// All units [first, last) of one chunk, this team's every teams()-th of them.
template <int kFormat, int kPlanesX, int kTokens, bool kVectors, bool kWgmma>
__device__ __forceinline__ void score_units(const ScoreParams& p, const ScoreLayer& layer, int chunk, int first,
                                            int last, const uint16_t* image, float* team_sums, uint32_t& turn) {
  constexpr int kBytes = format_bytes(kFormat), kSums = kTokens >= 32 ? kTokens / 32 : 1,
                kUnitRows = unit_rows(kTokens);
  // The shuffle tells the compiler that a team's branches are the same for all its threads, which wgmma wants.
  const int team = kWgmma ? shuffle_first(threadIdx.x / kTeamThreads) : threadIdx.x / kTeamThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int lane_row = warp * 16 + lane / 4, lane_column = chunk * layer.width + lane % 4 * per_load(kFormat);
  const int columns = static_cast<int>(layer.columns) - lane_column;  // from this lane's first one on
  const int64_t high = 8 * layer.stride_o * kBytes, step = kVectors ? kBytes : layer.stride_i * kBytes;
  const int stages = layer.width / stage_columns(kFormat), clients = static_cast<int>(p.clients);

  const auto lane_rows = [&](int client, int row) {
    const char* base =
        layer.table ? reinterpret_cast<const char*>(layer.table[client]) : layer.base + client * layer.client_stride;
    LaneRows rows;
    rows.at = base + (row + lane_row) * layer.stride_o * kBytes + lane_column * step;
    rows.left = static_cast<int>(layer.rows) - row - lane_row;
    return rows;
  };
  const auto load_stage = [&](Stage& stage, const LaneRows& rows, int at) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const int column = at * stage_columns(kFormat) + q * group_columns(kFormat), left = columns - column;
      const char* from = rows.at + column * step;
      stage.low[q] = load_values<kFormat, kVectors, true>(from, rows.left > 0 ? left : 0, step);
      stage.high[q] = load_values<kFormat, kVectors, true>(from + high, rows.left > 8 ? left : 0, step);
    }
  };

  int unit = first + team;
  if (unit >= last) return;
  int client = unit % clients, unit_row = unit / clients;
  LaneRows rows = lane_rows(client, unit_row * kUnitRows);
  Stage now, next;
  if constexpr (kVectors) load_stage(now, rows, 0);
#pragma unroll 1
  while (unit < last) {
    float sum[kSums] = {};
    unit += teams(kTokens, kPlanesX, kWgmma);
    const int end = static_cast<int>(least((unit_row + 1) * kUnitRows, layer.rows));
#pragma unroll 1
    for (int row = unit_row * kUnitRows; row < end; row += kTeamRows) {
      LaneRows next_rows = {rows.at, 0};
      if (row + kTeamRows < end) {
        next_rows = lane_rows(client, row + kTeamRows);
      } else if (unit < last) {
        next_rows = lane_rows(unit % clients, unit / clients * kUnitRows);
      }
      const float2 scales = load_scales<kFormat>(layer, client, row + lane_row);
      float acc[kTokens / 8][4] = {};
#pragma unroll 1
      for (int stage = 0; stage < stages; ++stage) {
        // The next stage's loads are under way while this one is multiplied, across rows and clients too. The barrier
        // keeps them ahead of the products, among which they would have less time to arrive.
        const bool same = stage + 1 < stages;
        if constexpr (kVectors) {
          if (!same) rows = next_rows;
          load_stage(next, rows, same ? stage + 1 : 0);
          warp_barrier();
        } else {
          load_stage(now, rows, stage);
        }
        multiply_stage<kFormat, kPlanesX, kTokens, kWgmma>(acc, now, image, layer.width,
                                                           stage * stage_columns(kFormat));
        if constexpr (kVectors) {
          now = next;
        } else if (!same) {
          rows = next_rows;
        }
      }
      weigh<kFormat, kTokens>(acc, sum, layer, scales, row + lane_row);
    }
    // The team's 4 warps, in their order; two buffers in turn, so that one barrier per unit is enough.
    float* sums = team_sums + ((team * 2 + (turn & 1)) * 4) * kTokens;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int value = first_value<kTokens / 4>(lane) + i;
      if (kTokens >= 32 || lane / 4 % 2 == 0) sums[warp * kTokens + value / 2 * 8 + lane % 4 * 2 + value % 2] = sum[i];
    }
    if (team == 0) {
      named_barrier<1>(kTeamThreads);
    } else if (team == 1) {
      named_barrier<2>(kTeamThreads);
    } else {
      named_barrier<3>(kTeamThreads);
    }
    const int t = threadIdx.x % kTeamThreads;
    if (t < kTokens) {
      const float total = ((sums[t] + sums[kTokens + t]) + sums[2 * kTokens + t]) + sums[3 * kTokens + t];
      const int64_t slot =
          ((blockIdx.y * static_cast<int64_t>(layer.chunks) + chunk) * layer.row_units + unit_row) * clients + client;
      layer.partial[slot * kTokens + t] = total;
    }
    ++turn;
    client = unit % clients, unit_row = unit / clients;
  }
}

// One block's share of the work of a launch.
template <int kFormat, int kPlanesX, int kTokens, bool kVectors, bool kWgmma>
__device__ __forceinline__ void score_block(const ScoreParams& p) {
  PT_SHARED(shared);
  float* team_sums = reinterpret_cast<float*>(shared + p.image_bytes);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(team_sums + teams(kTokens, kPlanesX, kWgmma) * 2 * 4 * kTokens);
  uint32_t parity = 0, turn = 0;
#if defined(PROTOKEN_EMULATE) || __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  __syncthreads();
#endif
  const int64_t begin = p.weight * blockIdx.x / gridDim.x, end = p.weight * (blockIdx.x + 1) / gridDim.x;
#pragma unroll 1
  for (int l = 0; l < p.count; ++l) {
    const ScoreLayer& layer = p.layers[l];
    const int64_t granule = static_cast<int64_t>(layer.width) * unit_rows(kTokens),
                  chunk_weight = layer.granules * granule;
    if (end <= layer.first_weight || begin >= layer.first_weight + chunk_weight * layer.chunks) continue;
    int64_t chunk = most(0, begin - layer.first_weight) / chunk_weight;
#pragma unroll 1
    for (; chunk < layer.chunks; ++chunk) {
      const int64_t at = layer.first_weight + chunk * chunk_weight;
      if (at >= end) break;
      // A granule belongs to the block in whose share of the work it begins.
      const int64_t from = ceil_div(most(0, begin - at), granule),
                    to = least(layer.granules, ceil_div(end - at, granule));
      if (from >= to) continue;
      const ImageShape shape = {kTokens, kPlanesX, layer.width, per_load(kFormat), kWgmma ? 1 : 0};
      const int64_t elements = shape.elements();
      load_image(shared, layer.image + (blockIdx.y * static_cast<int64_t>(layer.chunks) + chunk) * elements,
                 elements * 2, barrier, parity);
      score_units<kFormat, kPlanesX, kTokens, kVectors, kWgmma>(
          p, layer, static_cast<int>(chunk), static_cast<int>(from * teams(kTokens, kPlanesX, kWgmma)),
          static_cast<int>(least(to * teams(kTokens, kPlanesX, kWgmma), p.clients * layer.row_units)),
          reinterpret_cast<const uint16_t*>(shared), team_sums, turn);
      __syncthreads();  // nobody reads the image any more
    }
  }
}

template <int kFormat, int kPlanesX, int kTokens, bool kVectors, bool kWgmma>
__global__ void __launch_bounds__(teams(kTokens, kPlanesX, kWgmma) * kTeamThreads,
                                  kVectors ? blocks_per_sm(kTokens) : 1)
    client_scores_kernel(const __grid_constant__ ScoreParams p) {
  // Empty where the target has no wgmma: the host asks for it on compute capability 9.0 only.
  if constexpr (!kWgmma || PT_HAS_WGMMA) score_block<kFormat, kPlanesX, kTokens, kVectors, kWgmma>(p);
}

template <int kFormat, int kPlanesX, int kTokens, bool kVectors, bool kWgmma>
void launch_instance(const ScoreParams& params, const LaunchShape& shape, const Device& device, cudaStream_t stream) {
  const auto kernel = client_scores_kernel<kFormat, kPlanesX, kTokens, kVectors, kWgmma>;
  allow_shared(reinterpret_cast<const void*>(kernel), shape.shared, device);
  PT_LAUNCH(kernel, dim3(shape.grid_x, shape.grid_y), dim3(teams(kTokens, kPlanesX, kWgmma) * kTeamThreads),
            shape.shared, stream, params);
  check_launch("client_scores_kernel");
}

template <int kFormat>
void launch_scores(const ScoreParams& params, const LaunchShape& shape, bool vectors, const Device& device,
                   cudaStream_t stream) {
  constexpr int kFull = full_planes(kFormat);
  const int tokens = params.tile_tokens, planes = params.planes_x;
  if (!vectors) return launch_instance<kFormat, kFull, 16, false, false>(params, shape, device, stream);
  if (planes == kFull && kFull > 1) {
    if (tokens == 16) return launch_instance<kFormat, kFull, 16, true, false>(params, shape, device, stream);
    return params.descriptor ? launch_instance<kFormat, kFull, 64, true, true>(params, shape, device, stream)
                             : launch_instance<kFormat, kFull, 64, true, false>(params, shape, device, stream);
  }
  if constexpr (kFormat != kF16) {
    if (tokens == 16) return launch_instance<kFormat, 1, 16, true, false>(params, shape, device, stream);
    if (params.descriptor) {
      return tokens == 64 ? launch_instance<kFormat, 1, 64, true, true>(params, shape, device, stream)
                          : launch_instance<kFormat, 1, 128, true, true>(params, shape, device, stream);
    }
    if (tokens == 64) return launch_instance<kFormat, 1, 64, true, false>(params, shape, device, stream);
    if constexpr (widest_tile(kFormat, 1, false) == 128)
      return launch_instance<kFormat, 1, 128, true, false>(params, shape, device, stream);
  }
  throw std::runtime_error("client_scores: no kernel for this combination of format, planes and tile");
}

}  // namespace protoken::cuda
