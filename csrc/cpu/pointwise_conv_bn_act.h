// Between the driver of the pointwise op (pointwise_conv_bn_act.cpp) and its kernels, which are
// compiled once for each instruction set (pointwise_conv_bn_act_kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"
#include "gemm_format.h"

namespace effnet {

// How a call is cut into items: blocks of rows (pixels, of one image where images differ in a gate
// or have sums of their own, else of all of them), each times a group of panels of the packed
// weight. Items are numbered (image * row_blocks + row block) * groups + group. All of it depends
// on the shape and the instruction set only, and so does every rounding.
struct PointwisePlan {
  int panel;  // output channels of one, but for the last
  int64_t panels;
  int64_t padded_channels;  // output channels in whole vectors
  int64_t images, rows;     // rows of an image
  int64_t block_rows, row_blocks;
  int64_t group_panels, groups;
  bool converted;  // rows go through the prologue, the gate or a conversion first

  int64_t items() const { return images * row_blocks * groups; }
  // Sums that are merged in the end: one row of padded_channels a block of rows.
  int64_t slots() const { return images * row_blocks; }
};

// F is the accumulate dtype.
struct PointwiseKernels {
  GemmFormat format;
  // Panels [begin, end) of the weight into `matrix`.
  void (*pack)(const PointwiseInference&, int64_t begin, int64_t end, void* matrix);
  // Items [begin, end). scratch: block_rows rows. sums: 2 rows a slot, or null: the sums and what
  // rounding took from them.
  void (*multiply)(const PointwiseInference&, const PointwisePlan&, const void* matrix,
                   int64_t begin, int64_t end, void* scratch, void* sums);
  // a.pooled from the sums of the slots.
  void (*merge)(const PointwiseInference&, const PointwisePlan&, const void* sums);
};

namespace avx512bf16 {
const PointwiseKernels* pointwise_kernels(Dtype);
}
namespace avx512 {
const PointwiseKernels* pointwise_kernels(Dtype);
}
namespace avx2 {
const PointwiseKernels* pointwise_kernels(Dtype);
}
namespace baseline {
const PointwiseKernels* pointwise_kernels(Dtype);
}

}  // namespace effnet
