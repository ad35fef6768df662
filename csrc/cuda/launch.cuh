// Kernel launches: the one place where the runtime API is called.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "limits.cuh"

namespace effnet::cuda {

// Makes a tensor's device current for the life of the object and holds what launches on it need.
class __attribute__((visibility("hidden"))) Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    const int index = tensor.get_device_index();
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&limits_.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&limits_.multiprocessor_bytes,
                                          cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  }

  const DeviceLimits& limits() const { return limits_; }
  int multiprocessors() const { return limits_.multiprocessors; }
  int shared_bytes(int blocks) const { return limits_.shared_bytes(blocks); }

  // Launches kernel<<<(blocks), threads, shared_bytes>>>(arguments...) on the current stream and
  // raises if the launch was refused. Grids are one-dimensional: x alone goes past 65535.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
              const Arguments&... arguments) const {
    STD_TORCH_CHECK(blocks <= INT32_MAX, "too large for one launch: ", blocks, " thread blocks");
    // Blocks get more than 48 KB of shared memory only on request.
    if (shared_bytes > 48 * 1024) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
    }
    launch_converted(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes,
                     static_cast<Parameters>(arguments)...);
  }

 private:
  template <class... Parameters>
  void launch_converted(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                        Parameters... parameters) const {
    void* pointers[] = {static_cast<void*>(&parameters)...};
    STD_CUDA_CHECK(cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, stream_));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  DeviceLimits limits_;
};

}  // namespace effnet::cuda
