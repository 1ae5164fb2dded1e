// The CUDA kernels on a CPU, one fiber per thread of a block, for tests of index arithmetic and barriers.
//
// Included by cuda_primitives.cuh when PROTOKEN_EMULATE is defined. Warp and block operations meet at barriers
// as on the device; fragments and descriptors are read as the PTX manual lays them out; what the device does in the
// background is as late as it may be (cuda_emulation_async.h). Blocks run one after another, so races between blocks,
// memory ordering and speed are not what this shows. Never part of a wheel.
#pragma once

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

namespace protoken::cuda::emulation {

struct Meeting {  // a barrier whose last arrival opens it
  int waiting = 0;
  long generation = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf state;
  bool started = false, done = false;
};

inline thread_local dim3 thread_index, block_index, block_size, grid_size;
inline thread_local std::vector<Fiber> fibers;
inline thread_local std::vector<Meeting> warps;
inline thread_local Meeting barriers[16];
inline thread_local std::vector<uint32_t> exchange;  // 64 words per thread
inline thread_local unsigned char* shared_base = nullptr;
inline thread_local std::function<void()> body;
inline thread_local jmp_buf scheduler;
inline thread_local int current = 0;
inline thread_local size_t shared_size = 0;      // of this launch
inline thread_local std::exception_ptr failure;  // what a fiber threw: nobody catches it on its own stack

constexpr size_t kStack = 256 << 10;
constexpr size_t kShared = 227 << 10;  // what one block may have on Hopper

inline void yield() {
  if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
  thread_index = dim3(current);
}
inline void meet(Meeting& meeting, int threads) {
  const long generation = meeting.generation;
  if (++meeting.waiting == threads) {
    meeting.waiting = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}
inline int lane() { return current % 32; }
inline void meet_warp() { meet(warps[current / 32], 32); }
inline uint32_t* slot(int thread) { return exchange.data() + 64 * thread; }
inline uint32_t* lane_slot(int other) { return slot(current / 32 * 32 + other); }

inline void trampoline() {
  thread_index = dim3(current);
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void begin_background(int threads);
inline void end_background();

inline void run_block(int threads) {
  begin_background(threads);
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Meeting());
  for (Meeting& barrier : barriers) barrier = Meeting();
  exchange.assign(64 * static_cast<size_t>(threads), 0);
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.started = fiber.done = false;
  }
  for (long idle = 0, left = threads; left > 0;) {
    const long before = left;
    for (current = 0; current < threads; ++current) {
      Fiber& fiber = fibers[current];
      if (fiber.done) continue;
      if (_setjmp(scheduler) == 0) {
        if (!fiber.started) {
          fiber.started = true;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get();
          fiber.context.uc_stack.ss_size = kStack;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, trampoline, 0);
          setcontext(&fiber.context);
        }
        _longjmp(fiber.state, 1);
      }
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      if (fibers[current].done) --left;
    }
    idle = left == before ? idle + 1 : 0;
    if (idle > 1000000) throw std::runtime_error("emulated block hangs: threads wait for each other");
  }
  end_background();
}

// Dynamic shared memory that each kernel may have; 48 KB unless it was told more.
inline std::mutex limits_lock;
inline std::map<const void*, int> limits;

// What the driver refuses: CUDA C++ programming guide, "Features and Technical Specifications".
inline void check_limits(dim3 grid, dim3 block, size_t shared, size_t parameters) {
  if (shared > kShared) throw std::runtime_error("emulated launch: more shared memory than a block may have");
  if (parameters > 32764) throw std::runtime_error("emulated launch: more than 32764 bytes of parameters");
  if (block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1)
    throw std::runtime_error("emulated launch: a block of " + std::to_string(block.x) + " threads");
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535)
    throw std::runtime_error("emulated launch: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                             " x " + std::to_string(grid.z));
}

inline void check_allowed(const void* kernel, size_t shared) {
  const std::lock_guard<std::mutex> guard(limits_lock);
  const auto found = limits.find(kernel);
  if (shared > static_cast<size_t>(found == limits.end() ? 48 << 10 : found->second))
    throw std::runtime_error("emulated launch: more shared memory than the kernel was allowed to have");
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  check_limits(grid, block, shared, (sizeof(Arguments) + ... + 0));
  check_allowed(reinterpret_cast<const void*>(kernel), shared);
  shared_size = shared;
  std::vector<unsigned char> memory(kShared + 1024);
  shared_base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  grid_size = grid;
  block_size = block;
  body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(shared_base, 0xff, kShared);  // NaN in every format: nothing may be read before it is written
        block_index = dim3(x, y, z);
        run_block(static_cast<int>(block.x));
        for (size_t at = shared; at < kShared; ++at)
          if (shared_base[at] != 0xff) throw std::runtime_error("emulated block wrote beyond its shared memory");
      }
}

}  // namespace protoken::cuda::emulation

#define threadIdx (::protoken::cuda::emulation::thread_index)
#define blockIdx (::protoken::cuda::emulation::block_index)
#define blockDim (::protoken::cuda::emulation::block_size)
#define gridDim (::protoken::cuda::emulation::grid_size)
#define PT_SHARED(name) unsigned char* name = ::protoken::cuda::emulation::shared_base
#define PT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::protoken::cuda::emulation::launch(kernel, grid, block, shared, __VA_ARGS__)

enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> guard(::protoken::cuda::emulation::limits_lock);
  int& limit = ::protoken::cuda::emulation::limits[kernel];
  if (bytes < limit) throw std::runtime_error("emulated limit of shared memory lowered: another thread may need it");
  limit = bytes;
  return cudaSuccess;
}

static inline void __syncthreads() {
  ::protoken::cuda::emulation::meet(::protoken::cuda::emulation::barriers[0],
                                    static_cast<int>(::protoken::cuda::emulation::block_size.x));
}

namespace protoken::cuda {

namespace emu = emulation;

inline void check_alignment(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) throw std::runtime_error("emulated load is misaligned");
}
template <class T>
T load_checked(const void* address) {
  check_alignment(address, sizeof(T));
  T v;
  std::memcpy(&v, address, sizeof(T));
  return v;
}
inline uint4 load_stream16(const void* address) { return load_checked<uint4>(address); }
inline uint4 load_stream16_here(const void* address) { return load_checked<uint4>(address); }
inline uint4 load_stream16_or_zeros(const void* address, bool wanted) {
  return wanted ? load_checked<uint4>(address) : uint4{};
}
inline uint2 load_stream8(const void* address) { return load_checked<uint2>(address); }
inline uint32_t load_stream4(const void* address) { return load_checked<uint32_t>(address); }

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 31,
                 mantissa = half & 0x3ff;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (size < 0x38800000u) {                                               // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_nearbyintf(bits_float(size) * 0x1p24f)));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfff + ((size >> 13) & 1)) >> 13));
}
inline void walk(const char*& address, int64_t bytes) { address += bytes; }
inline void forget(uint4&) {}
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= ((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return result;
}
inline float bf16_low(uint32_t v) { return bits_float(v << 16); }
inline float bf16_high(uint32_t v) { return bits_float(v & 0xffff0000u); }
inline uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return float_to_bf16(fma_rn(bf16_low(a), bf16_low(b), bf16_low(c))) |
         static_cast<uint32_t>(float_to_bf16(fma_rn(bf16_high(a), bf16_high(b), bf16_high(c)))) << 16;
}
inline uint32_t e4m3x2_to_bf16x2(uint32_t pair) {  // the arithmetic of the path before sm_89
  const uint32_t spread = byte_permute(pair, 0, 0x1404);
  uint32_t moved = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 4);
  if ((spread & 0x7f00u) == 0x7f00u) moved |= 0x7fffu;
  if ((spread & 0x7f000000u) == 0x7f000000u) moved |= 0x7fff0000u;
  return bf16x2_fma(moved, 0x7b807b80u, 0x80008000u);
}

inline float e4m3_to_float(uint32_t pair, bool upper) {
  return upper ? bf16_high(e4m3x2_to_bf16x2(pair)) : bf16_low(e4m3x2_to_bf16x2(pair));
}

template <bool kHalf>
float element(uint32_t pair, int high) {
  if (kHalf) return half_to_float(static_cast<uint16_t>(high ? pair >> 16 : pair));
  return high ? bf16_high(pair) : bf16_low(pair);
}
// A[row][k] of m16n8k16 from the fragments of a warp (PTX manual, "Matrix fragments for mma.m16n8k16").
template <bool kHalf>
float fragment_a(const uint32_t* const (&lanes)[32], int row, int k) {
  const uint32_t* words = lanes[(row % 8) * 4 + (k % 8) / 2];
  return element<kHalf>(words[(row / 8) + 2 * (k / 8)], k % 2);
}
template <bool kHalf>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t* mine = emu::lane_slot(emu::lane());
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0;
  mine[5] = b1;
  emu::meet_warp();
  const uint32_t* lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = emu::lane_slot(i);
  for (int i = 0; i < 4; ++i) {
    const int row = emu::lane() / 4 + 8 * (i / 2), column = 2 * (emu::lane() % 4) + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k)
      sum += fragment_a<kHalf>(lanes, row, k) * element<kHalf>(lanes[column * 4 + (k % 8) / 2][4 + k / 8], k % 2);
    d[i] = sum;
  }
  emu::meet_warp();
}
inline uint32_t transpose_8x8(uint32_t v) {
  *emu::lane_slot(emu::lane()) = v;
  emu::meet_warp();
  uint32_t result = 0;
  for (int b = 0; b < 2; ++b) {
    const int row = 2 * (emu::lane() % 4) + b, column = emu::lane() / 4;
    const uint32_t word = *emu::lane_slot(row * 4 + column / 2);
    result |= (column % 2 ? word >> 16 : word & 0xffff) << (16 * b);
  }
  emu::meet_warp();
  return result;
}
inline float shuffle_xor(float v, int mask) {
  *emu::lane_slot(emu::lane()) = float_bits(v);
  emu::meet_warp();
  const float result = bits_float(*emu::lane_slot(emu::lane() ^ mask));
  emu::meet_warp();
  return result;
}
inline float shuffle_from(float v, int lane) {
  *emu::lane_slot(emu::lane()) = float_bits(v);
  emu::meet_warp();
  const float result = bits_float(*emu::lane_slot(lane));
  emu::meet_warp();
  return result;
}
inline int shuffle_first(int v) {
  *emu::lane_slot(emu::lane()) = static_cast<uint32_t>(v);
  emu::meet_warp();
  const int result = static_cast<int>(*emu::lane_slot(0));
  emu::meet_warp();
  return result;
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emu::shared_base);
}
inline void warp_barrier() { emu::meet_warp(); }
template <int kId>
void named_barrier(int threads) {
  emu::meet(emu::barriers[kId], threads);
}

}  // namespace protoken::cuda

#include "cuda_emulation_async.h"
