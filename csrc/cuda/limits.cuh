// What launchers know of a device when they cut work into blocks. No torch headers.
#pragma once

#include <cstdint>

namespace effnet::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int align(int x, int unit) { return (x + unit - 1) / unit * unit; }

struct DeviceLimits {
  int multiprocessors = 0;
  int multiprocessor_bytes = 0;  // of shared memory

  // Shared memory of a block, where `blocks` are to be on a multiprocessor at a time.
  int shared_bytes(int blocks) const {
    constexpr int kReserved = 1024;  // by the system, of each block
    return multiprocessor_bytes / blocks - kReserved;
  }
};

}  // namespace effnet::cuda
