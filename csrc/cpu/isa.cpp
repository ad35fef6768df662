#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "../ops.h"

namespace effnet {
namespace {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

#if defined(__x86_64__)
// Whether a product of bfloat16 pairs (vdpbf16ps) costs less than the two of float32 that it takes
// the place of. The later cores of Intel, which have matrix units for the purpose, start one of
// them in the time of four (measured on Emerald Rapids). On AMD's and on Cooper Lake it should cost
// as much as one.
bool multiplies_bfloat16_fast() {
  return __builtin_cpu_is("cooperlake") || !__builtin_cpu_is("intel");
}
#endif

// Fastest first.
std::vector<Isa> supported() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back(Isa::avx512);
    if (__builtin_cpu_supports("avx512bf16")) {
      isas.insert(multiplies_bfloat16_fast() ? isas.begin() : isas.end(), Isa::avx512bf16);
    }
  }
  if (avx2) isas.push_back(Isa::avx2);
#endif
  isas.push_back(Isa::baseline);
  return isas;
}

std::string supported_names() {
  std::string names;
  for (const Isa isa : supported())
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  return names;
}

Isa choose() {
  const std::vector<Isa> isas = supported();
  const char* wanted = std::getenv("EFFNET_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.front();
  for (const Isa isa : isas) {
    if (name_of(isa) == std::string(wanted)) return isa;
  }
  STD_TORCH_CHECK(false, "EFFNET_KERNELS_CPU_ISA: got '", wanted, "', this processor has ",
                  supported_names());
}

// The instruction set in use, and all that this processor could use, fastest first.
std::string cpu_isa_name() { return name_of(cpu_isa()); }

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace effnet

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&effnet::cpu_isa_name));
  m.impl("cpu_isas", TORCH_BOX(&effnet::supported_names));
}
