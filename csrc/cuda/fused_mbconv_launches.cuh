// The launch of the Fused-MBConv block on one storage type: workspaces, the better of two tiles.
// The tiles are in fused_mbconv_tiling.cuh, the kernels in fused_mbconv.cuh and dense_conv.cuh.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "fused_mbconv.h"
#include "fused_mbconv_tiling.cuh"
#include "row_launches.cuh"

namespace effnet::cuda {

template <class T, class Sizes>
void launch(const Device& device, const FusedMbconv& a, const FusedCandidate<T, Sizes>& candidate,
            const Tensor& like) {
  FusedTiling t = candidate.tiling();
  t.vectors = allows_vectors(a.in_channels, kTileVector<T>, {a.input});
  t.expand_vectors = allows_vectors(a.in_channels, kTileVector<T>, {a.expand_weight});
  t.whole_rows = t.expand_vectors && t.slices == 1;
  t.project_vectors = allows_vectors(a.shape.channels, kTileVector<T>, {a.project_weight});
  t.output_vectors = allows_vectors(a.out_channels, kLaneColumns, {a.output, a.residual});
  const ImageSums pooled(like, static_cast<float*>(a.pooled), a.shape.batch,
                         int64_t{t.tiles_h} * t.tiles_w * Sizes::kWarps, a.shape.channels);
  device.launch(fused_mbconv_kernel<T, Sizes>, candidate.blocks(), Sizes::kThreads, t.bytes, a, t,
                pooled.data());
  pooled.add_up(device);
}

template <class T, class Sizes>
void launch(const Device& device, const FusedMbconv& a, const DenseCandidate<T, Sizes>& candidate,
            const Tensor&) {
  const DenseTiling& t = candidate.tiling();
  device.launch(dense_conv_kernel<T, Sizes>, candidate.blocks(), Sizes::kThreads, t.bytes, a, t);
}

template <class T>
void FusedLaunches<T>::inference(const FusedMbconv& a, const Tensor& like) {
  const Device device(like);
  const bool fits = with_fused_tile<T>(
      device.limits(), a, [&](const auto& candidate) { launch(device, a, candidate, like); });
  STD_TORCH_CHECK(fits, "fused_mbconv_out: no tile fits the shared memory");
}

}  // namespace effnet::cuda
