// Vectors of float for the instruction set of target.h, and the storage types they are loaded from
// and rounded to (to nearest even). Simd<T> computes on tensors of T: in float32 for float, half
// and bfloat16, in double for double (baseline only, a vector of one for gradcheck).
//
// A `partial` load or store touches the first n elements only; a partial load fills up with zeros.
// Simd is the Math of epilogue.h. min and max return their first argument where it is NaN.
#pragma once

#include "../arguments.h"
#include "../epilogue.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

struct half {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

EFFNET_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
EFFNET_INLINE void prefetch_to_write(const void* address) { __builtin_prefetch(address, 1, 3); }

template <class To, class From>
EFFNET_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// One element. float16 by way of the float32 with the same bits: its exponent is 112 too small, so
// subnormals need nothing special; infinity and NaN do.
EFFNET_INLINE float to_float(float x) { return x; }
EFFNET_INLINE double to_float(double x) { return x; }
EFFNET_INLINE float to_float(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
EFFNET_INLINE float to_float(half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
  const uint32_t bits =
      rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ffu) << 13 : bit_cast<uint32_t>(magnitude);
  return bit_cast<float>(sign | bits);
}

template <class T>
struct Round;
template <>
struct Round<float> {
  static EFFNET_INLINE float from(float x) { return x; }
};
template <>
struct Round<double> {
  static EFFNET_INLINE double from(double x) { return x; }
};
template <>
struct Round<bfloat16> {
  static EFFNET_INLINE bfloat16 from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Round<half> {
  static EFFNET_INLINE half from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), rest = bits & 0x7fffffffu;
    uint32_t rounded;
    if (rest > 0x7f800000u) {
      rounded = 0x7e00;
    } else if (rest >= 0x47800000u) {  // 2^16 and above
      rounded = 0x7c00;
    } else if (rest >= 0x38800000u) {  // a normal float16; rounding may carry into infinity
      rounded = (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13;
    } else {  // adding 1/2 leaves the rounded subnormal in the low bits
      rounded = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
    }
    return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rounded)};
  }
};

// 2^f = 1 + f * P(f) for |f| <= 1/2, by minimax over that interval: relative error 1.1e-7, and of
// the coarse one 1.0e-4.
struct FineExp2 {
  static constexpr int terms = 5;
  static constexpr float of[terms] = {0.6931470036506653f, 0.24022242426872253f,
                                      0.05550733953714371f, 0.009671512991189957f,
                                      0.001326472032815218f};
};
struct CoarseExp2 {
  static constexpr int terms = 3;
  static constexpr float of[terms] = {0.6932829022407532f, 0.2422109693288803f,
                                      0.055009059607982635f};
};
constexpr float kLog2e = 1.44269504088896341f;
// Adding it to a small number rounds that to an integer, found in the low bits.
constexpr float kRound = 0x1.8p23f;
// exp(-x) = 2^t is taken for t in this interval: 1 + 2^t is 1 to float32 long before its lower end,
// and the power of its upper end, 1 with an exponent one above the largest, is infinity.
constexpr float kExp2Low = -126.f, kExp2High = 128.f;

// exp(-x) = 2^(n + f) of N vectors, f in [-1/2, 1/2], n + kRound in the place of n, for instruction
// sets without any for exponents. NaN may become any number.
template <class S, int N>
EFFNET_INLINE void split_exponents(typename S::V (&f)[N], typename S::V (&n)[N],
                                   const typename S::V (&x)[N]) {
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) f[i] = x[i] * S::set(-kLog2e);
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) f[i] = S::max(f[i], S::set(kExp2Low));
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) f[i] = S::min(f[i], S::set(kExp2High));
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) n[i] = f[i] + S::set(kRound);
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) f[i] = f[i] - (n[i] - S::set(kRound));
}

// 1 + exp(-x) of N vectors, step by step for all of them: a chain of dependent instructions is many
// times as long as a scheduler, which would not find the next chain behind it.
template <class S, int N>
EFFNET_INLINE void one_plus_exp_of_negative(typename S::V (&d)[N], const typename S::V (&x)[N]) {
  using P = typename S::Exp2;
  typename S::V f[N], n[N];
  S::template split<N>(f, n, x);
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) d[i] = S::set(P::of[P::terms - 1]);
  EFFNET_UNROLL
  for (int term = P::terms - 2; term >= 0; --term) {
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) d[i] = S::fma(d[i], f[i], S::set(P::of[term]));
  }
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) d[i] = S::fma(d[i], f[i], S::set(1.f));
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) d[i] = S::times_power_of_two(d[i], n[i]);
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) d[i] = d[i] + S::set(1.f);
}

#if defined(EFFNET_TARGET_AVX512)

struct FloatSimd {
  using V = __m512;
  using Scalar = float;
  using Exp2 = FineExp2;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;

  static EFFNET_INLINE V set(float x) { return _mm512_set1_ps(x); }
  static EFFNET_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // sum += a * b in the register of sum: of the three forms of the instruction the compiler takes
  // others too, and then copies.
  static EFFNET_INLINE void accumulate(V& sum, V a, V b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
  // sum += *p * b, with the load in the same instruction.
  static EFFNET_INLINE void accumulate_loaded(V& sum, const float* p, V b) {
    using Unaligned = V __attribute__((aligned(4), may_alias));
    asm("vfmadd231ps %1, %2, %0" : "+v"(sum) : "m"(*reinterpret_cast<const Unaligned*>(p)), "v"(b));
  }
#if defined(EFFNET_TARGET_AVX512BF16)
  // sum[i] += a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] for a and b of 32 bfloat16s; subnormal ones
  // count as zeros.
  static EFFNET_INLINE void accumulate_pairs(V& sum, V a, V b) {
    sum = _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
  // p[0] and p[1] over and over.
  static EFFNET_INLINE V set_pair(const bfloat16* p) {
    float pair;
    std::memcpy(&pair, p, sizeof(pair));
    return set(pair);
  }
#endif
  static EFFNET_INLINE V min(V a, V b) { return _mm512_min_ps(b, a); }
  static EFFNET_INLINE V max(V a, V b) { return _mm512_max_ps(b, a); }
  static EFFNET_INLINE V sixth(V x) { return fma(x, set(kSixth), x * set(kSixthRest)); }
  static EFFNET_INLINE V if_positive(V x, V y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), y);
  }

  // -x / ln(2) as n + f. The instructions take infinity, too, but are slow to make a subnormal.
  template <int N>
  static EFFNET_INLINE void split(V (&f)[N], V (&n)[N], const V (&x)[N]) {
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) n[i] = x[i] * set(-kLog2e);
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) n[i] = max(n[i], set(kExp2Low));
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) f[i] = _mm512_reduce_ps(n[i], _MM_FROUND_TO_NEAREST_INT);
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) n[i] = n[i] - f[i];
  }
  static EFFNET_INLINE V times_power_of_two(V p, V n) { return _mm512_scalef_ps(p, n); }
  // x / d for d >= 1 by one Newton step from a 14-bit estimate, which infinity would not survive.
  static EFFNET_INLINE V quotient(V x, V d) {
    const V q = _mm512_rcp14_ps(d);
    const __mmask16 normal = _mm512_cmp_ps_mask(d, set(0x1p126f), _CMP_NGE_UQ);
    return x * _mm512_maskz_fmadd_ps(normal, q, _mm512_fnmadd_ps(d, q, set(1.f)), q);
  }
  static EFFNET_INLINE V silu(V x) { return x * sigmoid(x); }
  static EFFNET_INLINE V sigmoid(V x) {
    V d[1];
    one_plus_exp_of_negative<FloatSimd, 1>(d, {x});
    return quotient(set(1.f), d[0]);
  }

  static EFFNET_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static EFFNET_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  // For a vector that several instructions use: into a register, not again for each of them.
  static EFFNET_INLINE V load_once(const float* p) {
    V x = load(p);
    asm("" : "+v"(x));
    return x;
  }
  static EFFNET_INLINE V load_partial(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static EFFNET_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  static EFFNET_INLINE void store_partial(float* p, V x, int n) {
    _mm512_mask_storeu_ps(p, first(n), x);
  }

  static EFFNET_INLINE V widen(half, __m256i x) { return _mm512_cvtph_ps(x); }
  static EFFNET_INLINE V widen(bfloat16, __m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static EFFNET_INLINE __m256i narrow(half, V x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static EFFNET_INLINE __m256i narrow(bfloat16, V x) {
#if defined(EFFNET_TARGET_AVX512BF16)
    return bit_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }
  template <class T>
  static EFFNET_INLINE V load(const T* p) {
    return widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <class T>
  static EFFNET_INLINE V load_partial(const T* p, int n) {
    return widen(T{}, _mm256_maskz_loadu_epi16(first(n), p));
  }
  template <class T>
  static EFFNET_INLINE void store(T* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, x));
  }
  template <class T>
  static EFFNET_INLINE void store_partial(T* p, V x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(T{}, x));
  }
};

#elif defined(EFFNET_TARGET_AVX2)

struct FloatSimd {
  using V = __m256;
  using Scalar = float;
  using Exp2 = FineExp2;
  static constexpr int lanes = 8;
  static constexpr int registers = 16;

  static EFFNET_INLINE V set(float x) { return _mm256_set1_ps(x); }
  static EFFNET_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // sum += a * b in the register of sum: of the three forms of the instruction the compiler takes
  // others too, and then copies.
  static EFFNET_INLINE void accumulate(V& sum, V a, V b) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
  // sum += *p * b, with the load in the same instruction.
  static EFFNET_INLINE void accumulate_loaded(V& sum, const float* p, V b) {
    using Unaligned = V __attribute__((aligned(4), may_alias));
    asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "m"(*reinterpret_cast<const Unaligned*>(p)), "x"(b));
  }
  static EFFNET_INLINE V min(V a, V b) { return _mm256_min_ps(b, a); }
  static EFFNET_INLINE V max(V a, V b) { return _mm256_max_ps(b, a); }
  static EFFNET_INLINE V sixth(V x) { return fma(x, set(kSixth), x * set(kSixthRest)); }
  static EFFNET_INLINE V if_positive(V x, V y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), y);
  }

  template <int N>
  static EFFNET_INLINE void split(V (&f)[N], V (&n)[N], const V (&x)[N]) {
    split_exponents<FloatSimd, N>(f, n, x);
  }
  // p * 2^n, biased = n + kRound.
  static EFFNET_INLINE V times_power_of_two(V p, V biased) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }
  static EFFNET_INLINE V quotient(V x, V d) { return x / d; }
  static EFFNET_INLINE V silu(V x) { return x * sigmoid(x); }
  static EFFNET_INLINE V sigmoid(V x) {
    V d[1];
    one_plus_exp_of_negative<FloatSimd, 1>(d, {x});
    return _mm256_or_ps(set(1.f) / d[0], _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

  static EFFNET_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static EFFNET_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static EFFNET_INLINE V load_once(const float* p) {
    V x = load(p);
    asm("" : "+x"(x));
    return x;
  }
  static EFFNET_INLINE V load_partial(const float* p, int n) {
    return _mm256_maskload_ps(p, first(n));
  }
  static EFFNET_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
  static EFFNET_INLINE void store_partial(float* p, V x, int n) {
    _mm256_maskstore_ps(p, first(n), x);
  }

  static EFFNET_INLINE V widen(half, __m128i x) { return _mm256_cvtph_ps(x); }
  static EFFNET_INLINE V widen(bfloat16, __m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static EFFNET_INLINE __m128i narrow(half, V x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static EFFNET_INLINE __m128i narrow(bfloat16, V x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  template <class T>
  static EFFNET_INLINE V load(const T* p) {
    return widen(T{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <class T>
  static EFFNET_INLINE V load_partial(const T* p, int n) {
    T t[lanes] = {};
    std::memcpy(t, p, n * sizeof(T));
    return load(t);
  }
  template <class T>
  static EFFNET_INLINE void store(T* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(T{}, x));
  }
  template <class T>
  static EFFNET_INLINE void store_partial(T* p, V x, int n) {
    T t[lanes];
    store(t, x);
    std::memcpy(p, t, n * sizeof(T));
  }
};

#else

// The compiler's own vectors: SSE2, NEON, or whatever there is.
struct FloatSimd {
  using V = float __attribute__((vector_size(16)));
  using Scalar = float;
  using Exp2 = FineExp2;
  static constexpr int lanes = 4;
  static constexpr int registers = 16;

  static EFFNET_INLINE V set(float x) { return V{x, x, x, x}; }
  static EFFNET_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static EFFNET_INLINE void accumulate(V& sum, V a, V b) { sum = a * b + sum; }
  static EFFNET_INLINE void accumulate_loaded(V& sum, const Scalar* p, V b) {
    sum = load(p) * b + sum;
  }
  static EFFNET_INLINE V min(V a, V b) { return b < a ? b : a; }
  static EFFNET_INLINE V max(V a, V b) { return b > a ? b : a; }
  static EFFNET_INLINE V sixth(V x) { return x / set(6.f); }
  static EFFNET_INLINE V if_positive(V x, V y) { return x > set(0.f) ? y : set(0.f); }

  template <int N>
  static EFFNET_INLINE void split(V (&f)[N], V (&n)[N], const V (&x)[N]) {
    split_exponents<FloatSimd, N>(f, n, x);
  }
  // p * 2^n, biased = n + kRound.
  static EFFNET_INLINE V times_power_of_two(V p, V biased) {
    using I = int32_t __attribute__((vector_size(16)));
    return (V)((I)p + ((I)biased << 23));
  }
  static EFFNET_INLINE V quotient(V x, V d) { return x / d; }
  static EFFNET_INLINE V silu(V x) { return x * sigmoid(x); }
  static EFFNET_INLINE V sigmoid(V x) {
    V d[1];
    one_plus_exp_of_negative<FloatSimd, 1>(d, {x});
    return x == x ? set(1.f) / d[0] : x;
  }

  static EFFNET_INLINE V load(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static EFFNET_INLINE V load_once(const float* p) { return load(p); }
  static EFFNET_INLINE void store(float* p, V x) { std::memcpy(p, &x, sizeof(x)); }
  template <class T>
  static EFFNET_INLINE V load(const T* p) {
    return V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  template <class T>
  static EFFNET_INLINE void store(T* p, V x) {
    for (int i = 0; i < lanes; ++i) p[i] = Round<T>::from(x[i]);
  }
  template <class T>
  static EFFNET_INLINE V load_partial(const T* p, int n) {
    T t[lanes] = {};
    std::memcpy(t, p, n * sizeof(T));
    return load(t);
  }
  template <class T>
  static EFFNET_INLINE void store_partial(T* p, V x, int n) {
    T t[lanes];
    store(t, x);
    std::memcpy(p, t, n * sizeof(T));
  }
};

struct DoubleSimd {
  using V = double;
  using Scalar = double;
  static constexpr int lanes = 1;
  static constexpr int registers = 16;

  static EFFNET_INLINE V set(double x) { return x; }
  static EFFNET_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static EFFNET_INLINE void accumulate(V& sum, V a, V b) { sum = a * b + sum; }
  static EFFNET_INLINE void accumulate_loaded(V& sum, const Scalar* p, V b) {
    sum = load(p) * b + sum;
  }
  static EFFNET_INLINE V min(V a, V b) { return b < a ? b : a; }
  static EFFNET_INLINE V max(V a, V b) { return b > a ? b : a; }
  static EFFNET_INLINE V sixth(V x) { return x / 6; }
  static EFFNET_INLINE V if_positive(V x, V y) { return x > 0 ? y : 0; }
  static EFFNET_INLINE V silu(V x) { return x * sigmoid(x); }
  static EFFNET_INLINE V sigmoid(V x) { return 1 / (1 + std::exp(-x)); }
  static EFFNET_INLINE V load(const double* p) { return *p; }
  static EFFNET_INLINE V load_once(const double* p) { return *p; }
  static EFFNET_INLINE V load_partial(const double* p, int) { return *p; }
  static EFFNET_INLINE void store(double* p, V x) { *p = x; }
  static EFFNET_INLINE void store_partial(double* p, V x, int) { *p = x; }
};

#endif

// What is rounded to bfloat16, by 2^-9, is activated to 2^-12.
struct CoarseSimd : FloatSimd {
  using Exp2 = CoarseExp2;
#if defined(EFFNET_TARGET_AVX512)
  static EFFNET_INLINE V quotient(V x, V d) { return x * _mm512_rcp14_ps(d); }
#endif
};

template <class T>
struct SimdOf {
  using type = FloatSimd;
};
template <>
struct SimdOf<bfloat16> {
  using type = CoarseSimd;
};
#if defined(EFFNET_TARGET_BASELINE)
template <>
struct SimdOf<double> {
  using type = DoubleSimd;
};
#endif
template <class T>
using Simd = typename SimdOf<T>::type;

// In every 2 * Half lanes the last ones of a change places with the first ones of b.
template <int Half, class V, int... Lane>
EFFNET_INLINE void exchange(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int L = sizeof...(Lane);
#if defined(__clang__)
  const V low = __builtin_shufflevector(a, b, ((Lane & Half) ? L + Lane - Half : Lane)...);
  const V high = __builtin_shufflevector(a, b, ((Lane & Half) ? L + Lane : Lane + Half)...);
#else
  using Places = decltype(a < b);
  const V low = __builtin_shuffle(a, b, Places{((Lane & Half) ? L + Lane - Half : Lane)...});
  const V high = __builtin_shuffle(a, b, Places{((Lane & Half) ? L + Lane : Lane + Half)...});
#endif
  a = low;
  b = high;
}

// Lane j of x[i] and lane i of x[j] change places.
template <class S, int Half = 1>
EFFNET_INLINE void transpose(typename S::V (&x)[S::lanes]) {
  if constexpr (Half < S::lanes) {
    EFFNET_UNROLL
    for (int i = 0; i < S::lanes; ++i) {
      if ((i & Half) == 0) {
        exchange<Half>(x[i], x[i + Half], std::make_integer_sequence<int, S::lanes>{});
      }
    }
    transpose<S, 2 * Half>(x);
  }
}

// sum + lost is the exact total but for second-order errors, whatever the size of the summands
// (Knuth's TwoSum).
template <class S>
struct ExactSum {
  using V = typename S::V;
  V sum, lost;
  EFFNET_INLINE ExactSum() : sum(S::set(0.f)), lost(S::set(0.f)) {}
  EFFNET_INLINE ExactSum(V s, V l) : sum(s), lost(l) {}
  EFFNET_INLINE void add(V x) {
    const V next = sum + x, part = next - sum;
    lost = lost + ((sum - (next - part)) + (x - part));
    sum = next;
  }
  EFFNET_INLINE void add(const ExactSum& x) {
    add(x.sum);
    lost = lost + x.lost;
  }
};

// SiLU of N vectors, as one quotient.
template <class S, int N>
EFFNET_INLINE void silu(typename S::V (&x)[N]) {
  if constexpr (sizeof(typename S::Scalar) == sizeof(float)) {
    typename S::V d[N];
    one_plus_exp_of_negative<S, N>(d, x);
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = S::quotient(x[i], d[i]);
  } else {
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = x[i] * S::sigmoid(x[i]);
  }
}

// 1 / (1 + exp(-x)) of N vectors.
template <class S, int N>
EFFNET_INLINE void sigmoids(typename S::V (&x)[N]) {
  if constexpr (sizeof(typename S::Scalar) == sizeof(float)) {
    typename S::V d[N];
    one_plus_exp_of_negative<S, N>(d, x);
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = S::quotient(S::set(1.f), d[i]);
  } else {
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = S::sigmoid(x[i]);
  }
}

// activate_grad() of N vectors, in place.
template <class S, int N>
EFFNET_INLINE void activate_grad_all(Activation activation, typename S::V (&x)[N]) {
  if (activation == Activation::silu) {
    // NaN comes through by way of x itself.
    typename S::V s[N];
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) s[i] = x[i];
    sigmoids<S, N>(s);
    const typename S::V one = S::set(1.f);
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = s[i] * S::fma(x[i], one - s[i], one);
  } else {
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = activate_grad<S>(activation, x[i]);
  }
}

// N vectors activated in place, as many at a time as there are registers for.
template <class S, int N>
EFFNET_INLINE void activate_all(Activation activation, typename S::V (&x)[N]) {
  constexpr int Most = S::registers >= 32 ? 8 : 4;
  if (activation != Activation::silu) {
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = activate<S>(activation, x[i]);
  } else if constexpr (N <= Most) {
    silu<S, N>(x);
  } else {
    // What is not at it waits in memory, or a group would have no registers to work in.
    constexpr int Groups = (N + Most - 1) / Most, Group = (N + Groups - 1) / Groups;
    constexpr int Rounded = Groups * Group;
    typename S::Scalar kept[Rounded * S::lanes];
    EFFNET_UNROLL
    for (int i = 0; i < Rounded; ++i) S::store(kept + i * S::lanes, x[i < N ? i : 0]);
    asm("" : "+m"(kept));
    for (int first = 0; first < N; first += Group) {
      typename S::V group[Group];
      EFFNET_UNROLL
      for (int i = 0; i < Group; ++i) group[i] = S::load(kept + (first + i) * S::lanes);
      silu<S, Group>(group);
      EFFNET_UNROLL
      for (int i = 0; i < Group; ++i) S::store(kept + (first + i) * S::lanes, group[i]);
    }
    asm("" : "+m"(kept));
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) x[i] = S::load(kept + i * S::lanes);
  }
}

// of(T{}) for the T of a dtype, or null where this target has no kernels for it.
template <class Of>
EFFNET_INLINE auto for_dtype(Dtype dtype, const Of& of) -> decltype(of(bfloat16{})) {
  switch (dtype) {
    case Dtype::bfloat16:
      return of(bfloat16{});
#if !defined(EFFNET_TARGET_AVX512BF16)
    case Dtype::float32:
      return of(float{});
    case Dtype::float16:
      return of(half{});
#endif
#if defined(EFFNET_TARGET_BASELINE)
    case Dtype::float64:
      return of(double{});
#endif
    default:
      return nullptr;
  }
}

// x as it will be read back from a tensor of T.
template <class T>
EFFNET_INLINE typename Simd<T>::V rounded(typename Simd<T>::V x) {
  if constexpr (sizeof(T) == sizeof(typename Simd<T>::Scalar)) {
    return x;
  } else {
    T t[Simd<T>::lanes];
    Simd<T>::store(t, x);
    return Simd<T>::load(t);
  }
}

}  // namespace
}  // namespace EFFNET_ISA
}  // namespace effnet
