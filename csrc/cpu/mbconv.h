// Between the driver of the MBConv block (mbconv.cpp) and its kernels, which are compiled once for
// each instruction set (mbconv_kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"
#include "depthwise_conv_bn_act.h"
#include "gemm_format.h"

namespace effnet {

// How an image goes through the block. The expanded tensor is made and used block of channels after
// block: `group_rows` of its rows at a time are computed into a ring of `ring_rows` rows, from
// which the depthwise convolution takes its windows. Where blocks are few they are cut into bands
// of rows, each with sums of its own. Nothing else that is rounded depends on any of these.
struct MbconvPlan {
  DepthwisePlan depthwise;  // lanes, vectors, group, blocks and tile
  int band_rows;            // of the depthwise result
  int64_t bands;            // items are [band][block]
  int group_rows, ring_rows;
  // Whether the input is brought first into the format of the product that reads it, or where there
  // is no expansion into the accumulate dtype; and values between two of its pixels then.
  bool converted;
  int64_t input_stride;
  int64_t expand_panels, project_panels;
  int64_t project_rows;  // rows that are projected together
  // Whether the gate is multiplied into project's weight, an image at a time, or into its rows.
  bool gate_weights;

  int64_t padded_channels() const { return depthwise.padded_channels(); }
};

// The packed weights of a call: matrices as in gemm.h, and in the accumulate dtype the depthwise
// taps, [vector][k * k][lane], with what their sums start with; the gate's as in squeeze_excite.h.
struct MbconvWeights {
  void* expand;
  void *depthwise, *depthwise_start;
  void* gate;
  void* project;
};

// Of one image each: arguments whose input and output are that image's. F is the accumulate dtype,
// T the call's.
struct MbconvKernels {
  GemmFormat format;
  // Blocks [begin, end) of expand and depthwise; scratch: 8 * padded_channels F.
  void (*pack_block)(const MbconvInference&, const MbconvPlan&, const MbconvWeights&, int64_t begin,
                     int64_t end, void* scratch);
  // Panels [begin, end) of project.
  void (*pack_project)(const MbconvInference&, const MbconvWeights&, int64_t begin, int64_t end);
  // Pixels [begin, end) of the image converted, plan.input_stride apart.
  void (*convert)(const MbconvInference&, const MbconvPlan&, int64_t begin, int64_t end, void* to);
  // Items [begin, end) of one image: input (pixels, input_stride) -> depthwise (pixels, C) T, and
  // each band's sums (2, padded_channels) F, what rounding took from them the second, unless null.
  // scratch: ring_bytes.
  void (*expand_depthwise)(const MbconvInference&, const MbconvPlan&, const MbconvWeights&,
                           const void* input, int64_t begin, int64_t end, void* scratch,
                           void* depthwise, void* sums);
  size_t (*ring_bytes)(const MbconvInference&, const MbconvPlan&);
  // pooled (C) F = the sums of all bands.
  void (*merge)(const MbconvInference&, const MbconvPlan&, const void* sums, void* pooled);
  // to = panels [begin, end) of project with every channel times its gate. Only where T is F.
  void (*gate_panels)(const MbconvInference&, const MbconvWeights&, const void* gate, int64_t begin,
                      int64_t end, void* to);
  // Pixels [row, row + rows) of depthwise times panels [begin, end) of project, or where it is not
  // null of `gated`, to the output. gate: (C) F, multiplied into the rows, or null.
  // scratch: `rows` rows.
  void (*project)(const MbconvInference&, const MbconvWeights&, const void* gated,
                  const void* depthwise, const void* gate, int64_t row, int64_t rows, int64_t begin,
                  int64_t end, void* scratch);
};

namespace avx512bf16 {
const MbconvKernels* mbconv_kernels(Dtype);
}
namespace avx512 {
const MbconvKernels* mbconv_kernels(Dtype);
}
namespace avx2 {
const MbconvKernels* mbconv_kernels(Dtype);
}
namespace baseline {
const MbconvKernels* mbconv_kernels(Dtype);
}

}  // namespace effnet
