// Depthwise convolution forward on dense NHWC tensors.
//
// A thread owns a lane of L channels (two, or one where their number or the pointers are odd) of a
// strip of outputs (depthwise_strip.cuh) in one image after another. Neighbouring threads are
// neighbouring lanes, so that a warp reads and writes whole 128-byte lines; the columns that
// neighbouring strips share, and the rows that neighbouring segments do, come from the L2 cache. No
// thread waits for another.
//
//     threadIdx.x = unit in block * lanes + lane          unit = group of images * strips + strip
#pragma once

#include <utility>

#include "depthwise_strip.cuh"
#include "moments.cuh"

namespace effnet::cuda {

// Blocks that a multiprocessor is to hold: they leave a thread 128 and 168 registers.
template <int K, int S>
constexpr int kStripBlocks = K == 3 && S == 1 ? 4 : 3;

// Block index: channel block fastest (neighbours read the same lines), then segment, then units.
struct StripTiling {
  int channel_blocks, lanes;  // of a block
  int units;                  // of a block
  int strips;                 // of an image
  int segments, segment_rows;
  int images;  // of a unit, one after another
  int unit_blocks;
};

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

// The rows of a strip's window that exist, image by image, through the ring and the prologue.
template <class Sizes>
struct StripInput {
  using T = typename Sizes::T;
  using Raw = typename Sizes::Raw;
  static constexpr int L = Sizes::L;

  const char* next;         // column 0, there or not, of the row that is copied next
  int64_t row_bytes, rest;  // of a row; from behind an image's last row to the next one's first
  uint32_t column_bytes;
  int rows, rows_left;  // of an image; those of the current one that are not yet copied
  int images_left;
  int columns;                // bit j: column j exists
  Raw* ring;                  // the thread's slot (0, 0) of (kStages, kColumns, kStripThreads)
  int copied = 0, taken = 0;  // slots: the stages that come next
  bool has_prologue;
  Activation activation;
  Floats<L> scale, shift;

  // Starts on as many rows as there are stages but one.
  EFFNET_DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < Sizes::kStages * Sizes::kColumns; ++i) {
      // Never copied: stays zero.
      if (!(columns >> i % Sizes::kColumns & 1)) ring[i * kStripThreads] = {};
    }
#pragma unroll 1
    for (int i = 1; i < Sizes::kStages; ++i) copy_row();
  }

  // The next row's float32 values.
  EFFNET_DEVICE void take(typename Sizes::Row& x) {
    wait_for_copy_groups<Sizes::kStages - 2>();
    const Raw* const stage = ring + taken;
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) x[j] = unpack<T, L>(stage[j * kStripThreads]);
    taken = following(taken);
    copy_row();  // where the row before this one was
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

 private:
  static EFFNET_DEVICE int following(int stage) {
    stage += Sizes::kStageSlots;
    return stage == Sizes::kStages * Sizes::kStageSlots ? 0 : stage;
  }

  EFFNET_DEVICE void copy_row() {
    if (images_left > 0) {
      copy_columns(std::make_integer_sequence<int, Sizes::kColumns>{});
      copied = following(copied);
      next += row_bytes;
      if (--rows_left == 0) {
        rows_left = rows;
        next += rest;
        --images_left;
      }
    }
    commit_copies();
  }

  template <int... kColumn>
  EFFNET_DEVICE void copy_columns(std::integer_sequence<int, kColumn...>) {
    const int existing = opaque(columns);
    Raw* const stage = ring + copied;
    if constexpr (sizeof(Raw) >= 4) {
      const SharedAddress to = shared_address(stage);
      (copy_async_if<sizeof(Raw), kColumn * kStripThreads* static_cast<int>(sizeof(Raw))>(
           existing & 1 << kColumn, to, column(kColumn)),
       ...);
    } else {
      ((existing & 1 << kColumn
            ? static_cast<void>(stage[kColumn * kStripThreads] =
                                    *reinterpret_cast<const Raw*>(column(kColumn)))
            : static_cast<void>(0)),
       ...);
    }
  }

  EFFNET_DEVICE const char* column(int j) const { return next + uint64_t{column_bytes} * j; }
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

  // The filters and the ring; after the walk, in training, the units' moments.
  float* const filters = shared_floats();
  const int block_channels = tiling.lanes * L;
  {
    const int channels = min(shape.channels - first_channel, block_channels);
    const T* const from = a.weight + static_cast<int64_t>(first_channel) * K * K;
    for (int i = threadIdx.x; i < channels * K * K; i += blockDim.x) {
      filters[i % (K * K) * Sizes::kFilterPitch + i / (K * K)] = to_float(from[i]);
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
    const int first_h = first_oh * S - shape.pad_top;
    const StripRows window = StripRows::of<K, S>(rows, first_h, shape.in_h);
    StripInput<Sizes> source;
    source.column_bytes = static_cast<uint32_t>(shape.channels) * sizeof(T);
    source.row_bytes = static_cast<int64_t>(shape.in_w) * source.column_bytes;
    source.rows = source.rows_left = window.end - window.begin;
    source.rest = (shape.in_h - source.rows) * source.row_bytes;
    source.images_left = images;
    int existing = 0;
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) {
      const bool exists = static_cast<unsigned>(first_w + j) < static_cast<unsigned>(shape.in_w);
      existing |= static_cast<int>(exists) << j;
    }
    source.columns = opaque(existing);
    source.next = reinterpret_cast<const char*>(
        a.input +
        ((first_n * shape.in_h + first_h + window.begin) * shape.in_w + first_w) *
            static_cast<int64_t>(shape.channels) +
        channel);
    source.ring = reinterpret_cast<typename Sizes::Raw*>(reinterpret_cast<char*>(filters) +
                                                         Sizes::kFilterBytes) +
                  threadIdx.x;
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
        shift[l] = norm.shift();
      }
    }
    source.begin();
    const int64_t out_row_stride = static_cast<int64_t>(shape.out_w) * shape.channels;
    T* out = a.output +
             ((first_n * shape.out_h + first_oh) * shape.out_w + first_ow) *
                 static_cast<int64_t>(shape.channels) +
             channel;
    bool first = true;  // of the rows of outputs
#pragma unroll 1
    for (int image = 0; image < images; ++image) {
      Floats<L> pooled = broadcast<L>(0.f);
      walk_strip<Sizes>(window, filters + lane * L, source, [&](typename Sizes::Outputs& y) {
        if constexpr (!kTraining) {
#pragma unroll
          for (int i = 0; i < kStrip * L; ++i) y[i] = fmaf(y[i], scale[i % L], shift[i % L]);
          y = activate<Math<T, kStrip * L>>(a.activation, y);
        }
        T* p_out = out;
        out += out_row_stride;
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
          if (first) {
            first = false;
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
        // Once an image: not aligned to two, as the tensors of pixels are.
#pragma unroll
        for (int l = 0; l < L; ++l) a.pooled[part * shape.channels + channel + l] = pooled[l];
      }
      out += (shape.out_h - rows) * out_row_stride;
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
