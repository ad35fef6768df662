// The geometry of a k x k convolution, shared by host and device code.
#pragma once

#include <cstdint>

namespace effnet {

// Dense channels-last tensors: element (n, c, h, w) of an N x C x H x W tensor is at
// ((n * H + h) * W + w) * C + c. Offsets are 64-bit: a tensor may have more than 2^31 elements.
struct ConvShape {
  int64_t batch;
  int channels;  // of the output; a depthwise convolution's input has as many
  int in_h, in_w;
  int out_h, out_w;
  int kernel;  // 3, 5 or 7
  int stride;  // 1 or 2
  // Zeros before the first row and column. Those after the last follow from out_h and out_w, so
  // symmetric and TensorFlow "same" (asymmetric) padding are one case.
  int pad_top, pad_left;
};

}  // namespace effnet
