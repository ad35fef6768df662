// Networks whose weights were packed beforehand, in one call: images go through all stages, each in
// one thread's caches, and nothing between two stages is a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "memory.h"
#include "results.h"
#include "stage.h"

namespace effnet {
namespace {

// Weights that stay in a cache next to an image's tensors. An image goes through as many stages as
// have no more together; then the other images follow, and the weights of the next stages are read
// once for all of them.
constexpr int64_t kSegmentBytes = 1 << 20;

// Images that a thread takes through a segment at a time, at most: so few that what is between two
// segments is not much memory, and so many that the weights, which no cache keeps, are read seldom.
constexpr int64_t kImages = 8;

// Stages [first, last).
struct Segment {
  size_t first, last;
};

std::vector<Segment> segments_of(const Stages& stages) {
  std::vector<Segment> segments;
  int64_t bytes = 0;
  for (size_t i = 0; i < stages.size(); ++i) {
    bytes += stages[i]->weight_bytes;
    if (segments.empty() || bytes > kSegmentBytes) {
      segments.push_back({i, i});
      bytes = stages[i]->weight_bytes;
    }
    segments.back().last = i + 1;
  }
  return segments;
}

// Pixels [begin, end) of an image of channel planes to channels-last. Channels is their number, or
// 0 where that is only known when it runs.
template <class Element, int Channels>
void interleave(const void* planes, void* image, const ImageShape& shape, int64_t begin,
                int64_t end) {
  const int64_t channels = Channels == 0 ? shape.channels : Channels, pixels = shape.pixels();
  const Element* from = static_cast<const Element*>(planes);
  Element* to = static_cast<Element*>(image);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t c = 0; c < channels; ++c) to[i * channels + c] = from[c * pixels + i];
  }
}

template <class Element>
void interleave(const void* planes, void* image, const ImageShape& shape, Team& team) {
  constexpr int64_t kLeast = 1 << 13;
  team.share(shape.pixels(), kLeast, [&](int64_t begin, int64_t end) {
    if (shape.channels == 3) {
      interleave<Element, 3>(planes, image, shape, begin, end);
    } else {
      interleave<Element, 0>(planes, image, shape, begin, end);
    }
  });
}

void interleave(const void* planes, void* image, const ImageShape& shape, int64_t element,
                Team& team) {
  switch (element) {
    case 2:
      return interleave<uint16_t>(planes, image, shape, team);
    case 4:
      return interleave<uint32_t>(planes, image, shape, team);
    default:
      return interleave<uint64_t>(planes, image, shape, team);
  }
}

// Images on their way through all stages. Of an image only what lies between two segments is kept
// beside the others'; what is within one is its thread's.
class Images {
 public:
  // planar: the first stage's input are channel planes.
  Images(const Stages& stages, Dtype dtype, int64_t count, bool planar)
      : stages_(stages),
        segments_(segments_of(stages)),
        element_(element_size(dtype)),
        planar_(planar) {
    int64_t within = 0, between = 0, scratch = 0;
    for (const Segment& s : segments_) {
      for (size_t i = s.first; i + 1 < s.last; ++i) within = std::max(within, bytes(*stages[i]));
      if (s.last < stages.size()) between = std::max(between, bytes(*stages[s.last - 1]));
    }
    for (const auto& stage : stages) scratch = std::max(scratch, stage->scratch_bytes());
    for (int64_t& offset : within_) offset = own_.add(within);
    scratch_ = own_.add(scratch);
    interleaved_ = own_.add(planar ? stages.front()->input.values() * element_ : 0);
    Pieces pieces;
    for (int64_t& offset : between_) offset = pieces.add(between * count);
    memory_ = std::make_unique<Memory>(pieces.bytes());
  }

  // One after the other, every step of each divided.
  void in_turn(const void* input, void* output, int64_t count, Team& team) const {
    const Memory own(own_.bytes());
    for_segments(input, output, [&](const auto& run) {
      for (int64_t n = 0; n < count; ++n) run(n, own.get(), team);
    });
  }

  // Each in one thread's caches. A thread that has done an image takes the next, and all have
  // ended a segment before one begins the next: they read its weights together, and wait for no
  // more than an image's part of it.
  void side_by_side(const void* input, void* output, int64_t count, Team& team) const {
    for_segments(input, output, [&](const auto& run) {
      std::atomic<int64_t> next{0};
      team.divide(team.threads(), 1, [&](int64_t, int64_t) {
        // The thread's allocator gives it the same memory in the next segment.
        const Memory own(own_.bytes());
        Team alone = Team::alone();
        for (int64_t n; (n = next.fetch_add(1)) < count;) run(n, own.get(), alone);
      });
    });
  }

 private:
  // body(run) for each segment, where run(n, own, team) takes image n through it.
  template <class Body>
  void for_segments(const void* input, void* output, const Body& body) const {
    const void* from = input;
    for (size_t k = 0; k < segments_.size(); ++k) {
      const Segment& s = segments_[k];
      void* to = s.last == stages_.size() ? output : memory(between_[k % 2]);
      body([&](int64_t n, void* own, Team& team) {
        const void* x = at(from, n * stages_[s.first]->input.values() * element_);
        if (planar_ && k == 0) {
          interleave(x, at(own, interleaved_), stages_.front()->input, element_, team);
          x = at(own, interleaved_);
        }
        for (size_t i = s.first; i < s.last; ++i) {
          void* y = i + 1 == s.last ? at(to, n * bytes(*stages_[i])) : at(own, within_[i % 2]);
          stages_[i]->run(x, y, at(own, scratch_), team);
          x = y;
        }
      });
      from = to;
    }
  }

  int64_t bytes(const Stage& stage) const { return stage.output.values() * element_; }
  void* memory(int64_t offset) const { return at(memory_->get(), offset); }

  const Stages& stages_;
  const std::vector<Segment> segments_;
  const int64_t element_;
  const bool planar_;
  int64_t within_[2], between_[2], scratch_, interleaved_;
  Pieces own_;  // of a thread
  std::unique_ptr<Memory> memory_;
};

}  // namespace

// As many images as there are threads, or a multiple, go side by side; those that are left over,
// and all of a small batch, in turn.
void run_stages(const Stages& stages, Dtype dtype, const void* input, void* output, int64_t batch,
                bool planar, Team& team) {
  const int64_t in_bytes = stages.front()->input.values() * element_size(dtype);
  const int64_t out_bytes = stages.back()->output.values() * element_size(dtype);
  const int64_t threads = team.threads(), most = threads * kImages;
  const int64_t together = threads == 1 ? 0 : batch / threads * threads;
  if (together > 0) {
    const Images images(stages, dtype, std::min(together, most), planar);
    for (int64_t n = 0; n < together; n += most) {
      images.side_by_side(at(input, n * in_bytes), at(output, n * out_bytes),
                          std::min(together - n, most), team);
    }
  }
  if (together < batch) {
    const Images images(stages, dtype, std::min(batch - together, kImages), planar);
    for (int64_t n = together; n < batch; n += kImages) {
      images.in_turn(at(input, n * in_bytes), at(output, n * out_bytes),
                     std::min(batch - n, kImages), team);
    }
  }
}

namespace {

constexpr const char* kOp = "prepared_network";

// The stages of `packed` from image `shape` on. padding: (top, left, bottom, right) of each.
class Network {
 public:
  Network(const Tensor& input, const std::vector<Tensor>& packed,
          const std::vector<int64_t>& padding)
      : dtype_(Checks(kOp, "input", input).dtype()) {
    STD_TORCH_CHECK(input.dim() == 4, kOp, ": input must be (N, C, H, W)");
    STD_TORCH_CHECK(!packed.empty() && padding.size() == 4 * packed.size(), kOp,
                    ": there must be stages, and padding must be 4 numbers for each");
    batch_ = input.size(0);
    ImageShape shape{input.size(1), input.size(2), input.size(3)};
    bool pooled = false;
    for (size_t i = 0; i < packed.size(); ++i) {
      const StageHeader& h = header(packed[i]);
      STD_TORCH_CHECK(h.in_channels == shape.channels, kOp, ": stage ", i, " takes ", h.in_channels,
                      " channels, not ", shape.channels);
      const StagePlace place{shape, output_of(h, shape, &padding[4 * i]), padding[4 * i],
                             padding[4 * i + 1]};
      STD_TORCH_CHECK(!pooled || h.kind == StageHeader::Kind::pointwise, kOp, ": stage ", i,
                      " takes images, not the vectors of the pool before it");
      STD_TORCH_CHECK(
          !h.residual || (place.output.channels == shape.channels &&
                          place.output.height == shape.height && place.output.width == shape.width),
          kOp, ": stage ", i, " adds its input, whose shape is not its output's");
      (pooled ? vectors_ : images_).push_back(stage(packed[i].const_data_ptr(), h.kind, place));
      shape = place.output;
      if (h.kind == StageHeader::Kind::pool) {  // the images are pixels of one from here on
        pooled = true;
        shape.width = std::max<int64_t>(batch_, 1);
      }
    }
    output_ = shape;
    pooled_ = pooled;
  }

  Tensor run(const Tensor& input) const {
    Tensor output =
        pooled_ ? torch::stable::empty({batch_, output_.channels}, input.scalar_type(),
                                       std::nullopt, input.device())
                : empty_image(input, batch_, output_.channels, output_.height, output_.width);
    if (batch_ == 0) return output;
    void* to = output.mutable_data_ptr();
    const bool planar = input.size(1) > 1 && input.is_contiguous();
    const Tensor dense = planar ? input : channels_last(input);
    const void* from = dense.const_data_ptr();
    Team team = Team::of_pytorch_threads();
    if (vectors_.empty()) {
      run_stages(images_, dtype_, from, to, batch_, planar, team);
      return output;
    }
    const Memory pooled(vectors_.front()->input.values() * element_size(dtype_));
    run_stages(images_, dtype_, from, pooled.get(), batch_, planar, team);
    run_stages(vectors_, dtype_, pooled.get(), to, 1, false, team);
    return output;
  }

 private:
  const StageHeader& header(const Tensor& packed) const {
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                        packed.numel() >= static_cast<int64_t>(sizeof(StageHeader)) &&
                        packed.is_contiguous(),
                    kOp, ": a stage must be what a prepare op made");
    const StageHeader& h = *static_cast<const StageHeader*>(packed.const_data_ptr());
    STD_TORCH_CHECK(h.magic == StageHeader::kMagic && h.bytes == packed.numel(), kOp,
                    ": a stage must be what a prepare op made");
    STD_TORCH_CHECK(h.isa == cpu_isa(), kOp, ": a stage was prepared for another instruction set");
    STD_TORCH_CHECK(h.dtype == dtype_, kOp,
                    ": a stage was prepared for another dtype than input's");
    return h;
  }

  static ImageShape output_of(const StageHeader& h, const ImageShape& in, const int64_t* padding) {
    if (h.kind == StageHeader::Kind::pool) return {h.out_channels, 1, 1};
    for (int side = 0; side < 4; ++side) {
      STD_TORCH_CHECK(0 <= padding[side] && padding[side] < h.kernel, kOp, ": padding must be in [",
                      0, ", ", h.kernel - 1, "], not ", padding[side]);
    }
    const int64_t height = in.height + padding[0] + padding[2];
    const int64_t width = in.width + padding[1] + padding[3];
    STD_TORCH_CHECK(
        height >= h.kernel && width >= h.kernel && height <= kMaxExtent && width <= kMaxExtent, kOp,
        ": input must have ", h.kernel, " to ", kMaxExtent,
        " rows and columns, padding included, at a stage; it has ", height, " and ", width);
    return {h.out_channels, (height - h.kernel) / h.stride + 1, (width - h.kernel) / h.stride + 1};
  }

  static std::unique_ptr<Stage> stage(const void* packed, StageHeader::Kind kind,
                                      const StagePlace& place) {
    switch (kind) {
      case StageHeader::Kind::mbconv:
        return mbconv_stage(packed, place);
      case StageHeader::Kind::fused_mbconv:
        return fused_mbconv_stage(packed, place);
      case StageHeader::Kind::pointwise:
        return pointwise_stage(packed, place);
      case StageHeader::Kind::pool:
        return pool_stage(packed, place);
    }
    STD_TORCH_CHECK(false, kOp, ": a stage is of no known kind");
  }

  const Dtype dtype_;
  int64_t batch_;
  Stages images_, vectors_;
  ImageShape output_;
  bool pooled_;
};

Tensor run_network(Tensor image, std::vector<Tensor> stages, std::vector<int64_t> padding) {
  return Network(image, stages, padding).run(image);
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CPU, m) {
  m.impl("prepared_network", TORCH_BOX(&effnet::run_network));
}
