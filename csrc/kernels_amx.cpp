// The kernels for AVX512-BF16 with bf16 panels on the processor's tiles (AMX).
#include "kernels.h"

#if defined(__x86_64__)

#include "amx_kernels.inc.h"

namespace protoken {
namespace {

// The intrinsics paste the tile's number into the instruction, so each number is spelt out.
#define PROTOKEN_EACH_TILE(N, call) \
  if constexpr (N == 0) call(0);    \
  if constexpr (N == 1) call(1);    \
  if constexpr (N == 2) call(2);    \
  if constexpr (N == 3) call(3);    \
  if constexpr (N == 4) call(4);    \
  if constexpr (N == 5) call(5);    \
  if constexpr (N == 6) call(6);    \
  if constexpr (N == 7) call(7)

struct Amx {
  static void configure() {
    struct alignas(64) Config {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.bytes_per_row[tile] = 64;
      config.rows[tile] = 16;
    }
    barrier();
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }

  template <int N>
  static void zero() {
#define PROTOKEN_ZERO(n) _tile_zero(n)
    PROTOKEN_EACH_TILE(N, PROTOKEN_ZERO);
#undef PROTOKEN_ZERO
  }

  template <int N>
  static void load(const void* p, int64_t stride) {
    barrier();
#define PROTOKEN_LOAD(n) _tile_loadd(n, p, stride)
    PROTOKEN_EACH_TILE(N, PROTOKEN_LOAD);
#undef PROTOKEN_LOAD
  }

  template <int N>
  static void store(void* p, int64_t stride) {
#define PROTOKEN_STORE(n) _tile_stored(n, p, stride)
    PROTOKEN_EACH_TILE(N, PROTOKEN_STORE);
#undef PROTOKEN_STORE
    barrier();
  }

  template <int C, int A, int B>
  static void add_products() {
    static_assert(A == (C < 2 ? 4 : 5) && B == 6 + C % 2, "the four products that multiply_tiles forms");
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
  }

 private:
  // The intrinsics do not tell the compiler that they read memory.
  static void barrier() { __asm__ volatile("" ::: "memory"); }
};

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = make_amx_kernels<Amx>("amx", *avx512_bf16_kernels());
  return &kernels;
}

}  // namespace protoken

#else

namespace protoken {

const Kernels* amx_kernels() { return nullptr; }

}  // namespace protoken

#endif
