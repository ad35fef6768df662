// The kernels of the depthwise op, compiled once for each instruction set.
//
// Rows of the input are widened to float32 (through the prologue, where there is one) into a ring
// of k rows, vector by vector: element (v, x) of a row, a vector of `lanes` channels, is at (v *
// columns + x) * lanes, with the zero padding in place. So each input element is converted once and
// the inner loops see aligned float32 with no borders. Where there is nothing to convert, they read
// the tensor itself. Either way the sums stay in registers until they are final:
//
//   input (N, H, W, C) [--load_rows--> ring [k][v][x]] --correlate--> sink: BN, activation, pooled
//                                                      sums or batch statistics --> output
//
// The loops over taps hold a tile of output columns in registers: each vector that is loaded meets
// every tap that needs it. In inference BN is part of the weights and of what the sums begin with.
#pragma once

#include "depthwise_loops.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// Where the transpose puts a row: column x of vector v at to + v * pitch + x * step, for the
// columns in [lo, hi).
template <class F>
struct GradientRow {
  F* to;
  int64_t pitch, step;
  int lo, hi;
};

// The transpose: out[x] = sum over rows r and over q, j with q * stride + j = x of
// rows[r][q + halo] * w[taps[r]][j], where halo = (K - 1) / stride is how far rows begin earlier.
template <class S, int K, int Stride, int Tile>
void transpose(const GradientRow<typename S::Scalar>& target, const typename S::Scalar* const* rows,
               const int* taps, int row_count, int columns, const typename S::Scalar* weights,
               int vectors) {
  using V = typename S::V;
  constexpr int L = S::lanes, Halo = (K - 1) / Stride;
  static_assert(Tile % Stride == 0, "tiles start at tap 0");
  const GradientRow<typename S::Scalar> out = target;
  for (int v = 0; v < vectors; ++v) {
    const int64_t base = int64_t{v} * columns * L;
    for (int x = 0; x < out.hi; x += Tile) {
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
            if (t >= 0 && t < Tile) S::accumulate(sum[t], value, tap[j]);
          }
        }
      }
      auto* to = out.to + v * out.pitch + x * out.step;
      if (x >= out.lo && x + Tile <= out.hi) {
        EFFNET_UNROLL
        for (int t = 0; t < Tile; ++t) S::store(to + t * out.step, sum[t]);
      } else {
        EFFNET_UNROLL
        for (int t = 0; t < Tile; ++t) {
          if (x + t >= out.lo && x + t < out.hi) S::store(to + t * out.step, sum[t]);
        }
      }
    }
  }
}

// The rows of the input under the windows of a row of dz: column c of vector v of row i is at
// rows[i] + v * pitch + c * step. Rows [lo, hi) of the kernel meet the input. All K columns of
// result x do where x is in [first, last); of the others those in [0, width) do.
template <class F>
struct InputRows {
  const F* rows[kMaxKernel];
  int64_t pitch, step;
  int lo, hi;
  int origin;  // the column that tap 0 of the first result meets
  int width;
  int first, last;
};

// sums[i][j] += sum over x < count of grad[x] * rows[i][x * stride + j], for Rows rows from `row`.
template <class S, int K, int Stride, int Rows>
EFFNET_INLINE void correlate_rows_with_gradient(typename S::Scalar* sums,
                                                const typename S::Scalar* grad, int count,
                                                const InputRows<typename S::Scalar>& input, int row,
                                                int v) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  V sum[Rows][K];
  const typename S::Scalar* in[Rows];
  EFFNET_UNROLL
  for (int i = 0; i < Rows; ++i) {
    in[i] = input.rows[row + i] + v * input.pitch + input.origin * input.step;
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) sum[i][j] = S::set(0.f);
  }
  const int64_t step = input.step;
  const auto add_checked = [&](int x) __attribute__((always_inline)) {
    const V g = S::load(grad + int64_t{x} * L);
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) {
      const int column = x * Stride + j;
      if (static_cast<unsigned>(input.origin + column) >= static_cast<unsigned>(input.width)) {
        continue;
      }
      EFFNET_UNROLL
      for (int i = 0; i < Rows; ++i) {
        S::accumulate(sum[i][j], S::load(in[i] + column * step), g);
      }
    }
  };
  for (int x = 0; x < input.first; ++x) add_checked(x);
  for (int x = input.first; x < input.last; ++x) {
    const V g = S::load(grad + int64_t{x} * L);
    EFFNET_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto* from = in[i] + x * Stride * step;
      EFFNET_UNROLL
      for (int j = 0; j < K; ++j) {
        S::accumulate_loaded(sum[i][j], from + j * step, g);
      }
    }
  }
  for (int x = input.last; x < count; ++x) add_checked(x);
  EFFNET_UNROLL
  for (int i = 0; i < Rows; ++i) {
    EFFNET_UNROLL
    for (int j = 0; j < K; ++j) {
      auto* to = sums + ((row + i) * K + j) * L;
      S::store(to, S::load(to) + sum[i][j]);
    }
  }
}

// The above for all rows that meet the input: as many at once as there are registers for their
// sums.
template <class S, int K, int Stride>
void correlate_with_gradient(typename S::Scalar* sums, const typename S::Scalar* grad,
                             int grad_columns, int count,
                             const InputRows<typename S::Scalar>& input, int vectors) {
  constexpr int L = S::lanes, Fit = (S::registers - 4) / K, Rows = Fit < K ? Fit : K;
  for (int v = 0; v < vectors; ++v) {
    auto* to = sums + v * K * K * L;
    const auto* g = grad + int64_t{v} * grad_columns * L;
    int i = input.lo;
    for (; i + Rows <= input.hi; i += Rows) {
      correlate_rows_with_gradient<S, K, Stride, Rows>(to, g, count, input, i, v);
    }
    for (; i < input.hi; ++i) {
      correlate_rows_with_gradient<S, K, Stride, 1>(to, g, count, input, i, v);
    }
  }
}

template <class S>
struct Loops {
  using F = typename S::Scalar;
  void (*transpose)(const GradientRow<F>&, const F* const*, const int*, int, int, const F*, int);
  void (*correlate_with_gradient)(F*, const F*, int, int, const InputRows<F>&, int);
};

template <class S, int K, int Stride, int Tile>
EFFNET_INLINE void set_tile(Loops<S>& loops, const DepthwisePlan& p) {
  if constexpr (Tile % Stride == 0) {
    if (p.grad_tile == Tile) loops.transpose = transpose<S, K, Stride, Tile>;
  }
}

template <class S, int K, int Stride>
Loops<S> loops_of(const DepthwisePlan& p) {
  Loops<S> loops{};
  set_tile<S, K, Stride, 4>(loops, p);
  set_tile<S, K, Stride, 7>(loops, p);
  set_tile<S, K, Stride, 8>(loops, p);
  loops.correlate_with_gradient = correlate_with_gradient<S, K, Stride>;
  return loops;
}

template <class S>
Loops<S> loops_for(const ConvShape& s, const DepthwisePlan& p) {
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

// Calls body(x, n) for groups [x, x + n) of [0, count); n is N, or 1 for those that are left.
template <int Value>
struct Int {
  static constexpr int value = Value;
};

template <int N, class Body>
EFFNET_INLINE void for_each_group(int count, const Body& body) {
  int x = 0;
  for (; x + N <= count; x += N) body(x, Int<N>{});
  for (; x < count; ++x) body(x, Int<1>{});
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

// The block's channels of `columns` columns of a row of the tensor, from `from` on: the pieces are
// too far apart for the processor to see that they follow each other.
template <class T>
EFFNET_INLINE void prefetch_row(const T* from, int64_t channels, int columns, const Block& b) {
  constexpr int Line = 64 / sizeof(T);
  const int piece = b.vectors * Simd<T>::lanes;
  for (int x = 0; x < columns; ++x, from += channels) {
    for (int c = 0; c < piece; c += Line) prefetch(from + c);
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
      for_each_group<4>(c.hi - c.lo, [&](int x, auto n) __attribute__((always_inline)) {
        constexpr int N = decltype(n)::value;
        typename S::V values[N];
        EFFNET_UNROLL
        for (int i = 0; i < N; ++i) {
          const auto value =
              load_channels<T, decltype(partial)::value>(in + (x + i) * channels, b.last_channels);
          values[i] = S::fma(value, scale, shift);
        }
        activate_all<S, N>(decltype(act)::value, values);
        EFFNET_UNROLL
        for (int i = 0; i < N; ++i) S::store(to + (x + i) * S::lanes, values[i]);
      });
    });
  });
}

// Rows of the input up to `end`, into the ring.
template <class T>
void load_rows(Ring<Simd<T>>& ring, int end, const T* input, const ConvShape& s, const Unit& u,
               const Block& b, const PackedPrologue<typename Simd<T>::Scalar>& prologue,
               Activation activation) {
  const Columns& c = ring.columns;
  for (; ring.next < end; ++ring.next) {
    const T* from =
        input + ((u.n * s.in_h + ring.next) * s.in_w + c.origin + c.lo) * s.channels + b.channel;
    auto* row = ring.row(ring.next, b.vectors);
    if (ring.next + 1 < s.in_h) {
      prefetch_row(from + int64_t{s.in_w} * s.channels, s.channels, c.hi - c.lo, b);
    }
    if (prologue.present) {
      load_row_through_prologue<T>(row, from, s.channels, c, b, prologue, activation);
    } else {
      load_row<T>(row, from, s.channels, c, b);
    }
  }
}

// ---- The forward convolution of a block of a unit. ----

// What a thread needs for the convolution: the ring, the packed weights and prologue of the block.
template <class T>
struct Convolution {
  using S = Simd<T>;
  using F = typename S::Scalar;

  Convolution(const ConvShape& shape, const DepthwisePlan& plan, Scratch<F>& scratch)
      : s(shape), p(plan) {
    const int64_t vectors = int64_t{p.block_vectors()} * S::lanes;
    out_columns = round_up(lesser(p.strip_cols, s.out_w), p.tile);
    in_columns = (out_columns - 1) * s.stride + s.kernel;
    ring.data = scratch.take(vectors * in_columns * s.kernel);
    ring.depth = s.kernel;
    weight = scratch.take(vectors * s.kernel * s.kernel);
    prologue.scale = scratch.take(vectors);
    prologue.shift = scratch.take(vectors);
  }

  static int64_t scratch_size(const ConvShape& s, const DepthwisePlan& p) {
    const int64_t out = round_up(lesser(p.strip_cols, s.out_w), p.tile);
    return int64_t{p.block_vectors()} * S::lanes *
           (((out - 1) * s.stride + s.kernel) * s.kernel + s.kernel * s.kernel + 2);
  }

  // scale: one factor a channel of the block for the weights, or null.
  void start_block(const Block& block, const T* weights, const F* scale, const Prologue& pro) {
    b = block;
    prologue.present = pro.scale != nullptr;
    activation = pro.activation;
    pack_weight(weight, weights, scale, s.kernel * s.kernel, p, b);
    if (prologue.present) {
      pack_vector(prologue.scale, static_cast<const F*>(pro.scale), p, b);
      pack_vector(prologue.shift, static_cast<const F*>(pro.shift), p, b);
    }
  }

  // The rows of the unit to the sink, each between start_row(oh) and end_row(). `start` is what
  // each channel's sums begin with.
  template <class Sink>
  EFFNET_INLINE void run(const Unit& u, const T* input, const F* start,
                         Correlate<S, Sink> correlate, Sink& sink) {
    const int count = u.ow1 - u.ow0;
    const int origin = u.ow0 * s.stride - s.pad_left;
    Window<S> window;
    window.ahead[0] = window.ahead[1] = nullptr;
    // Nothing to convert and whole vectors: the ring would only be a copy.
    bool in_place = false;
    if constexpr (sizeof(T) == sizeof(F)) {
      in_place = !prologue.present && b.last_channels == S::lanes;
    }
    if (in_place) {
      window.pitch = S::lanes;
      window.step = s.channels;
      window.origin = origin;
      window.width = s.in_w;
    } else {
      window.pitch = int64_t{in_columns} * S::lanes;
      window.step = S::lanes;
      window.origin = 0;
      window.width = in_columns;
      ring.start(columns_of(in_columns, origin, (count - 1) * s.stride + s.kernel, s.in_w),
                 greater(u.oh0 * s.stride - s.pad_top, 0), b.vectors);
    }
    const int64_t row_size = int64_t{s.in_w} * s.channels;
    for (int oh = u.oh0; oh < u.oh1; ++oh) {
      const int top = oh * s.stride - s.pad_top;
      window.lo = greater(-top, 0);
      window.hi = lesser(s.kernel, s.in_h - top);
      if constexpr (sizeof(T) == sizeof(F)) {
        if (in_place) {
          const F* rows = input + u.n * s.in_h * row_size + b.channel;
          for (int i = window.lo; i < window.hi; ++i) window.rows[i] = rows + (top + i) * row_size;
          // Beyond the last row of an image is the next image.
          const int64_t next = u.n * s.in_h + top + s.kernel;
          const F* ahead =
              input + next * row_size + b.channel + int64_t{u.ow0} * s.stride * s.channels;
          const bool none = !p.prefetch || next + s.stride > s.batch * s.in_h;
          window.ahead[0] = none ? nullptr : ahead;
          window.ahead[1] = none ? nullptr : ahead + row_size;
        }
      }
      if (!in_place) {
        load_rows<T>(ring, top + window.hi, input, s, u, b, prologue, activation);
        for (int i = window.lo; i < window.hi; ++i) window.rows[i] = ring.row(top + i, b.vectors);
      }
      sink.start_row(oh);
      correlate(window, weight, start, count, b.vectors, sink);
      sink.end_row();
    }
  }

  ConvShape s;
  DepthwisePlan p;
  Block b;
  int out_columns, in_columns;
  Ring<S> ring;
  F* weight;
  PackedPrologue<F> prologue;
  Activation activation;
};

// Calls body(block, slot) for items [begin, end), block after block, so that each is packed once.
// Threads have slots of their own and not blocks, whose pieces of memory alternate: the prefetchers
// of one core would take the other's lines.
template <class Body>
EFFNET_INLINE void for_each_item(const DepthwisePlan& p, int64_t begin, int64_t end,
                                 const Body& body) {
  const auto first_slot = [&](int64_t item, int block) {
    return item <= block ? 0 : (item - block + p.blocks - 1) / p.blocks;
  };
  for (int block = 0; block < p.blocks; ++block) {
    for (int64_t slot = first_slot(begin, block); slot < first_slot(end, block); ++slot) {
      body(block, slot);
    }
  }
}

// The units of a slot are [first_unit(slot), first_unit(slot + 1)).
EFFNET_INLINE int64_t first_unit(const ConvShape& s, const DepthwisePlan& p, int64_t slot) {
  const int64_t units = p.units(s), each = units / p.slots, extra = units % p.slots;
  return slot * each + (slot < extra ? slot : extra);
}

// The sums over a unit, [v][lanes], to the unit's row of pooled.
template <class F>
void store_pooled(void* pooled, const F* sums, int64_t unit, const ConvShape& s,
                  const DepthwisePlan& p, const Block& b) {
  F* to = static_cast<F*>(pooled) + unit * s.channels + b.channel;
  const int64_t channels = block_channels(p, b);
  for (int64_t i = 0; i < channels; ++i) to[i] = sums[i];
}

// Results of the convolution with BN folded in -> activation -> tensor, and pooled sums.
template <class T>
struct InferenceSink {
  using S = Simd<T>;
  const DepthwiseInference* a;
  const Block* b;
  const Unit* u;
  Activation activation;
  RowSums<S>* sums;  // or null
  OutputRow<T> row;

  EFFNET_INLINE void start_row(int oh) { row.start(a->output, a->shape, *b, *u, oh); }

  template <int Tile>
  EFFNET_INLINE void take(typename S::V (&sum)[Tile], int x, int v) const {
    row.template prefetch_below<Tile>(x, v);
    activate_tile<S>(activation, sum);
    row.store(sum, x, v);
    if (sums != nullptr) sums->add(v, sum_of_tile<S>(sum, x, row.count));
  }

  EFFNET_INLINE void end_row() const {}
};

template <class T>
void inference(const DepthwiseInference& a, const DepthwisePlan& p, int64_t begin, int64_t end,
               void* memory, void* pooled) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  const ConvShape& s = a.shape;
  const T* input = static_cast<const T*>(a.input);
  Scratch<F> scratch(memory);
  Convolution<T> conv(s, p, scratch);
  PackedBatchNorm<F> bn(scratch, p);
  RowSums<S> sums(scratch, p);
  const auto correlate = correlate_for<T, InferenceSink<T>>(s, p.tile);

  int packed = -1;
  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    if (block != packed) {
      bn.start_block(a.bn, p, b);
      conv.start_block(b, static_cast<const T*>(a.weight), bn.scale, a.prologue);
      packed = block;
    }
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      InferenceSink<T> sink{
          &a, &b, &u, a.activation, pooled == nullptr ? nullptr : &sums, OutputRow<T>(s, p, b, u)};
      if (pooled != nullptr) sums.clear(b.vectors);
      conv.run(u, input, bn.shift, correlate, sink);
      if (pooled != nullptr) store_pooled(pooled, sums.data(), unit, s, p, b);
    }
  });
}

// ---- Training. ----

// Results of the convolution -> tensor, and their statistics.
template <class T>
struct ConvolutionSink {
  using S = Simd<T>;
  using F = typename S::Scalar;
  using V = typename S::V;
  static constexpr int L = S::lanes;

  ConvolutionSink(const DepthwiseTraining& arguments, const DepthwisePlan& plan,
                  Scratch<F>& scratch)
      : a(&arguments),
        p(&plan),
        batch_stats(arguments.batch_stats),
        totals(scratch, plan),
        squares(scratch, plan),
        origin(scratch.take(int64_t{plan.block_vectors()} * L)),
        row_sums(scratch.take(int64_t{plan.block_vectors()} * L)),
        row_squares(scratch.take(int64_t{plan.block_vectors()} * L)) {}

  void start(const Block& block) {
    b = &block;
    total = 0;
    totals.clear(b->vectors);
    squares.clear(b->vectors);
  }

  void start_unit(const Unit& unit) {
    u = &unit;
    row = OutputRow<T>(a->shape, *p, *b, unit);
  }

  EFFNET_INLINE void start_row(int oh) {
    row.start(a->conv, a->shape, *b, *u, oh);
    // Deviations from the mean so far: exact enough when it is far from zero.
    const V before = S::set(total == 0 ? F(1) : F(1) / static_cast<F>(total));
    for (int v = 0; v < b->vectors; ++v) {
      S::store(origin + v * L, totals[v] * before);
      S::store(row_sums + v * L, S::set(0.f));
      S::store(row_squares + v * L, S::set(0.f));
    }
  }

  template <int Tile>
  EFFNET_INLINE void take(V (&sum)[Tile], int x, int v) const {
    const int count = row.count;
    // Statistics of the stored values: those of others would not normalise them.
    EFFNET_UNROLL
    for (int t = 0; t < Tile; ++t) sum[t] = rounded<T>(sum[t]);
    row.template prefetch_below<Tile>(x, v);
    row.store(sum, x, v);
    if (!batch_stats) return;
    V from = S::load(origin + v * L);
    if (total == 0 && x == 0) {
      // The first row's are from a value inside it, since the border sees zeros.
      from = Tile / 2 < count ? sum[Tile / 2] : sum[0];
      S::store(origin + v * L, from);
    }
    V sums[2] = {S::load(row_sums + v * L), S::set(0.f)};
    V products[2] = {S::load(row_squares + v * L), S::set(0.f)};
    EFFNET_UNROLL
    for (int t = 0; t < Tile; ++t) {
      if (x + t < count) {
        const V d = sum[t] - from;
        sums[t % 2] = sums[t % 2] + d;
        products[t % 2] = S::fma(d, d, products[t % 2]);
      }
    }
    S::store(row_sums + v * L, sums[0] + sums[1]);
    S::store(row_squares + v * L, products[0] + products[1]);
  }

  EFFNET_INLINE void end_row() {
    if (!batch_stats) return;
    const int count = row.count;
    total += count;
    const V columns = S::set(static_cast<F>(count));
    const V inverse = S::set(F(1) / static_cast<F>(total));
    for (int v = 0; v < b->vectors; ++v) {
      const V from = S::load(origin + v * L), sum = S::load(row_sums + v * L);
      const V product = from * columns;
      // The rounding of the product, where fma is one instruction.
      const ExactSum<S> exact(product, S::fma(from, columns, -product));
      totals.add(v, exact);
      totals.add(v, sum);
      squares.add(v, S::load(row_squares + v * L) - sum * sum * inverse);
    }
  }

  const DepthwiseTraining* a;
  const DepthwisePlan* p;
  bool batch_stats;
  const Unit* u;
  const Block* b;
  int64_t total;  // columns so far
  RowSums<S> totals, squares;
  F *origin, *row_sums, *row_squares;
  OutputRow<T> row;
};

template <class T>
void convolve(const DepthwiseTraining& a, const DepthwisePlan& p, int64_t begin, int64_t end,
              void* memory, void* partials) {
  using S = Simd<T>;
  using F = typename S::Scalar;
  constexpr int L = S::lanes;
  const ConvShape& s = a.shape;
  const T* input = static_cast<const T*>(a.input);
  const int64_t padded = p.padded_channels();
  Scratch<F> scratch(memory);
  Convolution<T> conv(s, p, scratch);
  ConvolutionSink<T> sink(a, p, scratch);
  F* zeros = scratch.take(int64_t{p.block_vectors()} * L);
  clear(zeros, int64_t{p.block_vectors()} * L);
  const auto correlate = correlate_for<T, ConvolutionSink<T>>(s, p.tile);

  int packed = -1;
  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    if (block != packed) {
      conv.start_block(b, static_cast<const T*>(a.weight), nullptr, a.prologue);
      packed = block;
    }
    sink.start(b);
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      sink.start_unit(u);
      conv.run(u, input, zeros, correlate, sink);
    }
    if (a.batch_stats) {
      F* to = static_cast<F*>(partials) + slot * kStatisticsRows * padded + b.channel;
      for (int64_t i = 0; i < int64_t{b.vectors} * L; ++i) {
        to[i] = sink.totals.data()[i];
        to[padded + i] = sink.totals.lost()[i];
        to[2 * padded + i] = sink.squares.data()[i];
      }
    }
  });
}

EFFNET_INLINE int64_t slot_elements(const ConvShape& s, const DepthwisePlan& p, int64_t slot) {
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
  const ConvShape& s = a.shape;
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
  const ConvShape& s = a.shape;
  const int64_t channels = s.channels;
  Scratch<F> scratch(memory);
  PackedBatchNorm<F> bn(scratch, p);
  RowSums<S> sums(scratch, p);

  int packed = -1;
  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    if (block != packed) bn.start_block(a.bn, p, b);
    packed = block;
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      if (pooled != nullptr) sums.clear(b.vectors);
      for (int oh = u.oh0; oh < u.oh1; ++oh) {
        const int64_t offset = ((u.n * s.out_h + oh) * s.out_w + u.ow0) * channels + b.channel;
        const T* row = static_cast<const T*>(a.conv) + offset;
        T* output = static_cast<T*>(a.output) + offset;
        // Channels are the inner loop: the tensors are read in the order of their memory.
        with_activation(a.activation, [&](auto act) {
          for_each_group<8>(u.ow1 - u.ow0, [&](int x, auto n) __attribute__((always_inline)) {
            constexpr int N = decltype(n)::value;
            for_each_vector(b, L, [&](int v, auto partial) __attribute__((always_inline)) {
              constexpr bool Partial = decltype(partial)::value;
              const T* from = row + x * channels + v * L;
              T* to = output + x * channels + v * L;
              const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
              const V bias = S::load(bn.bias + v * L);
              V values[N];
              EFFNET_UNROLL
              for (int i = 0; i < N; ++i) {
                const V z = load_channels<T, Partial>(from + i * channels, b.last_channels);
                values[i] = S::fma(z - mean, scale, bias);
              }
              activate_all<S, N>(decltype(act)::value, values);
              EFFNET_UNROLL
              for (int i = 0; i < N; ++i) {
                store_channels<T, Partial>(to + i * channels, values[i], b.last_channels);
              }
              if (pooled != nullptr) sums.add(v, sum_of_tile<S>(values, 0, N));
            });
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
  const ConvShape& s = a.shape;
  const int64_t channels = s.channels;
  const int64_t padded = p.padded_channels();
  const int64_t size = int64_t{p.block_vectors()} * L;
  Scratch<F> scratch(memory);
  PackedBatchNorm<F> bn(scratch, p);
  F* grad_pooled = scratch.take(size);
  F *row_sums = scratch.take(size), *row_products = scratch.take(size);
  RowSums<S> sums(scratch, p), products(scratch, p);

  int packed = -1;
  for_each_item(p, begin, end, [&](int block, int64_t slot) {
    const Block b = block_at(s, p, block);
    if (block != packed) bn.start_block(a.bn, p, b);
    packed = block;
    sums.clear(b.vectors);
    products.clear(b.vectors);
    for (int64_t unit = first_unit(s, p, slot); unit < first_unit(s, p, slot + 1); ++unit) {
      const Unit u = unit_at(s, p, unit);
      pack_grad_pooled(grad_pooled, a, u.n, p, b);
      for (int oh = u.oh0; oh < u.oh1; ++oh) {
        const int64_t offset = ((u.n * s.out_h + oh) * s.out_w + u.ow0) * channels + b.channel;
        const T* z_row = static_cast<const T*>(a.conv) + offset;
        const T* g_row = static_cast<const T*>(a.grad_output) + offset;
        clear(row_sums, int64_t{b.vectors} * L);
        clear(row_products, int64_t{b.vectors} * L);
        // Channels are the inner loop: the tensors are read in the order of their memory.
        with_activation(a.activation, [&](auto act) {
          for_each_group<4>(u.ow1 - u.ow0, [&](int x, auto n) __attribute__((always_inline)) {
            constexpr int N = decltype(n)::value;
            for_each_vector(b, L, [&](int v, auto partial) __attribute__((always_inline)) {
              constexpr bool Partial = decltype(partial)::value;
              const T* z_from = z_row + x * channels + v * L;
              const T* g_from = g_row + x * channels + v * L;
              const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
              const V bias = S::load(bn.bias + v * L), more = S::load(grad_pooled + v * L);
              V d[N], slopes[N];
              EFFNET_UNROLL
              for (int i = 0; i < N; ++i) {
                d[i] = load_channels<T, Partial>(z_from + i * channels, b.last_channels) - mean;
                slopes[i] = S::fma(d[i], scale, bias);
              }
              activate_grad_all<S, N>(decltype(act)::value, slopes);
              V sum = S::load(row_sums + v * L), product = S::load(row_products + v * L);
              EFFNET_UNROLL
              for (int i = 0; i < N; ++i) {
                const V g = load_channels<T, Partial>(g_from + i * channels, b.last_channels);
                const V du = (g + more) * slopes[i];
                sum = sum + du;
                product = S::fma(du, d[i], product);
              }
              S::store(row_sums + v * L, sum);
              S::store(row_products + v * L, product);
            });
          });
        });
        for (int v = 0; v < b.vectors; ++v) {
          sums.add(v, S::load(row_sums + v * L));
          products.add(v, S::load(row_products + v * L));
        }
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
    for (int i = 0; i < channels; ++i) {
      static_cast<F*>(a.grad_bn_bias)[c + i] = static_cast<F>(sum.total[i]);
      static_cast<F*>(a.grad_bn_weight)[c + i] = static_cast<F>(
          product.total[i] / std::sqrt(channel_value(a.bn.var, c + i, F(1)) + a.bn.eps));
    }
  }
}

// dz = scale * du - constant - (conv - mean) * slope: the last two are zero for frozen statistics.
template <class F>
void pack_dz(F* constant, F* slope, const PackedBatchNorm<F>& bn, const DepthwiseBackward& a,
             const DepthwisePlan& p, const Block& b) {
  const ConvShape& s = a.shape;
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
        loops(loops_for<S>(args.shape, plan)),
        bn(scratch, plan),
        scale_sums(scratch, plan),
        shift_sums(scratch, plan) {
    const int64_t size = int64_t{p.block_vectors()} * L;
    halo = (s.kernel - 1) / s.stride;
    grad_columns = grad_input_columns(s, p);
    dz_columns = grad_columns / s.stride + halo;
    dz.data = scratch.take(size * dz_columns * (halo + 1));
    dz.depth = halo + 1;
    grad_row = scratch.take(size * grad_columns);
    constant = scratch.take(size);
    slope = scratch.take(size);
    grad_pooled = scratch.take(size);
    weight_sums = scratch.take(size * s.kernel * s.kernel);
  }

  // The widest unit's columns of grad_input, plus those before its first tile boundary.
  static int grad_input_columns(const ConvShape& s, const DepthwisePlan& p) {
    const int own = p.strips == 1
                        ? s.in_w
                        : greater(p.strip_cols * s.stride,
                                  s.in_w - ((p.strips - 1) * p.strip_cols * s.stride - s.pad_left));
    return round_up(own + s.stride - 1, p.grad_tile);
  }

  static int64_t scratch_size(const ConvShape& s, const DepthwisePlan& p) {
    const int64_t halo = (s.kernel - 1) / s.stride, columns = grad_input_columns(s, p);
    return Convolution<T>::scratch_size(s, p) +
           int64_t{p.block_vectors()} * L *
               ((columns / s.stride + halo) * (halo + 1) + columns + 12 + s.kernel * s.kernel);
  }

  void run_dz_row(const Unit& u, int oh) {
    const Columns& c = dz.columns;
    const int64_t channels = s.channels;
    const int64_t offset =
        ((u.n * s.out_h + oh) * s.out_w + c.origin + c.lo) * s.channels + b.channel;
    F* row = dz.row(oh, b.vectors);
    if (oh + 1 < s.out_h) {
      const int64_t next = offset + int64_t{s.out_w} * channels;
      prefetch_row(static_cast<const T*>(a.conv) + next, channels, c.hi - c.lo, b);
      prefetch_row(static_cast<const T*>(a.grad_output) + next, channels, c.hi - c.lo, b);
    }
    with_activation(a.activation, [&](auto act) {
      for_each_vector(b, L, [&](int v, auto partial) {
        constexpr bool Partial = decltype(partial)::value;
        const T* z_from = static_cast<const T*>(a.conv) + offset + v * L;
        const T* g_from = static_cast<const T*>(a.grad_output) + offset + v * L;
        F* to = row + (int64_t{v} * c.count + c.lo) * L;
        const V mean = S::load(bn.mean + v * L), scale = S::load(bn.scale + v * L);
        const V bias = S::load(bn.bias + v * L), more = S::load(grad_pooled + v * L);
        const V subtract = S::load(constant + v * L), factor = S::load(slope + v * L);
        for_each_group<4>(c.hi - c.lo, [&](int x, auto n) __attribute__((always_inline)) {
          constexpr int N = decltype(n)::value;
          V d[N], slopes[N];
          EFFNET_UNROLL
          for (int i = 0; i < N; ++i) {
            d[i] = load_channels<T, Partial>(z_from + (x + i) * channels, b.last_channels) - mean;
            slopes[i] = S::fma(d[i], scale, bias);
          }
          activate_grad_all<S, N>(decltype(act)::value, slopes);
          EFFNET_UNROLL
          for (int i = 0; i < N; ++i) {
            const V g = load_channels<T, Partial>(g_from + (x + i) * channels, b.last_channels);
            const V du = (g + more) * slopes[i];
            S::store(to + (x + i) * L, S::fma(du, scale, S::fma(d[i], -factor, -subtract)));
          }
        });
      });
    });
  }

  // dz rows up to `end`; those that the unit owns are correlated with the input.
  void run_dz_rows(const Unit& u, int end) {
    for (; dz.next < end; ++dz.next) {
      const int oh = dz.next;
      run_dz_row(u, oh);
      if (a.grad_weight != nullptr && oh >= u.oh0 && oh < u.oh1) add_to_weight(u, oh);
    }
  }

  // Whether the block's rows of the input and of its gradient are used where they lie: nothing to
  // convert, and whole vectors.
  bool in_place() const {
    return sizeof(T) == sizeof(F) && !conv.prologue.present && b.last_channels == L;
  }

  void add_to_weight(const Unit& u, int oh) {
    const int top = oh * s.stride - s.pad_top, left = u.ow0 * s.stride - s.pad_left;
    const int count = u.ow1 - u.ow0;
    InputRows<F> input;
    input.lo = greater(-top, 0);
    input.hi = lesser(s.kernel, s.in_h - top);
    if (in_place()) {
      if constexpr (sizeof(T) == sizeof(F)) {
        const int64_t row_size = int64_t{s.in_w} * s.channels;
        const F* image = static_cast<const F*>(a.input) + u.n * s.in_h * row_size + b.channel;
        for (int i = input.lo; i < input.hi; ++i) input.rows[i] = image + (top + i) * row_size;
        // The rows that the next row of dz adds to these.
        for (int i = s.kernel; i < s.kernel + s.stride && top + i < s.in_h; ++i) {
          prefetch_row(image + (top + i) * row_size + u.iw0 * s.channels, s.channels, u.iw1 - u.iw0,
                       b);
        }
      }
      input.pitch = L;
      input.step = s.channels;
      input.origin = left;
      input.width = s.in_w;
      input.first = lesser((greater(-left, 0) + s.stride - 1) / s.stride, count);
      const int room = s.in_w - left - s.kernel;
      input.last = greater(lesser(room < 0 ? 0 : room / s.stride + 1, count), input.first);
    } else {
      load_rows<T>(conv.ring, top + input.hi, static_cast<const T*>(a.input), s, u, b,
                   conv.prologue, conv.activation);
      for (int i = input.lo; i < input.hi; ++i) {
        input.rows[i] = conv.ring.row(top + i, b.vectors);
      }
      input.pitch = int64_t{conv.in_columns} * L;
      input.step = L;
      input.origin = 0;
      input.width = conv.in_columns;
      input.first = 0;
      input.last = count;
    }
    loops.correlate_with_gradient(weight_sums,
                                  dz.row(oh, b.vectors) + int64_t{u.ow0 - dz.columns.origin} * L,
                                  dz_columns, count, input, b.vectors);
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
        GradientRow<F> target{grad_row, int64_t{grad_columns} * L, L, 0, grad_columns};
        const bool direct = in_place();
        if constexpr (sizeof(T) == sizeof(F)) {
          if (direct) {
            F* row = static_cast<F*>(a.grad_input) +
                     ((u.n * s.in_h + ih) * s.in_w + u.iw0 - skip) * s.channels + b.channel;
            target = {row, L, s.channels, skip, skip + u.iw1 - u.iw0};
          }
        }
        loops.transpose(target, rows, taps, row_count, dz_columns, conv.weight, b.vectors);
        if (!direct) emit_row(u, ih, skip);
      }
    }
    run_dz_rows(u, u.oh1);
  }

  void run(int64_t begin, int64_t end, void* partials) {
    const int taps = s.kernel * s.kernel;
    const int64_t padded = p.padded_channels();
    for_each_item(p, begin, end, [&](int block, int64_t slot) {
      b = block_at(s, p, block);
      conv.start_block(b, static_cast<const T*>(a.weight), nullptr, a.prologue);
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
  ConvShape s;
  DepthwisePlan p;
  Scratch<F> scratch;
  Convolution<T> conv;
  Loops<S> loops;
  PackedBatchNorm<F> bn;
  RowSums<S> scale_sums, shift_sums;
  Block b;
  int halo, grad_columns, dz_columns;
  Ring<S> dz;
  F* grad_row;
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
size_t scratch_bytes(const ConvShape& s, const DepthwisePlan& p) {
  using F = typename Simd<T>::Scalar;
  // Room for the pieces' rounding to cache lines, and for the per-channel values of any kernel.
  const int64_t slack = 32 * 64 / sizeof(F) + int64_t{p.block_vectors()} * p.lanes * 24;
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
  return for_dtype(dtype, [](auto element) { return kernels_of<decltype(element)>(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
