// The launches of BN + activation on one storage type: for its own op, and for what the depthwise
// op does after its convolution and before the gradients of it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"
#include "launch.cuh"

namespace effnet::cuda {

// Each takes checked arguments; workspaces are allocated beside `like`.
template <class T>
struct BatchNormActLaunches {
  using Tensor = torch::stable::Tensor;

  static void statistics(const Device& device, const ChannelStatistics& a, const Tensor& like);
  static void forward(const Device& device, const BatchNormActForward& a, const Tensor& like);
  static void sums(const Device& device, const BatchNormActSums& a, const Tensor& like);
  static void backward(const Device& device, const BatchNormActBackward& a);
  static void gate(const Device& device, const BatchNormActGate& a, const Tensor& like);
};

// Mean and biased variance, (channels,) float32 each, from the (3, slots, channels) moments of
// blocks; see batch_statistics_kernel.
void merge_moments(const Device& device, const double* moments, int64_t slots, int channels,
                   void* mean, void* var);

}  // namespace effnet::cuda
