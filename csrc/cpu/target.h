// Compiles the rest of a translation unit for one instruction set. A file defines one of
//   EFFNET_TARGET_AVX512BF16, EFFNET_TARGET_AVX512, EFFNET_TARGET_AVX2, EFFNET_TARGET_BASELINE
// includes this first, then the kernels' source, and ends with EFFNET_TARGET_END. EFFNET_ISA is
// then the namespace that the kernels live in.
//
// Everything that the kernels include from outside is included here, before the target changes, and
// everything of ours has internal linkage: an inline function compiled for AVX-512 must never be
// the one that the linker keeps for the whole library.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// The "undefined" operands inside GCC's own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

#if defined(EFFNET_TARGET_AVX512BF16)
#define EFFNET_ISA avx512bf16
#define EFFNET_TARGET_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                                \
    __attribute__((                                                                          \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2,prfchw"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2,prfchw")
#endif
#elif defined(EFFNET_TARGET_AVX512)
#define EFFNET_ISA avx512
#if defined(__clang__)
#pragma clang attribute push(                                                                \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prfchw"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prfchw")
#endif
#elif defined(EFFNET_TARGET_AVX2)
#define EFFNET_ISA avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,prfchw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2,prfchw")
#endif
#elif defined(EFFNET_TARGET_BASELINE)
#define EFFNET_ISA baseline
#else
#error "define an EFFNET_TARGET_"
#endif

#if defined(__clang__) && !defined(EFFNET_TARGET_BASELINE)
#define EFFNET_TARGET_END _Pragma("clang attribute pop")
#else
#define EFFNET_TARGET_END
#endif

// Complete unrolling keeps an array of accumulators in registers.
#if defined(__clang__)
#define EFFNET_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EFFNET_UNROLL _Pragma("GCC unroll 128")
#endif
