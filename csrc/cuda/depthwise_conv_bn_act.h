// The launches of the depthwise op on one storage type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"

namespace effnet::cuda {

// Compiled in a file a type, depthwise_conv_bn_act_<type>.cu, so that the compiler works on all of
// them at a time. Each takes checked arguments; workspaces are allocated beside `like`.
template <class T>
struct DepthwiseLaunches {
  static void inference(const DepthwiseInference& a, const torch::stable::Tensor& like);
  static void training(const DepthwiseTraining& a, const torch::stable::Tensor& like);
  static void backward(const DepthwiseBackward& a, const torch::stable::Tensor& like);
};

}  // namespace effnet::cuda
