// Tensors as matrices of rows (pixels) by channels: how a grid of blocks is laid over them, the
// loop of a thread over its rows, and the sums of a block's threads.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

// How a (groups, rows, channels) tensor is cut into thread blocks. A group is one image where
// something is summed or given per image, else the whole tensor. A block has `lanes` threads across
// channels, one vector each, times `row_lanes` down the rows, and takes `chunk` rows of one group.
// Where a block adds up its row lanes, `parts` threads of each channel share the work.
// Block index: channel block fastest, then chunk, then group.
struct RowTiling {
  int64_t groups, rows;
  int channels;
  int lanes, row_lanes, parts;
  int channel_blocks, chunks;
  int chunk;
};

constexpr int kRowThreads = 256;
constexpr int kRowUnroll = 4;  // most rows that a thread has in flight

// blockIdx.x, read anew by each call: what is computed from it is computed again where it is needed
// again, and takes no registers in between.
EFFNET_DEVICE int block_index() {
#ifdef __CUDA_ARCH__
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
#else
  return static_cast<int>(blockIdx.x);
#endif
}

// threadIdx.x, likewise.
EFFNET_DEVICE int thread_index() {
#ifdef __CUDA_ARCH__
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// Blocks that a multiprocessor is to hold: they leave a thread 48 and 80 registers. With fewer for
// vectors, the compiler delays loads of the rows in flight until it has used others.
template <int V>
constexpr int kRowBlocks = V == 1 ? 5 : 3;

// A thread's place in a RowTiling.
template <class T, int V>
struct RowBlock {
  int64_t group, slot;
  int64_t first, step;         // bytes: to the thread's first vector, from one row to its next
  int rows, row_lanes;         // the thread's are row 0, row_lanes ... of `rows`
  int first_channel, channel;  // of the block, of the thread
  bool active;

  EFFNET_DEVICE explicit RowBlock(const RowTiling& tiling) {
    const int lane = static_cast<int>(threadIdx.x) % tiling.lanes;
    const int row_lane = static_cast<int>(threadIdx.x) / tiling.lanes;
    const int block = block_index();
    slot = block / tiling.channel_blocks;
    first_channel = (block % tiling.channel_blocks) * tiling.lanes * V;
    channel = first_channel + lane * V;
    active = channel < tiling.channels;
    group = slot / tiling.chunks;
    const int64_t first_row = (slot % tiling.chunks) * tiling.chunk;
    const int64_t left = tiling.rows - first_row;
    rows = (left < tiling.chunk ? static_cast<int>(left) : tiling.chunk) - row_lane;
    row_lanes = tiling.row_lanes;
    first = ((group * tiling.rows + first_row + row_lane) * tiling.channels + channel) * sizeof(T);
    step = static_cast<int64_t>(row_lanes) * tiling.channels * sizeof(T);
  }
};

// The address `offset` bytes after p.
template <class T>
EFFNET_DEVICE T* at(T* p, int64_t offset) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + offset);
}

// Calls load(i, offset) for kUnroll rows of the thread, so that they are in flight together, then
// use(i, offset) for the same ones, and so on. Only the last, incomplete set takes branches.
template <int kUnroll, class Block, class Load, class Use>
EFFNET_DEVICE void for_rows(const Block& block, const Load& load, const Use& use) {
  int64_t offset = block.first;
  int left = block.rows;
#pragma unroll 1
  for (; left > (kUnroll - 1) * block.row_lanes; left -= kUnroll * block.row_lanes) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) load(i, offset + i * block.step);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) use(i, offset + i * block.step);
    offset += kUnroll * block.step;
  }
#pragma unroll
  for (int i = 0; i < kUnroll - 1; ++i) {
    if (left > i * block.row_lanes) load(i, offset + i * block.step);
  }
#pragma unroll
  for (int i = 0; i < kUnroll - 1; ++i) {
    if (left > i * block.row_lanes) use(i, offset + i * block.step);
  }
}

template <int V>
EFFNET_DEVICE Floats<V> load_floats(const float* p) {
  constexpr int kWidth = V < 4 ? V : 4;  // of an access
  Floats<V> y;
#pragma unroll
  for (int i = 0; i < V / kWidth; ++i) set_slice(y, i, load<kWidth>(p + i * kWidth));
  return y;
}

template <int V>
EFFNET_DEVICE void store_floats(float* p, const Floats<V>& x) {
  constexpr int kWidth = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V / kWidth; ++i) store(p + i * kWidth, slice<kWidth>(x, i));
}

// Calls result(i, totals) for each channel i of the block, in one thread each, where totals[k] is
// the sum over the block's row lanes r of value(k, r, i). Nothing that value reads may still be
// being written: there is a barrier first. `parts` threads a channel add some row lanes each, then
// one adds the parts: all in float64, for sums of many rows may nearly cancel, and in a fixed
// order. part_sums: kSums * parts * channels.
template <int kSums, class Value, class Result>
EFFNET_DEVICE void add_row_lanes(double* part_sums, int channels, const RowTiling& tiling,
                                 const Value& value, const Result& result) {
  const int parts = tiling.parts;
  __syncthreads();
  for (int i = threadIdx.x; i < kSums * parts * channels; i += blockDim.x) {
    const int k = i / (parts * channels), rest = i % (parts * channels);
    const int part = rest / channels, channel = rest % channels;
    double sum = 0.;
    for (int r = part; r < tiling.row_lanes; r += parts) sum += value(k, r, channel);
    part_sums[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < channels; i += blockDim.x) {
    double totals[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const double* from = part_sums + k * parts * channels + i;
      totals[k] = 0.;
      for (int part = 0; part < parts; ++part) totals[k] += from[part * channels];
    }
    result(i, totals);
  }
}

// As add_row_lanes, for sums[k] of the threads: calls result(k, i, their total).
// Shared memory: kSums * lanes * V * (parts doubles + row_lanes floats), aligned to 16 bytes.
template <int V, int kSums, class Result>
EFFNET_DEVICE void sum_row_lanes(const Floats<V> (&sums)[kSums], float* shared,
                                 const RowTiling& tiling, const Result& result) {
  const int channels = tiling.lanes * V;
  float* const rows = shared + 2 * kSums * tiling.parts * channels;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    store_floats(rows + (k * blockDim.x + threadIdx.x) * V, sums[k]);  // (k, row lane, channel)
  }
  add_row_lanes<kSums>(
      reinterpret_cast<double*>(shared), channels, tiling,
      [&](int k, int r, int channel) {
        return static_cast<double>(rows[(k * tiling.row_lanes + r) * channels + channel]);
      },
      [&](int channel, const double (&totals)[kSums]) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) result(k, channel, totals[k]);
      });
}

}  // namespace effnet::cuda
