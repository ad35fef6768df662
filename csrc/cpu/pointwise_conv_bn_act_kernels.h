// The kernels of the pointwise op, compiled once for each instruction set: gemm.h on the tensors of
// a call.
//
//   input (M, C) [--convert_rows: prologue, gate--> block of rows] --multiply_rows--> output (M, K)
#pragma once

#include "gemm.h"
#include "pointwise_conv_bn_act.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <class T>
void pack(const PointwiseInference& a, int64_t begin, int64_t end, void* matrix) {
  pack_panels(matrix, static_cast<const T*>(a.weight), a.bn, a.out_channels, 1, a.in_channels,
              begin, end);
}

template <class T>
void multiply(const PointwiseInference& a, const PointwisePlan& p, const void* packed,
              int64_t begin, int64_t end, void* scratch, void* sums) {
  using F = typename Simd<T>::Scalar;
  using Value = typename Products<T>::Value;
  const Matrix<T> matrix(packed, a.out_channels, a.in_channels);
  const int c = a.in_channels;
  const int64_t k = a.out_channels;
  int64_t converted = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t slot = item / p.groups, group = item % p.groups, image = slot / p.row_blocks;
    const int64_t row = slot % p.row_blocks * p.block_rows;
    const int count = lesser(p.rows - row, p.block_rows);
    const T* input = static_cast<const T*>(a.input) + (image * p.rows + row) * c;
    const Value* rows = static_cast<const Value*>(scratch);
    if (!p.converted) {
      rows = reinterpret_cast<const Value*>(input);
    } else if (slot != converted) {
      const F* gate = static_cast<const F*>(a.gate);
      convert_rows(static_cast<Value*>(scratch), matrix.depth, input, count, c,
                   static_cast<const F*>(a.prologue.scale), static_cast<const F*>(a.prologue.shift),
                   a.prologue.activation, gate == nullptr ? nullptr : gate + image * c);
      converted = slot;
    }
    const int64_t offset = (image * p.rows + row) * k;
    GemmOutput<T> out{};
    out.to = static_cast<T*>(a.output) + offset;
    out.stride = k;
    out.residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + offset;
    out.activation = a.activation;
    const int64_t first = group * p.group_panels, last = lesser(first + p.group_panels, p.panels);
    if (sums != nullptr) {
      out.sums = static_cast<F*>(sums) + slot * 2 * p.padded_channels;
      out.lost = out.sums + p.padded_channels;
      const int64_t channel = first * p.panel;
      const int64_t channels = (last == p.panels ? p.padded_channels : last * p.panel) - channel;
      clear(out.sums + channel, channels);
      clear(out.lost + channel, channels);
    }
    multiply_rows(Rows<T>(rows, matrix.depth), count, matrix, first, last, out);
  }
}

template <class T>
void merge(const PointwiseInference& a, const PointwisePlan& p, const void* sums) {
  using F = typename Simd<T>::Scalar;
  merge_sums(static_cast<const F*>(sums), p.images, p.row_blocks, a.out_channels, p.padded_channels,
             static_cast<F*>(a.pooled));
}

template <class T>
const PointwiseKernels* kernels_of() {
  static constexpr PointwiseKernels kernels = {kGemmFormat<T>, pack<T>, multiply<T>, merge<T>};
  return &kernels;
}

}  // namespace

const PointwiseKernels* pointwise_kernels(Dtype dtype) {
  return for_dtype(dtype, [](auto element) { return kernels_of<decltype(element)>(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
