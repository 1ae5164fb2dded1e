// 4 fp32 lanes through the compiler's vector extension: SSE2, NEON or plain code, whatever the target has.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace protoken {
namespace {

struct Simd {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int W = 4;
  static constexpr int kPanelVectors = 2;
  static constexpr int kPanelRows = 4;
  static constexpr int kDotRegisters = 8;
  static constexpr int kStreams = 8;        // of memory at once, of fp32 rows and one token
  static constexpr int kNarrowStreams = 8;  // the same of narrower formats
  static constexpr bool kDotPieces = true;  // totals read a client as four streams
  static constexpr int kPanelUnroll = 1;
  static constexpr int kDotTokensFp32 = 16;
  static constexpr bool kPanelInPlace = false;
  static constexpr const char* kName = "portable";
  // Bytes ahead of which `streams` rows are prefetched.
  static constexpr int64_t rows_ahead(int64_t size, int streams) { return size == 1 || streams > 8 ? 512 : 1024; }
  static constexpr int64_t kDotAhead = 1024;  // of totals

  static V zero() { return V{}; }
  static V set1(float value) { return V{} + value; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V mul(V a, V b) { return a * b; }
  static V add(V a, V b) { return a + b; }
  // Lane l holds x[first + l / Repeat].
  template <int Repeat>
  static V spread(V x, int first) {
    V v;
    for (int l = 0; l < W; ++l) v[l] = x[first + l / Repeat];
    return v;
  }
  static float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }

  // 4 elements as fp32; float8 comes out times 2^-8 (see load_factor).
  template <int Dtype>
  static V load_as(const void* p) {
    if constexpr (Dtype == kFloat32) {
      return load(static_cast<const float*>(p));
    } else if constexpr (Dtype == kBfloat16 || Dtype == kInt8) {
      return decode<Dtype>(static_cast<const char*>(p));
    } else {
      return decode_by_case<Dtype>(static_cast<const char*>(p));
    }
  }

  // Remembers whether any float8 byte it saw was NaN (0x7f or 0xff).
  struct NanFlag {
    bool found = false;

    void line(const void* p) { bytes(static_cast<const char*>(p), 64); }
    void bytes(const char* p, int64_t n) {
      for (int64_t i = 0; i < n; ++i) found |= (p[i] & 0x7f) == 0x7f;
    }
    bool any() const { return found; }
  };

 private:
  template <int Dtype>
  static V decode(const char* p) {
    V v;
    for (int i = 0; i < W; ++i) v[i] = load_element(p + i * item_size(Dtype), Dtype);
    if constexpr (Dtype == kFloat8E4M3) v *= 0x1p-8f;
    return v;
  }

  // Kept out of the unrolled loops: fp16 and float8 branch per element, and copies of that take minutes to compile.
  template <int Dtype>
  static __attribute__((noinline)) V decode_by_case(const char* p) {
    return decode<Dtype>(p);
  }
};

}  // namespace
}  // namespace protoken
