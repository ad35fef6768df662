// Depthwise convolution of 16-bit NHWC tensors on the tensor cores, with stride 1: what the kernel
// of its gradients (depthwise_conv_mma_backward.cuh) is built from. (With stride 2 a band reaches
// 24 inputs for eight outputs.)
//
// The gradients of a 5 x 5 depthwise convolution are 50 multiply-adds a pixel, and at the memory
// bandwidth of an H200 the 128 multiply-adds a cycle of a multiprocessor do not keep up. The tensor
// cores do, although most of what they multiply is zeros. For one channel c and one row i of its
// filter, eight neighbouring outputs are a product with a band matrix,
//
//     out[ow] += sum_k  band_i[ow, k] * x[k],      band_i[ow, k] = weight[c, i, k - ow]
//
// where x are the 16 inputs from the first output's first tap on. Sixteen such
// rows of inputs, of any sixteen *segments*, are the operand A of mma.m16n8k16, the band matrix, 16
// x 8, is B, and K products over the rows of the filter finish
//
//     segment: 8 neighbouring outputs of one row of one channel, one row of A and of the result
//     tile:    16 segments
//
// The band matrices are built once a block and stay in shared memory: of a lane's words of one
// filter row, no more than one is not zero.
//
// Block. 32 channels, a few for each warp, walk down a band of columns of one image (or of
// `group_images` small images side by side), `rows` output rows a step. The input rows of a step
// lie in shared memory, one plane a channel, so that neighbouring columns share a word, as the
// products need them; NHWC has neighbouring channels there, and staging turns two pixels x 8
// channels around with 8 permutations. While a step is computed, the next one's rows are on their
// way. Results go through shared memory once more, to leave as 64 contiguous bytes a pixel.
//
// Shared memory, in bytes:
//     ring     [4 groups of 8 channels][8 planes][slots][pitch]
//              Row g of the walk is in slot g % slots: the rows that eight segments read are one
//              pitch apart, an odd number of 16-byte chunks, and no bank is hit twice. Groups are
//              32 bytes further apart than their planes are long, so that the four groups' words
//              that a warp writes lie on different banks too.
//     results  [segments][8 columns] of 64 bytes, the vector v of a column's channels in place
//              v ^ column / 2, so that what a warp writes is spread over the banks; segments 64
//              bytes further
//     raw      the pixels of the next step, where the threads' asynchronous copies put them
//     tables   what a segment and what a pair of columns is, so that nothing is divided in loops
//
// Zeros in the band matrix do not shield from non-finite inputs: an Inf or NaN makes NaN of the
// outputs in up to 8 columns around those that the convolution itself would reach.
#pragma once

#include <algorithm>

#include "depthwise_conv_backward.cuh"
#include "mma.cuh"
#include "rows.cuh"

namespace effnet::cuda {

constexpr int kSegmentColumns = 8;
constexpr int kTileSegments = 16;
constexpr int kChunkBytes = 16;     // of a row in shared memory: 8 columns
constexpr int kVectorChannels = 8;  // 16 bytes of 16-bit channels
constexpr int kVectors = kBlockChannels / kVectorChannels;
constexpr int kResultPixelBytes = kBlockChannels * 2;
constexpr int kResultSegmentBytes = kSegmentColumns * kResultPixelBytes + 64;

// From the planes of 8 channels to those of the next 8.
template <int kPlaneBytes>
constexpr int kGroupBytes = kVectorChannels * kPlaneBytes + 32;

// A block's shared memory: extents, and in bytes pitches and offsets.
struct MmaLayout {
  int chunks;    // of one image in a row
  int pairs;     // of columns in a row, all images together
  int stride;    // rows that the threads stage at a time
  int pitch;     // from slot to slot
  int slots;     // rows of a plane
  int segments;  // of a step
  int tiles;
  int pixel_bytes;
  int in_flight;  // pairs of pixels that a thread has on their way
  int results, raw, segment_table, constants, place, extra, bytes;
};

// Where a block keeps the pixels of a step themselves, in bytes; in the room behind
// MmaLayout::extra.
struct MmaTile {
  int pairs;   // of columns in a row, all images together
  int stride;  // rows that the threads stage at a time
  int pitch;   // from row to row
  int raw, sums, filters, bytes;
};

// How the work is cut into blocks. Block index: channel block fastest, then band, then segment of
// rows, then chunk of image groups.
struct MmaTiling {
  MmaLayout layout;
  MmaTile tile;
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

// What the kernel size and the number of warps fix.
template <int K, int kWarps_>
struct MmaSizes {
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpChannels = kBlockChannels / kWarps;
  static constexpr int kRawBytes = 16 * kThreads;  // of one pixel of each thread
  static constexpr int kFilterBytes = kBlockChannels * K * (K + 1) * 4;
  // Room for a channel's rows: fixed, so that the planes' offsets are part of the instructions.
  static constexpr int kPlaneBytes = 1440;
  static constexpr int kKernel = K;
  static_assert(7 + K <= 16, "the inputs of eight outputs do not fit two chunks");
};

// Where the planes of a warp's channels begin, of planes of kPlaneBytes.
template <class Sizes, int kPlaneBytes>
EFFNET_DEVICE int warp_planes(int warp) {
  const int channel = warp * Sizes::kWarpChannels;
  return channel / kVectorChannels * kGroupBytes<kPlaneBytes> +
         channel % kVectorChannels * kPlaneBytes;
}

// Where a block is in the output. In shared memory, since registers are short.
struct alignas(16) MmaPlace {
  int64_t pixel;   // the first
  int64_t images;  // from its first one to the last of the batch
  int64_t image;   // the first
  int rows;
  int channel;  // the first
};

// Whether the tiling's step fits its planes and `most` bytes of shared memory; fills its layout,
// for rows of `tensors` tensors (h x w = shape.in_h x shape.in_w), `constants` floats a channel and
// `extra` bytes behind everything else.
template <class Sizes>
bool fill_layout(MmaTiling& tiling, const ConvShape& shape, int tensors, int constants, int extra,
                 int most) {
  MmaLayout& l = tiling.layout;
  l.pixel_bytes = shape.channels * 2;
  l.chunks = tiling.column_blocks + 1;
  l.pairs = tiling.group_images * l.chunks * 4;
  l.stride = Sizes::kThreads / kVectors / l.pairs;
  l.pitch = (tiling.group_images * l.chunks | 1) * kChunkBytes;
  l.slots = tiling.rows + Sizes::kKernel - 1;
  if (l.stride == 0 || l.slots * l.pitch > Sizes::kPlaneBytes) return false;
  l.segments = tiling.group_images * tiling.rows * tiling.column_blocks;
  l.tiles = (l.segments + kTileSegments - 1) / kTileSegments;
  // All that a step stages, within reason.
  l.in_flight = std::min((l.slots + l.stride - 1) / l.stride, 4);
  l.results = kVectors * kGroupBytes<Sizes::kPlaneBytes>;
  // Before the first results the filters lie there.
  l.raw = l.results + std::max(l.segments * kResultSegmentBytes, Sizes::kFilterBytes);
  l.segment_table = l.raw + l.in_flight * tensors * 2 * Sizes::kRawBytes;
  l.constants = l.segment_table + l.tiles * kTileSegments * static_cast<int>(sizeof(int4));
  l.place = l.constants + constants * kBlockChannels * static_cast<int>(sizeof(float));
  l.extra = l.place + static_cast<int>(sizeof(MmaPlace));
  l.bytes = l.extra + extra;
  return l.bytes <= most;
}

// The filters of the block's channels as words of two taps: [channel][row][1 + tap] is taps `tap`
// and `tap` + 1, for taps from -1 on, with zeros outside the filter. In shared memory. The
// filter is turned by 180 degrees, as the gradient of the input has it.
template <class T, int K>
EFFNET_DEVICE void fill_filters(uint32_t* words, const T* __restrict__ weight, int first_channel,
                                int channels) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(weight);
  for (int i = threadIdx.x; i < kBlockChannels * K * (K + 1); i += blockDim.x) {
    const int channel = first_channel + i / (K * (K + 1));
    const uint16_t* filter = bits + static_cast<int64_t>(channel) * K * K;
    const auto tap = [&](int j) -> uint32_t {
      if (j < 0 || j >= K || channel >= channels) return 0;
      return filter[K * K - 1 - (i / (K + 1) % K * K + j)];
    };
    const int j = i % (K + 1) - 1;
    words[i] = tap(j) | tap(j + 1) << 16;
  }
}

// The band matrices of a warp's channels. A lane's word of chunk h holds the filter's row i from
// tap 2q - S r + 8 h on, and of the two or three chunks no more than one reaches the filter: so
// there is one word a row, and mask[h] is all ones where it belongs to chunk h, else zero. The
// words stay in shared memory: registers are short.
template <class Sizes, int K>
struct Bands {
  const uint32_t* words;
  uint32_t mask[2];

  EFFNET_DEVICE Bands(const uint32_t* filters, int warp, int lane) {
    int first = 2 * (lane % 4) - lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mask[h] = first + 8 * h >= -1 && first + 8 * h < K ? 0xffffffffu : 0u;
    }
    if (first < -1) first += 8;
    words = filters + warp * Sizes::kWarpChannels * K * (K + 1) + 1 + min(first, K - 1);
  }

  EFFNET_DEVICE uint32_t operator()(int e, int i, int h) const {
    return bitwise_and(words[(e * K + i) * (K + 1)], mask[h]);
  }
};

// Multiplies a tile's inputs with the bands: d[e] = columns 2q and 2q + 1 of segment r and of
// segment r + 8, of channel e. `planes` points at this lane's chunk of its segment in the first
// channel's plane, `first` is the slot of its first row. Channel by channel there are four sums
// that do not wait for each other.
template <class T, class Sizes, int K>
EFFNET_DEVICE void multiply_bands(float (&d)[Sizes::kWarpChannels][4], const Bands<Sizes, K>& bands,
                                  const char* planes, int first, const MmaLayout& layout) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    int slot = first + i;
    if (slot >= layout.slots) slot -= layout.slots;
    const char* row = planes + slot * layout.pitch;
#pragma unroll
    for (int e = 0; e < Sizes::kWarpChannels; ++e) {
      uint32_t x[4];
      load_matrices<false>(x, row + e * Sizes::kPlaneBytes);
      multiply_matrices<T>(d[e], x[0], x[1], x[2], x[3], bands(e, i, 0), bands(e, i, 1));
    }
  }
}

// Walks a block through its steps, image group after image group. Each step's rows are staged while
// the step before is computed; the rows that two steps of an image share are staged once. A thread
// stages the same pair of columns and vector of channels of every `stride`-th row.
//   source.image(group)     the next rows are those of this group of images
//   source.load(row, raw)   starts to copy the pair's two pixels, rows counted from the walk's
//                           first, to raw and to raw + kRawBytes, of kTensors tensors
//   source.words(row, raw, word)  the 8 channels' words
//   beside.load(group, step), beside.store()  what else a step needs in shared memory: starts to
//                           copy it; stores it once the step before is computed
//   compute(group, step, head)    head: the slot of the step's first row
//   finish(group, step)           after the barrier behind compute
template <class Sizes, class Source, class Beside, class Compute, class Finish>
EFFNET_DEVICE void walk_steps(char* shared, const MmaTiling& tiling, int steps, int groups,
                              Source& source, Beside& beside, const Compute& compute,
                              const Finish& finish) {
  constexpr int kUnitBytes = Source::kTensors * 2 * Sizes::kRawBytes;
  const MmaLayout& layout = tiling.layout;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int unit = static_cast<int>(threadIdx.x) / kVectors;
  // Threads that are left over when the pairs are dealt out stage nothing.
  const int first_row = unit < layout.stride * layout.pairs ? unit / layout.pairs : INT32_MAX / 2;
  char* words = shared + vector * kGroupBytes<Sizes::kPlaneBytes> + unit % layout.pairs * 4;
  char* raw = shared + layout.raw + threadIdx.x * 16;

  int group = -1, next_group = 0, step = 0, next_step = 0, head = 0;
  for (;;) {
    const bool more = next_group < groups;
    // The rows to stage: all of a new image's first step, else those that the step adds.
    int origin = 0, base = 0, staged = 0, next_head = 0;
    if (more) {
      staged = layout.slots;
      if (next_step > 0) {
        origin = staged + (next_step - 1) * tiling.rows;
        staged = tiling.rows;
        base = head;
        next_head = head + tiling.rows;
        if (next_head >= layout.slots) next_head -= layout.slots;
      } else {
        source.image(next_group);
      }
    }
    const int batch = layout.in_flight * layout.stride;
    bool computed = false;
    int row = first_row;
    do {
      const int end = min(row + batch, staged);
      char* slot = raw;
#pragma unroll 1
      for (int r = row; r < end; r += layout.stride, slot += kUnitBytes) {
        source.load(origin + r, slot);
      }
      const bool first_pass = !computed;
      if (first_pass) {
        computed = true;
        if (more) beside.load(next_group, next_step);
        if (group >= 0) compute(group, step, head);
        __syncthreads();
      }
      wait_for_copies();
      if (first_pass && more) beside.store();
      slot = raw;
#pragma unroll 1
      for (; row < end; row += layout.stride, slot += kUnitBytes) {
        int index = base + row;
        if (index >= layout.slots) index -= layout.slots;
        char* word = words + index * layout.pitch;
        uint32_t values[kVectorChannels];
        source.words(origin + row, slot, values);
#pragma unroll
        for (int c = 0; c < kVectorChannels; ++c) {
          *reinterpret_cast<uint32_t*>(word + c * Sizes::kPlaneBytes) = values[c];
        }
      }
    } while (row < staged);
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

// The pixels that a thread stages of tensors with the shape of the convolution's input or output:
// of a pair of columns and one vector of channels, row by row.
template <bool kOfOutput>
struct MmaPixels {
  const ConvShape& shape;
  const MmaTiling& tiling;
  const char* shared;
  int64_t offset;  // in bytes, of the pair's first pixel in row first_h of the block's first image
  int group_row = 0;  // from there to the same row of the group's image
  int first_h;
  // In one register, bit by bit: which of the pair's two columns exist; the same where their image
  // exists, else 0; from bit 4 on, which image of the group they belong to.
  int columns;

  EFFNET_DEVICE int height() const { return kOfOutput ? shape.out_h : shape.in_h; }
  EFFNET_DEVICE int width() const { return kOfOutput ? shape.out_w : shape.in_w; }
  EFFNET_DEVICE int row_bytes() const { return width() * shape.channels * 2; }

  // chunks: of 8 columns of one image in a row of the tile.
  EFFNET_DEVICE MmaPixels(const ConvShape& shape, const MmaTiling& tiling, const char* shared,
                          int chunks, int64_t first_image, int first_channel, int first_h,
                          int first_w)
      : shape(shape), tiling(tiling), shared(shared), first_h(first_h) {
    const int pair = static_cast<int>(threadIdx.x) / kVectors % (4 * tiling.group_images * chunks);
    const int channel = first_channel + static_cast<int>(threadIdx.x) % kVectors * kVectorChannels;
    const int w = first_w + pair % (4 * chunks) * 2;
    const int image_of_group = pair / (4 * chunks);
    const bool has_channels = channel < shape.channels;
    columns = int{has_channels && w >= 0 && w < width()} |
              int{has_channels && w + 1 >= 0 && w + 1 < width()} << 1 | image_of_group << 4;
    const int64_t row = (first_image + image_of_group) * height() + first_h;
    offset = ((row * width() + w) * shape.channels + channel) * 2;
  }

  EFFNET_DEVICE const MmaPlace& place() const {
    return *reinterpret_cast<const MmaPlace*>(shared + tiling.layout.place);
  }

  EFFNET_DEVICE int image_of_group() const { return columns >> 4; }
  EFFNET_DEVICE int exist() const { return columns >> 2 & 3; }

  EFFNET_DEVICE void image(int group) {
    const int n = group * tiling.group_images;
    columns &= ~12;
    if (n + image_of_group() < place().images) columns |= (columns & 3) << 2;
    group_row = n * height();
  }

  EFFNET_DEVICE int inside(int row) const {
    return static_cast<unsigned>(first_h + row) < static_cast<unsigned>(height()) ? exist() : 0;
  }

  template <int kRawBytes>
  EFFNET_DEVICE void load(const void* tensor, int row, int in, char* raw) const {
    const char* p = static_cast<const char*>(tensor) + offset +
                    static_cast<int64_t>(group_row + row) * row_bytes();
    copy_async(raw, p, in << 4 & 16);
    copy_async(raw + kRawBytes, p + tiling.layout.pixel_bytes, in << 3 & 16);
  }

  // Constants `i` of this thread's channels.
  EFFNET_DEVICE const float* constants(int i) const {
    return reinterpret_cast<const float*>(shared + tiling.layout.constants) + i * kBlockChannels +
           static_cast<int>(threadIdx.x) % kVectors * kVectorChannels;
  }
};

template <class T>
using MmaPixel = Vector<T, kVectorChannels>;

// The words of two pixels' channels; through the prologue where there is one, whose scale and shift
// are constants `first` and `first` + 1.
template <class T, class Pixels>
EFFNET_DEVICE void prologue_words(const Pixels& pixels, const Prologue& prologue, int first, int in,
                                  const MmaPixel<T>& pixel0, const MmaPixel<T>& pixel1,
                                  uint32_t (&word)[kVectorChannels]) {
  if (prologue.scale == nullptr) {
#pragma unroll
    for (int i = 0; i < kVectorChannels / 2; ++i) {
      word[2 * i] = lower_halves(pixel0.word[i], pixel1.word[i]);
      word[2 * i + 1] = upper_halves(pixel0.word[i], pixel1.word[i]);
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < kVectorChannels / 4; ++part) {
    const Floats<4> scale = load_shared<4>(pixels.constants(first) + 4 * part);
    const Floats<4> shift = load_shared<4>(pixels.constants(first + 1) + 4 * part);
    // Both pixels, channel by channel.
    Floats<8> x;
    const Floats<4> x0 = unpack_halves<T, 4>(slice<T, 4>(pixel0, part));
    const Floats<4> x1 = unpack_halves<T, 4>(slice<T, 4>(pixel1, part));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[2 * c] = fmaf(x0[c], scale[c], shift[c]);
      x[2 * c + 1] = fmaf(x1[c], scale[c], shift[c]);
    }
    x = activate<Math<T, 8>>(prologue.activation, x);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[2 * c] = in & 1 ? x[2 * c] : 0.f;
      x[2 * c + 1] = in & 2 ? x[2 * c + 1] : 0.f;
      word[4 * part + c] = pack<T, 2>(slice<2>(x, c)).word[0];
    }
  }
}

// What each segment of a step is, down the columns, so that the eight rows of a matrix lie one
// pitch apart: {offset in bytes from the output's pixel of the group's first image and the step's
// first row, columns that exist, row, image << 16 | offset of its first chunk in a row}. Those that
// only fill a tile read what the last one reads.
EFFNET_DEVICE void fill_segments(int4* segments, const MmaTiling& tiling, int out_h, int out_w,
                                 int first_ow, int pixel_bytes) {
  const MmaLayout& layout = tiling.layout;
  for (int i = threadIdx.x; i < layout.tiles * kTileSegments; i += blockDim.x) {
    const int s = min(i, layout.segments - 1);
    const int row = s % tiling.rows;
    const int g = s / tiling.rows / tiling.column_blocks;
    const int b = s / tiling.rows % tiling.column_blocks;
    const int column = kSegmentColumns * b;
    const int columns = i < layout.segments ? min(out_w - first_ow - column, kSegmentColumns) : 0;
    segments[i] = int4{((g * out_h + row) * out_w + column) * pixel_bytes, max(columns, 0), row,
                       g << 16 | (g * layout.chunks + b) * kChunkBytes};
  }
}

}  // namespace effnet::cuda
