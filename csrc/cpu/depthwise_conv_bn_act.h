// Between the driver of the depthwise op (depthwise_conv_bn_act.cpp) and its kernels, which are
// compiled once for each instruction set (depthwise_conv_bn_act_kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "../arguments.h"

namespace effnet {

// How a call is cut into items. Channels are taken in vectors of `lanes`, vectors in blocks: as
// equal as they can be where groups of `group` vectors stay together, with those that make no group
// in the last one. Each image is cut into bands of output rows and strips of output columns, and
// these units, in the order (image, band, strip), are grouped into slots. An item is one block of
// one slot; items are numbered slot * blocks + block. All of it depends on the shape and the
// instruction set only, never on the number of threads, and so does every rounding.
struct DepthwisePlan {
  int lanes;
  int vectors;
  int group;
  int blocks;
  int bands, band_rows;
  int strips, strip_cols;
  int64_t slots;
  int tile;       // output columns computed together
  int grad_tile;  // the same for columns of the input's gradient
  bool prefetch;  // the tensors are larger than what a cache keeps

  // The first vector of a block, or what follows the last block's.
  int block_begin(int block) const {
    return block == blocks ? vectors : block * (vectors / group) / blocks * group;
  }
  // Of the last block, the largest one.
  int block_vectors() const { return vectors - block_begin(blocks - 1); }
  int64_t units(const ConvShape& s) const { return s.batch * bands * strips; }
  int padded_channels() const { return vectors * lanes; }
};

// The tile that computes the fewest columns beyond the last, the largest of those. It is a multiple
// of `multiple`.
inline int best_depthwise_tile(int columns, int multiple = 1) {
  const auto computed = [&](int tile) { return (columns + tile - 1) / tile * tile; };
  int best = 8;
  for (const int tile : {7, 4}) {
    if (tile % multiple == 0 && computed(tile) < computed(best)) best = tile;
  }
  return best;
}

// Work on items [begin, end). `scratch` is this thread's. The partial results of slot i, `rows`
// values a channel, are at partials + i * rows * padded_channels, in the accumulate dtype.
struct DepthwiseKernels {
  int lanes;
  int registers;
  size_t accumulator_size;

  // pooled: one row of `channels` values a unit, or null.
  void (*inference)(const DepthwiseInference&, const DepthwisePlan&, int64_t begin, int64_t end,
                    void* scratch, void* pooled);

  // The convolution, and with batch statistics per slot (sum of conv, what rounding took from it,
  // sum of squared deviations from the mean).
  void (*convolve)(const DepthwiseTraining&, const DepthwisePlan&, int64_t begin, int64_t end,
                   void* scratch, void* partials);
  // The statistics of a block from those of its slots.
  void (*merge_statistics)(const DepthwiseTraining&, const DepthwisePlan&, int block,
                           const void* partials);
  void (*normalize)(const DepthwiseTraining&, const DepthwisePlan&, int64_t begin, int64_t end,
                    void* scratch, void* pooled);

  // Per slot the sums of du and du * (conv - mean).
  void (*reduce)(const DepthwiseBackward&, const DepthwisePlan&, int64_t begin, int64_t end,
                 void* scratch, void* partials);
  // grad_bn_bias and grad_bn_weight of a block.
  void (*merge_bn_gradients)(const DepthwiseBackward&, const DepthwisePlan&, int block,
                             const void* partials);
  // grad_input, and per slot the sums for grad_weight (k * k) and for the prologue (2).
  void (*gradients)(const DepthwiseBackward&, const DepthwisePlan&, int64_t begin, int64_t end,
                    void* scratch, void* partials);
  void (*merge_gradients)(const DepthwiseBackward&, const DepthwisePlan&, int block,
                          const void* partials);
  // Bytes of scratch that one thread needs, at most, for any of the above.
  size_t (*scratch_bytes)(const ConvShape&, const DepthwisePlan&);
};

constexpr int kStatisticsRows = 3;
constexpr int kBnGradientRows = 2;
constexpr int gradient_rows(int kernel) { return kernel * kernel + 2; }

// One for each instruction set; null where it has no kernels for that dtype.
namespace avx512bf16 {
const DepthwiseKernels* depthwise_kernels(Dtype);
}
namespace avx512 {
const DepthwiseKernels* depthwise_kernels(Dtype);
}
namespace avx2 {
const DepthwiseKernels* depthwise_kernels(Dtype);
}
namespace baseline {
const DepthwiseKernels* depthwise_kernels(Dtype);
}

}  // namespace effnet
