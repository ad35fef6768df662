// Which instruction set the CPU kernels use.
#pragma once

#include <string>

#include "../arguments.h"

namespace effnet {

enum class Isa : int { baseline, avx2, avx512 };

// The best that this processor has, or what the environment variable EFFNET_KERNELS_CPU_ISA
// (baseline, avx2 or avx512) asks for. Throws std::runtime_error where that is not to be had.
Isa cpu_isa();

// Whether there are instructions that multiply bfloat16s and round to them (only asked with
// Isa::avx512).
bool has_avx512bf16();

// The kernels that an op has for each instruction set, by dtype; null where the compiler's target
// has none.
template <class Kernels>
struct KernelsByIsa {
  const Kernels* (*avx512bf16)(Dtype);
  const Kernels* (*avx512)(Dtype);
  const Kernels* (*avx2)(Dtype);
  const Kernels* (*baseline)(Dtype);

  // Those in use for tensors of `dtype`.
  const Kernels& operator()(Dtype dtype) const {
    const Isa isa = dtype == Dtype::float64 ? Isa::baseline : cpu_isa();
    if (isa == Isa::avx512 && dtype == Dtype::bfloat16 && has_avx512bf16()) {
      return *avx512bf16(dtype);
    }
    if (isa == Isa::avx512) return *avx512(dtype);
    if (isa == Isa::avx2) return *avx2(dtype);
    return *baseline(dtype);
  }
};

#if defined(__x86_64__)
#define EFFNET_KERNELS_BY_ISA(function) \
  {avx512bf16::function, avx512::function, avx2::function, baseline::function}
#else
#define EFFNET_KERNELS_BY_ISA(function) {nullptr, nullptr, nullptr, baseline::function}
#endif

}  // namespace effnet
