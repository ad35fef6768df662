// Between the driver of squeeze-and-excitation (squeeze_excite.cpp) and its kernels, which are
// compiled once for each instruction set (squeeze_excite_kernels.h).
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace effnet {

// Kernels of images and of weights of one dtype. Each does work items [begin, end) of those that
// its comment numbers; F is the accumulate dtype. No result depends on how the items are divided.
struct SqueezeExciteKernels {
  // Items: image * parts + part of its channels. scratch: 2 * channels F.
  void (*sums)(const ChannelSums&, int parts, int64_t begin, int64_t end, void* scratch);
  // to = sums / pixels, count values. Not an item: all of them.
  void (*means)(const void* sums, int64_t count, int64_t pixels, void* to);
  // Items: pixels of all images.
  void (*scale)(const ChannelScale&, int64_t begin, int64_t end);

  // Items: rows of reduce_weight.
  void (*hidden)(const SqueezeExciteGate&, int64_t begin, int64_t end);
  // Items: blocks of kGateBlock channels of expand_weight and expand_bias, each to (1 + squeezed,
  // kGateBlock) F: the bias first, zeros where there is none and beyond the last channel.
  void (*pack_gate)(const SqueezeExciteGate&, int64_t begin, int64_t end, void* to);
  // Items: the same blocks. excited: activation(hidden). packed: these blocks.
  void (*gate)(const SqueezeExciteGate&, const void* excited, const void* packed, int64_t begin,
               int64_t end);
  // x = activation(x), count values. Not an item: all of them.
  void (*activate)(Activation, void* x, int64_t count);

  // Items: images. excited: as above. grad_hidden (N, S): with respect to hidden.
  // grad_logits (N, C): with respect to what gate_activation is applied to.
  void (*image_gradients)(const SqueezeExciteGateBackward&, void* grad_logits, void* grad_hidden,
                          int64_t begin, int64_t end);
  // Items: rows of expand_weight.
  void (*expand_gradients)(const SqueezeExciteGateBackward&, const void* excited,
                           const void* grad_logits, int64_t begin, int64_t end);
  // Items: rows of reduce_weight.
  void (*reduce_gradients)(const SqueezeExciteGateBackward&, const void* grad_hidden, int64_t begin,
                           int64_t end);
};

constexpr int kGateBlock = 64;
// Values of a packed block.
inline int64_t packed_block_size(const SqueezeExciteGate& a) {
  return (1 + int64_t{a.squeezed}) * kGateBlock;
}

class Team;
// The gate (squeeze_excite.cpp), with what pack_gate() made of expand_weight and expand_bias in
// memory of packed_gate_bytes(), or null.
void squeeze_excite_gate(const SqueezeExciteGate&, const void* packed, Team&);
void pack_gate(const SqueezeExciteGate&, void* packed);
int64_t packed_gate_bytes(const SqueezeExciteGate&);

namespace avx512bf16 {
const SqueezeExciteKernels* squeeze_excite_kernels(Dtype);
}
namespace avx512 {
const SqueezeExciteKernels* squeeze_excite_kernels(Dtype);
}
namespace avx2 {
const SqueezeExciteKernels* squeeze_excite_kernels(Dtype);
}
namespace baseline {
const SqueezeExciteKernels* squeeze_excite_kernels(Dtype);
}

}  // namespace effnet
