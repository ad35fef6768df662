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

// F is the accumulate dtype. Partial sums are rows of padded_channels F, in pairs: the sum, and
// what rounding took from it.
struct BatchNormActKernels {
  int lanes;

  // Per slot the sums of input - origin and of its square, 2 pairs, where origin is the slot's
  // first pixel, a row of its own after them.
  void (*statistics)(const ChannelStatistics&, const PixelPlan&, int64_t begin, int64_t end,
                     void* partials);
  void (*merge_statistics)(const ChannelStatistics&, const PixelPlan&, const void* partials);

  // Items [begin, end). pooled: a pair an item, or null.
  void (*forward)(const AffineActForward&, const PixelPlan&, int64_t begin, int64_t end,
                  void* pooled);
  // Slots [begin, end): 2 pairs each, for grad_scale and grad_shift.
  void (*sums)(const AffineActSums&, const PixelPlan&, int64_t begin, int64_t end, void* partials);
  void (*backward)(const AffineActBackward&, const PixelPlan&, int64_t begin, int64_t end);
  // A pair an item.
  void (*gate)(const AffineActGate&, const PixelPlan&, int64_t begin, int64_t end, void* partials);

  // to[i * stride + c] = sum over the rows r of group i of pair r, whose first row is row
  // first + r * rows: `groups` groups of `size` rows.
  void (*merge)(void* to, const void* partials, int64_t groups, int64_t size, int64_t rows,
                int64_t first, int channels, const PixelPlan&);
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
