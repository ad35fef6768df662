// The schema of every CUDA kernel, of the CPU's prepared networks, and what the library tells about
// the processor. A kernel writes
// into tensors that the caller (effnet_kernels/ops) allocated; its implementation registers itself
// beside its code. The CPU kernels implement the functional ops themselves, whose schemas are
// there.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(EFFNET_LIBRARY, m) {
  m.def(
      "depthwise_conv_bn_act_out("
      "Tensor input, Tensor weight, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
      "float eps, int stride, int pad_top, int pad_left, int activation, "
      "Tensor? prologue_scale, Tensor? prologue_shift, int prologue_activation, "
      "Tensor(a!) output, Tensor(b!)? pooled) -> ()");
  m.def(
      "depthwise_conv_bn_act_train_out("
      "Tensor input, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, "
      "float eps, int stride, int pad_top, int pad_left, int activation, "
      "Tensor? prologue_scale, Tensor? prologue_shift, int prologue_activation, bool batch_stats, "
      "Tensor(a!) conv, Tensor(b!) mean, Tensor(c!) var, Tensor(d!)? output, Tensor(e!)? pooled) "
      "-> ()");
  m.def(
      "depthwise_conv_bn_act_backward_out("
      "Tensor grad_output, Tensor? grad_pooled, Tensor conv, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, float eps, int activation, bool batch_stats, "
      "Tensor input, Tensor weight, int stride, int pad_top, int pad_left, "
      "Tensor? prologue_scale, Tensor? prologue_shift, int prologue_activation, "
      "Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!) grad_bn_weight, Tensor(d!) grad_bn_bias, "
      "Tensor(e!)? grad_prologue_scale, Tensor(f!)? grad_prologue_shift) -> ()");
  m.def(
      "pointwise_conv_bn_act_out("
      "Tensor input, Tensor weight, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
      "float eps, int activation, Tensor? prologue_scale, Tensor? prologue_shift, "
      "int prologue_activation, Tensor? gate, Tensor? residual, bool allow_tf32, "
      "Tensor(a!) output, Tensor(b!)? pooled) -> ()");
  m.def(
      "expand_depthwise_out("
      "Tensor input, Tensor expand_weight, Tensor expand_mean, Tensor expand_var, "
      "Tensor? expand_bn_weight, Tensor? expand_bn_bias, float expand_eps, int expand_activation, "
      "Tensor weight, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, float eps, "
      "int stride, int pad_top, int pad_left, int activation, bool allow_tf32, "
      "Tensor(a!) output, Tensor(b!)? pooled) -> ()");
  m.def(
      "fused_mbconv_out("
      "Tensor input, Tensor expand_weight, Tensor expand_mean, Tensor expand_var, "
      "Tensor? expand_bn_weight, Tensor? expand_bn_bias, float expand_eps, int expand_activation, "
      "int stride, int pad_top, int pad_left, Tensor? project_weight, Tensor? project_mean, "
      "Tensor? project_var, Tensor? project_bn_weight, Tensor? project_bn_bias, "
      "float project_eps, int project_activation, Tensor? residual, bool allow_tf32, "
      "Tensor(a!) output, Tensor(b!)? pooled) -> ()");
  // What each computes is in arguments.h.
  m.def("channel_statistics_out(Tensor input, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "batch_norm_act_out(Tensor input, Tensor mean, Tensor var, Tensor? bn_weight, "
      "Tensor? bn_bias, float eps, int activation, Tensor? gate, Tensor? residual, "
      "Tensor(a!)? output, Tensor(b!)? pooled) -> ()");
  m.def(
      "batch_norm_act_sums_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, float eps, int activation, Tensor? gate, "
      "Tensor? grad_pooled, Tensor(a!) grad_bn_weight, Tensor(b!) grad_bn_bias) -> ()");
  m.def(
      "batch_norm_act_backward_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, float eps, int activation, Tensor? gate, "
      "Tensor? grad_pooled, Tensor? grad_bn_weight, Tensor? grad_bn_bias, bool linear, "
      "Tensor(a!) grad_input) -> ()");
  m.def(
      "batch_norm_act_gate_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, float eps, int activation, Tensor gate, "
      "Tensor(a!) grad_gate, Tensor(b!) gated, Tensor(c!) grad_gated) -> ()");
  // sums[n, c] = sum over pixels of input, or of input * other.
  m.def("channel_sums_out(Tensor input, Tensor? other, Tensor(a!) sums) -> ()");
  // output = input * scale[n, c] (+ shift[n, c]).
  m.def("channel_scale_out(Tensor input, Tensor scale, Tensor? shift, Tensor(a!) output) -> ()");
  m.def(
      "squeeze_excite_gate_out(Tensor pooled, int pixels, Tensor reduce_weight, "
      "Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, int activation, "
      "int gate_activation, Tensor(a!) hidden, Tensor(b!) gate) -> ()");
  m.def(
      "squeeze_excite_gate_backward_out(Tensor grad_gate, Tensor pooled, int pixels, "
      "Tensor hidden, Tensor gate, Tensor reduce_weight, Tensor expand_weight, int activation, "
      "int gate_activation, Tensor(a!) grad_pooled, Tensor(b!) grad_reduce_weight, "
      "Tensor(c!) grad_reduce_bias, Tensor(d!) grad_expand_weight, Tensor(e!) grad_expand_bias) "
      "-> ()");
  // The weights of a block, a convolution or a pool, packed for the CPU's kernels; the input is an
  // example of what it will take, of which the extent is nothing. Then images through what was
  // packed, stage after stage, each with its padding (top, left, bottom, right).
  m.def(
      "mbconv_prepare("
      "Tensor input, Tensor? expand_weight, Tensor? expand_mean, Tensor? expand_var, "
      "Tensor? expand_bn_weight, Tensor? expand_bn_bias, float expand_eps, int expand_activation, "
      "Tensor depthwise_weight, Tensor depthwise_mean, Tensor depthwise_var, "
      "Tensor? depthwise_bn_weight, Tensor? depthwise_bn_bias, float depthwise_eps, "
      "int depthwise_activation, int stride, int[] padding, Tensor? reduce_weight, "
      "Tensor? reduce_bias, Tensor? excite_weight, Tensor? excite_bias, int se_activation, "
      "int gate_activation, Tensor project_weight, Tensor project_mean, Tensor project_var, "
      "Tensor? project_bn_weight, Tensor? project_bn_bias, float project_eps, "
      "int project_activation, bool residual, bool allow_tf32) -> Tensor");
  m.def(
      "fused_mbconv_prepare("
      "Tensor input, Tensor expand_weight, Tensor expand_mean, Tensor expand_var, "
      "Tensor? expand_bn_weight, Tensor? expand_bn_bias, float expand_eps, int expand_activation, "
      "int stride, int[] padding, Tensor? project_weight, Tensor? project_mean, "
      "Tensor? project_var, Tensor? project_bn_weight, Tensor? project_bn_bias, "
      "float project_eps, int project_activation, bool residual) -> Tensor");
  m.def(
      "pointwise_conv_bn_act_prepare("
      "Tensor input, Tensor weight, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
      "float eps, int activation) -> Tensor");
  m.def("average_pool_prepare(Tensor input) -> Tensor");
  m.def("prepared_network(Tensor input, Tensor[] stages, int[] padding) -> Tensor");
  // The instruction set that the CPU kernels use, and those this processor has, best first.
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
}
