// The launches of the Fused-MBConv block on one storage type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"

namespace effnet::cuda {

// Compiled in a file a type, fused_mbconv_<type>.cu, as the depthwise op's are.
template <class T>
struct FusedLaunches {
  static void inference(const FusedMbconv& a, const torch::stable::Tensor& like);
};

}  // namespace effnet::cuda
