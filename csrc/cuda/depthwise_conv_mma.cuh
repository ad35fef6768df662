// Depthwise convolution of 16-bit NHWC tensors on the tensor cores.
//
// One output of a 5 x 5 depthwise convolution is 25 multiply-adds for 4 bytes of traffic, and at
// the memory bandwidth of an H200 the 128 multiply-adds a cycle of a multiprocessor do not keep up.
// The tensor cores do, although most of what they multiply is zeros. For one channel c and one row
// i of its filter, eight neighbouring outputs are a product with a band matrix,
//
//     out[ow] += sum_k  band_i[ow, k] * x[k],      band_i[ow, k] = weight[c, i, k - S * ow]
//
// where x are the 16 (stride 2: 24) inputs from the first output's first tap on. Sixteen such
// inputs rows, of any sixteen *segments*, are the operand A of mma.m16n8k16, the band matrix, 16 x
// 8, is B, and K products over the rows of the filter finish
//
//     segment: 8 neighbouring outputs of one row of one channel, one row of A and of the result
//     tile:    16 segments
//
// The band matrices are built once a block and stay in registers: of a lane's words of one filter
// row, no more than one is not zero.
//
// Block. 32 channels, 8 warps of 4 channels each, walk down a band of columns of one image (or of
// `group_images` small images side by side), `rows` output rows a step. The input rows of a step
// lie in shared memory, one plane a channel, so that neighbouring columns share a word, as the
// products need them; NHWC has neighbouring channels there, and staging turns two pixels x 8
// channels around with 8 permutations. While a step is computed, the next one's rows are on their
// way. Results go through shared memory once more, to leave as 64 contiguous bytes a pixel.
//
// Shared memory, in bytes:
//     ring     [4 groups of 8 channels][8 planes][S classes of rows][slots][pitch]
//              Row g of the walk is in class g % S, slot (g / S) % slots: the rows that eight
//              segments read are then one pitch apart, an odd number of 16-byte chunks, and no
//              bank is hit twice. Groups are 32 bytes further apart than their planes are long, so
//              that the four groups' words that a warp writes lie on different banks too.
//     results  [segments][8 columns] of 64 bytes, padded to 80; segments 16 bytes further
//     raw      the pixels of the next step, where the threads' asynchronous copies put them
//     tables   what a segment and what a pair of columns is, so that nothing is divided in loops
//
// Zeros in the band matrix do not shield from non-finite inputs: an Inf or NaN makes NaN of the
// outputs in up to 8 columns around those that the convolution itself would reach.
#pragma once

#include <algorithm>

#include "batch_norm_act.cuh"
#include "depthwise_conv_bn_act.cuh"
#include "mma.cuh"

namespace effnet::cuda {

constexpr int kMmaWarps = 8;
constexpr int kMmaThreads = 32 * kMmaWarps;
// On a multiprocessor: what the registers of the band matrices allow.
template <int K>
constexpr int kMmaBlocks = K == 7 ? 1 : 2;
constexpr int kWarpChannels = kBlockChannels / kMmaWarps;
constexpr int kSegmentColumns = 8;
constexpr int kTileSegments = 16;
constexpr int kChunkBytes = 16;              // of a row in shared memory: 8 columns
constexpr int kRawBytes = kMmaThreads * 16;  // of one pixel of each thread
constexpr int kVectorChannels = 8;           // 16 bytes of 16-bit channels
constexpr int kVectors = kBlockChannels / kVectorChannels;
constexpr int kResultPixelBytes = kBlockChannels * 2 + 16;
constexpr int kResultSegmentBytes = kSegmentColumns * kResultPixelBytes + 16;

// A block's shared memory: extents, and in bytes pitches and offsets.
struct MmaLayout {
  int chunks;                     // of one image in a row
  int pairs;                      // of columns in a row, all images together
  int stride_rows, stride_pairs;  // from a pair to the next one that the same thread stages
  int pitch;                      // from slot to slot
  int slots;                      // of a class
  int class_bytes;                // of a plane
  int plane_bytes;
  int group_bytes;  // from 8 channels to the next 8
  int segments;     // of a step
  int tiles;
  int in_flight;  // pairs of pixels that a thread has on their way
  int results, raw, segment_table, pair_table, constants, bytes;
};

// How the work is cut into blocks. Block index: channel block fastest, then band, then segment of
// rows, then chunk of image groups.
struct MmaTiling {
  MmaLayout layout;
  int channel_blocks;
  int column_blocks;  // of 8 columns, in a band
  int bands;
  int rows;      // of a step
  int segments;  // of segment_rows rows each, a multiple of `rows`
  int segment_rows;
  int group_images;  // side by side; more than one only where one step is the whole image
  int images;        // groups in a block, one after another
  int64_t chunks;    // of `images` groups
};

// What the kernel size and stride fix.
template <int K, int S>
struct MmaSizes {
  static constexpr int kChunks = S == 1 ? 2 : 3;  // that a segment reads of a row
  static constexpr int kClasses = S;              // rows from one output's first to the next's
  static constexpr int kSlots = (K - 1) / S + 1;  // that a segment reads
  static_assert(7 * S + K <= kChunks * 8, "a segment's inputs do not fit its chunks");

  // Slots that a walk of `rows` a step keeps.
  static constexpr int slots(int rows) { return rows + kSlots - 1; }
  // Chunks of one image's row in a band.
  static constexpr int chunks(int column_blocks) { return S * (column_blocks - 1) + kChunks; }
};

template <class Sizes>
MmaLayout mma_layout(const MmaTiling& tiling) {
  MmaLayout l;
  l.chunks = Sizes::chunks(tiling.column_blocks);
  l.pairs = tiling.group_images * l.chunks * 4;
  l.stride_rows = kMmaThreads / kVectors / l.pairs;
  l.stride_pairs = kMmaThreads / kVectors % l.pairs;
  l.pitch = (tiling.group_images * l.chunks | 1) * kChunkBytes;
  l.slots = Sizes::slots(tiling.rows);
  l.class_bytes = l.slots * l.pitch;
  l.plane_bytes = Sizes::kClasses * l.class_bytes;
  l.group_bytes = kVectorChannels * l.plane_bytes + 32;
  l.segments = tiling.group_images * tiling.rows * tiling.column_blocks;
  l.tiles = (l.segments + kTileSegments - 1) / kTileSegments;
  l.results = kVectors * l.group_bytes;
  // All that a step stages, within reason.
  const int units = tiling.rows * Sizes::kClasses * l.pairs * kVectors;
  l.in_flight = std::min((units + kMmaThreads - 1) / kMmaThreads, 6);
  l.raw = l.results + l.tiles * kTileSegments * kResultSegmentBytes;
  l.segment_table = l.raw + l.in_flight * 2 * kRawBytes;
  l.pair_table = l.segment_table + l.tiles * kTileSegments * static_cast<int>(sizeof(int4));
  l.constants = l.pair_table + l.pairs * static_cast<int>(sizeof(int2));
  l.bytes = l.constants + 4 * kBlockChannels * static_cast<int>(sizeof(float));
  return l;
}

// Where the planes of a warp's channels begin.
EFFNET_DEVICE int channel_plane(const MmaLayout& layout, int warp) {
  const int channel = warp * kWarpChannels;
  return channel / kVectorChannels * layout.group_bytes +
         channel % kVectorChannels * layout.plane_bytes;
}

// The filters of the block's channels as words of two taps: [channel][row][1 + tap] is taps `tap`
// and `tap` + 1, for taps from -1 on, with zeros outside the filter. In shared memory.
template <class T, int K>
EFFNET_DEVICE void fill_filters(uint32_t* words, const T* __restrict__ weight, int first_channel,
                                int channels) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(weight);
  for (int i = threadIdx.x; i < kBlockChannels * K * (K + 1); i += blockDim.x) {
    const int channel = first_channel + i / (K * (K + 1));
    const uint16_t* row = bits + static_cast<int64_t>(channel) * K * K + i / (K + 1) % K * K;
    const auto tap = [&](int j) -> uint32_t {
      return j >= 0 && j < K && channel < channels ? row[j] : 0;
    };
    const int j = i % (K + 1) - 1;
    words[i] = tap(j) | tap(j + 1) << 16;
  }
}

// The band matrices of a warp's channels. A lane's word of chunk h holds the filter's row i from
// tap 2q - S r + 8 h on, and of the two or three chunks no more than one reaches the filter: so one
// word [e][i] is kept, and mask[h] is all ones where it belongs to chunk h, else zero.
template <class T, int K, int S>
struct Bands {
  uint32_t word[kWarpChannels][K];
  uint32_t mask[MmaSizes<K, S>::kChunks];

  EFFNET_DEVICE Bands(const uint32_t* filters, int warp, int lane) {
    int first = 2 * (lane % 4) - S * (lane / 4);
#pragma unroll
    for (int h = 0; h < MmaSizes<K, S>::kChunks; ++h) {
      mask[h] = first + 8 * h >= -1 && first + 8 * h < K ? 0xffffffffu : 0u;
    }
    while (first < -1) first += 8;
    const uint32_t* words = filters + warp * kWarpChannels * K * (K + 1) + 1 + min(first, K - 1);
#pragma unroll
    for (int e = 0; e < kWarpChannels; ++e) {
#pragma unroll
      for (int i = 0; i < K; ++i) word[e][i] = words[(e * K + i) * (K + 1)];
    }
  }

  EFFNET_DEVICE uint32_t operator()(int e, int i, int h) const {
    return bitwise_and(word[e][i], mask[h]);
  }
};

// Multiplies a tile's inputs with the bands: d[e] = columns 2q and 2q + 1 of segment r and of
// segment r + 8, of channel e. `planes` points at this lane's chunk of its segment in the first
// channel's plane, `first` is the slot of its first row. Channel by channel there are four sums
// that do not wait for each other.
template <class T, int K, int S>
EFFNET_DEVICE void multiply_bands(float (&d)[kWarpChannels][4], const Bands<T, K, S>& bands,
                                  const char* planes, int first, int third_chunk,
                                  const MmaLayout& layout) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    int slot = first + i / S;
    if (slot >= layout.slots) slot -= layout.slots;
    const char* row = planes + slot * layout.pitch + i % S * layout.class_bytes;
#pragma unroll
    for (int e = 0; e < kWarpChannels; ++e) {
      uint32_t x[4];
      load_matrices<false>(x, row + e * layout.plane_bytes);
      multiply_matrices<T>(d[e], x[0], x[1], x[2], x[3], bands(e, i, 0), bands(e, i, 1));
      if constexpr (S == 2) {
        uint32_t third[2];
        load_matrices<false>(third, row + e * layout.plane_bytes + third_chunk);
        multiply_matrices<T>(d[e], third[0], third[1], bands(e, i, 2));
      }
    }
  }
}

// Walks a block through its steps, image group after image group. Each step's rows are staged while
// the step before is computed; the rows that two steps of an image share are staged once.
//   source.image(group)            the next rows are those of this group of images
//   source.load(row, pair, raw)     starts to copy two pixels of 8 channels, rows counted from the
//                                   walk's first, to raw and to raw + kRawBytes
//   source.words(raw, row, pair, w) the 8 channels' words
//   compute(group, step, head)     head: the slot of the step's first row
//   finish(group, step)            after the barrier behind compute
template <class Sizes, class Source, class Compute, class Finish>
EFFNET_DEVICE void walk_steps(char* ring, const MmaLayout& layout, int rows, int steps, int groups,
                              Source& source, const Compute& compute, const Finish& finish) {
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int first = static_cast<int>(threadIdx.x) / kVectors;
  const int first_row = first / layout.pairs, first_pair = first % layout.pairs;
  const auto advance = [&](int& row, int& pair) {
    row += layout.stride_rows;
    pair += layout.stride_pairs;
    if (pair >= layout.pairs) {
      pair -= layout.pairs;
      ++row;
    }
  };
  char* planes = ring + vector * layout.group_bytes;
  char* raw = ring + layout.raw + threadIdx.x * 16;

  int group = -1, next_group = 0, step = 0, next_step = 0, head = 0;
  for (;;) {
    const bool more = next_group < groups;
    // The rows to stage: all of a new image's first step, else those that the step adds.
    int origin = 0, base = 0, staged = 0, next_head = 0;
    if (more) {
      staged = layout.slots * Sizes::kClasses;
      if (next_step > 0) {
        origin = (layout.slots + (next_step - 1) * rows) * Sizes::kClasses;
        staged = rows * Sizes::kClasses;
        base = head;
        next_head = head + rows;
        if (next_head >= layout.slots) next_head -= layout.slots;
      } else {
        source.image(next_group);
      }
    }
    int load_row = first_row, load_pair = first_pair;
    int store_row = first_row, store_pair = first_pair;
    bool computed = false;
    do {
#pragma unroll 1
      for (int i = 0; i < layout.in_flight; ++i) {
        if (load_row < staged) source.load(origin + load_row, load_pair, raw + i * 2 * kRawBytes);
        advance(load_row, load_pair);
      }
      if (!computed) {
        computed = true;
        if (group >= 0) compute(group, step, head);
        __syncthreads();
      }
      wait_for_copies();
#pragma unroll 1
      for (int i = 0; i < layout.in_flight; ++i) {
        if (store_row < staged) {
          int slot = base + store_row / Sizes::kClasses;
          if (slot >= layout.slots) slot -= layout.slots;
          char* word = planes + store_row % Sizes::kClasses * layout.class_bytes +
                       slot * layout.pitch + store_pair * 4;
          uint32_t words[kVectorChannels];
          source.words(raw + i * 2 * kRawBytes, origin + store_row, store_pair, words);
#pragma unroll
          for (int c = 0; c < kVectorChannels; ++c) {
            *reinterpret_cast<uint32_t*>(word + c * layout.plane_bytes) = words[c];
          }
        }
        advance(store_row, store_pair);
      }
    } while (load_row < staged);
    if (group >= 0) finish(group, step);
    if (!more) return;
    __syncthreads();
    group = next_group;
    step = next_step;
    head = next_head;
    if (++next_step == steps) {
      next_step = 0;
      ++next_group;
    }
  }
}

// Reads the convolution's input through the prologue.
template <class T>
struct MmaInput {
  const ForwardArguments<T, MmaTiling>& a;
  const char* shared;
  int vector, channel, first_h;
  int64_t first_image;        // of the block
  const T* pixels = nullptr;  // of the group's first image, at the vector's channels
  int images = 0;             // of the group

  EFFNET_DEVICE void image(int group) {
    const int64_t n = first_image + group * a.tiling.group_images;
    pixels = a.input + n * a.shape.in_h * a.shape.in_w * a.shape.channels + channel;
    images = static_cast<int>(min(a.shape.batch - n, static_cast<int64_t>(a.tiling.group_images)));
  }

  EFFNET_DEVICE int2 pair(int index) const {
    return reinterpret_cast<const int2*>(shared + a.tiling.layout.pair_table)[index];
  }

  // Which of a pair's two pixels exist, as bits.
  EFFNET_DEVICE int inside(int row, int2 pair) const {
    const bool any = channel < a.shape.channels && pair.y >> 2 < images &&
                     static_cast<unsigned>(first_h + row) < static_cast<unsigned>(a.shape.in_h);
    return any ? pair.y & 3 : 0;
  }

  EFFNET_DEVICE void load(int row, int index, char* raw) const {
    const int2 columns = pair(index);
    const int in = inside(row, columns);
    const int64_t pixel = static_cast<int64_t>(first_h + row) * a.shape.in_w + columns.x;
    const T* p = pixels + pixel * a.shape.channels;
    // What does not exist has no address, even to copy nothing from.
    copy_async(raw, in & 1 ? p : a.input, in & 1);
    copy_async(raw + kRawBytes, in & 2 ? p + a.shape.channels : a.input, in & 2);
  }

  EFFNET_DEVICE void words(const char* raw, int row, int index,
                           uint32_t (&word)[kVectorChannels]) const {
    using Pixel = Vector<T, kVectorChannels>;
    const Pixel first_pixel = *reinterpret_cast<const Pixel*>(raw);
    const Pixel second_pixel = *reinterpret_cast<const Pixel*>(raw + kRawBytes);
    if (a.prologue.scale == nullptr) {
#pragma unroll
      for (int i = 0; i < kVectorChannels / 2; ++i) {
        word[2 * i] = lower_halves(first_pixel.word[i], second_pixel.word[i]);
        word[2 * i + 1] = upper_halves(first_pixel.word[i], second_pixel.word[i]);
      }
      return;
    }
    const int in = inside(row, pair(index));
    const float* scale = reinterpret_cast<const float*>(shared + a.tiling.layout.constants) +
                         vector * kVectorChannels;
#pragma unroll
    for (int part = 0; part < kVectorChannels / 4; ++part) {
      const Floats<4> scale4 = load_shared<4>(scale + 4 * part);
      const Floats<4> shift4 = load_shared<4>(scale + kBlockChannels + 4 * part);
      const auto value = [&](const Pixel& pixel, bool exists) {
        const Floats<4> x = activate<Math<T, 4>>(
            a.prologue.activation,
            multiply_add(unpack<T, 4>(slice<T, 4>(pixel, part)), scale4, shift4));
        return exists ? x : broadcast<4>(0.f);
      };
      const Floats<4> first = value(first_pixel, in & 1), second = value(second_pixel, in & 2);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        word[4 * part + c] = pack<T, 2>(Floats<2>{{first[c], second[c]}}).word[0];
      }
    }
  }
};

// What each segment of a step and each pair of columns is.
//   segment: {output pixel from the group's first image and the step's first row on, columns that
//             exist, row, image << 16 | first chunk}
//   pair:    {input pixel from the group's first image's row on, validity of both | image << 2}
template <class Sizes, int S>
EFFNET_DEVICE void fill_tables(const MmaTiling& tiling, const MmaLayout& layout, int4* segments,
                               int2* pairs, int out_h, int out_w, int first_ow, int in_h, int in_w,
                               int first_w) {
  for (int i = threadIdx.x; i < layout.tiles * kTileSegments; i += blockDim.x) {
    // Those that only fill a tile read what the last one reads.
    const int s = min(i, layout.segments - 1);
    const int b = s % tiling.column_blocks;
    const int a = s / tiling.column_blocks % tiling.rows;
    const int g = s / tiling.column_blocks / tiling.rows;
    const int column = kSegmentColumns * b;
    const int columns = i < layout.segments ? min(out_w - first_ow - column, kSegmentColumns) : 0;
    segments[i] = int4{(g * out_h + a) * out_w + column, max(columns, 0), a,
                       g << 16 | (g * layout.chunks + S * b)};
  }
  for (int i = threadIdx.x; i < layout.pairs; i += blockDim.x) {
    const int g = i / (4 * layout.chunks);
    const int w = first_w + i % (4 * layout.chunks) * 2;
    const auto inside = [&](int column) { return column >= 0 && column < in_w; };
    pairs[i] = int2{g * in_h * in_w + w, int{inside(w)} | int{inside(w + 1)} << 1 | g << 2};
  }
}

// conv[n, oh, ow, c] = sum_ij p[n, oh * S + i - pad_top, ow * S + j - pad_left, c] * weight[c, i,
// j]
//
// with p = input or prologue_activation(input * scale + shift), rounded to T. Inference: output =
// activate(bn(conv)), and pooled[n, segment * bands + band, c] = the sums of the block's outputs if
// not null. Training: output = conv, and moments[(count, mean, M2), slot, c] if not null. Traffic:
// input read once (the halo of neighbouring bands comes from L2), output written once.
template <class T, int K, int S, bool kTraining>
__global__ void __launch_bounds__(kMmaThreads, kMmaBlocks<K>)
    depthwise_conv_mma_kernel(const __grid_constant__ ForwardArguments<T, MmaTiling> a) {
  using Sizes = MmaSizes<K, S>;
  const DepthwiseShape& shape = a.shape;
  const MmaTiling& tiling = a.tiling;
  const DepthwiseBlock block(tiling);
  const MmaLayout& layout = tiling.layout;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int channel = block.channel + warp * kWarpChannels;
  const bool active = channel < shape.channels;

  char* shared = reinterpret_cast<char*>(dynamic_shared_memory);
  char* results = shared + layout.results;
  int4* segment_table = reinterpret_cast<int4*>(shared + layout.segment_table);
  int2* pair_table = reinterpret_cast<int2*>(shared + layout.pair_table);
  // Of the block's channels: scale and shift of the prologue, then those of BN.
  float* constants = reinterpret_cast<float*>(shared + layout.constants);

  const int first_oh = block.segment * tiling.segment_rows;
  const int last_oh = min(first_oh + tiling.segment_rows, shape.out_h);
  const int first_ow = block.band * tiling.column_blocks * kSegmentColumns;
  const int step_rows = tiling.rows;
  const int steps = (last_oh - first_oh + step_rows - 1) / step_rows;
  const int64_t group_count = (shape.batch + tiling.group_images - 1) / tiling.group_images;
  const int64_t first_group = block.chunk * tiling.images;
  const int groups =
      static_cast<int>(min(static_cast<int64_t>(tiling.images), group_count - first_group));
  const int64_t first_n = first_group * tiling.group_images;

  fill_tables<Sizes, S>(tiling, layout, segment_table, pair_table, shape.out_h, shape.out_w,
                        first_ow, shape.in_h, shape.in_w, first_ow * S - shape.pad_left);
  const bool has_prologue = a.prologue.scale != nullptr;
  if (threadIdx.x < kBlockChannels) {
    const int c = block.channel + static_cast<int>(threadIdx.x);
    float* constant = constants + threadIdx.x;
    if (has_prologue && c < shape.channels) {
      constant[0] = static_cast<const float*>(a.prologue.scale)[c];
      constant[kBlockChannels] = static_cast<const float*>(a.prologue.shift)[c];
    }
    if (!kTraining && c < shape.channels) {
      const ChannelNorm norm = channel_norm<T>(a.bn, c);
      constant[2 * kBlockChannels] = norm.scale;
      constant[3 * kBlockChannels] = norm.bias - norm.mean * norm.scale;
    }
  }
  uint32_t* filters = reinterpret_cast<uint32_t*>(results);
  fill_filters<T, K>(filters, a.weight, block.channel, shape.channels);
  __syncthreads();
  const Bands<T, K, S> bands(filters, warp, lane);
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int vector_channel = block.channel + vector * kVectorChannels;
  const int first_h = first_oh * S - shape.pad_top;
  MmaInput<T> source{a, shared, vector, vector_channel, first_h, first_n};

  const char* warp_planes = shared + channel_plane(layout, warp);
  char* warp_results = results + lane / 4 * kResultSegmentBytes +
                       2 * (lane % 4) * kResultPixelBytes + warp * kWarpChannels * 2;
  // The matrices that load_matrices takes: segments 0 - 7, 8 - 15 of chunk 0, the same of chunk 1.
  const int lane_chunk = (lane >> 4) * kChunkBytes;
  const int third_chunk = 2 * kChunkBytes - lane_chunk;

  ShiftedSums totals[kWarpChannels];
  float pooled[2][kWarpChannels] = {};  // of segments r and r + 8
  int counted = 0;
  const bool reduces = kTraining ? a.moments != nullptr : a.pooled != nullptr;
  // Half a tile may be an image of its own.
  const bool half_tiles = tiling.rows * tiling.column_blocks == kTileSegments / 2;

  // Adds the pooled sums over the lanes and writes them for the images of tile `t`.
  const auto flush_pooled = [&](int group, int t) {
#pragma unroll
    for (int e = 0; e < kWarpChannels; ++e) {
      if (!half_tiles) pooled[0][e] += pooled[1][e];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = pooled[half][e];
        pooled[half][e] = 0.f;
        if (half == 1 && !half_tiles) break;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        }
        const int s = t * kTileSegments + half * kTileSegments / 2;
        const int64_t n = first_n + group * tiling.group_images + (segment_table[s].w >> 16);
        if (lane == 0 && s < layout.segments && n < shape.batch) {
          const int64_t parts = tiling.segments * tiling.bands;
          const int64_t part = block.segment * tiling.bands + block.band;
          a.pooled[(n * parts + part) * shape.channels + channel + e] = sum;
        }
      }
    }
  };

  const auto compute = [&](int group, int step, int head) {
    if (!active) return;
    const int rows_left = last_oh - first_oh - step * step_rows;
    const int images = static_cast<int>(min(shape.batch - first_n - group * tiling.group_images,
                                            static_cast<int64_t>(tiling.group_images)));
#pragma unroll 1
    for (int t = 0; t < layout.tiles; ++t) {
      // y[(e * 4 + v)]: channel e; v as multiply_bands leaves them.
      Floats<kWarpChannels * 4> y;
      {
        float d[kWarpChannels][4] = {};
        const int4 segment = segment_table[t * kTileSegments + lane % 16];
        const char* planes = warp_planes + (segment.w & 0xffff) * kChunkBytes + lane_chunk;
        int first = head + segment.z;
        if (first >= layout.slots) first -= layout.slots;
        multiply_bands<T, K, S>(d, bands, planes, first, third_chunk, layout);
        Floats<kWarpChannels> scale, shift;
        if constexpr (!kTraining) {
          const float* constant = constants + warp * kWarpChannels;
          scale = load_shared<kWarpChannels>(constant + 2 * kBlockChannels);
          shift = load_shared<kWarpChannels>(constant + 3 * kBlockChannels);
        }
#pragma unroll
        for (int e = 0; e < kWarpChannels; ++e) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            y[e * 4 + v] = kTraining ? d[e][v] : fmaf(d[e][v], scale[e], shift[e]);
          }
        }
      }
      if constexpr (!kTraining) y = activate<Math<T, kWarpChannels * 4>>(a.activation, y);

      // Channel by channel pairs: pixel v of channels 0 and 1, of 2 and 3.
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const Vector<T, kWarpChannels> four =
            pack<T, kWarpChannels>(Floats<4>{{y[v], y[4 + v], y[8 + v], y[12 + v]}});
        char* pixel = warp_results + (t * kTileSegments + v / 2 * 8) * kResultSegmentBytes +
                      v % 2 * kResultPixelBytes;
        *reinterpret_cast<Vector<T, kWarpChannels>*>(pixel) = four;
        if constexpr (kTraining) {
          // Statistics of the stored values: those of others would not normalise them.
          const Floats<4> stored = unpack<T, 4>(four);
#pragma unroll
          for (int e = 0; e < kWarpChannels; ++e) y[e * 4 + v] = stored[e];
        }
      }
      if (!reduces) continue;

      bool exists[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int4 segment = segment_table[t * kTileSegments + half * 8 + lane / 4];
        const bool row = segment.z < rows_left && segment.w >> 16 < images;
        exists[2 * half] = row && 2 * (lane % 4) < segment.y;
        exists[2 * half + 1] = row && 2 * (lane % 4) + 1 < segment.y;
      }
      if constexpr (kTraining) {
        if (counted == 0) {
#pragma unroll
          for (int e = 0; e < kWarpChannels; ++e) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              if (exists[v]) totals[e].origin = y[e * 4 + v];
            }
          }
        }
#pragma unroll
        for (int e = 0; e < kWarpChannels; ++e) {
          float sum = 0.f, squares = 0.f;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float delta = exists[v] ? y[e * 4 + v] - totals[e].origin : 0.f;
            sum += delta;
            squares = fmaf(delta, delta, squares);
          }
          totals[e].sum += sum;
          totals[e].squares += squares;
        }
        counted += exists[0] + exists[1] + exists[2] + exists[3];
      } else {
#pragma unroll
        for (int e = 0; e < kWarpChannels; ++e) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            if (exists[v]) pooled[v / 2][e] += y[e * 4 + v];
          }
        }
        // Where the next tile is of another image, or the image ends.
        const bool last = t + 1 == layout.tiles;
        const int image = segment_table[t * kTileSegments].w >> 16;
        if (last ? step + 1 == steps
                 : half_tiles || segment_table[(t + 1) * kTileSegments].w >> 16 != image) {
          flush_pooled(group, t);
        }
      }
    }
  };

  const auto finish = [&](int group, int step) {
    if (vector_channel >= shape.channels) return;
    const int64_t n = first_n + group * tiling.group_images;
    const int rows_left = last_oh - first_oh - step * step_rows;
    const int images =
        static_cast<int>(min(shape.batch - n, static_cast<int64_t>(tiling.group_images)));
    T* output = a.output +
                ((n * shape.out_h + first_oh + step * step_rows) * shape.out_w + first_ow) *
                    static_cast<int64_t>(shape.channels) +
                vector_channel;
    // This thread's column is the same in every segment.
    const int pixel = static_cast<int>(threadIdx.x) / kVectors;
    const int column = pixel % kSegmentColumns;
    const char* result = results + column * kResultPixelBytes + vector * kVectorChannels * 2;
    constexpr int kStride = kMmaThreads / kVectors / kSegmentColumns;
#pragma unroll 4
    for (int s = pixel / kSegmentColumns; s < layout.segments; s += kStride) {
      const int4 segment = segment_table[s];
      if (column < segment.y && segment.z < rows_left && segment.w >> 16 < images) {
        const int64_t offset = segment.x + column;
        *reinterpret_cast<Vector<T, kVectorChannels>*>(output + offset * shape.channels) =
            *reinterpret_cast<const Vector<T, kVectorChannels>*>(result + s * kResultSegmentBytes);
      }
    }
  };

  walk_steps<Sizes>(shared, layout, tiling.rows, steps, groups, source, compute, finish);

  if constexpr (kTraining) {
    if (a.moments == nullptr || !active) return;
    const int64_t slots = tiling.chunks * tiling.segments * tiling.bands;
    double* out = a.moments + block.slot(tiling) * shape.channels + channel;
#pragma unroll
    for (int e = 0; e < kWarpChannels; ++e) {
      Moments all = totals[e].moments(counted);
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        all.merge({__shfl_xor_sync(0xffffffffu, all.count, distance),
                   __shfl_xor_sync(0xffffffffu, all.mean, distance),
                   __shfl_xor_sync(0xffffffffu, all.m2, distance)});
      }
      if (lane == 0 && channel + e < shape.channels) {
        out[e] = all.count;
        out[slots * shape.channels + e] = all.mean;
        out[2 * slots * shape.channels + e] = all.m2;
      }
    }
  }
}

}  // namespace effnet::cuda
