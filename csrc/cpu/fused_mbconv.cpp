// The Fused-MBConv block on the CPU: cuts a call into bands of rows (FusedMbconvPlan), which go
// through the block side by side, each in one thread's caches.
#include "fused_mbconv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"
#include "memory.h"
#include "results.h"
#include "stage.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<FusedMbconvKernels> kernels_for =
    EFFNET_KERNELS_BY_ISA(fused_mbconv_kernels);

// What a band takes of a core's L2: its input and its part of the expanded tensor. The weights pass
// by, once a band.
constexpr int64_t kBandBytes = 320 * 1024;
// Pixels of a band, if they fit: the weights are then no traffic to speak of.
constexpr int64_t kBandPixels = 512;
// Bands, if there are rows enough: several for each thread of a large machine.
constexpr int64_t kBands = 64;
// Weights beyond a core's L2 come from memory, once a band; so many pixels at least then share
// them, as long as there are bands for as many threads.
constexpr int64_t kHeavyBytes = 2 * 1024 * 1024;
constexpr int64_t kHeavyPixels = 96;
constexpr int64_t kHeavyBands = 8;

// Vectors of channels from which on the transforms of winograd.h cost no more than the products
// they save.
constexpr int kWinogradVectors = 2;

// Of the weights alone: they may be packed before there is an image.
bool takes_winograd(const FusedMbconv& a, const GemmFormat& f) {
  const bool exact = f.value_bytes == f.accumulate_bytes;  // kTransforms
  return exact && a.shape.kernel == 3 && a.shape.stride == 1 &&
         std::min(a.in_channels, a.shape.channels) >= kWinogradVectors * f.lanes;
}

// Of the packed expansion, likewise.
int64_t expand_bytes(const FusedMbconv& a, const GemmFormat& f) {
  const int64_t taps = int64_t{a.shape.kernel} * a.shape.kernel;
  return takes_winograd(a, f)
             ? f.kPositions * f.matrix_bytes(f.padded(a.shape.channels), a.in_channels)
             : f.matrix_bytes(a.shape.channels, taps * f.depth(a.in_channels));
}

FusedMbconvPlan make_plan(const FusedMbconv& a, const FusedMbconvKernels& k) {
  const ConvShape& s = a.shape;
  const GemmFormat& f = k.format;
  FusedMbconvPlan p{};
  p.winograd = takes_winograd(a, f);
  p.pixel = static_cast<int>(p.winograd ? f.padded(a.in_channels) : f.depth(a.in_channels));
  const int results = static_cast<int>(p.winograd ? ceil_div(s.out_w, 2) * 2 : s.out_w);
  p.in_columns = (results - 1) * s.stride + s.kernel;
  p.expand_panels = f.panels(s.channels);
  p.project_panels = a.project_weight == nullptr ? 0 : f.panels(a.out_channels);
  p.padded_channels = f.padded(s.channels);
  p.expanded = a.project_weight == nullptr ? 0 : f.depth(s.channels);
  const int64_t row_bytes = (s.stride * p.row() + s.out_w * p.expanded) * f.value_bytes;
  const int64_t rows = std::min({ceil_div(kBandPixels, s.out_w), kBandBytes / row_bytes,
                                 ceil_div(s.batch * s.out_h, kBands)});
  int64_t least = 1;
  if (expand_bytes(a, f) > kHeavyBytes) {
    least = std::min(ceil_div(kHeavyPixels, s.out_w), ceil_div(s.batch * s.out_h, kHeavyBands));
  }
  p.bands = ceil_div(s.out_h, std::max({rows, least, int64_t{1}}));
  p.band_rows = static_cast<int>(ceil_div(s.out_h, p.bands));
  if (p.winograd) p.band_rows = static_cast<int>(ceil_div(p.band_rows, 2) * 2);
  p.bands = ceil_div(s.out_h, p.band_rows);
  p.in_rows = (p.band_rows - 1) * s.stride + s.kernel;
  p.tiles = p.winograd ? int64_t{p.band_rows} / 2 * results / 2 : 0;
  return p;
}

// Where the packed weights lie.
struct Layout {
  Layout() = default;
  Layout(const FusedMbconv& a, const GemmFormat& f, Pieces& pieces) {
    expand = pieces.add(expand_bytes(a, f));
    project = pieces.add(a.project_weight ? f.matrix_bytes(a.out_channels, a.shape.channels) : 0);
  }

  FusedMbconvWeights in(void* memory) const { return {at(memory, expand), at(memory, project)}; }

  int64_t expand = 0, project = 0;
};

void pack(const FusedMbconv& a, const FusedMbconvKernels& k, const FusedMbconvPlan& p,
          const FusedMbconvWeights& weights, Team& team) {
  team.share(p.expand_panels + p.project_panels, 1,
             [&](int64_t begin, int64_t end) { k.pack(a, p, weights, begin, end); });
}

// All bands of a.shape.batch images. sums: as k.run() has them.
void run_bands(const FusedMbconv& a, const FusedMbconvKernels& k, const FusedMbconvPlan& p,
               const FusedMbconvWeights& weights, void* sums, Team& team) {
  const ConvShape& s = a.shape;
  const GemmFormat& f = k.format;
  team.share(s.batch * p.bands, 1, [&](int64_t begin, int64_t end) {
    Pieces pieces;
    const int64_t input = pieces.add(p.in_rows * p.row() * f.value_bytes);
    const int64_t expanded =
        pieces.add(int64_t{p.band_rows} * s.out_w * p.expanded * f.value_bytes);
    const int64_t transformed = f.kPositions * p.tiles * f.accumulate_bytes;
    const int64_t windows = pieces.add(transformed * p.pixel);
    const int64_t products = pieces.add(transformed * f.widest_panel());
    const Memory memory(pieces.bytes());
    const FusedMbconvScratch scratch{at(memory.get(), input), at(memory.get(), expanded),
                                     at(memory.get(), windows), at(memory.get(), products)};
    k.run(a, p, weights, begin, end, scratch, sums);
  });
}

class FusedMbconvStage final : public Stage {
 public:
  // `residual`: the input is added.
  FusedMbconvStage(const FusedMbconv& a, const FusedMbconvWeights& weights, int64_t weight_bytes,
                   bool residual)
      : Stage({a.in_channels, a.shape.in_h, a.shape.in_w},
              {a.out_channels, a.shape.out_h, a.shape.out_w}, weight_bytes),
        a_(a),
        k_(kernels_for(a.dtype)),
        p_(make_plan(a, k_)),
        weights_(weights),
        residual_(residual) {}

  void run(const void* image, void* result, void*, Team& team) const override {
    FusedMbconv a = a_;
    a.input = image;
    a.output = result;
    a.residual = residual_ ? image : nullptr;
    run_bands(a, k_, p_, weights_, nullptr, team);
  }

 private:
  const FusedMbconv a_;
  const FusedMbconvKernels& k_;
  const FusedMbconvPlan p_;
  const FusedMbconvWeights weights_;
  const bool residual_;
};

// What fused_mbconv_stage() reads: the arguments, then the weights.
struct Prepared {
  StageHeader header;
  FusedMbconv arguments;
  Layout layout;
};

Tensor prepare(const Tensor& like, const FusedMbconv& a) {
  const FusedMbconvKernels& k = kernels_for(a.dtype);
  Prepared p{};
  Pieces pieces;
  pieces.add(sizeof(Prepared));
  p.layout = Layout(a, k.format, pieces);
  p.arguments = a;
  p.header = StageHeader(StageHeader::Kind::fused_mbconv, a.dtype, pieces.bytes(), a.in_channels,
                         a.out_channels, a.shape.kernel, a.shape.stride, a.residual != nullptr);
  Tensor packed = empty_bytes(like, pieces.bytes());
  std::memcpy(packed.mutable_data_ptr(), &p, sizeof(p));
  Team team = Team::of_pytorch_threads();
  pack(a, k, make_plan(a, k), p.layout.in(packed.mutable_data_ptr()), team);
  return packed;
}

// Of the out-variant's arguments (csrc/ops.cpp) those that a stage of a prepared network has; the
// image is an example and its extent is nothing.
Tensor prepare_call(Tensor image, Tensor expand_weight, Tensor expand_mean, Tensor expand_var,
                    OptionalTensor expand_bn_weight, OptionalTensor expand_bn_bias,
                    double expand_eps, int64_t expand_activation, int64_t stride,
                    std::vector<int64_t> padding, OptionalTensor project_weight,
                    OptionalTensor project_mean, OptionalTensor project_var,
                    OptionalTensor project_bn_weight, OptionalTensor project_bn_bias,
                    double project_eps, int64_t project_activation, bool residual) {
  const auto [height, width] =
      depthwise_output_size("fused_mbconv_prepare", image, expand_weight, stride, padding);
  const Tensor input = channels_last(image);
  const Tensor& last = project_weight ? *project_weight : expand_weight;
  const Tensor output = empty_image(input, input.size(0), last.size(0), height, width);
  return prepare(
      input, check_fused_mbconv(input, channels_last(expand_weight), expand_mean, expand_var,
                                expand_bn_weight, expand_bn_bias, expand_eps, expand_activation,
                                stride, padding[0], padding[1], project_weight, project_mean,
                                project_var, project_bn_weight, project_bn_bias, project_eps,
                                project_activation, residual ? std::optional(input) : std::nullopt,
                                false, output, std::nullopt));
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
  ask_for_huge_pages(a.output,
                     s.batch * s.out_h * s.out_w * a.out_channels * element_size(a.dtype));
  Pieces pieces;
  const Layout layout(a, k.format, pieces);
  const Memory packed(pieces.bytes());
  const FusedMbconvWeights weights = layout.in(packed.get());
  Team team = Team::of_pytorch_threads();
  pack(a, k, p, weights, team);
  const int64_t row = 2 * p.padded_channels * k.format.accumulate_bytes;
  const Memory sums(a.pooled == nullptr ? 1 : s.batch * p.bands * row);
  run_bands(a, k, p, weights, a.pooled == nullptr ? nullptr : sums.get(), team);
  if (a.pooled != nullptr) k.merge(a, p, sums.get());
}

}  // namespace

std::unique_ptr<Stage> fused_mbconv_stage(const void* packed, const StagePlace& place) {
  const Prepared& p = *static_cast<const Prepared*>(packed);
  FusedMbconv a = p.arguments;
  place.put_into(a.shape);
  // Only read from here on.
  const FusedMbconvWeights weights = p.layout.in(const_cast<void*>(packed));
  return std::make_unique<FusedMbconvStage>(a, weights, p.header.bytes, a.residual != nullptr);
}

}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("fused_mbconv_out", TORCH_BOX(&effnet::inference_out));
  m.impl("fused_mbconv_prepare", TORCH_BOX(&effnet::prepare_call));
}
