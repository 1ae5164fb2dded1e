// The AMX kernels with their tiles in plain memory: slow, for tests on processors without AMX.
#include "kernels.h"

#if defined(__x86_64__)

#include "amx_kernels.inc.h"

namespace protoken {
namespace {

struct Emulated {
  alignas(64) static thread_local uint32_t tiles[8][kTile][kTile];

  static void configure() {}
  static void release() {}

  template <int N>
  static void zero() {
    std::memset(tiles[N], 0, sizeof(tiles[N]));
  }
  template <int N>
  static void load(const void* p, int64_t stride) {
    for (int64_t row = 0; row < kTile; ++row)
      std::memcpy(tiles[N][row], static_cast<const char*>(p) + row * stride, 64);
  }
  template <int N>
  static void store(void* p, int64_t stride) {
    for (int64_t row = 0; row < kTile; ++row) std::memcpy(static_cast<char*>(p) + row * stride, tiles[N][row], 64);
  }

  // c[m][t] += a[m][2 k] b[k][2 t] + a[m][2 k + 1] b[k][2 t + 1], as TDPBF16PS.
  template <int C, int A, int B>
  static void add_products() {
    for (int64_t m = 0; m < kTile; ++m) {
      for (int64_t k = 0; k < kTile; ++k) {
        const uint32_t a = tiles[A][m][k];
        for (int64_t t = 0; t < kTile; ++t) {
          const uint32_t b = tiles[B][k][t];
          float sum = bits_to_float(tiles[C][m][t]);
          sum += bits_to_float(a << 16) * bits_to_float(b << 16);
          sum += bits_to_float(a & 0xffff0000u) * bits_to_float(b & 0xffff0000u);
          std::memcpy(&tiles[C][m][t], &sum, sizeof(sum));
        }
      }
    }
  }
};

alignas(64) thread_local uint32_t Emulated::tiles[8][kTile][kTile];

}  // namespace

const Kernels* amx_emulated_kernels() {
  static const Kernels kernels = make_amx_kernels<Emulated>("amx-emulated", *avx512_kernels());
  return &kernels;
}

}  // namespace protoken

#else

namespace protoken {

const Kernels* amx_emulated_kernels() { return nullptr; }

}  // namespace protoken

#endif
