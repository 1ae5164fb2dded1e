// Element types of a bank and their exact conversion to float, one element at a time.
// Included by files compiled for newer processors: everything here is constexpr or has internal linkage, so that the
// linker never picks such a copy for the rest of the module.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace protoken {

enum DtypeCode : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8E4M3 = 4 };

// Bytes of one element, or 0 for a code that does not exist.
constexpr int64_t item_size(int64_t dtype) {
  return dtype == kFloat32                         ? 4
         : dtype == kBfloat16 || dtype == kFloat16 ? 2
         : dtype == kInt8 || dtype == kFloat8E4M3  ? 1
                                                   : 0;
}

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

static inline float float8_to_float(uint8_t byte) {  // e4m3fn: no infinity, 0x7f and 0xff are NaN
  const uint32_t exponent = (byte >> 3) & 0xfu;
  const uint32_t mantissa = byte & 7u;
  float magnitude;
  if ((byte & 0x7fu) == 0x7fu) {
    magnitude = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    magnitude = bits_to_float(((exponent + 120) << 23) | (mantissa << 20));
  }
  return (byte & 0x80u) ? -magnitude : magnitude;
}

static inline float load_element(const char* address, int64_t dtype) {
  switch (dtype) {
    case kFloat32: {
      float value;
      std::memcpy(&value, address, 4);
      return value;
    }
    case kBfloat16: {
      uint16_t bits;
      std::memcpy(&bits, address, 2);
      return bits_to_float(static_cast<uint32_t>(bits) << 16);
    }
    case kFloat16: {
      uint16_t bits;
      std::memcpy(&bits, address, 2);
      return half_to_float(bits);
    }
    case kInt8: return static_cast<float>(*reinterpret_cast<const int8_t*>(address));
    default: return float8_to_float(*reinterpret_cast<const uint8_t*>(address));
  }
}

}  // namespace protoken
