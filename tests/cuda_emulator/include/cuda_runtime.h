// What csrc/cuda uses of the CUDA language and runtime, for g++: see emulator.cpp.
// A kernel that needs more of CUDA adds it here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Device code asks for this where it would otherwise use inline PTX.
#define EFFNET_CUDA_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) int2 {
  int x, y;
};

struct alignas(16) int4 {
  int x, y, z, w;
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

inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// The default arguments tell the emulator which barrier of the source a thread waits at, here
// and below; kernels leave them out.
void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE());

// Warp operations: collective over the 32 lanes of a warp, which wait for each other. Masks must be
// full. A block whose size is no multiple of 32 has a short last warp: its lanes shuffle among
// themselves and read NaN (all bits set) from lanes that do not exist.
void __syncwarp(unsigned mask = 0xffffffff, const char* file = __builtin_FILE(),
                int line = __builtin_LINE());

namespace cuda_emulator {

// A place in the source where threads wait for each other; the compiler may have made several of
// it.
struct Operation {
  const char* name;
  const char* file;
  int line;
};

enum class Shuffle { index, down, butterfly };

// The bits that the lane given by `operand` had.
uint64_t shuffle_bits(const Operation& operation, unsigned mask, Shuffle shuffle, uint64_t bits,
                      unsigned operand, int width);

template <class T>
T shuffle(const Operation& operation, unsigned mask, Shuffle shuffle, T value, unsigned operand,
          int width) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = shuffle_bits(operation, mask, shuffle, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// ldmatrix.sync.aligned.m8n8.x{1,2,4}[.trans].shared.b16: lane l gives the address of row l % 8 of
// matrix l / 8. A row is read when its lane arrives, so that a __syncwarp missing before it
// changes results.
void ldmatrix(const Operation& operation, uint32_t* r, unsigned matrices, bool transposed,
              const void* row);

#define EFFNET_LDMATRIX(name, matrices, transposed)                                               \
  inline void name(uint32_t (&r)[matrices], const void* row, const char* file = __builtin_FILE(), \
                   int line = __builtin_LINE()) {                                                 \
    ldmatrix({#name, file, line}, r, matrices, transposed, row);                                  \
  }
EFFNET_LDMATRIX(ldmatrix_x1, 1, false)
EFFNET_LDMATRIX(ldmatrix_x2, 2, false)
EFFNET_LDMATRIX(ldmatrix_x4, 4, false)
EFFNET_LDMATRIX(ldmatrix_x1_trans, 1, true)
EFFNET_LDMATRIX(ldmatrix_x2_trans, 2, true)
EFFNET_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef EFFNET_LDMATRIX

// mma.sync.aligned.m16n8k{16,8}.row.col.f32.{bf16.bf16,f16.f16}.f32: d += a * b.
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE());
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], bool bfloat16,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE());

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: d += a * b. Each sum is rounded towards zero,
// as the hardware's is, so that kernels which add up too long in it are found inaccurate.
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const char* file = __builtin_FILE(), int line = __builtin_LINE());

// cvt.rna.tf32.f32
uint32_t cvt_rna_tf32(float x);

// cp.async of `size` bytes, of which `bytes` are read and the rest are zeros. The shared memory is
// NaN from then on until the thread waits for the copy, so that a missing wait changes results.
void cp_async(void* shared, const void* global, int bytes, int size = 16);
void cp_async_commit_group();
void cp_async_wait_group(unsigned pending);
void cp_async_wait_all();

}  // namespace cuda_emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_emulator::shuffle({"__shfl_sync", file, line}, mask, cuda_emulator::Shuffle::index,
                                value, source, width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_emulator::shuffle({"__shfl_down_sync", file, line}, mask,
                                cuda_emulator::Shuffle::down, value, delta, width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_emulator::shuffle({"__shfl_xor_sync", file, line}, mask,
                                cuda_emulator::Shuffle::butterfly, value, lane_mask, width);
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81
};
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
