// What the drivers of the ops with products (gemm.h) know of a packed matrix and of the rows that
// it is multiplied with. It differs from one instruction set and dtype to another.
#pragma once

#include <cstdint>

#include "../epilogue.h"

namespace effnet {

// The kernels call these too: inlined always, none of them is left to the linker (target.h).
struct GemmFormat {
  // Matrices of a convolution by winograd.h.
  static constexpr int kPositions = 16;

  int lanes;
  int step;         // channels that a product takes at a time; rows and matrices are padded to it
  int value_bytes;  // an element of rows and matrices
  int accumulate_bytes;

  EFFNET_INLINE int64_t depth(int64_t in_channels) const {
    return (in_channels + step - 1) / step * step;
  }
  EFFNET_INLINE int64_t vectors(int64_t channels) const { return (channels + lanes - 1) / lanes; }
  EFFNET_INLINE int64_t padded(int64_t channels) const { return vectors(channels) * lanes; }
  // Panels of two vectors; the last one has three where vectors are odd.
  EFFNET_INLINE int64_t panels(int64_t channels) const {
    return vectors(channels) < 2 ? 1 : vectors(channels) / 2;
  }
  // Output channels of a panel, at most.
  EFFNET_INLINE int64_t widest_panel() const { return 3 * lanes; }
  // Whether the rows of a tensor can be multiplied where they lie.
  EFFNET_INLINE bool takes(int64_t element_bytes, int64_t in_channels) const {
    return element_bytes == value_bytes && in_channels % step == 0;
  }
  EFFNET_INLINE int64_t values_bytes(int64_t channels, int64_t in_channels) const {
    return padded(channels) * depth(in_channels) * value_bytes;
  }
  // The panels, what the sums of their channels start with, and what those are multiplied by.
  EFFNET_INLINE int64_t matrix_bytes(int64_t channels, int64_t in_channels) const {
    return values_bytes(channels, in_channels) + 2 * padded(channels) * accumulate_bytes;
  }
};

}  // namespace effnet
