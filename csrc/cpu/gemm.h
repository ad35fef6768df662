// Products of many rows with a matrix that fits a cache, for the 1x1 convolutions on the CPU.
//
//   out[m, k] = activation(start[k] + sum over c of rows[m, c] * matrix[k, c]) (+ residual[m, k])
//
// The matrix is packed once into panels of two vectors of output channels, [panel][c][channel],
// with BN's scale multiplied in; BN's shift is what the sums start with. Of an odd number of
// vectors the last panel has three (or the only one). A tile of rows x one panel is kept in
// registers: each step along c loads the panel's vectors once and meets them with one broadcast
// value of every row. Rows are read where they lie, in float32.
#pragma once

#include "depthwise_loops.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// Output channels of a panel but the last.
template <class S>
constexpr int kPanel = 2 * S::lanes;
// Rows of a tile of N vectors: what registers hold beside the panel's and a broadcast value. With
// one vector more rows would only wait for its loads.
template <class S, int N>
constexpr int kTileRows = N == 1 ? kTileRows<S, 2> : (S::registers - N - 1) / N;
// Channels that are summed one after the other before they are added to the rest: the error of a
// long sum grows with its length.
constexpr int kDepthBlock = 64;

// Vectors of the last of `panels` panels of a matrix with `channels` rows, or of any other.
template <class S>
EFFNET_INLINE int panel_vectors(int64_t panel, int64_t panels, int channels) {
  const int vectors = (channels + S::lanes - 1) / S::lanes;
  return panel == panels - 1 ? static_cast<int>(vectors - 2 * panel) : 2;
}

// Panels [begin, end) of `panels` of weight (K, C), each row times its channel's BN scale, and what
// their sums start with. Channels beyond the last are zeros.
template <class T>
void pack_panels(typename Simd<T>::Scalar* packed, typename Simd<T>::Scalar* start, const T* weight,
                 const BatchNorm& bn, int channels, int depth, int64_t panels, int64_t begin,
                 int64_t end) {
  using F = typename Simd<T>::Scalar;
  constexpr int P = kPanel<Simd<T>>, L = Simd<T>::lanes;
  for (int64_t panel = begin; panel < end; ++panel) {
    F* to = packed + panel * depth * P;
    const int64_t first = panel * P;
    const int width = panel_vectors<Simd<T>>(panel, panels, channels) * L;
    for (int i = 0; i < width; ++i) {
      const int64_t k = first + i;
      if (k >= channels) {
        for (int c = 0; c < depth; ++c) to[int64_t{c} * width + i] = F(0);
        start[k] = F(0);
        continue;
      }
      const double inverse = 1 / std::sqrt(channel_value<F>(bn.var, k, F(1)) + bn.eps);
      const F scale = static_cast<F>(channel_value<F>(bn.weight, k, F(1)) * inverse);
      start[k] = static_cast<F>(channel_value<F>(bn.bias, k, F(0)) -
                                static_cast<double>(channel_value<F>(bn.mean, k, F(0))) * scale);
      const T* from = weight + k * depth;
      for (int c = 0; c < depth; ++c) to[int64_t{c} * width + i] = to_float(from[c]) * scale;
    }
  }
}

// The results of a product: row m at to + m * stride, and what is done to them on the way.
template <class T>
struct GemmOutput {
  using F = typename Simd<T>::Scalar;
  T* to;
  int64_t stride;
  const T* residual;  // laid out as `to`, or null
  Activation activation;
  // Sums over rows [channel] and what rounding took from them, or null. Added to.
  F* sums;
  F* lost;
};

// Rows [0, Rows) times one panel of `columns` channels, to `out`.
template <class T, int N, int Rows>
void multiply_tile(const typename Simd<T>::Scalar* rows, int64_t stride,
                   const typename Simd<T>::Scalar* panel, const typename Simd<T>::Scalar* start,
                   int depth, int columns, const GemmOutput<T>& out) {
  using S = Simd<T>;
  using V = typename S::V;
  using F = typename S::Scalar;
  constexpr int L = S::lanes;
  V sum[Rows * N];
  F before[Rows * N * L];
  for (int c = 0; c < depth; c += kDepthBlock) {
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) {
      const V first = c == 0 ? S::load(start + v * L) : S::set(0.f);
      EFFNET_UNROLL
      for (int r = 0; r < Rows; ++r) sum[r * N + v] = first;
    }
    const int end = lesser(c + kDepthBlock, depth);
    for (int i = c; i < end; ++i) {
      V b[N];
      EFFNET_UNROLL
      for (int v = 0; v < N; ++v) b[v] = S::load_once(panel + int64_t{i} * (N * L) + v * L);
      EFFNET_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const V a = S::set(rows[r * stride + i]);
        EFFNET_UNROLL
        for (int v = 0; v < N; ++v) S::accumulate(sum[r * N + v], a, b[v]);
      }
    }
    if (c > 0) {
      EFFNET_UNROLL
      for (int i = 0; i < Rows * N; ++i) sum[i] = sum[i] + S::load(before + i * L);
    }
    if (end < depth) {
      EFFNET_UNROLL
      for (int i = 0; i < Rows * N; ++i) S::store(before + i * L, sum[i]);
    }
  }
  activate_tile<S>(out.activation, sum);
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) {
    const int n = columns - v * L;
    if (n <= 0) break;
    T* to = out.to + v * L;
    const T* residual = out.residual + v * L;
    if (n >= L) {
      EFFNET_UNROLL
      for (int r = 0; r < Rows; ++r) {
        V& x = sum[r * N + v];
        if (out.residual != nullptr) x = x + S::load(residual + r * out.stride);
        S::store(to + r * out.stride, x);
      }
    } else {
      EFFNET_UNROLL
      for (int r = 0; r < Rows; ++r) {
        V& x = sum[r * N + v];
        if (out.residual != nullptr) x = x + S::load_partial(residual + r * out.stride, n);
        S::store_partial(to + r * out.stride, x, n);
      }
    }
    if (out.sums != nullptr) {
      V total = sum[v];
      EFFNET_UNROLL
      for (int r = 1; r < Rows; ++r) total = total + sum[r * N + v];
      ExactSum<S> exact(S::load(out.sums + v * L), S::load(out.lost + v * L));
      exact.add(total);
      S::store(out.sums + v * L, exact.sum);
      S::store(out.lost + v * L, exact.lost);
    }
  }
}

template <class T>
using MultiplyTile = void (*)(const typename Simd<T>::Scalar*, int64_t,
                              const typename Simd<T>::Scalar*, const typename Simd<T>::Scalar*, int,
                              int, const GemmOutput<T>&);

template <class T, int N, int... Rows>
EFFNET_INLINE MultiplyTile<T> multiply_tile_of(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr MultiplyTile<T> tiles[] = {multiply_tile<T, N, Rows + 1>...};
  return tiles[rows - 1];
}

// `count` rows times one panel. Rows are divided evenly: a tile of one row would wait for its own
// sums.
template <class T, int N>
void multiply_panel(const typename Simd<T>::Scalar* rows, int64_t stride, int count,
                    const typename Simd<T>::Scalar* panel, const typename Simd<T>::Scalar* start,
                    int depth, int columns, GemmOutput<T> out) {
  constexpr int Most = kTileRows<Simd<T>, N>;
  constexpr std::make_integer_sequence<int, Most> sizes{};
  const int tiles = (count + Most - 1) / Most, least = count / tiles, longer = count % tiles;
  for (int tile = 0; tile < tiles; ++tile) {
    const int size = least + (tile < longer ? 1 : 0);
    multiply_tile_of<T, N>(size, sizes)(rows, stride, panel, start, depth, columns, out);
    rows += size * stride;
    out.to += size * out.stride;
    if (out.residual != nullptr) out.residual += size * out.stride;
  }
}

// `count` rows times panels [begin, end) of the `panels` of a matrix of `channels` rows. out.to and
// the rest of `out` belong to channel 0.
template <class T>
void multiply_rows(const typename Simd<T>::Scalar* rows, int64_t stride, int count,
                   const typename Simd<T>::Scalar* packed, const typename Simd<T>::Scalar* start,
                   int depth, int channels, int64_t panels, int64_t begin, int64_t end,
                   const GemmOutput<T>& out) {
  using S = Simd<T>;
  constexpr int P = kPanel<S>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t k = panel * P;
    GemmOutput<T> to = out;
    to.to += k;
    if (to.residual != nullptr) to.residual += k;
    if (to.sums != nullptr) {
      to.sums += k;
      to.lost += k;
    }
    const auto* matrix = packed + panel * depth * P;
    const int columns = static_cast<int>(channels - k);
    switch (panel_vectors<S>(panel, panels, channels)) {
      case 1:
        multiply_panel<T, 1>(rows, stride, count, matrix, start + k, depth, columns, to);
        break;
      case 2:
        multiply_panel<T, 2>(rows, stride, count, matrix, start + k, depth, columns, to);
        break;
      default:
        multiply_panel<T, 3>(rows, stride, count, matrix, start + k, depth, columns, to);
    }
  }
}

// x as the products read it: float32 rows of `channels` values, `stride` apart, through the
// prologue (scale null: none) and times `gate` (null: none); up to `stride` filled with zeros.
template <class T>
void widen_rows(typename Simd<T>::Scalar* to, int64_t stride, const T* from, int64_t rows,
                int channels, const typename Simd<T>::Scalar* scale,
                const typename Simd<T>::Scalar* shift, Activation activation,
                const typename Simd<T>::Scalar* gate) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int L = S::lanes;
  for (int64_t row = 0; row < rows; ++row, from += channels, to += stride) {
    for (int c = 0; c < stride; c += L) {
      const int n = lesser(channels - c, L);
      if (n == L) {
        V x[1] = {S::load(from + c)};
        if (scale != nullptr) {
          x[0] = S::fma(x[0], S::load(scale + c), S::load(shift + c));
          activate_tile<S>(activation, x);
        }
        if (gate != nullptr) x[0] = x[0] * S::load(gate + c);
        S::store(to + c, x[0]);
        continue;
      }
      typename S::Scalar lanes[L];
      V x[1] = {n > 0 ? S::load_partial(from + c, n) : S::set(0.f)};
      if (n > 0 && scale != nullptr) {
        x[0] = S::fma(x[0], S::load_partial(scale + c, n), S::load_partial(shift + c, n));
        activate_tile<S>(activation, x);
      }
      if (n > 0 && gate != nullptr) x[0] = x[0] * S::load_partial(gate + c, n);
      S::store(lanes, x[0]);
      for (int i = 0; i < L && c + i < stride; ++i) to[c + i] = i < n ? lanes[i] : 0;
    }
  }
}

}  // namespace
}  // namespace EFFNET_ISA
}  // namespace effnet
