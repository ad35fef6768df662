// The MBConv block on the CPU. As many images as there are threads go through the block side by
// side, each in one thread's caches; the images that are left over, and all of a small batch, one
// after the other with every step cut up for all threads.
#include "mbconv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"
#include "isa.h"
#include "memory.h"
#include "results.h"
#include "squeeze_excite.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<MbconvKernels> kernels_for = EFFNET_KERNELS_BY_ISA(mbconv_kernels);

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The rows under a window of the depthwise convolution, of one block of channels, stay in L1.
constexpr int64_t kWindowBytes = 32 * 1024;
// Blocks of channels, if there are that many: the items of an image that threads share.
constexpr int64_t kBlocks = 8;
// Rows of a product, at least: tiles of rows come out even.
constexpr int64_t kProductRows = 32;
// Rows of the depthwise result that are projected together stay in L2.
constexpr int64_t kProjectBytes = 128 * 1024;
// Items of an image's projection.
constexpr int64_t kProjectItems = 16;

MbconvPlan make_plan(const MbconvInference& a, const MbconvKernels& k) {
  const ConvShape& s = a.shape;
  const GemmFormat& f = k.format;
  const int64_t size = f.accumulate_bytes;
  MbconvPlan p{};
  DepthwisePlan& d = p.depthwise;
  d.lanes = f.lanes;
  d.vectors = static_cast<int>(ceil_div(s.channels, d.lanes));
  d.tile = best_depthwise_tile(s.out_w);
  const int64_t vector_bytes = d.lanes * size, pair = 2;
  const int64_t fit = kWindowBytes / (int64_t{s.kernel} * s.in_w * vector_bytes);
  int64_t block = std::min(fit / pair * pair, round_up(ceil_div(d.vectors, kBlocks), pair));
  block = std::max(block, pair);
  // Panels of the expansion are pairs of vectors, the last one has three where they are odd: a
  // block of one would cut it.
  while (block < d.vectors && d.vectors % block == 1) block += pair;
  d.block_vectors = static_cast<int>(std::min<int64_t>(block, d.vectors));
  d.blocks = static_cast<int>(ceil_div(d.vectors, d.block_vectors));

  p.group_rows = static_cast<int>(std::min<int64_t>(ceil_div(kProductRows, s.in_w), s.in_h));
  p.ring_rows = static_cast<int>(
      std::min<int64_t>(p.group_rows * (ceil_div(s.kernel - 1, p.group_rows) + 1), s.in_h));
  const bool exact = element_size(a.dtype) == size;
  if (a.expand_weight != nullptr) {
    p.converted = !f.takes(element_size(a.dtype), a.in_channels);
    p.input_stride = f.depth(a.in_channels);
  } else {  // whole vectors of the input are read
    p.converted = !exact || s.channels % d.lanes != 0;
    p.input_stride = p.converted ? p.padded_channels() : a.in_channels;
  }
  p.expand_panels = f.panels(s.channels);
  p.project_panels = f.panels(a.out_channels);
  const int64_t pixels = int64_t{s.out_h} * s.out_w;
  const int64_t rows = std::max<int64_t>(kProjectBytes / (s.channels * f.value_bytes), 24);
  p.project_rows = ceil_div(pixels, ceil_div(pixels, rows));
  p.gate_weights = exact && a.out_channels < pixels;
  return p;
}

// Pieces of one piece of memory.
class Pieces {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += round_up(bytes, 64);
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

void* at(const Memory& memory, int64_t offset) { return static_cast<char*>(memory.get()) + offset; }

class Block {
 public:
  explicit Block(const MbconvInference& a)
      : a_(a),
        k_(kernels_for(a.dtype)),
        p_(make_plan(a, k_)),
        size_(k_.format.accumulate_bytes),
        pixels_(int64_t{a.shape.out_h} * a.shape.out_w) {
    pack();
  }

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t together = a_.shape.batch / threads * threads;
    torch::stable::parallel_for(0, together, 1, [&](int64_t begin, int64_t end) {
      const Image image(*this);
      for (int64_t n = begin; n < end; ++n) run_image(image, n, Serial{});
    });
    if (together == a_.shape.batch) return;
    const Image image(*this);
    for (int64_t n = together; n < a_.shape.batch; ++n) run_image(image, n, Parallel{});
  }

 private:
  struct Serial {
    template <class Body>
    void operator()(int64_t count, const Body& body) const {
      body(0, count);
    }
  };
  struct Parallel {
    template <class Body>
    void operator()(int64_t count, const Body& body) const {
      torch::stable::parallel_for(0, count, 1, body);
    }
  };

  // What one image needs on its way.
  struct Image {
    explicit Image(const Block& b) {
      const ConvShape& s = b.a_.shape;
      const GemmFormat& f = b.k_.format;
      Pieces pieces;
      const int64_t value = b.a_.expand_weight == nullptr ? b.size_ : f.value_bytes;
      input = pieces.add(b.p_.converted ? s.in_h * s.in_w * b.p_.input_stride * value : 0);
      depthwise = pieces.add(b.pixels_ * s.channels * element_size(b.a_.dtype));
      pooled = pieces.add(s.channels * b.size_);
      hidden = pieces.add(b.a_.gate.squeezed * b.size_);
      gate = pieces.add(s.channels * b.size_);
      panels = pieces.add(
          b.p_.gate_weights && b.gated() ? f.values_bytes(b.a_.out_channels, s.channels) : 0);
      memory.emplace(pieces.bytes());
    }
    void* operator[](int64_t offset) const { return at(*memory, offset); }

    int64_t input, depthwise, pooled, hidden, gate, panels;
    std::optional<Memory> memory;
  };

  bool gated() const { return a_.gate.reduce_weight != nullptr; }

  void pack() {
    const ConvShape& s = a_.shape;
    const int64_t c = p_.padded_channels();
    Pieces pieces;
    const int64_t expand =
        pieces.add(a_.expand_weight ? k_.format.matrix_bytes(s.channels, a_.in_channels) : 0);
    const int64_t depthwise = pieces.add(c * s.kernel * s.kernel * size_);
    const int64_t depthwise_start = pieces.add(c * size_);
    const int64_t project = pieces.add(k_.format.matrix_bytes(a_.out_channels, s.channels));
    const Memory& memory = packed_.emplace(pieces.bytes());
    weights_ = {at(memory, expand), at(memory, depthwise), at(memory, depthwise_start),
                at(memory, project)};
    torch::stable::parallel_for(
        0, p_.depthwise.blocks + p_.project_panels, 1, [&](int64_t begin, int64_t end) {
          const int64_t blocks = p_.depthwise.blocks;
          if (begin < blocks) {
            const Memory scratch(8 * c * size_ + 1024);
            k_.pack_block(a_, p_, weights_, begin, std::min(end, blocks), scratch.get());
          }
          if (end > blocks) {
            k_.pack_project(a_, weights_, std::max(begin, blocks) - blocks, end - blocks);
          }
        });
  }

  template <class Run>
  void run_image(const Image& image, int64_t n, const Run& parallel) const {
    const ConvShape& s = a_.shape;
    const void* input = static_cast<const char*>(a_.input) +
                        n * s.in_h * s.in_w * a_.in_channels * element_size(a_.dtype);
    if (p_.converted) {
      parallel(s.in_h, [&](int64_t begin, int64_t end) {
        k_.convert(a_, p_, n, begin * s.in_w, end * s.in_w, image[image.input]);
      });
      input = image[image.input];
    }
    void* depthwise = image[image.depthwise];
    void* pooled = gated() ? image[image.pooled] : nullptr;
    parallel(p_.depthwise.blocks, [&](int64_t begin, int64_t end) {
      const Memory ring(k_.ring_bytes(a_, p_));
      k_.expand_depthwise(a_, p_, weights_, input, begin, end, ring.get(), depthwise, pooled);
    });
    const void *gate = nullptr, *gated_panels = nullptr;
    if (gated()) {
      SqueezeExciteGate g = a_.gate;
      g.pooled = pooled;
      g.hidden = image[image.hidden];
      g.gate = image[image.gate];
      squeeze_excite_gate(g);
      gate = g.gate;
      if (p_.gate_weights) {
        parallel(p_.project_panels, [&](int64_t begin, int64_t end) {
          k_.gate_panels(a_, weights_, g.gate, begin, end, image[image.panels]);
        });
        gated_panels = image[image.panels];
        gate = nullptr;
      }
    }
    // Items: blocks of rows, times groups of panels where those are few.
    const int64_t row_blocks = ceil_div(pixels_, p_.project_rows);
    const int64_t groups = std::clamp<int64_t>(kProjectItems / row_blocks, 1, p_.project_panels);
    parallel(row_blocks * groups, [&](int64_t begin, int64_t end) {
      const GemmFormat& f = k_.format;
      const Memory scratch(p_.project_rows * f.depth(s.channels) * f.value_bytes);
      while (begin < end) {
        // All groups of a block that are in [begin, end), so that its rows are gated once.
        const int64_t block = begin / groups, first = begin % groups;
        const int64_t last = std::min(end - block * groups, groups);
        const int64_t row = block * p_.project_rows;
        k_.project(a_, weights_, gated_panels, n, depthwise, gate, row,
                   std::min(p_.project_rows, pixels_ - row), first * p_.project_panels / groups,
                   last * p_.project_panels / groups, scratch.get());
        begin = block * groups + last;
      }
    });
  }

  const MbconvInference& a_;
  const MbconvKernels& k_;
  MbconvPlan p_;
  int64_t size_, pixels_;
  MbconvWeights weights_;
  std::optional<Memory> packed_;
};

// The functional op (effnet_kernels/ops/mbconv.py has its schema).
Tensor inference(Tensor image, OptionalTensor expand_weight, OptionalTensor expand_mean,
                 OptionalTensor expand_var, OptionalTensor expand_bn_weight,
                 OptionalTensor expand_bn_bias, double expand_eps, int64_t expand_activation,
                 Tensor depthwise_weight, Tensor depthwise_mean, Tensor depthwise_var,
                 OptionalTensor depthwise_bn_weight, OptionalTensor depthwise_bn_bias,
                 double depthwise_eps, int64_t depthwise_activation, int64_t stride,
                 std::vector<int64_t> padding, OptionalTensor reduce_weight,
                 OptionalTensor reduce_bias, OptionalTensor excite_weight,
                 OptionalTensor excite_bias, int64_t se_activation, int64_t gate_activation,
                 Tensor project_weight, Tensor project_mean, Tensor project_var,
                 OptionalTensor project_bn_weight, OptionalTensor project_bn_bias,
                 double project_eps, int64_t project_activation, bool residual, bool) {
  const auto [height, width] =
      depthwise_output_size("mbconv", image, depthwise_weight, stride, padding);
  STD_TORCH_CHECK(project_weight.dim() >= 1, "mbconv: project_weight must be (K, C)");
  const Tensor input = channels_last(image);
  Tensor output = empty_image(input, input.size(0), project_weight.size(0), height, width);
  if (output.numel() == 0) return output;
  STD_TORCH_CHECK(expand_weight.has_value() == (expand_mean && expand_var),
                  "mbconv: expand_weight, expand_mean and expand_var must be given together");
  STD_TORCH_CHECK(reduce_weight.has_value() == excite_weight.has_value(),
                  "mbconv: reduce_weight and excite_weight must be given together");
  std::optional<ConvBn> expand;
  if (expand_weight) {
    expand.emplace(ConvBn{*expand_weight, *expand_mean, *expand_var, expand_bn_weight,
                          expand_bn_bias, expand_eps, expand_activation});
  }
  std::optional<SqueezeExcite> squeeze_excite;
  if (reduce_weight) {
    squeeze_excite.emplace(SqueezeExcite{*reduce_weight, reduce_bias, *excite_weight, excite_bias,
                                         se_activation, gate_activation});
  }
  const MbconvInference a =
      check_mbconv(input, expand ? &*expand : nullptr,
                   {depthwise_weight, depthwise_mean, depthwise_var, depthwise_bn_weight,
                    depthwise_bn_bias, depthwise_eps, depthwise_activation},
                   stride, padding[0], padding[1], squeeze_excite ? &*squeeze_excite : nullptr,
                   {project_weight, project_mean, project_var, project_bn_weight, project_bn_bias,
                    project_eps, project_activation},
                   residual, output);
  Block(a).run();
  return output;
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels, CPU, m) {
  m.impl("mbconv", TORCH_BOX(&effnet::inference));
}
