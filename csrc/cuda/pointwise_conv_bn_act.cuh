// Pointwise convolution of channels-last images with all that surrounds it in inference.
//
// Tile. The pixels are the rows of a matrix, and a block computes a tile of the output of kRows
// rows by up to kColumns features. It walks through the channels in chunks of 128 bytes a row
// (gemm.cuh):
//
//     x, kRows rows  --> prologue, gate --+
//                                         +--> mma --> warp's results --> output
//     weight, kColumns rows --------------+            BN, activation, residual, sums
//
// A thread applies prologue and gate to the vectors that it copied itself, as soon as they are
// there: one barrier a chunk serves both. The gates of a tile's images wait in shared memory, where
// they fit: a load from L2 in each chunk would take longer than its products. A warp owns 16 or 32
// rows by up to 64 columns; it sends 16 rows at a time through shared memory, where nobody else's
// are, and a lane then has 8 neighbouring features of a pixel, always the same ones: their BN stays
// in registers, their sums too, and memory is read and written in 16-byte vectors.
//
// Tiles of the same rows follow each other in the grid, so that x comes from DRAM once and from the
// L2 cache after that; the weights stay there. Traffic: x read once, output written once, residual
// read once.
//
// With pooled sums no tile has rows of two images.
#pragma once

#include "gemm.cuh"

namespace effnet::cuda {

constexpr int kWarpColumns = kResultColumns;
constexpr int kColumnFragments = kWarpColumns / 8;

constexpr int kWarpResultBytes = kResultFloats * static_cast<int>(sizeof(float));

// How a block's warps lie on its tile, and the blocks that a multiprocessor is to hold.
template <int kWarpRows_, int kWarpsDown_, int kWarpsAcross_, int kBlocks_>
struct PointwiseSizes {
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kRowFragments = kWarpRows / kFragmentRows;
  static constexpr int kWarpsDown = kWarpsDown_;
  static constexpr int kWarpsAcross = kWarpsAcross_;
  static constexpr int kWarps = kWarpsDown * kWarpsAcross;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kWarpsDown * kWarpRows;
  static constexpr int kColumns = kWarpsAcross * kWarpColumns;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kStageBytes = (kRows + kColumns) * kTileRowBytes;
  static constexpr int kResultBytes = kWarps * kWarpResultBytes;  // in place of the stages
  static constexpr int kConstantBytes = 2 * kColumns * static_cast<int>(sizeof(float));
  static_assert(kWarpRows % kFragmentRows == 0 && kColumns <= kThreads);

  static constexpr int shared_bytes(int stages) {
    const int tiles = stages * kStageBytes;
    return (tiles > kResultBytes ? tiles : kResultBytes) + kConstantBytes;
  }
};

// How the output is cut into tiles. A group is one image where sums are wanted, else all of them.
// Block index: tile of columns fastest, then tile of rows, then group.
struct PointwiseTiling {
  int64_t rows;  // of a group
  int row_tiles, column_tiles;
  int columns;          // of a tile
  int gate_rows;        // of an image, or more than a tile has where that is in one image
  int gate_images;      // whose gates a block keeps in shared memory; 0: they are read from L2
  bool vectors;         // x, weight and what applies to x's channels can be read in 16 bytes
  bool output_vectors;  // output and residual, 8 elements at a time
};

// Its columns are a multiple of 16.
struct StagedTiling : PointwiseTiling {
  int warp_columns;  // likewise
  int stages;
};

// Where a block's tile, of tile_rows rows or fewer at the matrix's edge, is in the output.
struct PointwiseTile {
  int64_t group, row_in_group, first_row;  // of all rows
  int row_tile, rows;
  int first_column, columns;

  EFFNET_DEVICE PointwiseTile(const PointwiseTiling& tiling, int features, int tile_rows) {
    const int block = block_index();
    row_tile = block / tiling.column_tiles % tiling.row_tiles;
    group = block / tiling.column_tiles / tiling.row_tiles;
    row_in_group = static_cast<int64_t>(row_tile) * tile_rows;
    first_row = group * tiling.rows + row_in_group;
    rows = static_cast<int>(min(tiling.rows - row_in_group, int64_t{tile_rows}));
    first_column = block % tiling.column_tiles * tiling.columns;
    columns = min(features - first_column, tiling.columns);
  }
};

// Where a warp's results are in it.
template <class Sizes>
struct PointwisePlace : PointwiseTile {
  int warp_row, warp_column;
  int warp_columns;  // fewer than the tiling's, or none, at the matrix's edge

  EFFNET_DEVICE PointwisePlace(const StagedTiling& tiling, int features)
      : PointwiseTile(tiling, features, Sizes::kRows) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    warp_row = warp / Sizes::kWarpsAcross * Sizes::kWarpRows;
    warp_column = warp % Sizes::kWarpsAcross * tiling.warp_columns;
    warp_columns = min(columns - warp_column, tiling.warp_columns);
  }
};

// How many gates a block keeps, those of a tile's images from first_image on.
EFFNET_DEVICE int kept_gate_count(const PointwiseInference& a, const PointwiseTiling& tiling,
                                  int64_t first_image) {
  const int64_t left = (a.batch - first_image) * a.in_channels;
  return static_cast<int>(min(left, int64_t{tiling.gate_images} * a.in_channels));
}

// The end of kRows rows' 8 columns from first(row) on, of which `left` exist: y, the products, go
// through BN and activation, and where exists(row) become outputs and are added to the sums.
template <class T, int kRows, class Exists, class First>
EFFNET_DEVICE void write_outputs(const PointwiseInference& a, bool vectors,
                                 const Floats<kLaneColumns>& scale,
                                 const Floats<kLaneColumns>& shift, int left, const Exists& exists,
                                 const First& first,
                                 const Vector<T, kLaneColumns> (&residual)[kRows],
                                 Floats<kRows * kLaneColumns> y, Floats<kLaneColumns>& sums) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    set_slice(y, i, multiply_add(slice<kLaneColumns>(y, i), scale, shift));
  }
  y = activate<Math<T, kRows * kLaneColumns>>(a.activation, y);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (!exists(i)) continue;
    Floats<kLaneColumns> out = slice<kLaneColumns>(y, i);
    if (a.residual != nullptr) out = out + unpack<T, kLaneColumns>(residual[i]);
    sums = sums + out;
    store_some(static_cast<T*>(a.output) + first(i), out, left, vectors);
  }
}

// total + the sums of lanes first, first + step ..., which lie 8 columns after each other.
EFFNET_DEVICE float add_lanes(float total, const float* sums, int first, int end, int step) {
  for (int l = first; l < end; l += step) total += sums[l * kLaneColumns];
  return total;
}

// output[i, k] = activate(bn(sum_c z[i, c] * weight[k, c])) + residual[i, k],
// pooled[group, row tile, k] = the sums of the tile's outputs before they are rounded, if not null,
// with z = prologue_activation(input * scale + shift) * gate[image, c], rounded to T once.
//
// Shared memory: PointwiseSizes::shared_bytes, then gate_images x C floats. Its stages hold a chunk
// of x and then of the weight.
template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, Sizes::kBlocks)
    pointwise_conv_kernel(const __grid_constant__ PointwiseInference a,
                          const __grid_constant__ StagedTiling tiling, float* pooled) {
  constexpr int V = kTileVector<T>;
  constexpr int kTileX = Sizes::kRows * kTileRowBytes;
  const int channels = a.in_channels;
  const PointwisePlace<Sizes> place(tiling, a.out_channels);

  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  float* const scales =
      shared_floats() + (Sizes::shared_bytes(tiling.stages) - Sizes::kConstantBytes) /
                            static_cast<int>(sizeof(float));
  float* const shifts = scales + Sizes::kColumns;
  if (static_cast<int>(threadIdx.x) < tiling.columns) {
    const bool exists = static_cast<int>(threadIdx.x) < place.columns;
    const ChannelNorm norm =
        exists ? channel_norm<T>(a.bn, place.first_column + static_cast<int>(threadIdx.x))
               : ChannelNorm{};
    scales[threadIdx.x] = norm.scale;
    shifts[threadIdx.x] = norm.shift();
  }

  const T* const x = static_cast<const T*>(a.input) + place.first_row * channels;
  const T* const weight =
      static_cast<const T*>(a.weight) + static_cast<int64_t>(place.first_column) * channels;
  const auto copy = [&](int chunk, int stage) {
    char* const tile = shared + stage * Sizes::kStageBytes;
    const int first = chunk * kTileDepth<T>;
    const auto rows_of = [&](const T* matrix) {
      return [=](int row) { return matrix + static_cast<int64_t>(row) * channels; };
    };
    copy_tile<T>(tile, place.rows, first, channels, tiling.vectors, rows_of(x));
    copy_tile<T>(tile + kTileX, place.columns, first, channels, tiling.vectors, rows_of(weight));
  };

  const float* const scale = static_cast<const float*>(a.prologue.scale);
  const float* const shift = static_cast<const float*>(a.prologue.shift);
  // The image of the block's first row, and which of the image's rows that is.
  int64_t first_image = 0;
  int row_in_image = 0;
  if (a.gate != nullptr) {
    first_image = place.first_row / a.pixels;
    const int64_t rest = place.first_row - first_image * a.pixels;
    row_in_image = tiling.gate_rows == a.pixels ? static_cast<int>(rest) : 0;
  }
  float* const kept_gates =
      shared_floats() + Sizes::shared_bytes(tiling.stages) / static_cast<int>(sizeof(float));
  const auto arrived = [&](int chunk, int stage) {
    if (scale == nullptr && a.gate == nullptr) return;
    if (chunk == 0 && tiling.gate_images > 0) {
      // While the first chunks are on their way.
      const float* const gates = static_cast<const float*>(a.gate) + first_image * channels;
      const int count = kept_gate_count(a, tiling, first_image);
      for (int i = threadIdx.x; i < count; i += Sizes::kThreads) kept_gates[i] = gates[i];
      __syncthreads();
    }
    char* const tile = shared + stage * Sizes::kStageBytes;
    // As copy_tile has them, so that each thread finds its own.
    const int vectors = tile_vectors<T>(channels - chunk * kTileDepth<T>);
    for_tile_vectors(place.rows, vectors, [&](int row, int v, int offset) {
      const int channel = chunk * kTileDepth<T> + v * V;
      const int left = channels - channel;
      if (left <= 0) return;
      const float* gate = nullptr;
      if (a.gate != nullptr) {
        const int image = static_cast<unsigned>(row_in_image + row) / tiling.gate_rows;
        gate = tiling.gate_images > 0
                   ? kept_gates + image * channels
                   : static_cast<const float*>(a.gate) + (first_image + image) * channels;
      }
      T* const vector = reinterpret_cast<T*>(tile + offset);
      // Four channels at a time, since the accumulators leave few registers.
#pragma unroll
      for (int part = 0; part < V; part += 4) {
        const auto constants = [&](const float* p) {
          return unpack<float, 4>(load_some<4>(p + channel + part, left - part, tiling.vectors));
        };
        Floats<4> z = load<4>(vector + part);
        if (scale != nullptr) {
          z = activate<Math<T, 4>>(a.prologue.activation,
                                   multiply_add(z, constants(scale), constants(shift)));
        }
        if (gate != nullptr) z = z * constants(gate);
        // Channels that do not exist are zero in the weight, but must be finite here.
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i] = part + i < left ? z[i] : 0.f;
        store(vector + part, z);
      }
    });
  };

  float acc[Sizes::kRowFragments][kColumnFragments][4] = {};
  for_chunks((channels + kTileDepth<T> - 1) / kTileDepth<T>, tiling.stages, copy, arrived,
             [&](int chunk, int stage) {
               if (place.warp_row >= place.rows) return;
               char* const tile = shared + stage * Sizes::kStageBytes;
               multiply_tiles<T>(acc, tile + place.warp_row * kTileRowBytes,
                                 tile + kTileX + place.warp_column * kTileRowBytes,
                                 channels - chunk * kTileDepth<T>, place.warp_columns,
                                 !a.allow_tf32);
             });
  __syncthreads();

  // Computed again, since it would take registers in the meantime.
  const PointwisePlace<Sizes> same(tiling, a.out_channels);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // Lanes side by side share a row: as many as the warp has vectors of eight columns.
  float* const results = shared_floats() + warp * (kWarpResultBytes / sizeof(float));
  const int lanes = (max(same.warp_columns, 1) + kLaneColumns - 1) / kLaneColumns;
  const int row_lanes = 32 / lanes;
  const int column = lane % lanes * kLaneColumns;
  const int left = same.warp_columns - column;  // features from the lane's first on
  const bool active = lane / lanes < row_lanes && left > 0;
  Floats<kLaneColumns> sums = broadcast<kLaneColumns>(0.f);
  // A turn is 32 / 8 rows, or more where fewer lanes share one.
  constexpr int kMostTurns = 4, kUnroll = 2;
#pragma unroll
  for (int m = 0; m < Sizes::kRowFragments; ++m) {
    const int fragment_row = same.warp_row + m * kFragmentRows;
    if (fragment_row >= same.rows || same.warp_columns <= 0) break;
    const auto exists = [&](int turn) {
      const int row = lane / lanes + turn * row_lanes;
      return active && row < kFragmentRows && fragment_row + row < same.rows;
    };
    const auto element = [&](int turn) {
      const int64_t row = same.first_row + fragment_row + lane / lanes + turn * row_lanes;
      return row * a.out_channels + same.first_column + same.warp_column + column;
    };
    __syncwarp();
    store_fragments<0>(results, acc[m]);
    __syncwarp();
    const Floats<kLaneColumns> bn_scale =
        load_floats<kLaneColumns>(scales + same.warp_column + column);
    const Floats<kLaneColumns> bn_shift =
        load_floats<kLaneColumns>(shifts + same.warp_column + column);
    for (int turn = 0; turn < kMostTurns; turn += kUnroll) {
      if (turn * row_lanes >= kFragmentRows) break;
      const auto exists_at = [&](int i) { return exists(turn + i); };
      const auto first_at = [&](int i) { return element(turn + i); };
      Vector<T, kLaneColumns> residual[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (a.residual != nullptr && exists_at(i)) {
          residual[i] = load_some<kLaneColumns>(static_cast<const T*>(a.residual) + first_at(i),
                                                left, tiling.output_vectors);
        }
      }
      Floats<kUnroll * kLaneColumns> y;
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int row = min(lane / lanes + (turn + i) * row_lanes, kFragmentRows - 1);
        set_slice(y, i, load_results(results, row, column));
      }
      write_outputs<T>(a, tiling.output_vectors, bn_scale, bn_shift, left, exists_at, first_at,
                       residual, y, sums);
    }
  }
  if (pooled == nullptr) return;

  // The lanes' sums take the place of the results, then one thread a feature adds them up.
  __syncwarp();
  store_floats(results + lane * kLaneColumns, sums);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= same.columns) return;
  const int across = threadIdx.x / tiling.warp_columns;
  const int of_warp = threadIdx.x % tiling.warp_columns;
  // As the warps of these columns have it.
  const int sum_lanes =
      (min(same.columns - across * tiling.warp_columns, tiling.warp_columns) + kLaneColumns - 1) /
      kLaneColumns;
  float total = 0.f;
  for (int down = 0; down < Sizes::kWarpsDown; ++down) {
    const float* const of = shared_floats() +
                            (down * Sizes::kWarpsAcross + across) *
                                (kWarpResultBytes / static_cast<int>(sizeof(float))) +
                            of_warp % kLaneColumns;
    total = add_lanes(total, of, of_warp / kLaneColumns, 32 / sum_lanes * sum_lanes, sum_lanes);
  }
  pooled[(same.group * tiling.row_tiles + same.row_tile) * a.out_channels + same.first_column +
         threadIdx.x] = total;
}

}  // namespace effnet::cuda
