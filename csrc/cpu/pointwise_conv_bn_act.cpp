// The pointwise op on the CPU: cuts a call into items (PointwisePlan) and divides them among a
// team.
#include "pointwise_conv_bn_act.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"
#include "memory.h"
#include "results.h"
#include "stage.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<PointwiseKernels> kernels_for = EFFNET_KERNELS_BY_ISA(pointwise_kernels);

// What a block of rows takes of a core's L2 as the panels pass by.
constexpr int64_t kBlockBytes = 128 * 1024;
// Multiply-adds that are worth a thread: about 10 microseconds.
constexpr int64_t kGrain = 1 << 19;
// Items, if there is work enough: several for each thread of a large machine.
constexpr int64_t kItems = 64;

PointwisePlan make_plan(const PointwiseInference& a, const PointwiseKernels& k) {
  const GemmFormat& f = k.format;
  PointwisePlan p;
  p.panel = 2 * f.lanes;
  p.panels = f.panels(a.out_channels);
  p.padded_channels = f.padded(a.out_channels);
  const bool together = a.gate == nullptr && a.pooled == nullptr;
  p.images = together ? 1 : a.batch;
  p.rows = together ? a.batch * a.pixels : a.pixels;
  p.converted = a.prologue.scale != nullptr || a.gate != nullptr ||
                !f.takes(element_size(a.dtype), a.in_channels);
  const int64_t fit = std::max<int64_t>(kBlockBytes / (a.in_channels * f.value_bytes), 24);
  const int64_t wanted = std::max<int64_t>(ceil_div(p.images * p.rows, kItems), 24);
  p.row_blocks = ceil_div(p.rows, std::min(fit, wanted));
  p.block_rows = ceil_div(p.rows, p.row_blocks);
  p.row_blocks = ceil_div(p.rows, p.block_rows);
  // Where rows are few, columns make the items.
  const int64_t groups = std::clamp<int64_t>(kItems / 4 / (p.images * p.row_blocks), 1, p.panels);
  p.group_panels = ceil_div(p.panels, groups);
  p.groups = ceil_div(p.panels, p.group_panels);
  return p;
}

void pack(const PointwiseInference& a, const PointwiseKernels& k, const PointwisePlan& p,
          void* matrix, Team& team) {
  const int64_t panel_cost = int64_t{a.in_channels} * p.panel * 8;
  team.share(p.panels, std::max<int64_t>(kGrain / panel_cost, 1),
             [&](int64_t begin, int64_t end) { k.pack(a, begin, end, matrix); });
}

// All items. sums: as k.multiply() has them.
void multiply(const PointwiseInference& a, const PointwiseKernels& k, const PointwisePlan& p,
              const void* matrix, void* sums, Team& team) {
  const GemmFormat& f = k.format;
  const int64_t item_cost = p.block_rows * p.group_panels * p.panel * a.in_channels;
  team.share(p.items(), std::max<int64_t>(kGrain / item_cost, 1), [&](int64_t begin, int64_t end) {
    const Memory scratch(p.converted ? p.block_rows * f.depth(a.in_channels) * f.value_bytes : 1);
    k.multiply(a, p, matrix, begin, end, scratch.get(), sums);
  });
}

void run(const PointwiseInference& a) {
  const PointwiseKernels& k = kernels_for(a.dtype);
  const PointwisePlan p = make_plan(a, k);
  const GemmFormat& f = k.format;
  ask_for_huge_pages(a.output, a.batch * a.pixels * a.out_channels * element_size(a.dtype));
  const Memory matrix(f.matrix_bytes(a.out_channels, a.in_channels));
  Team team = Team::of_pytorch_threads();
  pack(a, k, p, matrix.get(), team);
  const Memory sums(a.pooled == nullptr ? 1
                                        : p.slots() * 2 * p.padded_channels * f.accumulate_bytes);
  multiply(a, k, p, matrix.get(), a.pooled == nullptr ? nullptr : sums.get(), team);
  if (a.pooled != nullptr) k.merge(a, p, sums.get());
}

class PointwiseStage final : public Stage {
 public:
  PointwiseStage(const PointwiseInference& a, const ImageShape& input, const void* matrix,
                 int64_t weight_bytes)
      : Stage(input, {a.out_channels, input.height, input.width}, weight_bytes),
        a_(a),
        k_(kernels_for(a.dtype)),
        p_(make_plan(a, k_)),
        matrix_(matrix) {}

  void run(const void* image, void* result, void*, Team& team) const override {
    PointwiseInference a = a_;
    a.input = image;
    a.output = result;
    multiply(a, k_, p_, matrix_, nullptr, team);
  }

 private:
  const PointwiseInference a_;
  const PointwiseKernels& k_;
  const PointwisePlan p_;
  const void* matrix_;
};

// What pointwise_stage() reads: the arguments, then the weight.
struct Prepared {
  StageHeader header;
  PointwiseInference arguments;
  int64_t matrix;
};

// A stage of a prepared network; the image is an example and its extent is nothing.
Tensor prepare(Tensor image, Tensor weight, Tensor mean, Tensor var, OptionalTensor bn_weight,
               OptionalTensor bn_bias, double eps, int64_t activation) {
  const Tensor input = channels_last(image);
  const Tensor output =
      empty_image(input, input.size(0), weight.size(0), input.size(2), input.size(3));
  const PointwiseInference a = check_pointwise_inference(
      input, weight, mean, var, bn_weight, bn_bias, eps, activation, std::nullopt, std::nullopt, 0,
      std::nullopt, std::nullopt, false, output, std::nullopt);
  const PointwiseKernels& k = kernels_for(a.dtype);
  Prepared p{};
  Pieces pieces;
  pieces.add(sizeof(Prepared));
  p.matrix = pieces.add(k.format.matrix_bytes(a.out_channels, a.in_channels));
  p.arguments = a;
  p.header = StageHeader(StageHeader::Kind::pointwise, a.dtype, pieces.bytes(), a.in_channels,
                         a.out_channels);
  Tensor packed = empty_bytes(input, pieces.bytes());
  void* memory = packed.mutable_data_ptr();
  std::memcpy(memory, &p, sizeof(p));
  Team team = Team::of_pytorch_threads();
  pack(a, k, make_plan(a, k), at(memory, p.matrix), team);
  return packed;
}

// The out-variant: csrc/ops.cpp has its schema.
void inference_out(Tensor input, Tensor weight, Tensor mean, Tensor var, OptionalTensor bn_weight,
                   OptionalTensor bn_bias, double eps, int64_t activation,
                   OptionalTensor prologue_scale, OptionalTensor prologue_shift,
                   int64_t prologue_activation, OptionalTensor gate, OptionalTensor residual,
                   bool allow_tf32, Tensor output, OptionalTensor pooled) {
  run(check_pointwise_inference(input, weight, mean, var, bn_weight, bn_bias, eps, activation,
                                prologue_scale, prologue_shift, prologue_activation, gate, residual,
                                allow_tf32, output, pooled));
}

// The functional op (effnet_kernels/ops/pointwise_conv_bn_act.py has its schema).
std::tuple<Tensor, Tensor> inference(Tensor image, Tensor weight, Tensor mean, Tensor var,
                                     OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                                     int64_t activation, OptionalTensor prologue_scale,
                                     OptionalTensor prologue_shift, int64_t prologue_activation,
                                     OptionalTensor gate, OptionalTensor residual, bool pool,
                                     bool allow_tf32) {
  STD_TORCH_CHECK(image.dim() == 4 && weight.dim() >= 1,
                  "pointwise_conv_bn_act: input must be (N, C, H, W) and weight (K, C)");
  const Tensor input = channels_last(image);
  const int64_t n = input.size(0), k = weight.size(0);
  Tensor output = empty_image(input, n, k, input.size(2), input.size(3));
  Tensor pooled = pool ? empty_sums(input, {n, k}) : empty_sums(input, {0});
  if (output.numel() == 0) {
    torch::stable::zero_(pooled);
  } else {
    inference_out(input, weight, mean, var, bn_weight, bn_bias, eps, activation, prologue_scale,
                  prologue_shift, prologue_activation, gate, residual, allow_tf32, output,
                  given_if(pool, pooled));
  }
  return {output, pooled};
}

}  // namespace

std::unique_ptr<Stage> pointwise_stage(const void* packed, const StagePlace& place) {
  const Prepared& p = *static_cast<const Prepared*>(packed);
  PointwiseInference a = p.arguments;
  a.batch = 1;
  a.pixels = place.input.pixels();
  return std::make_unique<PointwiseStage>(a, place.input, at(packed, p.matrix), p.header.bytes);
}

}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("pointwise_conv_bn_act_out", TORCH_BOX(&effnet::inference_out));
  m.impl("pointwise_conv_bn_act_prepare", TORCH_BOX(&effnet::prepare));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels, CPU, m) {
  m.impl("pointwise_conv_bn_act", TORCH_BOX(&effnet::inference));
}
