// client_scores_lowrank on CUDA: s[k, t] = scale[k] sum_r <A_k[r], x_t> <B_k[:, r], g_t>.
//
// Rows (client, rank index) of A and of B are streamed through the matrix units like the rows of a dense bank; both
// products stay on the chip and meet in one sum over the rank. A block takes 128 or 192 rows: as many whole clients
// of one rank as fit. Where B lies as [O, r], a warp loads 8 x 8 values and turns them with movmatrix, so no transposed
// copy is ever made.
//
// Each inner product is cut into kSegments fixed pieces that are added in order. With many clients a block computes
// all of them; with few, each (piece, factor) is a block of its own and `combine` adds the same numbers in the same
// order: the same bits either way.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda_ops.h"
#include "cuda_tiles.cuh"

namespace protoken::cuda {

constexpr int kJobs = 48, kSegments = 8, kMaxRank = 128;

// Rows of a block, 16 per warp: 12 warps where tokens take one plane, 8 where their planes need the registers.
PT_BOTH constexpr int block_rows(int planes_x) { return planes_x == 1 ? 192 : 128; }
PT_BOTH constexpr int block_threads(int planes_x) { return 2 * block_rows(planes_x); }

// How a lane gets at a factor whose inner dimension is the one summed over (I of A, O of B).
enum LoadMode : int {
  kAlongInner = 0,  // inner dimension contiguous, aligned to 16 bytes and a multiple of 16 bytes long
  kAlongRank = 1,   // rank dimension contiguous, pairs aligned, rank even
  kAnywhere = 2,
};

struct Factor {
  const char* base;
  int64_t client_stride, stride_r, stride_c;  // bytes, elements, elements
  const uint16_t* image;                      // packed x or grad, [tiles, stages] images
  Matrix with;
  int64_t inner;
  int32_t stages, segment_stages, mode, address_column;
};
struct LowRankJob {
  const int64_t* table;    // [.., 7] or null
  const int64_t* numbers;  // client number of each of the job's clients, or null: 0, 1, ..
  const float* scale;
  float* out;
  float* partial;  // [2 factors, kSegments, blocks * block_rows, padded tokens], when split
  Factor factors[2];
  int64_t clients;
  int32_t rank, per_block, blocks, first_block;
};
struct LowRankParams {
  LowRankJob jobs[kJobs];
  int64_t tokens;
  int32_t count, tiles, tile_tokens, planes_x, e, half, image_bytes, split, blocks, unused;
};

PT_BOTH constexpr int total_pitch(int tokens) { return tokens + 8; }
PT_BOTH int lowrank_shared(int image_bytes, int tokens, int planes_x, bool split) {
  return 2 * image_bytes +
         (split ? 0 : 2 * block_rows(planes_x) * total_pitch(tokens) * static_cast<int>(sizeof(float)));
}

__global__ void __launch_bounds__(256) pack_lowrank(const __grid_constant__ LowRankParams p) {
  const Factor& factor = p.jobs[blockIdx.y].factors[blockIdx.z];
  const ImageShape shape = {p.tile_tokens, p.planes_x, kGroups * 4 * p.e, p.e, 0};
  const int64_t total = image_octets(shape, static_cast<int64_t>(p.tiles) * factor.stages);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total; i += gridDim.x * blockDim.x)
    pack_octet(factor.with, p.tokens, factor.inner, shape, factor.stages, p.half != 0, i,
               const_cast<uint16_t*>(factor.image));
}

// 32 words that a lane holds of its rows for one stage of columns.
struct Words {
  uint32_t w[32];
};

// The addresses of up to 4 rows of this lane at inner index 0; null where there is no such row.
struct Addresses {
  const char* row[4];
};

__device__ __forceinline__ const char* row_address(const LowRankJob& job, const Factor& factor, int block, int row,
                                                   int bytes) {
  const int64_t client = static_cast<int64_t>(block) * job.per_block + row / job.rank;
  if (row >= job.per_block * job.rank || client >= job.clients) return nullptr;
  const int64_t number = job.numbers ? job.numbers[client] : client;
  const char* base = job.table ? reinterpret_cast<const char*>(job.table[number * 7 + factor.address_column])
                               : factor.base + number * factor.client_stride;
  return base + row % job.rank * factor.stride_r * bytes;
}

template <int kMode>
__device__ __forceinline__ Addresses lane_addresses(const LowRankJob& job, const Factor& factor, int block, int bytes) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  Addresses to;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Along inner: rows g and g + 8. Else: rows 2 p and 2 p + 1 of either octet, p the lane's place in its quad.
    const int row = kMode == kAlongInner ? first + lane / 4 + 8 * (i / 2) : first + 8 * (i / 2) + lane % 4 * 2 + i % 2;
    const bool wanted = kMode == kAnywhere || i % 2 == 0;
    to.row[i] = wanted ? row_address(job, factor, block, row, bytes) : nullptr;
    if (kMode == kAlongInner && to.row[i] != nullptr) to.row[i] += lane % 4 * 16;
  }
  return to;
}

template <int kBytes>
__device__ __forceinline__ uint32_t load_bits(const char* at) {
  if constexpr (kBytes == 4) return *reinterpret_cast<const uint32_t*>(at);
  return *reinterpret_cast<const uint16_t*>(at);
}

template <int kFormat, int kMode>
__device__ __forceinline__ void load_words(Words& to, const Addresses& from, const Factor& factor, int stage) {
  constexpr int kBytes = format_bytes(kFormat), kE = per_load(kFormat), kWordsPerPair = kBytes / 2;
  const int lane = threadIdx.x % 32;
  const int start = stage * stage_columns(kFormat), inner = static_cast<int>(factor.inner);
  if constexpr (kMode == kAlongInner) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const int column = start + q * group_columns(kFormat);
      const bool inside = column + lane % 4 * kE < inner;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char* at = from.row[2 * i] + static_cast<int64_t>(start) * kBytes + q * group_columns(kFormat) * kBytes;
        const uint4 v = inside && from.row[2 * i] ? load_stream16(at) : make_uint4(0, 0, 0, 0);
        uint32_t* w = to.w + q * 8 + i * 4;
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
      }
    }
    return;
  }
  // The lane's columns are 2 apart within a group (slot_column: 4 j + 2 h), so its rows' addresses walk along; made
  // all at once they would spill registers.
  const int64_t step = factor.stride_c * kBytes;
  int column = start + slot_column(kE, 0, 0, lane / 4);
  const char* at[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) at[i] = from.row[i] + (from.row[i] ? column * step : 0);
#pragma unroll
  for (int n = 0; n < kGroups * products(kFormat) * 2; ++n) {
    const bool inside = column < inner;
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      uint32_t* w = to.w + (n * 2 + octet) * kWordsPerPair;
      const char *first = at[2 * octet], *second = at[2 * octet + 1];
      if constexpr (kMode == kAlongRank) {
        const bool load = inside && from.row[2 * octet] != nullptr;
        if constexpr (kBytes == 4) {
          const uint2 v = load ? load_stream8(first) : make_uint2(0, 0);
          w[0] = v.x, w[1] = v.y;
        } else {
          w[0] = load ? load_stream4(first) : 0;
        }
      } else {
        const uint32_t low = inside && from.row[2 * octet] ? load_bits<kBytes>(first) : 0;
        const uint32_t high = inside && from.row[2 * octet + 1] ? load_bits<kBytes>(second) : 0;
        if constexpr (kBytes == 4) {
          w[0] = low, w[1] = high;
        } else {
          w[0] = low | high << 16;
        }
      }
    }
    const int apart = (n + 1) % (2 * products(kFormat)) == 0 ? group_columns(kFormat) - 4 * products(kFormat) + 2 : 2;
    column += apart;
#pragma unroll
    for (int i = 0; i < 4; i += kMode == kAlongRank ? 2 : 1) walk(at[i], apart * step);
  }
}

// acc += rows x this stage's columns x tokens.
template <int kFormat, int kMode, int kPlanesX, int kTokens>
__device__ __forceinline__ void multiply_words(float (&acc)[kTokens / 8][4], const Words& from, const uint16_t* image) {
  constexpr int kProducts = products(kFormat), kPlanes = format_planes(kFormat),
                kWordsPerPair = format_bytes(kFormat) / 2;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    uint32_t a[kProducts][kPlanes][4];
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      if constexpr (kMode == kAlongInner) {
        const uint32_t* w = from.w + q * 8;
        decode<kFormat>(make_uint4(w[0], w[1], w[2], w[3]), make_uint4(w[4], w[5], w[6], w[7]), j, a[j]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a[0]: octet 0, slots 0-7; a[1]: octet 1; a[2], a[3]: slots 8-15
          const uint32_t* w = from.w + (((q * kProducts + j) * 2 + i / 2) * 2 + i % 2) * kWordsPerPair;
          uint32_t planes[kPlanes];
          if constexpr (kFormat == kF32) {
            split_pair<3>(bits_float(w[0]), bits_float(w[1]), planes);
          } else {
            half_pair<kFormat>(w[0], planes);
          }
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) a[j][plane][i] = transpose_8x8(planes[plane]);
        }
      }
    }
    multiply_group<kFormat, kPlanesX, kTokens>(acc, a, image, stage_columns(kFormat), q * group_columns(kFormat), lane);
  }
}

// Inner products of the block's 128 rows over stages [begin, end); `flush` is called with acc after each segment.
template <int kFormat, int kMode, int kPlanesX, int kTokens, class Flush>
__device__ __forceinline__ void inner_products(const LowRankJob& job, const Factor& factor, int block, int tile,
                                               int begin, int end, unsigned char* shared, int image_bytes,
                                               Flush flush) {
  const Addresses rows = lane_addresses<kMode>(job, factor, block, format_bytes(kFormat));
  const int64_t elements = image_bytes / 2;
  const uint16_t* images = factor.image + static_cast<int64_t>(tile) * factor.stages * elements;
  Words now, next;
  fetch_image(shared, images + begin * elements, image_bytes);
  constexpr bool kAhead = kMode != kAnywhere;  // the slow way would spill registers
  if constexpr (kAhead) load_words<kFormat, kMode>(now, rows, factor, begin);
  float acc[kTokens / 8][4] = {};
#pragma unroll 1
  for (int stage = begin; stage < end; ++stage) {
    copy_wait<0>();
    __syncthreads();  // this stage's image is there, and nobody reads the other buffer any more
    const int turn = (stage - begin) & 1;
    if (stage + 1 < end) {
      fetch_image(shared + (turn ^ 1) * image_bytes, images + (stage + 1) * elements, image_bytes);
      if constexpr (kAhead) load_words<kFormat, kMode>(next, rows, factor, stage + 1);
    }
    if constexpr (!kAhead) load_words<kFormat, kMode>(now, rows, factor, stage);
    multiply_words<kFormat, kMode, kPlanesX, kTokens>(acc, now,
                                                      reinterpret_cast<const uint16_t*>(shared + turn * image_bytes));
    if constexpr (kAhead) now = next;
    if (stage + 1 == end || (stage + 1) % factor.segment_stages == 0) {
      flush(acc, stage / factor.segment_stages);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
    }
  }
  __syncthreads();  // the buffers may be written again
}

template <int kFormat, int kPlanesX, int kTokens, class Flush>
__device__ __forceinline__ void inner_products_of(const LowRankJob& job, const Factor& factor, int block, int tile,
                                                  int begin, int end, unsigned char* shared, int image_bytes,
                                                  Flush flush) {
  if (factor.mode == kAlongInner) {
    inner_products<kFormat, kAlongInner, kPlanesX, kTokens>(job, factor, block, tile, begin, end, shared, image_bytes,
                                                            flush);
  } else if (factor.mode == kAlongRank) {
    inner_products<kFormat, kAlongRank, kPlanesX, kTokens>(job, factor, block, tile, begin, end, shared, image_bytes,
                                                           flush);
  } else {
    inner_products<kFormat, kAnywhere, kPlanesX, kTokens>(job, factor, block, tile, begin, end, shared, image_bytes,
                                                          flush);
  }
}

template <int kFormat, int kPlanesX, int kTokens>
__global__ void __launch_bounds__(block_threads(kPlanesX), 1) lowrank_kernel(const __grid_constant__ LowRankParams p) {
  PT_SHARED(shared);
  const int tile = static_cast<int>(blockIdx.x % p.tiles);
  int block = static_cast<int>(blockIdx.x / p.tiles), number = 0;
  while (number + 1 < p.count && block >= p.jobs[number + 1].first_block) ++number;
  const LowRankJob& job = p.jobs[number];
  block -= job.first_block;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  if (p.split) {
    const int side = blockIdx.y / kSegments, segment = blockIdx.y % kSegments;
    const Factor& factor = job.factors[side];
    const int begin = segment * factor.segment_stages,
              end = static_cast<int>(least(begin + factor.segment_stages, factor.stages));
    if (begin >= end) return;
    const int64_t pitch = static_cast<int64_t>(p.tiles) * kTokens;
    float* to = job.partial + (blockIdx.y * static_cast<int64_t>(job.blocks) + block) * block_rows(kPlanesX) * pitch +
                row * pitch + tile * kTokens + column;
    inner_products_of<kFormat, kPlanesX, kTokens>(
        job, factor, block, tile, begin, end, shared, p.image_bytes, [&](const float (&acc)[kTokens / 8][4], int) {
#pragma unroll
          for (int n = 0; n < kTokens / 8; ++n) {
            *reinterpret_cast<float2*>(to + n * 8) = make_float2(acc[n][0], acc[n][1]);
            *reinterpret_cast<float2*>(to + 8 * pitch + n * 8) = make_float2(acc[n][2], acc[n][3]);
          }
        });
    return;
  }
  constexpr int kPitch = total_pitch(kTokens), kRows = block_rows(kPlanesX), kThreads = block_threads(kPlanesX);
  float* totals = reinterpret_cast<float*>(shared + 2 * p.image_bytes);
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const Factor& factor = job.factors[side];
    float* to = totals + (side * kRows + row) * kPitch + column;
    inner_products_of<kFormat, kPlanesX, kTokens>(
        job, factor, block, tile, 0, factor.stages, shared, p.image_bytes,
        [&](const float (&acc)[kTokens / 8][4], int segment) {
#pragma unroll
          for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {  // only this lane touches these words until the end
              float2* at = reinterpret_cast<float2*>(to + 8 * h * kPitch + n * 8);
              const float2 before = segment ? *at : make_float2(0.0f, 0.0f);
              *at = segment ? make_float2(before.x + acc[n][2 * h], before.y + acc[n][2 * h + 1])
                            : make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
            }
        });
  }
  // The last barrier of inner_products stands between these reads and all writes.
  for (int i = threadIdx.x; i < job.per_block * kTokens; i += kThreads) {
    const int slot = i / kTokens, t = i % kTokens;
    const int64_t client = static_cast<int64_t>(block) * job.per_block + slot,
                  token = static_cast<int64_t>(tile) * kTokens + t;
    if (client >= job.clients || token >= p.tokens) continue;
    const float* u = totals + slot * job.rank * kPitch + t;
    float sum = 0.0f;
    for (int r = 0; r < job.rank; ++r) sum = fma_rn(u[r * kPitch], u[(kRows + r) * kPitch], sum);
    const int64_t at = job.numbers ? job.numbers[client] : client;
    job.out[at * p.tokens + token] = sum * job.scale[at];
  }
}

// The same sums as at the end of lowrank_kernel, from the pieces in the workspace.
__global__ void __launch_bounds__(256) combine(const __grid_constant__ LowRankParams p) {
  const LowRankJob& job = p.jobs[blockIdx.y];
  const int64_t pitch = static_cast<int64_t>(p.tiles) * p.tile_tokens,
                rows = static_cast<int64_t>(job.blocks) * block_rows(p.planes_x);
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, client = i / pitch, token = i % pitch;
  if (client >= job.clients || token >= p.tokens) return;
  const int64_t row = client / job.per_block * block_rows(p.planes_x) + client % job.per_block * job.rank;
  float sum = 0.0f;
  for (int r = 0; r < job.rank; ++r) {
    float product[2];
    for (int side = 0; side < 2; ++side) {
      const Factor& factor = job.factors[side];
      const float* from = job.partial + (side * kSegments * rows + row + r) * pitch + token;
      float total = from[0];
      for (int segment = 1; segment * factor.segment_stages < factor.stages; ++segment)
        total += from[segment * rows * pitch];
      product[side] = total;
    }
    sum = fma_rn(product[0], product[1], sum);
  }
  const int64_t at = job.numbers ? job.numbers[client] : client;
  job.out[at * p.tokens + token] = sum * job.scale[at];
}

static int64_t place(int64_t& end, int64_t bytes) {
  const int64_t at = end;
  end = round_up(end + bytes, 256);
  return at;
}

static void read_job(LowRankJob& job, const int64_t* row) {
  job = LowRankJob{};
  for (int side = 0; side < 2; ++side) {
    Factor& factor = job.factors[side];
    factor.with = {reinterpret_cast<const void*>(row[4 * side]), row[4 * side + 1], row[4 * side + 2],
                   static_cast<int32_t>(row[4 * side + 3]), 0};
    factor.inner = row[9 - side];
    factor.base = reinterpret_cast<const char*>(row[11 + 2 * side]);
    factor.client_stride = row[12 + 2 * side];
    factor.stride_r = side == 0 ? row[15] : row[18];
    factor.stride_c = side == 0 ? row[16] : row[17];
    factor.mode = static_cast<int32_t>(row[24 + side]);
    factor.address_column = 3 * side;
  }
  job.table = reinterpret_cast<const int64_t*>(row[10]);
  job.clients = row[19];
  job.numbers = reinterpret_cast<const int64_t*>(row[20]);
  if (row[21] < 1 || row[21] > kMaxRank)
    throw std::invalid_argument("rank " + std::to_string(row[21]) + " is not between 1 and " +
                                std::to_string(kMaxRank));
  job.rank = static_cast<int32_t>(row[21]);
  job.scale = reinterpret_cast<const float*>(row[22]);
  job.out = reinterpret_cast<float*>(row[23]);
}

static int64_t plan(LowRankParams& p, const LowRankCall& call, int64_t first_job, const Device& device) {
  p.planes_x = call.planes_x == 1 && (call.format == kBF16 || call.format == kHalf) ? 1 : full_planes(call.format);
  const auto image = [&](int tile) {
    return static_cast<int>(
        ImageShape{tile, p.planes_x, stage_columns(call.format), per_load(call.format), 0}.elements() * 2);
  };
  p.tile_tokens = call.tokens <= 16 || lowrank_shared(image(64), 64, p.planes_x, false) > device.shared_bytes ? 16 : 64;
  p.tiles = static_cast<int32_t>(ceil_div(call.tokens, p.tile_tokens));
  p.tokens = call.tokens;
  p.e = per_load(call.format);
  p.half = call.format == kHalf ? 1 : 0;
  p.count = static_cast<int32_t>(least(kJobs, call.jobs - first_job));
  p.image_bytes = image(p.tile_tokens);
  for (int j = 0; j < p.count; ++j) read_job(p.jobs[j], call.table + (first_job + j) * kLowRankColumns);
  // Long blocks first: the short ones then fill the gaps at the end.
  std::stable_sort(p.jobs, p.jobs + p.count, [](const LowRankJob& a, const LowRankJob& b) {
    return a.factors[0].inner + a.factors[1].inner > b.factors[0].inner + b.factors[1].inner;
  });
  int64_t end = 0, blocks = 0;
  for (int j = 0; j < p.count; ++j) {
    LowRankJob& job = p.jobs[j];
    job.per_block = block_rows(p.planes_x) / job.rank;
    const int64_t needed = ceil_div(job.clients, job.per_block);
    job.first_block = static_cast<int32_t>(blocks);
    blocks += needed;
    if (blocks * p.tiles > (int64_t{1} << 31) - 1)
      throw std::invalid_argument("client_scores_lowrank: too many clients for one launch");
    job.blocks = static_cast<int32_t>(needed);
    for (Factor& factor : job.factors) {
      if (factor.inner > (int64_t{1} << 31) - 4096)
        throw std::invalid_argument("client_scores_lowrank: O and I must fit into 31 bits");
      factor.stages = static_cast<int32_t>(ceil_div(factor.inner, stage_columns(call.format)));
      factor.segment_stages = static_cast<int32_t>(ceil_div(factor.stages, kSegments));
      factor.image =
          reinterpret_cast<const uint16_t*>(place(end, static_cast<int64_t>(p.tiles) * factor.stages * p.image_bytes));
    }
  }
  p.blocks = static_cast<int32_t>(blocks);
  // Two full rounds of blocks keep the device busy; with less work the inner products are split as well.
  p.split = call.path == 2 || (call.path == 0 && blocks * p.tiles < 2 * device.processors) ? 1 : 0;
  for (int j = 0; j < p.count && p.split; ++j) {
    LowRankJob& job = p.jobs[j];
    job.partial = reinterpret_cast<float*>(place(
        end, 2 * kSegments * static_cast<int64_t>(job.blocks) * block_rows(p.planes_x) * p.tiles * p.tile_tokens * 4));
  }
  return end;
}

int64_t client_scores_lowrank_workspace(const LowRankCall& call, const Device& device) {
  int64_t bytes = 0;
  auto p = std::make_unique<LowRankParams>();
  for (int64_t first = 0; first < call.jobs; first += kJobs) bytes = most(bytes, plan(*p, call, first, device));
  return bytes;
}

template <int kFormat, int kPlanesX, int kTokens>
static void launch(const LowRankParams& p, const Device& device, cudaStream_t stream) {
  const int shared = lowrank_shared(p.image_bytes, kTokens, kPlanesX, p.split != 0);
  if (shared > device.shared_bytes)
    throw std::runtime_error("client_scores_lowrank needs " + std::to_string(shared) +
                             " bytes of shared memory, the device has " + std::to_string(device.shared_bytes));
  const auto kernel = lowrank_kernel<kFormat, kPlanesX, kTokens>;
  allow_shared(reinterpret_cast<const void*>(kernel), shared, device);
  PT_LAUNCH(kernel, dim3(static_cast<unsigned>(p.blocks) * p.tiles, p.split ? 2 * kSegments : 1),
            dim3(block_threads(kPlanesX)), shared, stream, p);
  check_launch("lowrank_kernel");
}

template <int kFormat, int kPlanesX>
static void launch_tile(const LowRankParams& p, const Device& device, cudaStream_t stream) {
  p.tile_tokens == 16 ? launch<kFormat, kPlanesX, 16>(p, device, stream)
                      : launch<kFormat, kPlanesX, 64>(p, device, stream);
}

void client_scores_lowrank(const LowRankCall& call, const Device& device, void* workspace, int64_t bytes,
                           cudaStream_t stream) {
  auto p = std::make_unique<LowRankParams>();
  for (int64_t first = 0; first < call.jobs; first += kJobs) {
    const int64_t needed = plan(*p, call, first, device);
    if (needed > bytes)
      throw std::invalid_argument("workspace of " + std::to_string(bytes) + " bytes, needed " + std::to_string(needed));
    int64_t clients = 0, octets = 0;
    for (int j = 0; j < p->count; ++j) {
      LowRankJob& job = p->jobs[j];
      clients = most(clients, job.clients);
      for (Factor& factor : job.factors) {
        octets = most(octets, static_cast<int64_t>(factor.stages) * (kGroups * 4 * p->e / 8));
        factor.image =
            reinterpret_cast<const uint16_t*>(static_cast<char*>(workspace) + reinterpret_cast<intptr_t>(factor.image));
      }
      if (p->split)
        job.partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + reinterpret_cast<intptr_t>(job.partial));
    }
    const unsigned pack = pack_blocks(octets * p->tiles * p->tile_tokens, device.processors);
    PT_LAUNCH(pack_lowrank, dim3(pack, p->count, 2), dim3(256), 0, stream, *p);
    check_launch("pack_lowrank");
    switch (call.format) {
      case kF32: launch_tile<kF32, 3>(*p, device, stream); break;
      case kBF16:
        p->planes_x == 1 ? launch_tile<kBF16, 1>(*p, device, stream) : launch_tile<kBF16, 3>(*p, device, stream);
        break;
      case kF16: launch_tile<kF16, 3>(*p, device, stream); break;
      case kHalf: launch_tile<kHalf, 1>(*p, device, stream); break;
      default: throw std::invalid_argument("unknown format code " + std::to_string(call.format));
    }
    if (p->split) {
      const int64_t threads = clients * p->tiles * p->tile_tokens;
      PT_LAUNCH(combine, dim3(static_cast<unsigned>(ceil_div(threads, 256)), p->count), dim3(256), 0, stream, *p);
      check_launch("combine");
    }
  }
}

}  // namespace protoken::cuda
