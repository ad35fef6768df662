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
// in the instruction cache, and no branch around the multiply-adds, at whose end registers would
// have to be moved: where the window is beside the image, sums are handed on in a loop of its own.
// EfficientNets' images are 7, 14, 28, 56 or 112 pixels wide: strips of 7 leave no rest.
//
// Rows come through a ring in shared memory, of which each thread has its own part. It copies the
// rows that it will need, of one image after another, and waits for nobody: the bytes on their way
// are what hides the memory's latency, and registers could not hold as many.
#pragma once

#include "mma.cuh"
#include "vector.cuh"

namespace effnet::cuda {

// x, of which the compiler no longer knows what it is: what follows from it is computed where it is
// needed, and not kept in registers throughout a loop; x itself is kept.
EFFNET_DEVICE int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

constexpr int kStripThreads = 128;  // most of a block

template <class T_, int L_, int K_, int S_>
struct StripSizes {
  using T = T_;
  static constexpr int L = L_, K = K_, S = S_;
  // As many outputs as the registers hold.
  static constexpr int kStrip = K == 7 || (K == 5 && sizeof(T) == 4) ? 4 : 7;
  static constexpr int kColumns = (kStrip - 1) * S + K;
  static constexpr int kUnderWay = (K - 1) / S;  // rows of outputs between two steps
  // Rows in the ring: those on their way, and the one that is read.
  static constexpr int kStages = sizeof(T) == 4 ? 3 : 4;
  static constexpr int kStageSlots = kColumns * kStripThreads;

  using Raw = Vector<T, L>;
  using Row = Floats<L>[kColumns];
  using Outputs = Floats<kStrip * L>;

  // Filters lie in shared memory, [tap][kFilterPitch] float32, the ring behind them.
  static constexpr int kFilterPitch = 2 * kStripThreads;
  static constexpr size_t kFilterBytes = K * K * kFilterPitch * sizeof(float);
  static constexpr size_t kSharedBytes = kFilterBytes + kStages * kStageSlots * sizeof(Raw);
  static_assert(kFilterPitch >= L * kStripThreads);
};

// sum + the products of a row with tap row i of the filter. A tap is loaded for kStrip products and
// not kept: K * K * L registers hold more rows of sums.
template <class Sizes>
EFFNET_DEVICE typename Sizes::Outputs add_tap_row(typename Sizes::Outputs sum,
                                                  const typename Sizes::Row& x, const float* filter,
                                                  int i) {
  constexpr int K = Sizes::K, L = Sizes::L;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const Floats<L> w = load<L>(filter + (i * K + j) * Sizes::kFilterPitch);
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

// A strip's part of a segment of rows: which rows of its window there are in the image. Row 0 is
// the first that output row 0 reads.
struct StripRows {
  int outputs;     // rows of them
  int begin, end;  // the rows that exist

  template <int K, int S>
  static EFFNET_DEVICE StripRows of(int outputs, int first_row, int in_h) {
    return {outputs, max(0, -first_row), min((outputs - 1) * S + K, in_h - first_row)};
  }
};

// Walks down a strip of one image.
//   filter           at the lane's channels
//   source.take(x)   gives the next row that exists
//   finish(outputs)  takes the sums of one row of outputs after the other
template <class Sizes, class Source, class Finish>
EFFNET_DEVICE void walk_strip(const StripRows& rows, const float* filter, Source& source,
                              const Finish& finish) {
  using Outputs = typename Sizes::Outputs;
  constexpr int K = Sizes::K, kUnderWay = Sizes::kUnderWay, kLast = kUnderWay - 1;
  const Outputs none = broadcast<Sizes::kStrip * Sizes::L>(0.f);
  // Between two steps, sums[k] has had tap rows 0 ... S * (k + 1) - 1.
  Outputs sums[kUnderWay];
#pragma unroll
  for (int k = 0; k < kUnderWay; ++k) sums[k] = none;

  if constexpr (Sizes::S == 1) {
    int q = rows.begin;  // before it, all sums are zero: padding is less than K
#pragma unroll 1
    for (; q < rows.end; ++q) {
      typename Sizes::Row x;
      source.take(x);
      const float* const taps = filter + opaque(0);
      Outputs done = add_tap_row<Sizes>(sums[kLast], x, taps, K - 1);
#pragma unroll
      for (int k = kLast; k > 0; --k) sums[k] = add_tap_row<Sizes>(sums[k - 1], x, taps, k);
      sums[0] = add_tap_row<Sizes>(none, x, taps, 0);
      if (q >= kUnderWay) finish(done);
    }
#pragma unroll 1
    for (; q < rows.outputs + kUnderWay; ++q) {
      if (q >= kUnderWay) finish(sums[kLast]);
#pragma unroll
      for (int k = kLast; k > 0; --k) sums[k] = sums[k - 1];
      sums[0] = none;
    }
  } else {
    const auto take_row = [&](int q, typename Sizes::Row& x) {
      if (q >= rows.begin && q < rows.end) {
        source.take(x);
      } else {
#pragma unroll
        for (int j = 0; j < Sizes::kColumns; ++j) x[j] = broadcast<Sizes::L>(0.f);
      }
    };
    const int steps = rows.outputs + kUnderWay;
#pragma unroll 1
    for (int step = rows.begin / 2; step < steps; ++step) {
      const float* const taps = filter + opaque(0);
      typename Sizes::Row x;
      take_row(step * 2, x);
      Outputs done = add_tap_row<Sizes>(sums[kLast], x, taps, K - 1);
#pragma unroll
      for (int k = kLast; k > 0; --k) {
        sums[k - 1] = add_tap_row<Sizes>(sums[k - 1], x, taps, 2 * k);
      }
      const Outputs first = add_tap_row<Sizes>(none, x, taps, 0);
      if (step >= kUnderWay) finish(done);
      if (step + 1 == steps) break;
      take_row(step * 2 + 1, x);
#pragma unroll
      for (int k = kLast; k > 0; --k) {
        sums[k] = add_tap_row<Sizes>(sums[k - 1], x, taps, 2 * k + 1);
      }
      sums[0] = add_tap_row<Sizes>(first, x, taps, 1);
    }
  }
}

}  // namespace effnet::cuda
