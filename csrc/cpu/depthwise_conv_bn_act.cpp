// The depthwise op on the CPU: cuts a call into items (DepthwisePlan), runs them on PyTorch's
// threads and merges the partial sums in a fixed order.
#include "depthwise_conv_bn_act.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"
#include "memory.h"
#include "results.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<DepthwiseKernels> kernels_for = EFFNET_KERNELS_BY_ISA(depthwise_kernels);

// What a block of channels keeps in L1: its rings of rows.
constexpr int64_t kL1Bytes = 40 * 1024;
// Cache lines of a pixel that a block takes together, at least: shorter pieces of memory cost more
// than a ring that leaves L1.
constexpr int64_t kChunkLines = 4;
// The same where there is no ring, at most: longer ones are as fast, and leave fewer blocks.
constexpr int64_t kStreamLines = 16;
// Rows of a strip without a ring stay in a core's L2 until the last row of results that needs them.
constexpr int64_t kL2Bytes = 256 * 1024;
// Columns of a strip with a ring, at most: a halo of k - 1 input columns is then little.
constexpr int kStripColumns = 32;
// Rows of a band, at least, for the same reason.
constexpr int kBandRows = 8;
// Items, if there are rows enough: several for each thread of a large machine.
constexpr int64_t kItems = 64;
// Sums are kept for that many slots at most.
constexpr int64_t kSlots = 64;
// Tensors that are larger together leave the cache before they are used again.
constexpr int64_t kCacheBytes = 8 << 20;

// rings: how many rings of k rows the kernels keep, 0 if they read the tensors where they lie.
DepthwisePlan make_plan(const ConvShape& s, const DepthwiseKernels& k, int64_t element_size,
                        int rings) {
  DepthwisePlan p;
  p.lanes = k.lanes;
  p.vectors = static_cast<int>(ceil_div(s.channels, p.lanes));
  const int64_t line = ceil_div(64, p.lanes * element_size);
  const int64_t vector_bytes = k.accumulator_size * p.lanes;
  const int64_t longest = rings == 0 ? std::min<int64_t>(kStreamLines * line, p.vectors) : 0;
  const int64_t columns =
      rings == 0 ? std::max<int64_t>(kL2Bytes / (longest * vector_bytes * s.kernel * s.stride),
                                     kStripColumns)
                 : kStripColumns;
  p.strips = static_cast<int>(ceil_div(s.out_w, columns));
  p.strip_cols = static_cast<int>(ceil_div(s.out_w, p.strips));
  p.strips = static_cast<int>(ceil_div(s.out_w, p.strip_cols));
  p.tile = best_depthwise_tile(p.strip_cols);
  p.grad_tile = best_depthwise_tile(
      (p.strips == 1 ? s.in_w : p.strip_cols * s.stride) + s.stride - 1, s.stride);

  const int64_t others = s.batch * p.strips, most_bands = std::max(s.out_h / kBandRows, 1);
  int64_t block = longest, least = kChunkLines * line, wanted = kItems / 4;
  if (rings > 0) {
    const int64_t ring_bytes =
        rings * vector_bytes *
        (int64_t{s.kernel} * (p.strip_cols * s.stride + s.kernel) + p.strip_cols);
    block = std::clamp<int64_t>(kL1Bytes / ring_bytes, kChunkLines * line, 8);
    least = line;
    wanted = kItems / 2 * most_bands;
  }
  while (block / 2 >= least && ceil_div(p.vectors, block) * others * most_bands < wanted) {
    block /= 2;
  }
  block = std::min<int64_t>(std::max(block, line), p.vectors);
  p.blocks = static_cast<int>(ceil_div(p.vectors, block));
  p.group = 1;

  const int64_t bands = std::clamp<int64_t>(ceil_div(kItems, p.blocks * others), 1, most_bands);
  p.band_rows = static_cast<int>(ceil_div(s.out_h, bands));
  p.bands = static_cast<int>(ceil_div(s.out_h, p.band_rows));
  p.slots = p.units(s);
  p.prefetch = s.batch * s.channels * element_size *
                   (int64_t{s.in_h} * s.in_w + int64_t{s.out_h} * s.out_w) >
               kCacheBytes;
  return p;
}

// Whether the convolution reads its input where it lies (Convolution::run).
template <class Arguments>
int forward_rings(const Arguments& a, const DepthwiseKernels& k, int64_t element_size) {
  const bool in_place = element_size == static_cast<int64_t>(k.accumulator_size) &&
                        a.prologue.scale == nullptr && a.shape.channels % k.lanes == 0;
  return in_place ? 0 : 1;
}

int64_t input_bytes(const ConvShape& s, int64_t element_size) {
  return s.batch * s.channels * s.in_h * s.in_w * element_size;
}

int64_t output_bytes(const ConvShape& s, int64_t element_size) {
  return s.batch * s.channels * s.out_h * s.out_w * element_size;
}

// What one call needs to run its items in parallel.
class Runner {
 public:
  Runner(const ConvShape& s, const DepthwisePlan& p, const DepthwiseKernels& k)
      : plan_(p), scratch_bytes_(k.scratch_bytes(s, p)) {
    // About 10 microseconds of work are worth a thread.
    const double work =
        static_cast<double>(s.batch) * s.out_h * s.out_w * p.vectors * (s.kernel * s.kernel + 25);
    threads_ = std::max(1.0, work / 40000);
  }

  // body(begin, end, scratch) on all items.
  template <class Body>
  void items(const Body& body) const {
    parallel(plan_.blocks * plan_.slots, body);
  }

  // body(first block, last block + 1, scratch) on all blocks.
  template <class Body>
  void blocks(const Body& body) const {
    parallel(plan_.blocks, body);
  }

 private:
  template <class Body>
  void parallel(int64_t count, const Body& body) const {
    const auto grain = static_cast<int64_t>(static_cast<double>(count) / threads_) + 1;
    torch::stable::parallel_for(0, count, threads_ > 1 ? std::max<int64_t>(1, grain / 2) : count,
                                [&](int64_t begin, int64_t end) {
                                  const Memory scratch(scratch_bytes_);
                                  body(begin, end, scratch.get());
                                });
  }

  DepthwisePlan plan_;
  size_t scratch_bytes_;
  double threads_;
};

// The sums of an image from those of its bands and strips.
template <class F>
void add_units(F* pooled, const F* units, int64_t batch, int64_t parts, int64_t channels) {
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      F sum = 0;
      for (int64_t i = 0; i < parts; ++i) sum += units[(n * parts + i) * channels + c];
      pooled[n * channels + c] = sum;
    }
  }
}

// Where the kernels put the sums of each unit: into `pooled` itself where units are whole images.
class Pool {
 public:
  Pool(void* pooled, const ConvShape& s, const DepthwisePlan& p, const DepthwiseKernels& k)
      : pooled_(pooled),
        shape_(s),
        parts_(int64_t{p.bands} * p.strips),
        double_(k.accumulator_size == 8),
        memory_(pooled != nullptr && parts_ > 1 ? p.units(s) * s.channels * k.accumulator_size
                                                : 1) {}

  void* target() const { return pooled_ == nullptr || parts_ == 1 ? pooled_ : memory_.get(); }

  void finish() const {
    if (pooled_ == nullptr || parts_ == 1) return;
    if (double_) {
      add_units(static_cast<double*>(pooled_), static_cast<const double*>(memory_.get()),
                shape_.batch, parts_, shape_.channels);
    } else {
      add_units(static_cast<float*>(pooled_), static_cast<const float*>(memory_.get()),
                shape_.batch, parts_, shape_.channels);
    }
  }

 private:
  void* pooled_;
  ConvShape shape_;
  int64_t parts_;
  bool double_;
  Memory memory_;
};

void run(const DepthwiseInference& a) {
  const DepthwiseKernels& k = kernels_for(a.dtype);
  const int64_t size = element_size(a.dtype);
  const DepthwisePlan p = make_plan(a.shape, k, size, forward_rings(a, k, size));
  ask_for_huge_pages(a.output, output_bytes(a.shape, size));
  const Pool pool(a.pooled, a.shape, p, k);
  Runner(a.shape, p, k).items([&](int64_t begin, int64_t end, void* scratch) {
    k.inference(a, p, begin, end, scratch, pool.target());
  });
  pool.finish();
}

void run(const DepthwiseTraining& a) {
  const DepthwiseKernels& k = kernels_for(a.dtype);
  const int64_t size = element_size(a.dtype);
  DepthwisePlan p = make_plan(a.shape, k, size, forward_rings(a, k, size));
  ask_for_huge_pages(a.conv, output_bytes(a.shape, size));
  p.slots = std::min(p.slots, kSlots);
  const Pool pool(a.pooled, a.shape, p, k);
  const Runner runner(a.shape, p, k);
  const Memory partials(p.slots * kStatisticsRows * p.padded_channels() * k.accumulator_size);
  runner.items([&](int64_t begin, int64_t end, void* scratch) {
    k.convolve(a, p, begin, end, scratch, partials.get());
  });
  if (a.batch_stats) {
    runner.blocks([&](int64_t begin, int64_t end, void*) {
      for (int64_t block = begin; block < end; ++block) {
        k.merge_statistics(a, p, static_cast<int>(block), partials.get());
      }
    });
  }
  if (a.output == nullptr) return;
  ask_for_huge_pages(a.output, output_bytes(a.shape, size));
  runner.items([&](int64_t begin, int64_t end, void* scratch) {
    k.normalize(a, p, begin, end, scratch, pool.target());
  });
  pool.finish();
}

void run(const DepthwiseBackward& a) {
  const DepthwiseKernels& k = kernels_for(a.dtype);
  const int64_t size = element_size(a.dtype);
  DepthwisePlan sums = make_plan(a.shape, k, size, 0);
  sums.slots = std::min(sums.slots, kSlots);
  DepthwisePlan p = make_plan(a.shape, k, size, 2);
  p.slots = std::min(p.slots, kSlots);
  const int64_t rows =
      std::max(sums.slots * kBnGradientRows, p.slots * gradient_rows(a.shape.kernel));
  const Memory partials(rows * p.padded_channels() * k.accumulator_size);
  const Runner reduction(a.shape, sums, k);
  reduction.items([&](int64_t begin, int64_t end, void* scratch) {
    k.reduce(a, sums, begin, end, scratch, partials.get());
  });
  reduction.blocks([&](int64_t begin, int64_t end, void*) {
    for (int64_t block = begin; block < end; ++block) {
      k.merge_bn_gradients(a, sums, static_cast<int>(block), partials.get());
    }
  });
  if (a.grad_input == nullptr && a.grad_weight == nullptr) return;
  if (a.grad_input != nullptr) ask_for_huge_pages(a.grad_input, input_bytes(a.shape, size));
  const Runner runner(a.shape, p, k);
  runner.items([&](int64_t begin, int64_t end, void* scratch) {
    k.gradients(a, p, begin, end, scratch, partials.get());
  });
  runner.blocks([&](int64_t begin, int64_t end, void*) {
    for (int64_t block = begin; block < end; ++block) {
      k.merge_gradients(a, p, static_cast<int>(block), partials.get());
    }
  });
}

// ---- The functional ops (effnet_kernels/ops/depthwise_conv_bn_act.py has their schemas). ----

// The pooled sums, or what stands for them where they are not asked for.
Tensor empty_pooled(const Tensor& input, bool pool) {
  return pool ? empty_sums(input, {input.size(0), input.size(1)}) : empty_sums(input, {0});
}

std::tuple<Tensor, Tensor> inference(Tensor image, Tensor weight, Tensor mean, Tensor var,
                                     OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                                     int64_t stride, std::vector<int64_t> padding,
                                     int64_t activation, OptionalTensor prologue_scale,
                                     OptionalTensor prologue_shift, int64_t prologue_activation,
                                     bool pool) {
  const auto [height, width] =
      depthwise_output_size("depthwise_conv_bn_act", image, weight, stride, padding);
  const Tensor input = channels_last(image);
  Tensor output = empty_image(input, input.size(0), input.size(1), height, width);
  Tensor pooled = empty_pooled(input, pool);
  if (output.numel() == 0) {
    torch::stable::zero_(pooled);
  } else {
    run(check_depthwise_inference(input, weight, mean, var, bn_weight, bn_bias, eps, stride,
                                  padding[0], padding[1], activation, prologue_scale,
                                  prologue_shift, prologue_activation, output,
                                  given_if(pool, pooled)));
  }
  return {output, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train(
    Tensor image, Tensor weight, OptionalTensor mean, OptionalTensor var, OptionalTensor bn_weight,
    OptionalTensor bn_bias, double eps, int64_t stride, std::vector<int64_t> padding,
    int64_t activation, OptionalTensor prologue_scale, OptionalTensor prologue_shift,
    int64_t prologue_activation, bool pool) {
  const auto [height, width] =
      depthwise_output_size("depthwise_conv_bn_act_train", image, weight, stride, padding);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(),
                  "depthwise_conv_bn_act_train: mean and var must be given together");
  const bool batch_stats = !mean.has_value();
  const Tensor input = channels_last(image);
  const int64_t n = input.size(0), c = input.size(1), statistics = batch_stats ? c : 0;
  Tensor output = empty_image(input, n, c, height, width);
  Tensor conv = empty_image(input, n, c, height, width);
  Tensor pooled = empty_pooled(input, pool);
  Tensor batch_mean = empty_sums(input, {statistics}), batch_var = empty_sums(input, {statistics});
  if (output.numel() == 0) {
    for (Tensor* sums : {&pooled, &batch_mean, &batch_var}) torch::stable::zero_(*sums);
  } else {
    run(check_depthwise_training(input, weight, bn_weight, bn_bias, eps, stride, padding[0],
                                 padding[1], activation, prologue_scale, prologue_shift,
                                 prologue_activation, batch_stats, conv,
                                 batch_stats ? batch_mean : *mean, batch_stats ? batch_var : *var,
                                 output, given_if(pool, pooled)));
  }
  return {output, pooled, batch_mean, batch_var, conv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_output, OptionalTensor grad_pooled, Tensor conv, Tensor mean, Tensor var,
    OptionalTensor bn_weight, OptionalTensor bn_bias, double eps, bool batch_stats, Tensor image,
    Tensor weight, int64_t stride, std::vector<int64_t> padding, int64_t activation,
    OptionalTensor prologue_scale, OptionalTensor prologue_shift, int64_t prologue_activation,
    bool needs_input, bool needs_weight) {
  depthwise_output_size("depthwise_conv_bn_act_backward", image, weight, stride, padding);
  const Tensor input = channels_last(image);
  const int64_t n = input.size(0), c = input.size(1), k = weight.size(2);
  const bool with_prologue = prologue_scale.has_value() && needs_input;
  const int64_t prologue = with_prologue ? c : 0;
  Tensor grad_input = needs_input ? empty_image(input, n, c, input.size(2), input.size(3))
                                  : torch::stable::new_empty(input, {0});
  Tensor grad_weight = torch::stable::new_empty(
      weight, needs_weight ? std::vector<int64_t>{c, 1, k, k} : std::vector<int64_t>{0});
  Tensor grad_bn_weight = empty_sums(input, {c}), grad_bn_bias = empty_sums(input, {c});
  Tensor grad_scale = empty_sums(input, {prologue}), grad_shift = empty_sums(input, {prologue});
  if (conv.numel() == 0) {
    for (Tensor* grad :
         {&grad_input, &grad_weight, &grad_bn_weight, &grad_bn_bias, &grad_scale, &grad_shift}) {
      torch::stable::zero_(*grad);
    }
  } else {
    run(check_depthwise_backward(
        channels_last(grad_output),
        grad_pooled ? OptionalTensor(torch::stable::contiguous(*grad_pooled)) : std::nullopt, conv,
        mean, var, bn_weight, bn_bias, eps, activation, batch_stats, input, weight, stride,
        padding[0], padding[1], prologue_scale, prologue_shift, prologue_activation,
        given_if(needs_input, grad_input), given_if(needs_weight, grad_weight), grad_bn_weight,
        grad_bn_bias, given_if(with_prologue, grad_scale), given_if(with_prologue, grad_shift)));
  }
  return {grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_scale, grad_shift};
}

// ---- The out-variants (csrc/ops.cpp), for ops that are composed of them. ----

void train_out(Tensor input, Tensor weight, OptionalTensor bn_weight, OptionalTensor bn_bias,
               double eps, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t activation,
               OptionalTensor prologue_scale, OptionalTensor prologue_shift,
               int64_t prologue_activation, bool batch_stats, Tensor conv, Tensor mean, Tensor var,
               OptionalTensor output, OptionalTensor pooled) {
  run(check_depthwise_training(input, weight, bn_weight, bn_bias, eps, stride, pad_top, pad_left,
                               activation, prologue_scale, prologue_shift, prologue_activation,
                               batch_stats, conv, mean, var, output, pooled));
}

void backward_out(Tensor grad_output, OptionalTensor grad_pooled, Tensor conv, Tensor mean,
                  Tensor var, OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                  int64_t activation, bool batch_stats, Tensor input, Tensor weight, int64_t stride,
                  int64_t pad_top, int64_t pad_left, OptionalTensor prologue_scale,
                  OptionalTensor prologue_shift, int64_t prologue_activation,
                  OptionalTensor grad_input, OptionalTensor grad_weight, Tensor grad_bn_weight,
                  Tensor grad_bn_bias, OptionalTensor grad_prologue_scale,
                  OptionalTensor grad_prologue_shift) {
  run(check_depthwise_backward(grad_output, grad_pooled, conv, mean, var, bn_weight, bn_bias, eps,
                               activation, batch_stats, input, weight, stride, pad_top, pad_left,
                               prologue_scale, prologue_shift, prologue_activation, grad_input,
                               grad_weight, grad_bn_weight, grad_bn_bias, grad_prologue_scale,
                               grad_prologue_shift));
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("depthwise_conv_bn_act_train_out", TORCH_BOX(&effnet::train_out));
  m.impl("depthwise_conv_bn_act_backward_out", TORCH_BOX(&effnet::backward_out));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels, CPU, m) {
  m.impl("depthwise_conv_bn_act", TORCH_BOX(&effnet::inference));
  m.impl("depthwise_conv_bn_act_train", TORCH_BOX(&effnet::train));
  m.impl("depthwise_conv_bn_act_backward", TORCH_BOX(&effnet::backward));
}
