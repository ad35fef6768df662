// The kernels of BN + activation, its residual, pooled sums and gradients, compiled once for each
// instruction set: one pass over the pixels each.
//
// A pass takes runs of pixels, few enough for L1, and in a run groups of vectors of channels, whose
// per-channel values and sums stay in registers for the run.
#pragma once

#include "batch_norm_act.h"
#include "depthwise_loops.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kGroup = 4;
constexpr int64_t kRunBytes = 16 * 1024;
// A sum over many pixels loses more to rounding than an exact one costs.
constexpr int64_t kRunPixels = 16;

template <int Value>
struct Vectors {
  static constexpr int value = Value;
};

// N vectors of channels from `p` on, the last of `last` channels.
template <class T, int N>
EFFNET_INLINE void load_vectors(typename Simd<T>::V (&x)[N], const T* p, int last) {
  using S = Simd<T>;
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) {
    const bool whole = v < N - 1 || last == S::lanes;
    x[v] = whole ? S::load(p + v * S::lanes) : S::load_partial(p + v * S::lanes, last);
  }
}

template <class T, int N>
EFFNET_INLINE void store_vectors(T* p, const typename Simd<T>::V (&x)[N], int last) {
  using S = Simd<T>;
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) {
    if (v < N - 1 || last == S::lanes) {
      S::store(p + v * S::lanes, x[v]);
    } else {
      S::store_partial(p + v * S::lanes, x[v], last);
    }
  }
}

// Values of the channels from c on, or `absent` where there are none.
template <class S, int N>
EFFNET_INLINE void load_values(typename S::V (&x)[N], const void* values, int64_t c, int last,
                               float absent) {
  using F = typename S::Scalar;
  if (values == nullptr) {
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) x[v] = S::set(absent);
  } else {
    load_vectors<F, N>(x, static_cast<const F*>(values) + c, last);
  }
}

// The pair of sums at `sums` (of `padded` channels) += x.
template <class S, int N>
EFFNET_INLINE void add_to_pair(typename S::Scalar* sums, int64_t padded, int64_t c,
                               const typename S::V (&x)[N]) {
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) {
    auto* sum = sums + c + v * S::lanes;
    ExactSum<S> exact(S::load(sum), S::load(sum + padded));
    exact.add(x[v]);
    S::store(sum, exact.sum);
    S::store(sum + padded, exact.lost);
  }
}

// Calls body(offset, channel, pixels, last channels, Vectors<N>) for all runs and groups of an
// item: offset is that of the run's first pixel in the tensor.
template <class T, class Body>
EFFNET_INLINE void for_each_run(int64_t item, int channels, const PixelPlan& p, const Body& body) {
  constexpr int L = Simd<T>::lanes;
  const int64_t first = item % p.blocks * p.block_pixels;
  const int64_t fit = kRunBytes / (channels * static_cast<int64_t>(sizeof(T))) + 1;
  const int64_t run = fit < kRunPixels ? fit : kRunPixels;
  const int64_t left = p.pixels - first, end = left < p.block_pixels ? left : p.block_pixels;
  const int64_t begin = item / p.blocks * p.pixels + first;
  for (int64_t pixel = 0; pixel < end; pixel += run) {
    const int count = static_cast<int>(end - pixel < run ? end - pixel : run);
    const int64_t offset = (begin + pixel) * channels;
    int c = 0;
    for (; c + kGroup * L <= channels; c += kGroup * L) {
      body(offset, c, count, L, Vectors<kGroup>{});
    }
    for (; c < channels; c += L) body(offset, c, count, lesser(L, channels - c), Vectors<1>{});
  }
}

// ---- Statistics. ----

template <class T>
void statistics(const ChannelStatistics& a, const PixelPlan& p, int64_t begin, int64_t end,
                void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  const T* input = static_cast<const T*>(a.input);
  for (int64_t slot = begin; slot < end; ++slot) {
    F* sums = static_cast<F*>(partials) + slot * kStatisticsPartials * p.padded_channels;
    F* squares = sums + 2 * p.padded_channels;
    F* origin = sums + 4 * p.padded_channels;
    clear(sums, kStatisticsPartials * p.padded_channels);
    const int64_t item = p.first_item(slot);
    // The mean of a few pixels: deviations from it are small, and so are their sums.
    const int64_t pixel = item % p.blocks * p.block_pixels;
    const T* x = input + (item / p.blocks * p.pixels + pixel) * a.channels;
    const int few = lesser(kRunPixels, static_cast<int>(p.pixels - pixel));
    for (int i = 0; i < few; ++i, x += a.channels) {
      for (int c = 0; c < a.channels; ++c) origin[c] += to_float(x[c]);
    }
    for (int c = 0; c < a.channels; ++c) origin[c] /= few;
    for (int64_t i = item; i < p.first_item(slot + 1); ++i) {
      for_each_run<T>(i, a.channels, p,
                      [&](int64_t offset, int c, int count, int last, auto vectors) {
                        constexpr int N = decltype(vectors)::value;
                        V from[N], sum[N], square[N];
                        load_values<S, N>(from, origin, c, S::lanes, 0.f);
                        EFFNET_UNROLL
                        for (int v = 0; v < N; ++v) sum[v] = square[v] = S::set(0.f);
                        const T* x = input + offset + c;
                        for (int pixel = 0; pixel < count; ++pixel, x += a.channels) {
                          V value[N];
                          load_vectors<T, N>(value, x, last);
                          EFFNET_UNROLL
                          for (int v = 0; v < N; ++v) {
                            const V d = value[v] - from[v];
                            sum[v] = sum[v] + d;
                            square[v] = S::fma(d, d, square[v]);
                          }
                        }
                        add_to_pair<S, N>(sums, p.padded_channels, c, sum);
                        add_to_pair<S, N>(squares, p.padded_channels, c, square);
                      });
    }
  }
}

// Chan, Golub and LeVeque's merge of (count, mean, sum of squared deviations), slot after slot.
template <class T>
void merge_statistics(const ChannelStatistics& a, const PixelPlan& p, const void* partials) {
  using F = typename Simd<T>::Scalar;
  const auto pixels_of = [&](int64_t first, int64_t last) {
    // Items of an image are block_pixels long, but for the last.
    const auto before = [&](int64_t item) {
      return item / p.blocks * p.pixels + item % p.blocks * p.block_pixels;
    };
    return static_cast<double>(before(last) - before(first));
  };
  for (int c = 0; c < a.channels; ++c) {
    double count = 0, mean = 0, squares = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      const F* from =
          static_cast<const F*>(partials) + slot * kStatisticsPartials * p.padded_channels + c;
      const auto row = [&](int i) { return static_cast<double>(from[i * p.padded_channels]); };
      const double n = pixels_of(p.first_item(slot), p.first_item(slot + 1));
      const double sum = row(0) + row(1);
      const double slot_mean = row(4) + sum / n, slot_squares = row(2) + row(3) - sum * sum / n;
      const double total = count + n, delta = slot_mean - mean;
      mean += delta * (n / total);
      squares += slot_squares + delta * delta * (count * n / total);
      count = total;
    }
    static_cast<F*>(a.mean)[c] = static_cast<F>(mean);
    static_cast<F*>(a.var)[c] = static_cast<F>(squares > 0 ? squares / count : 0);
  }
}

// ---- Forward and backward. ----

template <class T>
void fold(const BatchNorm& bn, int channels, const FoldedBatchNorm& f) {
  using F = typename Simd<T>::Scalar;
  for (int c = 0; c < channels; ++c) {
    const FoldedChannel<F> folded(bn, c);
    static_cast<F*>(f.mean)[c] = folded.mean;
    static_cast<F*>(f.invstd)[c] = folded.invstd;
    static_cast<F*>(f.scale)[c] = folded.scale;
    static_cast<F*>(f.shift)[c] = folded.shift;
  }
}

template <class T>
void fold_gradients(const void* grad_bn_weight, const void* grad_bn_bias, int64_t elements,
                    int channels, const FoldedBatchNorm& f) {
  using F = typename Simd<T>::Scalar;
  for (int c = 0; c < channels; ++c) {
    double constant = 0, slope = 0;
    if (grad_bn_weight != nullptr) {
      const double each = -static_cast<double>(static_cast<const F*>(f.scale)[c]) / elements;
      constant = each * static_cast<const F*>(grad_bn_bias)[c];
      slope = each * static_cast<const F*>(f.invstd)[c] * static_cast<const F*>(grad_bn_weight)[c];
    }
    static_cast<F*>(f.constant)[c] = static_cast<F>(constant);
    static_cast<F*>(f.slope)[c] = static_cast<F>(slope);
  }
}

// The per-channel values of a group that every pass needs, for one image.
template <class S, int N>
struct AffineGroup {
  typename S::V scale[N], shift[N], gate[N];

  EFFNET_INLINE AffineGroup(const BatchNormAct& a, const FoldedBatchNorm& f, int64_t image, int c,
                            int last) {
    load_values<S, N>(scale, f.scale, c, last, 1.f);
    load_values<S, N>(shift, f.shift, c, last, 0.f);
    load_values<S, N>(gate, a.gate, image * a.channels + c, last, 1.f);
  }

  EFFNET_INLINE void apply(typename S::V (&x)[N]) const {
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) x[v] = S::fma(x[v], scale[v], shift[v]);
  }
};

template <class T>
void forward(const BatchNormActForward& a, const FoldedBatchNorm& f, const PixelPlan& p,
             int64_t begin, int64_t end, void* pooled) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  const T* input = static_cast<const T*>(a.input);
  const T* residual = static_cast<const T*>(a.residual);
  T* output = static_cast<T*>(a.output);
  for (int64_t item = begin; item < end; ++item) {
    F* sums = static_cast<F*>(pooled);
    if (sums != nullptr) {
      sums += item * kPair * p.padded_channels;
      clear(sums, kPair * p.padded_channels);
    }
    for_each_run<T>(
        item, a.channels, p, [&](int64_t offset, int c, int count, int last, auto vectors) {
          constexpr int N = decltype(vectors)::value;
          const AffineGroup<S, N> group(a, f, item / p.blocks, c, last);
          V sum[N];
          EFFNET_UNROLL
          for (int v = 0; v < N; ++v) sum[v] = S::set(0.f);
          for (int64_t at = offset + c, pixel = 0; pixel < count; ++pixel, at += a.channels) {
            V x[N];
            load_vectors<T, N>(x, input + at, last);
            group.apply(x);
            activate_tile<S>(a.activation, x);
            EFFNET_UNROLL
            for (int v = 0; v < N; ++v) sum[v] = sum[v] + x[v];
            if (output == nullptr) continue;
            EFFNET_UNROLL
            for (int v = 0; v < N; ++v) x[v] = x[v] * group.gate[v];
            if (residual != nullptr) {
              V added[N];
              load_vectors<T, N>(added, residual + at, last);
              EFFNET_UNROLL
              for (int v = 0; v < N; ++v) x[v] = x[v] + added[v];
            }
            store_vectors<T, N>(output + at, x, last);
          }
          if (sums != nullptr) add_to_pair<S, N>(sums, p.padded_channels, c, sum);
        });
  }
}

// The gradient with respect to u at a pixel, from the gradient of the output; x becomes du.
template <class S, int N>
struct GradientGroup : AffineGroup<S, N> {
  typename S::V pooled[N], center[N];
  Activation activation;

  EFFNET_INLINE GradientGroup(const BatchNormActGradient& a, const FoldedBatchNorm& f,
                              int64_t image, int c, int last)
      : AffineGroup<S, N>(a, f, image, c, last), activation(a.activation) {
    load_values<S, N>(pooled, a.grad_pooled, image * a.channels + c, last, 0.f);
    load_values<S, N>(center, f.mean, c, last, 0.f);
  }

  EFFNET_INLINE void differentiate(typename S::V (&x)[N], const typename S::V (&grad)[N]) const {
    this->apply(x);
    activate_grad_all<S, N>(activation, x);
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) x[v] = x[v] * S::fma(grad[v], this->gate[v], pooled[v]);
  }
};

template <class T>
void sums(const BatchNormActSums& a, const FoldedBatchNorm& f, const PixelPlan& p, int64_t begin,
          int64_t end, void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  const T* input = static_cast<const T*>(a.input);
  const T* grad_output = static_cast<const T*>(a.grad_output);
  for (int64_t slot = begin; slot < end; ++slot) {
    F* scale_sums = static_cast<F*>(partials) + slot * kSumsPartials * p.padded_channels;
    F* shift_sums = scale_sums + 2 * p.padded_channels;
    clear(scale_sums, kSumsPartials * p.padded_channels);
    for (int64_t item = p.first_item(slot); item < p.first_item(slot + 1); ++item) {
      for_each_run<T>(
          item, a.channels, p, [&](int64_t offset, int c, int count, int last, auto vectors) {
            constexpr int N = decltype(vectors)::value;
            const GradientGroup<S, N> group(a, f, item / p.blocks, c, last);
            V scale[N], shift[N];
            EFFNET_UNROLL
            for (int v = 0; v < N; ++v) scale[v] = shift[v] = S::set(0.f);
            for (int64_t at = offset + c, pixel = 0; pixel < count; ++pixel, at += a.channels) {
              V x[N], du[N], grad[N];
              load_vectors<T, N>(x, input + at, last);
              load_vectors<T, N>(grad, grad_output + at, last);
              EFFNET_UNROLL
              for (int v = 0; v < N; ++v) du[v] = x[v];
              group.differentiate(du, grad);
              EFFNET_UNROLL
              for (int v = 0; v < N; ++v) {
                shift[v] = shift[v] + du[v];
                scale[v] = S::fma(du[v], x[v] - group.center[v], scale[v]);
              }
            }
            add_to_pair<S, N>(scale_sums, p.padded_channels, c, scale);
            add_to_pair<S, N>(shift_sums, p.padded_channels, c, shift);
          });
    }
  }
}

template <class T>
void backward(const BatchNormActBackward& a, const FoldedBatchNorm& f, const PixelPlan& p,
              int64_t begin, int64_t end) {
  using S = Simd<T>;
  using V = typename S::V;
  const T* input = static_cast<const T*>(a.input);
  const T* grad_output = static_cast<const T*>(a.grad_output);
  T* grad_input = static_cast<T*>(a.grad_input);
  for (int64_t item = begin; item < end; ++item) {
    for_each_run<T>(
        item, a.channels, p, [&](int64_t offset, int c, int count, int last, auto vectors) {
          constexpr int N = decltype(vectors)::value;
          const GradientGroup<S, N> group(a, f, item / p.blocks, c, last);
          V constant[N], slope[N];
          load_values<S, N>(constant, f.constant, c, last, 0.f);
          load_values<S, N>(slope, f.slope, c, last, 0.f);
          for (int64_t at = offset + c, pixel = 0; pixel < count; ++pixel, at += a.channels) {
            V x[N], du[N], grad[N];
            load_vectors<T, N>(x, input + at, last);
            load_vectors<T, N>(grad, grad_output + at, last);
            if (!a.linear) {
              EFFNET_UNROLL
              for (int v = 0; v < N; ++v) du[v] = x[v];
              group.differentiate(du, grad);
              EFFNET_UNROLL
              for (int v = 0; v < N; ++v) grad[v] = du[v] * group.scale[v];
            }
            EFFNET_UNROLL
            for (int v = 0; v < N; ++v) {
              x[v] = S::fma(slope[v], x[v] - group.center[v], grad[v] + constant[v]);
            }
            store_vectors<T, N>(grad_input + at, x, last);
          }
        });
  }
}

template <class T>
void gate(const BatchNormActGate& a, const FoldedBatchNorm& f, const PixelPlan& p, int64_t begin,
          int64_t end, void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  const T* input = static_cast<const T*>(a.input);
  const T* grad_output = static_cast<const T*>(a.grad_output);
  T* gated = static_cast<T*>(a.gated);
  T* grad_gated = static_cast<T*>(a.grad_gated);
  for (int64_t item = begin; item < end; ++item) {
    F* sums = static_cast<F*>(partials) + item * kPair * p.padded_channels;
    clear(sums, kPair * p.padded_channels);
    for_each_run<T>(
        item, a.channels, p, [&](int64_t offset, int c, int count, int last, auto vectors) {
          constexpr int N = decltype(vectors)::value;
          const AffineGroup<S, N> group(a, f, item / p.blocks, c, last);
          V sum[N];
          EFFNET_UNROLL
          for (int v = 0; v < N; ++v) sum[v] = S::set(0.f);
          for (int64_t at = offset + c, pixel = 0; pixel < count; ++pixel, at += a.channels) {
            V x[N], grad[N];
            load_vectors<T, N>(x, input + at, last);
            load_vectors<T, N>(grad, grad_output + at, last);
            group.apply(x);
            activate_tile<S>(a.activation, x);
            EFFNET_UNROLL
            for (int v = 0; v < N; ++v) {
              sum[v] = S::fma(grad[v], x[v], sum[v]);
              x[v] = x[v] * group.gate[v];
              grad[v] = grad[v] * group.gate[v];
            }
            store_vectors<T, N>(gated + at, x, last);
            store_vectors<T, N>(grad_gated + at, grad, last);
          }
          add_to_pair<S, N>(sums, p.padded_channels, c, sum);
        });
  }
}

template <class T>
void merge(void* to, const void* partials, int64_t groups, int64_t size, int64_t rows,
           int64_t first, int channels, const void* factor, const PixelPlan& p) {
  using F = typename Simd<T>::Scalar;
  for (int64_t group = 0; group < groups; ++group) {
    for (int c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = group * size; i < (group + 1) * size; ++i) {
        const F* pair =
            static_cast<const F*>(partials) + (i * rows + first) * p.padded_channels + c;
        total += static_cast<double>(pair[0]) + static_cast<double>(pair[p.padded_channels]);
      }
      if (factor != nullptr) total *= static_cast<const F*>(factor)[c];
      static_cast<F*>(to)[group * channels + c] = static_cast<F>(total);
    }
  }
}

template <class T>
const BatchNormActKernels* kernels_of() {
  static constexpr BatchNormActKernels kernels = {
      Simd<T>::lanes, statistics<T>, merge_statistics<T>, fold<T>, fold_gradients<T>,
      forward<T>,     sums<T>,       backward<T>,         gate<T>, merge<T>};
  return &kernels;
}

}  // namespace

const BatchNormActKernels* batch_norm_act_kernels(Dtype dtype) {
  return for_dtype(dtype, [](auto element) { return kernels_of<decltype(element)>(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
