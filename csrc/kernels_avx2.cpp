// The kernels for avx2; compiled with its flags and free of anything the rest of the module could share.
#include "kernels.h"

#if defined(__x86_64__)

#include "simd_avx2.h"  // first: the kernels are written over its Simd

#include "lowrank_kernels.inc.h"

namespace protoken {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels();
  return &kernels;
}

}  // namespace protoken

#else

namespace protoken {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace protoken

#endif
