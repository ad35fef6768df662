// Sums of per-block partial results in a fixed order: same input, same bits. No float atomics. The
// sums are kept in float64: they are few, and gradients that nearly cancel need the digits.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

constexpr int kReduceThreads = 256;
constexpr int kReduceMaxLanes = 32;  // leaves 8 channels, a sector
constexpr int kReduceUnroll = 8;     // slots that a thread has in flight
constexpr size_t kReduceSharedBytes = kReduceThreads * sizeof(double);

// output[o, c] = sum over slots of partial[o, slot, c]
//
// partial is (outer, slots, channels) float32. Row o of the result goes to `second` when that is
// given and o is 1, else to `first` at o * outer_stride + c * channel_stride.
// A block takes 256 / lanes channels of one row: thread (lane, c) sums every lanes-th slot, then
// the lanes, a power of two of them, are added in pairs. Blocks: outer * channel_blocks.
// Traffic: partial read.
template <class Output>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials_kernel(const float* __restrict__ partial, int slots, int channels, int lanes,
                           int channel_blocks, int64_t outer_stride, int64_t channel_stride,
                           Output* first, Output* second) {
  const int block_channels = kReduceThreads / lanes;
  const int64_t o = blockIdx.x / channel_blocks;
  const int channel = (blockIdx.x % channel_blocks) * block_channels +
                      static_cast<int>(threadIdx.x) % block_channels;
  const int lane = threadIdx.x / block_channels;

  double sum = 0.;
  if (channel < channels) {
    const float* p = partial + (o * slots + lane) * channels + channel;
    const int64_t step = static_cast<int64_t>(lanes) * channels;
#pragma unroll 1
    for (int slot = lane; slot < slots; slot += kReduceUnroll * lanes) {
      float x[kReduceUnroll];
#pragma unroll
      for (int i = 0; i < kReduceUnroll; ++i) {
        x[i] = slot + i * lanes < slots ? p[i * step] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kReduceUnroll; ++i) sum += x[i];
      p += kReduceUnroll * step;
    }
  }
  double* const sums = reinterpret_cast<double*>(shared_floats());
  sums[threadIdx.x] = sum;
#pragma unroll 1
  for (int half = kReduceThreads / 2; half >= block_channels; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (lane == 0 && channel < channels) {
    Output* row = second != nullptr && o == 1 ? second : first + o * outer_stride;
    row[channel * channel_stride] = from_float<Output>(static_cast<float>(sums[threadIdx.x]));
  }
}

}  // namespace effnet::cuda
