// The AVX-512 kernels with panels of bf16 pairs (VDPBF16PS: AVX512-BF16).
#include "kernels.h"

#if defined(__x86_64__)

#include "simd_avx512.h"  // first: the kernels are written over its Simd

#include "pair_kernels.inc.h"

namespace protoken {

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = make_pair_kernels("avx512-bf16", *avx512_kernels());
  return &kernels;
}

}  // namespace protoken

#else

namespace protoken {

const Kernels* avx512_bf16_kernels() { return nullptr; }

}  // namespace protoken

#endif
