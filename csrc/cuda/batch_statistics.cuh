// Batch statistics from the moments of blocks: the second launch, whatever the first one was.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

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

}  // namespace effnet::cuda
