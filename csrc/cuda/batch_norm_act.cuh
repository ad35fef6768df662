// Batch normalisation and activation of a depthwise (or any) convolution's output, for training:
// statistics from per-block partials, normalise + activate (+ pool), and the two sums of the
// backward pass. The tensors are (rows, channels) matrices: NHWC with N * H * W = rows.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

// What normalisation does to one channel: d = z - mean, u = d * scale + bias. Subtracting the mean
// first keeps the digits of z when |mean| is much larger than the standard deviation.
struct ChannelNorm {
  float mean, invstd, scale, bias;
};

template <class T>
EFFNET_DEVICE ChannelNorm channel_norm(const BatchNorm& bn, int channel) {
  ChannelNorm norm;
  norm.mean = channel_value<T>(bn.mean, channel, 0.f);
  norm.invstd = 1.f / sqrtf(channel_value<T>(bn.var, channel, 1.f) + static_cast<float>(bn.eps));
  norm.scale = norm.invstd * channel_value<T>(bn.weight, channel, 1.f);
  norm.bias = channel_value<T>(bn.bias, channel, 0.f);
  return norm;
}

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
constexpr size_t kStatisticsSharedBytes = 3 * kStatisticsThreads * sizeof(double);

// mean[c], var[c] (biased) from per-block moments: partial is (3, slots, channels), the planes
// being count, mean and M2. A block takes 8 channels, 32 threads each: thread (lane, c) merges
// every 32nd slot, then lane 0 merges the lanes, always in this order. Blocks: ceil(channels / 8).
static __global__ void __launch_bounds__(kStatisticsThreads)
    batch_statistics_kernel(const double* __restrict__ partial, int slots, int channels,
                            float* mean_out, float* var_out) {
  const int lane = threadIdx.x / kStatisticsChannels;
  const int channel =
      blockIdx.x * kStatisticsChannels + static_cast<int>(threadIdx.x) % kStatisticsChannels;
  const int64_t plane = static_cast<int64_t>(slots) * channels;

  Moments all;
  if (channel < channels) {
#pragma unroll 1
    for (int slot = lane; slot < slots; slot += kStatisticsLanes) {
      const double* p = partial + static_cast<int64_t>(slot) * channels + channel;
      all.merge({p[0], p[plane], p[2 * plane]});
    }
  }
  double* shared = reinterpret_cast<double*>(shared_floats());
  shared[threadIdx.x] = all.count;
  shared[kStatisticsThreads + threadIdx.x] = all.mean;
  shared[2 * kStatisticsThreads + threadIdx.x] = all.m2;
  __syncthreads();
  if (lane == 0 && channel < channels) {
#pragma unroll 1
    for (int i = threadIdx.x + kStatisticsChannels; i < kStatisticsThreads;
         i += kStatisticsChannels) {
      all.merge({shared[i], shared[kStatisticsThreads + i], shared[2 * kStatisticsThreads + i]});
    }
    mean_out[channel] = static_cast<float>(all.mean);
    var_out[channel] = static_cast<float>(all.m2 > 0. ? all.m2 / all.count : 0.);
  }
}

// How a (groups, rows, channels) tensor is cut into thread blocks. A group is one image where
// something is summed or given per image, else the whole tensor. A block has `lanes` threads across
// channels, one vector each, times `row_lanes` down the rows, and takes `chunk` rows of one group.
// Block index: channel block fastest, then chunk, then group.
struct RowTiling {
  int64_t groups, rows;
  int channels;
  int lanes, row_lanes;
  int channel_blocks, chunks;
  int64_t chunk;
};

constexpr int kRowThreads = 256;
constexpr int kRowUnroll = 4;   // rows that a thread has in flight of one tensor
constexpr int kPairUnroll = 2;  // and of two

// A block's place in a RowTiling.
template <int V>
struct RowBlock {
  int64_t group, chunk, first_row, last_row;
  int lane, row_lane, channel;
  bool active;

  EFFNET_DEVICE explicit RowBlock(const RowTiling& tiling) {
    lane = static_cast<int>(threadIdx.x) % tiling.lanes;
    row_lane = static_cast<int>(threadIdx.x) / tiling.lanes;
    const int block = blockIdx.x;
    const int rest = block / tiling.channel_blocks;
    channel = ((block % tiling.channel_blocks) * tiling.lanes + lane) * V;
    group = rest / tiling.chunks;
    chunk = rest % tiling.chunks;
    first_row = chunk * tiling.chunk;
    last_row = first_row + tiling.chunk < tiling.rows ? first_row + tiling.chunk : tiling.rows;
    active = channel < tiling.channels;
  }
};

// Adds up x over the row lanes of a block in a fixed order and leaves the sums in row lane 0's x.
// `shared` holds blockDim.x * V floats.
template <int V>
EFFNET_DEVICE void sum_row_lanes(Floats<V>& x, float* shared, int lane, int lanes, int row_lane,
                                 int row_lanes) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) shared[(i * row_lanes + row_lane) * lanes + lane] = x[i];
  __syncthreads();
  if (row_lane != 0) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    double sum = x[i];
    for (int r = 1; r < row_lanes; ++r) sum += shared[(i * row_lanes + r) * lanes + lane];
    x[i] = static_cast<float>(sum);
  }
}

// output = activate((z - mean) * scale + bias), and pooled partials when asked for:
// partial[group, chunk, c] = the sum of the float32 outputs of the block's rows.
// Traffic: z read, output written. Four rows of 16-byte loads are in flight in each thread.
// Shared memory: blockDim.x * V floats with `partial`, else none.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    batch_norm_act_kernel(const T* __restrict__ z, BatchNorm bn, Activation activation,
                          RowTiling tiling, T* __restrict__ output, float* __restrict__ partial) {
  const RowBlock<V> block(tiling);
  Floats<V> mean = broadcast<V>(0.f), scale = mean, bias = mean, sum = mean;
  if (block.active) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const ChannelNorm norm = channel_norm<T>(bn, block.channel + i);
      mean[i] = norm.mean;
      scale[i] = norm.scale;
      bias[i] = norm.bias;
    }
    const int64_t origin = block.group * tiling.rows * tiling.channels + block.channel;
    for (int64_t row = block.first_row + block.row_lane; row < block.last_row;
         row += kRowUnroll * tiling.row_lanes) {
      Vector<T, V> raw[kRowUnroll];
#pragma unroll
      for (int i = 0; i < kRowUnroll; ++i) {
        const int64_t r = row + i * tiling.row_lanes;
        if (r < block.last_row) raw[i] = load_vector<V>(z + origin + r * tiling.channels);
      }
#pragma unroll
      for (int i = 0; i < kRowUnroll; ++i) {
        const int64_t r = row + i * tiling.row_lanes;
        if (r < block.last_row) {
          const Floats<V> y = activate<Math<T, V>>(
              activation, multiply_add(unpack<T, V>(raw[i]) - mean, scale, bias));
          store(output + origin + r * tiling.channels, y);
          sum = sum + y;
        }
      }
    }
  }
  if (partial == nullptr) return;
  sum_row_lanes<V>(sum, shared_floats(), block.lane, tiling.lanes, block.row_lane,
                   tiling.row_lanes);
  if (block.active && block.row_lane == 0) {
    float* out =
        partial + (block.group * tiling.chunks + block.chunk) * tiling.channels + block.channel;
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = sum[i];
  }
}

// With g = grad_output + grad_pooled and du = g * activate'(u), per block:
//   partial[0, slot, c] = sum du,   partial[1, slot, c] = sum du * xhat
// slot = group * chunks + chunk. Traffic: grad_output and z read. grad_pooled is (groups,
// channels). Shared memory: blockDim.x * V floats.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 2)
    batch_norm_act_backward_kernel(const T* __restrict__ grad_output,
                                   const float* __restrict__ grad_pooled, const T* __restrict__ z,
                                   BatchNorm bn, Activation activation, RowTiling tiling,
                                   float* __restrict__ partial) {
  const RowBlock<V> block(tiling);
  Floats<V> mean = broadcast<V>(0.f), scale = mean, bias = mean, pooled = mean;
  Floats<V> sum = mean, product = mean;
  if (block.active) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const ChannelNorm norm = channel_norm<T>(bn, block.channel + i);
      mean[i] = norm.mean;
      scale[i] = norm.scale;
      bias[i] = norm.bias;
      if (grad_pooled != nullptr) {
        pooled[i] = grad_pooled[block.group * tiling.channels + block.channel + i];
      }
    }
    const int64_t origin = block.group * tiling.rows * tiling.channels + block.channel;
    for (int64_t row = block.first_row + block.row_lane; row < block.last_row;
         row += kPairUnroll * tiling.row_lanes) {
      Vector<T, V> raw_g[kPairUnroll], raw_z[kPairUnroll];
#pragma unroll
      for (int i = 0; i < kPairUnroll; ++i) {
        const int64_t r = row + i * tiling.row_lanes;
        if (r < block.last_row) {
          raw_g[i] = load_vector<V>(grad_output + origin + r * tiling.channels);
          raw_z[i] = load_vector<V>(z + origin + r * tiling.channels);
        }
      }
#pragma unroll
      for (int i = 0; i < kPairUnroll; ++i) {
        if (row + i * tiling.row_lanes < block.last_row) {
          const Floats<V> d = unpack<T, V>(raw_z[i]) - mean;
          const Floats<V> du = (unpack<T, V>(raw_g[i]) + pooled) *
                               activate_grad<Math<T, V>>(activation, multiply_add(d, scale, bias));
          sum = sum + du;
          product = multiply_add(du, d, product);
        }
      }
    }
  }
  if (block.active) {
#pragma unroll
    for (int i = 0; i < V; ++i) product[i] *= channel_norm<T>(bn, block.channel + i).invstd;
  }
  const int64_t slots = tiling.groups * tiling.chunks;
  float* out =
      partial + (block.group * tiling.chunks + block.chunk) * tiling.channels + block.channel;
  sum_row_lanes<V>(sum, shared_floats(), block.lane, tiling.lanes, block.row_lane,
                   tiling.row_lanes);
  sum_row_lanes<V>(product, shared_floats(), block.lane, tiling.lanes, block.row_lane,
                   tiling.row_lanes);
  if (block.active && block.row_lane == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out[i] = sum[i];
      out[slots * tiling.channels + i] = product[i];
    }
  }
}

}  // namespace effnet::cuda
