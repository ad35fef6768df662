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
  DepthwiseShape shape;
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
  DepthwiseShape shape;
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
  void* output;
  void* pooled;
};

struct DepthwiseBackward {
  Dtype dtype;
  DepthwiseShape shape;
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
