// Products of many rows with a matrix that fits a cache, for the convolutions on the CPU.
//
//   out[m, k] = activation(start[k] + sum over c of rows[m, c] * matrix[k, c]) (+ residual[m, k])
//
// The matrix is packed once into panels of two vectors of output channels, [panel][c][channel], of
// an odd number of vectors the last panel has three (or the only one). A tile of rows x one panel
// is kept in registers: each step along c loads the panel's vectors once and meets them with one
// broadcast value of every row. What a value is and how many channels a step takes is the business
// of Products.
#pragma once

#include "depthwise_loops.h"
#include "gemm_format.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

// How tensors of T are multiplied: in the accumulate dtype, one channel a step. BN's scale is
// multiplied into the matrix, BN's shift is what the sums start with.
template <class T>
struct Products {
  using S = Simd<T>;
  using V = typename S::V;
  using Value = typename S::Scalar;  // an element of rows and matrices
  static constexpr int step = 1;
  static constexpr bool scales_matrix = true;
  // Channels that are summed one after the other before they are added to the rest: the error of a
  // long sum grows with its length.
  static constexpr int block = 64;

  // A lane for each step of channels, of which there are `n` values.
  static EFFNET_INLINE V load_steps(const T* weight, int n) {
    return n >= S::lanes ? S::load(weight) : S::load_partial(weight, n);
  }
  static EFFNET_INLINE void store_steps(Value* panel, V x) { S::store(panel, x); }
  static EFFNET_INLINE V spread(const Value* row) { return S::set(*row); }
  static EFFNET_INLINE V load(const Value* panel) { return S::load_once(panel); }
  static EFFNET_INLINE void add(V& sum, V a, V b) {
    // A full set of 32 registers the compiler allocates without copies if it sees what is done.
    if constexpr (S::registers >= 32) {
      sum = S::fma(a, b, sum);
    } else {
      S::accumulate(sum, a, b);
    }
  }
};

#if defined(EFFNET_TARGET_AVX512BF16)
// As bfloat16s, two channels a step: panels are [panel][c / 2][channel][2]. The weight is taken as
// it is, for times BN's scale it would have to be rounded once more; the sums are scaled instead.
template <>
struct Products<bfloat16> {
  using S = FloatSimd;
  using V = S::V;
  using Value = bfloat16;
  static constexpr int step = 2;
  static constexpr bool scales_matrix = false;
  // Next to the rounding of the results a float32 sum has no error to speak of.
  static constexpr int block = 4096;

  static EFFNET_INLINE V load_steps(const bfloat16* weight, int n) {
    if (n >= 2 * S::lanes) return S::load(reinterpret_cast<const float*>(weight));
    float pairs[S::lanes] = {};
    std::memcpy(pairs, weight, n * sizeof(*weight));
    return S::load(pairs);
  }
  static EFFNET_INLINE void store_steps(Value* panel, V x) {
    S::store(reinterpret_cast<float*>(panel), x);
  }
  static EFFNET_INLINE V spread(const Value* row) { return S::set_pair(row); }
  static EFFNET_INLINE V load(const Value* panel) {
    return S::load_once(reinterpret_cast<const float*>(panel));
  }
  static EFFNET_INLINE void add(V& sum, V a, V b) { S::accumulate_pairs(sum, a, b); }
};
#endif

template <class T>
constexpr GemmFormat kGemmFormat = {Simd<T>::lanes, Products<T>::step,
                                    sizeof(typename Products<T>::Value),
                                    sizeof(typename Simd<T>::Scalar)};

// Bytes of a panel between what is loaded and what is fetched from L2, where a panel passes by for
// every tile.
constexpr int kAhead = 1024;
// Output channels of a panel but the last.
template <class S>
constexpr int kPanel = 2 * S::lanes;
// Rows of a tile of N vectors: what registers hold beside the panel's and a broadcast value. With
// one vector more rows would only wait for its loads.
template <class S, int N>
constexpr int kTileRows = N == 1 ? kTileRows<S, 2> : (S::registers - N - 1) / N;

// Vectors of the last of `panels` panels of a matrix with `channels` rows, or of any other.
template <class S>
EFFNET_INLINE int panel_vectors(int64_t panel, int64_t panels, int channels) {
  const int vectors = (channels + S::lanes - 1) / S::lanes;
  return panel == panels - 1 ? static_cast<int>(vectors - 2 * panel) : 2;
}

// A weight (K, C) as pack_panels() left it in memory of kGemmFormat<T>.matrix_bytes(K, C).
template <class T>
struct Matrix {
  using F = typename Simd<T>::Scalar;
  using Value = typename Products<T>::Value;
  const Value* values;
  const F *start, *scale;  // [channel], zeros beyond the last; scale unless it is in the values
  int channels;            // K
  int depth;               // C, in whole steps
  int64_t panels;

  Matrix(const void* memory, int k, int c)
      : values(static_cast<const Value*>(memory)),
        start(reinterpret_cast<const F*>(static_cast<const char*>(memory) +
                                         kGemmFormat<T>.values_bytes(k, c))),
        scale(start + kGemmFormat<T>.padded(k)),
        channels(k),
        depth(static_cast<int>(kGemmFormat<T>.depth(c))),
        panels(kGemmFormat<T>.panels(k)) {}

  EFFNET_INLINE int64_t offset(int64_t panel) const { return panel * depth * kPanel<Simd<T>>; }
};

// A square of a weight: of `rows` output channels, `stride` values apart, a vector's steps of input
// channels, of which there are `n` values; x[step] has a lane for each output channel. Zeros
// beyond.
template <class T>
EFFNET_INLINE void load_square(typename Simd<T>::V (&x)[Simd<T>::lanes], const T* weight,
                               int64_t stride, int rows, int n) {
  using P = Products<T>;
  EFFNET_UNROLL
  for (int i = 0; i < Simd<T>::lanes; ++i) {
    x[i] = i < rows ? P::load_steps(weight + i * stride, n) : Simd<T>::set(0.f);
  }
  transpose<Simd<T>>(x);
}

// The BN of a vector of output channels from k on, to where the matrix has it.
template <class T>
EFFNET_INLINE void fold_channels(const Matrix<T>& m, const BatchNorm& bn, int64_t k, int rows) {
  using F = typename Simd<T>::Scalar;
  F *start = const_cast<F*>(m.start + k), *scale = const_cast<F*>(m.scale + k);
  for (int i = 0; i < Simd<T>::lanes; ++i) {
    start[i] = scale[i] = F(0);
    if (i >= rows) continue;
    const FoldedChannel<F> folded(bn, k + i);
    start[i] = folded.shift;
    scale[i] = folded.scale;
  }
}

// Panels [begin, end) of weight (K, taps, C) with its BN to a Matrix in `memory`, whose depth is
// that of C for each tap.
template <class T>
void pack_panels(void* memory, const T* weight, const BatchNorm& bn, int channels, int taps,
                 int in_channels, int64_t begin, int64_t end) {
  using P = Products<T>;
  using S = Simd<T>;
  using Value = typename P::Value;
  constexpr int L = S::lanes;
  const int tap_depth = static_cast<int>(kGemmFormat<T>.depth(in_channels));
  const Matrix<T> m(memory, channels, taps * tap_depth);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int width = panel_vectors<S>(panel, m.panels, channels) * L;
    for (int v = 0; v < width; v += L) {
      const int64_t k = panel * kPanel<S> + v;
      const int rows = static_cast<int>(lesser(channels - k, int64_t{L}));
      fold_channels(m, bn, k, rows);
      const auto scale = S::load(m.scale + k);
      Value* to = const_cast<Value*>(m.values) + m.offset(panel) + v * P::step;
      for (int tap = 0; tap < taps; ++tap) {
        const T* from = weight + (k * taps + tap) * in_channels;
        for (int c = 0; c < tap_depth; c += L * P::step) {
          typename S::V x[L];
          load_square(x, from + c, int64_t{taps} * in_channels, rows, in_channels - c);
          const int steps = lesser((tap_depth - c) / P::step, L);
          for (int i = 0; i < steps; ++i, to += width * P::step) {
            P::store_steps(to, P::scales_matrix ? x[i] * scale : x[i]);
          }
        }
      }
    }
  }
}

// The rows of a product. Row m comes in pieces of `piece` values, the last one shorter: piece i is
// at values + m * stride + i * pitch. As many values as `chunk` are summed in registers before they
// are added to the rest.
template <class T>
struct Rows {
  using P = Products<T>;
  const typename P::Value* values;
  int64_t stride, pitch;
  int piece, chunk;

  // Of a matrix.
  Rows(const typename P::Value* matrix, int64_t row_stride)
      : values(matrix), stride(row_stride), pitch(P::block), piece(P::block), chunk(P::block) {}
  // Of the windows of k x k pixels in an image of `row` values a row, `pixel` values a pixel: each
  // row of a window is a piece. A convolution of PyTorch sums a window in registers, too.
  Rows(const typename P::Value* image, int64_t row, int pixel, int kernel, int step)
      : values(image),
        stride(int64_t{pixel} * step),
        pitch(row),
        piece(kernel * pixel),
        chunk(kernel * piece) {}
};

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

  // What belongs to channel 0, from channel k on.
  EFFNET_INLINE GemmOutput from_channel(int64_t k) const {
    GemmOutput out = *this;
    out.to += k;
    if (residual != nullptr) out.residual += k;
    if (sums != nullptr) {
      out.sums += k;
      out.lost += k;
    }
    return out;
  }
};

// A result, `n` channels of it, with what is added to it, to `offset` values behind out.to.
template <class S, class To>
EFFNET_INLINE void store_result(const GemmOutput<To>& out, int64_t offset, int n,
                                typename S::V& x) {
  if (n >= S::lanes) {
    if (out.residual != nullptr) x = x + S::load(out.residual + offset);
    S::store(out.to + offset, x);
  } else {
    if (out.residual != nullptr) x = x + S::load_partial(out.residual + offset, n);
    S::store_partial(out.to + offset, x, n);
  }
}

// The first M rows times one panel of `columns` channels from channel k on, to `out`, which belongs
// to that channel. On the way it fetches what is at `next`, `pace` bytes a step.
template <class T, class To, int N, int M>
void multiply_tile(const Rows<T>& rows, const typename Products<T>::Value* panel,
                   const Matrix<T>& matrix, int64_t k, const GemmOutput<To>& out, const char* next,
                   int pace) {
  using P = Products<T>;
  using S = Simd<T>;
  using V = typename S::V;
  using F = typename S::Scalar;
  constexpr int L = S::lanes;
  const int depth = matrix.depth, columns = static_cast<int>(matrix.channels - k);
  const F* start = matrix.start + k;
  const int64_t stride = rows.stride;
  const auto* from = rows.values;
  V sum[M * N];
  F before[M * N * L];
  for (int c = 0; c < depth;) {
    const bool initial = c == 0;
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) {
      const V first = P::scales_matrix && initial ? S::load(start + v * L) : S::set(0.f);
      EFFNET_UNROLL
      for (int r = 0; r < M; ++r) sum[r * N + v] = first;
    }
    const int end = lesser(c + rows.chunk, depth);
    for (; c < end; from += rows.pitch) {
      const int values = lesser(rows.piece, end - c);
      for (int i = 0; i < values; i += P::step, panel += N * P::step * L) {
        V b[N];
        prefetch(panel + kAhead / sizeof(*panel));
        prefetch(next);
        next += pace;
        EFFNET_UNROLL
        for (int v = 0; v < N; ++v) b[v] = P::load(panel + v * P::step * L);
        EFFNET_UNROLL
        for (int r = 0; r < M; ++r) {
          const V a = P::spread(from + r * stride + i);
          EFFNET_UNROLL
          for (int v = 0; v < N; ++v) P::add(sum[r * N + v], a, b[v]);
        }
      }
      c += values;
    }
    if (!initial) {
      EFFNET_UNROLL
      for (int i = 0; i < M * N; ++i) sum[i] = sum[i] + S::load(before + i * L);
    }
    if (end < depth) {
      EFFNET_UNROLL
      for (int i = 0; i < M * N; ++i) S::store(before + i * L, sum[i]);
    }
  }
  if constexpr (!P::scales_matrix) {
    EFFNET_UNROLL
    for (int v = 0; v < N; ++v) {
      const V scale = S::load(matrix.scale + k + v * L), shift = S::load(start + v * L);
      EFFNET_UNROLL
      for (int r = 0; r < M; ++r) sum[r * N + v] = S::fma(sum[r * N + v], scale, shift);
    }
  }
  activate_tile<S>(out.activation, sum);
  EFFNET_UNROLL
  for (int v = 0; v < N; ++v) {
    const int n = columns - v * L;
    if (n <= 0) break;
    EFFNET_UNROLL
    for (int r = 0; r < M; ++r) store_result<S>(out, v * L + r * out.stride, n, sum[r * N + v]);
    if (out.sums != nullptr) {
      V total = sum[v];
      EFFNET_UNROLL
      for (int r = 1; r < M; ++r) total = total + sum[r * N + v];
      ExactSum<S> exact(S::load(out.sums + v * L), S::load(out.lost + v * L));
      exact.add(total);
      S::store(out.sums + v * L, exact.sum);
      S::store(out.lost + v * L, exact.lost);
    }
  }
}

template <class T, class To>
using MultiplyTile = void (*)(const Rows<T>&, const typename Products<T>::Value*, const Matrix<T>&,
                              int64_t, const GemmOutput<To>&, const char*, int);

template <class T, class To, int N, int... M>
EFFNET_INLINE MultiplyTile<T, To> multiply_tile_of(int rows, std::integer_sequence<int, M...>) {
  static constexpr MultiplyTile<T, To> tiles[] = {multiply_tile<T, To, N, M + 1>...};
  return tiles[rows - 1];
}

// `count` rows times one panel of N vectors. Rows are divided evenly: a tile of one row would wait
// for its own sums.
template <class T, class To, int N>
void multiply_vectors(Rows<T> rows, int count, const Matrix<T>& matrix, int64_t panel,
                      GemmOutput<To> out) {
  constexpr int Most = kTileRows<Simd<T>, N>;
  constexpr std::make_integer_sequence<int, Most> sizes{};
  const int tiles = (count + Most - 1) / Most, least = count / tiles, longer = count % tiles;
  const auto* values = matrix.values + matrix.offset(panel);
  // Each tile fetches a part of the next panel, which may be in no cache: it comes while all of
  // them compute, and not while the first one waits.
  const int pace = N * Products<T>::step * Simd<T>::lanes * sizeof(*values) / tiles;
  const int64_t steps = matrix.depth / Products<T>::step;
  const char* next = reinterpret_cast<const char*>(values + matrix.offset(1));
  for (int tile = 0; tile < tiles; ++tile, next += steps * pace) {
    const int size = least + (tile < longer ? 1 : 0);
    multiply_tile_of<T, To, N>(size, sizes)(rows, values, matrix, panel * kPanel<Simd<T>>, out,
                                            next, pace);
    rows.values += size * rows.stride;
    out.to += size * out.stride;
    if (out.residual != nullptr) out.residual += size * out.stride;
  }
}

// `count` rows times one panel. `out` belongs to channel 0.
template <class T, class To>
void multiply_panel(const Rows<T>& rows, int count, const Matrix<T>& matrix, int64_t panel,
                    const GemmOutput<To>& all) {
  using S = Simd<T>;
  const GemmOutput<To> out = all.from_channel(panel * kPanel<S>);
  switch (panel_vectors<S>(panel, matrix.panels, matrix.channels)) {
    case 1:
      multiply_vectors<T, To, 1>(rows, count, matrix, panel, out);
      break;
    case 2:
      multiply_vectors<T, To, 2>(rows, count, matrix, panel, out);
      break;
    default:
      multiply_vectors<T, To, 3>(rows, count, matrix, panel, out);
  }
}

// `count` rows times panels [begin, end) of the matrix.
template <class T, class To>
void multiply_rows(const Rows<T>& rows, int count, const Matrix<T>& matrix, int64_t begin,
                   int64_t end, const GemmOutput<To>& out) {
  for (int64_t panel = begin; panel < end; ++panel) {
    multiply_panel(rows, count, matrix, panel, out);
  }
}

// The sums of an image from those of its parts. A part has a row of sums [padded] and one of what
// rounding took from them; to: [image][channel].
template <class F>
void merge_sums(const F* from, int64_t images, int64_t parts, int64_t channels, int64_t padded,
                F* to) {
  for (int64_t image = 0; image < images; ++image, from += parts * 2 * padded, to += channels) {
    for (int64_t k = 0; k < channels; ++k) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const F* sums = from + part * 2 * padded;
        total += static_cast<double>(sums[k]) + static_cast<double>(sums[padded + k]);
      }
      to[k] = static_cast<F>(total);
    }
  }
}

// x to rows of To, `stride` apart, through the prologue (scale null: none) and times `gate` (null:
// none); up to `stride` filled with zeros.
template <class To, class T>
void convert_rows(To* to, int64_t stride, const T* from, int64_t rows, int64_t channels,
                  const typename Simd<T>::Scalar* scale, const typename Simd<T>::Scalar* shift,
                  Activation activation, const typename Simd<T>::Scalar* gate) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int L = S::lanes;
  if (stride == channels && scale == nullptr && gate == nullptr) {  // one long row
    stride = channels = rows * channels;
    rows = 1;
  }
  for (int64_t row = 0; row < rows; ++row, from += channels, to += stride) {
    for (int64_t c = 0; c < stride; c += L) {
      const int n = static_cast<int>(lesser(channels - c, int64_t{L}));
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
      To lanes[L];
      V x[1] = {n > 0 ? S::load_partial(from + c, n) : S::set(0.f)};
      if (n > 0 && scale != nullptr) {
        x[0] = S::fma(x[0], S::load_partial(scale + c, n), S::load_partial(shift + c, n));
        activate_tile<S>(activation, x);
      }
      if (n > 0 && gate != nullptr) x[0] = x[0] * S::load_partial(gate + c, n);
      S::store(lanes, x[0]);
      for (int i = 0; i < L && c + i < stride; ++i) to[c + i] = i < n ? lanes[i] : To{};
    }
  }
}

}  // namespace
}  // namespace EFFNET_ISA
}  // namespace effnet
