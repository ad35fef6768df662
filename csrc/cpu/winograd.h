// Convolutions of 3 x 3 pixels with stride 1 and many channels, by Winograd's F(2 x 2, 3 x 3)
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308):
//
//   y = A^T ((G g G^T) * (B^T d B)) A
//
//   windows d (4 x 4 pixels, C) --B--> (position, tile, C) --multiply_panel--> (position, tile,
//   panel of K) --A--> y (2 x 2 pixels, panel of K)          for each of 16 positions
//
// A tile is 2 x 2 results. It takes 16 products for each pair of channels where the sum over taps
// takes 36; B and A are additions, few next to the products where channels are many. A float32 sum
// over taps and channels becomes nine sums over channels that are added: its error is about the
// same.
//
// A NaN reaches the results whose windows have it and no others; so does an infinity, as a NaN.
#pragma once

#include "gemm.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kWindow = 4, kPositions = GemmFormat::kPositions;
static_assert(kPositions == kWindow * kWindow, "a product for each pixel of a window");
// A[kShifted] adds a position's product to each result of a tile: what those start with, its sum
// starts with.
constexpr int kShifted = 1 * kWindow + 1;

// Transforms are computed in the accumulate dtype and multiplied in it: rounded to bfloat16, their
// differences would have lost too much.
template <class T>
constexpr bool kTransforms = Products<T>::step == 1;

// The matrix of one position. Channels are whole vectors, so that all of a panel is written.
template <class T>
EFFNET_INLINE Matrix<T> winograd_matrix(void* memory, int channels, int in_channels, int position) {
  const int padded = static_cast<int>(kGemmFormat<T>.padded(channels));
  return {static_cast<char*>(memory) + position * kGemmFormat<T>.matrix_bytes(padded, in_channels),
          padded, in_channels};
}

// G of three values.
template <class S>
EFFNET_INLINE void transform_taps(typename S::V (&to)[kWindow], typename S::V g0, typename S::V g1,
                                  typename S::V g2) {
  const auto half = S::set(.5f), outer = half * (g0 + g2), middle = half * g1;
  to[0] = g0;
  to[1] = outer + middle;
  to[2] = outer - middle;
  to[3] = g2;
}

// Panels [begin, end) of G g G^T for weight (K, 3, 3, C) with its BN.
template <class T>
void pack_winograd(void* memory, const T* weight, const BatchNorm& bn, int channels,
                   int in_channels, int64_t begin, int64_t end) {
  using S = Simd<T>;
  using V = typename S::V;
  using F = typename S::Scalar;
  constexpr int L = S::lanes, Taps = 3;
  const Matrix<T> shifted = winograd_matrix<T>(memory, channels, in_channels, kShifted);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int width = panel_vectors<S>(panel, shifted.panels, shifted.channels) * L;
    for (int v = 0; v < width; v += L) {
      const int64_t k = panel * kPanel<S> + v;
      const int rows = static_cast<int>(lesser(channels - k, int64_t{L}));
      fold_channels(shifted, bn, k, rows);
      const V scale = S::load(shifted.scale + k);
      F* to[kPositions];
      for (int position = 0; position < kPositions; ++position) {
        const Matrix<T> m = winograd_matrix<T>(memory, channels, in_channels, position);
        to[position] = const_cast<F*>(m.values) + m.offset(panel) + v;
        if (position != kShifted) S::store(const_cast<F*>(m.start) + k, S::set(0.f));
      }
      for (int c = 0; c < in_channels; c += L) {
        const T* from = weight + k * Taps * Taps * in_channels + c;
        V g[Taps * Taps][L];
        for (int tap = 0; tap < Taps * Taps; ++tap, from += in_channels) {
          load_square(g[tap], from, int64_t{Taps} * Taps * in_channels, rows, in_channels - c);
        }
        const int values = lesser(in_channels - c, L);
        for (int i = 0; i < values; ++i) {
          V down[Taps][kWindow];
          EFFNET_UNROLL
          for (int x = 0; x < Taps; ++x) {
            transform_taps<S>(down[x], g[x][i] * scale, g[Taps + x][i] * scale,
                              g[2 * Taps + x][i] * scale);
          }
          EFFNET_UNROLL
          for (int y = 0; y < kWindow; ++y) {
            V across[kWindow];
            transform_taps<S>(across, down[0][y], down[1][y], down[2][y]);
            EFFNET_UNROLL
            for (int x = 0; x < kWindow; ++x) {
              S::store(to[y * kWindow + x] + int64_t{c + i} * width, across[x]);
            }
          }
        }
      }
    }
  }
}

// B^T d B of a row of tiles: to + (position * tiles + tile) * pixel. d begins at `from`, its rows
// are `row` values apart and its pixels `pixel`, whole vectors.
template <class S>
void transform_windows(const typename S::Scalar* from, int64_t row, int pixel, int columns,
                       int64_t tiles, typename S::Scalar* to) {
  using V = typename S::V;
  for (int c = 0; c < pixel; c += S::lanes) {
    const auto* d = from + c;
    auto* tile = to + c;
    // B^T d, a column at a time; two of them are the next tile's, too.
    V column[kWindow][kWindow];
    const auto load = [&](V(&x)[kWindow]) {
      const V d0 = S::load(d), d1 = S::load(d + row), d2 = S::load(d + 2 * row),
              d3 = S::load(d + 3 * row);
      x[0] = d0 - d2;
      x[1] = d1 + d2;
      x[2] = d2 - d1;
      x[3] = d1 - d3;
      d += pixel;
    };
    load(column[2]);
    load(column[3]);
    for (int x = 0; x < columns; ++x, tile += pixel) {
      EFFNET_UNROLL
      for (int i = 0; i < kWindow; ++i) {
        column[0][i] = column[2][i];
        column[1][i] = column[3][i];
      }
      load(column[2]);
      load(column[3]);
      EFFNET_UNROLL
      for (int i = 0; i < kWindow; ++i) {
        auto* at = tile + i * kWindow * tiles * pixel;
        S::store(at, column[0][i] - column[2][i]);
        S::store(at + tiles * pixel, column[1][i] + column[2][i]);
        S::store(at + 2 * tiles * pixel, column[2][i] - column[1][i]);
        S::store(at + 3 * tiles * pixel, column[1][i] - column[3][i]);
      }
    }
  }
}

// What becomes of the results of a panel whose channels begin at `channel`: A^T m A to `out`, which
// belongs to that channel and to the first of `rows` x `columns` pixels. m: products + (position *
// tiles + tile) * width.
template <class S, class To>
void transform_products(const typename S::Scalar* products, int64_t tiles, int width, int rows,
                        int columns, int channels, const GemmOutput<To>& out) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  const int64_t plane = tiles * width;
  for (int v = 0; v * L < channels; ++v) {
    const int n = channels - v * L;
    ExactSum<S> sums;
    if (out.sums != nullptr) {
      sums = ExactSum<S>(S::load(out.sums + v * L), S::load(out.lost + v * L));
    }
    const auto* from = products + v * L;
    for (int y = 0; y < rows; y += 2) {
      for (int x = 0; x < columns; x += 2, from += width) {
        V a[2][kWindow], result[4];
        EFFNET_UNROLL
        for (int j = 0; j < kWindow; ++j) {
          const auto* m = from + j * plane;
          const V m1 = S::load(m + kWindow * plane), m2 = S::load(m + 2 * kWindow * plane);
          a[0][j] = S::load(m) + m1 + m2;
          a[1][j] = m1 - m2 - S::load(m + 3 * kWindow * plane);
        }
        EFFNET_UNROLL
        for (int i = 0; i < 2; ++i) {
          result[2 * i] = a[i][0] + a[i][1] + a[i][2];
          result[2 * i + 1] = a[i][1] - a[i][2] - a[i][3];
        }
        activate_tile<S>(out.activation, result);
        const int64_t pixel = (int64_t{y} * columns + x) * out.stride + v * L;
        const int high = lesser(rows - y, 2), wide = lesser(columns - x, 2);
        EFFNET_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i / 2 >= high || i % 2 >= wide) continue;
          const int64_t offset = pixel + (i / 2 * int64_t{columns} + i % 2) * out.stride;
          store_result<S>(out, offset, n, result[i]);
          if (out.sums != nullptr) sums.add(result[i]);
        }
      }
    }
    if (out.sums != nullptr) {
      S::store(out.sums + v * L, sums.sum);
      S::store(out.lost + v * L, sums.lost);
    }
  }
}

}  // namespace
}  // namespace EFFNET_ISA
}  // namespace effnet
