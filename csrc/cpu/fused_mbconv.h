// Between the driver of the Fused-MBConv block (fused_mbconv.cpp) and its kernels, which are
// compiled once for each instruction set (fused_mbconv_kernels.h).
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "gemm_format.h"

namespace effnet {

// How a call is cut into items: bands of rows of the output. The rows of the input that are under a
// band are brought first into the format of the product, with the zeros around the image, and so
// every window of a row of the output is k pieces of memory that are one row of the band apart. All
// of it depends on the shape and the instruction set only, and so does every rounding.
struct FusedMbconvPlan {
  bool winograd;  // by winograd.h
  int band_rows;  // of the output, even then; the last band has fewer
  int64_t bands;  // of an image
  // Of the input under a band: values of a pixel, pixels of a row, and rows.
  int pixel, in_columns, in_rows;
  int64_t expand_panels, project_panels;
  int64_t padded_channels;  // the expanded width in whole vectors
  int64_t expanded;         // values between two pixels of the expanded tensor, where it is kept
  int64_t tiles;            // of winograd.h, in a band

  int64_t row() const { return int64_t{in_columns} * pixel; }
};

// A thread's memory: the input under a band and the expanded tensor of a band in the product's
// format, then what is transformed of a band's tiles and what a panel's products with it are.
struct FusedMbconvScratch {
  void *input, *expanded, *windows, *products;
};

// The packed weights of a call: matrices as in gemm.h.
struct FusedMbconvWeights {
  void *expand, *project;
};

// F is the accumulate dtype, T the call's.
struct FusedMbconvKernels {
  GemmFormat format;
  // Panels [begin, end) of both weights, expand's first.
  void (*pack)(const FusedMbconv&, const FusedMbconvPlan&, const FusedMbconvWeights&, int64_t begin,
               int64_t end);
  // Items [begin, end), the bands of one image after those of another. sums: 2 * padded_channels F
  // an item, or null: the sums and what rounding took from them.
  void (*run)(const FusedMbconv&, const FusedMbconvPlan&, const FusedMbconvWeights&, int64_t begin,
              int64_t end, const FusedMbconvScratch&, void* sums);
  // a.pooled from the sums of the items.
  void (*merge)(const FusedMbconv&, const FusedMbconvPlan&, const void* sums);
};

namespace avx512bf16 {
const FusedMbconvKernels* fused_mbconv_kernels(Dtype);
}
namespace avx512 {
const FusedMbconvKernels* fused_mbconv_kernels(Dtype);
}
namespace avx2 {
const FusedMbconvKernels* fused_mbconv_kernels(Dtype);
}
namespace baseline {
const FusedMbconvKernels* fused_mbconv_kernels(Dtype);
}

}  // namespace effnet
