// The kernels of the MBConv block, compiled once for each instruction set.
//
//   input (H W, Cin) --multiply_rows--> ring of rows (W, block of C) --correlate--> depthwise
//   (OH OW, C), pooled (C)                             for each block of channels
//   depthwise * gate --multiply_rows--> + input --> output (OH OW, K)
//
// A block of the expanded tensor lives for a few rows, in L1 and L2; the depthwise result of one
// image is kept in the cache until it is projected.
#pragma once

#include "gemm.h"
#include "mbconv.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <class T>
void pack_block(const MbconvInference& a, const MbconvPlan& p, const MbconvWeights& w,
                int64_t begin, int64_t end, void* memory) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const ConvShape& s = a.shape;
  const int taps = s.kernel * s.kernel;
  Scratch<F> scratch(memory);
  PackedBatchNorm<F> bn(scratch, p.depthwise);
  for (int64_t block = begin; block < end; ++block) {
    const Block b = block_at(s, p.depthwise, static_cast<int>(block));
    bn.start_block(a.bn, p.depthwise, b);
    pack_weight(static_cast<F*>(w.depthwise) + b.channel * taps, static_cast<const T*>(a.weight),
                bn.scale, taps, p.depthwise, b);
    F* start = static_cast<F*>(w.depthwise_start) + b.channel;
    for (int64_t i = 0; i < int64_t{b.vectors} * S::lanes; ++i) start[i] = bn.shift[i];
    if (a.expand_weight == nullptr) continue;
    const int64_t first = b.channel / kPanel<S>;
    const int64_t last = block == p.depthwise.blocks - 1 ? p.expand_panels
                                                         : first + b.vectors * S::lanes / kPanel<S>;
    pack_panels(w.expand, static_cast<const T*>(a.expand_weight), a.expand_bn, s.channels, 1,
                a.in_channels, first, last);
  }
}

template <class T>
void pack_project(const MbconvInference& a, const MbconvWeights& w, int64_t begin, int64_t end) {
  pack_panels(w.project, static_cast<const T*>(a.project_weight), a.project_bn, a.out_channels, 1,
              a.shape.channels, begin, end);
}

template <class To, class T>
void convert_pixels(const MbconvInference& a, const MbconvPlan& p, const T* from, int64_t begin,
                    int64_t end, void* to) {
  convert_rows(static_cast<To*>(to) + begin * p.input_stride, p.input_stride,
               from + begin * a.in_channels, end - begin, a.in_channels, nullptr, nullptr,
               Activation::identity, nullptr);
}

template <class T>
void convert(const MbconvInference& a, const MbconvPlan& p, int64_t begin, int64_t end, void* to) {
  const T* from = static_cast<const T*>(a.input);
  if (a.expand_weight == nullptr) {
    convert_pixels<typename Simd<T>::Scalar>(a, p, from, begin, end, to);
  } else {
    convert_pixels<typename Products<T>::Value>(a, p, from, begin, end, to);
  }
}

// A block's results of the depthwise convolution -> activation -> depthwise image, pooled sums.
template <class T>
struct BlockSink {
  using S = Simd<T>;
  Activation activation;
  RowSums<S>* sums;  // or null
  OutputRow<T> row;

  template <int Tile>
  EFFNET_INLINE void take(typename S::V (&sum)[Tile], int x, int v) const {
    activate_tile<S>(activation, sum);
    row.store(sum, x, v);
    if (sums != nullptr) sums->add(v, sum_of_tile<S>(sum, x, row.count));
  }
};

template <class T>
size_t ring_bytes(const MbconvInference& a, const MbconvPlan& p) {
  using F = typename Simd<T>::Scalar;
  const int64_t block = int64_t{p.depthwise.block_vectors()} * p.depthwise.lanes;
  const int64_t ring = a.expand_weight == nullptr ? 0 : p.ring_rows * a.shape.in_w * block;
  return (ring + 2 * block + 4 * 64 / sizeof(F)) * sizeof(F);
}

template <class T>
void expand_depthwise(const MbconvInference& a, const MbconvPlan& p, const MbconvWeights& w,
                      const void* input, int64_t begin, int64_t end, void* memory, void* depthwise,
                      void* sums_of_bands) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using Value = typename Products<T>::Value;
  constexpr int L = S::lanes;
  const ConvShape& s = a.shape;
  const int taps = s.kernel * s.kernel;
  const bool expands = a.expand_weight != nullptr;
  const F* x = static_cast<const F*>(input);
  const Matrix<T> expand(w.expand, s.channels, a.in_channels);
  Scratch<F> scratch(memory);
  RowSums<S> sums(scratch, p.depthwise);
  F* ring = scratch.take(0);
  const auto correlate = correlate_for<F, BlockSink<T>>(s, p.depthwise.tile);
  const Unit image{0, 0, s.out_h, 0, s.out_w, 0, s.in_h, 0, s.in_w};
  const int64_t blocks = p.depthwise.blocks;
  int next = 0;  // the first row that is not in the ring
  int64_t last_item = -1;
  // Block after block: where a band follows the one above it, the ring has what it begins with.
  for (int64_t i = 0; i < blocks * p.bands; ++i) {
    const int64_t block = i / p.bands, band = i % p.bands, item = band * blocks + block;
    if (item < begin || item >= end) continue;
    const int first_row = static_cast<int>(band) * p.band_rows;
    const int last_row = lesser(first_row + p.band_rows, s.out_h);
    if (band == 0 || last_item != item - blocks) {
      next = greater(first_row * s.stride - s.pad_top, 0) / p.group_rows * p.group_rows;
    }
    last_item = item;
    const Block b = block_at(s, p.depthwise, static_cast<int>(block));
    const int width = b.vectors * L;
    const int64_t first = b.channel / kPanel<S>;
    const int64_t last = block == blocks - 1 ? p.expand_panels : first + width / kPanel<S>;
    Window<Simd<F>> window;
    window.pitch = L;
    window.step = expands ? width : p.input_stride;
    window.origin = -s.pad_left;
    window.width = s.in_w;
    window.ahead[0] = window.ahead[1] = nullptr;
    BlockSink<T> sink{a.activation, sums_of_bands == nullptr ? nullptr : &sums,
                      OutputRow<T>(s, p.depthwise, b, image)};
    sums.clear(b.vectors);
    for (int oh = first_row; oh < last_row; ++oh) {
      const int top = oh * s.stride - s.pad_top;
      window.lo = greater(-top, 0);
      window.hi = lesser(s.kernel, s.in_h - top);
      while (expands && next < top + window.hi) {
        const int rows = lesser(p.group_rows, s.in_h - next);
        GemmOutput<F> out{};
        out.to = ring + int64_t{next % p.ring_rows} * s.in_w * width - b.channel;
        out.stride = width;
        out.activation = a.expand_activation;
        const Rows<T> pixels(
            static_cast<const Value*>(input) + int64_t{next} * s.in_w * p.input_stride,
            p.input_stride);
        multiply_rows(pixels, rows * s.in_w, expand, first, last, out);
        next += rows;
      }
      for (int i = window.lo; i < window.hi; ++i) {
        const int64_t row = top + i;
        window.rows[i] = expands ? ring + row % p.ring_rows * s.in_w * width
                                 : x + row * s.in_w * p.input_stride + b.channel;
      }
      sink.row.start(depthwise, s, b, image, oh);
      correlate(window, static_cast<const F*>(w.depthwise) + b.channel * taps,
                static_cast<const F*>(w.depthwise_start) + b.channel, s.out_w, b.vectors, sink);
    }
    if (sums_of_bands == nullptr) continue;
    F* to = static_cast<F*>(sums_of_bands) + band * 2 * p.padded_channels() + b.channel;
    for (int64_t c = 0; c < width; ++c) {
      to[c] = sums.data()[c];
      to[p.padded_channels() + c] = sums.lost()[c];
    }
  }
}

template <class F>
void merge(const MbconvInference& a, const MbconvPlan& p, const void* sums, void* pooled) {
  merge_sums(static_cast<const F*>(sums), 1, p.bands, a.shape.channels, p.padded_channels(),
             static_cast<F*>(pooled));
}

template <class F>
void gate_panels(const MbconvInference& a, const MbconvWeights& w, const void* gate, int64_t begin,
                 int64_t end, void* to) {
  using S = Simd<F>;
  const Matrix<F> matrix(w.project, a.out_channels, a.shape.channels);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int vectors = panel_vectors<S>(panel, matrix.panels, a.out_channels);
    const F* from = matrix.values + matrix.offset(panel);
    F* gated = static_cast<F*>(to) + matrix.offset(panel);
    for (int c = 0; c < matrix.depth; ++c) {
      const auto factor = S::set(static_cast<const F*>(gate)[c]);
      for (int v = 0; v < vectors; ++v, from += S::lanes, gated += S::lanes) {
        S::store(gated, S::load(from) * factor);
      }
    }
  }
}

template <class T>
void project(const MbconvInference& a, const MbconvWeights& w, const void* gated,
             const void* depthwise, const void* gate, int64_t row, int64_t rows, int64_t begin,
             int64_t end, void* scratch) {
  using F = typename Simd<T>::Scalar;
  using Value = typename Products<T>::Value;
  Matrix<T> matrix(w.project, a.out_channels, a.shape.channels);
  if (gated != nullptr) matrix.values = static_cast<const Value*>(gated);
  const int c = a.shape.channels;
  const T* input = static_cast<const T*>(depthwise) + row * c;
  const Value* from = static_cast<const Value*>(scratch);
  if (gate == nullptr && kGemmFormat<T>.takes(sizeof(T), c)) {
    from = reinterpret_cast<const Value*>(input);
  } else {
    convert_rows(static_cast<Value*>(scratch), matrix.depth, input, rows, c, nullptr, nullptr,
                 Activation::identity, static_cast<const F*>(gate));
  }
  const int64_t offset = row * a.out_channels;
  GemmOutput<T> out{};
  out.to = static_cast<T*>(a.output) + offset;
  out.stride = a.out_channels;
  out.residual = a.residual ? static_cast<const T*>(a.input) + offset : nullptr;
  out.activation = a.project_activation;
  multiply_rows(Rows<T>(from, matrix.depth), static_cast<int>(rows), matrix, begin, end, out);
}

template <class T>
const MbconvKernels* kernels_of() {
  static constexpr MbconvKernels kernels = {kGemmFormat<T>,
                                            pack_block<T>,
                                            pack_project<T>,
                                            convert<T>,
                                            expand_depthwise<T>,
                                            ring_bytes<T>,
                                            merge<typename Simd<T>::Scalar>,
                                            gate_panels<typename Simd<T>::Scalar>,
                                            project<T>};
  return &kernels;
}

}  // namespace

const MbconvKernels* mbconv_kernels(Dtype dtype) {
  return for_dtype(dtype, [](auto element) { return kernels_of<decltype(element)>(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
