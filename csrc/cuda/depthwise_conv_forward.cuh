// Depthwise convolution forward on dense NHWC tensors.
//
// A thread owns a lane of L channels (two, or one where their number or the pointers are odd) of a
// strip of outputs (depthwise_strip.cuh) in one image after another. Neighbouring threads are
// neighbouring lanes, so that a warp reads and writes whole 128-byte lines; the columns that
// neighbouring strips share, and the rows that neighbouring segments do, come from the L1 and L2
// caches. Nothing but the filter goes through shared memory, and no thread waits for another.
//
//     threadIdx.x = unit in block * lanes + lane          unit = group of images * strips + strip
#pragma once

#include "depthwise_strip.cuh"
#include "moments.cuh"

namespace effnet::cuda {

constexpr int kStripThreads = 128;  // most of a block
// Blocks that a multiprocessor is to hold: they leave a thread 128 and 168 registers.
template <int K, int S>
constexpr int kStripBlocks = K == 3 && S == 1 ? 4 : 3;
static_assert(kFilterPitch >= 2 * kStripThreads);

// Block index: channel block fastest (neighbours read the same lines), then segment, then units.
struct StripTiling {
  int channel_blocks, lanes;  // of a block
  int units;                  // of a block
  int strips;                 // of an image
  int segments, segment_rows;
  int images;  // of a unit, one after another
  int unit_blocks;
};

// Shared memory: the filters; after the walk, in training, the units' moments.
template <int K>
constexpr size_t kStripSharedBytes = K * K * kFilterPitch * sizeof(float);
static_assert(kStripSharedBytes<3> >= 3 * kFilterPitch * sizeof(double));

template <class T>
struct ForwardArguments {
  ConvShape shape;
  StripTiling tiling;
  const T* __restrict__ input;
  const T* __restrict__ weight;
  Prologue prologue;
  // Inference: output = activate(bn(conv)), and pooled[n, segment * strips + strip, c] = the sums
  // of the strip's outputs if not null.
  BatchNorm bn;
  Activation activation;
  float* __restrict__ pooled;
  // Training: output = conv, and moments[(count, mean, M2), slot, c] if not null, a slot for each
  // block of a channel.
  double* __restrict__ moments;
  T* __restrict__ output;
};

// Reads a strip's window through the prologue.
template <class Sizes>
struct StripInput {
  using T = typename Sizes::T;
  static constexpr int L = Sizes::L;
  static constexpr uint32_t kAllColumns = (1u << Sizes::kColumns) - 1;

  const T* window;  // element (row 0, column 0) of the image's window, there or not
  int64_t row_stride;
  int column_stride;
  int first_row, in_h;
  uint32_t columns;  // bit j: column j exists
  bool has_prologue;
  Floats<L> scale, shift;
  Activation activation;

  EFFNET_DEVICE bool load(int q, typename Sizes::Raw (&raw)[Sizes::kColumns]) const {
    if (static_cast<unsigned>(first_row + q) >= static_cast<unsigned>(in_h)) return false;
    const T* p = window + q * row_stride;
    const int stride = opaque(column_stride);
    if (columns == kAllColumns) {
#pragma unroll
      for (int j = 0; j < Sizes::kColumns; ++j) {
        raw[j] = load_vector<L>(p);
        p += stride;
      }
      return true;
    }
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) {
      raw[j] = {};
      if (columns >> j & 1) raw[j] = load_vector<L>(p);
      p += stride;
    }
    return true;
  }

  EFFNET_DEVICE void values(const typename Sizes::Raw (&raw)[Sizes::kColumns],
                            typename Sizes::Row& x) const {
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) x[j] = unpack<T, L>(raw[j]);
    if (!has_prologue) return;
    Floats<Sizes::kColumns * L> y;
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) set_slice(y, j, multiply_add(x[j], scale, shift));
    y = activate<Math<T, Sizes::kColumns * L>>(activation, y);
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) {
      x[j] = columns >> j & 1 ? slice<L>(y, j) : broadcast<L>(0.f);
    }
  }
};

// conv[n, oh, ow, c] = sum_ij p[n, oh * S + i - pad_top, ow * S + j - pad_left, c] * weight[c, i,
// j]
//
// with p = input or prologue_activation(input * scale + shift), then the epilogue of inference or
// of training (see ForwardArguments). Traffic: input read once, output written once.
template <class T, int L, int K, int S, bool kTraining>
__global__ void __launch_bounds__(kStripThreads, (kStripBlocks<K, S>))
    depthwise_conv_kernel(const __grid_constant__ ForwardArguments<T> a) {
  using Sizes = StripSizes<T, L, K, S>;
  constexpr int kStrip = Sizes::kStrip;
  const ConvShape& shape = a.shape;
  const StripTiling& tiling = a.tiling;

  int block = blockIdx.x;
  const int first_channel = block % tiling.channel_blocks * tiling.lanes * L;
  block /= tiling.channel_blocks;
  const int segment = block % tiling.segments;
  const int unit_block = block / tiling.segments;
  const int lane = static_cast<int>(threadIdx.x) % tiling.lanes;
  const int unit = static_cast<int>(threadIdx.x) / tiling.lanes;
  const int channel = first_channel + lane * L;
  const int group = (unit_block * tiling.units + unit) / tiling.strips;
  const int strip = (unit_block * tiling.units + unit) % tiling.strips;
  const int64_t first_n = int64_t{group} * tiling.images;
  const int images = static_cast<int>(min(shape.batch - first_n, int64_t{tiling.images}));
  const bool active = channel < shape.channels && images > 0;

  float* const filters = shared_floats();
  const int block_channels = tiling.lanes * L;
  {
    const int channels = min(shape.channels - first_channel, block_channels);
    const T* const from = a.weight + static_cast<int64_t>(first_channel) * K * K;
    for (int i = threadIdx.x; i < channels * K * K; i += blockDim.x) {
      filters[i % (K * K) * kFilterPitch + i / (K * K)] = to_float(from[i]);
    }
  }
  __syncthreads();

  const int first_oh = segment * tiling.segment_rows;
  const int rows = min(tiling.segment_rows, shape.out_h - first_oh);
  const int first_ow = strip * kStrip;
  const int columns = min(shape.out_w - first_ow, kStrip);
  ShiftedSums totals[L];
  if (active) {
    const int first_w = first_ow * S - shape.pad_left;
    StripInput<Sizes> source;
    source.column_stride = shape.channels;
    source.row_stride = static_cast<int64_t>(shape.in_w) * shape.channels;
    source.first_row = first_oh * S - shape.pad_top;
    source.in_h = shape.in_h;
    source.columns = 0;
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) {
      const bool exists = static_cast<unsigned>(first_w + j) < static_cast<unsigned>(shape.in_w);
      source.columns |= static_cast<uint32_t>(exists) << j;
    }
    source.has_prologue = a.prologue.scale != nullptr;
    source.activation = a.prologue.activation;
    Floats<L> scale, shift;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (source.has_prologue) {
        source.scale[l] = static_cast<const float*>(a.prologue.scale)[channel + l];
        source.shift[l] = static_cast<const float*>(a.prologue.shift)[channel + l];
      }
      if constexpr (!kTraining) {
        const ChannelNorm norm = channel_norm<T>(a.bn, channel + l);
        scale[l] = norm.scale;
        shift[l] = norm.bias - norm.mean * norm.scale;
      }
    }
    const int64_t out_row_stride = static_cast<int64_t>(shape.out_w) * shape.channels;

    source.window = a.input +
                    ((first_n * shape.in_h + source.first_row) * shape.in_w + first_w) *
                        static_cast<int64_t>(shape.channels) +
                    channel;
    T* out = a.output +
             ((first_n * shape.out_h + first_oh) * shape.out_w + first_ow) *
                 static_cast<int64_t>(shape.channels) +
             channel;
#pragma unroll 1
    for (int image = 0; image < images; ++image) {
      Floats<L> pooled = broadcast<L>(0.f);
      walk_strip<Sizes>(rows, filters + lane * L, source, [&](int o, typename Sizes::Outputs& y) {
        if constexpr (!kTraining) {
#pragma unroll
          for (int i = 0; i < kStrip * L; ++i) y[i] = fmaf(y[i], scale[i % L], shift[i % L]);
          y = activate<Math<T, kStrip * L>>(a.activation, y);
        }
        T* p_out = out + o * out_row_stride;
        const int stride = opaque(shape.channels);
        const auto store_row = [&](auto exists) {
#pragma unroll
          for (int p = 0; p < kStrip; ++p) {
            if (exists(p)) {
              const Vector<T, L> stored = pack<T, L>(slice<L>(y, p));
              *reinterpret_cast<Vector<T, L>*>(p_out) = stored;
              // Statistics of the stored values: those of others would not normalise them.
              if constexpr (kTraining) set_slice(y, p, unpack<T, L>(stored));
              if constexpr (!kTraining) pooled = pooled + slice<L>(y, p);
            }
            p_out += stride;
          }
        };
        if (columns == kStrip) {
          store_row([](int) { return true; });
        } else {
          store_row([&](int p) { return p < columns; });
        }
        if constexpr (kTraining) {
          if (a.moments == nullptr) return;
          if (image == 0 && o == 0) {
            // About the mean: the first row's.
            const float inverse = 1.f / columns;
#pragma unroll
            for (int l = 0; l < L; ++l) totals[l].origin = 0.f;
#pragma unroll
            for (int i = 0; i < kStrip * L; ++i) {
              if (i / L < columns) totals[i % L].origin += y[i] * inverse;
            }
          }
          // Of a row in float32, of all rows in float64.
          float sum[L] = {}, squares[L] = {};
#pragma unroll
          for (int i = 0; i < kStrip * L; ++i) {
            const float delta = i / L < columns ? y[i] - totals[i % L].origin : 0.f;
            sum[i % L] += delta;
            squares[i % L] = fmaf(delta, delta, squares[i % L]);
          }
#pragma unroll
          for (int l = 0; l < L; ++l) {
            totals[l].sum += sum[l];
            totals[l].squares += squares[l];
          }
        }
      });
      if (!kTraining && a.pooled != nullptr) {
        const int64_t part =
            ((first_n + image) * tiling.segments + segment) * tiling.strips + strip;
        store(a.pooled + part * shape.channels + channel, pooled);
      }
      source.window += shape.in_h * source.row_stride;
      out += shape.out_h * out_row_stride;
    }
  }

  if constexpr (kTraining) {
    if (a.moments == nullptr) return;
    __syncthreads();
    double* const shared = reinterpret_cast<double*>(filters);  // [unit][count, mean, M2][channel]
    const double count = active ? static_cast<double>(images) * rows * columns : 0.;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const Moments moments = totals[l].moments(count);
      double* const p = shared + unit * 3 * block_channels + lane * L + l;
      p[0] = moments.count;
      p[block_channels] = moments.mean;
      p[2 * block_channels] = moments.m2;
    }
    __syncthreads();
    const int64_t slots = int64_t{tiling.unit_blocks} * tiling.segments;
    double* const out =
        a.moments + (int64_t{unit_block} * tiling.segments + segment) * shape.channels;
    for (int i = threadIdx.x; i < block_channels; i += blockDim.x) {
      const int c = first_channel + i;
      if (c >= shape.channels) continue;
      Moments all;
      for (int u = 0; u < tiling.units; ++u) {
        const double* const p = shared + u * 3 * block_channels + i;
        all.merge({p[0], p[block_channels], p[2 * block_channels]});
      }
      out[c] = all.count;
      out[slots * shape.channels + c] = all.mean;
      out[2 * slots * shape.channels + c] = all.m2;
    }
  }
}

}  // namespace effnet::cuda
