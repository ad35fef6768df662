// The launches of MBConv's first half on one storage type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"

namespace effnet::cuda {

// Compiled in a file a type, mbconv_<type>.cu, as the depthwise op's are.
template <class T>
struct ExpandLaunches {
  static void inference(const ExpandDepthwise& a, const torch::stable::Tensor& like);
};

}  // namespace effnet::cuda
