// Checks of what comes over the border from Python, and memory that is freed whatever happens.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "dtypes.h"

namespace protoken {

// A plain pointer, so that no message is put together before it is thrown: a call checks thousands of clients.
inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

inline int64_t product(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) throw std::invalid_argument("a size overflows 64 bits");
  return result;
}

// Bytes per element of a bank whose addresses are whole elements.
inline int64_t check_bank(int64_t dtype, const int64_t* addresses, int64_t clients, int64_t step = 1) {
  const int64_t size = item_size(dtype);
  if (size <= 0) throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
  for (int64_t k = 0; k < clients; ++k) {
    const int64_t address = addresses[k * step];
    if (address != 0 && address % size == 0) continue;
    throw std::invalid_argument("client " + std::to_string(k) +
                                (address == 0 ? " has a null address" : " lies at a misaligned address"));
  }
  return size;
}

// Uninitialised floats on a cache line's border.
class Floats {
 public:
  explicit Floats(int64_t count) {
    const int64_t bytes = (product(count < 1 ? 1 : count, static_cast<int64_t>(sizeof(float))) + 127) / 64 * 64;
    data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Floats(Floats&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  Floats& operator=(Floats&&) = delete;
  ~Floats() { std::free(data_); }

  float* data() const { return data_; }

 private:
  float* data_;
};

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace protoken
