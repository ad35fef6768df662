// Kernels with faults that the emulator must find: `faults NAME` launches one of them.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/vector.cuh"

using effnet::cuda::shared_floats;

__global__ void diverging_barriers(float* x) {
  if (threadIdx.x < 3) {
    x[threadIdx.x] = 1.f;
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return(float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void shared_overrun(float*) { shared_floats()[threadIdx.x + 1] = 0.f; }

__global__ void global_overrun(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x + 1] = 0.f; }

__global__ void misaligned_vector(float* x) {
  effnet::cuda::store(x + 1, effnet::cuda::broadcast<4>(0.f));
}

// Without a barrier between the write and the read a neighbour's value is there or not.
__global__ void missing_barrier(float* x) {
  shared_floats()[threadIdx.x] = 1.f;
  x[blockIdx.x * blockDim.x + threadIdx.x] = shared_floats()[(threadIdx.x + 1) % blockDim.x];
}

// Every thread sums the block's values, twice, through one buffer.
__global__ void correct(float* x) {
  float sum = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    shared_floats()[threadIdx.x] = sum;
    __syncthreads();
    sum = 0.f;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += shared_floats()[i];
    __syncthreads();
  }
  x[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

constexpr unsigned kBlocks = 4, kThreads = 32;

bool launch(void (*kernel)(float*), unsigned grid, unsigned block, size_t shared_bytes,
            float* data) {
  void* arguments[] = {&data};
  return cudaLaunchKernel(kernel, dim3(grid), dim3(block), arguments, shared_bytes, nullptr) ==
         cudaSuccess;
}

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "";
  std::vector<float> data(kBlocks * kThreads);
  const struct {
    const char* name;
    void (*kernel)(float*);
  } kernels[] = {{"diverging_barriers", diverging_barriers},
                 {"early_return", early_return},
                 {"shared_overrun", shared_overrun},
                 {"global_overrun", global_overrun},
                 {"misaligned_vector", misaligned_vector},
                 {"missing_barrier", missing_barrier},
                 {"correct", correct}};
  for (const auto& k : kernels) {
    if (std::strcmp(name, k.name) != 0) continue;
    launch(k.kernel, kBlocks, kThreads, kThreads * sizeof(float), data.data());
    for (const float x : data) std::printf("%g ", x);
    return 0;
  }
  if (std::strcmp(name, "refused_launches") == 0) {
    std::printf("%d", launch(correct, 0, 32, 1024, data.data()));
    std::printf("%d", launch(correct, 1, 1025, 1024, data.data()));
    std::printf("%d", launch(correct, 1, 32, 48 * 1024 + 1, data.data()));
    cudaFuncSetAttribute(correct, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024);
    std::printf("%d", launch(correct, 1, 32, 64 * 1024, data.data()));
    std::printf("%d", cudaFuncSetAttribute(correct, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           228 * 1024));
    return 0;
  }
  std::fprintf(stderr, "there is no kernel %s\n", name);
  return 2;
}
