// What client_scores' host code and kernels share: the plan of a call and its kernel parameters.
#pragma once

#include "cuda_ops.h"
#include "cuda_tiles.cuh"

namespace protoken::cuda {

constexpr int kLayers = 48;    // per launch; their description travels as kernel parameters
constexpr int kTeamRows = 64;  // a team of 4 warps multiplies 64 rows of one client at a time
constexpr int kTeamThreads = 128;

struct ScoreLayer {
  const char* base;       // client 0, when the clients lie `client_stride` bytes apart
  const int64_t* table;   // else their addresses
  const float* scale;     // [K, O] or null
  const uint16_t* image;  // packed x, [tiles, chunks] images
  // grad, fp32 or bf16, [tiles, row blocks of 16, octets of tokens, 32 lanes]: 4 values that a lane weighs its products
  // with, rows g and g + 8 of tokens 2 c and 2 c + 1 each.
  const void* relevance;
  float* partial;  // [tiles, chunks, row_units, K, tokens]
  float* out;      // [K, T]
  Matrix x, grad;
  int64_t client_stride, stride_o, stride_i;  // bytes, elements, elements
  int64_t rows, columns;
  int64_t first_weight;  // work before this layer, in columns times rows
  int64_t granules;      // per chunk: as many units as a block has teams; a unit is unit_rows rows of one client
  int32_t width, chunks, row_units, relevance_bf16;
};

struct ScoreParams {
  ScoreLayer layers[kLayers];
  int64_t clients, tokens, weight;
  int32_t count, tiles, tile_tokens, planes_x, descriptor, e, half, image_bytes;
};

struct LaunchShape {
  int grid_x, grid_y, shared;
};

// Tiles are 16, 64 or 128 tokens wide. Two blocks of 8 warps share a multiprocessor at 16 tokens; wider tiles leave
// room for one, of as many warps as the registers allow without spilling.
PT_BOTH constexpr int widest_tile(int format, int planes_x, bool wgmma) {
  return planes_x == 1 && (wgmma || format_bytes(format) > 1) ? 128 : 64;
}
PT_BOTH constexpr int max_width(int tokens, int planes_x) {
  return tokens == 16 ? (planes_x < 3 ? 1024 : 768) : (planes_x < 3 ? 512 : 256);
}
PT_BOTH constexpr int unit_rows(int tokens) { return tokens == 16 ? 64 : 128; }
PT_BOTH constexpr int teams(int tokens, int planes_x, bool wgmma) {
  return wgmma && tokens == 64 && planes_x == 1 ? 3 : 2;
}
PT_BOTH constexpr int blocks_per_sm(int tokens) { return tokens == 16 ? 2 : 1; }
PT_BOTH int shared_bytes(int image_bytes, int tokens, int planes_x, bool wgmma) {
  return image_bytes + teams(tokens, planes_x, wgmma) * 2 * 4 * tokens * static_cast<int>(sizeof(float)) + 16;
}

// One per format, each in a file of its own so that they compile side by side.
template <int kFormat>
void launch_scores(const ScoreParams& params, const LaunchShape& shape, bool vectors, const Device& device,
                   cudaStream_t stream);

}  // namespace protoken::cuda
