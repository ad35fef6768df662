// A stage of a network on the CPU: one op with its weights packed, on one image at a time. A block
// is a network of one stage, a prepared network (prepared.cpp) one of many.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gemm_format.h"
#include "isa.h"
#include "memory.h"
#include "team.h"

namespace effnet {

struct ImageShape {
  int64_t channels, height, width;

  int64_t pixels() const { return height * width; }
  int64_t values() const { return channels * pixels(); }
};

class Stage {
 public:
  Stage(const ImageShape& input, const ImageShape& output, int64_t weight_bytes)
      : input(input), output(output), weight_bytes(weight_bytes) {}
  virtual ~Stage() = default;
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  const ImageShape input, output;
  const int64_t weight_bytes;  // what every image reads

  // What run() needs besides.
  virtual int64_t scratch_bytes() const { return 0; }
  // One image, dense channels-last. The steps are divided among the team.
  virtual void run(const void* input, void* output, void* scratch, Team& team) const = 0;
};

using Stages = std::vector<std::unique_ptr<Stage>>;

// `batch` images through `stages`, each of which takes what the one before it gives (prepared.cpp).
// planar: the images come as channel planes, (N, C, H, W), and not channels-last.
void run_stages(const Stages& stages, Dtype dtype, const void* input, void* output, int64_t batch,
                bool planar, Team& team);

// What the packed weights of a stage start with: what they are, and for which kernels. The
// arguments of the op follow, with pointers that only tell what is there, then the weights.
struct StageHeader {
  enum class Kind : int32_t { mbconv, fused_mbconv, pointwise, pool };
  static constexpr uint64_t kMagic = 0x65666e6574733031;

  uint64_t magic;
  int64_t bytes;  // of all of it
  Kind kind;
  Dtype dtype;
  Isa isa;
  int32_t in_channels, out_channels;
  int32_t kernel, stride;
  bool residual;  // the input is added

  // For the kernels in use.
  StageHeader(Kind kind, Dtype dtype, int64_t bytes, int in_channels, int out_channels,
              int kernel = 1, int stride = 1, bool residual = false)
      : magic(kMagic),
        bytes(bytes),
        kind(kind),
        dtype(dtype),
        isa(cpu_isa()),
        in_channels(in_channels),
        out_channels(out_channels),
        kernel(kernel),
        stride(stride),
        residual(residual) {}
  StageHeader() = default;
};

// Where a stage meets an image: `output` is what its window makes of `input`.
struct StagePlace {
  ImageShape input, output;
  int64_t pad_top, pad_left;

  // The convolution of a block on one such image; its channels, kernel and stride are the block's.
  void put_into(ConvShape& s) const {
    s.batch = 1;
    s.in_h = static_cast<int>(input.height);
    s.in_w = static_cast<int>(input.width);
    s.out_h = static_cast<int>(output.height);
    s.out_w = static_cast<int>(output.width);
    s.pad_top = static_cast<int>(pad_top);
    s.pad_left = static_cast<int>(pad_left);
  }
};

// The stages from their packed weights, which outlive them.
std::unique_ptr<Stage> mbconv_stage(const void* packed, const StagePlace&);
std::unique_ptr<Stage> fused_mbconv_stage(const void* packed, const StagePlace&);
std::unique_ptr<Stage> pointwise_stage(const void* packed, const StagePlace&);
std::unique_ptr<Stage> pool_stage(const void* packed, const StagePlace&);

}  // namespace effnet
