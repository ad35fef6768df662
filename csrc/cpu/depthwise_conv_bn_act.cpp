// The depthwise op on the CPU: cuts a call into items (DepthwisePlan), runs them on PyTorch's
// threads and merges the partial sums in a fixed order.
#include "depthwise_conv_bn_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <new>

#include "../checks.h"
#include "../ops.h"
#include "isa.h"

namespace effnet {
namespace {

const DepthwiseKernels& kernels_for(Dtype dtype) {
  const Isa isa = cpu_isa();
#if defined(__x86_64__)
  if (dtype != Dtype::float64) {
    if (isa == Isa::avx512 && dtype == Dtype::bfloat16 && has_avx512bf16()) {
      return *avx512bf16::depthwise_kernels(dtype);
    }
    if (isa == Isa::avx512) return *avx512::depthwise_kernels(dtype);
    if (isa == Isa::avx2) return *avx2::depthwise_kernels(dtype);
  }
#endif
  return *baseline::depthwise_kernels(dtype);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tile in [4, 8] that computes the fewest columns beyond the last, the largest of those.
int best_tile(int columns, int multiple) {
  int best = 8;
  for (int tile = 8; tile >= 4; --tile) {
    if (tile % multiple == 0 && ceil_div(columns, tile) * tile < ceil_div(columns, best) * best) {
      best = tile;
    }
  }
  return best;
}

// What a block of channels keeps in L1: its ring of rows and a row of results.
constexpr int64_t kL1Bytes = 40 * 1024;
// Cache lines of a pixel that a block takes together, at least: shorter pieces of memory cost more
// than a ring that leaves L1.
constexpr int64_t kChunkLines = 4;
// Columns of a strip, at most: a halo of k - 1 input columns is then little.
constexpr int kStripColumns = 32;
// Rows of a band, at least, for the same reason.
constexpr int kBandRows = 8;
// Items, if there are rows enough: several for each thread of a large machine.
constexpr int64_t kItems = 64;
// Sums are kept for that many slots at most.
constexpr int64_t kSlots = 64;

DepthwisePlan make_plan(const DepthwiseShape& s, const DepthwiseKernels& k, size_t element_size,
                        int rings) {
  DepthwisePlan p;
  p.lanes = k.lanes;
  p.vectors = static_cast<int>(ceil_div(s.channels, p.lanes));
  p.strips = static_cast<int>(ceil_div(s.out_w, kStripColumns));
  p.strip_cols = static_cast<int>(ceil_div(s.out_w, p.strips));
  p.strips = static_cast<int>(ceil_div(s.out_w, p.strip_cols));
  p.tile = best_tile(p.strip_cols, 1);
  p.grad_tile =
      best_tile((p.strips == 1 ? s.in_w : p.strip_cols * s.stride) + s.stride - 1, s.stride);

  const int64_t vector_bytes =
      rings * k.accumulator_size * p.lanes *
      (int64_t{s.kernel} * (p.strip_cols * s.stride + s.kernel) + p.strip_cols);
  const int64_t line = ceil_div(64, p.lanes * element_size);
  int64_t block = std::clamp<int64_t>(kL1Bytes / vector_bytes, kChunkLines * line, 8);
  const int64_t others = s.batch * p.strips;
  while (block > line && ceil_div(p.vectors, block) * others < kItems / 2) block /= 2;
  block = std::min<int64_t>(std::max(block, line), p.vectors);
  p.blocks = static_cast<int>(ceil_div(p.vectors, block));
  p.block_vectors = static_cast<int>(ceil_div(p.vectors, p.blocks));
  p.blocks = static_cast<int>(ceil_div(p.vectors, p.block_vectors));

  const int64_t bands =
      std::clamp<int64_t>(ceil_div(kItems, p.blocks * others), 1, std::max(s.out_h / kBandRows, 1));
  p.band_rows = static_cast<int>(ceil_div(s.out_h, bands));
  p.bands = static_cast<int>(ceil_div(s.out_h, p.band_rows));
  p.slots = p.units(s);
  return p;
}

class Memory {
 public:
  explicit Memory(size_t bytes) : data_(::operator new(bytes, std::align_val_t(64))) {}
  ~Memory() { ::operator delete(data_, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

// What one call needs to run its items in parallel.
class Runner {
 public:
  Runner(const DepthwiseShape& s, const DepthwisePlan& p, const DepthwiseKernels& k)
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

size_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    default:
      return 2;
  }
}

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
  Pool(void* pooled, const DepthwiseShape& s, const DepthwisePlan& p, const DepthwiseKernels& k)
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
  DepthwiseShape shape_;
  int64_t parts_;
  bool double_;
  Memory memory_;
};

void inference(Tensor input, Tensor weight, Tensor mean, Tensor var, OptionalTensor bn_weight,
               OptionalTensor bn_bias, double eps, int64_t stride, int64_t pad_top,
               int64_t pad_left, int64_t activation, OptionalTensor prologue_scale,
               OptionalTensor prologue_shift, int64_t prologue_activation, Tensor output,
               OptionalTensor pooled) {
  const DepthwiseInference a = check_depthwise_inference(
      input, weight, mean, var, bn_weight, bn_bias, eps, stride, pad_top, pad_left, activation,
      prologue_scale, prologue_shift, prologue_activation, output, pooled);
  const DepthwiseKernels& k = kernels_for(a.dtype);
  const DepthwisePlan p = make_plan(a.shape, k, element_size(a.dtype), 1);
  const Pool pool(a.pooled, a.shape, p, k);
  Runner(a.shape, p, k).items([&](int64_t begin, int64_t end, void* scratch) {
    k.inference(a, p, begin, end, scratch, pool.target());
  });
  pool.finish();
}

void train(Tensor input, Tensor weight, OptionalTensor bn_weight, OptionalTensor bn_bias,
           double eps, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t activation,
           OptionalTensor prologue_scale, OptionalTensor prologue_shift,
           int64_t prologue_activation, bool batch_stats, Tensor conv, Tensor mean, Tensor var,
           Tensor output, OptionalTensor pooled) {
  const DepthwiseTraining a = check_depthwise_training(
      input, weight, bn_weight, bn_bias, eps, stride, pad_top, pad_left, activation, prologue_scale,
      prologue_shift, prologue_activation, batch_stats, conv, mean, var, output, pooled);
  const DepthwiseKernels& k = kernels_for(a.dtype);
  DepthwisePlan p = make_plan(a.shape, k, element_size(a.dtype), 1);
  p.slots = std::min(p.slots, kSlots);
  const Pool pool(a.pooled, a.shape, p, k);
  const Runner run(a.shape, p, k);
  const Memory partials(p.slots * kStatisticsRows * p.padded_channels() * k.accumulator_size);
  run.items([&](int64_t begin, int64_t end, void* scratch) {
    k.convolve(a, p, begin, end, scratch, partials.get());
  });
  if (a.batch_stats) {
    run.blocks([&](int64_t begin, int64_t end, void*) {
      for (int64_t block = begin; block < end; ++block) {
        k.merge_statistics(a, p, static_cast<int>(block), partials.get());
      }
    });
  }
  run.items([&](int64_t begin, int64_t end, void* scratch) {
    k.normalize(a, p, begin, end, scratch, pool.target());
  });
  pool.finish();
}

void backward(Tensor grad_output, OptionalTensor grad_pooled, Tensor conv, Tensor mean, Tensor var,
              OptionalTensor bn_weight, OptionalTensor bn_bias, double eps, int64_t activation,
              bool batch_stats, Tensor input, Tensor weight, int64_t stride, int64_t pad_top,
              int64_t pad_left, OptionalTensor prologue_scale, OptionalTensor prologue_shift,
              int64_t prologue_activation, OptionalTensor grad_input, OptionalTensor grad_weight,
              Tensor grad_bn_weight, Tensor grad_bn_bias, OptionalTensor grad_prologue_scale,
              OptionalTensor grad_prologue_shift) {
  const DepthwiseBackward a = check_depthwise_backward(
      grad_output, grad_pooled, conv, mean, var, bn_weight, bn_bias, eps, activation, batch_stats,
      input, weight, stride, pad_top, pad_left, prologue_scale, prologue_shift, prologue_activation,
      grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_prologue_scale,
      grad_prologue_shift);
  const DepthwiseKernels& k = kernels_for(a.dtype);
  DepthwisePlan p = make_plan(a.shape, k, element_size(a.dtype), 2);
  p.slots = std::min(p.slots, kSlots);
  const Runner run(a.shape, p, k);
  const Memory partials(p.slots * gradient_rows(a.shape.kernel) * p.padded_channels() *
                        k.accumulator_size);
  run.items([&](int64_t begin, int64_t end, void* scratch) {
    k.reduce(a, p, begin, end, scratch, partials.get());
  });
  run.blocks([&](int64_t begin, int64_t end, void*) {
    for (int64_t block = begin; block < end; ++block) {
      k.merge_bn_gradients(a, p, static_cast<int>(block), partials.get());
    }
  });
  if (a.grad_input == nullptr && a.grad_weight == nullptr) return;
  run.items([&](int64_t begin, int64_t end, void* scratch) {
    k.gradients(a, p, begin, end, scratch, partials.get());
  });
  run.blocks([&](int64_t begin, int64_t end, void*) {
    for (int64_t block = begin; block < end; ++block) {
      k.merge_gradients(a, p, static_cast<int>(block), partials.get());
    }
  });
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("depthwise_conv_bn_act_out", TORCH_BOX(&effnet::inference));
  m.impl("depthwise_conv_bn_act_train_out", TORCH_BOX(&effnet::train));
  m.impl("depthwise_conv_bn_act_backward_out", TORCH_BOX(&effnet::backward));
}
