// Pointwise convolution from few channels to many, as MBConv's expand is one: with 16-bit elements,
// and nothing but BN and activation after it.
//
// Tile. A block keeps the weights of its columns (features) and walks over tiles of kWideRows
// rows (pixels), the next of which is on its way while one is multiplied. All of a row's channels
// are one slice. A warp has kWideWarpRows rows and takes kWideColumns columns at a time:
//
//     x, 32 rows --+
//                  +--> mma --> BN, activation --> output, 16 bytes a lane
//     weights -----+
//
// The fragments' columns are dealt out so that each lane gets eight neighbouring features of a row:
// row 8 j + r of a group of weights in shared memory is feature 8 (r / 2) + 2 j + r % 2 of it. So
// no result goes through shared memory on its way out.
//
// Rows in shared memory are an odd number of 16-byte vectors long: neither the rows that are copied
// in nor the eight rows of a matrix that the tensor cores take hit a bank twice.
//
// Traffic: x read once from DRAM (again from L2 by the blocks of other columns), output written
// once.
#pragma once

#include "gemm.cuh"

namespace effnet::cuda {

constexpr int kWideWarpRows = 2 * kFragmentRows;
constexpr int kWideColumns = 32;
constexpr int kWideThreads = 128;
constexpr int kWideRows = kWideThreads / 32 * kWideWarpRows;
constexpr int kWideBlocks = 4;  // that a multiprocessor is to hold
constexpr int kWideStages = 2;
constexpr int kWideMostChannels = 96;

// How the output is cut. Block index: columns fastest, so that blocks that run together read the
// same rows.
struct WideTiling {
  int64_t rows;
  int row_tiles, row_blocks;  // a block's tiles are row_blocks apart
  int column_blocks;
  int columns;  // of a block, a multiple of kWideColumns
  int vectors;  // of a row of x, 16 bytes each
  int steps;    // of the product
  int pitch;    // of a row in shared memory, in bytes

  int shared_bytes() const {
    return (kWideStages * kWideRows + columns) * pitch +
           2 * columns * static_cast<int>(sizeof(float));
  }
};

// output[p, k] = activate(bn(sum over c of input[p, c] * weight[k, c])) for 16-bit T; C and K are
// multiples of 8, C at most kWideMostChannels, and all pointers aligned to 16 bytes.
template <class T>
__global__ void __launch_bounds__(kWideThreads, kWideBlocks)
    pointwise_expand_kernel(const __grid_constant__ PointwiseInference a,
                            const __grid_constant__ WideTiling tiling) {
  static_assert(sizeof(T) == 2);
  constexpr int V = kTileVector<T>;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int block = static_cast<int>(blockIdx.x);
  const int first_column = block % tiling.column_blocks * tiling.columns;
  const int first_tile = block / tiling.column_blocks;
  const int columns = min(a.out_channels - first_column, tiling.columns);
  const int pitch = tiling.pitch, vectors = tiling.vectors;

  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  char* const weights = shared + kWideStages * kWideRows * pitch;
  float* const scales = reinterpret_cast<float*>(weights + tiling.columns * pitch);
  float* const shifts = scales + tiling.columns;
  for (int i = thread; i < columns; i += kWideThreads) {
    const ChannelNorm norm = channel_norm<T>(a.bn, first_column + i);
    scales[i] = norm.scale;
    shifts[i] = norm.shift();
  }
  if (vectors < 2 * tiling.steps) {
    // What the last step takes beyond the channels; never copied, so it stays zero.
    for (int i = thread; i < kWideStages * kWideRows + tiling.columns; i += kWideThreads) {
      *reinterpret_cast<Vector<T, V>*>(shared + i * pitch + vectors * 16) = {};
    }
  }

  // A thread copies every kWideThreads-th vector of a matrix's rows, one row after the other.
  const int thread_row = thread / vectors, thread_vector = thread % vectors;
  const int row_step = kWideThreads / vectors, vector_step = kWideThreads % vectors;
  const auto for_vectors = [&](int rows, const auto& copy) {
    int row = thread_row, v = thread_vector;
    while (row < rows) {
      copy(row, v);
      row += row_step;
      v += vector_step;
      if (v >= vectors) {
        v -= vectors;
        ++row;
      }
    }
  };
  const T* const weight = static_cast<const T*>(a.weight);
  for_vectors(tiling.columns, [&](int row, int v) {
    const int r = row % 8, j = row % kWideColumns / 8;
    const int column = row / kWideColumns * kWideColumns + r / 2 * 8 + j * 2 + r % 2;
    if (column >= columns) return;  // what is there instead goes to no result
    copy_async(weights + row * pitch + v * 16,
               weight + static_cast<int64_t>(first_column + column) * a.in_channels + v * V, 16);
  });

  const auto first_row = [&](int i) {
    return (first_tile + static_cast<int64_t>(i) * tiling.row_blocks) * kWideRows;
  };
  const auto rows_of = [&](int i) {
    return static_cast<int>(min(tiling.rows - first_row(i), int64_t{kWideRows}));
  };
  const auto load = [&](int i, int stage) {
    const T* const x = static_cast<const T*>(a.input) + first_row(i) * a.in_channels;
    char* const tile = shared + stage * kWideRows * pitch;
    for_vectors(rows_of(i), [&](int row, int v) {
      copy_async(tile + row * pitch + v * 16, x + row * a.in_channels + v * V, 16);
    });
  };

  const LanePlace of_a = lane_place_a(lane), of_b = lane_place_b(lane);
  const int warp_row = warp * kWideWarpRows;
  const char* const lane_b = weights + of_b.row * pitch + of_b.v * 16;
  const auto multiply = [&](int i, int stage) {
    const int rows = rows_of(i) - warp_row - lane / 4;  // from the lane's first on
    if (rows_of(i) <= warp_row) return;
    const char* const lane_a =
        shared + (stage * kWideRows + warp_row + of_a.row) * pitch + of_a.v * 16;
    T* const output = static_cast<T*>(a.output) +
                      (first_row(i) + warp_row + lane / 4) * a.out_channels + first_column;
#pragma unroll 1
    for (int group = 0; group < columns; group += kWideColumns) {
      __syncwarp();  // the lanes may have stored different rows
      float acc[2][4][4] = {};
      const char* const group_b = lane_b + group * pitch;
#pragma unroll 2
      for (int step = 0; step < tiling.steps; ++step) {
        uint32_t words_a[2][4], words_b[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          load_matrices(words_a[m], lane_a + m * kFragmentRows * pitch + step * kStepBytes);
          load_matrices(words_b[m], group_b + m * 16 * pitch + step * kStepBytes);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_step<T>(acc[m][j], words_a[m], words_b[j / 2][j % 2 * 2],
                             words_b[j / 2][j % 2 * 2 + 1], false);
          }
        }
      }
      const int column = group + lane % 4 * 8;
      if (column >= columns) continue;
      const Floats<8> scale = load_floats<8>(scales + column);
      const Floats<8> shift = load_floats<8>(shifts + column);
      Floats<32> y;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int half = i / 8, of_row = i % 8;  // rows 0, 8, 16, 24 after the lane's first
        y[i] = fmaf(acc[half / 2][of_row / 2][half % 2 * 2 + of_row % 2], scale[of_row],
                    shift[of_row]);
      }
      y = activate<Math<T, 32>>(a.activation, y);
#pragma unroll
      for (int half = 0; half < 4; ++half) {
        if (half * 8 < rows) {
          store_at_once(output + static_cast<int64_t>(half) * 8 * a.out_channels + column,
                        slice<8>(y, half));
        }
      }
    }
  };
  const int tiles = (tiling.row_tiles - first_tile + tiling.row_blocks - 1) / tiling.row_blocks;
  for_chunks(tiles, kWideStages, load, [](int, int) {}, multiply);
}

}  // namespace effnet::cuda
