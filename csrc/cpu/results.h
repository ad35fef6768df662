// What the functional ops of csrc/cpu make of their arguments, and the results that they allocate.
// `effnet_kernels/ops` allocates the same for other devices and for the fakes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace effnet {

// Like `like`, but (n, c, h, w), channels-last, not initialised.
inline torch::stable::Tensor empty_image(const torch::stable::Tensor& like, int64_t n, int64_t c,
                                         int64_t h, int64_t w) {
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Like `like`, but contiguous, not initialised and of the dtype that its sums are kept in.
inline torch::stable::Tensor empty_sums(const torch::stable::Tensor& like,
                                        torch::headeronly::IntHeaderOnlyArrayRef size) {
  using torch::headeronly::ScalarType;
  const ScalarType type =
      like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(size, type, std::nullopt, like.device());
}

// Bytes, on the device of `like`, not initialised.
inline torch::stable::Tensor empty_bytes(const torch::stable::Tensor& like, int64_t bytes) {
  return torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt,
                              like.device());
}

// `t` itself where it is dense channels-last.
inline torch::stable::Tensor channels_last(const torch::stable::Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline std::optional<torch::stable::Tensor> given_if(bool wanted, const torch::stable::Tensor& t) {
  return wanted ? std::optional(t) : std::nullopt;
}

}  // namespace effnet
