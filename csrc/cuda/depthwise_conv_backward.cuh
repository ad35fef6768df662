// The gradients of a depthwise convolution on dense NHWC tensors.
//
// Tile. A thread block takes 32 channels and a band of columns, and walks down the rows of one
// image after another, kPatchH rows a step:
//
//        band of columns
//      +-----+-----+-----+
//      |  0  |  1  |  2  |  kPatchH rows, one step. A patch is kPatchH x kPatchW pixels.
//      +-----+-----+-----+
//      |  0  |  1  |  2  |  the next step
//      +-----+-----+-----+
//
// The rows that a step reads lie in shared memory as float32, in a ring of kRows rows of `columns`
// x 32 channels. Every element is loaded (16 bytes a thread), converted, sent through the
// derivative of BN + activation, and written there once; padding is written as zeros, so that the
// convolution itself has no bounds to check. While a step is computed, the rows of the next one are
// on their way in registers.
//
// A thread owns a patch and one of the 32 channels, whose k * k weights it keeps in registers: an
// element read from shared memory meets up to k * k multiply-adds of either gradient.
//
// The number of instantiations is kept down to storage type x vector width x k x stride: what else
// varies (activation, prologue) is the same for a whole launch and costs one predicted branch a
// vector or a patch.
//
// Vector width V is 16 bytes' worth of elements. Where C is no multiple of that or a pointer is not
// aligned, the same templates run with V = 1.
#pragma once

#include "depthwise_window.cuh"
#include "vector.cuh"

namespace effnet::cuda {

constexpr int kBlockChannels = 32;
constexpr int kMaxBlockThreads = 128;

// How the work is cut into blocks: `rows` and `columns` below are those of the tensor whose patches
// the threads own. Block index: channel block fastest (neighbours read
// the same pixels), then band, then segment, then chunk of images.
struct DepthwiseTiling {
  int channel_blocks;
  int patches;   // in a block, side by side: blockDim.x = patches * kBlockChannels
  int bands;     // of patches * kPatchW columns
  int segments;  // of segment_rows rows each, a multiple of kPatchH
  int segment_rows;
  int64_t images;  // in a block, one after another
  int64_t chunks;  // of images
};

// A block's place in a tiling.
struct DepthwiseBlock {
  int channel, band, segment;
  int64_t chunk;

  template <class Tiling>
  EFFNET_DEVICE explicit DepthwiseBlock(const Tiling& tiling) {
    int block = blockIdx.x;
    channel = (block % tiling.channel_blocks) * kBlockChannels;
    block /= tiling.channel_blocks;
    band = block % tiling.bands;
    block /= tiling.bands;
    segment = block % tiling.segments;
    chunk = block / tiling.segments;
  }

  // Of the per-block partial results.
  template <class Tiling>
  EFFNET_DEVICE int64_t slot(const Tiling& tiling) const {
    return (chunk * tiling.segments + segment) * tiling.bands + band;
  }
};

// What type, vector width, kernel size and stride fix. Patches lie on grad_input, their windows on
// grad_conv.
template <class T, int V, int K, int S>
struct BackwardSizes {
  static constexpr int kPatchH = 2 * S;
  static constexpr int kPatchPixels = kPatchH * kPatchW;
  static constexpr int kStepRows = 2;            // the window moves down by
  static constexpr int kStepCols = kPatchW / S;  // from one patch's window to the next one's
  static constexpr int kRows = (2 * S - 1) / S + (K - 1) / S + 1;  // of the window, and of the ring
  static constexpr int kCols = (kPatchW - 1) / S + (K - 1) / S + 1;  // of the window
  static constexpr int kMaxPatches = kMaxBlockThreads / kBlockChannels;
  static constexpr int kVectors = kBlockChannels / V;
  static constexpr int kMinBlocks = K == 3 || (K == 5 && S == 1) ? 3 : 2;
  static constexpr int kConstants = 6 * kBlockChannels;
  // Vectors that a thread has in flight of each tensor: its share of a step for a wide band, in up
  // to kInFlight registers.
  static constexpr int kInFlight = K == 3 ? 16 : 4;
  static constexpr int kBatchWanted =
      (kStepRows * kStepCols * kVectors * 5 + kBlockChannels * 4 - 1) / (kBlockChannels * 4);
  static constexpr int kBatchMost = kInFlight * 4 / (V == 1 ? 4 : 16);
  static constexpr int kBatch = kBatchWanted < kBatchMost ? kBatchWanted : kBatchMost;

  static_assert(kStepRows <= kRows, "a step may not outrun the ring");

  static EFFNET_INLINE constexpr int columns(int patches) {
    return (patches - 1) * kStepCols + kCols;
  }
  // Also the room for the weights before the walk and for the sums after it.
  static EFFNET_INLINE constexpr int tile_floats(int patches) {
    const int tile = kRows * columns(patches) * kBlockChannels;
    const int weights = K * K * (kBlockChannels + 1);
    const int sums = K * patches * kBlockChannels;
    const int most = tile > weights ? tile : weights;
    return ((most > sums ? most : sums) + 3) / 4 * 4;
  }
  static constexpr size_t shared_bytes(int patches) {
    return (tile_floats(patches) + kConstants) * sizeof(float);
  }
};

// Where the 32 channels of a pixel lie in shared memory. A thread that stages 8 channels writes two
// float4; the first halves of all vectors come first and the second halves after them, so that
// neighbouring threads write neighbouring float4 and no bank is hit twice.
template <int V>
EFFNET_DEVICE int position_of_channel(int channel) {
  if constexpr (V == 8) {
    return (channel & 4) * (kBlockChannels / 8) + (channel >> 3) * 4 + (channel & 3);
  } else {
    return channel;
  }
}

template <int V>
EFFNET_DEVICE int channel_at_position(int position) {
  if constexpr (V == 8) {
    const int half = position >> 4;
    return ((position & 15) >> 2) * 8 + half * 4 + (position & 3);
  } else {
    return position;
  }
}

// Channels of a pixel that are handled together between global and shared memory: a vector is
// staged in parts of four, which holds half the registers of eight.
template <int V>
constexpr int kPart = V < 4 ? V : 4;

// Where part `part` of vector `vector` of a pixel's channels begins.
template <int V>
EFFNET_DEVICE int part_position(int vector, int part) {
  return part * (kBlockChannels / 2) + vector * kPart<V>;
}

template <int N>
EFFNET_DEVICE Floats<N> load_shared(const float* p) {
  Floats<N> x;
  if constexpr (N == 4) {
    const float4 quad = *reinterpret_cast<const float4*>(p);
    x[0] = quad.x;
    x[1] = quad.y;
    x[2] = quad.z;
    x[3] = quad.w;
  } else if constexpr (N == 2) {
    const float2 pair = *reinterpret_cast<const float2*>(p);
    x[0] = pair.x;
    x[1] = pair.y;
  } else {
    x[0] = *p;
  }
  return x;
}

template <int N>
EFFNET_DEVICE void store_shared(float* p, const Floats<N>& x) {
  if constexpr (N == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    *p = x[0];
  }
}

// Walks the window down: stages its first kRows rows, then computes each of `steps` steps while the
// kStepRows rows of the next one are loaded.
//   source.load(row, column) -> Raw      an element of the staged tensor, from global memory
//   source.value(raw, part, row, column) the float32 values to keep, zero outside the image
//   compute(step, head)                  head: the ring's row where the window starts
// Ends with a barrier: the tile may be reused.
template <class Sizes, int V, class Source, class Compute>
EFFNET_DEVICE void walk_rows(float* tile, int columns, int steps, const Source& source,
                             const Compute& compute) {
  // A thread stages the same vector of channels of every stride-th pixel of the rows.
  const int vector = static_cast<int>(threadIdx.x) % Sizes::kVectors;
  const int first = static_cast<int>(threadIdx.x) / Sizes::kVectors;
  const int stride = static_cast<int>(blockDim.x) / Sizes::kVectors;
  const int first_row = first / columns, first_column = first % columns;
  const int stride_rows = stride / columns, stride_columns = stride % columns;
  const auto advance = [&](int& row, int& column) {
    row += stride_rows;
    column += stride_columns;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  };

  int head = 0;
  for (int step = -1; step < steps; ++step) {
    const int staged = step + 1 == steps ? 0 : step < 0 ? Sizes::kRows : Sizes::kStepRows;
    const int origin = step < 0 ? 0 : Sizes::kRows + step * Sizes::kStepRows;
    int load_row = first_row, load_column = first_column;
    int store_row = first_row, store_column = first_column;
    bool computed = false;
    do {
      typename Source::Raw raw[Sizes::kBatch];
#pragma unroll
      for (int i = 0; i < Sizes::kBatch; ++i) {
        if (load_row < staged) raw[i] = source.load(origin + load_row, load_column);
        advance(load_row, load_column);
      }
      if (!computed) {
        computed = true;
        if (step >= 0) compute(step, head);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < Sizes::kBatch; ++i) {
        if (store_row < staged) {
          int slot = head + store_row;
          if (slot >= Sizes::kRows) slot -= Sizes::kRows;
          float* pixel = tile + (slot * columns + store_column) * kBlockChannels;
#pragma unroll
          for (int part = 0; part < V / kPart<V>; ++part) {
            store_shared(pixel + part_position<V>(vector, part),
                         source.value(raw[i], part, origin + store_row, store_column));
          }
        }
        advance(store_row, store_column);
      }
    } while (load_row < staged);
    __syncthreads();
    if (step >= 0) {
      head += Sizes::kStepRows;
      if (head >= Sizes::kRows) head -= Sizes::kRows;
    }
  }
}

// The weights of a thread's channel, as float32 in registers. They come through shared memory so
// that global loads are contiguous; its row pitch of 33 keeps the transposed writes off one bank.
template <int V, int K, class T>
EFFNET_DEVICE void load_weights(float (&w)[K * K], float* shared, const T* __restrict__ weight,
                                int first_channel, int channels, int position) {
  constexpr int kTaps = K * K;
  constexpr int kPitch = kBlockChannels + 1;
  const T* block = weight + static_cast<int64_t>(first_channel) * kTaps;
  for (int i = threadIdx.x; i < kBlockChannels * kTaps; i += blockDim.x) {
    const int channel = i / kTaps;
    shared[(i % kTaps) * kPitch + position_of_channel<V>(channel)] =
        first_channel + channel < channels ? to_float(block[i]) : 0.f;
  }
  __syncthreads();
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    w[tap] = shared[tap * kPitch + position];
  }
  __syncthreads();
}

// Recomputes grad_conv from grad_output and the saved convolution. Constants of the block's
// channels, by position, 32 floats each: mean, scale, bias, mean_du, slope, grad_pooled.
template <class T, int V>
struct GradConvSource {
  struct Raw {
    Vector<T, V> grad, conv;
  };

  const T* grad_output;  // of the image, at this thread's vector of channels
  const T* conv;
  int64_t row_stride;
  int column_stride;
  int out_h, out_w, first_oh, first_ow;
  bool active;
  const float* constants;
  int vector;
  Activation activation;

  EFFNET_DEVICE bool inside(int row, int column) const {
    return active && static_cast<unsigned>(first_oh + row) < static_cast<unsigned>(out_h) &&
           static_cast<unsigned>(first_ow + column) < static_cast<unsigned>(out_w);
  }

  EFFNET_DEVICE Raw load(int row, int column) const {
    Raw raw{};
    if (inside(row, column)) {
      const int64_t offset =
          (first_oh + row) * row_stride + static_cast<int64_t>(first_ow + column) * column_stride;
      raw.grad = load_vector<V>(grad_output + offset);
      raw.conv = load_vector<V>(conv + offset);
    }
    return raw;
  }

  EFFNET_DEVICE Floats<kPart<V>> value(const Raw& raw, int part, int row, int column) const {
    constexpr int N = kPart<V>;
    if (!inside(row, column)) return broadcast<N>(0.f);
    const auto constant = [&](int i) {
      return load_shared<N>(constants + i * kBlockChannels + part_position<V>(vector, part));
    };
    const Floats<N> d = unpack<T, N>(slice<T, N>(raw.conv, part)) - constant(0);
    const Floats<N> scale = constant(1);
    const Floats<N> du = (unpack<T, N>(slice<T, N>(raw.grad, part)) + constant(5)) *
                         activate_grad<Math<T, N>>(activation, multiply_add(d, scale, constant(2)));
    return scale * (du - constant(3) - d * constant(4));
  }
};

template <class T, class Tiling = DepthwiseTiling>
struct BackwardArguments {
  ConvShape shape;
  Tiling tiling;
  const T* __restrict__ grad_output;
  const float* __restrict__ grad_pooled;  // or null
  const T* __restrict__ conv;
  BatchNorm bn;
  Activation activation;
  // Batch statistics: the finished gradients of BN's weight and bias; null without.
  const float* __restrict__ grad_bn_weight;
  const float* __restrict__ grad_bn_bias;
  const T* __restrict__ input;
  const T* __restrict__ weight;
  Prologue prologue;
  T* __restrict__ grad_input;            // or null
  float* __restrict__ partial_weight;    // (K * K, slots, C), or null
  float* __restrict__ partial_prologue;  // (2, slots, C): of scale and of shift, or null
};

// The first row (or column) of the backward kernel's patches in padded coordinates: the last
// multiple of the stride that is at or before the first pixel, so that the parity of every pixel of
// a patch is known at compile time.
EFFNET_INLINE int first_padded(int pad, int stride) { return pad / stride * stride; }

// With u = bn(z), du = (grad_output + grad_pooled) * activate'(u), M = N * OH * OW:
//   dz = scale * (du - grad_bn_bias / M - xhat * grad_bn_weight / M)    (batch statistics)
//   dz = scale * du                                                    (running statistics)
//   dp[n, h, w, c] = sum_ij dz[n, (h + pad_top - i) / S, (w + pad_left - j) / S, c] * weight[c, i,
//   j] grad_weight[c, i, j] = sum_nhw p[n, h, w, c] * dz[n, (h + pad_top - i) / S, ...]
// over the i, j for which the division leaves no rest. Both sums run over the same pairs of pixel
// and tap, so one pass computes both: dz comes from shared memory, where it was computed once an
// element, p from the thread's own pixels. With a prologue v = input * scale + shift, p = act(v):
//   dv = dp * act'(v);  grad_input = dv * scale;  grad of scale = sum dv * input, of shift = sum dv
// A patch is 2 * S x 4 pixels of grad_input. Three tensors read, one written.
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kMaxBlockThreads, (BackwardSizes<T, V, K, S>::kMinBlocks))
    depthwise_conv_backward_kernel(const BackwardArguments<T> a) {
  using Sizes = BackwardSizes<T, V, K, S>;
  constexpr int kPatchH = Sizes::kPatchH;
  constexpr int kPixels = Sizes::kPatchPixels;
  constexpr int kReach = (K - 1) / S;  // rows of the window before the patch's first row
  using RowMath = Math<T, kPatchW>;

  const ConvShape& shape = a.shape;
  const DepthwiseBlock block(a.tiling);
  const int columns = Sizes::columns(a.tiling.patches);
  const int position = static_cast<int>(threadIdx.x) % kBlockChannels;
  const int patch = static_cast<int>(threadIdx.x) / kBlockChannels;
  const int channel = block.channel + channel_at_position<V>(position);
  const bool active = channel < shape.channels;

  float* tile = shared_floats();
  float* constants = tile + Sizes::tile_floats(a.tiling.patches);

  float w[K * K];
  load_weights<V, K>(w, tile, a.weight, block.channel, shape.channels, position);
  float grad_w[K * K] = {};

  for (int i = threadIdx.x; i < kBlockChannels; i += blockDim.x) {
    const int c = block.channel + i;
    if (c >= shape.channels) continue;
    const ChannelNorm norm = channel_norm<T>(a.bn, c);
    float* constant = constants + position_of_channel<V>(i);
    constant[0] = norm.mean;
    constant[kBlockChannels] = norm.scale;
    constant[2 * kBlockChannels] = norm.bias;
    float mean_du = 0.f, slope = 0.f;
    if (a.grad_bn_weight != nullptr) {
      const float count = static_cast<float>(shape.batch * shape.out_h * shape.out_w);
      mean_du = a.grad_bn_bias[c] / count;
      slope = a.grad_bn_weight[c] / count * norm.invstd;
    }
    constant[3 * kBlockChannels] = mean_du;
    constant[4 * kBlockChannels] = slope;
  }

  const bool has_prologue = a.prologue.scale != nullptr;
  float scale = 1.f, shift = 0.f, grad_scale = 0.f, grad_shift = 0.f;
  if (has_prologue && active) {
    scale = static_cast<const float*>(a.prologue.scale)[channel];
    shift = static_cast<const float*>(a.prologue.shift)[channel];
  }

  // Rows and columns of the patches, as padded coordinates less those of the first patch.
  const int first_h = first_padded(shape.pad_top, S) - shape.pad_top;
  const int first_w = first_padded(shape.pad_left, S) - shape.pad_left;
  const int first_row = block.segment * a.tiling.segment_rows;
  const int last_row = min(first_row + a.tiling.segment_rows, shape.in_h - first_h);
  const int first_column = (block.band * a.tiling.patches + patch) * kPatchW;
  const int steps = (last_row - first_row + kPatchH - 1) / kPatchH;
  const int64_t column_stride = shape.channels;
  const int64_t row_stride = shape.in_w * column_stride;

  const int vector = static_cast<int>(threadIdx.x) % Sizes::kVectors;
  GradConvSource<T, V> source;
  source.column_stride = shape.channels;
  source.row_stride = shape.out_w * column_stride;
  source.out_h = shape.out_h;
  source.out_w = shape.out_w;
  source.first_oh = (first_padded(shape.pad_top, S) + first_row) / S - kReach;
  source.first_ow =
      (first_padded(shape.pad_left, S) + block.band * a.tiling.patches * kPatchW) / S - kReach;
  source.active = block.channel + vector * V < shape.channels;
  source.constants = constants;
  source.vector = vector;
  source.activation = a.activation;

  // Which pixels of the thread's patch exist: none of an inactive thread or beyond the last step.
  const int first_p = max(0, -first_w - first_column);
  const int last_p = active ? min(kPatchW, shape.in_w - first_w - first_column) : 0;
  struct Inside {
    int first_r, last_r, first_p, last_p;
    EFFNET_DEVICE bool operator()(int r, int p) const {
      return r >= first_r && r < last_r && p >= first_p && p < last_p;
    }
  };
  const auto inside_of = [&](int step) {
    const int row = first_row + step * kPatchH;
    return Inside{max(0, -first_h - row), min(kPatchH, last_row - row), first_p, last_p};
  };

  const int64_t first_n = block.chunk * a.tiling.images;
  const int64_t last_n = min(first_n + a.tiling.images, shape.batch);
  for (int64_t n = first_n; n < last_n; ++n) {
    // The barriers of walk_rows lie between this and the reads of the image before and of this one.
    for (int i = threadIdx.x; i < kBlockChannels; i += blockDim.x) {
      if (block.channel + i < shape.channels) {
        constants[5 * kBlockChannels + position_of_channel<V>(i)] =
            a.grad_pooled == nullptr ? 0.f : a.grad_pooled[n * shape.channels + block.channel + i];
      }
    }
    const int64_t image_out = n * shape.out_h * source.row_stride + block.channel + vector * V;
    source.grad_output = a.grad_output + image_out;
    source.conv = a.conv + image_out;
    const int64_t image = (n * shape.in_h + first_h + first_row) * row_stride +
                          (first_w + first_column) * column_stride + channel;

    // The thread's own pixels are loaded a step ahead, like the rows of the window.
    Vector<T, 1> ahead[kPixels];
    const auto load_pixels = [&](int step) {
      const Inside inside = inside_of(step);
      const T* row = a.input + image + step * kPatchH * row_stride;
#pragma unroll
      for (int r = 0; r < kPatchH; ++r) {
#pragma unroll
        for (int p = 0; p < kPatchW; ++p) {
          ahead[r * kPatchW + p] = Vector<T, 1>{};
          if (inside(r, p)) ahead[r * kPatchW + p] = load_vector<1>(row + p * shape.channels);
        }
        row += row_stride;
      }
    };
    load_pixels(0);

    walk_rows<Sizes, V>(tile, columns, steps, source, [&](int step, int head) {
      const Inside inside = inside_of(step);
      Floats<kPixels> pixel, dp = broadcast<kPixels>(0.f);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) pixel[i] = unpack<T, 1>(ahead[i])[0];
      load_pixels(step + 1);
      if (has_prologue) {
#pragma unroll
        for (int r = 0; r < kPatchH; ++r) {
          Floats<kPatchW> v = slice<kPatchW>(pixel, r);
#pragma unroll
          for (int p = 0; p < kPatchW; ++p) v[p] = fmaf(v[p], scale, shift);
          v = activate<RowMath>(a.prologue.activation, v);
#pragma unroll
          for (int p = 0; p < kPatchW; ++p) v[p] = inside(r, p) ? v[p] : 0.f;
          set_slice(pixel, r, v);
        }
      }

      const float* window = tile + patch * Sizes::kStepCols * kBlockChannels + position;
      const int pitch = columns * kBlockChannels;
      const float* const last_line = window + (Sizes::kRows - 1) * pitch;
      const float* line = window + head * pitch;
#pragma unroll
      for (int row = 0; row < Sizes::kRows; ++row) {
        Floats<Sizes::kCols> dz;
#pragma unroll
        for (int col = 0; col < Sizes::kCols; ++col) dz[col] = line[col * kBlockChannels];
#pragma unroll
        for (int r = 0; r < kPatchH; ++r) {
          const int i = r - (row - kReach) * S;
          if (i < 0 || i >= K) continue;
#pragma unroll
          for (int p = 0; p < kPatchW; ++p) {
#pragma unroll
            for (int col = 0; col < Sizes::kCols; ++col) {
              const int j = p - (col - kReach) * S;
              if (j < 0 || j >= K) continue;
              float& sum = dp[r * kPatchW + p];
              sum = fmaf(dz[col], w[i * K + j], sum);
              float& sum_w = grad_w[i * K + j];
              sum_w = fmaf(dz[col], pixel[r * kPatchW + p], sum_w);
            }
          }
        }
        line = line == last_line ? window : line + pitch;
      }

      if (a.grad_input == nullptr) return;
      const T* row_in = a.input + image + step * kPatchH * row_stride;
      T* row_out = a.grad_input + image + step * kPatchH * row_stride;
#pragma unroll
      for (int r = 0; r < kPatchH; ++r) {
        Floats<kPatchW> y = slice<kPatchW>(dp, r);
        if (has_prologue) {
          // Loaded again, from L1 or L2: registers to hold it would cost occupancy.
          Floats<kPatchW> x = broadcast<kPatchW>(0.f), v;
#pragma unroll
          for (int p = 0; p < kPatchW; ++p) {
            if (inside(r, p)) x[p] = to_float(row_in[p * shape.channels]);
            v[p] = fmaf(x[p], scale, shift);
          }
          y = y * activate_grad<RowMath>(a.prologue.activation, v);
#pragma unroll
          for (int p = 0; p < kPatchW; ++p) {
            if (inside(r, p)) {
              grad_scale = fmaf(y[p], x[p], grad_scale);
              grad_shift += y[p];
            }
            y[p] *= scale;
          }
        }
#pragma unroll
        for (int p = 0; p < kPatchW; ++p) {
          if (inside(r, p)) row_out[p * shape.channels] = from_float<T>(y[p]);
        }
        row_in += row_stride;
        row_out += row_stride;
      }
    });
  }

  // Sums over the patches of the block, first to last, a row of taps at a time.
  const int64_t slots = a.tiling.chunks * a.tiling.segments * a.tiling.bands;
  const int64_t slot = block.slot(a.tiling);
  const auto write_sums = [&](int count, int64_t first_plane, float* partial) {
    __syncthreads();
    for (int i = threadIdx.x; i < count * kBlockChannels; i += blockDim.x) {
      float sum = 0.f;
      for (int p = 0; p < a.tiling.patches; ++p) sum += tile[p * count * kBlockChannels + i];
      const int c = block.channel + channel_at_position<V>(i % kBlockChannels);
      if (c < shape.channels) {
        partial[((first_plane + i / kBlockChannels) * slots + slot) * shape.channels + c] = sum;
      }
    }
    __syncthreads();
  };
  if (a.partial_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        tile[(patch * K + j) * kBlockChannels + position] = grad_w[i * K + j];
      }
      write_sums(K, i * K, a.partial_weight);
    }
  }
  if (a.partial_prologue != nullptr) {
    tile[patch * 2 * kBlockChannels + position] = grad_scale;
    tile[(patch * 2 + 1) * kBlockChannels + position] = grad_shift;
    write_sums(2, 0, a.partial_prologue);
  }
}

}  // namespace effnet::cuda
