// The kernels of squeeze-and-excitation, compiled once for each instruction set.
//
//   input (N, P, C) --sums--> pooled (N, C) --hidden--> (N, S) --activate--> --gate--> (N, C)
//   input, gate --scale--> output
//
// P pixels, C channels, S squeezed channels. The products with weights read each weight once for
// all images. Vectors run over channels, in `gate` with the block's weights turned around.
#pragma once

#include "simd.h"
#include "squeeze_excite.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <class F>
EFFNET_INLINE const F* typed(const void* p) {
  return static_cast<const F*>(p);
}
template <class F>
EFFNET_INLINE F* typed(void* p) {
  return static_cast<F*>(p);
}

EFFNET_INLINE int lesser(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// `n` elements of T as a vector; all of them where n is a vector's lanes.
template <class T>
EFFNET_INLINE typename Simd<T>::V load_n(const T* p, int n) {
  return n == Simd<T>::lanes ? Simd<T>::load(p) : Simd<T>::load_partial(p, n);
}

template <class T>
EFFNET_INLINE void store_n(T* p, typename Simd<T>::V x, int n) {
  if (n == Simd<T>::lanes) {
    Simd<T>::store(p, x);
  } else {
    Simd<T>::store_partial(p, x, n);
  }
}

template <class S>
EFFNET_INLINE typename S::Scalar sum_of_lanes(typename S::V x) {
  typename S::Scalar lanes[S::lanes], sum = 0;
  S::store(lanes, x);
  for (int i = 0; i < S::lanes; ++i) sum += lanes[i];
  return sum;
}

// ---- Images. ----

// Pixels that are summed before they are added to the exact total: as many as L1 holds, so that all
// channels of a pixel are read together, and few, so that little is lost to rounding.
constexpr int64_t kBlockBytes = 16 * 1024;
constexpr int64_t kBlockPixels = 32;

// totals += sum over `pixels` of N vectors of input (* other), the last one of `last` channels.
template <class T, int N, bool Product>
EFFNET_INLINE void add_pixels(const T* input, const T* other, int64_t channels, int pixels,
                              int last, typename Simd<T>::Scalar* totals,
                              typename Simd<T>::Scalar* lost) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int L = S::lanes;
  V sum[N];
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) sum[v] = S::set(0.f);
  for (int p = 0; p < pixels; ++p, input += channels) {
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) {
      const int n = v == N - 1 ? last : L;
      const V x = load_n<T>(input + v * L, n);
      if constexpr (Product) {
        sum[v] = S::fma(x, load_n<T>(other + v * L, n), sum[v]);
      } else {
        sum[v] = sum[v] + x;
      }
    }
    if constexpr (Product) other += channels;
  }
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) {
    ExactSum<S> total(S::load(totals + v * L), S::load(lost + v * L));
    total.add(sum[v]);
    S::store(totals + v * L, total.sum);
    S::store(lost + v * L, total.lost);
  }
}

template <class T, bool Product>
void sum_part(const T* input, const T* other, int64_t stride, int64_t pixels, int channels,
              typename Simd<T>::Scalar* totals, typename Simd<T>::Scalar* lost) {
  using S = Simd<T>;
  constexpr int L = S::lanes, N = 4;
  const int64_t fit = kBlockBytes / (channels * static_cast<int64_t>(sizeof(T))) + 1;
  const int block = lesser(lesser(fit, kBlockPixels), pixels);
  for (int64_t p = 0; p < pixels; p += block) {
    const int count = lesser(pixels - p, block);
    for (int c = 0; c < channels;) {
      const T* x = input + p * stride + c;
      const T* y = Product ? other + p * stride + c : nullptr;
      if (c + N * L <= channels) {
        add_pixels<T, N, Product>(x, y, stride, count, L, totals + c, lost + c);
        c += N * L;
      } else {
        const int last = lesser(channels - c, L);
        add_pixels<T, 1, Product>(x, y, stride, count, last, totals + c, lost + c);
        c += L;
      }
    }
  }
}

template <class T>
void sums(const ChannelSums& a, int parts, int64_t begin, int64_t end, void* scratch) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  constexpr int L = S::lanes;
  const int64_t vectors = (a.channels + L - 1) / L, each = (vectors + parts - 1) / parts;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / parts, first = item % parts * each * L;
    const int channels = lesser(a.channels - first, each * L);
    if (channels <= 0) continue;
    F* totals = typed<F>(scratch);
    F* lost = totals + each * L;
    for (int64_t i = 0; i < 2 * each * L; ++i) totals[i] = F(0);
    const int64_t offset = n * a.pixels * a.channels + first;
    if (a.other == nullptr) {
      sum_part<T, false>(typed<T>(a.input) + offset, nullptr, a.channels, a.pixels, channels,
                         totals, lost);
    } else {
      sum_part<T, true>(typed<T>(a.input) + offset, typed<T>(a.other) + offset, a.channels,
                        a.pixels, channels, totals, lost);
    }
    F* to = typed<F>(a.sums) + n * a.channels + first;
    for (int i = 0; i < channels; ++i) to[i] = totals[i] + lost[i];
  }
}

template <class T>
void means(const void* from, int64_t count, int64_t pixels, void* to) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  constexpr int L = S::lanes;
  const auto factor = S::set(F(1) / static_cast<F>(pixels));
  for (int64_t i = 0; i < count; i += L) {
    const int n = lesser(count - i, L);
    store_n<T>(typed<T>(to) + i, load_n<F>(typed<F>(from) + i, n) * factor, n);
  }
}

template <class T>
void scale(const ChannelScale& a, int64_t begin, int64_t end) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes;
  const int c = a.channels, whole = c / L * L;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t n = pixel / a.pixels, until = (n + 1) * a.pixels;
    const F* factor = typed<F>(a.scale) + n * c;
    const F* shift = a.shift == nullptr ? nullptr : typed<F>(a.shift) + n * c;
    for (; pixel < until && pixel < end; ++pixel) {
      const T* from = typed<T>(a.input) + pixel * c;
      T* to = typed<T>(a.output) + pixel * c;
      if (shift == nullptr) {
        for (int i = 0; i < whole; i += L)
          S::store(to + i, S::load(from + i) * S::load(factor + i));
      } else {
        for (int i = 0; i < whole; i += L) {
          S::store(to + i, S::fma(S::load(from + i), S::load(factor + i), S::load(shift + i)));
        }
      }
      if (whole < c) {
        const int rest = c - whole;
        const V x = load_n<T>(from + whole, rest), by = load_n<F>(factor + whole, rest);
        const V plus = shift == nullptr ? S::set(0.f) : load_n<F>(shift + whole, rest);
        store_n<T>(to + whole, S::fma(x, by, plus), rest);
      }
    }
  }
}

// ---- The gate. ----

// dots[i] = sum over c of row[c] * vectors[i][c], for N vectors that lie `stride` apart.
template <class T, int N>
EFFNET_INLINE void dot_products(const T* row, const typename Simd<T>::Scalar* vectors,
                                int64_t stride, int count, typename Simd<T>::Scalar* dots) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes;
  V sum[N];
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) sum[i] = S::set(0.f);
  for (int c = 0; c < count; c += L) {
    const int n = lesser(count - c, L);
    const V w = load_n<T>(row + c, n);
    EFFNET_UNROLL
    for (int i = 0; i < N; ++i) {
      sum[i] = S::fma(w, load_n<F>(vectors + i * stride + c, n), sum[i]);
    }
  }
  EFFNET_UNROLL
  for (int i = 0; i < N; ++i) dots[i] = sum_of_lanes<S>(sum[i]);
}

template <class T>
void hidden(const SqueezeExciteGate& a, int64_t begin, int64_t end) {
  using F = typename Simd<T>::Scalar;
  constexpr int N = 4;
  const F part = F(1) / static_cast<F>(a.pixels);
  const F* pooled = typed<F>(a.pooled);
  for (int64_t s = begin; s < end; ++s) {
    const T* row = typed<T>(a.reduce_weight) + s * a.channels;
    const F bias = a.reduce_bias == nullptr ? F(0) : to_float(typed<T>(a.reduce_bias)[s]);
    for (int64_t n = 0; n < a.batch;) {
      F dots[N];
      const F* vectors = pooled + n * a.channels;
      const int images = a.batch - n >= N ? N : 1;
      if (images == N) {
        dot_products<T, N>(row, vectors, a.channels, a.channels, dots);
      } else {
        dot_products<T, 1>(row, vectors, a.channels, a.channels, dots);
      }
      for (int i = 0; i < images; ++i, ++n) {
        typed<F>(a.hidden)[n * a.squeezed + s] = dots[i] * part + bias;
      }
    }
  }
}

template <class T>
void activate_values(Activation activation, void* values, int64_t count) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  F* x = typed<F>(values);
  for (int64_t i = 0; i < count; i += S::lanes) {
    const int n = lesser(count - i, S::lanes);
    store_n<F>(x + i, activate<S>(activation, load_n<F>(x + i, n)), n);
  }
}

template <class T>
void pack_gate(const SqueezeExciteGate& a, int64_t begin, int64_t end, void* packed) {
  using F = typename Simd<T>::Scalar;
  const int64_t size = packed_block_size(a);
  F* to = typed<F>(packed);
  for (int64_t block = begin; block < end; ++block, to += size) {
    const int64_t first = block * kGateBlock;
    const int channels = lesser(a.channels - first, kGateBlock);
    for (int64_t i = 0; i < size; ++i) to[i] = F(0);
    for (int c = 0; c < channels; ++c) {
      if (a.expand_bias != nullptr) to[c] = to_float(typed<T>(a.expand_bias)[first + c]);
      const T* row = typed<T>(a.expand_weight) + (first + c) * a.squeezed;
      for (int s = 0; s < a.squeezed; ++s) to[(1 + s) * kGateBlock + c] = to_float(row[s]);
    }
  }
}

template <class T>
void gate(const SqueezeExciteGate& a, const void* excited, const void* packed, int64_t begin,
          int64_t end) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes, N = kGateBlock / L < 4 ? kGateBlock / L : 4;
  const F* weight = typed<F>(packed);
  for (int64_t block = begin; block < end; ++block, weight += packed_block_size(a)) {
    const int64_t first = block * kGateBlock;
    const int channels = lesser(a.channels - first, kGateBlock);
    for (int64_t n = 0; n < a.batch; ++n) {
      const F* values = typed<F>(excited) + n * a.squeezed;
      F* to = typed<F>(a.gate) + n * a.channels + first;
      for (int c = 0; c < channels; c += N * L) {
        const F* row = weight + c;
        V sum[N];
        EFFNET_UNROLL
        for (int v = 0; v < N; ++v) sum[v] = S::load(row + v * L);
        for (int s = 0; s < a.squeezed; ++s) {
          row += kGateBlock;
          const V by = S::set(values[s]);
          EFFNET_UNROLL
          for (int v = 0; v < N; ++v) sum[v] = S::fma(S::load(row + v * L), by, sum[v]);
        }
        EFFNET_UNROLL
        for (int v = 0; v < N; ++v) {
          const int count = lesser(channels - c - v * L, L);
          if (count > 0) store_n<F>(to + c + v * L, activate<S>(a.gate_activation, sum[v]), count);
        }
      }
    }
  }
}

// ---- The gate's gradients. ----

// d gate / d its argument, from the gate.
template <class S>
EFFNET_INLINE typename S::V gate_grad(Activation activation, typename S::V gate) {
  const typename S::V one = S::set(1.f);
  if (activation == Activation::sigmoid) return gate * (one - gate);
  return S::if_positive(gate, S::if_positive(one - gate, S::set(1.0 / 6)));
}

// to[i] += factor * row[i]
template <class T>
EFFNET_INLINE void add_multiple(typename Simd<T>::Scalar* to, const T* row,
                                typename Simd<T>::Scalar factor, int count) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const typename S::V by = S::set(factor);
  for (int i = 0; i < count; i += S::lanes) {
    const int n = lesser(count - i, S::lanes);
    store_n<F>(to + i, S::fma(load_n<T>(row + i, n), by, load_n<F>(to + i, n)), n);
  }
}

template <class T>
void image_gradients(const SqueezeExciteGateBackward& a, void* grad_logits, void* grad_hidden,
                     int64_t begin, int64_t end) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const int c_count = a.channels, s_count = a.squeezed;
  const F part = F(1) / static_cast<F>(a.pixels);
  for (int64_t n = begin; n < end; ++n) {
    F* logits = typed<F>(grad_logits) + n * c_count;
    F* through = typed<F>(grad_hidden) + n * s_count;
    for (int c = 0; c < c_count; c += S::lanes) {
      const int count = lesser(c_count - c, S::lanes);
      const auto g = load_n<F>(typed<F>(a.grad_gate) + n * c_count + c, count);
      const auto value = load_n<F>(typed<F>(a.gate) + n * c_count + c, count);
      store_n<F>(logits + c, g * gate_grad<S>(a.gate_activation, value), count);
    }
    for (int s = 0; s < s_count; ++s) through[s] = F(0);
    for (int c = 0; c < c_count; ++c) {
      const T* row = typed<T>(a.expand_weight) + static_cast<int64_t>(c) * s_count;
      add_multiple<T>(through, row, logits[c], s_count);
    }
    for (int s = 0; s < s_count; s += S::lanes) {
      const int count = lesser(s_count - s, S::lanes);
      const auto x = load_n<F>(typed<F>(a.hidden) + n * s_count + s, count);
      store_n<F>(through + s, load_n<F>(through + s, count) * activate_grad<S>(a.activation, x),
                 count);
    }
    F* to = typed<F>(a.grad_pooled) + n * c_count;
    for (int c = 0; c < c_count; ++c) to[c] = F(0);
    for (int s = 0; s < s_count; ++s) {
      const T* row = typed<T>(a.reduce_weight) + static_cast<int64_t>(s) * c_count;
      add_multiple<T>(to, row, through[s] * part, c_count);
    }
  }
}

// A row of a weight's gradient and its bias': sum over n of factors[n * stride] * rows[n], times
// `part`, and the sum of the factors.
template <class T>
EFFNET_INLINE void weight_row(T* grad_row, T* grad_bias, const typename Simd<T>::Scalar* factors,
                              int64_t stride, const typename Simd<T>::Scalar* rows, int count,
                              int64_t batch, typename Simd<T>::Scalar part) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  for (int i = 0; i < count; i += S::lanes) {
    const int width = lesser(count - i, S::lanes);
    V sum = S::set(0.f);
    for (int64_t n = 0; n < batch; ++n) {
      sum = S::fma(load_n<F>(rows + n * count + i, width), S::set(factors[n * stride]), sum);
    }
    store_n<T>(grad_row + i, sum * S::set(part), width);
  }
  F total = 0;
  for (int64_t n = 0; n < batch; ++n) total += factors[n * stride];
  *grad_bias = Round<T>::from(total);
}

template <class T>
void expand_gradients(const SqueezeExciteGateBackward& a, const void* excited,
                      const void* grad_logits, int64_t begin, int64_t end) {
  using F = typename Simd<T>::Scalar;
  for (int64_t c = begin; c < end; ++c) {
    weight_row<T>(typed<T>(a.grad_expand_weight) + c * a.squeezed, typed<T>(a.grad_expand_bias) + c,
                  typed<F>(grad_logits) + c, a.channels, typed<F>(excited), a.squeezed, a.batch,
                  F(1));
  }
}

template <class T>
void reduce_gradients(const SqueezeExciteGateBackward& a, const void* grad_hidden, int64_t begin,
                      int64_t end) {
  using F = typename Simd<T>::Scalar;
  for (int64_t s = begin; s < end; ++s) {
    weight_row<T>(typed<T>(a.grad_reduce_weight) + s * a.channels, typed<T>(a.grad_reduce_bias) + s,
                  typed<F>(grad_hidden) + s, a.squeezed, typed<F>(a.pooled), a.channels, a.batch,
                  F(1) / static_cast<F>(a.pixels));
  }
}

template <class T>
const SqueezeExciteKernels* squeeze_excite_kernels_of() {
  static constexpr SqueezeExciteKernels kernels = {
      sums<T>, means<T>,           scale<T>,           hidden<T>,           pack_gate<T>,
      gate<T>, activate_values<T>, image_gradients<T>, expand_gradients<T>, reduce_gradients<T>};
  return &kernels;
}

}  // namespace

const SqueezeExciteKernels* squeeze_excite_kernels(Dtype dtype) {
  return for_dtype(dtype,
                   [](auto element) { return squeeze_excite_kernels_of<decltype(element)>(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
