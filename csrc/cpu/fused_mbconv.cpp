// The Fused-MBConv block on the CPU: cuts a call into bands of rows (FusedMbconvPlan), which go
// through the block side by side on PyTorch's threads, each in one thread's caches.
#include "fused_mbconv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"
#include "memory.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<FusedMbconvKernels> kernels_for =
    EFFNET_KERNELS_BY_ISA(fused_mbconv_kernels);

// What a band takes of a core's L2: its input and its part of the expanded tensor. The weights pass
// by, once a band.
constexpr int64_t kBandBytes = 160 * 1024;
// Pixels of a band, if they fit: the weights are then no traffic to speak of.
constexpr int64_t kBandPixels = 256;
// Bands, if there are rows enough: several for each thread of a large machine.
constexpr int64_t kBands = 64;

FusedMbconvPlan make_plan(const FusedMbconv& a, const FusedMbconvKernels& k) {
  const ConvShape& s = a.shape;
  const GemmFormat& f = k.format;
  FusedMbconvPlan p{};
  p.pixel = static_cast<int>(f.depth(a.in_channels));
  p.in_columns = (s.out_w - 1) * s.stride + s.kernel;
  p.expand_panels = f.panels(s.channels);
  p.project_panels = a.project_weight == nullptr ? 0 : f.panels(a.out_channels);
  p.padded_channels = f.padded(s.channels);
  p.expanded = a.project_weight == nullptr ? 0 : f.depth(s.channels);
  const int64_t row_bytes = (s.stride * p.row() + s.out_w * p.expanded) * f.value_bytes;
  const int64_t rows = std::min({ceil_div(kBandPixels, s.out_w), kBandBytes / row_bytes,
                                 ceil_div(s.batch * s.out_h, kBands)});
  p.bands = ceil_div(s.out_h, std::max<int64_t>(rows, 1));
  p.band_rows = static_cast<int>(ceil_div(s.out_h, p.bands));
  p.bands = ceil_div(s.out_h, p.band_rows);
  p.in_rows = (p.band_rows - 1) * s.stride + s.kernel;
  return p;
}

// The out-variant: csrc/ops.cpp has its schema.
void inference_out(Tensor input, Tensor expand_weight, Tensor expand_mean, Tensor expand_var,
                   OptionalTensor expand_bn_weight, OptionalTensor expand_bn_bias,
                   double expand_eps, int64_t expand_activation, int64_t stride, int64_t pad_top,
                   int64_t pad_left, OptionalTensor project_weight, OptionalTensor project_mean,
                   OptionalTensor project_var, OptionalTensor project_bn_weight,
                   OptionalTensor project_bn_bias, double project_eps, int64_t project_activation,
                   OptionalTensor residual, bool allow_tf32, Tensor output, OptionalTensor pooled) {
  const FusedMbconv a = check_fused_mbconv(
      input, expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias, expand_eps,
      expand_activation, stride, pad_top, pad_left, project_weight, project_mean, project_var,
      project_bn_weight, project_bn_bias, project_eps, project_activation, residual, allow_tf32,
      output, pooled);
  const ConvShape& s = a.shape;
  const FusedMbconvKernels& k = kernels_for(a.dtype);
  const FusedMbconvPlan p = make_plan(a, k);
  const GemmFormat& f = k.format;
  ask_for_huge_pages(a.output,
                     s.batch * s.out_h * s.out_w * a.out_channels * element_size(a.dtype));
  const bool projects = a.project_weight != nullptr;
  const int64_t taps = int64_t{s.kernel} * s.kernel;
  const Memory expand(f.matrix_bytes(s.channels, taps * p.pixel));
  const Memory project(projects ? f.matrix_bytes(a.out_channels, s.channels) : 1);
  const FusedMbconvWeights weights{expand.get(), project.get()};
  torch::stable::parallel_for(
      0, p.expand_panels + p.project_panels, 1,
      [&](int64_t begin, int64_t end) { k.pack(a, p, weights, begin, end); });
  const int64_t items = s.batch * p.bands;
  const Memory sums(a.pooled == nullptr ? 1 : items * 2 * p.padded_channels * f.accumulate_bytes);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const Memory band(p.in_rows * p.row() * f.value_bytes);
    const Memory expanded(int64_t{p.band_rows} * s.out_w * p.expanded * f.value_bytes + 1);
    k.run(a, p, weights, begin, end, band.get(), expanded.get(),
          a.pooled == nullptr ? nullptr : sums.get());
  });
  if (a.pooled != nullptr) k.merge(a, p, sums.get());
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("fused_mbconv_out", TORCH_BOX(&effnet::inference_out));
}
