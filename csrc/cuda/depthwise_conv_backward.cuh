// The gradients of a depthwise convolution on dense NHWC tensors.
//
// A thread owns a lane of L channels (two, or one where their number or the pointers are odd) of a
// strip of kStrip pixels of the input, and walks down the strip's rows in one image after another,
// S rows a step. Neighbouring threads are neighbouring lanes. In a step the thread
//
//   - computes the row of grad_conv that the step's pixels reach first, over the kColumns columns
//     that the strip reaches, from grad_output and the saved convolution;
//   - computes its own pixels through the prologue;
//   - adds every product of a pixel and a tap to both gradients: a pixel of the input and one of
//     grad_conv that meet in tap (i, j) do so for grad_input as for grad_weight.
//
//     grad_conv  row o - 2   z z z z z z z z z
//                row o - 1   z z z z z z z z z    the kOlder rows before: in shared memory
//                row o       z z z z z z z z z    this step's
//     input      row o         x x x x x x x      with K = 3, S = 1 in padded coordinates
//
// A pixel of the input is loaded once, a pixel of grad_conv once and again where strips meet; both
// while the step before is computed, into this thread's part of shared memory. What a thread keeps
// there is its own: no thread waits for another until the sums of grad_weight are added up.
#pragma once

#include "depthwise_conv_forward.cuh"
#include "depthwise_ring.cuh"
#include "rows.cuh"

namespace effnet::cuda {

// What type, lanes, kernel size and stride fix.
template <class T_, int L_, int K_, int S_>
struct BackwardSizes {
  using T = T_;
  static constexpr int L = L_, K = K_, S = S_;
  static constexpr int kStrip = K == 7 ? 4 : S == 1 ? 7 : 8;
  static constexpr int kOlder = (K - 1) / S;  // rows (columns) of grad_conv before a pixel's own
  static constexpr int kColumns = (kStrip - 1) / S + kOlder + 1;  // of grad_conv
  static_assert(kStrip % S == 0, "the parity of a strip's pixels is known at compile time");

  // Most of a block. Shared memory is to have room on every device, and for kBlocks blocks on those
  // that have 228 KB; registers leave a thread 128, 168 and 255.
  static constexpr int kThreads = K == 3 ? 128 : K == 7 || sizeof(T) == 4 ? 64 : 120;
  static constexpr int kBlocks = (K == 3 ? 16 : K == 5 ? 12 : 8) / ((kThreads + 31) / 32);

  // Shared memory: filters [tap][channel] and constants [7][channel] of the block's channels; of
  // each thread the older rows of grad_conv, float32, and what is loaded ahead.
  static constexpr int kBlockChannels = kThreads * L;
  static constexpr int kConstants = 7;
  static constexpr int kFilterBytes = K * K * kBlockChannels * sizeof(T);
  static constexpr int kConstantBytes = kConstants * kBlockChannels * sizeof(float);
  static constexpr int kRingBytes = kOlder * kColumns * kThreads * sizeof(Floats<L>);
  static constexpr int kAhead = 2 * kColumns + S * kStrip;
  static constexpr size_t kSharedBytes =
      kFilterBytes + kConstantBytes + kRingBytes + kAhead * kThreads * sizeof(Vector<T, L>);
  static_assert(kSharedBytes >= K * kBlockChannels * sizeof(float), "room for sums of grad_weight");
};

template <class T>
struct BackwardArguments {
  ConvShape shape;
  StripTiling tiling;  // of the input in padded coordinates; rows are steps
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

// The first row (or column) of the walk in padded coordinates: the last multiple of the stride that
// is at or before the first pixel, so that the parity of every pixel is known at compile time.
EFFNET_INLINE int first_padded(int pad, int stride) { return pad / stride * stride; }

// The products of a row of a strip's pixels x with the row of grad_conv that it meets in tap row i:
// adds them to the pixels' gradients, and to the gradients of the taps.
//   row(d)   column d of grad_conv
//   filter   tap (i, 0), at the lane's channels
template <class Sizes, class Row, int N>
EFFNET_DEVICE void multiply_tap_row(Floats<N>& grad, Floats<Sizes::K * Sizes::L>& grad_taps,
                                    const Floats<N>& x, const typename Sizes::T* filter,
                                    const Row& row) {
  using T = typename Sizes::T;
  constexpr int K = Sizes::K, L = Sizes::L;
  Floats<L> w[K];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    w[j] = unpack<T, L>(load_vector<L>(filter + j * Sizes::kBlockChannels));
  }
#pragma unroll
  for (int d = 0; d < Sizes::kColumns; ++d) {
    const Floats<L> z = row(d);
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int p = (d - Sizes::kOlder) * Sizes::S + j;
      if (p < 0 || p >= Sizes::kStrip) continue;
#pragma unroll
      for (int l = 0; l < L; ++l) {
        grad[p * L + l] = fmaf(z[l], w[j][l], grad[p * L + l]);
        grad_taps[j * L + l] = fmaf(z[l], x[p * L + l], grad_taps[j * L + l]);
      }
    }
  }
}

// With u = bn(z), du = (grad_output + grad_pooled) * activate'(u), M = N * OH * OW:
//   dz = scale * (du - grad_bn_bias / M - xhat * grad_bn_weight / M)    (batch statistics)
//   dz = scale * du                                                    (running statistics)
//   dp[n, h, w, c] = sum_ij dz[n, (h + pad_top - i) / S, (w + pad_left - j) / S, c] * weight[c, i,
//   j] grad_weight[c, i, j] = sum_nhw p[n, h, w, c] * dz[n, (h + pad_top - i) / S, ...]
// over the i, j for which the division leaves no rest. With a prologue v = input * scale + shift,
// p = act(v):
//   dv = dp * act'(v);  grad_input = dv * scale;  grad of scale = sum dv * input, of shift = sum dv
// dz and p are float32 throughout. Three tensors read, one written.
template <class T, int L, int K, int S>
__global__ void __launch_bounds__((BackwardSizes<T, L, K, S>::kThreads),
                                  (BackwardSizes<T, L, K, S>::kBlocks))
    depthwise_conv_backward_kernel(const __grid_constant__ BackwardArguments<T> a) {
  using Sizes = BackwardSizes<T, L, K, S>;
  constexpr int kStrip = Sizes::kStrip, kOlder = Sizes::kOlder, kColumns = Sizes::kColumns;
  constexpr int kThreads = Sizes::kThreads, kBlockChannels = Sizes::kBlockChannels;
  constexpr uint32_t kAllPixels = (1u << kStrip) - 1, kAllColumns = (1u << kColumns) - 1;
  using Pixels = Floats<kStrip * L>;
  using Raw = Vector<T, L>;
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
  const int block_channels = tiling.lanes * L;

  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  T* const filters = reinterpret_cast<T*>(shared);
  float* const constants = reinterpret_cast<float*>(shared + Sizes::kFilterBytes);
  float* const ring =
      reinterpret_cast<float*>(shared + Sizes::kFilterBytes + Sizes::kConstantBytes) +
      threadIdx.x * L;  // [row][column][thread]
  Raw* const ahead = reinterpret_cast<Raw*>(shared + Sizes::kFilterBytes + Sizes::kConstantBytes +
                                            Sizes::kRingBytes) +
                     threadIdx.x;
  Raw* const ahead_conv = ahead + kColumns * kThreads;
  Raw* const ahead_input = ahead + 2 * kColumns * kThreads;

  {
    const int channels = min(shape.channels - first_channel, block_channels);
    const T* const from = a.weight + static_cast<int64_t>(first_channel) * K * K;
    for (int i = threadIdx.x; i < channels * K * K; i += blockDim.x) {
      filters[i % (K * K) * kBlockChannels + i / (K * K)] = from[i];
    }
  }
  const bool has_prologue = a.prologue.scale != nullptr;
  for (int i = threadIdx.x; i < block_channels; i += blockDim.x) {
    const int c = first_channel + i;
    if (c >= shape.channels) continue;
    const ChannelNorm norm = channel_norm<T>(a.bn, c);
    float mean_du = 0.f, slope = 0.f;
    if (a.grad_bn_weight != nullptr) {
      const float count = static_cast<float>(shape.batch * shape.out_h * shape.out_w);
      mean_du = a.grad_bn_bias[c] / count;
      slope = a.grad_bn_weight[c] / count * norm.invstd;
    }
    float* const constant = constants + i;
    constant[0] = norm.mean;
    constant[kBlockChannels] = norm.scale;
    constant[2 * kBlockChannels] = norm.bias;
    constant[3 * kBlockChannels] = mean_du;
    constant[4 * kBlockChannels] = slope;
    if (has_prologue) {
      constant[5 * kBlockChannels] = static_cast<const float*>(a.prologue.scale)[c];
      constant[6 * kBlockChannels] = static_cast<const float*>(a.prologue.shift)[c];
    }
  }
  __syncthreads();

  Floats<K * L> grad_taps[K];
#pragma unroll
  for (int i = 0; i < K; ++i) grad_taps[i] = broadcast<K * L>(0.f);
  Floats<L> grad_scale = broadcast<L>(0.f), grad_shift = broadcast<L>(0.f);

  if (active) {
    // Rows o and columns of grad_conv, rows h = o * S + s - pad_top of the input. Step 0 is that of
    // the first row of grad_conv that the segment's first row of the input reaches; the first
    // kOlder steps have no rows of the input, those before first_step nothing at all.
    const int first_padded_h = first_padded(shape.pad_top, S);
    const int first_padded_w = first_padded(shape.pad_left, S) + strip * kStrip;
    const int first_w = first_padded_w - shape.pad_left;
    const int first_ow = first_padded_w / S - kOlder;
    const int first_o = first_padded_h / S + segment * tiling.segment_rows - kOlder;
    const int end_h = min(shape.in_h, (first_o + kOlder + tiling.segment_rows) * S - shape.pad_top);
    const int first_step = min(kOlder, max(0, -first_o));
    const int end_step = kOlder + (end_h + shape.pad_top + S - 1) / S - (first_o + kOlder);

    uint32_t pixels = 0, columns = 0;
#pragma unroll
    for (int p = 0; p < kStrip; ++p) {
      const bool exists = static_cast<unsigned>(first_w + p) < static_cast<unsigned>(shape.in_w);
      pixels |= static_cast<uint32_t>(exists) << p;
    }
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      const bool exists = static_cast<unsigned>(first_ow + d) < static_cast<unsigned>(shape.out_w);
      columns |= static_cast<uint32_t>(exists) << d;
    }
    const auto conv_row_exists = [&](int o) {
      return static_cast<unsigned>(o) < static_cast<unsigned>(shape.out_h);
    };
    const auto input_row_exists = [&](int step, int s) {
      const int h = (first_o + step) * S + s - shape.pad_top;
      return step >= kOlder && h >= 0 && h < end_h;
    };
    const auto in_row = [&] { return int64_t{opaque(shape.in_w)} * shape.channels; };
    const auto out_row = [&] { return int64_t{opaque(shape.out_w)} * shape.channels; };

    // Where the rows of a step begin, there or not.
    int step = first_step;
    int64_t in =
        ((first_n * shape.in_h + (first_o + step) * S - shape.pad_top) * shape.in_w + first_w) *
            shape.channels +
        channel;
    int64_t out =
        ((first_n * shape.out_h + first_o + step) * shape.out_w + first_ow) * shape.channels +
        channel;
    // Two groups of copies are on their way at a time: a row of grad_conv's and the input's.
    const auto load_conv_ahead = [&](int step) {
      if (conv_row_exists(first_o + step)) {
        const int stride = opaque(shape.channels);
        copy_row_ahead<kColumns, kThreads>(ahead, a.grad_output + out, stride, columns);
        copy_row_ahead<kColumns, kThreads>(ahead_conv, a.conv + out, stride, columns);
      }
      commit_copies();
    };
    const auto load_input_ahead = [&](int step) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (input_row_exists(step, s)) {
          copy_row_ahead<kStrip, kThreads>(ahead_input + s * kStrip * kThreads,
                                           a.input + in + s * in_row(), opaque(shape.channels),
                                           pixels);
        }
      }
      commit_copies();
    };
    Floats<L> pooled = broadcast<L>(0.f);
    const auto load_pooled = [&](int image) {
      if (a.grad_pooled == nullptr) return;
      const float* const p = a.grad_pooled + (first_n + image) * shape.channels + channel;
#pragma unroll
      for (int l = 0; l < L; ++l) pooled[l] = p[l];
    };

    const auto constant = [&](int i) { return load<L>(constants + i * kBlockChannels + lane * L); };

    const auto ring_row = [&](int step) { return ring + step % kOlder * kColumns * kThreads * L; };

    load_pooled(0);
    load_conv_ahead(step);
    load_input_ahead(step);
#pragma unroll 1
    for (int image = 0; image < images;) {
      const int o = first_o + step;
      const bool conv_exists = conv_row_exists(o);
      Floats<kColumns * L> dz;
      wait_for_copy_groups<1>();
      if (conv_exists) {
        const Floats<L> mean = constant(0), scale = constant(1), bias = constant(2);
        Floats<kColumns * L> z, u;
#pragma unroll
        for (int d = 0; d < kColumns; ++d) {
          const Floats<L> zero_mean = unpack<T, L>(ahead_conv[d * kThreads]) - mean;
          set_slice(z, d, zero_mean);
          set_slice(u, d, multiply_add(zero_mean, scale, bias));
        }
        u = activate_grad<Math<T, kColumns * L>>(a.activation, u);
        const Floats<L> mean_du = constant(3), slope = constant(4);
#pragma unroll
        for (int d = 0; d < kColumns; ++d) {
          const Floats<L> du = (unpack<T, L>(ahead[d * kThreads]) + pooled) * slice<L>(u, d);
          set_slice(dz, d, scale * (du - mean_du - slice<L>(z, d) * slope));
        }
        if (columns != kAllColumns) {
          const int exist = opaque(columns);
#pragma unroll
          for (int i = 0; i < kColumns * L; ++i) {
            if (!(exist >> i / L & 1)) dz[i] = 0.f;
          }
        }
      }

      // The next step's rows come while this one's are multiplied.
      {
        const bool ends = step + 1 == end_step;
        out += out_row();
        if (ends) out += (shape.out_h - (end_step - first_step)) * out_row();
        if (!ends || image + 1 < images) {
          load_conv_ahead(ends ? first_step : step + 1);
          if (ends) load_pooled(image + 1);
          wait_for_copy_groups<1>();
        } else {
          wait_for_copies();
        }
      }

#pragma unroll
      for (int s = 0; s < S; ++s) {
        const bool input_exists = input_row_exists(step, s);
        Pixels x, slope, grad = broadcast<kStrip * L>(0.f);
        const auto multiply = [&](int k, const auto& row) {
          const int i = k * S + s;
          multiply_tap_row<Sizes>(grad, grad_taps[i], x,
                                  filters + i * K * kBlockChannels + lane * L, row);
        };
        const auto multiply_older = [&](int k) {
          if (!input_exists || !conv_row_exists(o - k)) return;
          const float* const row = ring_row(step + kOlder - k);
          multiply(k, [&](int d) { return load<L>(row + d * kThreads * L); });
        };

        if (input_exists) {
#pragma unroll
          for (int p = 0; p < kStrip; ++p) {
            set_slice(x, p, unpack<T, L>(ahead_input[(s * kStrip + p) * kThreads]));
          }
          if (has_prologue) {
            const Floats<L> scale = constant(5), shift = constant(6);
#pragma unroll
            for (int p = 0; p < kStrip; ++p) {
              set_slice(x, p, multiply_add(slice<L>(x, p), scale, shift));
            }
            x = activate_with_grad<Math<T, kStrip * L>>(a.prologue.activation, x, slope);
            if (pixels != kAllPixels) {
              const int exist = opaque(pixels);
#pragma unroll
              for (int i = 0; i < kStrip * L; ++i) {
                if (!(exist >> i / L & 1)) x[i] = slope[i] = 0.f;
              }
            }
          }
        }
        // The oldest row first: this step's takes its place.
        if (kOlder * S + s < K) multiply_older(kOlder);
        if (s == 0 && conv_exists) {
          float* const row = ring_row(step);
#pragma unroll
          for (int d = 0; d < kColumns; ++d) store(row + d * kThreads * L, slice<L>(dz, d));
        }
        if (input_exists && conv_exists) multiply(0, [&](int d) { return slice<L>(dz, d); });
#pragma unroll
        for (int k = 1; k < kOlder; ++k) {
          if (k * S + s < K) multiply_older(k);
        }
        if (!input_exists) continue;

        if (has_prologue) {
          const Floats<L> scale = constant(5);
          grad = grad * slope;
          // Of a row by itself: long sums of float32 lose digits.
          Floats<L> row_scale = broadcast<L>(0.f), row_shift = broadcast<L>(0.f);
#pragma unroll
          for (int p = 0; p < kStrip; ++p) {
            const Floats<L> y = slice<L>(grad, p);
            const Floats<L> z = unpack<T, L>(ahead_input[(s * kStrip + p) * kThreads]);
            row_scale = multiply_add(y, z, row_scale);
            row_shift = row_shift + y;
            set_slice(grad, p, y * scale);
          }
          grad_scale = grad_scale + row_scale;
          grad_shift = grad_shift + row_shift;
        }
        if (a.grad_input == nullptr) continue;
        T* to = a.grad_input + in + s * in_row();
        const int stride = opaque(shape.channels);
        const auto store_row = [&](auto exists) {
#pragma unroll
          for (int p = 0; p < kStrip; ++p) {
            if (exists(p)) store(to, slice<L>(grad, p));
            to += stride;
          }
        };
        if (pixels == kAllPixels) {
          store_row([](int) { return true; });
        } else {
          const int exist = opaque(pixels);
          store_row([&](int p) { return exist >> p & 1; });
        }
      }
      in += S * in_row();
      if (++step == end_step) {
        in += (shape.in_h - (end_step - first_step) * S) * in_row();
        step = first_step;
        ++image;
      }
      if (image < images) load_input_ahead(step);
    }
  }

  // Sums over the units of the block, first to last, `count` at a time.
  float* const sums = reinterpret_cast<float*>(shared);  // [unit][count][channel]
  const int64_t slots = int64_t{tiling.unit_blocks} * tiling.segments;
  const int64_t first_slot = int64_t{unit_block} * tiling.segments + segment;
  const auto write_sums = [&](int count, int64_t first_plane, float* partial) {
    __syncthreads();
    for (int i = threadIdx.x; i < count * block_channels; i += blockDim.x) {
      float sum = 0.f;
      for (int u = 0; u < tiling.units; ++u) sum += sums[u * count * block_channels + i];
      const int c = first_channel + i % block_channels;
      if (c < shape.channels) {
        partial[((first_plane + i / block_channels) * slots + first_slot) * shape.channels + c] =
            sum;
      }
    }
    __syncthreads();
  };
  __syncthreads();
  const auto own = [&](int count, int i) {
    return sums + (unit * count + i) * block_channels + lane * L;
  };
  if (a.partial_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < K; ++j) store(own(K, j), slice<L>(grad_taps[i], j));
      write_sums(K, i * K, a.partial_weight);
    }
  }
  if (a.partial_prologue != nullptr) {
    store(own(2, 0), grad_scale);
    store(own(2, 1), grad_shift);
    write_sums(2, 0, a.partial_prologue);
  }
}

}  // namespace effnet::cuda
