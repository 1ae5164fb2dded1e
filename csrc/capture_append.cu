// capture_append on CUDA: buffers[j][(cursor + t) mod C] = steps[j][t], all buffers in one launch, then the cursor.
//
// The row's place is computed from the cursor on the device, so nothing waits. A block takes 4096 columns of one row.
// Where a step's row needs no cast and both sides are aligned it moves 16 bytes at a time.
#include <stdexcept>

#include "cuda_ops.h"
#include "cuda_tiles.cuh"

namespace protoken::cuda {

constexpr int kAppendBuffers = 64, kAppendThreads = 256, kAppendColumns = 4096;
constexpr int kF64 = 6;  // beside the float formats of cuda_tiles.cuh

struct AppendBuffer {
  char* buffer;
  const char* step;
  int64_t buffer_stride, step_t, step_n, width;  // elements
  int32_t to, from, first_block, pieces;
};
struct AppendParams {
  AppendBuffer buffers[kAppendBuffers];
  int64_t* cursor;
  int64_t capacity, tokens, skipped;
  int32_t count, blocks;
};

PT_BOTH constexpr int append_bytes(int dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

__device__ __forceinline__ float load_any(const char* data, int64_t index, int dtype) {
  if (dtype == kF64) return static_cast<float>(reinterpret_cast<const double*>(data)[index]);
  return load_float(data, index, dtype);
}
__device__ __forceinline__ void store_any(char* data, int64_t index, int dtype, float value) {
  if (dtype == kF64) {
    reinterpret_cast<double*>(data)[index] = static_cast<double>(value);
  } else if (dtype == kF32) {
    reinterpret_cast<float*>(data)[index] = value;
  } else {
    reinterpret_cast<uint16_t*>(data)[index] = dtype == kBF16 ? float_to_bf16(value) : float_to_half(value);
  }
}
template <class Bits>
__device__ __forceinline__ void copy_bits(char* to, const char* from, int64_t column, int64_t step_n) {
  reinterpret_cast<Bits*>(to)[column] = reinterpret_cast<const Bits*>(from)[column * step_n];
}

__global__ void __launch_bounds__(kAppendThreads) capture_append_kernel(const __grid_constant__ AppendParams p) {
  int j = 0;
  while (j + 1 < p.count && static_cast<int>(blockIdx.x) >= p.buffers[j + 1].first_block) ++j;
  const AppendBuffer& b = p.buffers[j];
  const int64_t piece = (blockIdx.x - b.first_block) % b.pieces,
                row = p.skipped + (blockIdx.x - b.first_block) / b.pieces;
  const int64_t place = (p.cursor[0] + row) % p.capacity;
  const int from_bytes = append_bytes(b.from), to_bytes = append_bytes(b.to);
  const char* from = b.step + row * b.step_t * from_bytes;
  char* to = b.buffer + place * b.buffer_stride * to_bytes;
  const int64_t begin = piece * kAppendColumns, end = least(begin + kAppendColumns, b.width);
  if (b.from == b.to) {
    const int64_t bytes = b.width * to_bytes;
    const bool aligned =
        (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % 16 == 0;
    if (aligned && b.step_n == 1) {
      for (int64_t i = begin * to_bytes + threadIdx.x * 16; i < end * to_bytes; i += kAppendThreads * 16)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
      return;
    }
    for (int64_t n = begin + threadIdx.x; n < end; n += kAppendThreads) {
      if (to_bytes == 8) copy_bits<uint64_t>(to, from, n, b.step_n);
      if (to_bytes == 4) copy_bits<uint32_t>(to, from, n, b.step_n);
      if (to_bytes == 2) copy_bits<uint16_t>(to, from, n, b.step_n);
    }
    return;
  }
#pragma unroll 4
  for (int64_t n = begin + threadIdx.x; n < end; n += kAppendThreads)
    store_any(to, n, b.to, load_any(from, n * b.step_n, b.from));
}

// A launch of its own: every block of the copies reads the cursor as it was.
__global__ void advance_cursor(int64_t* cursor, int64_t tokens) { cursor[0] += tokens; }

void capture_append(const AppendCall& call, cudaStream_t stream) {
  auto p = std::make_unique<AppendParams>();
  p->cursor = reinterpret_cast<int64_t*>(call.cursor);
  p->capacity = call.capacity, p->tokens = call.tokens;
  p->skipped = most(0, call.tokens - call.capacity);
  for (int64_t first = 0; first < call.buffers; first += kAppendBuffers) {
    p->count = static_cast<int32_t>(least(kAppendBuffers, call.buffers - first));
    int64_t blocks = 0;
    for (int j = 0; j < p->count; ++j) {
      const int64_t* row = call.table + (first + j) * kAppendTableColumns;
      AppendBuffer& b = p->buffers[j];
      b.buffer = reinterpret_cast<char*>(row[0]), b.buffer_stride = row[1], b.to = static_cast<int32_t>(row[2]);
      b.step = reinterpret_cast<const char*>(row[3]), b.step_t = row[4], b.step_n = row[5];
      b.from = static_cast<int32_t>(row[6]), b.width = row[7];
      b.pieces = static_cast<int32_t>(most(1, ceil_div(b.width, kAppendColumns)));
      b.first_block = static_cast<int32_t>(blocks);
      blocks += b.pieces * (call.tokens - p->skipped);
      if (blocks > (int64_t{1} << 31) - 1) throw std::invalid_argument("capture_append: too many rows for one launch");
    }
    PT_LAUNCH(capture_append_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kAppendThreads), 0, stream, *p);
    check_launch("capture_append_kernel");
  }
  PT_LAUNCH(advance_cursor, dim3(1), dim3(1), 0, stream, p->cursor, p->tokens);
  check_launch("advance_cursor");
}

}  // namespace protoken::cuda
