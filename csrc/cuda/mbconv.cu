// The CUDA kernel of MBConv's first half, as PyTorch calls it: checks, then the launches of the
// tensors' type.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../ops.h"
#include "mbconv.h"
#include "row_launches.cuh"

namespace effnet::cuda {
namespace {

void expand_depthwise_out(Tensor input, Tensor expand_weight, Tensor expand_mean, Tensor expand_var,
                          OptionalTensor expand_bn_weight, OptionalTensor expand_bn_bias,
                          double expand_eps, int64_t expand_activation, Tensor weight, Tensor mean,
                          Tensor var, OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                          int64_t stride, int64_t pad_top, int64_t pad_left, int64_t activation,
                          bool allow_tf32, Tensor output, OptionalTensor pooled) {
  const ExpandDepthwise a = check_expand_depthwise(
      input, expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias, expand_eps,
      expand_activation, weight, mean, var, bn_weight, bn_bias, eps, stride, pad_top, pad_left,
      activation, allow_tf32, output, pooled);
  for_launches<ExpandLaunches>("expand_depthwise_out", a.dtype,
                               [&](auto launches) { launches.inference(a, input); });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("expand_depthwise_out", TORCH_BOX(&effnet::cuda::expand_depthwise_out));
}
