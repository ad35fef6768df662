// The launches of the depthwise op on one storage type: choice of the kernel's instantiation,
// cutting into blocks, workspaces. The kernels are in depthwise_conv_forward.cuh,
// depthwise_conv_backward.cuh and depthwise_conv_mma_backward.cuh; what is element by element is
// batch_norm_act.h's.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "batch_norm_act.h"
#include "depthwise_conv_backward.cuh"
#include "depthwise_conv_bn_act.h"
#include "depthwise_conv_forward.cuh"
#include "depthwise_conv_mma_backward.cuh"
#include "row_launches.cuh"

namespace effnet::cuda {

// About how many threads a multiprocessor holds of these kernels (their registers allow no more);
// and of how many such waves a grid should be, so that the last one costs little.
constexpr int kResidentThreads = 512;
constexpr int kWaves = 4;

// Cuts the tensor whose patches the threads own, (batch, rows, columns, channels), into blocks.
// Large batches: a block goes through several images, which spares weights and partial results.
// Small ones: images are cut into segments of rows until every multiprocessor has work.
template <class Sizes>
DepthwiseTiling depthwise_tiling(const Device& device, int64_t batch, int channels, int rows,
                                 int columns) {
  DepthwiseTiling tiling;
  tiling.channel_blocks = static_cast<int>(ceil_div(channels, kBlockChannels));
  const int64_t patches = ceil_div(columns, kPatchW);
  tiling.bands = static_cast<int>(ceil_div(patches, Sizes::kMaxPatches));
  tiling.patches = static_cast<int>(ceil_div(patches, tiling.bands));

  const int64_t wave = std::max<int64_t>(
      1, int64_t{device.multiprocessors()} * kResidentThreads / (tiling.patches * kBlockChannels));
  const int64_t per_image = int64_t{tiling.channel_blocks} * tiling.bands;
  const int64_t most = ceil_div(rows, Sizes::kPatchH);
  const int64_t wanted = std::min(most, ceil_div(wave, batch * per_image));
  tiling.segment_rows = static_cast<int>(ceil_div(most, wanted)) * Sizes::kPatchH;
  tiling.segments = static_cast<int>(ceil_div(rows, tiling.segment_rows));
  tiling.images =
      std::clamp<int64_t>(batch * per_image * tiling.segments / (wave * kWaves), int64_t{1}, batch);
  tiling.chunks = ceil_div(batch, tiling.images);
  return tiling;
}

template <class Tiling>
int64_t block_count(const Tiling& t) {
  return t.chunks * t.segments * t.bands * t.channel_blocks;
}

template <class Tiling>
int64_t slot_count(const Tiling& t) {
  return t.chunks * t.segments * t.bands;
}

// How a tensor-core kernel may be cut: into bands of `columns` blocks of 8 columns at most and
// steps of a multiple of `rows` rows, `blocks` on a multiprocessor.
struct MmaLimits {
  int columns, rows, blocks;
};

// Cuts an output of `height` x `width` so that as little as possible is staged twice, computed in
// vain or waited for. fits(tiling) fills its layout and says whether there is room; where there is
// none for any, as on devices with 100 KB of shared memory, the tiling has no rows.
template <class Sizes, class Fits>
MmaTiling mma_tiling(const Device& device, const ConvShape& s, int height, int width,
                     const MmaLimits& limits, const Fits& fits) {
  const int wave = device.multiprocessors() * limits.blocks;
  const int column_blocks = static_cast<int>(ceil_div(width, kSegmentColumns));

  MmaTiling best{};
  best.channel_blocks = static_cast<int>(ceil_div(s.channels, kBlockChannels));
  double least = 0.;
  const int least_bands = static_cast<int>(ceil_div(column_blocks, limits.columns));
  for (int bands = least_bands;
       bands <= column_blocks && (best.rows == 0 || bands < least_bands + 4); ++bands) {
    MmaTiling t = best;
    t.column_blocks = static_cast<int>(ceil_div(column_blocks, bands));
    t.bands = static_cast<int>(ceil_div(column_blocks, t.column_blocks));
    for (t.rows = limits.rows; t.rows <= 16 && (t.rows == limits.rows || t.rows < 2 * height);
         t.rows *= 2) {
      const int steps = static_cast<int>(ceil_div(height, t.rows));
      for (t.group_images = 1; t.group_images <= 8; t.group_images *= 2) {
        const int image_segments = t.rows * t.column_blocks;
        const bool whole_tiles =
            image_segments % kTileSegments == 0 || 2 * image_segments == kTileSegments;
        // Several images: where they are walked in one step, and leave no multiprocessor idle.
        if (t.group_images > 1 &&
            (steps > 1 || !whole_tiles ||
             s.batch / t.group_images * best.channel_blocks * t.bands < wave)) {
          break;
        }
        if (!fits(t)) break;
        // In instructions: 45 a warp for two pixels of 8 channels of each lane that are staged, 3 a
        // product and 40 for what becomes of a tile's results, 150 a warp for a step's barriers,
        // 600 where a new image's rows come in several turns, the second and later ones waited for.
        const MmaLayout& l = t.layout;
        const double staged = ceil_div(l.slots + (steps - 1) * t.rows, l.stride);
        const int64_t turns = ceil_div(ceil_div(l.slots, l.stride), l.in_flight);
        const double cost = ((turns - 1) * Sizes::kWarps * 600. + staged * Sizes::kWarps * 45. +
                             l.tiles * steps * kBlockChannels * (3. * Sizes::kKernel + 40.) +
                             steps * Sizes::kWarps * 150.) *
                            t.bands / t.group_images;
        if (best.rows == 0 || cost < least) {
          least = cost;
          best = t;
        }
      }
    }
  }
  if (best.rows == 0) return best;

  const int64_t groups = ceil_div(s.batch, best.group_images);
  const int64_t per_group = int64_t{best.channel_blocks} * best.bands;
  const int most = static_cast<int>(ceil_div(height, best.rows));
  const int64_t wanted = std::min<int64_t>(most, ceil_div(wave, groups * per_group));
  const int segment_steps = static_cast<int>(ceil_div(most, wanted));
  best.segment_rows = segment_steps * best.rows;
  best.segments = static_cast<int>(ceil_div(height, best.segment_rows));
  // Images a block: the last wave is to be nearly full, and what a block does once to be little.
  double shortest = 0.;
  for (int waves = 1; waves <= 4; ++waves) {
    const int64_t images =
        std::max<int64_t>(1, ceil_div(groups * per_group * best.segments, int64_t{wave} * waves));
    const int64_t blocks = ceil_div(groups, images) * per_group * best.segments;
    const double time = ceil_div(blocks, wave) * (images * segment_steps + 2.);
    if (waves == 1 || time < shortest) {
      shortest = time;
      best.images = static_cast<int>(images);
    }
  }
  best.chunks = ceil_div(groups, best.images);
  return best;
}

// Cuts the output of the forward kernel into blocks. Large batches: a unit goes through several
// images, which spares filters and partial results. Small ones: images are cut into segments of
// rows until every multiprocessor has work.
template <class Sizes>
StripTiling strip_tiling(const Device& device, const ConvShape& s) {
  StripTiling t{};
  t.strips = static_cast<int>(ceil_div(s.out_w, Sizes::kStrip));
  const int all_lanes = static_cast<int>(ceil_div(s.channels, Sizes::L));
  const int64_t most_units = s.batch * t.strips;
  // As few idle lanes of warps as can be, then as few blocks of channels.
  double best = 0.;
  const int least_blocks = static_cast<int>(ceil_div(all_lanes, kStripThreads));
  for (int blocks = least_blocks; blocks < least_blocks + 4 && blocks <= all_lanes; ++blocks) {
    const int lanes = static_cast<int>(ceil_div(all_lanes, blocks));
    for (int units = 1; units <= most_units && units * lanes <= kStripThreads; ++units) {
      const int threads = units * lanes;
      const double used = static_cast<double>(all_lanes) / (blocks * lanes) * threads /
                          (ceil_div(threads, 32) * 32);
      const double score = used - (threads < kStripThreads / 2 ? 0.1 : 0.) - 1e-3 * blocks;
      if (t.lanes == 0 || score >= best) {
        best = score;
        t.channel_blocks = blocks;
        t.lanes = lanes;
        t.units = units;
      }
    }
  }

  constexpr int kWarps = kStripBlocks<Sizes::K, Sizes::S> * kStripThreads / 32;
  const int64_t wave =
      int64_t{device.multiprocessors()} * (kWarps / ceil_div(t.lanes * t.units, 32));
  const int64_t least_images = ceil_div(most_units, int64_t{1} << 30);
  // In rows: what a block does once costs as much as kOnce of them.
  constexpr int kOnce = 6, kLeastRows = 4;
  double shortest = 0.;
  for (int wanted = 1; wanted <= ceil_div(s.out_h, kLeastRows); wanted *= 2) {
    const int rows = static_cast<int>(ceil_div(s.out_h, wanted));
    const int segments = static_cast<int>(ceil_div(s.out_h, rows));
    for (int64_t images = least_images; images < 2 * s.batch || images == least_images;
         images *= 2) {
      const int64_t unit_blocks = ceil_div(ceil_div(s.batch, images) * t.strips, t.units);
      const int64_t blocks = unit_blocks * segments * t.channel_blocks;
      const double time = static_cast<double>(ceil_div(blocks, wave)) *
                          (images * (rows + Sizes::kUnderWay) + kOnce);
      if (t.segments == 0 || time < shortest) {
        shortest = time;
        t.segment_rows = rows;
        t.segments = segments;
        t.images = static_cast<int>(images);
        t.unit_blocks = static_cast<int>(unit_blocks);
      }
      if (blocks <= wave) break;
    }
  }
  return t;
}

// The forward kernel for T, L, K and S.
template <class T, int L, int K, int S>
struct Forward {
  static StripTiling tiling(const Device& device, const ConvShape& s) {
    return strip_tiling<StripSizes<T, L, K, S>>(device, s);
  }

  static void launch(const Device& device, const ForwardArguments<T>& f, bool training) {
    const StripTiling& t = f.tiling;
    const int64_t blocks = int64_t{t.unit_blocks} * t.segments * t.channel_blocks;
    const int threads = t.lanes * t.units;
    if (training) {
      device.launch(depthwise_conv_kernel<T, L, K, S, true>, blocks, threads,
                    StripSizes<T, L, K, S>::kSharedBytes, f);
    } else {
      device.launch(depthwise_conv_kernel<T, L, K, S, false>, blocks, threads,
                    StripSizes<T, L, K, S>::kSharedBytes, f);
    }
  }
};

// Calls body(Forward<T, L, K, S>{}): L is two channels where their number and the pointers allow.
template <class T, class Body>
void for_forward(const ConvShape& s, std::initializer_list<const void*> pointers,
                 const Body& body) {
  const auto with_lanes = [&](auto lanes) {
    for_window(s, [&](auto kernel, auto step) { body(Forward<T, lanes(), kernel(), step()>{}); });
  };
  if (allows_vectors(s.channels, 2, pointers, 2 * sizeof(T))) {
    with_lanes(Constant<2>{});
  } else {
    with_lanes(Constant<1>{});
  }
}

// The backward kernel: that of the tensor cores where its sums fit the registers, for the kernel
// sizes and the stride that most of an EfficientNet's blocks have.
template <class T, int V, int K, int S>
struct Backward {
  static constexpr bool kMma = sizeof(T) == 2 && V == kVectorChannels && S == 1 && K <= 5;
  using Tiling = std::conditional_t<kMma, MmaTiling, DepthwiseTiling>;

  static Tiling tiling(const Device& device, const ConvShape& s) {
    if constexpr (kMma) {
      using Sizes = MmaBackwardSizes<K>;
      const int bytes = device.shared_bytes(1);
      return mma_tiling<Sizes>(device, s, s.in_h, s.in_w, {7, kTileRows, 1}, [&](MmaTiling& t) {
        return fill_tile<Sizes>(t, K) && fill_layout<Sizes>(t, s, 2, 7, t.tile.bytes, bytes);
      });
    } else {
      return depthwise_tiling<BackwardSizes<T, V, K, S>>(
          device, s.batch, s.channels, s.in_h + s.pad_top - first_padded(s.pad_top, S),
          s.in_w + s.pad_left - first_padded(s.pad_left, S));
    }
  }

  static bool fits(const Tiling& tiling) {
    if constexpr (kMma) return tiling.rows > 0;
    return true;
  }

  static void launch(const Device& device, const BackwardArguments<T, Tiling>& b) {
    const int64_t blocks = block_count(b.tiling);
    if constexpr (kMma) {
      device.launch(depthwise_conv_mma_backward_kernel<T, K>, blocks, MmaBackwardSizes<K>::kThreads,
                    b.tiling.layout.bytes, b);
    } else {
      using Sizes = BackwardSizes<T, V, K, S>;
      device.launch(depthwise_conv_backward_kernel<T, V, K, S>, blocks,
                    b.tiling.patches * kBlockChannels, Sizes::shared_bytes(b.tiling.patches), b);
    }
  }
};

// Calls body(Backward<T, V, K, S>{}, tiling), or with V = 1 where that does not fit the device.
template <class T, int V, int K, int S, class Body>
void for_backward(const Device& device, const ConvShape& s, const Body& body) {
  const auto tiling = Backward<T, V, K, S>::tiling(device, s);
  if (Backward<T, V, K, S>::fits(tiling)) {
    body(Backward<T, V, K, S>{}, tiling);
  } else {
    body(Backward<T, 1, K, S>{}, Backward<T, 1, K, S>::tiling(device, s));
  }
}

// What BN and the activation after a convolution are given of the depthwise op's arguments.
template <class Arguments>
void fill_batch_norm_act(BatchNormAct& to, const Arguments& a, const void* conv) {
  to.dtype = a.dtype;
  to.batch = a.shape.batch;
  to.pixels = int64_t{a.shape.out_h} * a.shape.out_w;
  to.channels = a.shape.channels;
  to.input = conv;
  to.bn = a.bn;
  to.activation = a.activation;
}

// What the forward kernel is given for inference and training alike.
template <class T, class Arguments>
ForwardArguments<T> forward_arguments(const Arguments& a, const StripTiling& tiling, void* output) {
  ForwardArguments<T> f{};
  f.shape = a.shape;
  f.tiling = tiling;
  f.input = static_cast<const T*>(a.input);
  f.weight = static_cast<const T*>(a.weight);
  f.prologue = a.prologue;
  f.output = static_cast<T*>(output);
  return f;
}

template <class T>
void DepthwiseLaunches<T>::inference(const DepthwiseInference& a, const Tensor& like) {
  const Device device(like);
  const ConvShape& s = a.shape;
  for_forward<T>(s, {a.input, a.output}, [&](auto kernel) {
    auto f = forward_arguments<T>(a, kernel.tiling(device, s), a.output);
    f.bn = a.bn;
    f.activation = a.activation;
    const int64_t parts = int64_t{f.tiling.segments} * f.tiling.strips;
    const ImageSums pooled(like, static_cast<float*>(a.pooled), s.batch, parts, s.channels);
    f.pooled = pooled.data();
    kernel.launch(device, f, false);
    pooled.add_up(device);
  });
}

template <class T>
void DepthwiseLaunches<T>::training(const DepthwiseTraining& a, const Tensor& like) {
  const Device device(like);
  const ConvShape& s = a.shape;
  for_forward<T>(s, {a.input, a.conv}, [&](auto kernel) {
    auto f = forward_arguments<T>(a, kernel.tiling(device, s), a.conv);
    const int64_t slots = int64_t{f.tiling.unit_blocks} * f.tiling.segments;
    OptionalTensor partial;
    if (a.batch_stats) {
      partial = workspace(like, 3 * slots * s.channels, ScalarType::Double);
      f.moments = static_cast<double*>(partial->mutable_data_ptr());
    }
    kernel.launch(device, f, true);
    if (a.batch_stats) {
      merge_moments(device, f.moments, slots, s.channels, a.batch_mean, a.batch_var);
    }
  });
  if (a.output == nullptr) return;

  BatchNormActForward f{};
  fill_batch_norm_act(f, a, a.conv);
  f.output = a.output;
  f.pooled = a.pooled;
  BatchNormActLaunches<T>::forward(device, f, like);
}

template <class T>
void DepthwiseLaunches<T>::backward(const DepthwiseBackward& a, const Tensor& like) {
  const Device device(like);
  const ConvShape& s = a.shape;

  // Pass one: the gradients of BN's weight and bias, which batch statistics need before pass two.
  BatchNormActSums sums{};
  fill_batch_norm_act(sums, a, a.conv);
  sums.grad_output = a.grad_output;
  sums.grad_pooled = a.grad_pooled;
  sums.grad_bn_weight = a.grad_bn_weight;
  sums.grad_bn_bias = a.grad_bn_bias;
  BatchNormActLaunches<T>::sums(device, sums, like);
  if (a.grad_input == nullptr && a.grad_weight == nullptr) return;

  // Pass two: grad_conv, and from it the other gradients.
  for_vector<T>(s.channels, {a.grad_output, a.conv, a.input, a.grad_input}, [&](auto vector) {
    constexpr int V = vector();
    for_window(s, [&](auto kernel, auto step) {
      constexpr int K = kernel(), S = step();
      for_backward<T, V, K, S>(device, s, [&](auto launch, const auto& tiling) {
        using Kernel = decltype(launch);
        BackwardArguments<T, typename Kernel::Tiling> b{};
        b.shape = s;
        b.tiling = tiling;
        b.grad_output = static_cast<const T*>(a.grad_output);
        b.grad_pooled = static_cast<const float*>(a.grad_pooled);
        b.conv = static_cast<const T*>(a.conv);
        b.bn = a.bn;
        b.activation = a.activation;
        if (a.batch_stats) {
          b.grad_bn_weight = static_cast<const float*>(a.grad_bn_weight);
          b.grad_bn_bias = static_cast<const float*>(a.grad_bn_bias);
        }
        b.input = static_cast<const T*>(a.input);
        b.weight = static_cast<const T*>(a.weight);
        b.prologue = a.prologue;
        b.grad_input = static_cast<T*>(a.grad_input);
        const int64_t slots = slot_count(b.tiling);
        const int64_t taps = a.grad_weight != nullptr ? K * K : 0;
        const int64_t vectors = a.grad_prologue_scale != nullptr ? 2 : 0;
        const Tensor partial = workspace(like, (taps + vectors) * slots * s.channels);
        if (taps > 0) b.partial_weight = floats(partial);
        if (vectors > 0) b.partial_prologue = floats(partial) + taps * slots * s.channels;
        Kernel::launch(device, b);
        if (taps > 0) {
          reduce_partials(device, b.partial_weight, taps, slots, s.channels, 1, K * K,
                          static_cast<T*>(a.grad_weight));
        }
        if (vectors > 0) {
          reduce_partials(device, b.partial_prologue, vectors, slots, s.channels, 0, 1,
                          static_cast<float*>(a.grad_prologue_scale),
                          static_cast<float*>(a.grad_prologue_shift));
        }
      });
    });
  });
}

}  // namespace effnet::cuda
