// The gradients of a depthwise convolution of 16-bit NHWC tensors with stride 1, on the tensor
// cores: see depthwise_conv_mma.cuh for the band matrices, the walk and the shared memory.
//
// grad_input is the convolution of grad_conv with the filter turned around, so it is computed as
// the forward convolution is. grad_conv is never in memory: the rows of a step are computed from
// grad_output and the saved convolution as they are staged.
//
// grad_weight is a sum over all pixels. For one channel and one row i of the turned filter,
//
//     G_i[m, n] = sum over rows k of grad_conv[k + i, 8 b + m] * x[k, 8 b + n],    m < 16, n < 8,
//
// is a product of two tiles that lie in shared memory anyway, eight rows deep; it is summed over
// the blocks b of columns, the steps and the images of a block in registers. The weight's gradient
// is on its diagonals: tap (i, j) of the turned filter is the sum of G_i[n + j, n].
#pragma once

#include "depthwise_conv_mma.cuh"

namespace effnet::cuda {

// One block of 16 warps a multiprocessor: two channels a warp, whose bands and sums G fit its
// registers.
template <int K>
using MmaBackwardSizes = MmaSizes<K, 16>;

// Room for a channel's x in shared memory, beside the ring.
constexpr int kTilePlaneBytes = 1024;
constexpr int kTileRows = 8;  // of x that one product takes

// Fills the tiling's tile; whether it has room.
template <class Sizes>
bool fill_tile(MmaTiling& tiling, int kernel) {
  MmaTile& t = tiling.tile;
  const int chunks = tiling.group_images * tiling.column_blocks;
  t.pairs = 4 * chunks;
  t.stride = Sizes::kThreads / kVectors / t.pairs;
  t.pitch = (chunks | 1) * kChunkBytes;
  if (t.stride == 0 || tiling.rows * t.pitch > kTilePlaneBytes) return false;
  const int units = (tiling.rows + t.stride - 1) / t.stride;
  t.raw = kVectors * kGroupBytes<kTilePlaneBytes>;
  t.sums = t.raw + units * 2 * Sizes::kRawBytes;
  t.filters = t.sums + Sizes::kWarps * 2 * kBlockChannels * static_cast<int>(sizeof(float));
  t.bytes = t.filters + kBlockChannels * kernel * (kernel + 1) * static_cast<int>(sizeof(uint32_t));
  return true;
}

// Computes grad_conv from grad_output and the saved convolution. Constants of the block's channels:
// 0 - 4 are mean, scale, bias, scale * mean_du and scale * slope.
template <class T, class Sizes>
struct MmaGradConv : MmaPixels<true> {
  static constexpr int kTensors = 2;

  const BackwardArguments<T, MmaTiling>& a;
  const float* pooled = nullptr;  // of the pair's image, at the vector's channels

  EFFNET_DEVICE void image(int group) {
    MmaPixels::image(group);
    if (a.grad_pooled == nullptr) return;
    const int64_t n = place().image + group * tiling.group_images + image_of_group();
    const int channel =
        place().channel + static_cast<int>(threadIdx.x) % kVectors * kVectorChannels;
    pooled = a.grad_pooled + n * shape.channels + channel;
  }

  EFFNET_DEVICE void load(int row, char* raw) const {
    const int in = inside(row);
    MmaPixels::load<Sizes::kRawBytes>(a.grad_output, row, in, raw);
    MmaPixels::load<Sizes::kRawBytes>(a.conv, row, in, raw + 2 * Sizes::kRawBytes);
  }

  EFFNET_DEVICE void words(int row, const char* raw, uint32_t (&word)[kVectorChannels]) const {
    const int in = inside(row);
#pragma unroll
    for (int part = 0; part < kVectorChannels / 4; ++part) {
      // Constants and pixels are loaded where they are needed: registers are short here.
      const auto constant = [&](int i) { return load_shared<4>(constants(i) + 4 * part); };
      Floats<4> dz[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const auto pixel = [&](int tensor) {
          const char* at = raw + (2 * tensor + p) * Sizes::kRawBytes + 8 * part;
          return unpack_halves<T, 4>(*reinterpret_cast<const Vector<T, 4>*>(at));
        };
        Floats<4> du = pixel(0);
        if (pooled != nullptr && in != 0) {
#pragma unroll
          for (int c = 0; c < 4; ++c) du[c] += pooled[4 * part + c];
        }
        const Floats<4> d = pixel(1) - constant(0);
        du =
            du * activate_grad<Math<T, 4>>(a.activation, multiply_add(d, constant(1), constant(2)));
        dz[p] = du * constant(1) - multiply_add(d, constant(4), constant(3));
        if (!(in >> p & 1)) dz[p] = broadcast<4>(0.f);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        word[4 * part + c] = pack<T, 2>(Floats<2>{{dz[0][c], dz[1][c]}}).word[0];
      }
    }
  }
};

// Stages x, the pixels of a step themselves, through the prologue (constants 5 and 6).
template <class T, class Sizes>
struct MmaInputTile : MmaPixels<false> {
  const BackwardArguments<T, MmaTiling>& a;
  int first_row;  // of this thread's in a step
  int origin = 0;

  // Rows behind the block's own belong to another block.
  EFFNET_DEVICE int inside(int row) const { return row < place().rows ? exist() : 0; }

  EFFNET_DEVICE char* planes() const { return const_cast<char*>(shared) + tiling.layout.extra; }

  EFFNET_DEVICE void load(int group, int step) {
    image(group);
    origin = step * tiling.rows;
    char* raw = planes() + tiling.tile.raw + threadIdx.x * 16;
#pragma unroll 1
    for (int row = origin + first_row; row < origin + tiling.rows; row += tiling.tile.stride) {
      MmaPixels::load<Sizes::kRawBytes>(a.input, row, inside(row), raw);
      raw += 2 * Sizes::kRawBytes;
    }
  }

  EFFNET_DEVICE void store() const {
    const int vector = static_cast<int>(threadIdx.x) % kVectors;
    const int pair = static_cast<int>(threadIdx.x) / kVectors % tiling.tile.pairs;
    const char* raw = planes() + tiling.tile.raw + threadIdx.x * 16;
    char* words = planes() + vector * kGroupBytes<kTilePlaneBytes> + pair * 4;
#pragma unroll 1
    for (int row = first_row; row < tiling.rows; row += tiling.tile.stride) {
      uint32_t values[kVectorChannels];
      prologue_words<T>(*this, a.prologue, 5, inside(origin + row),
                        *reinterpret_cast<const MmaPixel<T>*>(raw),
                        *reinterpret_cast<const MmaPixel<T>*>(raw + Sizes::kRawBytes), values);
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c) {
        *reinterpret_cast<uint32_t*>(words + row * tiling.tile.pitch + c * kTilePlaneBytes) =
            values[c];
      }
      raw += 2 * Sizes::kRawBytes;
    }
  }
};

// With u = bn(z), du = (grad_output + grad_pooled) * activate'(u), M = N * OH * OW:
//   dz = scale * (du - grad_bn_bias / M - xhat * grad_bn_weight / M)    (batch statistics)
//   dz = scale * du                                                    (running statistics)
//   dp[n, h, w, c] = sum_ij dz[n, h + pad_top - i, w + pad_left - j, c] * weight[c, i, j]
//   grad_weight[c, i, j] = sum_nhw p[n, h, w, c] * dz[n, h + pad_top - i, w + pad_left - j, c]
// with dz and p rounded to T. With a prologue v = input * scale + shift, p = act(v):
//   dv = dp * act'(v);  grad_input = dv * scale;  grad of scale = sum dv * input, of shift = sum dv
// with dp rounded to T. Traffic: three tensors read, one written.
template <class T, int K>
__global__ void __launch_bounds__(MmaBackwardSizes<K>::kThreads, 1)
    depthwise_conv_mma_backward_kernel(const __grid_constant__ BackwardArguments<T, MmaTiling> a) {
  using Sizes = MmaBackwardSizes<K>;
  constexpr int kWarpChannels = Sizes::kWarpChannels;
  static_assert(kWarpChannels == 2, "results are written as pairs of channels");
  const ConvShape& shape = a.shape;
  const MmaTiling& tiling = a.tiling;
  const DepthwiseBlock block(tiling);
  const MmaLayout& layout = tiling.layout;
  const MmaTile& tile = tiling.tile;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int channel = block.channel + warp * kWarpChannels;
  const bool active = channel < shape.channels;

  char* shared = reinterpret_cast<char*>(dynamic_shared_memory);
  char* results = shared + layout.results;
  char* tile_planes = shared + layout.extra;
  float* sums = reinterpret_cast<float*>(tile_planes + tile.sums);  // [warp][2][channel]
  int4* segment_table = reinterpret_cast<int4*>(shared + layout.segment_table);

  const int first_ih = block.segment * tiling.segment_rows;
  const int first_iw = block.band * tiling.column_blocks * kSegmentColumns;
  const int64_t group_count = (shape.batch + tiling.group_images - 1) / tiling.group_images;
  const int64_t first_group = block.chunk * tiling.images;
  const int64_t first_n = first_group * tiling.group_images;
  const int groups =
      static_cast<int>(min(static_cast<int64_t>(tiling.images), group_count - first_group));
  const int block_rows = min(tiling.segment_rows, shape.in_h - first_ih);
  const int steps = (block_rows + tiling.rows - 1) / tiling.rows;

  const MmaPlace* place = reinterpret_cast<const MmaPlace*>(shared + layout.place);
  if (threadIdx.x == 0) {
    *reinterpret_cast<MmaPlace*>(shared + layout.place) = {
        (first_n * shape.in_h + first_ih) * shape.in_w + first_iw, shape.batch - first_n, first_n,
        block_rows, block.channel};
  }
  fill_segments(segment_table, tiling, shape.in_h, shape.in_w, first_iw,
                shape.channels * static_cast<int>(sizeof(T)));
  const bool has_prologue = a.prologue.scale != nullptr;
  const int c = block.channel + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kBlockChannels && c < shape.channels) {
    float* constant = reinterpret_cast<float*>(shared + layout.constants) + threadIdx.x;
    const ChannelNorm norm = channel_norm<T>(a.bn, c);
    float mean_du = 0.f, slope = 0.f;
    if (a.grad_bn_weight != nullptr) {
      const float count = static_cast<float>(shape.batch * shape.out_h * shape.out_w);
      mean_du = a.grad_bn_bias[c] / count;
      slope = a.grad_bn_weight[c] / count * norm.invstd;
    }
    constant[0] = norm.mean;
    constant[kBlockChannels] = norm.scale;
    constant[2 * kBlockChannels] = norm.bias;
    constant[3 * kBlockChannels] = norm.scale * mean_du;
    constant[4 * kBlockChannels] = norm.scale * slope;
    if (has_prologue) {
      constant[5 * kBlockChannels] = static_cast<const float*>(a.prologue.scale)[c];
      constant[6 * kBlockChannels] = static_cast<const float*>(a.prologue.shift)[c];
    }
  }
  for (int i = threadIdx.x; i < Sizes::kWarps * 2 * kBlockChannels; i += blockDim.x) sums[i] = 0.f;
  uint32_t* filters = reinterpret_cast<uint32_t*>(tile_planes + tile.filters);
  fill_filters<T, K>(filters, a.weight, block.channel, shape.channels);
  __syncthreads();
  const Bands<Sizes, K> bands(filters, warp, lane);

  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int vector_channel = block.channel + vector * kVectorChannels;
  MmaGradConv<T, Sizes> source{
      {shape, tiling, shared, layout.chunks, first_n, block.channel,
       first_ih - (K - 1 - shape.pad_top), first_iw - (K - 1 - shape.pad_left)},
      a};
  const int unit = static_cast<int>(threadIdx.x) / kVectors;
  MmaInputTile<T, Sizes> beside{
      {shape, tiling, shared, tiling.column_blocks, first_n, block.channel, first_ih, first_iw},
      a,
      unit < tile.stride * tile.pairs ? unit / tile.pairs : INT32_MAX / 2};

  const char* planes = shared + warp_planes<Sizes, Sizes::kPlaneBytes>(warp);
  const char* own_planes = tile_planes + warp_planes<Sizes, kTilePlaneBytes>(warp);
  // This lane's columns 2q and 2q + 1 of segment r, its warp's two channels.
  char* lane_results = results + lane / 4 * kResultSegmentBytes +
                       2 * (lane % 4) * kResultPixelBytes + (warp / 4 ^ lane % 4) * 16 +
                       warp % 4 * 4;
  const int lane_chunk = (lane >> 4) * kChunkBytes;

  float g[kWarpChannels][K][4] = {};

  const auto compute = [&](int, int, int head) {
    if (!active) return;
    if (a.grad_input != nullptr) {
#pragma unroll 1
      for (int t = 0; t < layout.tiles; ++t) {
        const int4 segment = segment_table[t * kTileSegments + lane % 16];
        int first = head + segment.z;
        if (first >= layout.slots) first -= layout.slots;
        float d[kWarpChannels][4] = {};
        multiply_bands<T, Sizes, K>(d, bands, planes + (segment.w & 0xffff) + lane_chunk, first,
                                    layout);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          char* pixel = lane_results + (t * kTileSegments + v / 2 * 8) * kResultSegmentBytes +
                        v % 2 * kResultPixelBytes;
          if (t * kTileSegments + v / 2 * 8 + lane / 4 < layout.segments) {
            *reinterpret_cast<Vector<T, 2>*>(pixel) = pack<T, 2>(Floats<2>{{d[0][v], d[1][v]}});
          }
        }
      }
    }
    if (a.partial_weight == nullptr) return;
    // Matrices of a load: row k of grad_conv from row i on, chunks 0 and 1; the same from i + 1 on.
    const int chunk_of_lane = (lane >> 3 & 1) * kChunkBytes;
#pragma unroll 1
    for (int first = 0; first < tiling.rows; first += kTileRows) {
#pragma unroll 1
      for (int b = 0; b < tile.pairs / 4; ++b) {
        // Images are a chunk further apart in the ring than in the tile.
        const int image = b / tiling.column_blocks;
        const int column = (b + image * (layout.chunks - tiling.column_blocks)) * kChunkBytes;
        const char* own = own_planes + (first + lane % 8) * tile.pitch + b * kChunkBytes;
        uint32_t x[kWarpChannels][1];
#pragma unroll
        for (int e = 0; e < kWarpChannels; ++e) {
          load_matrices<true>(x[e], own + e * kTilePlaneBytes);
        }
#pragma unroll
        for (int i = 0; i < K; i += 2) {
          int slot = head + first + i + lane % 8 + (lane >> 4);
          if (slot >= layout.slots) slot -= layout.slots;
          const char* rows = planes + slot * layout.pitch + column + chunk_of_lane;
#pragma unroll
          for (int e = 0; e < kWarpChannels; ++e) {
            uint32_t dz[4];
            load_matrices<true>(dz, rows + e * Sizes::kPlaneBytes);
            multiply_matrices<T>(g[e][i], dz[0], dz[1], x[e][0]);
            if (i + 1 < K) multiply_matrices<T>(g[e][i + 1], dz[2], dz[3], x[e][0]);
          }
        }
      }
    }
  };

  const auto finish = [&](int group, int step) {
    if (a.grad_input == nullptr) return;
    const int rows_left = place->rows - step * tiling.rows;
    const int images = static_cast<int>(
        min(place->images - group * tiling.group_images, int64_t{tiling.group_images}));
    const int64_t row =
        static_cast<int64_t>(group) * tiling.group_images * shape.in_h + step * tiling.rows;
    const int64_t pixel = place->pixel + row * shape.in_w + lane / kVectors;
    const int64_t offset = pixel * shape.channels + vector_channel;
    char* output = reinterpret_cast<char*>(a.grad_input + offset);
    const char* input = reinterpret_cast<const char*>(a.input + offset);
    const int column = lane / kVectors;
    const char* result = results + column * kResultPixelBytes + (vector ^ column / 2) * 16;
    const auto exists = [&](const int4& segment) {
      return vector_channel < shape.channels && column < segment.y && segment.z < rows_left &&
             segment.w >> 16 < images;
    };
    if (!has_prologue) {
#pragma unroll 1
      for (int s = warp; s < layout.segments; s += Sizes::kWarps) {
        const int4 segment = segment_table[s];
        if (exists(segment)) {
          *reinterpret_cast<MmaPixel<T>*>(output + segment.x) =
              *reinterpret_cast<const MmaPixel<T>*>(result + s * kResultSegmentBytes);
        }
      }
      return;
    }
    // Half a vector at a time: beside the sums of grad_weight, registers are short.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Floats<4> grad_scale = broadcast<4>(0.f), grad_shift = grad_scale;
      const Floats<4> scale = load_shared<4>(source.constants(5) + 4 * half);
      const Floats<4> shift = load_shared<4>(source.constants(6) + 4 * half);
#pragma unroll 1
      for (int s = warp; s < layout.segments; s += Sizes::kWarps) {
        const int4 segment = segment_table[s];
        if (!exists(segment)) continue;
        const int at = segment.x + 8 * half;
        const Floats<4> dp = unpack_halves<T, 4>(
            *reinterpret_cast<const Vector<T, 4>*>(result + s * kResultSegmentBytes + 8 * half));
        const Floats<4> x = load<4>(reinterpret_cast<const T*>(input + at));
        const Floats<4> dv =
            dp * activate_grad<Math<T, 4>>(a.prologue.activation, multiply_add(x, scale, shift));
        grad_scale = multiply_add(dv, x, grad_scale);
        grad_shift = grad_shift + dv;
        store(reinterpret_cast<T*>(output + at), dv * scale);
      }
      // Over the warp's columns; a warp adds to sums of its own, so their order is always the same.
      float* warp_sums = sums + warp * 2 * kBlockChannels + vector * kVectorChannels + 4 * half;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int distance = kVectors; distance < 32; distance *= 2) {
          grad_scale[c] += __shfl_xor_sync(0xffffffffu, grad_scale[c], distance);
          grad_shift[c] += __shfl_xor_sync(0xffffffffu, grad_shift[c], distance);
        }
        if (column == 0) {
          warp_sums[c] += grad_scale[c];
          warp_sums[kBlockChannels + c] += grad_shift[c];
        }
      }
    }
  };

  walk_steps<Sizes>(shared, tiling, steps, groups, source, beside, compute, finish);

  const int64_t slots = tiling.chunks * tiling.segments * tiling.bands;
  const int64_t slot = block.slot(tiling);
  if (a.partial_weight != nullptr && active) {
    const int r = lane / 4, q = lane % 4;
#pragma unroll
    for (int e = 0; e < kWarpChannels; ++e) {
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
          float sum = 0.f;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            if (r + v / 2 * 8 - (2 * q + v % 2) == j) sum += g[e][i][v];
          }
#pragma unroll
          for (int distance = 1; distance < 32; distance *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, distance);
          }
          const int64_t tap = K * K - 1 - (i * K + j);
          if (lane == 0) {
            a.partial_weight[(tap * slots + slot) * shape.channels + channel + e] = sum;
          }
        }
      }
    }
  }
  if (a.partial_prologue != nullptr) {
    __syncthreads();
    const int which = static_cast<int>(threadIdx.x) / kBlockChannels;
    const int sum_channel = block.channel + static_cast<int>(threadIdx.x) % kBlockChannels;
    if (which < 2 && sum_channel < shape.channels) {
      float sum = 0.f;
      for (int w = 0; w < Sizes::kWarps; ++w) sum += sums[w * 2 * kBlockChannels + threadIdx.x];
      a.partial_prologue[(which * slots + slot) * shape.channels + sum_channel] = sum;
    }
  }
}

}  // namespace effnet::cuda
