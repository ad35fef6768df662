// BN + activation and its derivatives on the CPU: cuts the pixels into items and runs them on
// PyTorch's threads.
#include "batch_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"
#include "memory.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<BatchNormActKernels> kernels_for =
    EFFNET_KERNELS_BY_ISA(batch_norm_act_kernels);

// Elements of an item: some 10 microseconds of work.
constexpr int64_t kItemElements = 1 << 15;
// Sums are kept for that many slots at most.
constexpr int64_t kSlots = 64;

template <class Arguments>
PixelPlan make_plan(const Arguments& a, const BatchNormActKernels& k) {
  PixelPlan p;
  p.pixels = a.pixels;
  p.block_pixels =
      std::min(a.pixels, std::max<int64_t>(kItemElements / a.channels, kItemElements >> 11));
  p.blocks = ceil_div(a.pixels, p.block_pixels);
  p.items = a.batch * p.blocks;
  p.slots = std::min(p.items, kSlots);
  p.padded_channels = ceil_div(a.channels, k.lanes) * k.lanes;
  return p;
}

int64_t accumulator_size(Dtype dtype) { return element_size(accumulate_dtype(dtype)); }

void run(const ChannelStatistics& a) {
  const BatchNormActKernels& k = kernels_for(a.dtype);
  const PixelPlan p = make_plan(a, k);
  const Memory partials(p.slots * kStatisticsPartials * p.padded_channels *
                        accumulator_size(a.dtype));
  torch::stable::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) {
    k.statistics(a, p, begin, end, partials.get());
  });
  k.merge_statistics(a, p, partials.get());
}

// BN's vectors for one call.
class Folded : public FoldedBatchNorm {
 public:
  Folded(const BatchNormAct& a, const BatchNormActKernels& k, const PixelPlan& p)
      : memory_(kFoldedRows * p.padded_channels * accumulator_size(a.dtype)) {
    char* row = static_cast<char*>(memory_.get());
    for (void** to : {&scale, &shift, &mean, &invstd, &constant, &slope}) {
      *to = row;
      row += p.padded_channels * accumulator_size(a.dtype);
    }
    k.fold(a.bn, a.channels, *this);
  }

 private:
  Memory memory_;
};

int64_t image_bytes(const BatchNormAct& a) {
  return a.batch * a.pixels * a.channels * element_size(a.dtype);
}

void run(const BatchNormActForward& a) {
  const BatchNormActKernels& k = kernels_for(a.dtype);
  const PixelPlan p = make_plan(a, k);
  const Folded f(a, k, p);
  const bool pools = a.pooled != nullptr;
  const Memory partials(pools ? p.items * kPair * p.padded_channels * accumulator_size(a.dtype)
                              : 1);
  if (a.output != nullptr) ask_for_huge_pages(a.output, image_bytes(a));
  torch::stable::parallel_for(0, p.items, 1, [&](int64_t begin, int64_t end) {
    k.forward(a, f, p, begin, end, pools ? partials.get() : nullptr);
  });
  if (pools) k.merge(a.pooled, partials.get(), a.batch, p.blocks, kPair, 0, a.channels, nullptr, p);
}

void run(const BatchNormActSums& a) {
  const BatchNormActKernels& k = kernels_for(a.dtype);
  const PixelPlan p = make_plan(a, k);
  const Folded f(a, k, p);
  const Memory partials(p.slots * kSumsPartials * p.padded_channels * accumulator_size(a.dtype));
  torch::stable::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) {
    k.sums(a, f, p, begin, end, partials.get());
  });
  k.merge(a.grad_bn_weight, partials.get(), 1, p.slots, kSumsPartials, 0, a.channels, f.invstd, p);
  k.merge(a.grad_bn_bias, partials.get(), 1, p.slots, kSumsPartials, 2, a.channels, nullptr, p);
}

void run(const BatchNormActBackward& a) {
  const BatchNormActKernels& k = kernels_for(a.dtype);
  const PixelPlan p = make_plan(a, k);
  const Folded f(a, k, p);
  k.fold_gradients(a.grad_bn_weight, a.grad_bn_bias, a.batch * a.pixels, a.channels, f);
  ask_for_huge_pages(a.grad_input, image_bytes(a));
  torch::stable::parallel_for(0, p.items, 1,
                              [&](int64_t begin, int64_t end) { k.backward(a, f, p, begin, end); });
}

void run(const BatchNormActGate& a) {
  const BatchNormActKernels& k = kernels_for(a.dtype);
  const PixelPlan p = make_plan(a, k);
  const Folded f(a, k, p);
  const Memory partials(p.items * kPair * p.padded_channels * accumulator_size(a.dtype));
  ask_for_huge_pages(a.gated, image_bytes(a));
  torch::stable::parallel_for(0, p.items, 1, [&](int64_t begin, int64_t end) {
    k.gate(a, f, p, begin, end, partials.get());
  });
  k.merge(a.grad_gate, partials.get(), a.batch, p.blocks, kPair, 0, a.channels, nullptr, p);
}

// ---- The out-variants (csrc/ops.cpp). ----

void statistics_out(Tensor input, Tensor mean, Tensor var) {
  run(check_channel_statistics(input, mean, var));
}

void forward_out(Tensor input, Tensor mean, Tensor var, OptionalTensor bn_weight,
                 OptionalTensor bn_bias, double eps, int64_t activation, OptionalTensor gate,
                 OptionalTensor residual, OptionalTensor output, OptionalTensor pooled) {
  run(check_batch_norm_act(input, mean, var, bn_weight, bn_bias, eps, activation, gate, residual,
                           output, pooled));
}

void sums_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var, OptionalTensor bn_weight,
              OptionalTensor bn_bias, double eps, int64_t activation, OptionalTensor gate,
              OptionalTensor grad_pooled, Tensor grad_bn_weight, Tensor grad_bn_bias) {
  run(check_batch_norm_act_sums(grad_output, input, mean, var, bn_weight, bn_bias, eps, activation,
                                gate, grad_pooled, grad_bn_weight, grad_bn_bias));
}

void backward_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var,
                  OptionalTensor bn_weight, OptionalTensor bn_bias, double eps, int64_t activation,
                  OptionalTensor gate, OptionalTensor grad_pooled, OptionalTensor grad_bn_weight,
                  OptionalTensor grad_bn_bias, bool linear, Tensor grad_input) {
  run(check_batch_norm_act_backward(grad_output, input, mean, var, bn_weight, bn_bias, eps,
                                    activation, gate, grad_pooled, grad_bn_weight, grad_bn_bias,
                                    linear, grad_input));
}

void gate_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var, OptionalTensor bn_weight,
              OptionalTensor bn_bias, double eps, int64_t activation, Tensor gate, Tensor grad_gate,
              Tensor gated, Tensor grad_gated) {
  run(check_batch_norm_act_gate(grad_output, input, mean, var, bn_weight, bn_bias, eps, activation,
                                gate, grad_gate, gated, grad_gated));
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("channel_statistics_out", TORCH_BOX(&effnet::statistics_out));
  m.impl("batch_norm_act_out", TORCH_BOX(&effnet::forward_out));
  m.impl("batch_norm_act_sums_out", TORCH_BOX(&effnet::sums_out));
  m.impl("batch_norm_act_backward_out", TORCH_BOX(&effnet::backward_out));
  m.impl("batch_norm_act_gate_out", TORCH_BOX(&effnet::gate_out));
}
