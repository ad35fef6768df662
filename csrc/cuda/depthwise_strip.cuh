// The multiply-adds of a depthwise convolution in registers: a thread walks down the rows of a
// strip of kStrip outputs side by side, of L channels. It reads every row of the strip's input once
// and adds it to the K / S rows of outputs that it belongs to:
//
//     input    row q    x x x x x x x x x        kColumns = (kStrip - 1) * S + K
//                         |   |   |   |
//     outputs  row o      s s s s s s s     <- tap row q - o * S
//              row o + 1  s s s s s s s     <- tap row q - (o + 1) * S
//
// A row of sums moves on by one place with each step, and for free: the first multiply-add of its
// next tap row writes it where it belongs then. So the loop has one copy of the body, which stays
// in the instruction cache. EfficientNets' images are 7, 14, 28, 56 or 112 pixels wide: strips of 7
// leave no rest.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

// x, of which the compiler no longer knows what it is: what follows from it is computed where it is
// needed, and not kept in registers throughout a loop.
EFFNET_DEVICE int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

template <class T_, int L_, int K_, int S_>
struct StripSizes {
  using T = T_;
  static constexpr int L = L_, K = K_, S = S_;
  // As many outputs as the registers hold.
  static constexpr int kStrip = K == 7 || (K == 5 && sizeof(T) == 4) ? 4 : 7;
  static constexpr int kColumns = (kStrip - 1) * S + K;
  static constexpr int kUnderWay = (K - 1) / S;  // rows of outputs between two steps

  using Raw = Vector<T, L>;
  using Row = Floats<L>[kColumns];
  using Outputs = Floats<kStrip * L>;
};

// Filters lie in shared memory, [tap][kFilterPitch] float32. A tap is loaded for kStrip products
// and not kept: K * K * L registers hold more rows of the image.
constexpr int kFilterPitch = 256;

// sum + the products of a row with tap row i of the filter.
template <class Sizes>
EFFNET_DEVICE typename Sizes::Outputs add_tap_row(typename Sizes::Outputs sum,
                                                  const typename Sizes::Row& x, const float* filter,
                                                  int i) {
  constexpr int K = Sizes::K, L = Sizes::L;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const Floats<L> w = load<L>(filter + (i * K + j) * kFilterPitch);
#pragma unroll
    for (int p = 0; p < Sizes::kStrip; ++p) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        sum[p * L + l] = fmaf(x[p * Sizes::S + j][l], w[l], sum[p * L + l]);
      }
    }
  }
  return sum;
}

// Walks down the rows of outputs 0 ... rows - 1 of a strip.
//   filter                        at the lane's channels
//   source.load(q, raw) -> bool   starts to load input row q of the strip's window, row 0 being the
//                                 first that output row 0 reads; false: it is padding
//   source.values(raw, x)         the float32 values of what was loaded
//   finish(o, outputs)            takes the sums of output row o
template <class Sizes, class Source, class Finish>
EFFNET_DEVICE void walk_strip(int rows, const float* filter, const Source& source,
                              const Finish& finish) {
  using Outputs = typename Sizes::Outputs;
  constexpr int K = Sizes::K, S = Sizes::S, kUnderWay = Sizes::kUnderWay;
  const Outputs none = broadcast<Sizes::kStrip * Sizes::L>(0.f);
  // Between two steps, sums[k] has had tap rows 0 ... S * (k + 1) - 1.
  Outputs sums[kUnderWay];
#pragma unroll
  for (int k = 0; k < kUnderWay; ++k) sums[k] = none;
  typename Sizes::Raw raw[Sizes::kColumns];
  bool exists = source.load(0, raw);
  const int steps = rows + kUnderWay;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    typename Sizes::Row x;
    // Starts on the next row, and gives the sums with this one's products added.
    const auto take_row = [&](int q, bool last) {
      const bool adds = exists;
      if (adds) source.values(raw, x);
      exists = !last && source.load(q + 1, raw);
      return adds;
    };
    const float* const taps = filter + opaque(0);
    const bool last = step + 1 == steps;
    Outputs done = sums[kUnderWay - 1];
    if constexpr (S == 1) {
      if (take_row(step, last)) {
        done = add_tap_row<Sizes>(done, x, taps, K - 1);
#pragma unroll
        for (int k = kUnderWay - 1; k > 0; --k) {
          sums[k] = add_tap_row<Sizes>(sums[k - 1], x, taps, k);
        }
        sums[0] = add_tap_row<Sizes>(none, x, taps, 0);
      } else {
#pragma unroll
        for (int k = kUnderWay - 1; k > 0; --k) sums[k] = sums[k - 1];
        sums[0] = none;
      }
      if (step >= kUnderWay) finish(step - kUnderWay, done);
    } else {
      Outputs first = none;
      if (take_row(step * 2, last)) {
        done = add_tap_row<Sizes>(done, x, taps, K - 1);
#pragma unroll
        for (int k = kUnderWay - 1; k > 0; --k) {
          sums[k - 1] = add_tap_row<Sizes>(sums[k - 1], x, taps, 2 * k);
        }
        first = add_tap_row<Sizes>(none, x, taps, 0);
      }
      if (step >= kUnderWay) finish(step - kUnderWay, done);
      if (last) return;
      if (take_row(step * 2 + 1, false)) {
#pragma unroll
        for (int k = kUnderWay - 1; k > 0; --k) {
          sums[k] = add_tap_row<Sizes>(sums[k - 1], x, taps, 2 * k + 1);
        }
        sums[0] = add_tap_row<Sizes>(first, x, taps, 1);
      } else {
#pragma unroll
        for (int k = kUnderWay - 1; k > 0; --k) sums[k] = sums[k - 1];
        sums[0] = first;
      }
    }
  }
}

}  // namespace effnet::cuda
