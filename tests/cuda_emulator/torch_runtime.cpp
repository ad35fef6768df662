// What libtorch has for CUDA only, for CPU tensors: the current stream, the device guard, errors.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <string>

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function,
                                        uint32_t line, bool, char** message) {
  *message = nullptr;
  if (error != cudaSuccess) {
    const std::string text = "CUDA error " + std::to_string(error) + " in " + function + " (" +
                             file + ":" + std::to_string(line) + ")";
    *message = new char[text.size() + 1];
    std::memcpy(*message, text.c_str(), text.size() + 1);
  }
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) { delete[] message; }
