// client_scores on CUDA: plan a call, pack x and grad, launch the streaming kernels, add up what the units left.
#include "client_scores.cuh"

#include <stdexcept>

namespace protoken::cuda {

constexpr int kReduceThreads = 512, kReduceTokens = 16;  // of a block; few clients would not fill the device else
constexpr int64_t kLargest = (int64_t{1} << 31) - 1;

// x as images, grad as the lanes will want it: z = 0 and 1, one layer per y.
__global__ void __launch_bounds__(256) pack_scores(const __grid_constant__ ScoreParams p) {
  const ScoreLayer& layer = p.layers[blockIdx.y];
  const int64_t begin = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, step = gridDim.x * blockDim.x;
  if (blockIdx.z == 0) {
    const ImageShape shape = {p.tile_tokens, p.planes_x, layer.width, p.e, p.descriptor};
    const int64_t total = image_octets(shape, static_cast<int64_t>(p.tiles) * layer.chunks);
    for (int64_t i = begin; i < total; i += step)
      pack_octet(layer.x, p.tokens, layer.columns, shape, layer.chunks, p.half != 0, i,
                 const_cast<uint16_t*>(layer.image));
    return;
  }
  // What one lane needs for 16 rows and 8 tokens.
  const int64_t row_blocks = round_up(layer.rows, kTeamRows) / 16,
                total = p.tiles * row_blocks * (p.tile_tokens / 8) * 32;
  for (int64_t i = begin; i < total; i += step) {
    const int lane = static_cast<int>(i % 32), octet = static_cast<int>(i / 32 % (p.tile_tokens / 8));
    const int64_t block = i / 32 / (p.tile_tokens / 8), row = block % row_blocks * 16 + lane / 4,
                  token = block / row_blocks * p.tile_tokens + octet * 8 + lane % 4 * 2;
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t r = row + j / 2 * 8, t = token + j % 2, at = t * layer.grad.stride_t + r * layer.grad.stride_c;
      values[j] = r < layer.rows && t < p.tokens ? load_float(layer.grad.data, at, layer.grad.dtype) : 0.0f;
    }
    if (layer.relevance_bf16) {
      uint2* to = static_cast<uint2*>(const_cast<void*>(layer.relevance));
      to[i] = make_uint2(take_plane(values[0], values[1]), take_plane(values[2], values[3]));
    } else {
      store_values<4>(static_cast<float*>(const_cast<void*>(layer.relevance)) + 4 * i, values);
    }
  }
}

// out[k, t] = sum over the units of client k, in an order that depends on their number only.
__global__ void __launch_bounds__(kReduceThreads) reduce_scores(const __grid_constant__ ScoreParams p) {
  PT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const ScoreLayer& layer = p.layers[blockIdx.z];
  constexpr int kSlices = kReduceThreads / kReduceTokens;
  const int tokens = p.tile_tokens, pieces = tokens / kReduceTokens, slice = threadIdx.x / kReduceTokens,
            t = static_cast<int>(blockIdx.x % pieces) * kReduceTokens + threadIdx.x % kReduceTokens;
  const int64_t client = blockIdx.x / pieces, tile = blockIdx.y, token = tile * tokens + t,
                slots = static_cast<int64_t>(layer.chunks) * layer.row_units;
  const float* from = layer.partial + (tile * slots * p.clients + client) * tokens + t;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t slot = slice; slot < slots; slot += kSlices) sum += from[slot * p.clients * tokens];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice == 0 && token < p.tokens) {
    for (int s = 1; s < kSlices; ++s) sum += sums[s * kReduceTokens + threadIdx.x];
    layer.out[client * p.tokens + token] = sum;
  }
}

static int64_t place(int64_t& end, int64_t bytes) {
  const int64_t at = end;
  end = round_up(end + bytes, 256);
  return at;
}

static void require_int(const char* name, int64_t value) {
  if (value > kLargest)
    throw std::invalid_argument(std::string(name) + " does not fit into 31 bits: " + std::to_string(value));
}

// Fills the parameters; addresses inside the workspace are offsets until `bind` adds its base. Returns its size.
static int64_t plan(ScoreParams& p, const ScoresCall& call, int64_t first_layer, const Device& device) {
  p.planes_x = call.planes_x == 1 && call.vectors && call.format != kF16 ? 1 : full_planes(call.format);
  const bool wgmma = call.vectors && call.tokens > 16 && call.path != kPathMma && device.major == 9;
  const auto fits = [&](int tile) {  // the widest image a layer may have
    const int width = static_cast<int>(round_up(max_width(tile, p.planes_x), stage_columns(call.format)));
    const ImageShape shape = {tile, p.planes_x, width, per_load(call.format), 0};
    return shared_bytes(static_cast<int>(shape.elements() * 2), tile, p.planes_x, wgmma) <= device.shared_bytes;
  };
  p.tile_tokens = widest_tile(call.format, p.planes_x, wgmma);
  if (call.tokens <= 64 || !fits(p.tile_tokens)) p.tile_tokens = 64;
  if (call.tokens <= 16 || !call.vectors || !fits(64)) p.tile_tokens = 16;
  p.descriptor = wgmma && p.tile_tokens > 16 ? 1 : 0;
  p.e = per_load(call.format);
  p.half = call.format == kHalf ? 1 : 0;
  p.clients = call.clients;
  p.tokens = call.tokens;
  p.tiles = static_cast<int32_t>(ceil_div(call.tokens, p.tile_tokens));
  p.count = static_cast<int32_t>(least(kLayers, call.layers - first_layer));
  require_int("T", call.tokens * 2);
  if (p.tiles > kMostBlocksYZ)
    throw std::invalid_argument("T: at most " + std::to_string(kMostBlocksYZ) + " tiles of " +
                                std::to_string(p.tile_tokens) + " tokens in one call, got " +
                                std::to_string(call.tokens) + " tokens; score them in parts");
  require_int("K", call.clients * (p.tile_tokens / kReduceTokens));
  int64_t end = 0, weight = 0;
  p.image_bytes = 0;
  for (int l = 0; l < p.count; ++l) {
    const int64_t* row = call.table + (first_layer + l) * kScoreColumns;
    ScoreLayer& layer = p.layers[l];
    layer = ScoreLayer{};
    layer.x = {reinterpret_cast<const void*>(row[0]), row[1], row[2], static_cast<int32_t>(row[3]), 0};
    layer.grad = {reinterpret_cast<const void*>(row[4]), row[5], row[6], static_cast<int32_t>(row[7]), 0};
    layer.rows = row[8], layer.columns = row[9];
    layer.base = reinterpret_cast<const char*>(row[10]), layer.client_stride = row[11];
    layer.table = reinterpret_cast<const int64_t*>(row[12]);
    layer.stride_o = row[13], layer.stride_i = row[14];
    layer.scale = reinterpret_cast<const float*>(row[15]);
    layer.out = reinterpret_cast<float*>(row[16]);
    require_int("O", layer.rows + 256);
    require_int("I", layer.columns + 4096);
    const int64_t fewest = ceil_div(layer.columns, max_width(p.tile_tokens, p.planes_x));
    layer.width = static_cast<int32_t>(round_up(ceil_div(layer.columns, fewest), stage_columns(call.format)));
    layer.chunks = static_cast<int32_t>(ceil_div(layer.columns, layer.width));
    layer.row_units = static_cast<int32_t>(ceil_div(layer.rows, unit_rows(p.tile_tokens)));
    require_int("K * O / 64", call.clients * layer.row_units + 4);
    layer.granules = ceil_div(call.clients * layer.row_units, teams(p.tile_tokens, p.planes_x, wgmma));
    layer.first_weight = weight;
    weight += layer.granules * layer.chunks * layer.width * unit_rows(p.tile_tokens);
    layer.relevance_bf16 = layer.grad.dtype == kBF16 ? 1 : 0;
    const int64_t image = ImageShape{p.tile_tokens, p.planes_x, layer.width, p.e, p.descriptor}.elements() * 2;
    p.image_bytes = static_cast<int32_t>(most(p.image_bytes, image));
    const int64_t pitch = static_cast<int64_t>(p.tiles) * p.tile_tokens, rows = round_up(layer.rows, kTeamRows);
    layer.image = reinterpret_cast<const uint16_t*>(place(end, p.tiles * layer.chunks * image));
    layer.relevance = reinterpret_cast<const void*>(place(end, rows * pitch * (layer.relevance_bf16 ? 2 : 4)));
    layer.partial = reinterpret_cast<float*>(place(end, pitch * layer.chunks * layer.row_units * call.clients * 4));
  }
  p.weight = weight;
  return end;
}

static void bind(ScoreParams& p, char* workspace) {
  for (int l = 0; l < p.count; ++l) {
    ScoreLayer& layer = p.layers[l];
    layer.image = reinterpret_cast<const uint16_t*>(workspace + reinterpret_cast<intptr_t>(layer.image));
    layer.relevance = workspace + reinterpret_cast<intptr_t>(layer.relevance);
    layer.partial = reinterpret_cast<float*>(workspace + reinterpret_cast<intptr_t>(layer.partial));
  }
}

int64_t client_scores_workspace(const ScoresCall& call, const Device& device) {
  int64_t bytes = 0;
  auto p = std::make_unique<ScoreParams>();
  for (int64_t first = 0; first < call.layers; first += kLayers) bytes = most(bytes, plan(*p, call, first, device));
  return bytes;
}

static void launch_format(const ScoreParams& p, const LaunchShape& shape, const ScoresCall& call, const Device& device,
                          cudaStream_t stream) {
  switch (call.format) {
    case kF32: return launch_scores<kF32>(p, shape, call.vectors, device, stream);
    case kBF16: return launch_scores<kBF16>(p, shape, call.vectors, device, stream);
    case kF16: return launch_scores<kF16>(p, shape, call.vectors, device, stream);
    case kI8: return launch_scores<kI8>(p, shape, call.vectors, device, stream);
    case kE4M3: return launch_scores<kE4M3>(p, shape, call.vectors, device, stream);
    case kHalf: return launch_scores<kHalf>(p, shape, call.vectors, device, stream);
    default: throw std::invalid_argument("unknown format code " + std::to_string(call.format));
  }
}

void client_scores(const ScoresCall& call, const Device& device, void* workspace, int64_t bytes, cudaStream_t stream) {
  auto p = std::make_unique<ScoreParams>();
  for (int64_t first = 0; first < call.layers; first += kLayers) {
    const int64_t needed = plan(*p, call, first, device);
    if (needed > bytes)
      throw std::invalid_argument("workspace of " + std::to_string(bytes) + " bytes, needed " + std::to_string(needed));
    bind(*p, static_cast<char*>(workspace));
    int64_t largest = 0;  // of what the layers have to pack
    for (int l = 0; l < p->count; ++l)
      largest = most(largest, most(p->layers[l].chunks * (p->layers[l].width / 8), ceil_div(p->layers[l].rows, 4)));
    const unsigned blocks = pack_blocks(largest * p->tiles * p->tile_tokens, device.processors);
    PT_LAUNCH(pack_scores, dim3(blocks, p->count, 2), dim3(256), 0, stream, *p);
    check_launch("pack_scores");
    LaunchShape shape;
    shape.shared = shared_bytes(p->image_bytes, p->tile_tokens, p->planes_x, p->descriptor != 0);
    if (shape.shared > device.shared_bytes)
      throw std::runtime_error("client_scores needs " + std::to_string(shape.shared) +
                               " bytes of shared memory, the device has " + std::to_string(device.shared_bytes));
    const int resident = device.processors * (call.vectors ? blocks_per_sm(p->tile_tokens) : 1);
    shape.grid_x = static_cast<int>(most(1, resident / p->tiles));
    shape.grid_y = p->tiles;
    launch_format(*p, shape, call, device, stream);
    const int64_t reductions = p->clients * (p->tile_tokens / kReduceTokens);
    PT_LAUNCH(reduce_scores, dim3(static_cast<unsigned>(reductions), p->tiles, p->count), dim3(kReduceThreads),
              kReduceThreads * sizeof(float), stream, *p);
    check_launch("reduce_scores");
  }
}

}  // namespace protoken::cuda
