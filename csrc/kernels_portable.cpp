// The kernels for portable; compiled with its flags and free of anything the rest of the module could share.
#include "kernels.h"

#include "simd_portable.h"  // first: the kernels are written over its Simd

#include "lowrank_kernels.inc.h"

namespace protoken {

const Kernels* portable_kernels() {
  static constexpr Kernels kernels = make_kernels();
  return &kernels;
}

}  // namespace protoken
