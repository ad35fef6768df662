// Squeeze-and-excitation on the CPU: divides each step among threads.
#include "squeeze_excite.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"
#include "memory.h"
#include "results.h"
#include "stage.h"
#include "team.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<SqueezeExciteKernels> kernels_for =
    EFFNET_KERNELS_BY_ISA(squeeze_excite_kernels);

// Multiply-adds, or elements moved, that are worth a thread: about 10 microseconds.
constexpr int64_t kGrain = 1 << 15;
// Parts of the work there should be, if an image alone has to make them.
constexpr int64_t kParts = 16;

// Items that cost `each` and are worth a thread.
int64_t grain(int64_t each) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(each, 1)); }

// body(begin, end) on `count` items that cost `each`.
template <class Body>
void parallel(int64_t count, int64_t each, const Body& body) {
  torch::stable::parallel_for(0, count, grain(each), body);
}

void run(const ChannelSums& a, Team& team) {
  const auto& k = kernels_for(a.dtype);
  const int64_t size = element_size(accumulate_dtype(a.dtype));
  // A part is a whole number of cache lines of any dtype.
  const auto parts =
      static_cast<int>(std::clamp<int64_t>(kParts / a.batch, 1, ceil_div(a.channels, 64)));
  team.share(a.batch * parts, grain(a.pixels * a.channels / parts),
             [&](int64_t begin, int64_t end) {
               const Memory scratch(2 * (a.channels + 64) * size);
               k.sums(a, parts, begin, end, scratch.get());
             });
}

void run(const ChannelSums& a) {
  Team team = Team::of_pytorch_threads();
  run(a, team);
}

void run(const ChannelScale& a) {
  const auto& k = kernels_for(a.dtype);
  const int64_t pixels = a.batch * a.pixels;
  ask_for_huge_pages(a.output, pixels * a.channels * element_size(a.dtype));
  Team team = Team::of_pytorch_threads();
  team.share(pixels, grain(a.channels),
             [&](int64_t begin, int64_t end) { k.scale(a, begin, end); });
}

template <class Gate>
int64_t hidden_bytes(const Gate& a) {
  return a.batch * a.squeezed * element_size(a.accumulate);
}

// excited = activation(hidden)
template <class Gate>
void excite(const Gate& a, void* excited) {
  std::memcpy(excited, a.hidden, hidden_bytes(a));
  kernels_for(a.weight_dtype).activate(a.activation, excited, a.batch * a.squeezed);
}

int64_t packed_block_bytes(const SqueezeExciteGate& a) {
  return packed_block_size(a) * element_size(a.accumulate);
}

}  // namespace

int64_t packed_gate_bytes(const SqueezeExciteGate& a) {
  return ceil_div(a.channels, kGateBlock) * packed_block_bytes(a);
}

void pack_gate(const SqueezeExciteGate& a, void* packed) {
  kernels_for(a.weight_dtype).pack_gate(a, 0, ceil_div(a.channels, kGateBlock), packed);
}

void squeeze_excite_gate(const SqueezeExciteGate& a, const void* packed, Team& team) {
  const auto& k = kernels_for(a.weight_dtype);
  team.share(a.squeezed, grain(a.batch * a.channels),
             [&](int64_t begin, int64_t end) { k.hidden(a, begin, end); });
  const Memory excited(hidden_bytes(a));
  excite(a, excited.get());
  const int64_t block_bytes = packed_block_bytes(a);
  team.share(ceil_div(a.channels, kGateBlock), grain((a.batch + 1) * a.squeezed * kGateBlock),
             [&](int64_t begin, int64_t end) {
               if (packed != nullptr) {
                 k.gate(a, excited.get(), at(packed, begin * block_bytes), begin, end);
                 return;
               }
               const Memory block(block_bytes);
               for (int64_t i = begin; i < end; ++i) {
                 k.pack_gate(a, i, i + 1, block.get());
                 k.gate(a, excited.get(), block.get(), i, i + 1);
               }
             });
}

namespace {

void run(const SqueezeExciteGate& a) {
  Team team = Team::of_pytorch_threads();
  squeeze_excite_gate(a, nullptr, team);
}

void run(const SqueezeExciteGateBackward& a) {
  const auto& k = kernels_for(a.weight_dtype);
  const int64_t size = element_size(a.accumulate), weights = int64_t{a.channels} * a.squeezed;
  const Memory grad_logits(a.batch * a.channels * size), grad_hidden(a.batch * a.squeezed * size);
  parallel(a.batch, 2 * weights, [&](int64_t begin, int64_t end) {
    k.image_gradients(a, grad_logits.get(), grad_hidden.get(), begin, end);
  });
  const Memory excited(hidden_bytes(a));
  excite(a, excited.get());
  parallel(a.channels, a.batch * a.squeezed, [&](int64_t begin, int64_t end) {
    k.expand_gradients(a, excited.get(), grad_logits.get(), begin, end);
  });
  parallel(a.squeezed, a.batch * a.channels, [&](int64_t begin, int64_t end) {
    k.reduce_gradients(a, grad_hidden.get(), begin, end);
  });
}

// ---- The functional ops (effnet_kernels/ops/squeeze_excite.py has their schemas). ----

int64_t pixels_of(const char* op, const Tensor& image) {
  STD_TORCH_CHECK(image.dim() == 4, op, ": input must have 4 dimensions (N, C, H, W), not ",
                  image.dim());
  return image.size(2) * image.size(3);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor image, OptionalTensor pooled,
                                                   Tensor reduce_weight, OptionalTensor reduce_bias,
                                                   Tensor expand_weight, OptionalTensor expand_bias,
                                                   int64_t activation, int64_t gate_activation) {
  const int64_t pixels = pixels_of("squeeze_excite", image);
  const Tensor input = channels_last(image);
  const int64_t n = input.size(0), c = input.size(1);
  Tensor output = empty_image(input, n, c, input.size(2), input.size(3));
  Tensor sums = pooled ? empty_sums(input, {0}) : empty_sums(input, {n, c});
  Tensor hidden = empty_sums(input, {n, reduce_weight.size(0)}), gate = empty_sums(input, {n, c});
  if (output.numel() > 0) {
    if (!pooled) run(check_channel_sums(input, std::nullopt, sums));
    run(check_squeeze_excite_gate(pooled ? *pooled : sums, pixels, reduce_weight, reduce_bias,
                                  expand_weight, expand_bias, activation, gate_activation, hidden,
                                  gate));
    run(check_channel_scale(input, gate, std::nullopt, output));
  }
  return {output, sums, hidden, gate};
}

std::tuple<Tensor, Tensor> gate_alone(Tensor pooled, int64_t pixels, Tensor reduce_weight,
                                      OptionalTensor reduce_bias, Tensor expand_weight,
                                      OptionalTensor expand_bias, int64_t activation,
                                      int64_t gate_activation) {
  STD_TORCH_CHECK(pooled.dim() == 2, "squeeze_excite_gate: pooled must be (N, C)");
  Tensor gate = empty_sums(pooled, {pooled.size(0), pooled.size(1)});
  Tensor hidden = empty_sums(pooled, {pooled.size(0), reduce_weight.size(0)});
  if (pooled.numel() > 0) {
    run(check_squeeze_excite_gate(pooled, pixels, reduce_weight, reduce_bias, expand_weight,
                                  expand_bias, activation, gate_activation, hidden, gate));
  }
  return {gate, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_output, Tensor image, Tensor pooled, bool given, Tensor hidden, Tensor gate,
    Tensor reduce_weight, Tensor expand_weight, int64_t activation, int64_t gate_activation) {
  const int64_t pixels = pixels_of("squeeze_excite_backward", image);
  const Tensor input = channels_last(image), grad = channels_last(grad_output);
  const int64_t n = input.size(0), c = input.size(1), s = reduce_weight.size(0);
  Tensor grad_input = empty_image(input, n, c, input.size(2), input.size(3));
  Tensor grad_pooled = empty_sums(input, {n, c});
  Tensor grad_reduce_weight = torch::stable::new_empty(reduce_weight, {s, c});
  Tensor grad_reduce_bias = torch::stable::new_empty(reduce_weight, {s});
  Tensor grad_expand_weight = torch::stable::new_empty(expand_weight, {c, s});
  Tensor grad_expand_bias = torch::stable::new_empty(expand_weight, {c});
  if (input.numel() == 0) {
    for (Tensor* t : {&grad_input, &grad_pooled, &grad_reduce_weight, &grad_reduce_bias,
                      &grad_expand_weight, &grad_expand_bias}) {
      torch::stable::zero_(*t);
    }
  } else {
    const Tensor grad_gate = empty_sums(input, {n, c});
    run(check_channel_sums(grad, input, grad_gate));
    run(check_squeeze_excite_gate_backward(grad_gate, pooled, pixels, hidden, gate, reduce_weight,
                                           expand_weight, activation, gate_activation, grad_pooled,
                                           grad_reduce_weight, grad_reduce_bias, grad_expand_weight,
                                           grad_expand_bias));
    run(check_channel_scale(grad, gate, given_if(!given, grad_pooled), grad_input));
  }
  return {grad_input,         given ? grad_pooled : empty_sums(input, {0}),
          grad_reduce_weight, grad_reduce_bias,
          grad_expand_weight, grad_expand_bias};
}

// ---- The out-variants (csrc/ops.cpp), for ops that are composed of them. ----

void gate_out(Tensor pooled, int64_t pixels, Tensor reduce_weight, OptionalTensor reduce_bias,
              Tensor expand_weight, OptionalTensor expand_bias, int64_t activation,
              int64_t gate_activation, Tensor hidden, Tensor gate) {
  run(check_squeeze_excite_gate(pooled, pixels, reduce_weight, reduce_bias, expand_weight,
                                expand_bias, activation, gate_activation, hidden, gate));
}

void gate_backward_out(Tensor grad_gate, Tensor pooled, int64_t pixels, Tensor hidden, Tensor gate,
                       Tensor reduce_weight, Tensor expand_weight, int64_t activation,
                       int64_t gate_activation, Tensor grad_pooled, Tensor grad_reduce_weight,
                       Tensor grad_reduce_bias, Tensor grad_expand_weight,
                       Tensor grad_expand_bias) {
  run(check_squeeze_excite_gate_backward(grad_gate, pooled, pixels, hidden, gate, reduce_weight,
                                         expand_weight, activation, gate_activation, grad_pooled,
                                         grad_reduce_weight, grad_reduce_bias, grad_expand_weight,
                                         grad_expand_bias));
}

// An image to the mean of its pixels.
class PoolStage final : public Stage {
 public:
  PoolStage(Dtype dtype, const ImageShape& input)
      : Stage(input, {input.channels, 1, 1}, 0),
        dtype_(dtype),
        sums_(scratch_.add(input.channels * element_size(accumulate_dtype(dtype)))) {}

  int64_t scratch_bytes() const override { return scratch_.bytes(); }

  void run(const void* image, void* result, void* scratch, Team& team) const override {
    ChannelSums a{};
    a.dtype = dtype_;
    a.batch = 1;
    a.pixels = input.pixels();
    a.channels = static_cast<int>(input.channels);
    a.input = image;
    a.sums = at(scratch, sums_);
    effnet::run(a, team);
    kernels_for(dtype_).means(a.sums, a.channels, a.pixels, result);
  }

 private:
  const Dtype dtype_;
  Pieces scratch_;
  const int64_t sums_;
};

// A stage of a prepared network: the mean of the pixels of images like this one.
Tensor prepare_pool(Tensor image) {
  const Checks check("average_pool_prepare", "input", image);
  STD_TORCH_CHECK(image.dim() == 4, "average_pool_prepare: input must be (N, C, H, W)");
  const int channels = check.integer("input.size(1)", image.size(1), 1, kMaxExtent);
  const StageHeader header(StageHeader::Kind::pool, check.dtype(), sizeof(StageHeader), channels,
                           channels);
  const Tensor packed = empty_bytes(image, sizeof(header));
  std::memcpy(packed.mutable_data_ptr(), &header, sizeof(header));
  return packed;
}

}  // namespace

std::unique_ptr<Stage> pool_stage(const void* packed, const StagePlace& place) {
  return std::make_unique<PoolStage>(static_cast<const StageHeader*>(packed)->dtype, place.input);
}
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("average_pool_prepare", TORCH_BOX(&effnet::prepare_pool));
  m.impl("squeeze_excite_gate_out", TORCH_BOX(&effnet::gate_out));
  m.impl("squeeze_excite_gate_backward_out", TORCH_BOX(&effnet::gate_backward_out));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels, CPU, m) {
  m.impl("squeeze_excite", TORCH_BOX(&effnet::forward));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effnet::gate_alone));
  m.impl("squeeze_excite_backward", TORCH_BOX(&effnet::backward));
}
