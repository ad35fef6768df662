// Sums of per-block partial results in a fixed order: same input, same bits. No float atomics. The
// sums are kept in float64: they are few, and gradients that nearly cancel need the digits.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

constexpr int kReduceChannels = 32;
constexpr int kReduceLanes = 8;
constexpr int kReduceThreads = kReduceChannels * kReduceLanes;
constexpr size_t kReduceSharedBytes = kReduceThreads * sizeof(double);

// output[o, c] = sum over slots of partial[o, slot, c]
//
// partial is (outer, slots, channels) float32. Row o of the result goes to `second` when that is
// given and o is 1, else to `first` at o * outer_stride + c * channel_stride.
// A block takes 32 channels of one row: thread (lane, c) sums every 8th slot, then lane 0 adds the
// 8 lanes. Blocks: outer * ceil(channels / 32).
template <class Output>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials_kernel(const float* __restrict__ partial, int slots, int channels,
                           int64_t outer_stride, int64_t channel_stride, Output* first,
                           Output* second) {
  const int channel_blocks = (channels + kReduceChannels - 1) / kReduceChannels;
  const int64_t o = blockIdx.x / channel_blocks;
  const int channel = (blockIdx.x % channel_blocks) * kReduceChannels +
                      static_cast<int>(threadIdx.x) % kReduceChannels;
  const int lane = threadIdx.x / kReduceChannels;

  double sum = 0.;
  if (channel < channels) {
    const float* p = partial + o * slots * channels + channel;
    for (int slot = lane; slot < slots; slot += kReduceLanes) {
      sum += p[static_cast<int64_t>(slot) * channels];
    }
  }
  double* sums = reinterpret_cast<double*>(shared_floats());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && channel < channels) {
#pragma unroll
    for (int i = 1; i < kReduceLanes; ++i) sum += sums[i * kReduceChannels + threadIdx.x];
    Output* row = second != nullptr && o == 1 ? second : first + o * outer_stride;
    row[channel * channel_stride] = from_float<Output>(static_cast<float>(sum));
  }
}

}  // namespace effnet::cuda
