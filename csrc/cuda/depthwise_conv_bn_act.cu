// The CUDA kernels of the depthwise op, as PyTorch calls them: checks, then the launches of the
// tensors' type.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../ops.h"
#include "depthwise_conv_bn_act.h"
#include "row_launches.cuh"

namespace effnet::cuda {
namespace {

void depthwise_conv_bn_act_out(Tensor input, Tensor weight, Tensor mean, Tensor var,
                               OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                               int64_t stride, int64_t pad_top, int64_t pad_left,
                               int64_t activation, OptionalTensor prologue_scale,
                               OptionalTensor prologue_shift, int64_t prologue_activation,
                               Tensor output, OptionalTensor pooled) {
  const DepthwiseInference a = check_depthwise_inference(
      input, weight, mean, var, bn_weight, bn_bias, eps, stride, pad_top, pad_left, activation,
      prologue_scale, prologue_shift, prologue_activation, output, pooled);
  for_launches<DepthwiseLaunches>("depthwise_conv_bn_act_out", a.dtype,
                                  [&](auto launches) { launches.inference(a, input); });
}

void depthwise_conv_bn_act_train_out(Tensor input, Tensor weight, OptionalTensor bn_weight,
                                     OptionalTensor bn_bias, double eps, int64_t stride,
                                     int64_t pad_top, int64_t pad_left, int64_t activation,
                                     OptionalTensor prologue_scale, OptionalTensor prologue_shift,
                                     int64_t prologue_activation, bool batch_stats, Tensor conv,
                                     Tensor mean, Tensor var, OptionalTensor output,
                                     OptionalTensor pooled) {
  const DepthwiseTraining a = check_depthwise_training(
      input, weight, bn_weight, bn_bias, eps, stride, pad_top, pad_left, activation, prologue_scale,
      prologue_shift, prologue_activation, batch_stats, conv, mean, var, output, pooled);
  for_launches<DepthwiseLaunches>("depthwise_conv_bn_act_train_out", a.dtype,
                                  [&](auto launches) { launches.training(a, input); });
}

void depthwise_conv_bn_act_backward_out(
    Tensor grad_output, OptionalTensor grad_pooled, Tensor conv, Tensor mean, Tensor var,
    OptionalTensor bn_weight, OptionalTensor bn_bias, double eps, int64_t activation,
    bool batch_stats, Tensor input, Tensor weight, int64_t stride, int64_t pad_top,
    int64_t pad_left, OptionalTensor prologue_scale, OptionalTensor prologue_shift,
    int64_t prologue_activation, OptionalTensor grad_input, OptionalTensor grad_weight,
    Tensor grad_bn_weight, Tensor grad_bn_bias, OptionalTensor grad_prologue_scale,
    OptionalTensor grad_prologue_shift) {
  const DepthwiseBackward a = check_depthwise_backward(
      grad_output, grad_pooled, conv, mean, var, bn_weight, bn_bias, eps, activation, batch_stats,
      input, weight, stride, pad_top, pad_left, prologue_scale, prologue_shift, prologue_activation,
      grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_prologue_scale,
      grad_prologue_shift);
  for_launches<DepthwiseLaunches>("depthwise_conv_bn_act_backward_out", a.dtype,
                                  [&](auto launches) { launches.backward(a, input); });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("depthwise_conv_bn_act_out", TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act_out));
  m.impl("depthwise_conv_bn_act_train_out",
         TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act_train_out));
  m.impl("depthwise_conv_bn_act_backward_out",
         TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act_backward_out));
}
