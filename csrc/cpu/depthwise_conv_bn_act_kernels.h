// The kernels of the depthwise op, compiled once for each instruction set.
//
// Rows of the input are widened to float32 (through the prologue, where there is one) into a ring
// of k rows, vector by vector: element (v, x) of a row, a vector of `lanes` channels, is at (v *
// columns + x) * lanes, with the zero padding in place. So each input element is converted once,
// the inner loops see aligned float32 with no borders, and a block's ring stays in L1:
//
//   input (N, H, W, C) --load_rows--> ring [k][v][x] --correlate--> row [v][x] --> BN, activation,
//                                                                    pooled sums, --> output
//
// The loops over taps hold a tile of output columns in registers: each vector that is loaded meets
// every tap that needs it.
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

EFFNET_INLINE Unit unit_at(const DepthwiseShape& s, const DepthwisePlan& p, int64_t index) {
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

EFFNET_INLINE Block block_at(const DepthwiseShape& s, const DepthwisePlan& p, int index) {
  const int first = index * p.block_vectors;
  const int vectors = lesser(p.block_vectors, p.vectors - first);
  return {index, vectors, int64_t{first} * p.lanes,
          lesser(p.lanes, s.channels - (first + vectors - 1) * p.lanes)};
}

// ---- Loops over taps. Rows are [v][columns][lanes]; weights are [v][k * k][lanes]. ----

// out[x] = sum over i, j of rows[i][x * stride + j] * w[i][j], i in [lo, hi).
template <class S, int K, int Stride, int Tile>
void correlate(typename S::Scalar* out, int out_columns, const typename S::Scalar* const* rows,
               int lo, int hi, int columns, const typename S::Scalar* weights, int vectors) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  for (int v = 0; v < vectors; ++v) {
    const int64_t base = int64_t{v} * columns * L;
    for (int x = 0; x < out_columns; x += Tile) {
      V sum[Tile];
      EFFNET_UNROLL
      for (int t = 0; t < Tile; ++t) sum[t] = S::set(0.f);
      for (int i = lo; i < hi; ++i) {
        const auto* w = weights + (v * K + i) * K * L;
        const auto* in = rows[i] + base + int64_t{x} * Stride * L;
        V tap[K];
        EFFNET_UNROLL
        for (int j = 0; j < K; ++j) tap[j] = S::load(w + j * L);
        EFFNET_UNROLL
        for (int q = 0; q < (Tile - 1) * Stride + K; ++q) {
          const V value = S::load_once(in + q * L);
          EFFNET_UNROLL
          for (int j = 0; j < K; ++j) {
            const int t = q - j;
            if (t >= 0 && t % Stride == 0 && t / Stride < Tile) {
              sum[t / Stride] = S::fma(value, tap[j], sum[t / Stride]);
            }
          }
        }
      }
      auto* to = out + (int64_t{v} * out_columns + x) * L;
      EFFNET_UNROLL
      for (int t = 0; t < Tile; ++t) S::store(to + t * L, sum[t]);
    }
  }
}

// One tile of the above straight from the tensor: rows[i] is the tensor's row, `step` elements from
// column to column, and tap 0 of the tile's first result meets column `first`. Checked: columns
// outside [0, width) are padding.
template <class S, int K, int Stride, int Tile, bool Checked>
EFFNET_INLINE void correlate_tile_in_place(typename S::Scalar* out,
                                           const typename S::Scalar* const* rows, int lo, int hi,
                                           int64_t offset, int64_t step, int first, int width,
                                           const typename S::Scalar* weights) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  V sum[Tile];
  EFFNET_UNROLL
  for (int t = 0; t < Tile; ++t) sum[t] = S::set(0.f);
  for (int i = lo; i < hi; ++i) {
    const auto* in = rows[i] + (offset + first * step);
    V tap[K];
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) tap[j] = S::load(weights + (i * K + j) * L);
    EFFNET_UNROLL
    for (int q = 0; q < (Tile - 1) * Stride + K; ++q) {
      if (!Checked || static_cast<unsigned>(first + q) < static_cast<unsigned>(width)) {
        const V value = S::load_once(in + q * step);
        EFFNET_UNROLL
        for (int j = 0; j < K; ++j) {
          const int t = q - j;
          if (t >= 0 && t % Stride == 0 && t / Stride < Tile) {
            sum[t / Stride] = S::fma(value, tap[j], sum[t / Stride]);
          }
        }
      }
    }
  }
  EFFNET_UNROLL
  for (int t = 0; t < Tile; ++t) S::store(out + t * L, sum[t]);
}

template <class S, int K, int Stride, int Tile>
void correlate_in_place(typename S::Scalar* out, int out_columns,
                        const typename S::Scalar* const* rows, int lo, int hi, int64_t step,
                        int origin, int width, const typename S::Scalar* weights, int vectors) {
  constexpr int L = S::lanes, Columns = (Tile - 1) * Stride + K;
  for (int v = 0; v < vectors; ++v) {
    const auto* w = weights + v * K * K * L;
    for (int x = 0; x < out_columns; x += Tile) {
      auto* to = out + (int64_t{v} * out_columns + x) * L;
      const int first = origin + x * Stride;
      if (first >= 0 && first + Columns <= width) {
        correlate_tile_in_place<S, K, Stride, Tile, false>(to, rows, lo, hi, v * L, step, first,
                                                           width, w);
      } else {
        correlate_tile_in_place<S, K, Stride, Tile, true>(to, rows, lo, hi, v * L, step, first,
                                                          width, w);
      }
    }
  }
}

// The transpose: out[x] = sum over rows r and over q, j with q * stride + j = x of
// rows[r][q + halo] * w[taps[r]][j], where halo = (K - 1) / stride is how far rows begin earlier.
template <class S, int K, int Stride, int Tile>
void transpose(typename S::Scalar* out, int out_columns, const typename S::Scalar* const* rows,
               const int* taps, int row_count, int columns, const typename S::Scalar* weights,
               int vectors) {
  using V = typename S::V;
  constexpr int L = S::lanes, Halo = (K - 1) / Stride;
  static_assert(Tile % Stride == 0, "tiles start at tap 0");
  for (int v = 0; v < vectors; ++v) {
    const int64_t base = int64_t{v} * columns * L;
    for (int x = 0; x < out_columns; x += Tile) {
      V sum[Tile];
      EFFNET_UNROLL
      for (int t = 0; t < Tile; ++t) sum[t] = S::set(0.f);
      for (int r = 0; r < row_count; ++r) {
        const auto* w = weights + (v * K + taps[r]) * K * L;
        const auto* in = rows[r] + base + int64_t{x} / Stride * L;
        V tap[K];
        EFFNET_UNROLL
        for (int j = 0; j < K; ++j) tap[j] = S::load(w + j * L);
        EFFNET_UNROLL
        for (int q = 0; q < Halo + Tile / Stride; ++q) {
          const V value = S::load_once(in + q * L);
          EFFNET_UNROLL
          for (int j = 0; j < K; ++j) {
            const int t = (q - Halo) * Stride + j;
            if (t >= 0 && t < Tile) sum[t] = S::fma(value, tap[j], sum[t]);
          }
        }
      }
      auto* to = out + (int64_t{v} * out_columns + x) * L;
      EFFNET_UNROLL
      for (int t = 0; t < Tile; ++t) S::store(to + t * L, sum[t]);
    }
  }
}

// sums[i][j] += sum over x < count of grad[x] * rows[i][x * stride + j], for Rows rows from
// `first`.
template <class S, int K, int Stride, int Rows>
EFFNET_INLINE void correlate_rows_with_gradient(typename S::Scalar* sums,
                                                const typename S::Scalar* grad, int count,
                                                const typename S::Scalar* const* rows, int first,
                                                int64_t base) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  V sum[Rows][K];
  const typename S::Scalar* in[Rows];
  EFFNET_UNROLL
  for (int i = 0; i < Rows; ++i) {
    in[i] = rows[first + i] + base;
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) sum[i][j] = S::set(0.f);
  }
  for (int x = 0; x < count; ++x) {
    const V g = S::load(grad + int64_t{x} * L);
    EFFNET_UNROLL
    for (int i = 0; i < Rows; ++i) {
      EFFNET_UNROLL
      for (int j = 0; j < K; ++j) {
        sum[i][j] = S::fma(S::load(in[i] + (int64_t{x} * Stride + j) * L), g, sum[i][j]);
      }
    }
  }
  EFFNET_UNROLL
  for (int i = 0; i < Rows; ++i) {
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) {
      auto* to = sums + ((first + i) * K + j) * L;
      S::store(to, S::load(to) + sum[i][j]);
    }
  }
}

// The above for all K rows: as many at once as there are registers for their sums.
template <class S, int K, int Stride>
void correlate_with_gradient(typename S::Scalar* sums, const typename S::Scalar* grad,
                             int grad_columns, int count, const typename S::Scalar* const* rows,
                             int columns, int vectors) {
  constexpr int L = S::lanes, Fit = (S::registers - 4) / K, Rows = Fit < K ? Fit : K;
  for (int v = 0; v < vectors; ++v) {
    auto* to = sums + v * K * K * L;
    const auto* g = grad + int64_t{v} * grad_columns * L;
    const int64_t base = int64_t{v} * columns * L;
    int i = 0;
    for (; i + Rows <= K; i += Rows) {
      correlate_rows_with_gradient<S, K, Stride, Rows>(to, g, count, rows, i, base);
    }
    constexpr int Rest = K % Rows;
    if constexpr (Rest != 0) {
      correlate_rows_with_gradient<S, K, Stride, Rest>(to, g, count, rows, i, base);
    }
  }
}

template <class S>
struct Loops {
  using F = typename S::Scalar;
  void (*correlate)(F*, int, const F* const*, int, int, int, const F*, int);
  void (*correlate_in_place)(F*, int, const F* const*, int, int, int64_t, int, int, const F*, int);
  void (*transpose)(F*, int, const F* const*, const int*, int, int, const F*, int);
  void (*correlate_with_gradient)(F*, const F*, int, int, const F* const*, int, int);
};

template <class S, int K, int Stride, int Tile>
EFFNET_INLINE void set_tile(Loops<S>& loops, const DepthwisePlan& p) {
  if (p.tile == Tile) {
    loops.correlate = correlate<S, K, Stride, Tile>;
    loops.correlate_in_place = correlate_in_place<S, K, Stride, Tile>;
  }
  if constexpr (Tile % Stride == 0) {
    if (p.grad_tile == Tile) loops.transpose = transpose<S, K, Stride, Tile>;
  }
}

template <class S, int K, int Stride>
Loops<S> loops_of(const DepthwisePlan& p) {
  Loops<S> loops{};
  set_tile<S, K, Stride, 4>(loops, p);
  set_tile<S, K, Stride, 5>(loops, p);
  set_tile<S, K, Stride, 6>(loops, p);
  set_tile<S, K, Stride, 7>(loops, p);
  set_tile<S, K, Stride, 8>(loops, p);
  loops.correlate_with_gradient = correlate_with_gradient<S, K, Stride>;
  return loops;
}

template <class S>
Loops<S> loops_for(const DepthwiseShape& s, const DepthwisePlan& p) {
  switch (s.kernel * 10 + s.stride) {
    case 31:
      return loops_of<S, 3, 1>(p);
    case 32:
      return loops_of<S, 3, 2>(p);
    case 51:
      return loops_of<S, 5, 1>(p);
    case 52:
      return loops_of<S, 5, 2>(p);
    case 71:
      return loops_of<S, 7, 1>(p);
    default:
      return loops_of<S, 7, 2>(p);
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

// weight (C, 1, k, k) -> [v][k * k][lanes], by way of float32 copies of a vector's channels.
template <class T, class F>
void pack_weight(F* to, const T* weight, int taps, const DepthwisePlan& p, const Block& b) {
  using S = Simd<T>;
  F rows[S::lanes * kMaxKernel * kMaxKernel];
  for (int v = 0; v < b.vectors; ++v, to += taps * S::lanes) {
    const int channels = v == b.vectors - 1 ? b.last_channels : S::lanes;
    const T* from = weight + (b.channel + int64_t{v} * S::lanes) * taps;
    for (int i = 0; i < S::lanes * taps; ++i) {
      rows[i] = i < channels * taps ? to_float(from[i]) : F(0);
    }
    for (int tap = 0; tap < taps; ++tap) S::store(to + tap * S::lanes, S::gather(rows + tap, taps));
  }
}

// The block's channels of a vector in any of its dtypes; `absent` where it is None.
template <class F>
void pack_channels(F* to, const ChannelVector& x, F absent, const DepthwisePlan& p,
                   const Block& b) {
  const int64_t channels = block_channels(p, b);
  const auto pack = [&](const auto* from) {
    for (int64_t i = 0; i < channels; ++i) {
      to[i] = from == nullptr ? absent : static_cast<F>(to_float(from[b.channel + i]));
    }
  };
  switch (x.dtype) {
    case Dtype::float32:
      pack(static_cast<const float*>(x.data));
      break;
    case Dtype::float16:
      pack(static_cast<const half*>(x.data));
      break;
    case Dtype::bfloat16:
      pack(static_cast<const bfloat16*>(x.data));
      break;
    case Dtype::float64:
      pack(static_cast<const double*>(x.data));
      break;
  }
  for (int64_t i = channels; i < int64_t{b.vectors} * p.lanes; ++i) to[i] = F(0);
}

// A thread packs what belongs to a block when it first meets it, and keeps it for all later items.
template <class F>
class PackedOnce {
 public:
  PackedOnce(Scratch<F>& scratch, const DepthwisePlan& p) : packed_(scratch.take(p.blocks)) {
    for (int i = 0; i < p.blocks; ++i) packed_[i] = F(0);
  }
  EFFNET_INLINE bool first_time(const Block& b) const {
    const bool first = packed_[b.index] == F(0);
    packed_[b.index] = F(1);
    return first;
  }

 private:
  F* packed_;
};

// BN: conv * scale + shift, or (conv - mean) * scale + bias. After start_block the pointers are to
// the block's channels.
template <class F>
struct PackedBatchNorm {
  F *mean, *invstd, *scale, *bias;

  static constexpr int kVectors = 4;

  PackedBatchNorm(Scratch<F>& scratch, const DepthwisePlan& p)
      : once_(scratch, p), all_(scratch.take(p.padded_channels() * kVectors)) {}

  void start_block(const BatchNorm& bn, const DepthwisePlan& p, const Block& b) {
    const int64_t size = int64_t{b.vectors} * p.lanes;
    mean = all_ + b.channel * kVectors;
    invstd = mean + size;
    scale = invstd + size;
    bias = scale + size;
    if (!once_.first_time(b)) return;
    pack_channels(mean, bn.mean, F(0), p, b);
    pack_channels(invstd, bn.var, F(1), p, b);
    pack_channels(scale, bn.weight, F(1), p, b);
    pack_channels(bias, bn.bias, F(0), p, b);
    // No further than the last channel: eps may be 0, and so are the padding's variances.
    const int64_t channels = block_channels(p, b);
    for (int64_t i = 0; i < channels; ++i) {
      const double inverse = 1 / std::sqrt(invstd[i] + bn.eps);
      invstd[i] = static_cast<F>(inverse);
      scale[i] = static_cast<F>(scale[i] * inverse);
    }
  }

 private:
  PackedOnce<F> once_;
  F* all_;
};

// ---- Rows of tensors. ----

// The columns of a ring's rows: column x is column x + origin of the tensor; those in [lo, hi) are
// loaded, the others are zero.
struct Columns {
  int count;
  int origin;
  int lo, hi;
};

EFFNET_INLINE Columns columns_of(int count, int origin, int needed, int extent) {
  const int lo = greater(-origin, 0);
  return {count, origin, lo, greater(lesser(needed, extent - origin), lo)};
}

// A ring of rows. `depth` successive rows are held, row i in place i % depth.
template <class S>
struct Ring {
  using F = typename S::Scalar;
  F* data;
  int depth;
  Columns columns;
  int next;  // the first row that has not been loaded

  EFFNET_INLINE int64_t row_size(int vectors) const {
    return int64_t{columns.count} * vectors * S::lanes;
  }
  EFFNET_INLINE F* row(int i, int vectors) const { return data + (i % depth) * row_size(vectors); }

  void start(const Columns& c, int first_row, int vectors) {
    columns = c;
    next = first_row;
    for (int i = 0; i < depth * vectors; ++i) {
      F* row = data + int64_t{i} * c.count * S::lanes;
      for (int x = 0; x < c.lo; ++x) S::store(row + x * S::lanes, S::set(0.f));
      for (int x = c.hi; x < c.count; ++x) S::store(row + x * S::lanes, S::set(0.f));
    }
  }
};

// How rows of the input are loaded: as they are, or through the prologue.
template <class F>
struct PackedPrologue {
  F *scale, *shift;
  bool present;
};

template <class T, bool Partial>
EFFNET_INLINE typename Simd<T>::V load_channels(const T* from, int n) {
  if constexpr (Partial) {
    return Simd<T>::load_partial(from, n);
  } else {
    return Simd<T>::load(from);
  }
}

template <class T, bool Partial>
EFFNET_INLINE void store_channels(T* to, typename Simd<T>::V x, int n) {
  if constexpr (Partial) {
    Simd<T>::store_partial(to, x, n);
  } else {
    Simd<T>::store(to, x);
  }
}

// Calls body(v, partial) for each vector of the block; `partial` is a compile-time constant.
template <bool Value>
struct Bool {
  static constexpr bool value = Value;
};

template <class Body>
EFFNET_INLINE void for_each_vector(const Block& b, int lanes, const Body& body) {
  const bool full = b.last_channels == lanes;
  const int whole = full ? b.vectors : b.vectors - 1;
  for (int v = 0; v < whole; ++v) body(v, Bool<false>{});
  if (!full) body(whole, Bool<true>{});
}

// Calls body(x, part) for x in [0, count). Sums kept in `kParts` parts do not wait for each other's
// additions, and lose less to rounding.
constexpr int kParts = 4;

template <class Body>
EFFNET_INLINE void for_each_column(int count, const Body& body) {
  int x = 0;
  for (; x + kParts <= count; x += kParts) {
    EFFNET_UNROLL
    for (int part = 0; part < kParts; ++part) body(x + part, part);
  }
  if (x < count) body(x, 0);
  if (x + 1 < count) body(x + 1, 1);
  if (x + 2 < count) body(x + 2, 2);
}

template <class S>
struct Parts {
  typename S::V part[kParts];
  // GCC would compile an implicit constructor for the translation unit's own target.
  EFFNET_INLINE Parts() : part{S::set(0.f), S::set(0.f), S::set(0.f), S::set(0.f)} {}
  EFFNET_INLINE typename S::V sum() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

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

// Sums over many rows, one for each of the block's vectors.
template <class S>
class RowSums {
 public:
  using F = typename S::Scalar;
  using V = typename S::V;

  RowSums(Scratch<F>& scratch, const DepthwisePlan& p)
      : sums_(scratch.take(int64_t{p.block_vectors} * S::lanes)),
        lost_(scratch.take(int64_t{p.block_vectors} * S::lanes)) {}

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

// Column ring.columns.lo of a row of the tensor, at `from`, and those after it, into the ring.
template <class T>
void load_row(typename Simd<T>::Scalar* row, const T* from, int64_t channels, const Columns& c,
              const Block& b) {
  using S = Simd<T>;
  for_each_vector(b, S::lanes, [&](int v, auto partial) {
    const T* in = from + v * S::lanes;
    auto* to = row + (int64_t{v} * c.count + c.lo) * S::lanes;
    for (int x = c.lo; x < c.hi; ++x, in += channels, to += S::lanes) {
      S::store(to, load_channels<T, decltype(partial)::value>(in, b.last_channels));
    }
  });
}

template <class T>
void load_row_through_prologue(typename Simd<T>::Scalar* row, const T* from, int64_t channels,
                               const Columns& c, const Block& b,
                               const PackedPrologue<typename Simd<T>::Scalar>& prologue,
                               Activation activation) {
  using S = Simd<T>;
  with_activation(activation, [&](auto act) {
    for_each_vector(b, S::lanes, [&](int v, auto partial) {
      const T* in = from + v * S::lanes;
      auto* to = row + (int64_t{v} * c.count + c.lo) * S::lanes;
      const auto scale = S::load(prologue.scale + v * S::lanes);
      const auto shift = S::load(prologue.shift + v * S::lanes);
      for (int x = c.lo; x < c.hi; ++x, in += channels, to += S::lanes) {
        const auto value = load_channels<T, decltype(partial)::value>(in, b.last_channels);
        S::store(to, activate<S>(decltype(act)::value, S::fma(value, scale, shift)));
      }
    });
  });
}

// Rows of the input up to `end`, into the ring.
template <class T>
void load_rows(Ring<Simd<T>>& ring, int end, const T* input, const DepthwiseShape& s, const Unit& u,
               const Block& b, const PackedPrologue<typename Simd<T>::Scalar>& prologue,
               Activation activation) {
  const Columns& c = ring.columns;
  for (; ring.next < end; ++ring.next) {
    const T* from =
        input + ((u.n * s.in_h + ring.next) * s.in_w + c.origin + c.lo) * s.channels + b.channel;
    auto* row = ring.row(ring.next, b.vectors);
    if (prologue.present) {
      load_row_through_prologue<T>(row, from, s.channels, c, b, prologue, activation);
    } else {
      load_row<T>(row, from, s.channels, c, b);
    }
  }
}

// ---- The forward convolution of a block of a unit. ----

// What a thread needs for the convolution: the ring, one row of results, the packed weights and
// prologues.
template <class T>
struct Convolution {
  using S = Simd<T>;
  using F = typename S::Scalar;

  Convolution(const DepthwiseShape& shape, const DepthwisePlan& plan, Scratch<F>& scratch)
      : s(shape), p(plan), loops(loops_for<S>(shape, plan)), once(scratch, plan) {
    const int64_t vectors = int64_t{p.block_vectors} * S::lanes;
    out_columns = round_up(lesser(p.strip_cols, s.out_w), p.tile);
    in_columns = (out_columns - 1) * s.stride + s.kernel;
    ring.data = scratch.take(vectors * in_columns * s.kernel);
    ring.depth = s.kernel;
    row = scratch.take(vectors * out_columns);
    all_weights = scratch.take(int64_t{p.padded_channels()} * (s.kernel * s.kernel + 2));
  }

  static int64_t scratch_size(const DepthwiseShape& s, const DepthwisePlan& p) {
    const int64_t out = round_up(lesser(p.strip_cols, s.out_w), p.tile);
    return int64_t{p.block_vectors} * S::lanes *
               (((out - 1) * s.stride + s.kernel) * s.kernel + out) +
           int64_t{p.padded_channels()} * (s.kernel * s.kernel + 2);
  }

  void start_block(const Block& block, const T* weights, const Prologue& pro) {
    b = block;
    const int taps = s.kernel * s.kernel;
    const int64_t size = int64_t{b.vectors} * S::lanes;
    weight = all_weights + b.channel * (taps + 2);
    prologue = {weight + size * taps, weight + size * (taps + 1), pro.scale != nullptr};
    activation = pro.activation;
    if (!once.first_time(b)) return;
    pack_weight(weight, weights, taps, p, b);
    if (prologue.present) {
      pack_vector(prologue.scale, static_cast<const F*>(pro.scale), p, b);
      pack_vector(prologue.shift, static_cast<const F*>(pro.shift), p, b);
    }
  }

  // Calls sink(oh) for each row of the unit, with the convolution of that row in `row`.
  template <class Sink>
  EFFNET_INLINE void run(const Unit& u, const T* input, const Sink& sink) {
    const int origin = u.ow0 * s.stride - s.pad_left;
    const int needed = (u.ow1 - u.ow0 - 1) * s.stride + s.kernel;
    // Nothing to convert and whole vectors: the ring would only be a copy.
    const bool in_place =
        sizeof(T) == sizeof(F) && !prologue.present && b.last_channels == S::lanes;
    if (!in_place) {
      ring.start(columns_of(in_columns, origin, needed, s.in_w),
                 greater(u.oh0 * s.stride - s.pad_top, 0), b.vectors);
    }
    for (int oh = u.oh0; oh < u.oh1; ++oh) {
      const int top = oh * s.stride - s.pad_top;
      const int lo = greater(-top, 0), hi = lesser(s.kernel, s.in_h - top);
      const F* rows[kMaxKernel];
      if constexpr (sizeof(T) == sizeof(F)) {
        if (in_place) {
          for (int i = lo; i < hi; ++i) {
            rows[i] = input + (u.n * s.in_h + top + i) * s.in_w * s.channels + b.channel;
          }
          loops.correlate_in_place(row, out_columns, rows, lo, hi, s.channels, origin, s.in_w,
                                   weight, b.vectors);
          sink(oh);
          continue;
        }
      }
      load_rows<T>(ring, top + hi, input, s, u, b, prologue, activation);
      for (int i = lo; i < hi; ++i) rows[i] = ring.row(top + i, b.vectors);
      loops.correlate(row, out_columns, rows, lo, hi, in_columns, weight, b.vectors);
      sink(oh);
    }
  }

  DepthwiseShape s;
  DepthwisePlan p;
  Loops<S> loops;
  PackedOnce<F> once;
  F* all_weights;
  Block b;
  int out_columns, in_columns;
  Ring<S> ring;
  F* row;
  F* weight;
  PackedPrologue<F> prologue;
  Activation activation;
};

// Calls body(block, slot) for items [begin, end).
template <class Body>
EFFNET_INLINE void for_each_item(const DepthwisePlan& p, int64_t begin, int64_t end,
                                 const Body& body) {
  for (int64_t item = begin; item < end; ++item) {
    body(static_cast<int>(item % p.blocks), item / p.blocks);
  }
}

// The units of a slot are [first_unit(slot), first_unit(slot + 1)).
EFFNET_INLINE int64_t first_unit(const DepthwiseShape& s, const DepthwisePlan& p, int64_t slot) {
  const int64_t units = p.units(s), each = units / p.slots, extra = units % p.slots;
  return slot * each + (slot < extra ? slot : extra);
}

template <class F>
void clear(F* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = F(0);
}

// The sums over a unit, [v][lanes], to the unit's row of pooled.
template <class F>
void store_pooled(void* pooled, const F* sums, int64_t unit, const DepthwiseShape& s,
                  const DepthwisePlan& p, const Block& b) {
  F* to = static_cast<F*>(pooled) + unit * s.channels + b.channel;
  const int64_t channels = block_channels(p, b);
  for (int64_t i = 0; i < channels; ++i) to[i] = sums[i];
}

template <class T>
void inference(const DepthwiseInference& a, const DepthwisePlan& p, int64_t begin, int64_t end,
               void* memory, void* pooled) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes;
  const DepthwiseShape& s = a.shape;
  const int64_t channels = s.channels;
  const T* input = static_cast<const T*>(a.input);
  Scratch<F> scratch(memory);
  Convolution<T> conv(s, p, scratch);
  PackedBatchNorm<F> bn(scratch, p);
  RowSums<S> sums(scratch, p);

  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    conv.start_block(b, static_cast<const T*>(a.weight), a.prologue);
    bn.start_block(a.bn, p, b);
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      const int count = u.ow1 - u.ow0;
      sums.clear(b.vectors);
      conv.run(u, input, [&](int oh) {
        T* output = static_cast<T*>(a.output) +
                    ((u.n * s.out_h + oh) * s.out_w + u.ow0) * s.channels + b.channel;
        with_activation(a.activation, [&](auto act) {
          for_each_vector(b, L, [&](int v, auto partial) {
            const F* from = conv.row + int64_t{v} * conv.out_columns * L;
            T* to = output + v * L;
            const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
            const V bias = S::load(bn.bias + v * L);
            Parts<S> sum;
            for_each_column(count, [&](int x, int part) {
              const V z = S::load(from + int64_t{x} * L);
              const V y = activate<S>(decltype(act)::value, S::fma(z - mean, scale, bias));
              sum.part[part] = sum.part[part] + y;
              store_channels<T, decltype(partial)::value>(to + x * channels, y, b.last_channels);
            });
            sums.add(v, sum.sum());
          });
        });
      });
      if (pooled != nullptr) store_pooled(pooled, sums.data(), unit, s, p, b);
    }
  });
}

// ---- Training. ----

template <class T>
void convolve(const DepthwiseTraining& a, const DepthwisePlan& p, int64_t begin, int64_t end,
              void* memory, void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes;
  const DepthwiseShape& s = a.shape;
  const int64_t channels = s.channels;
  const T* input = static_cast<const T*>(a.input);
  const int64_t padded = p.padded_channels();
  Scratch<F> scratch(memory);
  Convolution<T> conv(s, p, scratch);
  RowSums<S> totals(scratch, p);
  RowSums<S> squares(scratch, p);

  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    conv.start_block(b, static_cast<const T*>(a.weight), a.prologue);
    int64_t total = 0;
    totals.clear(b.vectors);
    squares.clear(b.vectors);
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      const int count = u.ow1 - u.ow0;
      conv.run(u, input, [&](int oh) {
        T* output = static_cast<T*>(a.conv) +
                    ((u.n * s.out_h + oh) * s.out_w + u.ow0) * s.channels + b.channel;
        const bool start = total == 0;
        const V before = S::set(start ? F(1) : F(1) / static_cast<F>(total));
        total += count;
        const V inverse = S::set(F(1) / static_cast<F>(total));
        const V columns = S::set(static_cast<F>(-count));
        for_each_vector(b, L, [&](int v, auto partial) {
          const F* from = conv.row + int64_t{v} * conv.out_columns * L;
          T* to = output + v * L;
          // Deviations from the mean so far: exact enough when it is far from zero. The first
          // row's are from its middle, since the border sees zeros.
          const V origin = start ? S::load(from + int64_t{count} / 2 * L) : totals[v] * before;
          Parts<S> products;
          ExactSum<S> sum_z[kParts];
          for_each_column(count, [&](int x, int part) {
            // Statistics of the stored values: those of others would not normalise them.
            const V z = rounded<T>(S::load(from + int64_t{x} * L));
            store_channels<T, decltype(partial)::value>(to + x * channels, z, b.last_channels);
            const V d = z - origin;
            products.part[part] = S::fma(d, d, products.part[part]);
            sum_z[part].add(z);
          });
          EFFNET_UNROLL
          for (int part = 1; part < kParts; ++part) sum_z[0].add(sum_z[part]);
          const V sum = S::fma(origin, columns, sum_z[0].sum), square = products.sum();
          totals.add(v, sum_z[0]);
          squares.add(v, square - sum * sum * inverse);
        });
      });
    }
    if (a.batch_stats) {
      F* to = static_cast<F*>(partials) + slot * kStatisticsRows * padded + b.channel;
      for (int64_t i = 0; i < int64_t{b.vectors} * L; ++i) {
        to[i] = totals.data()[i];
        to[padded + i] = totals.lost()[i];
        to[2 * padded + i] = squares.data()[i];
      }
    }
  });
}

EFFNET_INLINE int64_t slot_elements(const DepthwiseShape& s, const DepthwisePlan& p, int64_t slot) {
  int64_t count = 0;
  for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
    const Unit u = unit_at(s, p, unit);
    count += int64_t{u.oh1 - u.oh0} * (u.ow1 - u.ow0);
  }
  return count;
}

// Chan, Golub and LeVeque's merge of (count, mean, sum of squared deviations), slot after slot.
template <class T>
void merge_statistics(const DepthwiseTraining& a, const DepthwisePlan& p, int block,
                      const void* partials) {
  using F = typename Simd<T>::Scalar;
  constexpr int L = Simd<T>::lanes;
  const DepthwiseShape& s = a.shape;
  const Block b = block_at(s, p, block);
  const int64_t padded = p.padded_channels();
  for (int v = 0; v < b.vectors; ++v) {
    const int64_t c = b.channel + v * L;
    double count = 0, mean[L] = {}, squares[L] = {};
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      const F* from = static_cast<const F*>(partials) + slot * kStatisticsRows * padded + c;
      const double more = static_cast<double>(slot_elements(s, p, slot));
      const double part = more / (count + more);
      for (int i = 0; i < L; ++i) {
        const double delta = (double{from[i]} + from[padded + i]) / more - mean[i];
        squares[i] += from[2 * padded + i] + delta * delta * count * part;
        mean[i] += delta * part;
      }
      count += more;
    }
    const int channels = v == b.vectors - 1 ? b.last_channels : L;
    for (int i = 0; i < channels; ++i) {
      static_cast<F*>(a.batch_mean)[c + i] = static_cast<F>(mean[i]);
      static_cast<F*>(a.batch_var)[c + i] = static_cast<F>(squares[i] / count);
    }
  }
}

template <class T>
void normalize(const DepthwiseTraining& a, const DepthwisePlan& p, int64_t begin, int64_t end,
               void* memory, void* pooled) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes;
  const DepthwiseShape& s = a.shape;
  const int64_t channels = s.channels;
  Scratch<F> scratch(memory);
  PackedBatchNorm<F> bn(scratch, p);
  RowSums<S> sums(scratch, p);

  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    bn.start_block(a.bn, p, b);
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      const int count = u.ow1 - u.ow0;
      sums.clear(b.vectors);
      for (int oh = u.oh0; oh < u.oh1; ++oh) {
        const int64_t offset = ((u.n * s.out_h + oh) * s.out_w + u.ow0) * s.channels + b.channel;
        with_activation(a.activation, [&](auto act) {
          for_each_vector(b, L, [&](int v, auto partial) {
            constexpr bool Partial = decltype(partial)::value;
            const T* from = static_cast<const T*>(a.conv) + offset + v * L;
            T* to = static_cast<T*>(a.output) + offset + v * L;
            const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
            const V bias = S::load(bn.bias + v * L);
            Parts<S> sum;
            for_each_column(count, [&](int x, int part) {
              const V z = load_channels<T, Partial>(from + x * channels, b.last_channels);
              const V y = activate<S>(decltype(act)::value, S::fma(z - mean, scale, bias));
              sum.part[part] = sum.part[part] + y;
              store_channels<T, Partial>(to + x * channels, y, b.last_channels);
            });
            sums.add(v, sum.sum());
          });
        });
      }
      if (pooled != nullptr) store_pooled(pooled, sums.data(), unit, s, p, b);
    }
  });
}

// ---- Backward. ----

// grad_pooled of the block's channels in image n, [v][lanes]; zeros without it.
template <class F>
void pack_grad_pooled(F* to, const DepthwiseBackward& a, int64_t n, const DepthwisePlan& p,
                      const Block& b) {
  if (a.grad_pooled == nullptr) {
    clear(to, int64_t{b.vectors} * p.lanes);
  } else {
    pack_vector(to, static_cast<const F*>(a.grad_pooled) + n * a.shape.channels, p, b);
  }
}

template <class T>
void reduce(const DepthwiseBackward& a, const DepthwisePlan& p, int64_t begin, int64_t end,
            void* memory, void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  constexpr int L = S::lanes;
  const DepthwiseShape& s = a.shape;
  const int64_t channels = s.channels;
  const int64_t padded = p.padded_channels();
  Scratch<F> scratch(memory);
  PackedBatchNorm<F> bn(scratch, p);
  F* grad_pooled = scratch.take(int64_t{p.block_vectors} * L);
  RowSums<S> sums(scratch, p), products(scratch, p);

  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    bn.start_block(a.bn, p, b);
    sums.clear(b.vectors);
    products.clear(b.vectors);
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      const int count = u.ow1 - u.ow0;
      pack_grad_pooled(grad_pooled, a, u.n, p, b);
      for (int oh = u.oh0; oh < u.oh1; ++oh) {
        const int64_t offset = ((u.n * s.out_h + oh) * s.out_w + u.ow0) * s.channels + b.channel;
        with_activation(a.activation, [&](auto act) {
          for_each_vector(b, L, [&](int v, auto partial) {
            constexpr bool Partial = decltype(partial)::value;
            const T* z_from = static_cast<const T*>(a.conv) + offset + v * L;
            const T* g_from = static_cast<const T*>(a.grad_output) + offset + v * L;
            const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
            const V bias = S::load(bn.bias + v * L), more = S::load(grad_pooled + v * L);
            Parts<S> sum, product;
            for_each_column(count, [&](int x, int part) {
              const int64_t at = x * channels;
              const V d = load_channels<T, Partial>(z_from + at, b.last_channels) - mean;
              const V g = load_channels<T, Partial>(g_from + at, b.last_channels) + more;
              const V du = g * activate_grad<S>(decltype(act)::value, S::fma(d, scale, bias));
              sum.part[part] = sum.part[part] + du;
              product.part[part] = S::fma(du, d, product.part[part]);
            });
            sums.add(v, sum.sum());
            products.add(v, product.sum());
          });
        });
      }
    }
    F* to = static_cast<F*>(partials) + slot * kBnGradientRows * padded + b.channel;
    for (int v = 0; v < b.vectors; ++v) {
      S::store(to + v * L, sums[v]);
      S::store(to + padded + v * L, products[v]);
    }
  });
}

// The sums over all slots of row `row`, for the vector of channels from c on.
template <class S>
struct SlotSums {
  double total[S::lanes];

  EFFNET_INLINE SlotSums(const void* partials, int rows, int row, int64_t c,
                         const DepthwisePlan& p) {
    for (int i = 0; i < S::lanes; ++i) total[i] = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      const auto* from = static_cast<const typename S::Scalar*>(partials) +
                         (slot * rows + row) * p.padded_channels() + c;
      for (int i = 0; i < S::lanes; ++i) total[i] += from[i];
    }
  }
};

template <class T>
void merge_bn_gradients(const DepthwiseBackward& a, const DepthwisePlan& p, int block,
                        const void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const Block b = block_at(a.shape, p, block);
  for (int v = 0; v < b.vectors; ++v) {
    const int64_t c = b.channel + v * S::lanes;
    const int channels = v == b.vectors - 1 ? b.last_channels : S::lanes;
    const SlotSums<S> sum(partials, kBnGradientRows, 0, c, p);
    const SlotSums<S> product(partials, kBnGradientRows, 1, c, p);
    F var[S::lanes];
    pack_channels(var, a.bn.var, F(1), p, Block{0, 1, c, channels});
    for (int i = 0; i < channels; ++i) {
      static_cast<F*>(a.grad_bn_bias)[c + i] = static_cast<F>(sum.total[i]);
      static_cast<F*>(a.grad_bn_weight)[c + i] =
          static_cast<F>(product.total[i] / std::sqrt(var[i] + a.bn.eps));
    }
  }
}

// dz = scale * du - constant - (conv - mean) * slope: the last two are zero for frozen statistics.
template <class F>
void pack_dz(F* constant, F* slope, const PackedBatchNorm<F>& bn, const DepthwiseBackward& a,
             const DepthwisePlan& p, const Block& b) {
  const DepthwiseShape& s = a.shape;
  const int64_t channels = block_channels(p, b);
  clear(constant, int64_t{b.vectors} * p.lanes);
  clear(slope, int64_t{b.vectors} * p.lanes);
  if (!a.batch_stats) return;
  const F part = static_cast<F>(1 / (static_cast<double>(s.batch) * s.out_h * s.out_w));
  const F* sum = static_cast<const F*>(a.grad_bn_bias) + b.channel;
  const F* product = static_cast<const F*>(a.grad_bn_weight) + b.channel;
  for (int64_t i = 0; i < channels; ++i) {
    constant[i] = bn.scale[i] * (sum[i] * part);
    slope[i] = bn.scale[i] * bn.invstd[i] * (product[i] * part);
  }
}

// One pass over a unit for both gradients of the convolution. dz rows go into a ring of their own;
// each meets the k rows of the input that its windows cover (grad_weight), and each row of
// grad_input is emitted as soon as the last dz row that reaches it is there.
template <class T>
struct Gradients {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  static constexpr int L = S::lanes;

  Gradients(const DepthwiseBackward& args, const DepthwisePlan& plan, void* memory)
      : a(args),
        s(args.shape),
        p(plan),
        scratch(memory),
        conv(args.shape, plan, scratch),
        bn(scratch, plan),
        scale_sums(scratch, plan),
        shift_sums(scratch, plan) {
    const int64_t size = int64_t{p.block_vectors} * L;
    halo = (s.kernel - 1) / s.stride;
    grad_columns = grad_input_columns(s, p);
    dz_columns = grad_columns / s.stride + halo;
    dz.data = scratch.take(size * dz_columns * (halo + 1));
    dz.depth = halo + 1;
    grad_row = scratch.take(size * grad_columns);
    zeros = scratch.take(size * conv.in_columns);
    clear(zeros, size * conv.in_columns);
    constant = scratch.take(size);
    slope = scratch.take(size);
    grad_pooled = scratch.take(size);
    weight_sums = scratch.take(size * s.kernel * s.kernel);
  }

  // The widest unit's columns of grad_input, plus those before its first tile boundary.
  static int grad_input_columns(const DepthwiseShape& s, const DepthwisePlan& p) {
    const int own = p.strips == 1
                        ? s.in_w
                        : greater(p.strip_cols * s.stride,
                                  s.in_w - ((p.strips - 1) * p.strip_cols * s.stride - s.pad_left));
    return round_up(own + s.stride - 1, p.grad_tile);
  }

  static int64_t scratch_size(const DepthwiseShape& s, const DepthwisePlan& p) {
    const int64_t halo = (s.kernel - 1) / s.stride, columns = grad_input_columns(s, p);
    const int64_t out = round_up(lesser(p.strip_cols, s.out_w), p.tile);
    return Convolution<T>::scratch_size(s, p) +
           int64_t{p.block_vectors} * L *
               ((columns / s.stride + halo) * (halo + 1) + columns +
                ((out - 1) * s.stride + s.kernel) + 12 + s.kernel * s.kernel);
  }

  void run_dz_row(const Unit& u, int oh) {
    const Columns& c = dz.columns;
    const int64_t offset =
        ((u.n * s.out_h + oh) * s.out_w + c.origin + c.lo) * s.channels + b.channel;
    F* row = dz.row(oh, b.vectors);
    with_activation(a.activation, [&](auto act) {
      for_each_vector(b, L, [&](int v, auto partial) {
        constexpr bool Partial = decltype(partial)::value;
        const T* z_from = static_cast<const T*>(a.conv) + offset + v * L;
        const T* g_from = static_cast<const T*>(a.grad_output) + offset + v * L;
        F* to = row + (int64_t{v} * c.count + c.lo) * L;
        const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
        const V bias = S::load(bn.bias + v * L), more = S::load(grad_pooled + v * L);
        const V subtract = S::load(constant + v * L), factor = S::load(slope + v * L);
        for (int x = c.lo; x < c.hi; ++x, z_from += s.channels, g_from += s.channels, to += L) {
          const V d = load_channels<T, Partial>(z_from, b.last_channels) - mean;
          const V g = load_channels<T, Partial>(g_from, b.last_channels) + more;
          const V du = g * activate_grad<S>(decltype(act)::value, S::fma(d, scale, bias));
          S::store(to, S::fma(du, scale, S::fma(d, -factor, -subtract)));
        }
      });
    });
  }

  // dz rows up to `end`; those that the unit owns are correlated with the input.
  void run_dz_rows(const Unit& u, int end) {
    for (; dz.next < end; ++dz.next) {
      const int oh = dz.next;
      run_dz_row(u, oh);
      if (a.grad_weight == nullptr || oh < u.oh0 || oh >= u.oh1) continue;
      const int top = oh * s.stride - s.pad_top;
      const int lo = greater(-top, 0), hi = lesser(s.kernel, s.in_h - top);
      load_rows<T>(conv.ring, top + hi, static_cast<const T*>(a.input), s, u, b, conv.prologue,
                   conv.activation);
      const F* rows[kMaxKernel];
      for (int i = 0; i < s.kernel; ++i) {
        rows[i] = i < lo || i >= hi ? zeros : conv.ring.row(top + i, b.vectors);
      }
      conv.loops.correlate_with_gradient(
          weight_sums, dz.row(oh, b.vectors) + int64_t{u.ow0 - dz.columns.origin} * L, dz_columns,
          u.ow1 - u.ow0, rows, conv.in_columns, b.vectors);
    }
  }

  // grad_input's row ih is in grad_row, from column iw0 - skip on.
  void emit_row(const Unit& u, int ih, int skip) {
    const int64_t channels = s.channels;
    const int count = u.iw1 - u.iw0;
    const int64_t offset = ((u.n * s.in_h + ih) * s.in_w + u.iw0) * s.channels + b.channel;
    const PackedPrologue<F>& pro = conv.prologue;
    if (!pro.present) {
      for_each_vector(b, L, [&](int v, auto partial) {
        const F* from = grad_row + (int64_t{v} * grad_columns + skip) * L;
        T* to = static_cast<T*>(a.grad_input) + offset + v * L;
        for (int x = 0; x < count; ++x, from += L, to += s.channels) {
          store_channels<T, decltype(partial)::value>(to, S::load(from), b.last_channels);
        }
      });
      return;
    }
    with_activation(conv.activation, [&](auto act) {
      for_each_vector(b, L, [&](int v, auto partial) {
        constexpr bool Partial = decltype(partial)::value;
        const F* from = grad_row + (int64_t{v} * grad_columns + skip) * L;
        const T* in = static_cast<const T*>(a.input) + offset + v * L;
        T* to = static_cast<T*>(a.grad_input) + offset + v * L;
        const V scale = S::load(pro.scale + v * L), shift = S::load(pro.shift + v * L);
        Parts<S> sum, product;
        for_each_column(count, [&](int x, int part) {
          const V value = load_channels<T, Partial>(in + x * channels, b.last_channels);
          const V dv = S::load(from + int64_t{x} * L) *
                       activate_grad<S>(decltype(act)::value, S::fma(value, scale, shift));
          product.part[part] = S::fma(dv, value, product.part[part]);
          sum.part[part] = sum.part[part] + dv;
          store_channels<T, Partial>(to + x * channels, dv * scale, b.last_channels);
        });
        scale_sums.add(v, product.sum());
        shift_sums.add(v, sum.sum());
      });
    });
  }

  void run_unit(const Unit& u) {
    pack_grad_pooled(grad_pooled, a, u.n, p, b);
    // Tiles begin where the padded column is a multiple of the stride.
    const int first = u.iw0 + s.pad_left, skip = first % s.stride;
    const int origin = (first - skip) / s.stride - halo;
    const int dz_end = (u.iw1 - 1 + s.pad_left) / s.stride + 1;
    dz.start(columns_of(dz_columns, origin, dz_end - origin, s.out_w),
             greater((u.ih0 + s.pad_top) / s.stride - halo, 0), b.vectors);
    conv.ring.start(columns_of(conv.in_columns, u.ow0 * s.stride - s.pad_left,
                               (u.ow1 - u.ow0 - 1) * s.stride + s.kernel, s.in_w),
                    greater(u.oh0 * s.stride - s.pad_top, 0), b.vectors);
    if (a.grad_input != nullptr) {
      for (int ih = u.ih0; ih < u.ih1; ++ih) {
        const int padded = ih + s.pad_top;
        run_dz_rows(u, lesser(padded / s.stride + 1, s.out_h));
        const F* rows[kMaxKernel];
        int taps[kMaxKernel];
        int row_count = 0;
        for (int i = padded % s.stride; i < s.kernel; i += s.stride) {
          const int oh = (padded - i) / s.stride;
          if (padded < i || oh >= s.out_h) continue;
          rows[row_count] = dz.row(oh, b.vectors);
          taps[row_count++] = i;
        }
        conv.loops.transpose(grad_row, grad_columns, rows, taps, row_count, dz_columns, conv.weight,
                             b.vectors);
        emit_row(u, ih, skip);
      }
    }
    run_dz_rows(u, u.oh1);
  }

  void run(int64_t begin, int64_t end, void* partials) {
    const int taps = s.kernel * s.kernel;
    const int64_t padded = p.padded_channels();
    for_each_item(p, begin, end, [&](int block, int64_t slot) {
      b = block_at(s, p, block);
      conv.start_block(b, static_cast<const T*>(a.weight), a.prologue);
      bn.start_block(a.bn, p, b);
      pack_dz(constant, slope, bn, a, p, b);
      clear(weight_sums, int64_t{b.vectors} * L * taps);
      scale_sums.clear(b.vectors);
      shift_sums.clear(b.vectors);
      for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
        run_unit(unit_at(s, p, unit));
      }
      F* to = static_cast<F*>(partials) + slot * gradient_rows(s.kernel) * padded + b.channel;
      for (int v = 0; v < b.vectors; ++v, to += L) {
        for (int tap = 0; tap < taps; ++tap) {
          S::store(to + tap * padded, S::load(weight_sums + (v * taps + tap) * L));
        }
        S::store(to + taps * padded, scale_sums[v]);
        S::store(to + (taps + 1) * padded, shift_sums[v]);
      }
    });
  }

  const DepthwiseBackward& a;
  DepthwiseShape s;
  DepthwisePlan p;
  Scratch<F> scratch;
  Convolution<T> conv;
  PackedBatchNorm<F> bn;
  RowSums<S> scale_sums, shift_sums;
  Block b;
  int halo, grad_columns, dz_columns;
  Ring<S> dz;
  F *grad_row, *zeros;
  F *constant, *slope, *grad_pooled, *weight_sums;
};

template <class T>
void gradients(const DepthwiseBackward& a, const DepthwisePlan& p, int64_t begin, int64_t end,
               void* memory, void* partials) {
  Gradients<T>(a, p, memory).run(begin, end, partials);
}

template <class T>
void merge_gradients(const DepthwiseBackward& a, const DepthwisePlan& p, int block,
                     const void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const Block b = block_at(a.shape, p, block);
  const int taps = a.shape.kernel * a.shape.kernel, rows = gradient_rows(a.shape.kernel);
  for (int v = 0; v < b.vectors; ++v) {
    const int64_t c = b.channel + v * S::lanes;
    const int channels = v == b.vectors - 1 ? b.last_channels : S::lanes;
    if (a.grad_weight != nullptr) {
      T* to = static_cast<T*>(a.grad_weight) + c * taps;
      for (int tap = 0; tap < taps; ++tap) {
        const SlotSums<S> sum(partials, rows, tap, c, p);
        for (int i = 0; i < channels; ++i) {
          to[i * taps + tap] = Round<T>::from(static_cast<F>(sum.total[i]));
        }
      }
    }
    if (a.grad_prologue_scale != nullptr) {
      const SlotSums<S> scale(partials, rows, taps, c, p), shift(partials, rows, taps + 1, c, p);
      for (int i = 0; i < channels; ++i) {
        static_cast<F*>(a.grad_prologue_scale)[c + i] = static_cast<F>(scale.total[i]);
        static_cast<F*>(a.grad_prologue_shift)[c + i] = static_cast<F>(shift.total[i]);
      }
    }
  }
}

template <class T>
size_t scratch_bytes(const DepthwiseShape& s, const DepthwisePlan& p) {
  using F = typename Simd<T>::Scalar;
  // Room for the pieces' rounding to cache lines, and for the per-channel values of any kernel.
  const int64_t slack = 32 * 64 / sizeof(F) + int64_t{p.block_vectors} * p.lanes * 16 +
                        int64_t{p.padded_channels()} * PackedBatchNorm<F>::kVectors + 2 * p.blocks;
  return static_cast<size_t>(Gradients<T>::scratch_size(s, p) + slack) * sizeof(F);
}

template <class T>
const DepthwiseKernels* kernels_of() {
  using S = Simd<T>;
  static constexpr DepthwiseKernels kernels = {
      S::lanes,     S::registers,       sizeof(typename S::Scalar),
      inference<T>, convolve<T>,        merge_statistics<T>,
      normalize<T>, reduce<T>,          merge_bn_gradients<T>,
      gradients<T>, merge_gradients<T>, scratch_bytes<T>};
  return &kernels;
}

}  // namespace

const DepthwiseKernels* depthwise_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16:
      return kernels_of<bfloat16>();
#if !defined(EFFNET_TARGET_AVX512BF16)
    case Dtype::float32:
      return kernels_of<float>();
    case Dtype::float16:
      return kernels_of<half>();
#endif
#if defined(EFFNET_TARGET_BASELINE)
    case Dtype::float64:
      return kernels_of<double>();
#endif
    default:
      return nullptr;
  }
}

}  // namespace EFFNET_ISA
}  // namespace effnet
