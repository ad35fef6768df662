// What csrc/cuda uses of cuda_fp16.h.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

struct __half {
  uint16_t bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  _Float16 value;
  std::memcpy(&value, &h.bits, sizeof(value));
  return static_cast<float>(value);
}

// Rounds to nearest even, overflow to infinity, as the hardware does.
inline __half __float2half_rn(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  __half h;
  std::memcpy(&h.bits, &value, sizeof(value));
  return h;
}

inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
