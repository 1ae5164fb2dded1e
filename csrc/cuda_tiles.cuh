// How bank rows and token tiles map onto the matrix units: formats, fragments and the packed image of a tile.
//
// A lane of a warp reads 16 bytes of a bank row, E = 16 / element size values, so that a quad of lanes covers a
// group of 4 E neighbouring columns of that row with no shared memory in between. The products of the matrix units
// do not depend on the order of their inner index, so these columns are used in the order in which the lanes hold
// them: matrix product j (of E / 4 per group) takes from quad lane c the columns E c + 4 j + {0, 1, 2, 3}, and the
// token tile is read, or laid out, in the same order (`slot_column`).
//
// Everything is computed as products of bf16 with fp32 accumulation. What bf16 does not hold exactly is split into
// planes that it does: fp32 = 3 planes of 8 bits, fp16 = 2; the tokens' values likewise, 1 plane when they are bf16 and
// 3 when not.
#pragma once

#include "cuda_primitives.cuh"

namespace protoken::cuda {

enum Format : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kE4M3 = 4, kHalf = 5 };  // kHalf: fp16 bank and tokens

PT_BOTH constexpr int format_bytes(int format) { return format == kF32 ? 4 : format == kI8 || format == kE4M3 ? 1 : 2; }
PT_BOTH constexpr int format_planes(int format) { return format == kF32 ? 3 : format == kF16 ? 2 : 1; }
// Planes that hold any float the tokens may have.
PT_BOTH constexpr int full_planes(int format) { return format == kHalf ? 1 : 3; }
PT_BOTH constexpr int per_load(int format) { return 16 / format_bytes(format); }  // E
PT_BOTH constexpr int group_columns(int format) { return 4 * per_load(format); }  // columns of a quad's load
PT_BOTH constexpr int products(int format) { return per_load(format) / 4; }       // matrix products per group
constexpr int kGroups = 4;                                                        // loads in flight per row
PT_BOTH constexpr int stage_columns(int format) { return kGroups * group_columns(format); }

PT_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PT_BOTH int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PT_BOTH int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PT_BOTH int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the image of a token tile ---------------------------------------------------------------------------

// The column of a group that inner slot 16 j + 8 h + s (s < 8) of the matrix units stands for.
PT_BOTH constexpr int slot_column(int e, int j, int h, int s) { return e * (s / 2) + 4 * j + 2 * h + s % 2; }
// Values between the rows of an image, so that the lanes of one shared-memory access meet different banks.
PT_BOTH constexpr int row_padding(int e) { return e == 4 ? 16 : e == 8 ? 32 : 8; }

// Shape of an image [planes, tokens, width] of 16-bit values, the layout in shared memory and, packed, in global.
struct ImageShape {
  int tokens, planes, width, e;
  int descriptor;  // 1: laid out for wgmma's descriptors, 0: rows with padding

  PT_BOTH int64_t elements() const {
    return static_cast<int64_t>(planes) * tokens * (descriptor ? width : width + row_padding(e));
  }
  // Where 8 values of a token lie next to each other, and the column of value i of them.
  PT_BOTH int64_t offset(int plane, int token, int octet) const {
    if (!descriptor) return (static_cast<int64_t>(plane) * tokens + token) * (width + row_padding(e)) + 8 * octet;
    // Core matrices of 8 tokens x 8 slots, 128 bytes each: tokens fastest, then slots.
    return static_cast<int64_t>(plane) * tokens * width +
           (static_cast<int64_t>(octet) * (tokens / 8) + token / 8) * 64 + token % 8 * 8;
  }
  PT_BOTH int column(int octet, int i) const {
    if (!descriptor) return 8 * octet + i;
    const int octets = e / 2;  // of a group
    return octet / octets * 4 * e + slot_column(e, octet % octets / 2, octet % 2, i);
  }
};

// wgmma's descriptor of B [16 x tokens], no swizzle: distances between core matrices along the inner index (leading)
// and along tokens (stride), in 16 bytes.
PT_BOTH uint64_t wgmma_descriptor(uint32_t shared_address, int tokens) {
  const uint64_t leading = static_cast<uint64_t>(tokens / 8 * 128) >> 4, stride = 128 >> 4;
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | leading << 16 | stride << 32;
}

// ---- planes ----------------------------------------------------------------------------------------------

// The top plane of two values, truncated to bf16; what is left stays. 3 planes hold every fp32 exactly.
__device__ __forceinline__ uint32_t take_plane(float& low, float& high) {
  const uint32_t plane = byte_permute(float_bits(low), float_bits(high), 0x7632);
  low -= bits_float(float_bits(low) & 0xffff0000u);
  high -= bits_float(float_bits(high) & 0xffff0000u);
  return plane;
}
template <int kPlanes>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t (&out)[kPlanes]) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) out[p] = take_plane(low, high);
}
template <int kFormat>
__device__ __forceinline__ void half_pair(uint32_t pair, uint32_t (&out)[format_planes(kFormat)]) {
  if constexpr (kFormat == kF16) {
    split_pair<2>(half_to_float(static_cast<uint16_t>(pair)), half_to_float(static_cast<uint16_t>(pair >> 16)), out);
  } else {
    out[0] = pair;
  }
}
// Two bytes at `selector` of a word -> two bf16.
template <int kFormat>
__device__ __forceinline__ uint32_t byte_pair(uint32_t word, bool upper) {
  if constexpr (kFormat == kE4M3) {
    return e4m3x2_to_bf16x2(upper ? word >> 16 : word & 0xffffu);
  } else {
    // int8 v = 128 + (v & 127) - (128 or, when bit 7 is set, 256), all exact in bf16 (0x4300 = 128, 0x4380 = 256).
    const uint32_t spread = byte_permute(word, 0, upper ? 0x4342 : 0x4140);
    const uint32_t value = (spread & 0x007f007fu) | 0x43004300u, bias = (spread & 0x00800080u) | 0x43004300u;
    return bf16x2_fma(bias, 0xbf80bf80u, value);
  }
}

// ---- rows ------------------------------------------------------------------------------------------------

// E values of a row from `at` on, of which `left` (counted from the first) exist; kHere: loaded where it stands.
template <int kFormat, bool kVectors, bool kHere = false>
__device__ __forceinline__ uint4 load_values(const char* at, int left, int64_t step) {
  constexpr int kBytes = format_bytes(kFormat), kE = per_load(kFormat);
  uint4 v = make_uint4(0, 0, 0, 0);
  if constexpr (kVectors) {
    if (left > 0) v = kHere ? load_stream16_here(at) : load_stream16(at);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kE; ++i) {
      if (i >= left) continue;
      uint32_t bits;
      if constexpr (kBytes == 4) bits = *reinterpret_cast<const uint32_t*>(at + i * step);
      if constexpr (kBytes == 2) bits = *reinterpret_cast<const uint16_t*>(at + i * step);
      if constexpr (kBytes == 1) bits = *reinterpret_cast<const uint8_t*>(at + i * step);
      words[i * kBytes / 4] |= bits << (i * kBytes % 4 * 8);
    }
    v = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return v;
}

// Value number i of the 16 bytes that were loaded.
template <int kFormat>
__device__ __forceinline__ float value_of(const uint4& v, int i) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  if constexpr (kFormat == kF32) return bits_float(words[i]);
  if constexpr (kFormat == kBF16) return bits_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  if constexpr (kFormat == kF16) return half_to_float(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
  if constexpr (kFormat == kE4M3) return e4m3_to_float(words[i / 4] >> (i % 4 >= 2 ? 16 : 0) & 0xffffu, i % 2 == 1);
  if constexpr (kFormat == kI8) {
    const uint32_t pair = byte_pair<kFormat>(words[i / 4], i % 4 >= 2);
    return bits_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  }
  return 0.0f;
}

// ---- fragments -------------------------------------------------------------------------------------------

// A of m16n8k16 for matrix product j of a group: low and high are the 16 bytes of rows g and g + 8.
template <int kFormat>
__device__ __forceinline__ void decode(const uint4& low, const uint4& high, int j,
                                       uint32_t (&a)[format_planes(kFormat)][4]) {
  constexpr int kPlanes = format_planes(kFormat);
  const uint32_t words[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t planes[kPlanes];
      if constexpr (kFormat == kF32) {
        split_pair<3>(bits_float(words[row][2 * half]), bits_float(words[row][2 * half + 1]), planes);
      } else if constexpr (format_bytes(kFormat) == 2) {
        half_pair<kFormat>(words[row][2 * j + half], planes);
      } else {
        planes[0] = byte_pair<kFormat>(words[row][j], half == 1);
      }
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) a[p][row + 2 * half] = planes[p];
    }
}

// The tokens' words of a group at one row of the image: words 2 j and 2 j + 1 are B of matrix product j.
template <int kE>
__device__ __forceinline__ void load_tokens(const uint16_t* at, uint32_t (&words)[kE / 2]) {
  if constexpr (kE == 4) {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kE / 8; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(at)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
}

// acc[n] += rows x group x tokens, for the group at column `column` of the image; kTokens / 8 tiles of 8 tokens.
template <int kFormat, int kPlanesX, int kTokens>
__device__ __forceinline__ void multiply_group(float (&acc)[kTokens / 8][4],
                                               const uint32_t (&a)[products(kFormat)][format_planes(kFormat)][4],
                                               const uint16_t* image, int width, int column, int lane) {
  constexpr int kE = per_load(kFormat);
  const int pitch = width + row_padding(kE);
  const uint16_t* at = image + (lane / 4) * pitch + column + (lane % 4) * kE;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
    for (int px = 0; px < kPlanesX; ++px) {
      uint32_t b[kE / 2];
      load_tokens<kE>(at + (px * kTokens + n * 8) * pitch, b);
#pragma unroll
      for (int j = 0; j < products(kFormat); ++j)
#pragma unroll
        for (int pw = 0; pw < format_planes(kFormat); ++pw)
          if (pw + px <= 2) mma_16x8x16<kFormat == kHalf>(acc[n], a[j][pw], b[2 * j], b[2 * j + 1]);
    }
}

// The image of one stage, on its way to shared memory.
__device__ __forceinline__ void fetch_image(unsigned char* shared, const uint16_t* image, int bytes) {
  const char* from = reinterpret_cast<const char*>(image);
#pragma unroll 1
  for (int done = threadIdx.x * 16; done < bytes; done += blockDim.x * 16) copy16_async(shared + done, from + done);
  copy_commit();
}

// kCount (a multiple of 4) floats to an address aligned to 16 bytes.
template <int kCount>
__device__ __forceinline__ void store_values(float* at, const float* values) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    *reinterpret_cast<uint4*>(at + i) = make_uint4(float_bits(values[i]), float_bits(values[i + 1]),
                                                   float_bits(values[i + 2]), float_bits(values[i + 3]));
}

// ---- packing ---------------------------------------------------------------------------------------------

// A matrix [tokens, columns] of any strides and float dtype; written as images, tile by tile and chunk by chunk.
struct Matrix {
  const void* data;
  int64_t stride_t, stride_c;
  int32_t dtype;  // kF32, kBF16 or kF16
  int32_t unused;
};

__device__ __forceinline__ float load_float(const void* data, int64_t index, int dtype) {
  if (dtype == kF32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == kBF16 ? bits_float(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

PT_BOTH int64_t image_octets(const ImageShape& shape, int64_t images) {
  return images * shape.tokens * (shape.width / 8);
}
// Blocks of 256 threads that write so many octets. Layers share a launch: blocks without work would outnumber the
// others.
inline unsigned pack_blocks(int64_t octets, int processors) {
  return static_cast<unsigned>(most(1, least(ceil_div(octets, 256), 4 * processors)));
}
// Octet number `index` (octets of a row fastest) of the whole [tiles, chunks] of images. The padding behind a row is
// copied along with it, so it is written as well: compute-sanitizer counts every read of memory that nobody wrote.
__device__ __forceinline__ void pack_octet(const Matrix& from, int64_t tokens, int64_t columns, const ImageShape& shape,
                                           int64_t chunks, bool half, int64_t index, uint16_t* images) {
  const int octet = static_cast<int>(index % (shape.width / 8));
  int64_t rest = index / (shape.width / 8);
  const int token = static_cast<int>(rest % shape.tokens);
  rest /= shape.tokens;  // tile * chunks + chunk
  const int64_t t = rest / chunks * shape.tokens + token, first = rest % chunks * shape.width;
  uint16_t* image = images + rest * shape.elements();
  if (!shape.descriptor && 8 * octet < row_padding(shape.e))
    for (int p = 0; p < shape.planes; ++p)
      *reinterpret_cast<uint4*>(image + shape.offset(p, token, shape.width / 8 + octet)) = make_uint4(0, 0, 0, 0);
  float values[8];
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t c = first + shape.column(octet, i), at = t * from.stride_t + c * from.stride_c;
    const bool inside = t < tokens && c < columns;
    if (half) words[i / 2] |= (inside ? static_cast<const uint16_t*>(from.data)[at] : 0u) << (16 * (i % 2));
    values[i] = inside && !half ? load_float(from.data, at, from.dtype) : 0.0f;
  }
#pragma unroll 1
  for (int p = 0; p < shape.planes; ++p) {
    if (!half)
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = take_plane(values[2 * i], values[2 * i + 1]);
    *reinterpret_cast<uint4*>(image + shape.offset(p, token, octet)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Sums over the lanes whose numbers differ in the bits from kLast to 16. The values per lane are halved at each step,
// the lane with the bit set keeping the upper half, until each has one; steps after that add what is held twice.
template <int kLast, int kValues>
__device__ __forceinline__ void sum_over_lanes(float (&v)[kValues], int lane) {
  int left = kValues;
#pragma unroll
  for (int mask = 16; mask >= kLast; mask /= 2) {
    if (left > 1) {
      left /= 2;
      const bool upper = (lane & mask) != 0;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i >= left) break;
        const float give = upper ? v[i] : v[i + left], keep = upper ? v[i + left] : v[i];
        v[i] = keep + shuffle_xor(give, mask);
      }
    } else {
      v[0] += shuffle_xor(v[0], mask);
    }
  }
}

}  // namespace protoken::cuda
