// The launches of MBConv's first half on one storage type: choice of the tile, workspaces. The
// kernel is in mbconv.cuh.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "mbconv.cuh"
#include "mbconv.h"
#include "row_launches.cuh"

namespace effnet::cuda {

// Offsets in shared memory, for an input of `chunks` chunks and tiles whose outputs reach
// `products` pixels that exist; whether the block's memory is at most `most`.
template <class Sizes>
bool fill_layout(ExpandTiling& t, int chunks, int products, int most) {
  const int sums =
      t.images * t.patches_h * t.patches_w * Sizes::kChannels * static_cast<int>(sizeof(float));
  t.weight_stays = chunks <= t.stages;
  t.expand_weight = std::max(t.stages * Sizes::kStageBytes, sums);
  t.tile = t.expand_weight + std::min(chunks, t.stages) * Sizes::kExpandWeightBytes;
  t.pixels = t.tile + t.images * t.expanded_h * t.expanded_w * kExpandedPitch;
  t.constants = align(t.pixels + products * static_cast<int>(sizeof(ExpandPixel)), 16);
  t.weights = t.constants + Sizes::kConstantBytes;
  t.bytes = t.weights + Sizes::kWeightBytes;
  return t.bytes <= most;
}

// The tile that is predicted to be done first, of those that leave room for `resident` blocks on a
// multiprocessor; without stages if there is none.
template <class T, int K, int S>
ExpandTiling expand_tiling(const Device& device, const ExpandDepthwise& a, int resident) {
  using Sizes = ExpandSizes<T, K, S>;
  const ConvShape& s = a.shape;
  const int most = device.shared_bytes(resident);
  const int chunks = static_cast<int>(ceil_div(a.in_channels, kTileDepth<T>));
  const int steps = static_cast<int>(ceil_div(a.in_channels, kStepDepth<T>));
  const int64_t wave = int64_t{device.multiprocessors()} * resident;

  ExpandTiling best{};
  double least = 0.;
  ExpandTiling t{};
  // Along one axis: tiles, patches, pixels that the windows take, pixels of these that exist.
  struct Axis {
    int tiles, patches, expanded, pixels;
  };
  const auto axis = [](int tile, int patch, int out, int in) {
    const int patches = static_cast<int>(ceil_div(std::min(tile, out), patch));
    return Axis{static_cast<int>(ceil_div(out, tile)), patches, (patches * patch - 1) * S + K,
                std::min((std::min(tile, out) - 1) * S + K, in)};
  };
  constexpr int kUnit = 4, kMostTile = 32, kMostImages = 8;
  // All channels that a block has room for, or fewer where multiprocessors would be idle.
  constexpr int kFewestChannels = 16;
  for (int share = Sizes::kChannels; share >= kFewestChannels; share /= 2) {
    t.channel_blocks = static_cast<int>(ceil_div(s.channels, share));
    t.channels = static_cast<int>(ceil_div(ceil_div(s.channels, t.channel_blocks), 16)) * 16;
    for (t.tile_h = kUnit; t.tile_h <= kMostTile; t.tile_h += kUnit) {
      const Axis down = axis(t.tile_h, Sizes::kPatchH, s.out_h, s.in_h);
      t.tiles_h = down.tiles;
      t.patches_h = down.patches;
      t.expanded_h = down.expanded;
      for (t.tile_w = kUnit; t.tile_w <= kMostTile; t.tile_w += kUnit) {
        const Axis across = axis(t.tile_w, kPatchW, s.out_w, s.in_w);
        t.tiles_w = across.tiles;
        t.patches_w = across.patches;
        t.expanded_w = across.expanded;
        const bool several = t.tiles_h * t.tiles_w == 1 && s.in_h <= kMostPixelRows / kMostImages;
        for (t.images = 1; t.images <= (several ? kMostImages : 1); ++t.images) {
          const int products = t.images * down.pixels * across.pixels;
          const int passes = static_cast<int>(ceil_div(products, kPassRows));
          t.stages = std::min(passes * chunks, 2);
          if (!fill_layout<Sizes>(t, chunks, products, most)) break;
          // In instructions of a warp: 14 for a step of the products and its copies and 32 for all
          // of its columns, 50 for a chunk's barrier, 4.5 for each channel of a pass; the
          // multiply-adds of a patch, 3 for each word of its window, 12 for each of its outputs;
          // 700 for a block.
          constexpr int kOutputs = Sizes::kPatchH * kPatchW * Sizes::kLaneChannels;
          constexpr int kWindow = Sizes::kRows * Sizes::kCols;
          const double turns = ceil_div(t.images * t.patches_h * t.patches_w, kExpandWarps);
          const double step = 14. + 32. * t.channels / Sizes::kChannels;
          const double block = passes * (step * steps + 50. * chunks + 4.5 * t.channels) +
                               turns * (K * K * kOutputs + 3 * kWindow + 12 * kOutputs) + 700.;
          const int64_t blocks =
              ceil_div(s.batch, t.images) * t.tiles_h * t.tiles_w * t.channel_blocks;
          const double cost = static_cast<double>(ceil_div(blocks, wave)) * block;
          if (best.stages == 0 || cost < least) {
            least = cost;
            best = t;
            // More stages where they cost nothing.
            best.stages = std::min(passes * chunks, kExpandStages);
            if (!fill_layout<Sizes>(best, chunks, products, most)) best = t;
          }
        }
        if (across.tiles == 1) break;
      }
      if (down.tiles == 1) break;
    }
  }
  return best;
}

template <class T>
void ExpandLaunches<T>::inference(const ExpandDepthwise& a, const Tensor& like) {
  const Device device(like);
  const ConvShape& s = a.shape;
  for_window(s, [&](auto kernel, auto step) {
    using Sizes = ExpandSizes<T, kernel(), step()>;
    ExpandTiling t{};
    for (int resident = Sizes::kBlocks; resident > 0 && t.stages == 0; --resident) {
      t = expand_tiling<T, kernel(), step()>(device, a, resident);
    }
    STD_TORCH_CHECK(t.stages > 0, "expand_depthwise_out: no tile fits the shared memory");
    t.vectors = allows_vectors(a.in_channels, kTileVector<T>, {a.input, a.expand_weight});
    t.output_vectors =
        s.channels % Sizes::kLaneChannels == 0 && reinterpret_cast<uintptr_t>(a.output) % 4 == 0;
    const int64_t tiles = int64_t{t.tiles_h} * t.tiles_w;
    const ImageSums sums(like, static_cast<float*>(a.pooled), s.batch, tiles, s.channels);
    device.launch(expand_depthwise_kernel<T, kernel(), step()>,
                  ceil_div(s.batch, t.images) * tiles * t.channel_blocks, kExpandThreads, t.bytes,
                  a, t, sums.data());
    sums.add_up(device);
  });
}

}  // namespace effnet::cuda
