// The launches of the depthwise op on one storage type: choice of the kernel's instantiation,
// cutting into blocks, workspaces. The kernels are in depthwise_conv_forward.cuh and
// depthwise_conv_backward.cuh; what is element by element is batch_norm_act.h's.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>

#include "batch_norm_act.h"
#include "depthwise_conv_backward.cuh"
#include "depthwise_conv_bn_act.h"
#include "depthwise_conv_forward.cuh"
#include "row_launches.cuh"

namespace effnet::cuda {

// What a strip kernel walks through.
struct StripWork {
  int64_t batch;
  int lanes, rows, strips;  // of an image
  int overlap;              // rows that a segment costs beyond its own
  int threads;              // of a block at most
  // On a multiprocessor at most: registers limit the warps, shared memory the blocks.
  int warps, blocks;

  int resident_blocks(int block_threads) const {
    return std::min(blocks, warps / static_cast<int>(ceil_div(block_threads, 32)));
  }
};

// Cuts it into blocks. Large batches: a unit goes through several images, which spares filters and
// partial results. Small ones: images are cut into segments of rows until every multiprocessor has
// work.
inline StripTiling strip_tiling(const Device& device, const StripWork& w) {
  StripTiling t{};
  t.strips = w.strips;
  const int all_lanes = w.lanes;
  const int64_t most_units = w.batch * t.strips;
  // As few idle lanes of warps as can be, then as few blocks of channels.
  double best = 0.;
  const int least_blocks = static_cast<int>(ceil_div(all_lanes, w.threads));
  for (int blocks = least_blocks; blocks < least_blocks + 4 && blocks <= all_lanes; ++blocks) {
    const int lanes = static_cast<int>(ceil_div(all_lanes, blocks));
    for (int units = 1; units <= most_units && units * lanes <= w.threads; ++units) {
      const int threads = units * lanes;
      const double used = static_cast<double>(all_lanes) / (blocks * lanes) * threads /
                          (ceil_div(threads, 32) * 32);
      const double score = used - (threads < w.threads / 2 ? 0.1 : 0.) - 1e-3 * blocks;
      if (t.lanes == 0 || score >= best) {
        best = score;
        t.channel_blocks = blocks;
        t.lanes = lanes;
        t.units = units;
      }
    }
  }

  const int64_t wave = int64_t{device.multiprocessors()} * w.resident_blocks(t.lanes * t.units);
  const int64_t least_images = ceil_div(most_units, int64_t{1} << 30);
  // In rows: what a block does once costs as much as kOnce of them.
  constexpr int kOnce = 6, kLeastRows = 4;
  double shortest = 0.;
  for (int wanted = 1; wanted <= ceil_div(w.rows, kLeastRows); wanted *= 2) {
    const int rows = static_cast<int>(ceil_div(w.rows, wanted));
    const int segments = static_cast<int>(ceil_div(w.rows, rows));
    // For `waves` of blocks that fill the device.
    const int64_t per_image = int64_t{segments} * t.channel_blocks;
    for (int waves = 1; waves <= 8; ++waves) {
      const int64_t images =
          std::max(least_images, ceil_div(ceil_div(most_units, t.units) * per_image, wave * waves));
      const int64_t unit_blocks = ceil_div(ceil_div(w.batch, images) * t.strips, t.units);
      const double time = static_cast<double>(ceil_div(unit_blocks * per_image, wave)) *
                          (images * (rows + w.overlap) + kOnce);
      if (t.segments == 0 || time < shortest) {
        shortest = time;
        t.segment_rows = rows;
        t.segments = segments;
        t.images = static_cast<int>(images);
        t.unit_blocks = static_cast<int>(unit_blocks);
      }
    }
  }
  return t;
}

// The forward kernel for T, L, K and S.
template <class T, int L, int K, int S>
struct Forward {
  static StripTiling tiling(const Device& device, const ConvShape& s) {
    using Sizes = StripSizes<T, L, K, S>;
    return strip_tiling(device,
                        {s.batch, static_cast<int>(ceil_div(s.channels, L)), s.out_h,
                         static_cast<int>(ceil_div(s.out_w, Sizes::kStrip)), Sizes::kUnderWay,
                         kStripThreads, kStripBlocks<K, S> * kStripThreads / 32, 32});
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

// The backward kernel for T, L, K and S.
template <class T, int L, int K, int S>
struct Backward {
  using Sizes = BackwardSizes<T, L, K, S>;
  static constexpr int kTaps = K * K;

  static StripTiling tiling(const Device& device, const ConvShape& s) {
    int blocks = 32;
    while (blocks > 1 && device.shared_bytes(blocks) < static_cast<int>(Sizes::kSharedBytes)) {
      --blocks;
    }
    // A segment's first kOlder steps have grad_conv alone, and cost half.
    const int height = s.in_h + s.pad_top - first_padded(s.pad_top, S);
    const int width = s.in_w + s.pad_left - first_padded(s.pad_left, S);
    return strip_tiling(
        device,
        {s.batch, static_cast<int>(ceil_div(s.channels, L)), static_cast<int>(ceil_div(height, S)),
         static_cast<int>(ceil_div(width, Sizes::kStrip)), (Sizes::kOlder + 1) / 2, Sizes::kThreads,
         Sizes::kBlocks * static_cast<int>(ceil_div(Sizes::kThreads, 32)), blocks});
  }

  static void launch(const Device& device, const BackwardArguments<T>& b) {
    const StripTiling& t = b.tiling;
    const int64_t blocks = int64_t{t.unit_blocks} * t.segments * t.channel_blocks;
    device.launch(depthwise_conv_backward_kernel<T, L, K, S>, blocks, t.lanes * t.units,
                  Sizes::kSharedBytes, b);
  }
};

// Calls body(Kernel<T, L, K, S>{}): L is two channels where their number and the pointers allow.
template <template <class, int, int, int> class Kernel, class T, class Body>
void for_strips(const ConvShape& s, std::initializer_list<const void*> pointers, const Body& body) {
  const auto with_lanes = [&](auto lanes) {
    for_window(s, [&](auto kernel, auto step) { body(Kernel<T, lanes(), kernel(), step()>{}); });
  };
  if (allows_vectors(s.channels, 2, pointers, 2 * sizeof(T))) {
    with_lanes(Constant<2>{});
  } else {
    with_lanes(Constant<1>{});
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
  for_strips<Forward, T>(s, {a.input, a.output}, [&](auto kernel) {
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
  for_strips<Forward, T>(s, {a.input, a.conv}, [&](auto kernel) {
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
  for_strips<Backward, T>(s, {a.grad_output, a.conv, a.input, a.grad_input}, [&](auto kernel) {
    BackwardArguments<T> b{};
    b.shape = s;
    b.tiling = kernel.tiling(device, s);
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
    const int64_t slots = int64_t{b.tiling.unit_blocks} * b.tiling.segments;
    const int64_t taps = a.grad_weight != nullptr ? kernel.kTaps : 0;
    const int64_t vectors = a.grad_prologue_scale != nullptr ? 2 : 0;
    const Tensor partial = workspace(like, (taps + vectors) * slots * s.channels);
    if (taps > 0) b.partial_weight = floats(partial);
    if (vectors > 0) b.partial_prologue = floats(partial) + taps * slots * s.channels;
    kernel.launch(device, b);
    if (taps > 0) {
      reduce_partials(device, b.partial_weight, taps, slots, s.channels, 1, taps,
                      static_cast<T*>(a.grad_weight));
    }
    if (vectors > 0) {
      reduce_partials(device, b.partial_prologue, vectors, slots, s.channels, 0, 1,
                      static_cast<float*>(a.grad_prologue_scale),
                      static_cast<float*>(a.grad_prologue_shift));
    }
  });
}

}  // namespace effnet::cuda
