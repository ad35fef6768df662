// The pointwise convolution's CUDA kernel, as PyTorch calls it: checks, choice of the tile, cutting
// into blocks, launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "../ops.h"
#include "pointwise_conv_bn_act.cuh"
#include "pointwise_expand.cuh"
#include "row_launches.cuh"

namespace effnet::cuda {
namespace {

// The tiles: of 128 rows for throughput, of 64 where there would be too few blocks for the device.
// Float32's products are three, of operands that each warp splits for itself: registers are short.
template <class T>
using NarrowSizes = PointwiseSizes<16, 8, 1, sizeof(T) == 2 ? 3 : 2>;
template <class T>
using SmallSizes = PointwiseSizes<16, 4, 1, sizeof(T) == 2 ? 6 : 4>;
using WideSizes = PointwiseSizes<32, 4, 2, 2>;

constexpr int kMostRows = 1 << 30;  // that a kernel counts in an int
constexpr int kMostGates = 6144;    // that a block keeps

template <class T, class Sizes>
struct Candidate {
  PointwiseTiling tiling{};
  int64_t groups, blocks;
  double cost;

  int shared_bytes(const PointwiseInference& a) const {
    return Sizes::shared_bytes(tiling.stages) +
           tiling.gate_images * a.in_channels * static_cast<int>(sizeof(float));
  }

  Candidate(const Device& device, const PointwiseInference& a) {
    const bool grouped = a.pooled != nullptr || a.pixels > kMostRows;
    groups = grouped ? a.batch : 1;
    tiling.rows = a.batch * a.pixels / groups;
    tiling.row_tiles = static_cast<int>(ceil_div(tiling.rows, Sizes::kRows));
    tiling.column_tiles = static_cast<int>(ceil_div(a.out_channels, Sizes::kColumns));
    const auto share = [](int columns, int parts) {
      return static_cast<int>(ceil_div(ceil_div(columns, parts), 16)) * 16;
    };
    tiling.columns = share(a.out_channels, tiling.column_tiles);
    tiling.warp_columns = share(tiling.columns, Sizes::kWarpsAcross);
    tiling.gate_rows = grouped ? kMostRows : static_cast<int>(a.pixels);
    tiling.vectors =
        allows_vectors(a.in_channels, kTileVector<T>,
                       {a.input, a.weight, a.prologue.scale, a.prologue.shift, a.gate});
    tiling.output_vectors = allows_vectors(a.out_channels, kLaneColumns, {a.output, a.residual});
    blocks = groups * tiling.row_tiles * tiling.column_tiles;
    // Of the multiprocessor that has most to do: the products of a tile, and what brings its rows
    // and columns.
    cost = static_cast<double>(ceil_div(blocks, device.multiprocessors())) *
           (Sizes::kRows * tiling.columns + 24 * (Sizes::kRows + tiling.columns));

    if (a.gate != nullptr) {
      const int64_t images =
          grouped
              ? 1
              : std::min<int64_t>(a.batch, (Sizes::kRows - 1) / std::max<int64_t>(a.pixels, 1) + 2);
      const bool kept = images * a.in_channels <= kMostGates;
      tiling.gate_images = kept ? static_cast<int>(images) : 0;
    }
    // As many stages as there is room for beside as many other blocks as there are, less than two
    // only for a single chunk.
    const int chunks = static_cast<int>(ceil_div(a.in_channels, kTileDepth<T>));
    const int64_t beside = ceil_div(blocks, device.multiprocessors());
    for (int64_t resident = std::min<int64_t>(Sizes::kBlocks, beside); resident > 0; --resident) {
      tiling.stages = std::min(chunks, kMostStages);
      const auto fits = [&] {
        return shared_bytes(a) <= device.shared_bytes(static_cast<int>(resident));
      };
      while (tiling.stages > std::min(chunks, 2) && !fits()) --tiling.stages;
      if (fits()) break;
    }
  }
};

template <class T, class Sizes>
void launch(const Device& device, const PointwiseInference& a, const Candidate<T, Sizes>& c,
            const Tensor& like) {
  const ImageSums pooled(like, static_cast<float*>(a.pooled), a.batch, c.tiling.row_tiles,
                         a.out_channels);
  device.launch(pointwise_conv_kernel<T, Sizes>, c.blocks, Sizes::kThreads, c.shared_bytes(a), a,
                c.tiling, pooled.data());
  pooled.add_up(device);
}

// The tiling of pointwise_expand_kernel: as few columns in vain as can be, and as many blocks on a
// multiprocessor.
ExpandTiling expand_tiling(const Device& device, const PointwiseInference& a) {
  ExpandTiling best{};
  double least = 0.;
  for (int blocks = 1; blocks <= ceil_div(a.out_channels, kExpandColumns); ++blocks) {
    ExpandTiling t{};
    t.rows = a.batch * a.pixels;
    t.row_tiles = static_cast<int>(ceil_div(t.rows, kExpandRows));
    t.vectors = a.in_channels / 8;
    t.steps = static_cast<int>(ceil_div(a.in_channels, 16));
    t.pitch = (2 * t.steps + 1) * 16;
    t.columns = static_cast<int>(ceil_div(ceil_div(a.out_channels, blocks), kExpandColumns)) *
                kExpandColumns;
    t.column_blocks = static_cast<int>(ceil_div(a.out_channels, t.columns));
    int resident = kExpandBlocks;
    while (resident > 1 && t.shared_bytes() > device.shared_bytes(resident)) --resident;
    if (t.shared_bytes() > device.shared_bytes(1)) continue;
    // A block's rows come from L2, and fewer warps hide less.
    const double cost = static_cast<double>(t.column_blocks) *
                        (t.columns + a.in_channels / 8. + 8.) *
                        (1. + 0.15 * (kExpandBlocks - resident));
    if (best.columns != 0 && cost >= least) continue;
    least = cost;
    best = t;
    best.row_blocks = static_cast<int>(std::min<int64_t>(
        t.row_tiles, ceil_div(device.multiprocessors() * resident, t.column_blocks)));
  }
  return best;
}

// Whether pointwise_expand_kernel takes a call, and there is enough of it for the device.
bool expands(const Device& device, const PointwiseInference& a) {
  return a.gate == nullptr && a.prologue.scale == nullptr && a.residual == nullptr &&
         a.pooled == nullptr && a.in_channels <= kExpandMostChannels &&
         a.out_channels > a.in_channels &&
         a.batch * a.pixels >= 2 * kExpandRows * device.multiprocessors() &&
         a.batch * a.pixels <= int64_t{kMostRows} * kExpandRows &&
         allows_vectors(a.in_channels, 8, {a.input, a.weight}) &&
         allows_vectors(a.out_channels, 8, {a.output});
}

void pointwise_conv_bn_act_out(Tensor input, Tensor weight, Tensor mean, Tensor var,
                               OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                               int64_t activation, OptionalTensor prologue_scale,
                               OptionalTensor prologue_shift, int64_t prologue_activation,
                               OptionalTensor gate, OptionalTensor residual, bool allow_tf32,
                               Tensor output, OptionalTensor pooled) {
  const PointwiseInference a = check_pointwise_inference(
      input, weight, mean, var, bn_weight, bn_bias, eps, activation, prologue_scale, prologue_shift,
      prologue_activation, gate, residual, allow_tf32, output, pooled);
  for_type("pointwise_conv_bn_act_out", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Device device(input);
    if constexpr (sizeof(T) == 2) {
      if (expands(device, a)) {
        const ExpandTiling tiling = expand_tiling(device, a);
        const int64_t blocks = int64_t{tiling.row_blocks} * tiling.column_blocks;
        return device.launch(pointwise_expand_kernel<T>, blocks, kExpandThreads,
                             tiling.shared_bytes(), a, tiling);
      }
    }
    const Candidate<T, NarrowSizes<T>> narrow(device, a);
    const Candidate<T, SmallSizes<T>> small(device, a);
    if constexpr (sizeof(T) == 2) {
      const Candidate<T, WideSizes> wide(device, a);
      if (wide.cost < std::min(narrow.cost, small.cost)) return launch(device, a, wide, input);
    }
    if (small.cost < narrow.cost) return launch(device, a, small, input);
    launch(device, a, narrow, input);
  });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("pointwise_conv_bn_act_out", TORCH_BOX(&effnet::cuda::pointwise_conv_bn_act_out));
}
