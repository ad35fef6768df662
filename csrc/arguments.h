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

}  // namespace effnet
