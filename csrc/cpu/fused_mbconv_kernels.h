// The kernels of the Fused-MBConv block, compiled once for each instruction set.
//
//   input (rows under a band) --convert_rows, zeros--> windows --multiply_panel--> expanded (pixels
//   of the band, M) --multiply_rows--> + residual --> output (pixels of the band, K)
//
// or, in the place of windows and multiply_panel, what winograd.h does.
//
// A band's part of the expanded tensor is made from L2 and used from there.
#pragma once

#include "fused_mbconv.h"
#include "gemm.h"
#include "winograd.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <class T>
void pack_expand(const FusedMbconv& a, const FusedMbconvPlan& p, const FusedMbconvWeights& w,
                 int64_t begin, int64_t end) {
  const ConvShape& s = a.shape;
  const T* weight = static_cast<const T*>(a.expand_weight);
  if constexpr (kTransforms<T>) {
    if (p.winograd) {
      pack_winograd(w.expand, weight, a.expand_bn, s.channels, a.in_channels, begin, end);
      return;
    }
  }
  pack_panels(w.expand, weight, a.expand_bn, s.channels, s.kernel * s.kernel, a.in_channels, begin,
              end);
}

template <class T>
void pack(const FusedMbconv& a, const FusedMbconvPlan& p, const FusedMbconvWeights& w,
          int64_t begin, int64_t end) {
  const int64_t first = p.expand_panels;
  if (begin < first) {
    pack_expand<T>(a, p, w, begin, lesser(end, first));
  }
  if (end > first) {
    pack_panels(w.project, static_cast<const T*>(a.project_weight), a.project_bn, a.out_channels, 1,
                a.shape.channels, greater(begin, first) - first, end - first);
  }
}

// Rows [row, row + rows) of the image's part of the band, zeros where there is no image.
template <class T>
void load_band(const FusedMbconv& a, const FusedMbconvPlan& p, const T* image, int row, int rows,
               typename Products<T>::Value* to) {
  const ConvShape& s = a.shape;
  const int columns = lesser(s.in_w, p.in_columns - s.pad_left);
  const int64_t left = int64_t{s.pad_left} * p.pixel, inside = int64_t{columns} * p.pixel;
  for (int i = 0; i < rows; ++i, to += p.row()) {
    if (row + i < 0 || row + i >= s.in_h) {
      clear(to, p.row());
      continue;
    }
    clear(to, left);
    convert_rows(to + left, p.pixel, image + (int64_t{row} + i) * s.in_w * a.in_channels, columns,
                 a.in_channels, nullptr, nullptr, Activation::identity, nullptr);
    clear(to + left + inside, p.row() - left - inside);
  }
}

// The convolution of a band by transforms.
template <class T, class To>
void convolve_tiles(const FusedMbconv& a, const FusedMbconvPlan& p, void* weight,
                    const FusedMbconvScratch& scratch, int rows, const GemmOutput<To>& out) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const ConvShape& s = a.shape;
  const int columns = (s.out_w + 1) / 2, tile_rows = (rows + 1) / 2;
  const int64_t tiles = int64_t{tile_rows} * columns;
  const F* band = static_cast<const F*>(scratch.input);
  F* windows = static_cast<F*>(scratch.windows);
  F* products = static_cast<F*>(scratch.products);
  for (int row = 0; row < tile_rows; ++row) {
    transform_windows<S>(band + 2 * row * p.row(), p.row(), p.pixel, columns, tiles,
                         windows + int64_t{row} * columns * p.pixel);
  }
  for (int64_t panel = 0; panel < p.expand_panels; ++panel) {
    const int64_t k = panel * kPanel<S>;
    const int width = panel_vectors<S>(panel, p.expand_panels, s.channels) * S::lanes;
    for (int i = 0; i < kPositions; ++i) {
      GemmOutput<F> product{};
      product.to = products + i * tiles * width - k;
      product.stride = width;
      multiply_panel(Rows<T>(windows + i * tiles * p.pixel, p.pixel), static_cast<int>(tiles),
                     winograd_matrix<T>(weight, s.channels, a.in_channels, i), panel, product);
    }
    transform_products<S>(products, tiles, width, rows, s.out_w,
                          lesser(int64_t{s.channels} - k, int64_t{width}), out.from_channel(k));
  }
}

// The convolution of a band, times all of its matrix.
template <class T, class To>
void convolve_band(const FusedMbconv& a, const FusedMbconvPlan& p, void* weight,
                   const FusedMbconvScratch& scratch, int rows, const GemmOutput<To>& out) {
  const ConvShape& s = a.shape;
  if constexpr (kTransforms<T>) {
    if (p.winograd) return convolve_tiles<T>(a, p, weight, scratch, rows, out);
  }
  const Matrix<T> matrix(weight, s.channels, s.kernel * s.kernel * p.pixel);
  const auto* band = static_cast<const typename Products<T>::Value*>(scratch.input);
  for (int64_t panel = 0; panel < p.expand_panels; ++panel) {
    GemmOutput<To> to = out;
    for (int row = 0; row < rows; ++row, to.to += s.out_w * to.stride) {
      const Rows<T> windows(band + int64_t{row} * s.stride * p.row(), p.row(), p.pixel, s.kernel,
                            s.stride);
      multiply_panel(windows, s.out_w, matrix, panel, to);
      if (to.residual != nullptr) to.residual += s.out_w * to.stride;
    }
  }
}

template <class T>
void run(const FusedMbconv& a, const FusedMbconvPlan& p, const FusedMbconvWeights& w, int64_t begin,
         int64_t end, const FusedMbconvScratch& scratch, void* sums) {
  using F = typename Simd<T>::Scalar;
  using Value = typename Products<T>::Value;
  const ConvShape& s = a.shape;
  Value* z = static_cast<Value*>(scratch.expanded);
  // A pair of channels may end beyond the last one.
  if (p.expanded > s.channels) clear(z, int64_t{p.band_rows} * s.out_w * p.expanded);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / p.bands;
    const int first = static_cast<int>(item % p.bands) * p.band_rows;
    const int rows = lesser(p.band_rows, s.out_h - first);
    const T* image = static_cast<const T*>(a.input) + n * s.in_h * s.in_w * a.in_channels;
    const int results = p.winograd ? round_up(rows, 2) : rows;
    load_band(a, p, image, first * s.stride - s.pad_top, (results - 1) * s.stride + s.kernel,
              static_cast<Value*>(scratch.input));
    const int64_t offset = (n * s.out_h + first) * s.out_w * a.out_channels;
    GemmOutput<T> out{};
    out.to = static_cast<T*>(a.output) + offset;
    out.stride = a.out_channels;
    out.residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + offset;
    if (a.project_weight == nullptr) {
      out.activation = a.expand_activation;
      if (sums != nullptr) {
        out.sums = static_cast<F*>(sums) + item * 2 * p.padded_channels;
        out.lost = out.sums + p.padded_channels;
        clear(out.sums, 2 * p.padded_channels);
      }
      convolve_band<T>(a, p, w.expand, scratch, rows, out);
      continue;
    }
    GemmOutput<Value> wide{};
    wide.to = z;
    wide.stride = p.expanded;
    wide.activation = a.expand_activation;
    convolve_band<T>(a, p, w.expand, scratch, rows, wide);
    out.activation = a.project_activation;
    const Matrix<T> project(w.project, a.out_channels, s.channels);
    multiply_rows(Rows<T>(z, p.expanded), rows * s.out_w, project, 0, p.project_panels, out);
  }
}

template <class T>
void merge(const FusedMbconv& a, const FusedMbconvPlan& p, const void* sums) {
  using F = typename Simd<T>::Scalar;
  merge_sums(static_cast<const F*>(sums), a.shape.batch, p.bands, a.shape.channels,
             p.padded_channels, static_cast<F*>(a.pooled));
}

template <class T>
const FusedMbconvKernels* kernels_of() {
  static constexpr FusedMbconvKernels kernels = {kGemmFormat<T>, pack<T>, run<T>, merge<T>};
  return &kernels;
}

}  // namespace

const FusedMbconvKernels* fused_mbconv_kernels(Dtype dtype) {
  return for_dtype(dtype, [](auto element) { return kernels_of<decltype(element)>(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
