// relevance_head on CUDA: norm, head and objective of every token, and their vector-Jacobian product.
//
//   head_prepare   norm(h), its moments and the target's own logit
//   once           up to 4 tokens: head_once_kernel (relevance_head_once.cuh)
//   twice          else: head_pack, head_logits_kernel, head_stats, head_mean_kernel (relevance_head_twice.cuh)
//   head_combine   the parts of the mean and of the softmax's mass, in order
//   head_finish    own row minus mean, pulled back through the norm
//
// The raw logit needs the first and the last only. How the vocabulary is cut does not depend on the tokens, so a token
// gets the same bits beside any others that take the same kernels.
#include <stdexcept>

#include "relevance_head_once.cuh"
#include "relevance_head_twice.cuh"

namespace protoken::cuda {

// Sum over the block in a fixed order, for every thread; scratch holds one float per warp.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) v += shuffle_xor(v, mask);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += scratch[w];
  __syncthreads();
  return total;
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float highest = -INFINITY;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) highest = fmaxf(highest, scratch[w]);
  __syncthreads();
  return highest;
}

// The target's id, or -1 when it is none of the vocabulary's: checked here, since the host does not wait for it.
__device__ __forceinline__ int64_t target_of(const HeadParams& p, int64_t token) {
  const int64_t target = p.targets[token * p.target_stride];
  return target >= 0 && target < p.vocabulary ? target : -1;
}
__device__ __forceinline__ float load_weight(const HeadParams& p, int64_t row, int64_t column, int format) {
  return load_float(p.weight, row * p.stride_v + column * p.stride_d, format);
}
// Unit direction of h before the norm's weight.
__device__ __forceinline__ float direction_of(const HeadParams& p, int64_t token, int64_t column, float centre,
                                              float inverse) {
  return (load_float(p.hidden.data, token * p.hidden.stride_t + column * p.hidden.stride_c, p.hidden.dtype) - centre) *
         inverse;
}

__global__ void __launch_bounds__(kHeadThreads) head_prepare(const __grid_constant__ HeadParams p, int format) {
  PT_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t token = blockIdx.x, target = target_of(p, token);
  const float count = static_cast<float>(p.width);
  float centre = 0.0f, inverse = 1.0f;
  if (p.norm == kLayerNorm) {
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < p.width; c += kHeadThreads) sum += direction_of(p, token, c, 0.0f, 1.0f);
    centre = block_sum(sum, scratch) / count;
  }
  if (p.norm != kNoNorm) {
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < p.width; c += kHeadThreads) {
      const float h = direction_of(p, token, c, centre, 1.0f);
      sum = fma_rn(h, h, sum);
    }
    inverse = 1.0f / sqrtf(block_sum(sum, scratch) / count + p.eps);
  }
  float dot = 0.0f;
  for (int64_t c = threadIdx.x; c < p.width; c += kHeadThreads) {
    float normed = direction_of(p, token, c, centre, inverse);
    if (p.norm_weight.data) normed *= load_vector(p.norm_weight, c);
    if (p.norm_bias.data) normed += load_vector(p.norm_bias, c);
    p.normed[token * p.width + c] = normed;
    if (target >= 0) dot = fma_rn(normed, load_weight(p, target, c, format), dot);
  }
  dot = block_sum(dot, scratch);
  if (threadIdx.x == 0) {
    p.moments[2 * token] = centre;
    p.moments[2 * token + 1] = inverse;
    const float bias = p.bias.data && target >= 0 ? load_vector(p.bias, target) : 0.0f;
    p.own[token] = target >= 0 ? p.scale * (dot + bias) : bits_float(0x7fc00000u);
  }
}

__global__ void __launch_bounds__(kHeadThreads) head_pack(const __grid_constant__ HeadParams p, ImageShape shape) {
  const Matrix from = {p.normed, p.width, 1, kF32, 0};
  const int64_t total = image_octets(shape, static_cast<int64_t>(p.tiles) * p.stages),
                stride = static_cast<int64_t>(gridDim.x) * kHeadThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x; i < total; i += stride)
    pack_octet(from, p.tokens, p.width, shape, p.stages, false, i, p.images);
}

// Maximum and mass of one token in one part of the vocabulary.
__global__ void __launch_bounds__(kHeadThreads) head_stats(const __grid_constant__ HeadParams p) {
  PT_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t token = blockIdx.x % p.tokens, part = blockIdx.x / p.tokens;
  const int64_t begin = part * p.vocabulary / p.stat_parts, end = (part + 1) * p.vocabulary / p.stat_parts;
  const float* logits = p.logits + token * p.vocabulary;
  float top = -INFINITY, sum = 0.0f;
  for (int64_t v = begin + threadIdx.x; v < end; v += kHeadThreads)
    top = fmaxf(top, soft_capped(logits[v], p.cap).value);
  top = block_max(top, scratch);
  for (int64_t v = begin + threadIdx.x; v < end; v += kHeadThreads)
    sum += expf(soft_capped(logits[v], p.cap).value - base_of(top));
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    p.stats[(part * p.tokens + token) * 2] = top;
    p.stats[(part * p.tokens + token) * 2 + 1] = sum;
  }
}

constexpr int kCombineShared = (32 * 32 * 2 + 32) * static_cast<int>(sizeof(float));

// mean[t] and mass[t] from their parts: 32 columns of one token per block, 32 slices of the parts in order.
__global__ void __launch_bounds__(1024) head_combine(const __grid_constant__ HeadParams p) {
  PT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [32, 32]
  float *masses = sums + 1024, *scratch = masses + 1024;
  const int slice = threadIdx.x / 32;
  const int64_t token = blockIdx.x % p.tokens, column = blockIdx.x / p.tokens * 32 + threadIdx.x % 32;
  const float* stats = p.stats + token * 2;
  float top = -INFINITY;
  for (int64_t part = threadIdx.x; part < p.stat_parts; part += 1024) top = fmaxf(top, stats[part * p.tokens * 2]);
  top = block_max(top, scratch);
  float sum = 0.0f, mass = 0.0f;
  for (int64_t part = slice; part < p.stat_parts; part += 32)
    mass = fma_rn(stats[part * p.tokens * 2 + 1], expf(stats[part * p.tokens * 2] - base_of(top)), mass);
  if (column < p.width) {
#pragma unroll 4
    for (int64_t part = slice; part < p.mean_parts; part += 32) {
      const float factor = p.relative ? expf(stats[part * p.tokens * 2] - base_of(top)) : 1.0f;
      sum = fma_rn(p.partial[(part * p.tokens + token) * p.width + column], factor, sum);
    }
  }
  sums[threadIdx.x] = sum;
  masses[threadIdx.x] = mass;
  __syncthreads();
  if (slice > 0) return;
  for (int s = 1; s < 32; ++s) sum += sums[s * 32 + threadIdx.x], mass += masses[s * 32 + threadIdx.x];
  if (column < p.width) p.mean[token * p.width + column] = p.scale * sum / mass;
  if (column == 0) p.mass[token] = base_of(top) + logf(mass);
}

// What reaches the unit direction of h: (own row minus mean) times the norm's weight.
__device__ __forceinline__ float upstream_of(const HeadParams& p, int64_t token, int64_t target, int64_t column,
                                             float slope, int format) {
  float upstream = target >= 0 ? slope * load_weight(p, target, column, format) : bits_float(0x7fc00000u);
  if (p.logprob) upstream -= p.mean[token * p.width + column];
  return p.norm_weight.data ? upstream * load_vector(p.norm_weight, column) : upstream;
}

__global__ void __launch_bounds__(kHeadThreads) head_finish(const __grid_constant__ HeadParams p, int format) {
  PT_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t token = blockIdx.x, target = target_of(p, token);
  const float centre = p.moments[2 * token], inverse = p.moments[2 * token + 1];
  const Capped own = soft_capped(p.own[token], p.cap);
  const float slope = p.scale * own.slope, count = static_cast<float>(p.width);
  float along = 0.0f, level = 0.0f;
  if (p.norm != kNoNorm) {
    for (int64_t c = threadIdx.x; c < p.width; c += kHeadThreads) {
      const float upstream = upstream_of(p, token, target, c, slope, format);
      along = fma_rn(upstream, direction_of(p, token, c, centre, inverse), along);
      level += upstream;
    }
    along = block_sum(along, scratch) / count;
    level = p.norm == kLayerNorm ? block_sum(level, scratch) / count : 0.0f;
  }
  for (int64_t c = threadIdx.x; c < p.width; c += kHeadThreads) {
    const float upstream = upstream_of(p, token, target, c, slope, format);
    p.grad[token * p.width + c] =
        p.norm == kNoNorm ? upstream
                          : (upstream - level - direction_of(p, token, c, centre, inverse) * along) * inverse;
  }
  if (threadIdx.x == 0) p.value[token] = own.value - (p.logprob ? p.mass[token] : 0.0f);
}

static Vector vector_at(const int64_t* row) {
  return {reinterpret_cast<const void*>(row[0]), row[1], static_cast<int32_t>(row[2]), 0};
}

// Columns per thread with which head_once_kernel takes rows of this width, 0 when it does not.
static int once_columns(const HeadCall& call, int64_t width, int64_t tokens) {
  if (!call.vectors || call.path == kHeadTwice) return 0;
  if (call.path == kHeadAuto && tokens > kOnceTokens) return 0;
  if (width <= kOnceThreads * 8) return 8;
  return tokens == 1 && width <= kOnceThreads * 16 ? 16 : 0;
}

struct Work {
  HeadParams p;
  int columns;           // per thread of head_once_kernel; 0: the head is read twice
  int64_t bytes, group;  // of workspace; tokens at once
};

static Work plan(const HeadCall& call, const Device& device) {
  const int64_t* row = call.table;
  Work work{};
  HeadParams& p = work.p;
  p.hidden = {reinterpret_cast<const void*>(row[0]), row[1], row[2], static_cast<int32_t>(row[3]), 0};
  p.targets = reinterpret_cast<const int64_t*>(row[4]), p.target_stride = row[5];
  p.weight = reinterpret_cast<const char*>(row[6]), p.stride_v = row[7], p.stride_d = row[8];
  p.bias = vector_at(row + 9), p.norm_weight = vector_at(row + 12), p.norm_bias = vector_at(row + 15);
  p.grad = reinterpret_cast<float*>(row[18]), p.value = reinterpret_cast<float*>(row[19]);
  const int64_t tokens = row[20];
  p.width = row[21], p.vocabulary = row[22];
  if (tokens < 1 || p.width < 1 || p.vocabulary < 1)
    throw std::invalid_argument("relevance_head: at least one token, one column and one row of the head");
  if (p.width > (int64_t{1} << 31) - 4096) throw std::invalid_argument("relevance_head: d must fit into 31 bits");
  p.eps = call.eps, p.scale = call.scale, p.cap = call.softcap;
  p.norm = call.norm, p.logprob = call.logprob;
  if (call.format != kF32 && call.format != kBF16 && call.format != kF16)
    throw std::invalid_argument("relevance_head: unknown format code " + std::to_string(call.format));
  work.columns = p.logprob ? once_columns(call, p.width, tokens) : 0;
  if (call.path == kHeadOnce && p.logprob && !work.columns)
    throw std::invalid_argument("relevance_head: this head cannot be read once");
  work.group = least(tokens, work.columns ? (work.columns == 8 ? kOnceTokens : 1) : kGroupTokens);

  const int64_t group = work.group, e = per_load(call.format);
  int64_t end = 0;
  const auto floats = [&](int64_t count) {
    const int64_t at = end;
    end = round_up(end + count * 4, 256);
    return reinterpret_cast<float*>(at);
  };
  p.normed = floats(group * p.width), p.moments = floats(2 * group), p.own = floats(group);
  if (p.logprob) {
    if (work.columns) {
      p.team_threads = static_cast<int32_t>(round_up(ceil_div(p.width / e, work.columns / e), 32));
      p.teams = kOnceThreads / p.team_threads;
      p.stat_parts = p.mean_parts = least(device.processors, ceil_div(p.vocabulary, 8 * p.teams)) * p.teams;
      p.relative = 1;
    } else {
      const int64_t columns = mean_columns(call.format);
      p.tile_tokens = tokens <= 16 || !call.vectors ? 16 : 32;
      p.tiles = static_cast<int32_t>(ceil_div(group, p.tile_tokens));
      p.stages = static_cast<int32_t>(ceil_div(p.width, stage_columns(call.format)));
      p.column_blocks = static_cast<int32_t>(ceil_div(p.width, columns));
      const int64_t splits = most(1, least(kMostSplits, kMeanBlocks / p.column_blocks));
      p.split_rows = round_up(ceil_div(p.vocabulary, splits), kMeanRows);
      p.stat_parts = kStatParts, p.mean_parts = ceil_div(p.vocabulary, p.split_rows);
      const ImageShape shape = {p.tile_tokens, kHeadPlanes, stage_columns(call.format), static_cast<int>(e), 0};
      p.images = reinterpret_cast<uint16_t*>(floats(p.tiles * p.stages * shape.elements() / 2));
      p.logits = floats(group * p.vocabulary);
    }
    p.mass = floats(group), p.mean = floats(group * p.width), p.stats = floats(p.stat_parts * group * 2);
    p.partial = floats(p.mean_parts * group * p.width);
    const int64_t blocks = most(ceil_div(p.vocabulary, kLogitRows), p.mean_parts * most(1, p.column_blocks)) * group;
    if (most(blocks, ceil_div(p.width, 32) * group) > (int64_t{1} << 31) - 1)
      throw std::invalid_argument("relevance_head: a head too large for one launch");
  }
  work.bytes = end;
  return work;
}

int64_t relevance_head_workspace(const HeadCall& call, const Device& device) { return plan(call, device).bytes; }

template <int kFormat, int kTokens, int kColumns>
static void launch_once(const HeadParams& p, cudaStream_t stream) {
  const auto kernel = head_once_kernel<kFormat, kTokens, kColumns>;
  PT_LAUNCH(kernel, dim3(static_cast<unsigned>(p.stat_parts / p.teams)), dim3(kOnceThreads), kOnceShared, stream, p);
  check_launch("head_once_kernel");
}

template <int kFormat, bool kVectors, int kTokens>
static void launch_twice(const HeadParams& p, const Device& device, cudaStream_t stream) {
  const ImageShape shape = {kTokens, kHeadPlanes, stage_columns(kFormat), per_load(kFormat), 0};
  const int shared = static_cast<int>(2 * shape.elements() * 2);
  const auto logits = head_logits_kernel<kFormat, kVectors, kTokens>;
  const auto mean = head_mean_kernel<kFormat, kVectors, kTokens>;
  allow_shared(reinterpret_cast<const void*>(logits), shared, device);
  const unsigned pack = pack_blocks(image_octets(shape, static_cast<int64_t>(p.tiles) * p.stages), device.processors);
  PT_LAUNCH(head_pack, dim3(pack), dim3(kHeadThreads), 0, stream, p, shape);
  check_launch("head_pack");
  const int64_t row_blocks = ceil_div(p.vocabulary, kLogitRows);
  PT_LAUNCH(logits, dim3(static_cast<unsigned>(p.tiles * row_blocks)), dim3(kHeadThreads), shared, stream, p);
  check_launch("head_logits_kernel");
  PT_LAUNCH(head_stats, dim3(static_cast<unsigned>(p.tokens * p.stat_parts)), dim3(kHeadThreads), 64, stream, p);
  check_launch("head_stats");
  PT_LAUNCH(mean, dim3(static_cast<unsigned>(p.tiles * p.column_blocks * p.mean_parts)), dim3(kHeadThreads),
            mean_shared(kTokens), stream, p);
  check_launch("head_mean_kernel");
}

template <int kFormat>
static void launch_mean(const HeadParams& p, const HeadCall& call, int columns, const Device& device,
                        cudaStream_t stream) {
  if (columns == 16) {
    launch_once<kFormat, 1, 16>(p, stream);
  } else if (columns == 8) {
    call.table[20] == 1 ? launch_once<kFormat, 1, 8>(p, stream) : launch_once<kFormat, kOnceTokens, 8>(p, stream);
  } else if (p.tile_tokens == 16) {
    call.vectors ? launch_twice<kFormat, true, 16>(p, device, stream)
                 : launch_twice<kFormat, false, 16>(p, device, stream);
  } else {
    launch_twice<kFormat, true, 32>(p, device, stream);
  }
  PT_LAUNCH(head_combine, dim3(static_cast<unsigned>(ceil_div(p.width, 32) * p.tokens)), dim3(1024), kCombineShared,
            stream, p);
  check_launch("head_combine");
}

void relevance_head(const HeadCall& call, const Device& device, void* workspace, int64_t bytes, cudaStream_t stream) {
  const Work work = plan(call, device);
  if (work.bytes > bytes)
    throw std::invalid_argument("workspace of " + std::to_string(bytes) + " bytes, needed " +
                                std::to_string(work.bytes));
  HeadParams p = work.p;
  for (float** at : {&p.normed, &p.moments, &p.own, &p.mass, &p.mean, &p.stats, &p.partial, &p.logits})
    *at = reinterpret_cast<float*>(static_cast<char*>(workspace) + reinterpret_cast<intptr_t>(*at));
  p.images = reinterpret_cast<uint16_t*>(static_cast<char*>(workspace) + reinterpret_cast<intptr_t>(p.images));
  const int64_t tokens = call.table[20], size = format_bytes(p.hidden.dtype);
  for (int64_t first = 0; first < tokens; first += work.group) {
    p.tokens = static_cast<int32_t>(least(work.group, tokens - first));
    p.tiles = p.tile_tokens ? static_cast<int32_t>(ceil_div(p.tokens, p.tile_tokens)) : 0;
    p.hidden.data = static_cast<const char*>(work.p.hidden.data) + first * p.hidden.stride_t * size;
    p.targets = work.p.targets + first * p.target_stride;
    p.grad = work.p.grad + first * p.width, p.value = work.p.value + first;
    PT_LAUNCH(head_prepare, dim3(p.tokens), dim3(kHeadThreads), 64, stream, p, call.format);
    check_launch("head_prepare");
    if (p.logprob) {
      switch (call.format) {
        case kF32: launch_mean<kF32>(p, call, work.columns, device, stream); break;
        case kBF16: launch_mean<kBF16>(p, call, work.columns, device, stream); break;
        default: launch_mean<kF16>(p, call, work.columns, device, stream);
      }
    }
    PT_LAUNCH(head_finish, dim3(p.tokens), dim3(kHeadThreads), 64, stream, p, call.format);
    check_launch("head_finish");
  }
}

}  // namespace protoken::cuda
