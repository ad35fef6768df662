// Vectors of float32, the storage types they are loaded from and stored to, and the arithmetic that
// epilogue.h asks for. No torch headers: device code knows pointers and shapes only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../arguments.h"
#include "../epilogue.h"

#define EFFNET_DEVICE __device__ __forceinline__

namespace effnet::cuda {

// N float32 values in registers. Indices must be compile-time constants after unrolling.
template <int N>
struct Floats {
  float v[N];

  EFFNET_DEVICE float& operator[](int i) { return v[i]; }
  EFFNET_DEVICE const float& operator[](int i) const { return v[i]; }
};

template <int N>
EFFNET_DEVICE Floats<N> broadcast(float x) {
  Floats<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = x;
  return y;
}

// Values i * M ... (i + 1) * M - 1 of x.
template <int M, int N>
EFFNET_DEVICE Floats<M> slice(const Floats<N>& x, int i) {
  Floats<M> y;
#pragma unroll
  for (int j = 0; j < M; ++j) y[j] = x[i * M + j];
  return y;
}

template <int M, int N>
EFFNET_DEVICE void set_slice(Floats<N>& x, int i, const Floats<M>& y) {
#pragma unroll
  for (int j = 0; j < M; ++j) x[i * M + j] = y[j];
}

template <int N>
EFFNET_DEVICE Floats<N> operator+(const Floats<N>& a, const Floats<N>& b) {
  Floats<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = a[i] + b[i];
  return y;
}

template <int N>
EFFNET_DEVICE Floats<N> operator-(const Floats<N>& a, const Floats<N>& b) {
  Floats<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = a[i] - b[i];
  return y;
}

template <int N>
EFFNET_DEVICE Floats<N> operator*(const Floats<N>& a, const Floats<N>& b) {
  Floats<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = a[i] * b[i];
  return y;
}

// a * b + c, rounded once.
template <int N>
EFFNET_DEVICE Floats<N> multiply_add(const Floats<N>& a, const Floats<N>& b, const Floats<N>& c) {
  Floats<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = fmaf(a[i], b[i], c[i]);
  return y;
}

// Storage of one vector of V elements, moved by one load or store of sizeof(T) * V bytes. 16-bit
// elements travel as 32-bit words so that a vector in flight takes sizeof(T) * V / 4 registers.
template <class T, int V, bool kWords = (sizeof(T) * V >= 4)>
struct alignas(sizeof(T) * V) Vector {
  uint32_t word[sizeof(T) * V / 4];
};

template <class T, int V>
struct Vector<T, V, false> {
  T word[V];
};

// Elements i * M ... (i + 1) * M - 1.
template <class T, int M, int V>
EFFNET_DEVICE Vector<T, M> slice(const Vector<T, V>& x, int i) {
  constexpr int kWords = sizeof(Vector<T, M>) / sizeof(x.word[0]);
  Vector<T, M> y;
#pragma unroll
  for (int j = 0; j < kWords; ++j) y.word[j] = x.word[i * kWords + j];
  return y;
}

template <class T, int M, int V>
EFFNET_DEVICE void set_slice(Vector<T, V>& x, int i, const Vector<T, M>& y) {
  constexpr int kWords = sizeof(Vector<T, M>) / sizeof(x.word[0]);
#pragma unroll
  for (int j = 0; j < kWords; ++j) x.word[i * kWords + j] = y.word[j];
}

// Loads through a pointer that must be aligned to the whole vector.
template <int V, class T>
EFFNET_DEVICE Vector<T, V> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}

EFFNET_DEVICE float to_float(float x) { return x; }
EFFNET_DEVICE float to_float(__half x) { return __half2float(x); }
EFFNET_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
EFFNET_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class To, class From>
EFFNET_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T, int V>
EFFNET_DEVICE Floats<V> unpack(const Vector<T, V>& raw) {
  Floats<V> y;
  if constexpr (sizeof(T) * V < 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = to_float(raw.word[i]);
  } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = bit_cast<float>(raw.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        const float2 pair = __half22float2(bit_cast<__half2>(raw.word[i]));
        y[2 * i] = pair.x;
        y[2 * i + 1] = pair.y;
      } else {
        // A bfloat16 is the upper half of the float32. The library's conversion takes an
        // instruction more for the second.
        y[2 * i] = bit_cast<float>(raw.word[i] << 16);
        y[2 * i + 1] = bit_cast<float>(raw.word[i] & 0xffff0000u);
      }
    }
  }
  return y;
}

template <class T, int V>
EFFNET_DEVICE Vector<T, V> pack(const Floats<V>& x) {
  Vector<T, V> raw;
  if constexpr (sizeof(T) * V < 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) raw.word[i] = from_float<T>(x[i]);
  } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < V; ++i) raw.word[i] = bit_cast<uint32_t>(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        raw.word[i] = bit_cast<uint32_t>(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
      } else {
        raw.word[i] = bit_cast<uint32_t>(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
      }
    }
  }
  return raw;
}

template <int V, class T>
EFFNET_DEVICE Floats<V> load(const T* p) {
  return unpack<T, V>(load_vector<V>(p));
}

template <class T, int V>
EFFNET_DEVICE void store(T* p, const Floats<V>& x) {
  *reinterpret_cast<Vector<T, V>*>(p) = pack<T, V>(x);
}

// The same to 16 bytes of global memory by one instruction. The compiler does not always see that
// the four stores of a vector's words are one.
template <class T, int V>
EFFNET_DEVICE void store_at_once(T* p, const Floats<V>& x) {
  static_assert(sizeof(Vector<T, V>) == 16);
#ifdef __CUDA_ARCH__
  const Vector<T, V> raw = pack<T, V>(x);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(raw.word[0]), "r"(raw.word[1]), "r"(raw.word[2]), "r"(raw.word[3])
               : "memory");
#else
  store(p, x);
#endif
}

// 2^x and 1/x by the special function unit: 2 and 1 ulp; subnormal results are flushed to zero.
EFFNET_DEVICE float approximate_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

EFFNET_DEVICE float approximate_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// tanh(x) by the special function unit, to 2^-11 of its value.
EFFNET_DEVICE float approximate_tanh(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}

constexpr float kLog2E = 1.4426950408889634f;

// The arithmetic of epilogue.h on N values that are stored as T: one switch over the activation
// serves the whole vector. Comparisons are written so that NaN comes through, as in PyTorch.
template <class T, int N>
struct Math {
  using Value = Floats<N>;

  static EFFNET_DEVICE Value set(float x) { return broadcast<N>(x); }

  static EFFNET_DEVICE Value min(const Value& a, const Value& b) {
    Value y;
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = b[i] < a[i] ? b[i] : a[i];
    return y;
  }

  static EFFNET_DEVICE Value max(const Value& a, const Value& b) {
    Value y;
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = a[i] < b[i] ? b[i] : a[i];
    return y;
  }

  static EFFNET_DEVICE Value sixth(const Value& x) {
    if constexpr (std::is_same_v<T, float>) {
      return multiply_add(x, set(kSixth), x * set(kSixthRest));
    } else {
      return x * set(1.f / 6);
    }
  }

  static EFFNET_DEVICE Value if_positive(const Value& x, const Value& y) {
    Value z;
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = x[i] > 0.f ? y[i] : 0.f;
    return z;
  }

  static EFFNET_DEVICE Value silu(const Value& x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      Value y;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float half = 0.5f * x[i];
        y[i] = fmaf(half, approximate_tanh(half), half);
      }
      return y;
    } else {
      return x * sigmoid(x);
    }
  }

  static EFFNET_DEVICE Value sigmoid(const Value& x) {
    Value y;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        // One operation of the special function unit instead of two; its error is an eighth of the
        // rounding of a bfloat16 in (1/2, 1).
        y[i] = fmaf(approximate_tanh(0.5f * x[i]), 0.5f, 0.5f);
        continue;
      }
      float e;
      if constexpr (std::is_same_v<T, float>) {
        // The rounding error of x * log2(e) grows with |x|: carry it through as a factor
        // 1 + error * ln(2), which keeps exp to about 2 ulp. The bound keeps e finite, so that the
        // correction cannot make inf - inf.
        constexpr float kLog2ELow = 1.925963033500888e-8f;
        constexpr float kLn2 = 0.6931471805599453f;
        const float t = x[i] < -87.f ? 87.f : -x[i];
        const float exponent = t * kLog2E;
        const float error = fmaf(t, kLog2E, -exponent) + t * kLog2ELow;
        e = approximate_exp2(exponent);
        e = fmaf(e, error * kLn2, e);
      } else {
        e = approximate_exp2(x[i] * -kLog2E);
      }
      y[i] = approximate_reciprocal(1.f + e);
    }
    return y;
  }
};

// The value of one channel of a (C,) vector, which holds float32 or T, or is absent.
template <class T>
EFFNET_DEVICE float channel_value(const ChannelVector& vector, int channel, float absent) {
  if (vector.data == nullptr) return absent;
  return vector.dtype == Dtype::float32 ? static_cast<const float*>(vector.data)[channel]
                                        : to_float(static_cast<const T*>(vector.data)[channel]);
}

// What normalisation does to one channel: d = z - mean, u = d * scale + bias. Subtracting the mean
// first keeps the digits of z when |mean| is much larger than the standard deviation.
struct ChannelNorm {
  float mean, invstd, scale, bias;

  // u = z * scale + shift(), where the digits of z are worth less than an instruction.
  EFFNET_DEVICE float shift() const { return bias - mean * scale; }
};

// value(i, vector, absent): of the channel, in the i-th of the four vectors.
template <class Value>
EFFNET_DEVICE ChannelNorm norm_of(const BatchNorm& bn, const Value& value) {
  ChannelNorm norm;
  norm.mean = value(0, bn.mean, 0.f);
  norm.invstd = 1.f / sqrtf(value(1, bn.var, 1.f) + static_cast<float>(bn.eps));
  norm.scale = norm.invstd * value(2, bn.weight, 1.f);
  norm.bias = value(3, bn.bias, 0.f);
  return norm;
}

template <class T>
EFFNET_DEVICE ChannelNorm channel_norm(const BatchNorm& bn, int channel) {
  return norm_of(bn, [&](int, const ChannelVector& vector, float absent) {
    return channel_value<T>(vector, channel, absent);
  });
}

// The norms of eight channels by a warp, which loads the four vectors at once, a value a lane: a
// thread would wait for each. lane_norm_value: the lane's, of channel lane % 8, which must exist.
constexpr int kNormChannels = 8;

template <class T>
EFFNET_DEVICE float lane_norm_value(const BatchNorm& bn, int lane, int channel) {
  const int i = lane / kNormChannels;
  const ChannelVector& vector = i == 0 ? bn.mean : i == 1 ? bn.var : i == 2 ? bn.weight : bn.bias;
  return channel_value<T>(vector, channel, i == 1 || i == 2 ? 1.f : 0.f);
}

EFFNET_DEVICE ChannelNorm lanes_norm(const BatchNorm& bn, int lane, float lane_value) {
  return norm_of(bn, [&](int i, const ChannelVector&, float) {
    return __shfl_sync(0xffffffff, lane_value, i * kNormChannels + lane % kNormChannels);
  });
}

// Shared memory, of the size that the launch gave. Kernels carve their arrays out of it; none is
// declared with a fixed size, so that launches alone decide what a block takes.
alignas(128) extern __shared__ float4 dynamic_shared_memory[];

EFFNET_DEVICE float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared_memory); }

}  // namespace effnet::cuda
