// Batch normalisation and activation of any convolution's output: statistics, normalise + activate
// (+ gate, residual, pool), the sums of the backward pass, and the gradients of input and gate. The
// tensors are (groups, rows, channels): NHWC, a group being an image where something is given or
// summed per image, else all of them.
#pragma once

#include "moments.cuh"
#include "rows.cuh"

namespace effnet::cuda {

// Vectors of the kernels that read two tensors, which hold up to seven per-channel vectors in
// registers: half as wide as the others' for 16-bit elements.
template <int V>
constexpr int kPairVector = V < 4 ? V : 4;

// Rows that a thread has in flight of each of two tensors: of 16-byte vectors half as many.
template <class T, int V>
constexpr int kPairUnroll = sizeof(T) * V < 16 ? kRowUnroll : kRowUnroll / 2;

// Calls body(the activation as a compile-time constant) where vectors are more than one element:
// the loop in it has no branches, and the compiler may interleave its rows. Single elements, for
// odd channel counts, are not worth seven times the code: body(activation).
template <int V, class Body>
EFFNET_DEVICE void for_activation(Activation activation, const Body& body) {
  if constexpr (V == 1) return body(activation);
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

// What the kernels below take of shared memory: BlockNorms, and what sum_row_lanes takes for `sums`
// sums.
inline size_t row_shared_bytes(const RowTiling& tiling, int vector, int sums) {
  const size_t per_channel =
      BlockNorms::kVectors * sizeof(float) +
      sums * (tiling.parts * sizeof(double) + tiling.row_lanes * sizeof(float));
  return per_channel * tiling.lanes * vector;
}

// A thread's channels of its group in a (groups, channels) matrix; `absent` where there is none.
template <class T, int V>
EFFNET_DEVICE Floats<V> group_values(const float* matrix, const RowBlock<T, V>& block, int channels,
                                     float absent) {
  if (matrix == nullptr) return broadcast<V>(absent);
  return load_floats<V>(matrix + block.group * channels + block.channel);
}

// With v = activate((z - mean) * scale + bias), what has a pointer of
//   output = v * gate,   partial[group, chunk, c] = sum of v over the block's rows
// and with kOther
//   output = v * gate + other,   partial: the same
// or, where there is gated_other,
//   output = v * gate,   gated_other = other * gate,   partial: the sum of v * other.
// gate is (groups, channels), or null for ones. gated_other may be other.
// Traffic: z, and other, read; output, and gated_other, written. Four rows of 16-byte loads are in
// flight in each thread, or 32 bytes of each of two tensors: with 768 threads, 48 KB a
// multiprocessor, several times what the latency of the memory asks for.
// Shared memory: row_shared_bytes for one sum with `partial`, else for none.
template <class T, int V, bool kOther>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    batch_norm_act_kernel(const T* __restrict__ z, BatchNorm bn, Activation activation,
                          const float* __restrict__ gate, const T* other, RowTiling tiling,
                          T* __restrict__ output, T* gated_other, float* __restrict__ partial) {
  constexpr int kUnroll = kOther ? kPairUnroll<T, V> : kRowUnroll;
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
    const Floats<V> factor = group_values(gate, block, tiling.channels, 1.f);
    for_activation<V>(activation, [&](auto known) {
      Vector<T, V> raw[kUnroll];
      [[maybe_unused]] Vector<T, V> raw_other[kOther ? kUnroll : 1];
      for_rows<kUnroll>(
          block,
          [&](int i, int64_t offset) {
            raw[i] = load_vector<V>(at(z, offset));
            if constexpr (kOther) raw_other[i] = load_vector<V>(at(other, offset));
          },
          [&](int i, int64_t offset) {
            const Floats<V> x = unpack<T, V>(raw[i]);
            const Floats<V> v =
                activate<Math<T, V>>(known, multiply_add(kFolded ? x : x - mean, scale, bias));
            if constexpr (kOther) {
              const Floats<V> y = unpack<T, V>(raw_other[i]);
              if (gated_other != nullptr) {
                sums[0] = multiply_add(v, y, sums[0]);
                store(at(output, offset), v * factor);
                store(at(gated_other, offset), y * factor);
              } else {
                sums[0] = sums[0] + v;
                store(at(output, offset), multiply_add(v, factor, y));
              }
            } else {
              sums[0] = sums[0] + v;
              if (output != nullptr) store(at(output, offset), v * factor);
            }
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

// What a thread needs of its channels for the gradient with respect to u, where d = z - mean and
// u = d * scale + bias:   du = (g * gate + pooled) * activate'(u).
template <class T, int V>
struct ActivationGradient {
  Floats<V> mean, scale, bias, gate, pooled;

  EFFNET_DEVICE ActivationGradient(const BlockNorms& norms, const RowBlock<T, V>& block,
                                   const float* gates, const float* grad_pooled, int channels) {
    const int i = block.channel - block.first_channel;
    mean = load_floats<V>(norms.mean + i);
    scale = load_floats<V>(norms.scale + i);
    bias = load_floats<V>(norms.bias + i);
    gate = group_values(gates, block, channels, 1.f);
    pooled = group_values(grad_pooled, block, channels, 0.f);
  }

  EFFNET_DEVICE Floats<V> operator()(Activation activation, const Floats<V>& g,
                                     const Floats<V>& d) const {
    return multiply_add(g, gate, pooled) *
           activate_grad<Math<T, V>>(activation, multiply_add(d, scale, bias));
  }
};

// With du as above for g = grad_output, per block:
//   partial[0, slot, c] = sum du,   partial[1, slot, c] = sum du * xhat
// slot = group * chunks + chunk. gate and grad_pooled are (groups, channels), or null.
// Traffic: grad_output and z read. Of each, a thread has 32 bytes in flight: with 768 threads,
// 48 KB a multiprocessor. Shared memory: row_shared_bytes for two sums.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    batch_norm_act_sums_kernel(const T* __restrict__ grad_output, const T* __restrict__ z,
                               BatchNorm bn, Activation activation, const float* __restrict__ gate,
                               const float* __restrict__ grad_pooled, RowTiling tiling,
                               float* __restrict__ partial) {
  constexpr int kUnroll = kPairUnroll<T, V>;
  const RowBlock<T, V> block(tiling);
  const int block_channels = tiling.lanes * V;
  const BlockNorms norms = BlockNorms::compute<T>(bn, shared_floats(), block.first_channel,
                                                  block_channels, tiling.channels);
  Floats<V> sums[2] = {broadcast<V>(0.f), broadcast<V>(0.f)};  // of du, of du * (z - mean)
  if (block.active) {
    const ActivationGradient<T, V> gradient(norms, block, gate, grad_pooled, tiling.channels);
    for_activation<V>(activation, [&](auto known) {
      Vector<T, V> raw_g[kUnroll], raw_z[kUnroll];
      for_rows<kUnroll>(
          block,
          [&](int i, int64_t offset) {
            raw_g[i] = load_vector<V>(at(grad_output, offset));
            raw_z[i] = load_vector<V>(at(z, offset));
          },
          [&](int i, int64_t) {
            const Floats<V> d = unpack<T, V>(raw_z[i]) - gradient.mean;
            const Floats<V> du = gradient(known, unpack<T, V>(raw_g[i]), d);
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

// grad_input = scale * (du - (sum du + xhat * sum du * xhat) / count), du as above; both sums null:
// scale * du. `linear`, with the identity and no gate: grad_output is scale * du already, and may
// be grad_input. Traffic: grad_output and z read, grad_input written; as many bytes in flight as
// above. Shared memory: row_shared_bytes for no sum.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    batch_norm_act_backward_kernel(const T* grad_output, const T* __restrict__ z, BatchNorm bn,
                                   Activation activation, const float* __restrict__ gate,
                                   const float* __restrict__ grad_pooled,
                                   const float* __restrict__ sum_du,
                                   const float* __restrict__ sum_du_xhat, float inverse_count,
                                   bool linear, RowTiling tiling, T* grad_input) {
  constexpr int kUnroll = kPairUnroll<T, V>;
  const RowBlock<T, V> block(tiling);
  const BlockNorms norms = BlockNorms::compute<T>(bn, shared_floats(), block.first_channel,
                                                  tiling.lanes * V, tiling.channels);
  if (!block.active) return;
  ActivationGradient<T, V> gradient(norms, block, gate, grad_pooled, tiling.channels);
  Floats<V> constant = broadcast<V>(0.f), slope = constant;
  if (sum_du != nullptr) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float each = -gradient.scale[j] * inverse_count;
      constant[j] = each * sum_du[block.channel + j];
      slope[j] = each * norms.invstd[block.channel - block.first_channel + j] *
                 sum_du_xhat[block.channel + j];
    }
  }
  // The identity's derivative does without the scale.
  if (linear) gradient.scale = broadcast<V>(1.f);
  for_activation<V>(activation, [&](auto known) {
    Vector<T, V> raw_g[kUnroll], raw_z[kUnroll];
    for_rows<kUnroll>(
        block,
        [&](int i, int64_t offset) {
          raw_g[i] = load_vector<V>(at(grad_output, offset));
          raw_z[i] = load_vector<V>(at(z, offset));
        },
        [&](int i, int64_t offset) {
          const Floats<V> d = unpack<T, V>(raw_z[i]) - gradient.mean;
          const Floats<V> du = gradient(known, unpack<T, V>(raw_g[i]), d);
          store(at(grad_input, offset),
                multiply_add(slope, d, multiply_add(du, gradient.scale, constant)));
        });
  });
}

// What channel_statistics_kernel takes of shared memory: three floats of each thread's channels,
// and two sums of each part.
inline size_t statistics_shared_bytes(const RowTiling& tiling, int vector) {
  return (2 * tiling.parts * sizeof(double) + 3 * tiling.row_lanes * sizeof(float)) * tiling.lanes *
         vector;
}

// The moments of each block's rows, for batch_statistics_kernel: partial[(count, mean, M2), chunk,
// c], float64; one group.
// A thread adds up, in float32, deviations d from an origin of its own, the mean of its first rows,
// and their squares. A row far from all others costs digits only if it is one of those, and only of
// that thread's sums. With e = the thread's origin less that of the first row lane,
//   sum (d + e) = sum d + n e,   sum (d + e)^2 = sum d^2 + e (2 sum d + n e)
// are the same sums around one origin for all row lanes: in float64, as ShiftedSums has them.
// Traffic: input read; four rows of 16-byte loads are in flight in each thread. Shared memory:
// statistics_shared_bytes.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    channel_statistics_kernel(const T* __restrict__ input, RowTiling tiling,
                              double* __restrict__ partial) {
  const int channels = tiling.lanes * V, row_lanes = tiling.row_lanes;
  double* const part_sums = reinterpret_cast<double*>(shared_floats());
  float* const origins = shared_floats() + 4 * tiling.parts * channels;  // (row lane, channel)
  float* const sums = origins + row_lanes * channels;
  float* const squares = sums + row_lanes * channels;
  {
    const RowBlock<T, V> block(tiling);
    Floats<V> origin = broadcast<V>(0.f), sum = origin, square = origin;
    if (block.active && block.rows > 0) {
      int few = 0;
#pragma unroll
      for (int i = 0; i < kRowUnroll; ++i) {
        if (block.rows <= i * row_lanes) break;
        origin = origin + load<V>(at(input, block.first + i * block.step));
        ++few;
      }
      origin = origin * broadcast<V>(1.f / few);
      Vector<T, V> raw[kRowUnroll];
      for_rows<kRowUnroll>(
          block, [&](int i, int64_t offset) { raw[i] = load_vector<V>(at(input, offset)); },
          [&](int i, int64_t) {
            const Floats<V> d = unpack<T, V>(raw[i]) - origin;
            sum = sum + d;
            square = multiply_add(d, d, square);
          });
    }
    store_floats(origins + threadIdx.x * V, origin);
    store_floats(sums + threadIdx.x * V, sum);
    store_floats(squares + threadIdx.x * V, square);
  }
  const RowBlock<T, V> block(tiling);
  const int rows = block.rows + static_cast<int>(threadIdx.x) / tiling.lanes;  // of the block
  double* const out = partial + block.slot * tiling.channels + block.first_channel;
  const int64_t plane = int64_t{tiling.chunks} * tiling.channels;
  const int left = tiling.channels - block.first_channel;
  add_row_lanes<2>(
      part_sums, channels, tiling,
      [&](int k, int r, int channel) {
        const int i = r * channels + channel;
        // Row lanes beyond the last row have nothing.
        const double n = (rows - r + row_lanes - 1) / row_lanes;
        const double e = static_cast<double>(origins[i]) - origins[channel];
        const double around = sums[i] + n * e;
        return n <= 0. ? 0. : k == 0 ? around : squares[i] + e * (sums[i] + around);
      },
      [&](int channel, const double (&totals)[2]) {
        if (channel >= left) return;
        const ShiftedSums all{origins[channel], totals[0], totals[1]};
        const Moments moments = all.moments(rows);
        out[channel] = moments.count;
        out[plane + channel] = moments.mean;
        out[2 * plane + channel] = moments.m2;
      });
}

}  // namespace effnet::cuda
