// Between the driver of BN + activation (batch_norm_act.cpp) and its kernels, which are compiled
// once for each instruction set (batch_norm_act_kernels.h).
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace effnet {

// An item is a block of pixels of one image, all channels; items are numbered image * blocks +
// block. Sums are kept for slots, runs of items in order. All of it depends on the shape and the
// instruction set only, and so does every rounding.
struct PixelPlan {
  int64_t pixels;        // of an image
  int64_t block_pixels;  // of an item, but for the last of an image
  int64_t blocks;        // of an image
  int64_t items;
  int64_t slots;
  int64_t padded_channels;  // in whole vectors

  int64_t first_item(int64_t slot) const { return slot * items / slots; }
};

// BN of a channel as the passes apply it, in the accumulate dtype: u = input * scale + shift, and
// the gradient du * scale + constant + slope * (input - mean). Rows of padded_channels.
struct FoldedBatchNorm {
  void *scale, *shift, *mean, *invstd, *constant, *slope;
};
constexpr int64_t kFoldedRows = 6;

// F is the accumulate dtype. Partial sums are rows of padded_channels F, in pairs: the sum, and
// what rounding took from it.
struct BatchNormActKernels {
  int lanes;

  // Per slot the sums of input - origin and of its square, 2 pairs, where origin is the mean of the
  // slot's first pixels, a row of its own after them.
  void (*statistics)(const ChannelStatistics&, const PixelPlan&, int64_t begin, int64_t end,
                     void* partials);
  void (*merge_statistics)(const ChannelStatistics&, const PixelPlan&, const void* partials);

  // All but constant and slope, or those from the gradients of BN's weight and bias over
  // `elements` elements of a channel (zeros where there are none).
  void (*fold)(const BatchNorm&, int channels, const FoldedBatchNorm&);
  void (*fold_gradients)(const void* grad_bn_weight, const void* grad_bn_bias, int64_t elements,
                         int channels, const FoldedBatchNorm&);

  // Items [begin, end). pooled: a pair an item, or null.
  void (*forward)(const BatchNormActForward&, const FoldedBatchNorm&, const PixelPlan&,
                  int64_t begin, int64_t end, void* pooled);
  // Slots [begin, end): 2 pairs each, for the sums of du * (input - mean) and of du.
  void (*sums)(const BatchNormActSums&, const FoldedBatchNorm&, const PixelPlan&, int64_t begin,
               int64_t end, void* partials);
  void (*backward)(const BatchNormActBackward&, const FoldedBatchNorm&, const PixelPlan&,
                   int64_t begin, int64_t end);
  // A pair an item.
  void (*gate)(const BatchNormActGate&, const FoldedBatchNorm&, const PixelPlan&, int64_t begin,
               int64_t end, void* partials);

  // to[g * channels + c] = factor[c] (null: 1) * the sum of group g's `size` pairs, each of which
  // is rows `first` and the next of a run of `rows` rows.
  void (*merge)(void* to, const void* partials, int64_t groups, int64_t size, int64_t rows,
                int64_t first, int channels, const void* factor, const PixelPlan&);
};

constexpr int64_t kStatisticsPartials = 5;
constexpr int64_t kSumsPartials = 4;
constexpr int64_t kPair = 2;

namespace avx512bf16 {
const BatchNormActKernels* batch_norm_act_kernels(Dtype);
}
namespace avx512 {
const BatchNormActKernels* batch_norm_act_kernels(Dtype);
}
namespace avx2 {
const BatchNormActKernels* batch_norm_act_kernels(Dtype);
}
namespace baseline {
const BatchNormActKernels* batch_norm_act_kernels(Dtype);
}

}  // namespace effnet
