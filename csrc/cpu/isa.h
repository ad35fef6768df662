// Which instruction set the CPU kernels use.
#pragma once

#include <string>

#include "../arguments.h"

namespace effnet {

// avx512bf16 is avx512 with instructions that multiply bfloat16s and round to them.
enum class Isa : int { baseline, avx2, avx512, avx512bf16 };

// The fastest that this processor has, or what the environment variable EFFNET_KERNELS_CPU_ISA
// (baseline, avx2, avx512 or avx512bf16) asks for. Throws std::runtime_error where that is not to
// be had.
Isa cpu_isa();

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
    switch (isa) {
      case Isa::avx512bf16:
        return dtype == Dtype::bfloat16 ? *avx512bf16(dtype) : *avx512(dtype);
      case Isa::avx512:
        return *avx512(dtype);
      case Isa::avx2:
        return *avx2(dtype);
      default:
        return *baseline(dtype);
    }
  }
};

#if defined(__x86_64__)
#define EFFNET_KERNELS_BY_ISA(function) \
  {avx512bf16::function, avx512::function, avx2::function, baseline::function}
#else
#define EFFNET_KERNELS_BY_ISA(function) {nullptr, nullptr, nullptr, baseline::function}
#endif

}  // namespace effnet
