// Pointwise convolution of so few pixels that pointwise_conv_bn_act.cuh's tiles leave most
// multiprocessors idle: time is then latency, that of the chunks one after another above all.
//
// Tile. 16 rows by up to kColumns features, whose channels are split between `parts` warps of a
// block; its eight warps take 8 / parts such tiles of neighbouring rows. A warp reads its operands
// from memory to the registers that the tensor cores take them from, with all that it has room for
// on the way at once, and waits for no other warp before the sums of the parts.
//
//     x, 16 rows      --> gate --+
//                                +--> mma --> sums of the parts --> output
//     weight, kColumns rows -----+            BN, activation, residual, sums
//
// Fragments. A lane (r, q) = (lane / 4, lane % 4) loads 16 bytes of a row: vector q of 64 bytes of
// rows r and r + 8 of x, and of rows r, r + 8 ... of the weight. Its first two words serve as what
// one step of the product takes of the row, its last two as what the next one does: the channels
// come in another order than in memory, but in the same for both operands.
//
// Traffic: x read once for each tile of columns and the weight once for each of rows, from the L2
// cache; output written once, residual read once.
#pragma once

#include "pointwise_conv_bn_act.cuh"

namespace effnet::cuda {

constexpr int kLaneRows = 2;  // of x, 8 rows apart

// kAhead: pairs of steps whose operands a warp has on their way. kVectors: all tensors are read and
// written in 16 bytes, not element by element.
template <int kColumnFragments_, int kAhead_, bool kVectors_>
struct SplitSizes {
  static constexpr int kColumnFragments = kColumnFragments_;
  static constexpr int kAhead = kAhead_;
  static constexpr bool kVectors = kVectors_;
  static constexpr int kColumns = 8 * kColumnFragments;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = 2;  // on a multiprocessor
  static constexpr int kMostLogParts = 3;
  // Once the parts are added up: threads side by side across a row, and rows of a thread.
  static constexpr int kLanes = kColumns / kLaneColumns;
  static constexpr int kRowLanes = kThreads / kLanes;
  static constexpr int kTurns = kWarps * kFragmentRows / kRowLanes;
  static constexpr int kResultBytes = kWarps * kWarpResultBytes;
  static constexpr int kConstantBytes = 2 * kColumns * static_cast<int>(sizeof(float));
  static_assert(1 << kMostLogParts == kWarps && kTurns > 0 && kColumns <= kResultColumns &&
                kLaneColumns == kNormChannels);

  static constexpr int rows(int log_parts) { return kFragmentRows * (kWarps >> log_parts); }
  // Of the residual, the vectors of a thread; of all.
  template <class T>
  static constexpr int kResidualBytes = kTurns * kLaneColumns * static_cast<int>(sizeof(T));
  template <class T>
  static constexpr int kSharedBytes = kResultBytes + kConstantBytes + kThreads * kResidualBytes<T>;
};

struct SplitTiling : PointwiseTiling {
  int log_parts;  // of the warps that share 16 rows
};

// Where a thread's outputs are in the tile: `left` features from the first column on, in row `row`
// and every kRowLanes-th after it.
template <class Sizes>
struct SplitThread {
  const PointwiseTile& tile;
  int row, column, left;

  EFFNET_DEVICE explicit SplitThread(const PointwiseTile& tile) : tile(tile) {
    row = thread_index() / Sizes::kLanes;
    column = thread_index() % Sizes::kLanes * kLaneColumns;
    left = tile.columns - column;
  }
  EFFNET_DEVICE bool exists(int turn) const {
    return row + turn * Sizes::kRowLanes < tile.rows && left > 0;
  }
  EFFNET_DEVICE int64_t element(int turn, int features) const {
    // There are fewer rows than an int counts.
    const int64_t of_all = static_cast<int>(tile.first_row) + row + turn * Sizes::kRowLanes;
    return of_all * features + tile.first_column + column;
  }
};

// As pointwise_conv_kernel, without a prologue.
//
// Shared memory: the warps' products and then sums, scale and shift of the BN, each thread's
// vectors of the residual, gate_images x C floats.
template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, Sizes::kBlocks)
    pointwise_conv_split_kernel(const __grid_constant__ PointwiseInference a,
                                const __grid_constant__ SplitTiling tiling, float* pooled) {
  constexpr int V = kTileVector<T>;
  constexpr int kAhead = Sizes::kAhead, kColumnFragments = Sizes::kColumnFragments;
  constexpr int kDepth = 2 * kStepDepth<T>;
  const int channels = a.in_channels;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const PointwiseTile tile(tiling, a.out_channels, Sizes::rows(tiling.log_parts));
  // There are fewer rows than an int counts.
  const int tile_row = static_cast<int>(tile.first_row);
  const int row_in_group = static_cast<int>(tile.row_in_group);
  const int group = static_cast<int>(tile.group);
  float* const scales = shared_floats() + Sizes::kResultBytes / sizeof(float);
  float* const shifts = scales + Sizes::kColumns;
  const auto residual_vectors = [&] {
    return reinterpret_cast<T*>(shifts + Sizes::kColumns) +
           thread_index() * (Sizes::kTurns * kLaneColumns);
  };
  float* const kept_gates =
      shared_floats() + Sizes::template kSharedBytes<T> / static_cast<int>(sizeof(float));

  // The warp's pairs of steps; none where its rows are beyond the matrix.
  const int part = warp & ((1 << tiling.log_parts) - 1);
  const int first_row = (warp >> tiling.log_parts) * kFragmentRows;
  const int pairs = first_row < tile.rows ? (channels + kDepth - 1) / kDepth : 0;
  const int begin = pairs * part >> tiling.log_parts;
  const int end = pairs * (part + 1) >> tiling.log_parts;

  // Rows and columns beyond the matrix repeat its last; nobody reads what becomes of them.
  const auto row_of = [&](int h) { return min(first_row + lane / 4 + 8 * h, tile.rows - 1); };
  const int first_channel = lane % 4 * V;
  // In bytes from the tile's first row and column: 32 bits, since registers are short.
  const T* const x = static_cast<const T*>(a.input) + int64_t{tile_row} * channels;
  const T* const weight =
      static_cast<const T*>(a.weight) + static_cast<int64_t>(tile.first_column) * channels;
  const auto offset_of = [&](int row) {
    return static_cast<unsigned>(row * channels + first_channel) * static_cast<unsigned>(sizeof(T));
  };
  unsigned offset_x[kLaneRows], offset_weight[kColumnFragments];
#pragma unroll
  for (int h = 0; h < kLaneRows; ++h) offset_x[h] = offset_of(row_of(h));
#pragma unroll
  for (int n = 0; n < kColumnFragments; ++n) {
    offset_weight[n] = offset_of(min(n * 8 + lane / 4, tile.columns - 1));
  }
  Vector<T, V> words_x[kAhead][kLaneRows], words_weight[kAhead][kColumnFragments];
  // Those that do not exist are zeros.
  const auto load_pairs = [&](int pair) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int left = pair + i < end ? channels - (pair + i) * kDepth - first_channel : 0;
      const auto load_from = [&](const T* tensor, unsigned offset) {
        return load_some<V>(at(tensor + (pair + i) * kDepth, offset), left, Sizes::kVectors);
      };
#pragma unroll
      for (int h = 0; h < kLaneRows; ++h) words_x[i][h] = load_from(x, offset_x[h]);
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n) {
        words_weight[i][n] = load_from(weight, offset_weight[n]);
      }
    }
  };
  load_pairs(begin);

  // While those are on their way, what else comes from memory, all of it at once too.
  const T* const residual = static_cast<const T*>(a.residual);
  if (Sizes::kVectors && residual != nullptr) {
    const SplitThread<Sizes> thread(tile);
#pragma unroll
    for (int turn = 0; turn < Sizes::kTurns; ++turn) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; i += V) {
        if (thread.exists(turn)) {
          copy_async(residual_vectors() + turn * kLaneColumns + i,
                     residual + thread.element(turn, a.out_channels) + i, 16);
        }
      }
    }
  }
  const float* gates = nullptr;
  int offset_gate[kLaneRows] = {};
  if (a.gate != nullptr) {
    const auto image_of = [&](int row) {
      return static_cast<int>(static_cast<unsigned>(row_in_group + row) / tiling.gate_rows);
    };
    const int first_image = image_of(0);
#pragma unroll
    for (int h = 0; h < kLaneRows; ++h) {
      offset_gate[h] = (image_of(row_of(h)) - first_image) * channels;
    }
    gates = static_cast<const float*>(a.gate) + int64_t{group + first_image} * channels;
    if (tiling.gate_images > 0) {
      const int count = kept_gate_count(a, tiling, group + first_image);
      constexpr int kStep = Sizes::kVectors ? 4 : 1;
#pragma unroll 1
      for (int i = threadIdx.x * kStep; i < count; i += Sizes::kThreads * kStep) {
        if constexpr (Sizes::kVectors) {
          copy_async(kept_gates + i, gates + i, 16);
        } else {
          kept_gates[i] = gates[i];
        }
      }
      gates = kept_gates;
    }
  }
  if (warp < Sizes::kLanes) {
    const int column = warp * kNormChannels + lane % kNormChannels;
    const ChannelNorm norm = lanes_norm(
        a.bn, lane,
        lane_norm_value<T>(a.bn, lane, tile.first_column + min(column, tile.columns - 1)));
    if (lane < kNormChannels) {
      scales[column] = norm.scale;
      shifts[column] = norm.shift();
    }
  }
  wait_for_copies();
  if (gates == kept_gates) __syncthreads();

  float acc[kColumnFragments][4] = {};
#pragma unroll 1
  for (int pair = begin; pair < end; pair += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (pair + i >= end) break;
      const int channel = (pair + i) * kDepth + first_channel;
      if (gates != nullptr && channel < channels) {
#pragma unroll
        for (int h = 0; h < kLaneRows; ++h) {
#pragma unroll
          for (int j = 0; j < V; j += 4) {
            const Vector<float, 4> gate = load_some<4>(gates + offset_gate[h] + channel + j,
                                                       channels - channel - j, Sizes::kVectors);
            const Floats<4> z =
                unpack<T, 4>(slice<T, 4>(words_x[i][h], j / 4)) * unpack<float, 4>(gate);
            set_slice(words_x[i][h], j / 4, pack<T, 4>(z));
          }
        }
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int first = 2 * step, second = 2 * step + 1;
        const uint32_t fragment[4] = {words_x[i][0].word[first], words_x[i][1].word[first],
                                      words_x[i][0].word[second], words_x[i][1].word[second]};
#pragma unroll
        for (int n = 0; n < kColumnFragments; ++n) {
          multiply_step<T>(acc[n], fragment, words_weight[i][n].word[first],
                           words_weight[i][n].word[second], !a.allow_tf32);
        }
      }
    }
    if (pair + kAhead < end) load_pairs(pair + kAhead);
  }

  // Computed again, since it would take registers in the meantime.
  const PointwiseTile same(tiling, a.out_channels, Sizes::rows(tiling.log_parts));
  const SplitThread<Sizes> thread(same);
  store_fragments<0>(shared_floats() + thread_index() / 32 * kResultFloats, acc);
  __syncthreads();
  const auto exists = [&](int turn) { return thread.exists(turn); };
  const auto element = [&](int turn) { return thread.element(turn, a.out_channels); };
  Floats<Sizes::kTurns * kLaneColumns> y;
#pragma unroll
  for (int turn = 0; turn < Sizes::kTurns; ++turn) {
    const int row = min(thread.row + turn * Sizes::kRowLanes, same.rows - 1);
    const float* results =
        shared_floats() + (row / kFragmentRows << tiling.log_parts) * kResultFloats;
    Floats<kLaneColumns> sum = load_results(results, row % kFragmentRows, thread.column);
    for (int other = 1; other < 1 << tiling.log_parts; ++other) {
      results += kResultFloats;
      sum = sum + load_results(results, row % kFragmentRows, thread.column);
    }
    set_slice(y, turn, sum);
  }
  Vector<T, kLaneColumns> added[Sizes::kTurns];
#pragma unroll
  for (int turn = 0; turn < Sizes::kTurns; ++turn) {
    if (residual == nullptr || !exists(turn)) continue;
    added[turn] =
        Sizes::kVectors
            ? load_some<kLaneColumns>(residual_vectors() + turn * kLaneColumns, thread.left, true)
            : load_some<kLaneColumns>(residual + element(turn), thread.left, false);
  }
  Floats<kLaneColumns> sums = broadcast<kLaneColumns>(0.f);
  write_outputs<T>(a, Sizes::kVectors, load_floats<kLaneColumns>(scales + thread.column),
                   load_floats<kLaneColumns>(shifts + thread.column), thread.left, exists, element,
                   added, y, sums);
  if (pooled == nullptr) return;

  // The threads' sums take the place of the results, then one thread a feature adds them up.
  __syncthreads();
  store_floats(shared_floats() + threadIdx.x * kLaneColumns, sums);
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= same.columns) return;
  pooled[(same.group * tiling.row_tiles + same.row_tile) * a.out_channels + same.first_column +
         column] = add_lanes(0.f, shared_floats() + column % kLaneColumns, column / kLaneColumns,
                             min(same.rows, Sizes::kRowLanes) * Sizes::kLanes, Sizes::kLanes);
}

}  // namespace effnet::cuda
