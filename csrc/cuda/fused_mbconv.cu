// The CUDA kernel of the Fused-MBConv block, as PyTorch calls it: checks, then the launch of the
// tensors' type.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../ops.h"
#include "fused_mbconv.h"
#include "row_launches.cuh"

namespace effnet::cuda {
namespace {

void fused_mbconv_out(Tensor input, Tensor expand_weight, Tensor expand_mean, Tensor expand_var,
                      OptionalTensor expand_bn_weight, OptionalTensor expand_bn_bias,
                      double expand_eps, int64_t expand_activation, int64_t stride, int64_t pad_top,
                      int64_t pad_left, OptionalTensor project_weight, OptionalTensor project_mean,
                      OptionalTensor project_var, OptionalTensor project_bn_weight,
                      OptionalTensor project_bn_bias, double project_eps,
                      int64_t project_activation, OptionalTensor residual, bool allow_tf32,
                      Tensor output, OptionalTensor pooled) {
  const FusedMbconv a = check_fused_mbconv(
      input, expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias, expand_eps,
      expand_activation, stride, pad_top, pad_left, project_weight, project_mean, project_var,
      project_bn_weight, project_bn_bias, project_eps, project_activation, residual, allow_tf32,
      output, pooled);
  for_launches<FusedLaunches>("fused_mbconv_out", a.dtype,
                              [&](auto launches) { launches.inference(a, input); });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("fused_mbconv_out", TORCH_BOX(&effnet::cuda::fused_mbconv_out));
}
