// The checked arguments of the kernels: raw pointers and shapes, no torch headers. checks.h fills
// them from tensors, the CPU and CUDA kernels read them.
#pragma once

#include "epilogue.h"
#include "shapes.h"

namespace effnet {

enum class Dtype : int { float32, float16, bfloat16, float64 };

// What is accumulated, and what batch statistics, pooled sums and the gradients of per-channel
// vectors are stored as: float64 for float64 tensors, float32 for all others.
constexpr Dtype accumulate_dtype(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// One value a channel. data == nullptr: the argument was None.
struct ChannelVector {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

// weight == None means ones, bias == None zeros.
struct BatchNorm {
  ChannelVector mean, var, weight, bias;
  double eps;
};

// activate(input * scale + shift) before the convolution; its zero padding is added after that.
// scale and shift have the accumulate dtype, and are null together when there is no prologue.
struct Prologue {
  const void* scale = nullptr;
  const void* shift = nullptr;
  Activation activation = Activation::identity;
};

// Tensors of `dtype` unless a comment says otherwise; (N, C, H, W) ones are dense channels-last.
struct DepthwiseInference {
  Dtype dtype;
  ConvShape shape;
  const void* input;
  const void* weight;  // (C, 1, k, k), contiguous
  BatchNorm bn;
  Activation activation;
  Prologue prologue;
  void* output;
  void* pooled;  // (N, C), accumulate dtype, or null
};

struct DepthwiseTraining {
  Dtype dtype;
  ConvShape shape;
  const void* input;
  const void* weight;
  BatchNorm bn;  // mean and var: as below
  Activation activation;
  Prologue prologue;
  bool batch_stats;
  void* conv;
  // (C,), accumulate dtype: where the statistics are written. Null without batch_stats: then
  // bn.mean and bn.var are read.
  void* batch_mean;
  void* batch_var;
  void* output;  // or null, and pooled with it: then the convolution and its statistics are all
  void* pooled;
};

struct DepthwiseBackward {
  Dtype dtype;
  ConvShape shape;
  const void* grad_output;
  const void* grad_pooled;  // (N, C), accumulate dtype, or null
  const void* conv;
  BatchNorm bn;
  Activation activation;
  bool batch_stats;
  const void* input;
  const void* weight;
  Prologue prologue;
  void* grad_input;   // or null
  void* grad_weight;  // or null
  // (C,), accumulate dtype
  void* grad_bn_weight;
  void* grad_bn_bias;
  // With a prologue, both are given exactly when grad_input is.
  void* grad_prologue_scale;
  void* grad_prologue_shift;
};

// output = activation(bn(sum over c of z[n, c] * weight[k, c])) + residual, at every pixel, where
// z = prologue(input) * gate[n, c]. Images are dense channels-last.
struct PointwiseInference {
  Dtype dtype;
  int64_t batch, pixels;  // pixels of an image
  int in_channels, out_channels;
  const void* input;
  const void* weight;  // (K, C), contiguous
  BatchNorm bn;        // of K channels
  Activation activation;
  Prologue prologue;     // of C channels
  const void* gate;      // (N, C), accumulate dtype, or null
  const void* residual;  // (N, K, H, W) or null
  bool allow_tf32;       // whether float32 operands may be rounded to TF32 on a GPU
  void* output;          // (N, K, H, W)
  void* pooled;          // (N, K), accumulate dtype, or null
};

// The first half of MBConv: depthwise(expand_activation(expand_bn(expand_weight x input))), then
// BN, activation and sums as in DepthwiseInference. The expanded tensor is rounded to `dtype` as if
// it had been written, and padded with zeros.
struct ExpandDepthwise {
  Dtype dtype;
  ConvShape shape;  // of the depthwise convolution: C is the expanded width
  int in_channels;
  const void* input;          // (N, in_channels, H, W)
  const void* expand_weight;  // (C, in_channels), contiguous
  BatchNorm expand_bn;
  Activation expand_activation;
  const void* weight;  // (C, 1, k, k), contiguous
  BatchNorm bn;
  Activation activation;
  bool allow_tf32;
  void* output;  // (N, C, OH, OW)
  void* pooled;  // (N, C), accumulate dtype, or null
};

// One Fused-MBConv block without squeeze-and-excitation: at every output pixel
//   z = expand_activation(expand_bn(k x k convolution of input)), M channels,
//   output = project_activation(project_bn(project_weight z)) + residual.
// z is rounded to `dtype` as if it had been written. project_weight null: output = z + residual.
struct FusedMbconv {
  Dtype dtype;
  ConvShape shape;  // of the convolution: C is the expanded width M
  int in_channels, out_channels;
  const void* input;          // (N, in_channels, H, W)
  const void* expand_weight;  // (M, in_channels, k, k), channels-last: [m][row][column][channel]
  BatchNorm expand_bn;
  Activation expand_activation;
  const void* project_weight;  // (K, M), contiguous, or null: then K is M
  BatchNorm project_bn;
  Activation project_activation;
  const void* residual;  // (N, K, OH, OW) or null
  bool allow_tf32;
  void* output;  // (N, K, OH, OW)
  void* pooled;  // (N, M), accumulate dtype: sums over pixels of z. Null with a project_weight
};

// Mean and biased variance of each channel over images and pixels.
struct ChannelStatistics {
  Dtype dtype;
  int64_t batch, pixels;
  int channels;
  const void* input;
  void* mean;  // (C,), accumulate dtype, like all per-channel values below
  void* var;
};

// What is common to BN + activation and its derivatives: at every pixel of image n
//   xhat = (input - mean) / sqrt(var + eps),  u = xhat * weight + bias,  v = activation(u).
struct BatchNormAct {
  Dtype dtype;
  int64_t batch, pixels;
  int channels;
  const void* input;
  BatchNorm bn;
  Activation activation;
  const void* gate;  // (N, C), accumulate dtype like all that has no comment, or null for ones
};

// output = v * gate[n, c] + residual; pooled[n, c] = sum over pixels of v. One of them may be null.
struct BatchNormActForward : BatchNormAct {
  const void* residual;  // an image, or null
  void* output;          // an image
  void* pooled;          // (N, C)
};

// du, the gradient with respect to u, is
//   (grad_output * gate[n, c] + grad_pooled[n, c]) * activation'(u).
struct BatchNormActGradient : BatchNormAct {
  const void* grad_output;  // an image
  const void* grad_pooled;  // (N, C), or null
};

// grad_bn_weight = sum of du * xhat, grad_bn_bias = sum of du.
struct BatchNormActSums : BatchNormActGradient {
  void* grad_bn_weight;  // (C,)
  void* grad_bn_bias;    // (C,)
};

// grad_input = weight / sqrt(var + eps) * (du - (grad_bn_bias + xhat * grad_bn_weight) / (N H W)),
// the second part only by batch statistics. `linear`: grad_output is the first part already.
struct BatchNormActBackward : BatchNormActGradient {
  const void* grad_bn_weight;  // (C,), or null with grad_bn_bias: frozen statistics
  const void* grad_bn_bias;    // (C,)
  bool linear;
  void* grad_input;  // an image; it may be grad_output
};

// The gate's part: grad_gate[n, c] = sum over pixels of grad_output * v, and on the way what others
// need: gated = v * gate and grad_gated = grad_output * gate, which may be grad_output.
struct BatchNormActGate : BatchNormAct {
  const void* grad_output;  // an image
  void* grad_gate;          // (N, C)
  void* gated;              // an image
  void* grad_gated;         // an image
};

// sums[n, c] = sum over pixels of input, or of input * other where that is given. (N, C) tensors
// have the accumulate dtype here and below; images are dense channels-last.
struct ChannelSums {
  Dtype dtype;
  int64_t batch, pixels;
  int channels;
  const void* input;
  const void* other;  // or null
  void* sums;
};

// output = input * scale[n, c] + shift[n, c]; no shift where it is null.
struct ChannelScale {
  Dtype dtype;
  int64_t batch, pixels;
  int channels;
  const void* input;
  const void* scale;
  const void* shift;  // or null
  void* output;
};

// hidden = reduce_weight (pooled / pixels) + reduce_bias,
// gate = gate_activation(expand_weight activation(hidden) + expand_bias).
struct SqueezeExciteGate {
  Dtype weight_dtype;
  Dtype accumulate;
  int64_t batch, pixels;
  int channels, squeezed;
  const void* pooled;         // (N, C)
  const void* reduce_weight;  // (S, C), weight_dtype
  const void* reduce_bias;    // (S,), weight_dtype, or null
  const void* expand_weight;  // (C, S)
  const void* expand_bias;    // (C,), or null
  Activation activation, gate_activation;
  void* hidden;  // (N, S)
  void* gate;    // (N, C)
};

// One MBConv block: ExpandDepthwise (expand_weight null: the depthwise convolution of the input
// itself), the gate of its sums (reduce_weight null: none), project, residual.
struct MbconvInference {
  Dtype dtype;
  ConvShape shape;  // of the depthwise convolution: C is the expanded width
  int in_channels, out_channels;
  const void* input;          // (N, in_channels, H, W)
  const void* expand_weight;  // (C, in_channels), contiguous, or null
  BatchNorm expand_bn;
  Activation expand_activation;
  const void* weight;  // (C, 1, k, k), contiguous
  BatchNorm bn;
  Activation activation;
  // Of one image: batch is 1, pooled, hidden and gate are the driver's.
  SqueezeExciteGate gate;
  const void* project_weight;  // (K, C), contiguous
  BatchNorm project_bn;
  Activation project_activation;
  bool residual;  // add the input, which has K channels and the output's extent
  void* output;   // (N, K, OH, OW)
};

struct SqueezeExciteGateBackward {
  Dtype weight_dtype;
  Dtype accumulate;
  int64_t batch, pixels;
  int channels, squeezed;
  const void* grad_gate;  // (N, C)
  const void* pooled;
  const void* hidden;
  const void* gate;
  const void* reduce_weight;
  const void* expand_weight;
  Activation activation, gate_activation;
  void* grad_pooled;         // (N, C)
  void* grad_reduce_weight;  // (S, C), weight_dtype
  void* grad_reduce_bias;    // (S,), weight_dtype
  void* grad_expand_weight;  // (C, S)
  void* grad_expand_bias;    // (C,)
};

}  // namespace effnet
