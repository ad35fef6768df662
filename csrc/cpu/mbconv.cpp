// The MBConv block on the CPU: a stage of which the op is a network of its own (stage.h).
#include "mbconv.h"

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
#include "squeeze_excite.h"
#include "stage.h"

namespace effnet {
namespace {

constexpr KernelsByIsa<MbconvKernels> kernels_for = EFFNET_KERNELS_BY_ISA(mbconv_kernels);

// The rows under a window of the depthwise convolution, of one block of channels, stay in L1.
constexpr int64_t kWindowBytes = 32 * 1024;
// The items of an image that threads share, about: blocks of channels, if there are that many, and
// bands of rows.
constexpr int64_t kItems = 8;
// Rows of a band, at least, for each that it computes once more than the block does: those that
// its first window begins with.
constexpr int64_t kRowsForOverlap = 8;
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
  // Panels of the expansion are pairs of vectors, the last one has three where they are odd.
  d.group = 2;
  const int64_t groups = std::max(d.vectors / d.group, 1);
  const int64_t group_bytes = d.group * d.lanes * size;
  const int64_t fit = kWindowBytes / (int64_t{s.kernel} * s.in_w * group_bytes);
  const int64_t wanted = std::max(kItems, ceil_div(groups, std::max<int64_t>(fit, 1)));
  d.blocks = static_cast<int>(std::min(groups, wanted));

  const int64_t overlap = a.expand_weight == nullptr ? 0 : s.kernel - s.stride;
  const int64_t most = std::min(s.out_h / (kRowsForOverlap * std::max<int64_t>(overlap, 1)),
                                ceil_div(kItems, d.blocks));
  int64_t bands = 1;
  while (2 * bands <= most) bands *= 2;  // halves of an image stay halves
  p.band_rows = static_cast<int>(ceil_div(s.out_h, bands));
  p.bands = ceil_div(s.out_h, p.band_rows);

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
  // Of two threads one multiplies half of the rows, or where the weights are more than those, all
  // rows by half of the weights.
  const bool deep = a.out_channels >= pixels;
  const int64_t rows = std::max<int64_t>(kProjectBytes / (s.channels * f.value_bytes), 24);
  p.project_rows = deep ? pixels : ceil_div(pixels, ceil_div(pixels, rows));
  p.gate_weights = exact && !deep;
  return p;
}

// Where the packed weights lie.
struct Layout {
  Layout() = default;
  Layout(const MbconvInference& a, const GemmFormat& f, Pieces& pieces) {
    const ConvShape& s = a.shape;
    const int64_t c = f.padded(s.channels), size = f.accumulate_bytes;
    expand = pieces.add(a.expand_weight ? f.matrix_bytes(s.channels, a.in_channels) : 0);
    depthwise = pieces.add(c * s.kernel * s.kernel * size);
    depthwise_start = pieces.add(c * size);
    gate = pieces.add(a.gate.reduce_weight ? packed_gate_bytes(a.gate) : 0);
    project = pieces.add(f.matrix_bytes(a.out_channels, s.channels));
  }

  MbconvWeights in(void* memory) const {
    return {at(memory, expand), at(memory, depthwise), at(memory, depthwise_start),
            at(memory, gate), at(memory, project)};
  }

  int64_t expand = 0, depthwise = 0, depthwise_start = 0, gate = 0, project = 0;
};

void pack(const MbconvInference& a, const MbconvKernels& k, const MbconvWeights& weights,
          Team& team) {
  const MbconvPlan p = make_plan(a, k);
  const int64_t blocks = p.depthwise.blocks, panels = p.project_panels;
  const int64_t gates = a.gate.reduce_weight == nullptr ? 0 : 1;
  team.share(gates + blocks + panels, 1, [&](int64_t begin, int64_t end) {
    if (begin < gates) pack_gate(a.gate, weights.gate);
    begin = std::max(begin - gates, int64_t{0});
    end -= gates;
    if (begin < std::min(end, blocks)) {
      const Memory scratch(8 * p.padded_channels() * k.format.accumulate_bytes + 1024);
      k.pack_block(a, p, weights, begin, std::min(end, blocks), scratch.get());
    }
    if (end > blocks) {
      k.pack_project(a, weights, std::max(begin, blocks) - blocks, end - blocks);
    }
  });
}

ImageShape input_shape(const MbconvInference& a) {
  return {a.in_channels, a.shape.in_h, a.shape.in_w};
}
ImageShape output_shape(const MbconvInference& a) {
  return {a.out_channels, a.shape.out_h, a.shape.out_w};
}

class MbconvStage final : public Stage {
 public:
  MbconvStage(const MbconvInference& a, const MbconvWeights& weights, int64_t weight_bytes)
      : Stage(input_shape(a), output_shape(a), weight_bytes),
        a_(a),
        k_(kernels_for(a.dtype)),
        p_(make_plan(a, k_)),
        weights_(weights) {
    const ConvShape& s = a.shape;
    const GemmFormat& f = k_.format;
    const int64_t size = f.accumulate_bytes;
    const int64_t value = a.expand_weight == nullptr ? size : f.value_bytes;
    converted_ = scratch_.add(p_.converted ? input.pixels() * p_.input_stride * value : 0);
    depthwise_ = scratch_.add(output.pixels() * s.channels * element_size(a.dtype));
    if (!gated()) return;
    sums_ = scratch_.add(p_.bands * 2 * p_.padded_channels() * size);
    pooled_ = scratch_.add(s.channels * size);
    hidden_ = scratch_.add(a.gate.squeezed * size);
    gate_ = scratch_.add(s.channels * size);
    panels_ = scratch_.add(p_.gate_weights ? f.values_bytes(a.out_channels, s.channels) : 0);
  }

  int64_t scratch_bytes() const override { return scratch_.bytes(); }

  void run(const void* image, void* result, void* scratch, Team& team) const override {
    MbconvInference a = a_;
    a.input = image;
    a.output = result;
    if (p_.converted) {
      team.share(a.shape.in_h, 1, [&](int64_t begin, int64_t end) {
        k_.convert(a, p_, begin * a.shape.in_w, end * a.shape.in_w, at(scratch, converted_));
      });
      image = at(scratch, converted_);
    }
    void* depthwise = at(scratch, depthwise_);
    void* sums = gated() ? at(scratch, sums_) : nullptr;
    team.divide(p_.depthwise.blocks * p_.bands, 1, [&](int64_t begin, int64_t end) {
      const Memory ring(k_.ring_bytes(a, p_));
      k_.expand_depthwise(a, p_, weights_, image, begin, end, ring.get(), depthwise, sums);
    });
    const void *gate = nullptr, *gated_panels = nullptr;
    if (gated()) {
      a.gate.pooled = at(scratch, pooled_);
      k_.merge(a, p_, sums, at(scratch, pooled_));
      a.gate.hidden = at(scratch, hidden_);
      a.gate.gate = at(scratch, gate_);
      squeeze_excite_gate(a.gate, weights_.gate, team);
      gate = a.gate.gate;
      if (p_.gate_weights) {
        team.share(p_.project_panels, 1, [&](int64_t begin, int64_t end) {
          k_.gate_panels(a, weights_, a.gate.gate, begin, end, at(scratch, panels_));
        });
        gated_panels = at(scratch, panels_);
        gate = nullptr;
      }
    }
    // Items: blocks of rows, times groups of panels where those are few.
    const int64_t pixels = output.pixels();
    const int64_t row_blocks = ceil_div(pixels, p_.project_rows);
    const int64_t groups = std::clamp<int64_t>(kProjectItems / row_blocks, 1, p_.project_panels);
    // Rows are gated once for all groups of a piece.
    const int64_t least = gate == nullptr ? 1 : ceil_div(groups, team.threads());
    team.share(row_blocks * groups, least, [&](int64_t begin, int64_t end) {
      const GemmFormat& f = k_.format;
      const Memory rows(p_.project_rows * f.depth(a.shape.channels) * f.value_bytes);
      while (begin < end) {
        // All groups of a block that are in [begin, end), so that its rows are gated once.
        const int64_t block = begin / groups, first = begin % groups;
        const int64_t last = std::min(end - block * groups, groups);
        const int64_t row = block * p_.project_rows;
        k_.project(a, weights_, gated_panels, depthwise, gate, row,
                   std::min(p_.project_rows, pixels - row), first * p_.project_panels / groups,
                   last * p_.project_panels / groups, rows.get());
        begin = block * groups + last;
      }
    });
  }

 private:
  bool gated() const { return a_.gate.reduce_weight != nullptr; }

  const MbconvInference a_;
  const MbconvKernels& k_;
  const MbconvPlan p_;
  const MbconvWeights weights_;
  Pieces scratch_;
  int64_t converted_ = 0, depthwise_ = 0, sums_ = 0, pooled_ = 0, hidden_ = 0, gate_ = 0,
          panels_ = 0;
};

// What mbconv_stage() reads: the arguments, then the weights, the gate's first matrix as it is.
struct Prepared {
  StageHeader header;
  MbconvInference arguments;
  Layout layout;
  int64_t reduce_weight, reduce_bias;
};

Tensor prepare(const Tensor& like, const MbconvInference& a) {
  const MbconvKernels& k = kernels_for(a.dtype);
  const SqueezeExciteGate& g = a.gate;
  const bool gated = g.reduce_weight != nullptr;
  const int64_t size = gated ? element_size(g.weight_dtype) : 0;
  const int64_t matrix = int64_t{g.squeezed} * g.channels * size, bias = g.squeezed * size;
  Prepared p{};
  Pieces pieces;
  pieces.add(sizeof(Prepared));
  p.layout = Layout(a, k.format, pieces);
  p.reduce_weight = pieces.add(matrix);
  p.reduce_bias = pieces.add(bias);
  p.arguments = a;
  p.header = StageHeader(StageHeader::Kind::mbconv, a.dtype, pieces.bytes(), a.in_channels,
                         a.out_channels, a.shape.kernel, a.shape.stride, a.residual);
  Tensor packed = empty_bytes(like, pieces.bytes());
  void* memory = packed.mutable_data_ptr();
  std::memcpy(memory, &p, sizeof(p));
  const auto keep = [&](int64_t offset, const void* from, int64_t bytes) {
    if (from != nullptr) std::memcpy(at(memory, offset), from, bytes);
  };
  keep(p.reduce_weight, g.reduce_weight, matrix);
  keep(p.reduce_bias, g.reduce_bias, bias);
  Team team = Team::of_pytorch_threads();
  pack(a, k, p.layout.in(memory), team);
  return packed;
}

// The functional op (effnet_kernels/ops/mbconv.py has its schema), or with the same arguments what
// makes a stage of a prepared network; the image is then an example and its extent is nothing.
template <bool Prepares>
Tensor block(Tensor image, OptionalTensor expand_weight, OptionalTensor expand_mean,
             OptionalTensor expand_var, OptionalTensor expand_bn_weight,
             OptionalTensor expand_bn_bias, double expand_eps, int64_t expand_activation,
             Tensor depthwise_weight, Tensor depthwise_mean, Tensor depthwise_var,
             OptionalTensor depthwise_bn_weight, OptionalTensor depthwise_bn_bias,
             double depthwise_eps, int64_t depthwise_activation, int64_t stride,
             std::vector<int64_t> padding, OptionalTensor reduce_weight, OptionalTensor reduce_bias,
             OptionalTensor excite_weight, OptionalTensor excite_bias, int64_t se_activation,
             int64_t gate_activation, Tensor project_weight, Tensor project_mean,
             Tensor project_var, OptionalTensor project_bn_weight, OptionalTensor project_bn_bias,
             double project_eps, int64_t project_activation, bool residual, bool) {
  const auto [height, width] =
      depthwise_output_size("mbconv", image, depthwise_weight, stride, padding);
  STD_TORCH_CHECK(project_weight.dim() >= 1, "mbconv: project_weight must be (K, C)");
  const Tensor input = channels_last(image);
  Tensor output = empty_image(input, input.size(0), project_weight.size(0), height, width);
  if (!Prepares && output.numel() == 0) return output;
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
  if constexpr (Prepares) {
    return prepare(input, a);
  } else {
    const MbconvKernels& k = kernels_for(a.dtype);
    Pieces pieces;
    const Layout layout(a, k.format, pieces);
    const Memory packed(pieces.bytes());
    const MbconvWeights weights = layout.in(packed.get());
    Team team = Team::of_pytorch_threads();
    pack(a, k, weights, team);
    Stages stages;
    stages.push_back(std::make_unique<MbconvStage>(a, weights, pieces.bytes()));
    run_stages(stages, a.dtype, a.input, a.output, a.shape.batch, false, team);
    return output;
  }
}

}  // namespace

std::unique_ptr<Stage> mbconv_stage(const void* packed, const StagePlace& place) {
  const Prepared& p = *static_cast<const Prepared*>(packed);
  MbconvInference a = p.arguments;
  place.put_into(a.shape);
  SqueezeExciteGate& g = a.gate;
  if (g.reduce_weight != nullptr) {
    g.pixels = place.output.pixels();
    g.reduce_weight = at(packed, p.reduce_weight);
    if (g.reduce_bias != nullptr) g.reduce_bias = at(packed, p.reduce_bias);
  }
  // Only read from here on.
  const MbconvWeights weights = p.layout.in(const_cast<void*>(packed));
  return std::make_unique<MbconvStage>(a, weights, p.header.bytes);
}

}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels, CPU, m) {
  m.impl("mbconv", TORCH_BOX(&effnet::block<false>));
}

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("mbconv_prepare", TORCH_BOX(&effnet::block<true>));
}
