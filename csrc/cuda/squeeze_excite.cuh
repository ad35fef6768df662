// Squeeze-and-excitation: the sums over an image's pixels, the gate from them, the image scaled by
// it, and the gate's gradients. Images are dense channels-last, (pixels, channels) matrices each,
// cut into blocks by RowTiling with an image a group.
#pragma once

#include "mma.cuh"
#include "rows.cuh"

namespace effnet::cuda {

// partial[n, chunk, c] = sum over the chunk's pixels of input, or of input * other where that is
// given. Traffic: input, and other, read; four rows of 16-byte loads of each are in flight in each
// thread. Shared memory: sum_shared_bytes.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    channel_sums_kernel(const T* __restrict__ input, const T* __restrict__ other, RowTiling tiling,
                        float* __restrict__ partial) {
  const RowBlock<T, V> block(tiling);
  Floats<V> sums[1] = {broadcast<V>(0.f)};
  if (block.active) {
    Vector<T, V> raw[kRowUnroll], raw_other[kRowUnroll];
    if (other == nullptr) {
      for_rows<kRowUnroll>(
          block, [&](int i, int64_t offset) { raw[i] = load_vector<V>(at(input, offset)); },
          [&](int i, int64_t) { sums[0] = sums[0] + unpack<T, V>(raw[i]); });
    } else {
      for_rows<kRowUnroll>(
          block,
          [&](int i, int64_t offset) {
            raw[i] = load_vector<V>(at(input, offset));
            raw_other[i] = load_vector<V>(at(other, offset));
          },
          [&](int i, int64_t) {
            sums[0] = multiply_add(unpack<T, V>(raw[i]), unpack<T, V>(raw_other[i]), sums[0]);
          });
    }
  }
  const RowBlock<T, V> same(tiling);
  float* const out = partial + same.slot * tiling.channels + same.first_channel;
  const int left = tiling.channels - same.first_channel;
  sum_row_lanes(sums, shared_floats(), tiling, [&](int, int i, double sum) {
    if (i < left) out[i] = static_cast<float>(sum);
  });
}

// What sum_row_lanes takes for one sum in a block of `threads`.
inline size_t sum_shared_bytes(const RowTiling& tiling, int vector, int threads) {
  return vector * (tiling.lanes * tiling.parts * sizeof(double) + threads * sizeof(float));
}

// output = input * scale[n, c] + shift[n, c]; no shift where it is null.
// Traffic: input read, output written; four rows of 16-byte loads are in flight in each thread.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<V>)
    channel_scale_kernel(const T* __restrict__ input, const float* __restrict__ scale,
                         const float* __restrict__ shift, RowTiling tiling,
                         T* __restrict__ output) {
  const RowBlock<T, V> block(tiling);
  if (!block.active) return;
  const int64_t vector = block.group * tiling.channels + block.channel;
  const Floats<V> factor = load_floats<V>(scale + vector);
  // Adding -0 changes nothing, not even the sign of a zero.
  const Floats<V> term = shift == nullptr ? broadcast<V>(-0.f) : load_floats<V>(shift + vector);
  Vector<T, V> raw[kRowUnroll];
  for_rows<kRowUnroll>(
      block, [&](int i, int64_t offset) { raw[i] = load_vector<V>(at(input, offset)); },
      [&](int i, int64_t offset) {
        store(at(output, offset), multiply_add(unpack<T, V>(raw[i]), factor, term));
      });
}

// Blocks take the matrices from the L2 cache, which the images share; in backward, a block takes
// one image.
constexpr int kGateThreads = 512;
constexpr int kGateLanes = 128;  // most across the columns where rows are added up

// Forward: the rows of a matrix, and the loads of a row, that a thread has in flight.
constexpr int kReduceRows = 3, kReduceLoads = 5;
constexpr int kExciteRows = 8, kExciteLoads = 1;

// Backward.
constexpr int kGateBlocks = 2;  // on a multiprocessor
constexpr int kGateUnroll = 4;  // rows of a matrix that a thread has in flight

// Elements of a matrix's row in a 16-byte load.
template <class T>
constexpr int kGateVector = 16 / sizeof(T);

// Calls body(the elements of a load as a compile-time constant).
template <class T, class Body>
EFFNET_DEVICE void for_gate_vector(bool vectors, const Body& body) {
  if (vectors) {
    body(std::integral_constant<int, kGateVector<T>>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

EFFNET_DEVICE float activate_one(Activation activation, float x) {
  return activate<Math<float, 1>>(activation, Floats<1>{{x}})[0];
}

// A bias of None is zero.
template <class T>
EFFNET_DEVICE float bias_value(const void* bias, int i) {
  return bias == nullptr ? 0.f : to_float(static_cast<const T*>(bias)[i]);
}

// The same for a load of as many elements as `vector` says, down to one.
template <class T, int V = kGateVector<T>, class Body>
EFFNET_DEVICE void for_gate_width(int vector, const Body& body) {
  if constexpr (V > 1) {
    if (vector < V) return for_gate_width<T, V / 2>(vector, body);
  }
  body(std::integral_constant<int, V>{});
}

// Calls result(row, sum over columns of matrix[row, column] * x[column]) for every row, in one
// thread each. `lanes` neighbours in a warp, a power of two, share a row; each has kLoads loads of
// kRows rows in flight, so that x is read once for all the rows. Once the first are on their way it
// calls ready(), in all threads: x need not be there before. Not where there are no rows.
template <class T, int V, int kRows, int kLoads, class Ready, class Result>
EFFNET_DEVICE void multiply_rows(const T* matrix, int rows, int columns, int lanes, const float* x,
                                 const Ready& ready, const Result& result) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  // The same number of times in every thread: the lanes of a warp shuffle together.
#pragma unroll 1
  for (int first = 0; first < rows; first += kRows * groups) {
    float sums[kRows] = {};
#pragma unroll 1
    for (int base = 0; base < columns; base += kLoads * lanes * V) {
      const auto column = [&](int load) { return base + (load * lanes + lane) * V; };
      Vector<T, V> raw[kRows][kLoads];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = first + group + i * groups;
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          if (row < rows && column(j) < columns) {
            raw[i][j] = load_vector<V>(matrix + row * columns + column(j));
          }
        }
      }
      if (first == 0 && base == 0) ready();
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (column(j) >= columns) break;
        const Floats<V> values = load_floats<V>(x + column(j));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (first + group + i * groups >= rows) break;
          const Floats<V> weights = unpack<T, V>(raw[i][j]);
#pragma unroll
          for (int k = 0; k < V; ++k) sums[i] = fmaf(weights[k], values[k], sums[i]);
        }
      }
    }
#pragma unroll 1
    for (int half = lanes / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], half);
    }
    if (lane != 0) continue;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + group + i * groups;
      if (row < rows) result(row, sums[i]);
    }
  }
}

// How the gate's matrices are read: in 16-byte loads or not, in loads of how many elements, by how
// many lanes a row. `parts` blocks take an image, each `rows` of the expansion and all of what
// comes before it. Block index: part fastest, then image.
struct GateTiling {
  bool reduce_vectors;
  int expand_vector;
  int reduce_lanes, expand_lanes;
  int parts, rows;
  bool kept;       // pooled and the biases are read to shared memory at once
  bool rows_kept;  // and so are the rows of the expansion

  // Of S floats, and of the others where they are kept, each a multiple of 16 bytes.
  static __host__ __device__ constexpr int aligned(int floats) { return (floats + 3) / 4 * 4; }
  __host__ __device__ constexpr int kept_floats(int channels, int squeezed) const {
    return aligned(channels) + aligned(squeezed) + aligned(rows);
  }
};

// hidden[n, s] = sum over c of reduce_weight[s, c] * pooled[n, c] / pixels + reduce_bias[s]
// gate[n, c] = g(sum over s of expand_weight[c, s] * a(hidden[n, s]) + expand_bias[c])
//
// Where the block's memory has room for it, all that it reads is on its way from the beginning.
// Traffic: reduce_weight read by every block, expand_weight by the blocks of every image, from the
// L2 cache. Shared memory: a(hidden), S floats; pooled of the image, reduce_bias and expand_bias of
// the part; the part's rows of expand_weight.
template <class T>
__global__ void __launch_bounds__(kGateThreads)
    squeeze_excite_gate_kernel(const __grid_constant__ SqueezeExciteGate a,
                               const __grid_constant__ GateTiling tiling) {
  const int part = static_cast<int>(blockIdx.x) % tiling.parts;
  const int64_t n = static_cast<int>(blockIdx.x) / tiling.parts;
  const int first = part * tiling.rows;
  const int rows = min(a.channels - first, tiling.rows);
  const int thread = static_cast<int>(threadIdx.x);
  float* const activated = shared_floats();
  float* const kept_pooled = activated + GateTiling::aligned(a.squeezed);
  float* const kept_reduce_bias = kept_pooled + GateTiling::aligned(a.channels);
  float* const kept_expand_bias = kept_reduce_bias + GateTiling::aligned(a.squeezed);
  float* const kept_rows = kept_expand_bias + GateTiling::aligned(tiling.rows);

  const float* pooled = static_cast<const float*>(a.pooled) + n * a.channels;
  const T* expand_weight = static_cast<const T*>(a.expand_weight) + int64_t{first} * a.squeezed;
  const auto copy = [&](void* to, const void* from, int bytes) {
    for (int i = thread * 16; i < bytes; i += kGateThreads * 16) {
      copy_async(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, 16);
    }
  };
  const float* const given_pooled = pooled;
  if (tiling.kept) {
    if (tiling.reduce_vectors) {
      copy(kept_pooled, pooled, a.channels * static_cast<int>(sizeof(float)));
    }
    pooled = kept_pooled;
  }
  if (tiling.rows_kept) {
    copy(kept_rows, expand_weight, rows * a.squeezed * static_cast<int>(sizeof(T)));
    expand_weight = reinterpret_cast<const T*>(kept_rows);
  }
  const auto bias = [&](const void* biases, const float* kept, int i, int from) {
    return tiling.kept ? kept[i] : bias_value<T>(biases, from + i);
  };

  float* const hidden = static_cast<float*>(a.hidden) + n * a.squeezed;
  const float pixels = static_cast<float>(a.pixels);
  for_gate_vector<T>(tiling.reduce_vectors, [&](auto vector) {
    multiply_rows<T, decltype(vector)::value, kReduceRows, kReduceLoads>(
        static_cast<const T*>(a.reduce_weight), a.squeezed, a.channels, tiling.reduce_lanes, pooled,
        [&] {
          if (tiling.kept) {
            if (!tiling.reduce_vectors) {
              for (int c = thread; c < a.channels; c += kGateThreads) {
                kept_pooled[c] = given_pooled[c];
              }
            }
            for (int s = thread; s < a.squeezed; s += kGateThreads) {
              kept_reduce_bias[s] = bias_value<T>(a.reduce_bias, s);
            }
            for (int c = thread; c < rows; c += kGateThreads) {
              kept_expand_bias[c] = bias_value<T>(a.expand_bias, first + c);
            }
          }
          wait_for_copies();
          __syncthreads();
        },
        [&](int s, float sum) {
          const float x = sum / pixels + bias(a.reduce_bias, kept_reduce_bias, s, 0);
          if (part == 0) hidden[s] = x;
          activated[s] = activate_one(a.activation, x);
        });
  });
  __syncthreads();

  float* const gate = static_cast<float*>(a.gate) + n * a.channels + first;
  for_gate_width<T>(tiling.expand_vector, [&](auto vector) {
    multiply_rows<T, decltype(vector)::value, kExciteRows, kExciteLoads>(
        expand_weight, rows, a.squeezed, tiling.expand_lanes, activated, [] {},
        [&](int c, float sum) {
          gate[c] = activate_one(a.gate_activation,
                                 sum + bias(a.expand_bias, kept_expand_bias, c, first));
        });
  });
}

// What the backward pass keeps between its two launches, float32.
struct GateWorkspace {
  float* grad_expand;  // (N, C), of what the gate's activation takes
  float* activated;    // (N, S)
  float* grad_hidden;  // (N, S)
};

// Calls result(column, sum over rows of x[row] * matrix[row, column]) for every column, in one
// thread each. tiling: of the matrix, whose rows are cut into row lanes only; its columns are taken
// lanes * V at a time. Shared memory: sum_shared_bytes. x may have been written by this block.
template <class T, int V, class Result>
EFFNET_DEVICE void add_rows(const T* matrix, const RowTiling& tiling, const float* x,
                            const Result& result) {
  const int lane = static_cast<int>(threadIdx.x) % tiling.lanes;
  const int row_lane = static_cast<int>(threadIdx.x) / tiling.lanes;
  const int rows = static_cast<int>(tiling.rows), step = tiling.row_lanes;
#pragma unroll 1
  for (int first = 0; first < tiling.channels; first += tiling.lanes * V) {
    const int column = first + lane * V;
    Floats<V> sums[1] = {broadcast<V>(0.f)};
    if (row_lane < tiling.row_lanes && column < tiling.channels) {
#pragma unroll 1
      for (int row = row_lane; row < rows; row += kGateUnroll * step) {
        Vector<T, V> raw[kGateUnroll];
        float factor[kGateUnroll];
#pragma unroll
        for (int i = 0; i < kGateUnroll; ++i) {
          const int64_t at_row = row + i * step;
          if (at_row >= rows) continue;
          raw[i] = load_vector<V>(matrix + at_row * tiling.channels + column);
          factor[i] = x[at_row];
        }
#pragma unroll
        for (int i = 0; i < kGateUnroll; ++i) {
          if (row + i * step >= rows) continue;
          sums[0] = multiply_add(broadcast<V>(factor[i]), unpack<T, V>(raw[i]), sums[0]);
        }
      }
    }
    sum_row_lanes(sums, shared_floats(), tiling, [&](int, int i, double sum) {
      if (first + i < tiling.channels) result(first + i, static_cast<float>(sum));
    });
  }
}

// How the matrices are read to add up their rows: `expand` is of (C, S), `reduce` of (S, C).
struct GateBackwardTiling {
  bool reduce_vectors, expand_vectors;
  RowTiling reduce, expand;
};

// Of each image, with e = what the gate's activation takes:
//   grad_expand[c] = grad_gate[c] * g'(e[c]), where g' comes from the gate's value
//   grad_hidden[s] = a'(hidden[s]) * sum over c of grad_expand[c] * expand_weight[c, s]
//   grad_pooled[c] = sum over s of grad_hidden[s] * reduce_weight[s, c] / pixels
// Traffic: both matrices read by every block, from the L2 cache. Shared memory: the larger of both
// tilings' sum_shared_bytes.
template <class T>
__global__ void __launch_bounds__(kGateThreads, kGateBlocks)
    squeeze_excite_gate_backward_kernel(SqueezeExciteGateBackward a, GateWorkspace workspace,
                                        GateBackwardTiling tiling) {
  const int64_t n = blockIdx.x;
  const int64_t at_channel = n * a.channels, at_squeezed = n * a.squeezed;
  const float* const hidden = static_cast<const float*>(a.hidden) + at_squeezed;
  float* const grad_expand = workspace.grad_expand + at_channel;
  float* const grad_hidden = workspace.grad_hidden + at_squeezed;

  for (int c = threadIdx.x; c < a.channels; c += kGateThreads) {
    const float gate = static_cast<const float*>(a.gate)[at_channel + c];
    float derivative = gate * (1.f - gate);
    if (a.gate_activation == Activation::hardsigmoid) derivative = derivative > 0.f ? 1.f / 6 : 0.f;
    grad_expand[c] = static_cast<const float*>(a.grad_gate)[at_channel + c] * derivative;
  }
  for (int s = threadIdx.x; s < a.squeezed; s += kGateThreads) {
    workspace.activated[at_squeezed + s] = activate_one(a.activation, hidden[s]);
  }
  __syncthreads();

  for_gate_vector<T>(tiling.expand_vectors, [&](auto vector) {
    add_rows<T, decltype(vector)::value>(
        static_cast<const T*>(a.expand_weight), tiling.expand, grad_expand, [&](int s, float sum) {
          const Floats<1> x{{hidden[s]}};
          grad_hidden[s] = sum * activate_grad<Math<float, 1>>(a.activation, x)[0];
        });
  });
  __syncthreads();

  float* const grad_pooled = static_cast<float*>(a.grad_pooled) + at_channel;
  const float pixels = static_cast<float>(a.pixels);
  for_gate_vector<T>(tiling.reduce_vectors, [&](auto vector) {
    add_rows<T, decltype(vector)::value>(static_cast<const T*>(a.reduce_weight), tiling.reduce,
                                         grad_hidden,
                                         [&](int c, float sum) { grad_pooled[c] = sum / pixels; });
  });
}

// A block's tile of the gradients of both matrices. A thread has one channel of it and
// kTileValues neighbours of the S hidden values, a warp all the tile's channels.
constexpr int kTileChannels = 32;
constexpr int kTileSqueezed = 16;
constexpr int kTileValues = 4;
constexpr int kTileThreads = kTileChannels * kTileSqueezed / kTileValues;
constexpr int kTileImages = 64;  // staged together
constexpr size_t kTileSharedBytes =
    2 * kTileImages * (kTileChannels + kTileSqueezed) * sizeof(float);

// Columns first ... first + kWidth - 1 of `images` rows of (rows, columns), zeros beyond the last.
template <int kWidth>
EFFNET_DEVICE void stage_columns(const float* from, int images, int columns, int first,
                                 float* shared) {
#pragma unroll 4
  for (int i = threadIdx.x; i < images * kWidth; i += kTileThreads) {
    const int column = first + i % kWidth;
    const int64_t row = i / kWidth;
    shared[i] = column < columns ? from[row * columns + column] : 0.f;
  }
}

// grad_expand_weight[c, s] = sum over n of grad_expand[n, c] * activated[n, s]
// grad_reduce_weight[s, c] = sum over n of grad_hidden[n, s] * pooled[n, c] / pixels
// and, in the blocks of the first tiles, the biases: the sums of grad_expand and grad_hidden.
// Every sum is one thread's, in the order of the images.
// Blocks: tiles of S fastest. Traffic: the four (N, C) and (N, S) matrices read once a tile of the
// other extent, the gradients written.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    squeeze_excite_gate_weights_kernel(SqueezeExciteGateBackward a, GateWorkspace workspace,
                                       int squeezed_tiles) {
  const int lane = static_cast<int>(threadIdx.x) % kTileChannels;
  const int warp = static_cast<int>(threadIdx.x) / kTileChannels;
  const int first_channel = static_cast<int>(blockIdx.x) / squeezed_tiles * kTileChannels;
  const int first_squeezed = static_cast<int>(blockIdx.x) % squeezed_tiles * kTileSqueezed;
  float* const grad_expand = shared_floats();
  float* const pooled = grad_expand + kTileImages * kTileChannels;
  float* const activated = pooled + kTileImages * kTileChannels;
  float* const grad_hidden = activated + kTileImages * kTileSqueezed;

  float expand_bias = 0.f;
  Floats<kTileValues> expand = broadcast<kTileValues>(0.f);
  Floats<kTileValues> reduce = expand, reduce_bias = expand;
#pragma unroll 1
  for (int64_t n = 0; n < a.batch; n += kTileImages) {
    const int images = a.batch - n < kTileImages ? static_cast<int>(a.batch - n) : kTileImages;
    const int64_t at_channel = n * a.channels, at_squeezed = n * a.squeezed;
    __syncthreads();  // the images before these have been read
    stage_columns<kTileChannels>(workspace.grad_expand + at_channel, images, a.channels,
                                 first_channel, grad_expand);
    stage_columns<kTileChannels>(static_cast<const float*>(a.pooled) + at_channel, images,
                                 a.channels, first_channel, pooled);
    stage_columns<kTileSqueezed>(workspace.activated + at_squeezed, images, a.squeezed,
                                 first_squeezed, activated);
    stage_columns<kTileSqueezed>(workspace.grad_hidden + at_squeezed, images, a.squeezed,
                                 first_squeezed, grad_hidden);
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < images; ++i) {
      const float de = grad_expand[i * kTileChannels + lane];
      const float sum = pooled[i * kTileChannels + lane];
      const int values = i * kTileSqueezed + warp * kTileValues;
      const Floats<kTileValues> dh = load<kTileValues>(grad_hidden + values);
      expand =
          multiply_add(broadcast<kTileValues>(de), load<kTileValues>(activated + values), expand);
      reduce = multiply_add(broadcast<kTileValues>(sum), dh, reduce);
      expand_bias += de;
      reduce_bias = reduce_bias + dh;
    }
  }

  const int c = first_channel + lane;
  if (c >= a.channels) return;
  const float pixels = static_cast<float>(a.pixels);
#pragma unroll
  for (int j = 0; j < kTileValues; ++j) {
    const int s = first_squeezed + warp * kTileValues + j;
    if (s >= a.squeezed) break;
    static_cast<T*>(a.grad_expand_weight)[int64_t{c} * a.squeezed + s] = from_float<T>(expand[j]);
    static_cast<T*>(a.grad_reduce_weight)[int64_t{s} * a.channels + c] =
        from_float<T>(reduce[j] / pixels);
    if (c == 0) static_cast<T*>(a.grad_reduce_bias)[s] = from_float<T>(reduce_bias[j]);
  }
  if (first_squeezed == 0 && warp == 0) {
    static_cast<T*>(a.grad_expand_bias)[c] = from_float<T>(expand_bias);
  }
}

}  // namespace effnet::cuda
