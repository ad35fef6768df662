// Which instruction set the CPU kernels use.
#pragma once

#include <string>

namespace effnet {

enum class Isa : int { baseline, avx2, avx512 };

// The best that this processor has, or what the environment variable EFFNET_KERNELS_CPU_ISA
// (baseline, avx2 or avx512) asks for. Throws std::runtime_error where that is not to be had.
Isa cpu_isa();

// Whether 16-bit floats are rounded to bfloat16 by an instruction (only asked with Isa::avx512).
bool has_avx512bf16();

}  // namespace effnet
