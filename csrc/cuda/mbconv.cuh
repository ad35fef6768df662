// The first half of MBConv in one launch: expand (1x1) and depthwise convolution of channels-last
// images, each with BN and activation, and the sums for squeeze-and-excitation. The expanded
// tensor, about six times as wide as the input, exists in shared memory only.
//
// Block. 128 bytes of expanded channels (64 of 16 bits, 32 of float32) of a tile of the output: a
// rectangle of one image, or some whole images where they are small. Two phases:
//
//     expand     The pixels that the tile's filters reach and that exist are the rows of a matrix
//                product with the channels' weights (gemm.cuh), 128 rows a pass, all of the input's
//                channels in chunks. The results go through BN and activation, are rounded to T and
//                written to their places in the expanded tile, whose other pixels, the padding, are
//                zero.
//     depthwise  A warp takes patches of 4 / S x 4 outputs. A lane has one word of a pixel, two
//                16-bit channels or one float32, and their weights in registers: the warp reads and
//                writes the 128 contiguous bytes of a pixel at a time. Rows of the window that the
//                outputs of a patch share are read once.
//
// Neighbouring tiles compute the expanded pixels between them both: 1.56 times as many pixels as
// there are with tiles of 8 x 8 and k = 3, 1.27 times with 16 x 16, none twice where a tile is an
// image. The launcher weighs that against what fits.
//
// Blocks of the same tile follow each other in the grid: x comes from DRAM once, and from the L2
// cache after that. Traffic: x read, d written.
#pragma once

#include "gemm.cuh"

namespace effnet::cuda {

constexpr int kExpandWarps = 8;
constexpr int kExpandThreads = 32 * kExpandWarps;
constexpr int kPassRows = kExpandWarps * kFragmentRows;
constexpr int kExpandStages = 3;  // at most
// From pixel to pixel of the expanded tile: the eight rows of pixels that a warp writes a fragment
// to are on different banks.
constexpr int kExpandedPitch = kTileRowBytes + 16;

// The depthwise convolution's multiply-adds: a thread's outputs are a patch, kPatchH x kPatchW
// pixels of a few channels, and read a window of the input row by row.
constexpr int kPatchW = 4;

// Adds the products of a window's row `row`, x[column][channel], with w[tap][channel] to the sums
// of the patch that they belong to, (kPatchH, kPatchW, L).
template <int K, int S, int kPatchH, int L, int kCols>
EFFNET_DEVICE void multiply_row(Floats<kPatchH * kPatchW * L>& acc, const Floats<L> (&x)[kCols],
                                const float (&w)[K * K][L], int row) {
  static_assert(kCols == (kPatchW - 1) * S + K);
#pragma unroll
  for (int r = 0; r < kPatchH; ++r) {
    const int i = row - r * S;
    if (i < 0 || i >= K) continue;
#pragma unroll
    for (int p = 0; p < kPatchW; ++p) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int l = 0; l < L; ++l) {
          float& sum = acc[(r * kPatchW + p) * L + l];
          sum = fmaf(x[p * S + j][l], w[i * K + j][l], sum);
        }
      }
    }
  }
}

// What type, kernel size and stride fix.
template <class T, int K, int S>
struct ExpandSizes {
  static constexpr int kLaneChannels = 4 / static_cast<int>(sizeof(T));
  static constexpr int kChannels = 32 * kLaneChannels;  // of a block
  static_assert(kChannels == kTileDepth<T>);
  static constexpr int kPatchH = 4 / S;
  static constexpr int kRows = (kPatchH - 1) * S + K;  // of a patch's window
  static constexpr int kCols = (kPatchW - 1) * S + K;
  static constexpr int kStageBytes = kPassRows * kTileRowBytes;
  static constexpr int kExpandWeightBytes = kChannels * kTileRowBytes;
  static constexpr int kWeightBytes = K * K * kTileRowBytes;
  static constexpr int kConstantBytes = 4 * kChannels * static_cast<int>(sizeof(float));
  // Blocks on a multiprocessor: 49 weights of two channels take most registers that there are.
  static constexpr int kBlocks = K == 7 && kLaneChannels == 2 ? 1 : 2;
};

// How the output is cut into tiles. Block index: channel block fastest, then tile across, tile
// down, group of images.
struct ExpandTiling {
  int channel_blocks;
  int channels;                // of a block, a multiple of 16
  int tile_h, tile_w;          // outputs
  int tiles_h, tiles_w;        // of an image
  int images;                  // of a tile; more than one where it is a whole image
  int patches_h, patches_w;    // of an image's part of a tile
  int expanded_h, expanded_w;  // pixels that the windows of these patches take
  int stages;
  bool weight_stays;  // the expand weight has room for all its chunks
  // Offsets in shared memory, in bytes, and its size.
  int expand_weight, tile, pixels, constants, weights, bytes;
  bool vectors;         // x and the expand weight can be read in 16 bytes
  bool output_vectors;  // an output pixel's words can be written as such
};

// A pixel of the matrix product: {row << 16 | column from the block's first, place in the tile}.
using ExpandPixel = int2;
constexpr int kMostPixelRows = 1 << 15;

// expanded = activate_e(bn_e(sum_c expand_weight[channel, c] * x[pixel, c])), rounded to T,
// d[n, oh, ow] = activate(bn(sum_ij expanded[n, oh * S + i - pad_top, ow * S + j - pad_left]
//                            * weight[i, j])), of each channel,
// pooled[n, tile, channel] = the sums of the tile's outputs before they are rounded, if not null.
//
// Shared memory (ExpandTiling has the offsets):
//     stages         a chunk of x each; after the products, the patches' sums
//     expand_weight  a chunk each: all of them, or as many as there are stages
//     tile           (images, expanded_h, expanded_w) pixels of kExpandedPitch bytes
//     pixels         ExpandPixel of each row of the product
//     constants      scale and shift of the expansion's BN, then of the other's
//     weights        [tap][channel] of the depthwise convolution
template <class T, int K, int S>
__global__ void __launch_bounds__(kExpandThreads, (ExpandSizes<T, K, S>::kBlocks))
    expand_depthwise_kernel(const __grid_constant__ ExpandDepthwise a,
                            const __grid_constant__ ExpandTiling tiling, float* pooled) {
  using Sizes = ExpandSizes<T, K, S>;
  constexpr int L = Sizes::kLaneChannels;
  const ConvShape& shape = a.shape;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  int block = blockIdx.x;
  const int first_channel = block % tiling.channel_blocks * tiling.channels;
  const int channels = min(shape.channels - first_channel, tiling.channels);
  block /= tiling.channel_blocks;
  const int tile_index = block % (tiling.tiles_h * tiling.tiles_w);
  const int64_t first_n = int64_t{block / (tiling.tiles_h * tiling.tiles_w)} * tiling.images;
  const int images = static_cast<int>(min(shape.batch - first_n, int64_t{tiling.images}));
  const int first_oh = tile_index / tiling.tiles_w * tiling.tile_h;
  const int first_ow = tile_index % tiling.tiles_w * tiling.tile_w;
  const int tile_h = min(shape.out_h - first_oh, tiling.tile_h);
  const int tile_w = min(shape.out_w - first_ow, tiling.tile_w);
  const int patches = tiling.patches_h * tiling.patches_w;

  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  char* const tile = shared + tiling.tile;
  ExpandPixel* const pixels = reinterpret_cast<ExpandPixel*>(shared + tiling.pixels);
  float* const constants = reinterpret_cast<float*>(shared + tiling.constants);
  T* const weights = reinterpret_cast<T*>(shared + tiling.weights);

  // The input pixels that the tile's outputs reach and that exist: rows first_h ... of the image.
  const int window_h = first_oh * S - shape.pad_top, window_w = first_ow * S - shape.pad_left;
  const int first_h = max(window_h, 0), first_w = max(window_w, 0);
  const int rows = max(min(window_h + (tile_h - 1) * S + K, shape.in_h) - first_h, 0);
  const int columns = max(min(window_w + (tile_w - 1) * S + K, shape.in_w) - first_w, 0);
  const int products = images * rows * columns;

  // What comes from memory is on its way while the tile's pixels are found.
  constexpr int kTaps = (Sizes::kChannels * K * K + kExpandThreads - 1) / kExpandThreads;
  T taps[kTaps];
  {
    const T* const from = static_cast<const T*>(a.weight) + int64_t{first_channel} * K * K;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * kExpandThreads;
      if (i < channels * K * K) taps[j] = from[i];
    }
  }
  const int expanded = images * tiling.expanded_h * tiling.expanded_w;
  for (int i = threadIdx.x; i < expanded; i += kExpandThreads) {
    const int row_of_all = i / tiling.expanded_w;
    const int image = row_of_all / tiling.expanded_h;
    const int row = row_of_all - image * tiling.expanded_h + window_h - first_h;
    const int column = i - row_of_all * tiling.expanded_w + window_w - first_w;
    if (row >= 0 && row < rows && column >= 0 && column < columns) {
      pixels[(image * rows + row) * columns + column] = {(image * shape.in_h + row) << 16 | column,
                                                         i};
      continue;
    }
    for (int v = 0; v < kTileVectors; ++v) {
      *reinterpret_cast<int4*>(tile + i * kExpandedPitch + v * 16) = int4{0, 0, 0, 0};
    }
  }
  if (warp < Sizes::kChannels / kNormChannels) {
    const int of_block = warp * kNormChannels + lane % kNormChannels;
    const int channel = first_channel + min(of_block, channels - 1);
    const float expand_value = lane_norm_value<T>(a.expand_bn, lane, channel);
    const float value = lane_norm_value<T>(a.bn, lane, channel);
    const ChannelNorm expand = lanes_norm(a.expand_bn, lane, expand_value);
    const ChannelNorm norm = lanes_norm(a.bn, lane, value);
    if (lane < kNormChannels) {
      float* const constant = constants + of_block;
      constant[0] = expand.scale;
      constant[Sizes::kChannels] = expand.shift();
      constant[2 * Sizes::kChannels] = norm.scale;
      constant[3 * Sizes::kChannels] = norm.shift();
    }
  }
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kExpandThreads;
    if (i < channels * K * K) weights[i % (K * K) * Sizes::kChannels + i / (K * K)] = taps[j];
  }
  __syncthreads();

  const T* const x =
      static_cast<const T*>(a.input) +
      ((first_n * shape.in_h + first_h) * shape.in_w + first_w) * int64_t{a.in_channels};
  const T* const expand_weight =
      static_cast<const T*>(a.expand_weight) + int64_t{first_channel} * a.in_channels;
  const int chunks = (a.in_channels + kTileDepth<T> - 1) / kTileDepth<T>;
  const int passes = (products + kPassRows - 1) / kPassRows;
  const auto weight_tile = [&](int chunk, int stage) {
    return shared + tiling.expand_weight +
           (tiling.weight_stays ? chunk : stage) * Sizes::kExpandWeightBytes;
  };
  const auto copy = [&](int index, int stage) {
    const int pass = chunks == 1 ? index : index / chunks, chunk = index - pass * chunks;
    const int first_row = pass * kPassRows;
    copy_tile<T>(shared + stage * Sizes::kStageBytes, min(products - first_row, kPassRows),
                 chunk * kTileDepth<T>, a.in_channels, tiling.vectors, [&](int row) {
                   const int place = pixels[first_row + row].x;
                   const int64_t pixel = int64_t{place >> 16} * shape.in_w + (place & 0xffff);
                   return x + pixel * a.in_channels;
                 });
    if (tiling.weight_stays && pass > 0) return;
    copy_tile<T>(weight_tile(chunk, stage), channels, chunk * kTileDepth<T>, a.in_channels,
                 tiling.vectors,
                 [&](int row) { return expand_weight + int64_t{row} * a.in_channels; });
  };
  constexpr int kFragments = Sizes::kChannels / 8;
  float acc[1][kFragments][4];
  for_chunks(
      passes * chunks, tiling.stages, copy, [](int, int) {},
      [&](int index, int stage) {
        const int pass = chunks == 1 ? index : index / chunks, chunk = index - pass * chunks;
        const int first_row = pass * kPassRows + warp * kFragmentRows;
        if (first_row >= products) return;
        if (chunk == 0) {
#pragma unroll
          for (int n = 0; n < kFragments; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[0][n][i] = 0.f;
          }
        }
        multiply_tiles<T>(
            acc, shared + stage * Sizes::kStageBytes + warp * kFragmentRows * kTileRowBytes,
            weight_tile(chunk, stage), a.in_channels - chunk * kTileDepth<T>, channels,
            !a.allow_tf32);
        if (chunk + 1 < chunks) return;

        // Of rows r and r + 8 of the warp's.
        T* pixel[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = min(first_row + lane / 4 + 8 * half, products - 1);
          pixel[half] = reinterpret_cast<T*>(tile + pixels[row].y * kExpandedPitch) + lane % 4 * 2;
        }
    // Two fragments at a time: those beyond the channels are left out.
#pragma unroll
        for (int n = 0; n < kFragments; n += 2) {
          if (n * 8 >= channels) break;
          Floats<8> y;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const float* const constant = constants + (n + m) * 8 + lane % 4 * 2;
            const Floats<2> scale = load<2>(constant), shift = load<2>(constant + Sizes::kChannels);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              y[m * 4 + i] = fmaf(acc[0][n + m][i], scale[i % 2], shift[i % 2]);
            }
          }
          y = activate<Math<T, 8>>(a.expand_activation, y);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (first_row + lane / 4 + i % 2 * 8 >= products) continue;
            store(pixel[i % 2] + (n + i / 2) * 8, slice<2>(y, i));
          }
        }
      });
  __syncthreads();

  float w[K * K][L];
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
    const Floats<L> of = load<L>(weights + tap * Sizes::kChannels + lane * L);
#pragma unroll
    for (int l = 0; l < L; ++l) w[tap][l] = of[l];
  }
  Floats<L> scale, shift;
#pragma unroll
  for (int l = 0; l < L; ++l) {
    scale[l] = constants[2 * Sizes::kChannels + lane * L + l];
    shift[l] = constants[3 * Sizes::kChannels + lane * L + l];
  }
  float* const sums = reinterpret_cast<float*>(shared);  // [image][patch][channel]
  const int left = channels - lane * L;
#pragma unroll 1
  for (int i = warp; i < images * patches; i += kExpandWarps) {
    const int image = i / patches;
    const int first_row = i % patches / tiling.patches_w * Sizes::kPatchH;
    const int first_column = i % tiling.patches_w * kPatchW;
    Floats<L> sum = broadcast<L>(0.f);
    if (first_row >= tile_h || first_column >= tile_w) {
      if (pooled != nullptr) store(sums + i * Sizes::kChannels + lane * L, sum);
      continue;
    }
    const char* line =
        tile + lane * 4 +
        ((image * tiling.expanded_h + first_row * S) * tiling.expanded_w + first_column * S) *
            kExpandedPitch;
    Floats<Sizes::kPatchH * kPatchW * L> acc = broadcast<Sizes::kPatchH * kPatchW * L>(0.f);
#pragma unroll
    for (int row = 0; row < Sizes::kRows; ++row) {
      Floats<L> values[Sizes::kCols];
#pragma unroll
      for (int column = 0; column < Sizes::kCols; ++column) {
        values[column] = load<L>(reinterpret_cast<const T*>(line + column * kExpandedPitch));
      }
      multiply_row<K, S, Sizes::kPatchH>(acc, values, w, row);
      line += tiling.expanded_w * kExpandedPitch;
    }

    T* out = static_cast<T*>(a.output) +
             (((first_n + image) * shape.out_h + first_oh + first_row) * shape.out_w + first_ow +
              first_column) *
                 shape.channels +
             first_channel + lane * L;
#pragma unroll
    for (int r = 0; r < Sizes::kPatchH; ++r) {
      Floats<kPatchW * L> y = slice<kPatchW * L>(acc, r);
#pragma unroll
      for (int j = 0; j < kPatchW * L; ++j) y[j] = fmaf(y[j], scale[j % L], shift[j % L]);
      y = activate<Math<T, kPatchW * L>>(a.activation, y);
#pragma unroll
      for (int p = 0; p < kPatchW; ++p) {
        if (first_row + r >= tile_h || first_column + p >= tile_w || left <= 0) continue;
        const Floats<L> one = slice<L>(y, p);
        sum = sum + one;
        store_some(out + p * shape.channels, one, left, tiling.output_vectors);
      }
      out += int64_t{shape.out_w} * shape.channels;
    }
    if (pooled != nullptr) store(sums + i * Sizes::kChannels + lane * L, sum);
  }
  if (pooled == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < images * Sizes::kChannels; i += kExpandThreads) {
    const int image = i / Sizes::kChannels, channel = i % Sizes::kChannels;
    if (channel >= channels) continue;
    float total = 0.f;
    for (int patch = 0; patch < patches; ++patch) {
      total += sums[(image * patches + patch) * Sizes::kChannels + channel];
    }
    const int64_t slot = (first_n + image) * tiling.tiles_h * tiling.tiles_w + tile_index;
    pooled[slot * shape.channels + first_channel + channel] = total;
  }
}

}  // namespace effnet::cuda
