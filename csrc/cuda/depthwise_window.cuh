// The multiply-adds of a depthwise convolution outside the tensor cores: a thread's outputs are a
// patch, kPatchH x kPatchW pixels of a few channels, and read a window of the input row by row.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

constexpr int kPatchW = 4;

// Adds the products of a window's row `row`, x[column][channel], with w[tap][channel] to the sums
// of the patch that they belong to, (kPatchH, kPatchW, L).
template <int K, int S, int kPatchH, int L, int kCols>
EFFNET_DEVICE void multiply_row(Floats<kPatchH * kPatchW * L>& acc, const Floats<L> (&x)[kCols],
                                const float (&w)[K * K][L], int row) {
  static_assert(kCols == (kPatchW - 1) * S + K);
#pragma unroll
  for (int r = 0; r < kPatchH; ++r) {
    const int i = row - r * S;
    if (i < 0 || i >= K) continue;
#pragma unroll
    for (int p = 0; p < kPatchW; ++p) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int l = 0; l < L; ++l) {
          float& sum = acc[(r * kPatchW + p) * L + l];
          sum = fmaf(x[p * S + j][l], w[i * K + j][l], sum);
        }
      }
    }
  }
}

}  // namespace effnet::cuda
