// The few device operations that the CUDA kernels are made of, each in one function.
//
// With PROTOKEN_EMULATE the same kernels compile as plain C++ (csrc/cuda_emulation.h runs every thread of a
// block as a fiber), so that index arithmetic, fragment layouts and barriers are tested without a GPU.
#pragma once

#include <cstdint>

#ifdef PROTOKEN_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define PT_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define PT_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

// Blocks along the grid's second and third dimension.
constexpr int kMostBlocksYZ = 65535;

#define PT_BOTH __host__ __device__ __forceinline__

#if defined(PROTOKEN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PT_HAS_WGMMA 1
#else
#define PT_HAS_WGMMA 0
#endif

#ifndef PROTOKEN_EMULATE
namespace protoken::cuda {

// ---- loads -----------------------------------------------------------------------------------------------

// 16 bytes of a bank: read once, so it must not displace what L1 holds of the relevance.
__device__ __forceinline__ uint4 load_stream16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
// The same, issued where it stands: the assembler may put loads that go past the coherent caches behind products that
// take hundreds of cycles, and does. A warp_barrier() after it holds it back from those.
__device__ __forceinline__ uint4 load_stream16_here(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}
// Zeros when not wanted, without a branch.
__device__ __forceinline__ uint4 load_stream16_or_zeros(const void* address, bool wanted) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(address), "r"(static_cast<int>(wanted)));
  return v;
}
__device__ __forceinline__ uint2 load_stream8(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_stream4(const void* address) {
  uint32_t v;
  asm volatile("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

// ---- numbers ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
// To nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ uint16_t float_to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// address += bytes, where it stands: the compiler cannot make the sums of many steps in advance.
__device__ __forceinline__ void walk(const char*& address, int64_t bytes) {
  address += bytes;
  asm volatile("" : "+l"(address));
}
// The value as the compiler cannot know it: what was made of it before is made again instead of being kept.
__device__ __forceinline__ void forget(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
// bytes of a (0..3) and b (4..7), four selectors
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
// a * b + c on two bf16 packed in 32 bits
__device__ __forceinline__ uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Two e4m3 in the low 16 bits -> two bf16, exact; NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_bf16x2(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  float low, high;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);  // exact: 4 significant bits
#else
  // Exponent and mantissa into their bf16 places, then 2^120 corrects the bias, subnormals included.
  const uint32_t spread = __byte_perm(pair, 0, 0x1404);  // byte 0 -> bits 8..15, byte 1 -> bits 24..31
  uint32_t moved = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 4);
  if ((spread & 0x7f00u) == 0x7f00u) moved |= 0x7fffu;
  if ((spread & 0x7f000000u) == 0x7f000000u) moved |= 0x7fff0000u;
  return bf16x2_fma(moved, 0x7b807b80u, 0x80008000u);
#endif
}

// One of two e4m3 in the low 16 bits -> fp32, exact; NaN stays NaN.
__device__ __forceinline__ float e4m3_to_float(uint32_t pair, bool upper) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  return half_to_float(static_cast<uint16_t>(upper ? halves >> 16 : halves));
#else
  const uint32_t values = e4m3x2_to_bf16x2(pair);
  return __uint_as_float(upper ? values & 0xffff0000u : values << 16);
#endif
}

// ---- matrix units ----------------------------------------------------------------------------------------

template <bool kHalf>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
// Lane l gives row l/4, columns 2(l%4) and +1 of an 8x8 matrix of 16-bit values, and gets the transpose's.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}
__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ float shuffle_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
__device__ __forceinline__ int shuffle_first(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// ---- shared memory, copies, barriers ---------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
// Only the `threads` threads that call it with this id meet; ids 1..15 (0 is __syncthreads).
template <int kId>
__device__ __forceinline__ void named_barrier(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// One thread copies `bytes` (a multiple of 16, both sides aligned to 16); completion is counted on the barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
#endif

#if PT_HAS_WGMMA
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Keeps the compiler from moving reads or writes of the accumulator across the asynchronous part.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
#endif

}  // namespace protoken::cuda
#endif  // !PROTOKEN_EMULATE
