// What csrc/cuda uses of the CUDA language and runtime, for g++: see emulator.cpp.
// A kernel that needs more of CUDA adds it here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// The default arguments tell the emulator which barrier of the source a thread waits at.
void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE());

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace cuda_emulator {

// Calls body(context) for every thread of every block.
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*body)(void* context), void* context);

cudaError_t set_shared_limit(const void* kernel, int bytes);

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Parameters*>(arguments[I])...);
}

}  // namespace cuda_emulator

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  struct Context {
    void (*kernel)(Parameters...);
    void** arguments;
  } context{kernel, arguments};
  const auto body = [](void* p) {
    const Context& c = *static_cast<Context*>(p);
    cuda_emulator::call(c.kernel, c.arguments, std::index_sequence_for<Parameters...>{});
  };
  return cuda_emulator::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                               body, &context);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return cuda_emulator::set_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}
