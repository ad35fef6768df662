// The pointwise convolution's CUDA kernel, as PyTorch calls it: checks, choice of the tile, cutting
// into blocks, launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "../ops.h"
#include "pointwise_conv_split.cuh"
#include "pointwise_expand.cuh"
#include "row_launches.cuh"

namespace effnet::cuda {
namespace {

// The tiles for throughput. Float32's products are three, of operands that each warp splits for
// itself: registers are short.
template <class T>
using NarrowSizes = PointwiseSizes<16, 8, 1, sizeof(T) == 2 ? 3 : 2>;
using WideSizes = PointwiseSizes<32, 4, 2, 2>;

// The tiles for few pixels.
template <class T>
using SmallSizes = SplitSizes<2, sizeof(T) == 2 ? 5 : 4, true>;
template <class T>
using SharedSizes = SplitSizes<4, sizeof(T) == 2 ? 3 : 2, true>;
using ElementSizes = SplitSizes<2, 1, false>;  // for extents that are not aligned

constexpr int kMostRows = 1 << 30;      // that a kernel counts in an int
constexpr int kMostGates = 6144;        // that a block keeps
constexpr int kMostChannels = 1 << 20;  // of a tile whose bytes pointwise_conv_split_kernel counts

// What is common to the candidates. Costs are cycles, measured and counted on an H200.
struct Cut {
  int64_t groups, blocks;
  double cost;

  // Cuts the output into tiles of at most rows x columns, the latter multiples of `unit`.
  template <class T>
  void fill(PointwiseTiling& tiling, const PointwiseInference& a, int rows, int columns, int unit) {
    const bool grouped = a.pooled != nullptr || a.pixels > kMostRows;
    groups = grouped ? a.batch : 1;
    tiling.rows = a.batch * a.pixels / groups;
    tiling.row_tiles = static_cast<int>(ceil_div(tiling.rows, rows));
    tiling.column_tiles = static_cast<int>(ceil_div(a.out_channels, columns));
    tiling.columns = share(a.out_channels, tiling.column_tiles, unit);
    tiling.gate_rows = grouped ? kMostRows : static_cast<int>(a.pixels);
    tiling.vectors =
        allows_vectors(a.in_channels, kTileVector<T>,
                       {a.input, a.weight, a.prologue.scale, a.prologue.shift, a.gate});
    tiling.output_vectors = allows_vectors(a.out_channels, kLaneColumns, {a.output, a.residual});
    blocks = groups * tiling.row_tiles * tiling.column_tiles;
    if (a.gate != nullptr) {
      const int64_t images =
          grouped ? 1 : std::min<int64_t>(a.batch, (rows - 1) / std::max<int64_t>(a.pixels, 1) + 2);
      const bool kept = images * a.in_channels <= kMostGates;
      tiling.gate_images = kept ? static_cast<int>(images) : 0;
    }
  }

  static int share(int columns, int parts, int unit) {
    return static_cast<int>(ceil_div(ceil_div(columns, parts), unit)) * unit;
  }

  static int gate_bytes(const PointwiseTiling& tiling, const PointwiseInference& a) {
    return tiling.gate_images * a.in_channels * static_cast<int>(sizeof(float));
  }
};

template <class T, class Sizes>
struct Staged : Cut {
  StagedTiling tiling{};

  int shared_bytes(const PointwiseInference& a) const {
    return Sizes::shared_bytes(tiling.stages) + gate_bytes(tiling, a);
  }

  Staged(const Device& device, const PointwiseInference& a) {
    fill<T>(tiling, a, Sizes::kRows, Sizes::kColumns, 16);
    tiling.warp_columns = share(tiling.columns, Sizes::kWarpsAcross, 16);
    const int chunks = static_cast<int>(ceil_div(a.in_channels, kTileDepth<T>));
    // Of the multiprocessor that has most to do: the products of a tile, and what brings its rows
    // and columns.
    const int64_t beside = ceil_div(blocks, device.multiprocessors());
    cost = 5000. + .25 * static_cast<double>(beside * chunks) *
                       (Sizes::kRows * tiling.columns + 24 * (Sizes::kRows + tiling.columns));

    // As many stages as there is room for beside as many other blocks as there are, less than two
    // only for a single chunk.
    for (int64_t resident = std::min<int64_t>(Sizes::kBlocks, beside); resident > 0; --resident) {
      tiling.stages = std::min(chunks, kMostStages);
      const auto fits = [&] {
        return shared_bytes(a) <= device.shared_bytes(static_cast<int>(resident));
      };
      while (tiling.stages > std::min(chunks, 2) && !fits()) --tiling.stages;
      if (fits()) break;
    }
  }

  void launch(const Device& device, const PointwiseInference& a, float* sums) const {
    device.launch(pointwise_conv_kernel<T, Sizes>, blocks, Sizes::kThreads, shared_bytes(a), a,
                  tiling, sums);
  }
};

template <class T, class Sizes>
struct Split : Cut {
  SplitTiling tiling{};

  Split(const Device& device, const PointwiseInference& a) {
    for (int log_parts = 0; log_parts <= Sizes::kMostLogParts; ++log_parts) {
      Split next(device, a, log_parts);
      if (log_parts == 0 || next.cost <= cost) *this = next;
    }
  }

  void launch(const Device& device, const PointwiseInference& a, float* sums) const {
    device.launch(pointwise_conv_split_kernel<T, Sizes>, blocks, Sizes::kThreads,
                  Sizes::template kSharedBytes<T> + gate_bytes(tiling, a), a, tiling, sums);
  }

 private:
  Split(const Device& device, const PointwiseInference& a, int log_parts) {
    const int rows = Sizes::rows(log_parts);
    fill<T>(tiling, a, rows, Sizes::kColumns, 8);
    tiling.log_parts = log_parts;
    // The latencies of the block and of what a warp reads, one after another; 32 bytes a cycle of
    // what the multiprocessor that has most to do reads; a second launch for sums of several tiles.
    const int64_t loads =
        ceil_div(ceil_div(a.in_channels, 2 * kStepDepth<T>), int64_t{Sizes::kAhead} << log_parts);
    const int64_t beside = ceil_div(blocks, device.multiprocessors());
    const double bytes = static_cast<double>(beside) * (rows + tiling.columns) * a.in_channels *
                         static_cast<int>(sizeof(T));
    const bool second = a.pooled != nullptr && tiling.row_tiles > 1;
    cost = 3000. + static_cast<double>(ceil_div(beside, Sizes::kBlocks) * (1500 + 800 * loads)) +
           bytes / 32 + (second ? 2500. : 0.);
  }
};

// The tiling of pointwise_expand_kernel: as few columns in vain as can be, and as many blocks on a
// multiprocessor.
WideTiling wide_tiling(const Device& device, const PointwiseInference& a) {
  WideTiling best{};
  double least = 0.;
  for (int blocks = 1; blocks <= ceil_div(a.out_channels, kWideColumns); ++blocks) {
    WideTiling t{};
    t.rows = a.batch * a.pixels;
    t.row_tiles = static_cast<int>(ceil_div(t.rows, kWideRows));
    t.vectors = a.in_channels / 8;
    t.steps = static_cast<int>(ceil_div(a.in_channels, 16));
    t.pitch = (2 * t.steps + 1) * 16;
    t.columns =
        static_cast<int>(ceil_div(ceil_div(a.out_channels, blocks), kWideColumns)) * kWideColumns;
    t.column_blocks = static_cast<int>(ceil_div(a.out_channels, t.columns));
    int resident = kWideBlocks;
    while (resident > 1 && t.shared_bytes() > device.shared_bytes(resident)) --resident;
    if (t.shared_bytes() > device.shared_bytes(1)) continue;
    // A block's rows come from L2, and fewer warps hide less.
    constexpr double kOfFewWarps[] = {3., 1.6, 1.2, 1.};
    const double cost = static_cast<double>(t.column_blocks) *
                        (t.columns + a.in_channels / 8. + 8.) * kOfFewWarps[resident - 1];
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
         a.pooled == nullptr && a.in_channels <= kWideMostChannels &&
         a.out_channels > a.in_channels && a.batch * a.pixels >= 240 * device.multiprocessors() &&
         a.batch * a.pixels <= int64_t{kMostRows} * kWideRows &&
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
        const WideTiling tiling = wide_tiling(device, a);
        const int64_t blocks = int64_t{tiling.row_blocks} * tiling.column_blocks;
        return device.launch(pointwise_expand_kernel<T>, blocks, kWideThreads,
                             tiling.shared_bytes(), a, tiling);
      }
    }
    const auto launch = [&](const auto& c) {
      const ImageSums sums(input, static_cast<float*>(a.pooled), a.batch, c.tiling.row_tiles,
                           a.out_channels);
      c.launch(device, a, sums.data());
      sums.add_up(device);
    };
    const Staged<T, NarrowSizes<T>> narrow(device, a);
    double cost = narrow.cost;
    if constexpr (sizeof(T) == 2) cost = std::min(cost, Staged<T, WideSizes>(device, a).cost);
    // Where the large tiles do not fill the device once.
    if (narrow.blocks <= device.multiprocessors() && a.in_channels <= kMostChannels &&
        a.prologue.scale == nullptr) {
      const auto split = [&](const auto& c) {
        if (c.cost >= cost) return false;
        launch(c);
        return true;
      };
      if (narrow.tiling.vectors && narrow.tiling.output_vectors) {
        const Split<T, SmallSizes<T>> small(device, a);
        const Split<T, SharedSizes<T>> shared(device, a);
        if (shared.cost < small.cost ? split(shared) : split(small)) return;
      } else if (split(Split<T, ElementSizes>(device, a))) {
        return;
      }
    }
    if constexpr (sizeof(T) == 2) {
      const Staged<T, WideSizes> wide(device, a);
      if (wide.cost < narrow.cost) return launch(wide);
    }
    launch(narrow);
  });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("pointwise_conv_bn_act_out", TORCH_BOX(&effnet::cuda::pointwise_conv_bn_act_out));
}
