// What every forward depthwise convolution on the CPU is made of: the loops over taps, the channels
// of a block (weights, BN, sums), and the rows that results are stored to.
#pragma once

#include "depthwise_conv_bn_act.h"
#include "simd.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int kMaxKernel = 7;

EFFNET_INLINE int lesser(int a, int b) { return a < b ? a : b; }
EFFNET_INLINE int greater(int a, int b) { return a > b ? a : b; }
EFFNET_INLINE int round_up(int a, int b) { return (a + b - 1) / b * b; }

// A unit of the plan: output rows [oh0, oh1) and columns [ow0, ow1) of image n, and the part of the
// input whose gradient it owns.
struct Unit {
  int64_t n;
  int oh0, oh1, ow0, ow1;
  int ih0, ih1, iw0, iw1;
};

EFFNET_INLINE Unit unit_at(const ConvShape& s, const DepthwisePlan& p, int64_t index) {
  Unit u;
  const int strip = static_cast<int>(index % p.strips);
  const int band = static_cast<int>(index / p.strips % p.bands);
  u.n = index / (int64_t{p.strips} * p.bands);
  u.oh0 = band * p.band_rows;
  u.oh1 = lesser(u.oh0 + p.band_rows, s.out_h);
  u.ow0 = strip * p.strip_cols;
  u.ow1 = lesser(u.ow0 + p.strip_cols, s.out_w);
  u.ih0 = band == 0 ? 0 : greater(u.oh0 * s.stride - s.pad_top, 0);
  u.ih1 = band == p.bands - 1 ? s.in_h : greater(u.oh1 * s.stride - s.pad_top, 0);
  u.iw0 = strip == 0 ? 0 : greater(u.ow0 * s.stride - s.pad_left, 0);
  u.iw1 = strip == p.strips - 1 ? s.in_w : greater(u.ow1 * s.stride - s.pad_left, 0);
  return u;
}

// The channels of one block.
struct Block {
  int index;
  int vectors;
  int64_t channel;    // the first one
  int last_channels;  // channels in the last vector
};

EFFNET_INLINE Block block_at(const ConvShape& s, const DepthwisePlan& p, int index) {
  const int first = p.block_begin(index), vectors = p.block_begin(index + 1) - first;
  return {index, vectors, int64_t{first} * p.lanes,
          lesser(p.lanes, s.channels - (first + vectors - 1) * p.lanes)};
}

// ---- Loops over taps. Weights are [v][k * k][lanes]. ----

// What one row of results reads: rows of the tensor itself or of a ring. Vector v of column c of
// row i is at rows[i] + v * pitch + c * step, and is zero where c is outside [0, width).
template <class S>
struct Window {
  using F = typename S::Scalar;
  const F* rows[kMaxKernel];
  int lo, hi;  // rows of the kernel that meet the input
  int64_t pitch, step;
  int origin;  // the column that tap 0 of the first result meets
  int width;
  // What the next row of results will read first, from the column of its first result on; null
  // where there is nothing to prefetch.
  const F* ahead[2];
};

// sum[t] += sum over i, j of rows[i][x * stride + j] * w[i][j] for the tile of results that begins
// at column x. offset: of the first column that the tile reads, in any row. Columns [lo, hi) of the
// tile's lie in the input; the others, zeros, are not read. Where lo and hi are constants, there is
// no comparison left.
template <class S, int K, int Stride, int Tile>
EFFNET_INLINE void add_taps(typename S::V (&sum)[Tile], const Window<S>& window,
                            const typename S::Scalar* weights, int64_t offset, int lo, int hi) {
  using V = typename S::V;
  constexpr int L = S::lanes, Columns = (Tile - 1) * Stride + K;
  const auto* w = weights + window.lo * (K * L);
  for (int i = window.lo; i < window.hi; ++i, w += K * L) {
    const auto* in = window.rows[i] + offset;
    V tap[K];
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) tap[j] = S::load(w + j * L);
    EFFNET_UNROLL
    for (int q = 0; q < Columns; ++q) {
      if (q < lo || q >= hi) continue;
      const V value = S::load_once(in + q * window.step);
      EFFNET_UNROLL
      for (int j = 0; j < K; ++j) {
        const int t = q - j;
        if (t >= 0 && t % Stride == 0 && t / Stride < Tile) {
          S::accumulate(sum[t / Stride], value, tap[j]);
        }
      }
    }
  }
}

// A row of `count` results of a block, each sum beginning with its channel's `start`. Channels are
// the inner loop: the tensor is read in the order of its memory. Borders: a tile may reach beyond
// the columns of the window.
//
// Everything is copied to locals first: a vector may be stored over any object, so after every
// store the compiler would load them again.
template <class S, int K, int Stride, int Tile, bool Borders, class Sink>
void correlate(const Window<S>& from, const typename S::Scalar* weights,
               const typename S::Scalar* start, int count, int vectors, const Sink& to) {
  using V = typename S::V;
  constexpr int L = S::lanes, Columns = (Tile - 1) * Stride + K;
  constexpr int PerLine = L >= 16 ? 1 : 16 / L;
  // How far the first and the last tile of a row reach out with a padding of half a kernel.
  constexpr int Left = K / 2, Right = K / 2 - (Stride - 1);
  const Window<S> window = from;
  const Sink sink = to;
  for (int x = 0; x < count; x += Tile) {
    const int first = window.origin + x * Stride;
    const int lo = greater(-first, 0), hi = lesser(window.width - first, Columns);
    int64_t offset = first * window.step;
    const auto* w = weights;
    for (int v = 0; v < vectors; ++v, offset += window.pitch, w += K * K * L) {
      if (window.ahead[0] != nullptr && v % PerLine == 0) {
        EFFNET_UNROLL
        for (int i = 0; i < Stride; ++i) {
          const auto* next = window.ahead[i] + (v * window.pitch + x * Stride * window.step);
          EFFNET_UNROLL
          for (int q = 0; q < Tile * Stride; ++q) prefetch(next + q * window.step);
        }
      }
      V sum[Tile];
      const V begin = S::load(start + v * L);
      EFFNET_UNROLL
      for (int t = 0; t < Tile; ++t) sum[t] = begin;
      if (!Borders || (lo == 0 && hi == Columns)) {
        add_taps<S, K, Stride>(sum, window, w, offset, 0, Columns);
      } else if (lo == Left && hi == Columns) {
        add_taps<S, K, Stride>(sum, window, w, offset, Left, Columns);
      } else if (lo == 0 && hi == Columns - Right) {
        add_taps<S, K, Stride>(sum, window, w, offset, 0, Columns - Right);
      } else if (lo == Left && hi == Columns - Right) {
        add_taps<S, K, Stride>(sum, window, w, offset, Left, Columns - Right);
      } else {
        add_taps<S, K, Stride>(sum, window, w, offset, lo, hi);
      }
      sink.template take<Tile>(sum, x, v);
    }
  }
}

template <class S, class Sink>
using Correlate = void (*)(const Window<S>&, const typename S::Scalar*, const typename S::Scalar*,
                           int, int, const Sink&);

template <class S, class Sink, int K, int Stride, bool Borders>
Correlate<S, Sink> correlate_of(int tile) {
  switch (tile) {
    case 4:
      return correlate<S, K, Stride, 4, Borders, Sink>;
    case 7:
      return correlate<S, K, Stride, 7, Borders, Sink>;
    default:
      return correlate<S, K, Stride, 8, Borders, Sink>;
  }
}

// For tensors of T. Only those that need no widening are read where they lie, without a ring that
// holds the padding.
template <class T, class Sink>
Correlate<Simd<T>, Sink> correlate_for(const ConvShape& s, int tile) {
  using S = Simd<T>;
  constexpr bool Borders = sizeof(T) == sizeof(typename S::Scalar);
  switch (s.kernel * 10 + s.stride) {
    case 31:
      return correlate_of<S, Sink, 3, 1, Borders>(tile);
    case 32:
      return correlate_of<S, Sink, 3, 2, Borders>(tile);
    case 51:
      return correlate_of<S, Sink, 5, 1, Borders>(tile);
    case 52:
      return correlate_of<S, Sink, 5, 2, Borders>(tile);
    case 71:
      return correlate_of<S, Sink, 7, 1, Borders>(tile);
    default:
      return correlate_of<S, Sink, 7, 2, Borders>(tile);
  }
}

// A thread's scratch, handed out in pieces.
template <class F>
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<F*>(memory)) {}
  EFFNET_INLINE F* take(int64_t count) {
    F* piece = next_;
    constexpr int64_t kLine = 64 / sizeof(F);
    next_ += (count + kLine - 1) / kLine * kLine;
    return piece;
  }

 private:
  F* next_;
};

// ---- Per-channel values of a block, padded to whole vectors with zeros. ----

EFFNET_INLINE int64_t block_channels(const DepthwisePlan& p, const Block& b) {
  return int64_t{b.vectors - 1} * p.lanes + b.last_channels;
}

template <class F>
void pack_vector(F* to, const F* from, const DepthwisePlan& p, const Block& b) {
  const int64_t channels = block_channels(p, b);
  for (int64_t i = 0; i < int64_t{b.vectors} * p.lanes; ++i) {
    to[i] = i < channels ? from[b.channel + i] : F(0);
  }
}

// weight (C, 1, k, k) -> [v][k * k][lanes], each channel times its `scale` unless that is null.
template <class T, class F>
void pack_weight(F* to, const T* weight, const F* scale, int taps, const DepthwisePlan& p,
                 const Block& b) {
  constexpr int L = Simd<T>::lanes;
  const int64_t channels = block_channels(p, b);
  const T* from = weight + b.channel * taps;
  for (int64_t c = 0; c < channels; ++c, from += taps) {
    F* lane = to + (c / L * taps * L + c % L);
    const F factor = scale == nullptr ? F(1) : scale[c];
    for (int tap = 0; tap < taps; ++tap) lane[tap * L] = to_float(from[tap]) * factor;
  }
  for (int64_t c = channels; c < int64_t{b.vectors} * L; ++c) {
    F* lane = to + (c / L * taps * L + c % L);
    for (int tap = 0; tap < taps; ++tap) lane[tap * L] = F(0);
  }
}

// One value of a vector in any of its dtypes; `absent` where it is None.
template <class F>
EFFNET_INLINE F channel_value(const ChannelVector& x, int64_t i, F absent) {
  if (x.data == nullptr) return absent;
  switch (x.dtype) {
    case Dtype::float32:
      return static_cast<F>(static_cast<const float*>(x.data)[i]);
    case Dtype::float16:
      return static_cast<F>(to_float(static_cast<const half*>(x.data)[i]));
    case Dtype::bfloat16:
      return static_cast<F>(to_float(static_cast<const bfloat16*>(x.data)[i]));
    default:
      return static_cast<F>(static_cast<const double*>(x.data)[i]);
  }
}

// BN of a channel: conv * scale + shift, or (conv - mean) * scale + bias.
template <class F>
struct FoldedChannel {
  F mean, invstd, scale, bias, shift;

  EFFNET_INLINE FoldedChannel(const BatchNorm& bn, int64_t c)
      : mean(channel_value(bn.mean, c, F(0))), bias(channel_value(bn.bias, c, F(0))) {
    const double inverse = 1 / std::sqrt(channel_value(bn.var, c, F(1)) + bn.eps);
    invstd = static_cast<F>(inverse);
    scale = static_cast<F>(channel_value(bn.weight, c, F(1)) * inverse);
    shift = static_cast<F>(bias - static_cast<double>(mean) * scale);
  }
};

// BN of the block's channels.
template <class F>
struct PackedBatchNorm {
  F *mean, *invstd, *scale, *bias, *shift;

  static constexpr int kVectors = 5;

  PackedBatchNorm(Scratch<F>& scratch, const DepthwisePlan& p)
      : mean(scratch.take(int64_t{p.block_vectors()} * p.lanes * kVectors)) {}

  void start_block(const BatchNorm& bn, const DepthwisePlan& p, const Block& b) {
    const int64_t size = int64_t{b.vectors} * p.lanes;
    invstd = mean + size;
    scale = invstd + size;
    bias = scale + size;
    shift = bias + size;
    const int64_t channels = block_channels(p, b);
    for (int64_t i = 0; i < channels; ++i) {
      const FoldedChannel<F> folded(bn, b.channel + i);
      mean[i] = folded.mean;
      invstd[i] = folded.invstd;
      scale[i] = folded.scale;
      bias[i] = folded.bias;
      shift[i] = folded.shift;
    }
    for (int64_t i = channels; i < size; ++i) {
      mean[i] = invstd[i] = scale[i] = bias[i] = shift[i] = F(0);
    }
  }
};

// Sums over many rows, one for each of the block's vectors.
template <class S>
class RowSums {
 public:
  using F = typename S::Scalar;
  using V = typename S::V;

  RowSums(Scratch<F>& scratch, const DepthwisePlan& p)
      : sums_(scratch.take(int64_t{p.block_vectors()} * S::lanes)),
        lost_(scratch.take(int64_t{p.block_vectors()} * S::lanes)) {}

  void clear(int vectors) {
    for (int v = 0; v < vectors; ++v) {
      S::store(sums_ + v * S::lanes, S::set(0.f));
      S::store(lost_ + v * S::lanes, S::set(0.f));
    }
  }

  template <class X>
  EFFNET_INLINE void add(int v, const X& x) {
    ExactSum<S> sum(S::load(sums_ + v * S::lanes), S::load(lost_ + v * S::lanes));
    sum.add(x);
    S::store(sums_ + v * S::lanes, sum.sum);
    S::store(lost_ + v * S::lanes, sum.lost);
  }

  EFFNET_INLINE V operator[](int v) const { return S::load(sums_ + v * S::lanes); }
  EFFNET_INLINE const F* data() const { return sums_; }
  EFFNET_INLINE const F* lost() const { return lost_; }

 private:
  F *sums_, *lost_;
};

// Calls body(activation) with the activation as a compile-time constant.
template <Activation A>
struct Constant {
  static constexpr Activation value = A;
};

template <class Body>
EFFNET_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::identity:
      return body(Constant<Activation::identity>{});
    case Activation::relu:
      return body(Constant<Activation::relu>{});
    case Activation::relu6:
      return body(Constant<Activation::relu6>{});
    case Activation::silu:
      return body(Constant<Activation::silu>{});
    case Activation::hardswish:
      return body(Constant<Activation::hardswish>{});
    case Activation::sigmoid:
      return body(Constant<Activation::sigmoid>{});
    case Activation::hardsigmoid:
      return body(Constant<Activation::hardsigmoid>{});
  }
}

template <class F>
void clear(F* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = F(0);
}

template <class S, int Tile>
__attribute__((noinline)) void activate_in_memory(Activation activation, typename S::V (&x)[Tile]) {
  with_activation(activation, [&](auto act) { activate_all<S, Tile>(decltype(act)::value, x); });
}

// Activates a tile: SiLU in its registers, the others out of line, or every loop over taps would
// carry them all.
template <class S, int Tile>
EFFNET_INLINE void activate_tile(Activation activation, typename S::V (&x)[Tile]) {
  if (activation == Activation::silu) {
    activate_all<S, Tile>(Activation::silu, x);
  } else if (activation != Activation::identity) {
    typename S::V copy[Tile];
    EFFNET_UNROLL
    for (int t = 0; t < Tile; ++t) copy[t] = x[t];
    activate_in_memory<S, Tile>(activation, copy);
    EFFNET_UNROLL
    for (int t = 0; t < Tile; ++t) x[t] = copy[t];
  }
}

// Where the results of a unit's row go: the block's channels in `count` columns of the tensor.
template <class T>
struct OutputRow {
  using S = Simd<T>;
  using V = typename S::V;
  T* to;
  int64_t channels, row_size;
  int count;
  int partial, last_channels;  // the vector with fewer channels, or -1, and how many it has
  bool prefetch;

  EFFNET_INLINE OutputRow() {}
  OutputRow(const ConvShape& s, const DepthwisePlan& p, const Block& b, const Unit& u)
      : to(nullptr),
        channels(s.channels),
        row_size(int64_t{s.out_w} * s.channels),
        count(u.ow1 - u.ow0),
        partial(b.last_channels == S::lanes ? -1 : b.vectors - 1),
        last_channels(b.last_channels),
        prefetch(p.prefetch) {}

  EFFNET_INLINE void start(void* tensor, const ConvShape& s, const Block& b, const Unit& u,
                           int oh) {
    to = static_cast<T*>(tensor) + ((u.n * s.out_h + oh) * s.out_w + u.ow0) * channels + b.channel;
  }

  // Fetches what the tile below (x, v) will be stored over.
  template <int Tile>
  EFFNET_INLINE void prefetch_below(int x, int v) const {
    constexpr int PerLine = 64 / (S::lanes * sizeof(T));
    if (!prefetch || (PerLine > 1 && v % PerLine != 0)) return;
    const T* below = to + v * S::lanes + row_size + x * channels;
    EFFNET_UNROLL
    for (int t = 0; t < Tile; ++t) prefetch_to_write(below + t * channels);
  }

  // Columns [x, x + Tile) of vector v, those below `count`.
  template <int Tile>
  EFFNET_INLINE void store(const V (&values)[Tile], int x, int v) const {
    T* first = to + v * S::lanes + x * channels;
    if (v != partial && x + Tile <= count) {
      EFFNET_UNROLL
      for (int t = 0; t < Tile; ++t) S::store(first + t * channels, values[t]);
      return;
    }
    EFFNET_UNROLL
    for (int t = 0; t < Tile; ++t) {
      if (x + t >= count) break;
      if (v == partial) {
        S::store_partial(first + t * channels, values[t], last_channels);
      } else {
        S::store(first + t * channels, values[t]);
      }
    }
  }
};

// The sum of the tile's columns below `count`, in a fixed order.
template <class S, int Tile>
EFFNET_INLINE typename S::V sum_of_tile(const typename S::V (&values)[Tile], int x, int count) {
  typename S::V part[2] = {S::set(0.f), S::set(0.f)};
  EFFNET_UNROLL
  for (int t = 0; t < Tile; ++t) {
    if (x + t < count) part[t % 2] = part[t % 2] + values[t];
  }
  return part[0] + part[1];
}

}  // namespace
}  // namespace EFFNET_ISA
}  // namespace effnet
