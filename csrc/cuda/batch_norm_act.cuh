// Batch normalisation and activation of a depthwise (or any) convolution's output, for training:
// statistics from per-block partials, normalise + activate (+ pool), and the two sums of the
// backward pass. The tensors are (rows, channels) matrices: NHWC with N * H * W = rows.
#pragma once

#include "rows.cuh"

namespace effnet::cuda {

// count, mean and M2 (the sum of squared deviations from the mean) of a set of values.
struct Moments {
  double count = 0., mean = 0., m2 = 0.;

  // Chan's formula for the union of two sets.
  EFFNET_DEVICE void merge(const Moments& other) {
    if (other.count == 0.) return;
    const double total = count + other.count;
    const double share = other.count / total;
    const double delta = other.mean - mean;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// Sums of deviations from one of the values, `origin`, and of their squares. In float64, nothing is
// lost to a mean that is far from zero, or to an origin some standard deviations from the mean.
struct ShiftedSums {
  float origin = 0.f;
  double sum = 0., squares = 0.;

  EFFNET_DEVICE Moments moments(double count) const {
    if (count == 0.) return {};
    const double mean = sum / count;
    return {count, origin + mean, squares - sum * mean};
  }
};

constexpr int kStatisticsChannels = 8;
constexpr int kStatisticsLanes = 32;
constexpr int kStatisticsThreads = kStatisticsChannels * kStatisticsLanes;
constexpr int kStatisticsUnroll = 4;
constexpr size_t kStatisticsSharedBytes = 3 * kStatisticsThreads * sizeof(double);

// mean[c], var[c] (biased) from per-block moments: partial is (3, slots, channels) float64, the
// planes being count, mean and M2. With d = the mean of a slot - the mean of the first one,
//   n = sum count,  s1 = sum count * d,  s2 = sum (M2 + count * d^2)
//   mean = first mean + s1 / n,  var = (s2 - s1^2 / n) / n
// There is no division before the end, and slots do not wait for one another. The means of slots
// are much closer to each other than float64 resolves, so s2 - s1^2 / n loses nothing that counts,
// however far they are from zero.
// A block takes 8 channels (whole sectors), 32 threads each: thread (lane, c) adds up every 32nd
// slot, then the lanes are added in pairs, always in this order. Blocks: ceil(channels / 8).
// Traffic: partial read.
static __global__ void __launch_bounds__(kStatisticsThreads)
    batch_statistics_kernel(const double* __restrict__ partial, int slots, int channels,
                            float* mean_out, float* var_out) {
  const int lane = threadIdx.x / kStatisticsChannels;
  const int channel =
      blockIdx.x * kStatisticsChannels + static_cast<int>(threadIdx.x) % kStatisticsChannels;
  const int64_t plane = static_cast<int64_t>(slots) * channels;

  double first_mean = 0., count = 0., s1 = 0., s2 = 0.;
  if (channel < channels) {
    // Of the first slot that holds anything: the mean of an empty one would be far from the others.
    const double* p = partial + channel;
    double first_count = *p;
    first_mean = p[plane];
#pragma unroll 1
    for (int slot = 1; first_count == 0. && slot < slots; ++slot) {
      p += channels;
      first_count = *p;
      first_mean = p[plane];
    }
    const double* from = partial + static_cast<int64_t>(lane) * channels + channel;
    const int64_t step = static_cast<int64_t>(kStatisticsLanes) * channels;
#pragma unroll 1
    for (int slot = lane; slot < slots; slot += kStatisticsUnroll * kStatisticsLanes) {
      double n[kStatisticsUnroll], mean[kStatisticsUnroll], m2[kStatisticsUnroll];
#pragma unroll
      for (int i = 0; i < kStatisticsUnroll; ++i) {
        const bool valid = slot + i * kStatisticsLanes < slots;
        n[i] = valid ? from[i * step] : 0.;
        mean[i] = valid ? from[i * step + plane] : 0.;
        m2[i] = valid ? from[i * step + 2 * plane] : 0.;
      }
#pragma unroll
      for (int i = 0; i < kStatisticsUnroll; ++i) {
        // An empty slot's mean and M2 count for nothing, whatever they are.
        const double d = n[i] == 0. ? 0. : mean[i] - first_mean;
        count += n[i];
        s1 = fma(n[i], d, s1);
        s2 += fma(n[i] * d, d, n[i] == 0. ? 0. : m2[i]);
      }
      from += kStatisticsUnroll * step;
    }
  }
  double* shared = reinterpret_cast<double*>(shared_floats());
  shared[threadIdx.x] = count;
  shared[kStatisticsThreads + threadIdx.x] = s1;
  shared[2 * kStatisticsThreads + threadIdx.x] = s2;
#pragma unroll 1
  for (int half = kStatisticsThreads / 2; half >= kStatisticsChannels; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        double* sum = shared + i * kStatisticsThreads + threadIdx.x;
        *sum += sum[half];
      }
    }
  }
  if (lane == 0 && channel < channels) {
    count = shared[threadIdx.x];
    s1 = shared[kStatisticsThreads + threadIdx.x];
    s2 = shared[2 * kStatisticsThreads + threadIdx.x];
    const double shift = count == 0. ? 0. : s1 / count;
    const double m2 = s2 - s1 * shift;
    mean_out[channel] = static_cast<float>(first_mean + shift);
    // Rounding may leave less than nothing of a constant's; NaN comes through.
    var_out[channel] = static_cast<float>(count == 0. || m2 < 0. ? 0. : m2 / count);
  }
}

// Vectors of the backward kernel, which holds seven per-channel vectors in registers: half as wide
// as the others' for 16-bit elements.
template <int V>
constexpr int kPairVector = V < 4 ? V : 4;

// Rows that a thread has in flight of each of two tensors: of 16-byte vectors half as many.
template <class T, int V>
constexpr int kPairUnroll = sizeof(T) * V < 16 ? kRowUnroll : kRowUnroll / 2;

// Calls body(the activation as a compile-time constant): the loop in it has no branches, and the
// compiler may interleave its rows.
template <class Body>
EFFNET_DEVICE void for_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::identity:
      return body(std::integral_constant<Activation, Activation::identity>{});
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return body(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>{});
    case Activation::hardswish:
      return body(std::integral_constant<Activation, Activation::hardswish>{});
    case Activation::sigmoid:
      return body(std::integral_constant<Activation, Activation::sigmoid>{});
    case Activation::hardsigmoid:
      return body(std::integral_constant<Activation, Activation::hardsigmoid>{});
  }
}

// The constants of a block's channels, in shared memory: (4, lanes * V) floats. Every channel is
// computed once a block, not by each of the threads that share it.
struct BlockNorms {
  const float *mean, *scale, *bias, *invstd;

  static constexpr int kVectors = 4;

  template <class T>
  static EFFNET_DEVICE BlockNorms compute(const BatchNorm& bn, float* shared, int first_channel,
                                          int block_channels, int channels) {
    for (int i = threadIdx.x; i < block_channels; i += blockDim.x) {
      ChannelNorm norm{};
      if (first_channel + i < channels) norm = channel_norm<T>(bn, first_channel + i);
      shared[i] = norm.mean;
      shared[block_channels + i] = norm.scale;
      shared[2 * block_channels + i] = norm.bias;
      shared[3 * block_channels + i] = norm.invstd;
    }
    __syncthreads();
    return {shared, shared + block_channels, shared + 2 * block_channels,
            shared + 3 * block_channels};
  }
};

// What the two kernels below take of shared memory: BlockNorms, and what sum_row_lanes takes for
// `sums` sums.
inline size_t row_shared_bytes(const RowTiling& tiling, int vector, int sums) {
  const size_t per_channel =
      BlockNorms::kVectors * sizeof(float) +
      sums * (tiling.parts * sizeof(double) + tiling.row_lanes * sizeof(float));
  return per_channel * tiling.lanes * vector;
}

// output = activate((z - mean) * scale + bias), and pooled partials when asked for:
// partial[group, chunk, c] = the sum of the float32 outputs of the block's rows.
// Traffic: z read, output written. Four rows of 16-byte loads are in flight in each thread: with
// 768 threads, 48 KB a multiprocessor, several times what the latency of the memory asks for.
// Shared memory: row_shared_bytes for one sum with `partial`, else for none.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    batch_norm_act_kernel(const T* __restrict__ z, BatchNorm bn, Activation activation,
                          RowTiling tiling, T* __restrict__ output, float* __restrict__ partial) {
  const RowBlock<T, V> block(tiling);
  const int block_channels = tiling.lanes * V;
  const BlockNorms norms = BlockNorms::compute<T>(bn, shared_floats(), block.first_channel,
                                                  block_channels, tiling.channels);
  Floats<V> sums[1] = {broadcast<V>(0.f)};
  if (block.active) {
    const int i = block.channel - block.first_channel;
    const Floats<V> mean = load_floats<V>(norms.mean + i);
    const Floats<V> scale = load_floats<V>(norms.scale + i);
    Floats<V> bias = load_floats<V>(norms.bias + i);
    // A 16-bit z has no digits that subtracting the mean first could keep.
    constexpr bool kFolded = sizeof(T) == 2;
    if (kFolded) {
#pragma unroll
      for (int j = 0; j < V; ++j) bias[j] = fmaf(-mean[j], scale[j], bias[j]);
    }
    for_activation(activation, [&](auto constant) {
      Vector<T, V> raw[kRowUnroll];
      for_rows<kRowUnroll>(
          block, [&](int i, int64_t offset) { raw[i] = load_vector<V>(at(z, offset)); },
          [&](int i, int64_t offset) {
            const Floats<V> x = unpack_halves<T, V>(raw[i]);
            const Floats<V> y = activate<Math<T, V>>(
                decltype(constant)::value, multiply_add(kFolded ? x : x - mean, scale, bias));
            store(at(output, offset), y);
            sums[0] = sums[0] + y;
          });
    });
  }
  if (partial == nullptr) return;
  const RowBlock<T, V> same(tiling);
  float* const out = partial + same.slot * tiling.channels + same.first_channel;
  const int left = tiling.channels - same.first_channel;
  sum_row_lanes(sums, shared_floats() + BlockNorms::kVectors * block_channels, tiling,
                [&](int, int i, double sum) {
                  if (i < left) out[i] = static_cast<float>(sum);
                });
}

// With g = grad_output + grad_pooled and du = g * activate'(u), per block:
//   partial[0, slot, c] = sum du,   partial[1, slot, c] = sum du * xhat
// slot = group * chunks + chunk. grad_pooled is (groups, channels).
// Traffic: grad_output and z read. Of each, a thread has 32 bytes in flight: with 768 threads,
// 48 KB a multiprocessor. Shared memory: row_shared_bytes for two sums.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    batch_norm_act_backward_kernel(const T* __restrict__ grad_output,
                                   const float* __restrict__ grad_pooled, const T* __restrict__ z,
                                   BatchNorm bn, Activation activation, RowTiling tiling,
                                   float* __restrict__ partial) {
  constexpr int kUnroll = kPairUnroll<T, V>;
  const RowBlock<T, V> block(tiling);
  const int block_channels = tiling.lanes * V;
  const BlockNorms norms = BlockNorms::compute<T>(bn, shared_floats(), block.first_channel,
                                                  block_channels, tiling.channels);
  Floats<V> sums[2] = {broadcast<V>(0.f), broadcast<V>(0.f)};  // of du, of du * (z - mean)
  if (block.active) {
    const int i = block.channel - block.first_channel;
    const Floats<V> mean = load_floats<V>(norms.mean + i);
    const Floats<V> scale = load_floats<V>(norms.scale + i);
    const Floats<V> bias = load_floats<V>(norms.bias + i);
    Floats<V> pooled = broadcast<V>(0.f);
    if (grad_pooled != nullptr) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        pooled[j] = grad_pooled[block.group * tiling.channels + block.channel + j];
      }
    }
    for_activation(activation, [&](auto constant) {
      Vector<T, V> raw_g[kUnroll], raw_z[kUnroll];
      for_rows<kUnroll>(
          block,
          [&](int i, int64_t offset) {
            raw_g[i] = load_vector<V>(at(grad_output, offset));
            raw_z[i] = load_vector<V>(at(z, offset));
          },
          [&](int i, int64_t) {
            const Floats<V> d = unpack_halves<T, V>(raw_z[i]) - mean;
            const Floats<V> du =
                (unpack_halves<T, V>(raw_g[i]) + pooled) *
                activate_grad<Math<T, V>>(decltype(constant)::value, multiply_add(d, scale, bias));
            sums[0] = sums[0] + du;
            sums[1] = multiply_add(du, d, sums[1]);
          });
    });
  }
  const int64_t plane = tiling.groups * tiling.chunks * tiling.channels;
  const RowBlock<T, V> same(tiling);
  float* const out = partial + same.slot * tiling.channels + same.first_channel;
  const int left = tiling.channels - same.first_channel;
  sum_row_lanes(sums, shared_floats() + BlockNorms::kVectors * block_channels, tiling,
                [&](int k, int i, double sum) {
                  if (i >= left) return;
                  out[k * plane + i] = static_cast<float>(k == 0 ? sum : sum * norms.invstd[i]);
                });
}

}  // namespace effnet::cuda
