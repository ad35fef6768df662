// A Fused-MBConv block in one launch: a dense k x k convolution of channels-last images, C to M
// channels, and the pointwise convolution to K channels, each with BN and activation, and the
// residual. The middle tensor z, four to six times as wide as the input, exists in registers only.
//
//     acc1[p, m] = sum over taps t, channels c of  x[pixel(p, t), c] * expand_weight[m, t, c]
//     z[p, m] = expand_activation(bn(acc1[p, m])), rounded to T
//     acc2[p, k] += sum over m of  z[p, m] * project_weight[k, m]
//     output[p, k] = project_activation(bn(acc2[p, k])) + residual[p, k]
//
// Tile. A block computes a rectangle of an image's output, or some whole images where they are
// small: up to kRows pixels p. Three operands lie in shared memory:
//
//     halo     the input pixels that the tile's windows reach, all channels, brought once, zeros
//              outside of the image. Lanes give ldmatrix the addresses of rows: for each tap and
//              stride a fragment of the matrix of windows is in place already, and never made.
//     ring     expand_weight in chunks of 128 bytes a row (gemm.cuh). A row of the tensor has its
//              taps and their channels one after another; the product runs through them in steps
//              of two 16-byte vectors, which may be of two taps.
//     project  project_weight for the z that come next
//
// A warp has 16 or 32 pixels and 128 bytes of middle channels (64 of 16 bits, 32 of float32) at a
// time. When their acc1 is complete, it is in the registers of the lanes that need it as the first
// operand of the second product: with m16n8 results, a lane's columns 2q and 2q + 1 of two
// neighbouring fragments are a step's words of 16 bits. (Words of float32 belong to columns q and
// q + 4: lanes give ldmatrix the rows of expand_weight in an order that puts these where 2q and
// 2q + 1 are.) acc2 stays in registers through all middle channels.
//
// Warps across a tile have the same pixels, and middle channels in turn; their acc2 are added up at
// the end. Small images, which make few tiles, use the multiprocessors so.
//
// Bank conflicts. From pixel to pixel of the halo it is an odd number of vectors, and lines are
// padded such that all pixels of a tile lie as if they were of one line: eight rows that follow
// each other are on different banks. With stride 2 even columns lie before odd ones, so that
// neighbouring outputs' windows begin side by side.
//
// Shared memory bandwidth: a warp of 32 pixels loads 6 fragments of 512 bytes for 16 products of a
// step, 1.5 cycles of it for each. L2: each tile reads expand_weight, as many bytes for a product
// as there are rows to share them.
//
// Where the input has so many channels that their halo does not fit, the channels are cut into
// slices, and the halo is brought slice by slice for each acc1. Where K is too wide for registers,
// it is cut into parts, and blocks compute z for each. Traffic otherwise: x and its halo, residual
// read once, output written once.
//
// Without project_weight, z + residual is the output, and the sums of z over pixels may be wanted;
// middle channels are then cut into parts where there are too few tiles. (From few channels of 16
// bits to few, without sums, that is dense_conv.cuh's.)
//
// What fills an odd vector of a step up is multiplied by zero: an infinity in the first tap's
// channels may give NaN where the convolution itself has an infinity.
#pragma once

#include "gemm.cuh"

namespace effnet::cuda {

constexpr int kFusedMostStages = 4;
// Middle channels whose scale and shift are in shared memory at a time.
constexpr int kFusedConstants = 1024;

// How a block's warps lie on its tile, and the blocks that a multiprocessor is to hold.
// kOutputFragments: of 8 columns of acc2; 0 without project_weight. kSliced: it can take the
// input's channels in slices.
template <int kRowFragments_, int kWarpsDown_, int kWarpsAcross_, int kOutputFragments_,
          int kBlocks_, bool kSliced_>
struct FusedSizes {
  static constexpr int kRowFragments = kRowFragments_;
  static constexpr int kWarpRows = kRowFragments * kFragmentRows;
  static constexpr int kWarpsDown = kWarpsDown_;
  static constexpr int kWarpsAcross = kWarpsAcross_;
  static constexpr int kWarps = kWarpsDown * kWarpsAcross;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kWarpsDown * kWarpRows;
  static constexpr bool kProject = kOutputFragments_ > 0;
  static constexpr int kOutputFragments = kProject ? kOutputFragments_ : 2;
  static constexpr int kColumns = kProject ? kOutputFragments * 8 : 0;
  static constexpr int kBlocks = kBlocks_;
  static constexpr bool kSliced = kSliced_;
  static constexpr int kResultBytes = kWarps * kResultFloats * static_cast<int>(sizeof(float));
  static_assert(kProject || kWarpsAcross == 1, "what is stored at once is not added up");
  static_assert(kRows <= 128, "lines and columns of a tile share a word");
};

// How the output is cut into tiles, and a block's shared memory. Block index: part fastest, then
// tile across, tile down, group of images.
struct FusedTiling {
  int parts;
  int part;            // output channels of one, a multiple of 16; or its groups of middle channels
  int groups;          // of middle channels: as many as all warps across take at a time
  int tile_h, tile_w;  // outputs
  int tiles_h, tiles_w;           // of an image
  int images;                     // of a tile; more than one where it is a whole image
  int rows;                       // its outputs
  int halo_h, halo_w;             // of an image's part of a tile
  int odd_columns;                // where they begin, in columns: stride 2
  int pixel_pitch, line_pitch;    // bytes
  int slices, slice_vectors;      // of the input's channels, 1 or even; 16-byte vectors of one
  int row_vectors, slice_chunks;  // of a row of expand_weight, of one slice
  int group_chunks, chunks;       // of all slices, of all groups
  int middle;                     // rows of a chunk that a warp across takes
  int constants;                  // middle channels whose scale and shift are kept
  int stages;
  // In shared memory, in bytes: sizes, then offsets.
  int stage_bytes, halo_bytes;
  int project, halo, table, sources, windows, pixels, scales, results, bytes;
  // What can be read in 16 bytes: x and the weights; output and residual 8 elements at a time.
  bool vectors, expand_vectors, project_vectors, output_vectors;
  bool whole_rows;  // expand_weight's are, in memory as in a single slice, vector after vector
};

// Where a block is in the output. Computed where it is needed, since it would take registers
// between.
struct FusedPlace {
  int part;
  int64_t first_n;
  int images;
  int tile;
  int first_oh, first_ow;

  EFFNET_DEVICE FusedPlace(const FusedMbconv& a, const FusedTiling& t) {
    int block = block_index();
    part = 0;
    if (t.parts > 1) {
      part = block % t.parts;
      block /= t.parts;
    }
    const int tiles = t.tiles_h * t.tiles_w;
    tile = block % tiles;
    first_n = int64_t{block / tiles} * t.images;
    images = static_cast<int>(min(a.shape.batch - first_n, int64_t{t.images}));
    first_oh = tile / t.tiles_w * t.tile_h;
    first_ow = tile % t.tiles_w * t.tile_w;
  }
};

// Waits for the warps that share pixels.
template <class Sizes>
EFFNET_DEVICE void sync_warps_across() {
  if constexpr (Sizes::kWarpsAcross == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Where a column of the halo lies, in columns.
EFFNET_DEVICE int column_place(int column, int stride, int odd_columns) {
  return stride == 1 ? column : column % 2 * odd_columns + column / 2;
}

// What the block looks up: see fused_mbconv_kernel.
template <class Sizes>
EFFNET_DEVICE void fill_tables(const FusedMbconv& a, const FusedTiling& t) {
  const ConvShape& shape = a.shape;
  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  int* const table = reinterpret_cast<int*>(shared + t.table);
  int* const sources = reinterpret_cast<int*>(shared + t.sources);
  for (int i = threadIdx.x; i < t.slice_chunks * kTileVectors; i += Sizes::kThreads) {
    const int tap = i / t.slice_vectors;
    const int row = tap / shape.kernel, column = tap - row * shape.kernel;
    const int offset = row * t.line_pitch +
                       column_place(column, shape.stride, t.odd_columns) * t.pixel_pitch +
                       (i - tap * t.slice_vectors) * 16;
    const bool exists = i < t.row_vectors;
    table[i / kTileVectors * kTileVectors + i % 2 * kTileSteps + i % kTileVectors / 2] =
        exists ? offset : 0;
    sources[i] = exists ? tap << 16 | (i - tap * t.slice_vectors) : -1;
  }
  const FusedPlace place(a, t);
  int* const windows = reinterpret_cast<int*>(shared + t.windows);
  int* const pixels = reinterpret_cast<int*>(shared + t.pixels);
  for (int p = threadIdx.x; p < Sizes::kRows; p += Sizes::kThreads) {
    const int row = min(p, t.rows - 1);
    const int line = row / t.tile_w, column = row - line * t.tile_w;
    const int image = line / t.tile_h;
    windows[p] = (image * t.halo_h + (line - image * t.tile_h) * shape.stride) * t.line_pitch +
                 column * t.pixel_pitch;
    const bool exists = p < t.rows && image < place.images &&
                        line - image * t.tile_h < shape.out_h - place.first_oh &&
                        column < shape.out_w - place.first_ow;
    pixels[p] = exists ? line << 8 | column : -1;
  }
}

// Starts to copy a slice of the input's channels.
template <class T, class Sizes>
EFFNET_DEVICE void copy_halo(const FusedMbconv& a, const FusedTiling& t, int slice) {
  constexpr int V = kTileVector<T>;
  const ConvShape& shape = a.shape;
  const FusedPlace place(a, t);
  const int first_h = place.first_oh * shape.stride - shape.pad_top;
  const int first_w = place.first_ow * shape.stride - shape.pad_left;
  const T* const x = static_cast<const T*>(a.input);
  char* const halo =
      reinterpret_cast<char*>(dynamic_shared_memory) + t.halo + slice % 2 * t.halo_bytes;
  // Neighbouring threads have neighbouring vectors of a pixel, always the same ones, and step
  // through the pixels without a division.
  const int lanes = min(t.slice_vectors, Sizes::kThreads);
  const int stride = Sizes::kThreads / lanes;
  const int first = static_cast<int>(threadIdx.x) / lanes;
  if (first >= stride) return;
  const int stride_lines = stride / t.halo_w, stride_columns = stride - stride_lines * t.halo_w;
  for (int v = static_cast<int>(threadIdx.x) - first * lanes; v < t.slice_vectors; v += lanes) {
    const int channel = (slice * t.slice_vectors + v) * V;
    int line = first / t.halo_w, column = first - line * t.halo_w;
#pragma unroll 1
    while (line < place.images * t.halo_h) {
      const int image = t.images == 1 ? 0 : line / t.halo_h;
      const int h = first_h + line - image * t.halo_h, w = first_w + column;
      const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(shape.in_h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(shape.in_w);
      SourceVector<T> from{x, exists ? a.in_channels - channel : 0};
      if (from.left > 0) {
        from.p +=
            (((place.first_n + image) * shape.in_h + h) * shape.in_w + w) * a.in_channels + channel;
      }
      char* const to = halo + line * t.line_pitch +
                       column_place(column, shape.stride, t.odd_columns) * t.pixel_pitch + v * 16;
      if (t.vectors) {
        copy_vector(to, from);
      } else {
        copy_elements(to, from);
      }
      line += stride_lines;
      column += stride_columns;
      if (column >= t.halo_w) {
        column -= t.halo_w;
        ++line;
      }
    }
  }
}

// Starts to copy a chunk of a slice of expand_weight's rows first_row ..., of which `rows` are
// wanted.
template <class T>
EFFNET_DEVICE void copy_expand(const FusedMbconv& a, const FusedTiling& t, char* tile,
                               int first_row, int rows, int slice, int chunk) {
  constexpr int V = kTileVector<T>;
  const int* const sources = reinterpret_cast<const int*>(
      reinterpret_cast<const char*>(dynamic_shared_memory) + t.sources);
  const int vectors = tile_vectors<T>((t.row_vectors - chunk * kTileVectors) * V);
  if (t.whole_rows) {
    const int pitch = t.row_vectors * V;
    const T* const row = static_cast<const T*>(a.expand_weight) + int64_t{first_row} * pitch;
    copy_rows<T>(tile, rows, vectors, pitch, true, [&](int v) {
      const int first = (chunk * kTileVectors + v) * V;
      return SourceVector<T>{first < pitch ? row + first : row, pitch - first};
    });
    return;
  }
  const int64_t pitch = int64_t{a.shape.kernel * a.shape.kernel} * a.in_channels;
  copy_rows<T>(tile, rows, vectors, pitch, t.expand_vectors, [&](int v) {
    SourceVector<T> from{static_cast<const T*>(a.expand_weight) + first_row * pitch, 0};
    const int source = sources[chunk * kTileVectors + v];
    const int channel = (slice * t.slice_vectors + (source & 0xffff)) * V;
    if (source >= 0 && channel < a.in_channels) {
      from.p += int64_t{source >> 16} * a.in_channels + channel;
      from.left = a.in_channels - channel;
    }
    return from;
  });
}

// Starts to copy the columns first ... of project_weight's rows first_row ...
template <class T>
EFFNET_DEVICE void copy_project(const FusedMbconv& a, const FusedTiling& t, char* tile,
                                int first_row, int rows, int first) {
  const int channels = a.shape.channels;
  copy_rows<T>(tile, rows, tile_vectors<T>(channels - first), channels, t.project_vectors,
               [&](int v) {
                 const int left = channels - first - v * kTileVector<T>;
                 const T* const row =
                     static_cast<const T*>(a.project_weight) + int64_t{first_row} * channels;
                 return SourceVector<T>{left > 0 ? row + channels - left : row, left};
               });
}

// What BN does to the channels first ... of `channels`.
template <class T, class Sizes>
EFFNET_DEVICE void fill_scales(const BatchNorm& bn, int first, int count, int channels,
                               float* scale, float* shift) {
  for (int i = threadIdx.x; i < count; i += Sizes::kThreads) {
    const ChannelNorm norm = first + i < channels ? channel_norm<T>(bn, first + i) : ChannelNorm{};
    scale[i] = norm.scale;
    shift[i] = norm.shift();
  }
}

// The words of a step of z as the second product takes them: fragments kFirst ... of acc1 after BN
// and activation. Columns from `middle` on are zero, whatever they hold.
template <class T, int kFirst, int kRowFragments, int N>
EFFNET_DEVICE void middle_words(uint32_t (&words)[kRowFragments][4],
                                const float (&acc)[kRowFragments][N][4], const float* scales,
                                const float* shifts, Activation activation, int middle) {
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kFragments = kStepDepth<T> / 8;
  constexpr int kValues = kFragments * 4;
  const int q = thread_index() % 4;
  const auto column = [&](int fragment, int i) {
    return (kFirst + fragment) * 8 + (kFloat ? q + i % 2 * 4 : 2 * q + i % 2);
  };
  const auto of_columns = [&](const float* p, int fragment) {
    if constexpr (kFloat) {
      return Floats<2>{{p[column(fragment, 0)], p[column(fragment, 1)]}};
    } else {
      return load<2>(p + column(fragment, 0));
    }
  };
#pragma unroll
  for (int m = 0; m < kRowFragments; ++m) {
    Floats<kValues> y;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const Floats<2> scale = of_columns(scales, f), shift = of_columns(shifts, f);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[f * 4 + i] = fmaf(acc[m][kFirst + f][i], scale[i % 2], shift[i % 2]);
      }
    }
    y = activate<Math<T, kValues>>(activation, y);
    if (middle < N * 8) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) y[i] = column(i / 4, i) < middle ? y[i] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kFloat) {
        words[m][i] = bit_cast<uint32_t>(y[i % 2 * 2 + i / 2]);
      } else {
        words[m][i] = pack<T, 2>(slice<2>(y, i)).word[0];
      }
    }
  }
}

// Stores fragments kFirst ... of 16 rows of the tile, from first_row on, to output channels
// first_column ..., of which `columns` exist, after BN, activation and residual: the sum of what
// the warps across have. All of these call it. Adds to `sums` what the lane stored, before the
// residual.
template <class T, class Sizes, int kFirst, int N>
EFFNET_DEVICE void store_fused(const FusedMbconv& a, const FusedTiling& t, const float (&acc)[N][4],
                               int first_row, int first_column, int columns, const float* scales,
                               const float* shifts, Activation activation,
                               Floats<kLaneColumns>& sums) {
  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  const int* const pixels = reinterpret_cast<const int*>(shared + t.pixels);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int across = warp % Sizes::kWarpsAcross;
  float* const own = reinterpret_cast<float*>(shared + t.results) + warp * kResultFloats;
  // Lanes side by side share a row: as many as there are vectors of eight columns.
  const int lanes = (min(columns, kResultColumns) + kLaneColumns - 1) / kLaneColumns;
  const int row_lanes = 32 / lanes;
  const int lane_column = lane % lanes * kLaneColumns;
  const int left = columns - lane_column;
  const FusedPlace place(a, t);
  const int64_t first =
      ((place.first_n * a.shape.out_h + place.first_oh) * a.shape.out_w + place.first_ow) *
          a.out_channels +
      first_column + lane_column;
  constexpr int kTurns = 4 / Sizes::kWarpsAcross;  // four rows or more each, of each warp
  // Turns whose residual is on its way at a time: acc1 leaves few registers.
  constexpr int kUnroll = Sizes::kProject ? kTurns : 2;
  const auto row_of = [&](int turn) {
    return lane / lanes + (turn * Sizes::kWarpsAcross + across) * row_lanes;
  };
  sync_warps_across<Sizes>();
  store_fragments<kFirst>(own, acc);
  sync_warps_across<Sizes>();
  const Floats<kLaneColumns> scale = load_floats<kLaneColumns>(scales + lane_column);
  const Floats<kLaneColumns> shift = load_floats<kLaneColumns>(shifts + lane_column);
#pragma unroll
  for (int turn = 0; turn < kTurns; turn += kUnroll) {
    int64_t element[kUnroll];
    Vector<T, kLaneColumns> residual[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = row_of(turn + i);
      const bool active = lane < lanes * row_lanes && row < kFragmentRows;
      const int pixel = active ? pixels[first_row + row] : -1;
      const int line = pixel >> 8, column = pixel & 0xff;
      element[i] =
          pixel < 0 ? -1 : first + (int64_t{line} * a.shape.out_w + column) * a.out_channels;
      if (a.residual != nullptr && pixel >= 0) {
        residual[i] = load_some<kLaneColumns>(static_cast<const T*>(a.residual) + element[i], left,
                                              t.output_vectors);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (element[i] < 0) continue;
      const float* const results = own - across * kResultFloats;
      Floats<kLaneColumns> y = load_results(results, row_of(turn + i), lane_column);
#pragma unroll
      for (int j = 1; j < Sizes::kWarpsAcross; ++j) {
        y = y + load_results(results + j * kResultFloats, row_of(turn + i), lane_column);
      }
      y = activate<Math<T, kLaneColumns>>(activation, multiply_add(y, scale, shift));
      if constexpr (!Sizes::kProject) {
        y = unpack<T, kLaneColumns>(pack<T, kLaneColumns>(y));
        sums = sums + y;
      }
      if (a.residual != nullptr) y = y + unpack<T, kLaneColumns>(residual[i]);
      store_some(static_cast<T*>(a.output) + element[i], y, left, t.output_vectors);
    }
  }
}

// Calls body(step) for the steps of a tile's depth, as compile-time constants.
template <int kStep = 0, class Body>
EFFNET_DEVICE void for_steps(const Body& body) {
  if constexpr (kStep < kTileSteps) {
    body(std::integral_constant<int, kStep>{});
    for_steps<kStep + 1>(body);
  }
}

// output as above; pooled[n, tile, warp, m] = the sums of the z of a warp's pixels, if not null.
//
// Shared memory (FusedTiling has the offsets):
//     ring      stages of kWarpsAcross x middle rows
//     project   [warp across][output channel], 128 bytes each
//     halo      (images, halo_h, halo_w) pixels; of two slices, if there are slices
//     table     [chunk][half of a step][step]: where a vector of the reduction is, from a window's
//               first pixel on
//     sources   tap << 16 | vector of the slice of each vector of the reduction, -1 beyond the last
//     windows   where the tile's rows have theirs in the halo
//     pixels    line << 8 | column of each of the tile's rows, -1 for those that do not exist
//     scales    scale and shift of `constants` middle channels, then of kColumns output channels
//     results   of the warps; in place of the ring once that is done with, if there is a second
//               product
template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, Sizes::kBlocks)
    fused_mbconv_kernel(const __grid_constant__ FusedMbconv a,
                        const __grid_constant__ FusedTiling t, float* pooled) {
  constexpr int V = kTileVector<T>;
  constexpr int kMiddle = kTileDepth<T>;
  constexpr int kMiddleFragments = kMiddle / 8;
  constexpr int kRowFragments = Sizes::kRowFragments;
  constexpr int kAcross = Sizes::kWarpsAcross;
  constexpr int kProjectBytes = Sizes::kColumns * kTileRowBytes;  // of a warp across
  // Registers are short: what is not needed in each step is computed anew where it is.
  const auto warp_row = [] { return thread_index() / 32 / kAcross * Sizes::kWarpRows; };
  const auto warp_across = [] { return thread_index() / 32 % kAcross; };
  const auto output_column = [&] {
    return Sizes::kProject && t.parts > 1 ? block_index() % t.parts * t.part : 0;
  };
  const auto output_columns = [&] { return min(a.out_channels - output_column(), t.part); };
  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  float* const scales = reinterpret_cast<float*>(shared + t.scales);
  float* const shifts = scales + t.constants;
  float* const output_scales = shifts + t.constants;
  float* const output_shifts = output_scales + Sizes::kColumns;
  // Of the group's middle channels and those after it.
  const auto fill_middle_scales = [&](int group) {
    const int first = group * kAcross * kMiddle;
    fill_scales<T, Sizes>(a.expand_bn, first - first % kFusedConstants, t.constants,
                          a.shape.channels, scales, shifts);
  };

  int first_group = 0, groups = t.groups;  // of the block's part
  if constexpr (!Sizes::kProject) {
    first_group = FusedPlace(a, t).part * t.part;
    groups = min(groups - first_group, t.part);
  }
  copy_halo<T, Sizes>(a, t, 0);
  // While the pixels are on their way.
  fill_tables<Sizes>(a, t);
  __syncthreads();
  fill_middle_scales(first_group);
  if constexpr (Sizes::kProject) {
    fill_scales<T, Sizes>(a.project_bn, output_column(), Sizes::kColumns, a.out_channels,
                          output_scales, output_shifts);
  }

  // Chunks of expand_weight are numbered through groups and slices. The group that is computed, and
  // its first one; copies are less than a group ahead.
  int group = first_group, first_chunk = 0;
  const auto copy = [&](int index, int stage) {
    int of_group = index - first_chunk;
    int of = group;
    if (of_group >= t.group_chunks) {
      of_group -= t.group_chunks;
      ++of;
    }
    const int first_row = of * kAcross * t.middle;
    const int slice = Sizes::kSliced ? of_group / t.slice_chunks : 0;
    copy_expand<T>(a, t, shared + stage * t.stage_bytes, first_row,
                   min(a.shape.channels - first_row, kAcross * t.middle), slice,
                   of_group - slice * t.slice_chunks);
    if constexpr (Sizes::kSliced) {
      if (t.slices > 1 && of_group == slice * t.slice_chunks && index > 0) {
        copy_halo<T, Sizes>(a, t, slice);
      }
    }
    if constexpr (Sizes::kProject) {
      if (of_group == t.group_chunks - 1) {
        for (int i = 0; i < kAcross; ++i) {
          copy_project<T>(a, t, shared + t.project + i * kProjectBytes, output_column(),
                          output_columns(), (of * kAcross + i) * kMiddle);
        }
      }
    }
  };

  const bool exact = !a.allow_tf32;
  float acc1[kRowFragments][kMiddleFragments][4];
  float acc2[kRowFragments][Sizes::kOutputFragments][4] = {};

  // The first product is complete: the second one with it, or the results.
  const auto finish = [&](int first_middle, int middle) {
    const float* const scale = scales + first_middle % kFusedConstants;
    const float* const shift = scale + t.constants;
    if constexpr (Sizes::kProject) {
      const LanePlace place = lane_place_b(thread_index() % 32);
      const char* const project =
          shared + t.project + warp_across() * kProjectBytes + tile_offset(place.row, place.v);
      const int columns = output_columns();
      for_steps([&](auto s) {
        if (s() * kStepDepth<T> >= middle) return;
        uint32_t z[kRowFragments][4];
        middle_words<T, s() * (kStepDepth<T> / 8)>(z, acc1, scale, shift, a.expand_activation,
                                                   middle);
        multiply_fragments<T, false>(acc2, z, tile_step(project, s()), columns, exact);
      });
    } else {
      Floats<kLaneColumns> sums = broadcast<kLaneColumns>(0.f);
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
        store_fused<T, Sizes, 0>(a, t, acc1[m], warp_row() + m * kFragmentRows, first_middle,
                                 middle, scale, shift, a.expand_activation, sums);
      }
      if (pooled == nullptr) return;
      // The lanes' sums take the place of the results, then a lane adds up a channel's.
      float* const results =
          reinterpret_cast<float*>(shared + t.results) + thread_index() / 32 * kResultFloats;
      const FusedPlace place(a, t);
      const int lanes = (middle + kLaneColumns - 1) / kLaneColumns;
      const int64_t slot = (place.first_n * (t.tiles_h * t.tiles_w) + place.tile) * Sizes::kWarps +
                           thread_index() / 32;
      __syncwarp();
      store_floats(results + thread_index() % 32 * kLaneColumns, sums);
      __syncwarp();
      for (int i = thread_index() % 32; i < middle; i += 32) {
        float total = 0.f;
        for (int l = i / kLaneColumns; l < 32 / lanes * lanes; l += lanes) {
          total += results[l * kLaneColumns + i % kLaneColumns];
        }
        pooled[slot * a.shape.channels + first_middle + i] = total;
      }
    }
  };

  for_chunks(
      Sizes::kProject ? t.chunks : groups * t.group_chunks, t.stages, copy, [](int, int) {},
      [&](int index, int stage) {
        const int first_middle = (group * kAcross + warp_across()) * kMiddle;
        const int middle = min(a.shape.channels - first_middle, kMiddle);
        if (index == first_chunk) {
#pragma unroll
          for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
            for (int n = 0; n < kMiddleFragments; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) acc1[m][n][i] = 0.f;
            }
          }
          // All are done with those of the group before, and another barrier comes before these
          // are read.
          if (index > 0 && group * kAcross * kMiddle % kFusedConstants == 0) {
            fill_middle_scales(group);
          }
        }
        // Without a second product, all warps store what they have.
        const bool works = warp_row() < t.rows && middle > 0;
        if (works) {
          const int slice = Sizes::kSliced ? (index - first_chunk) / t.slice_chunks : 0;
          const int chunk = index - first_chunk - slice * t.slice_chunks;
          const int lane = thread_index() % 32;
          const LanePlace lane_a = lane_place_a(lane);
          LanePlace lane_b = lane_place_b(lane);
          // For z of float32, columns 2q and 2q + 1 of acc1 are to be q and q + 4.
          if constexpr (Sizes::kProject && sizeof(T) == 4) {
            lane_b.row = lane_b.row / 8 * 8 + lane % 8 / 2 + lane % 2 * 4;
          }
          const int4 offsets =
              reinterpret_cast<const int4*>(shared + t.table)[chunk * 2 + lane_a.v];
          const int offset[kTileSteps] = {offsets.x, offsets.y, offsets.z, offsets.w};
          const int* const windows =
              reinterpret_cast<const int*>(shared + t.windows) + warp_row() + lane_a.row;
          const char* window[kRowFragments];
#pragma unroll
          for (int m = 0; m < kRowFragments; ++m) {
            window[m] = shared + t.halo + slice % 2 * t.halo_bytes + windows[m * kFragmentRows];
          }
          const char* const expand = shared + stage * t.stage_bytes +
                                     warp_across() * t.middle * kTileRowBytes +
                                     tile_offset(lane_b.row, lane_b.v);
          const int vectors = t.row_vectors - chunk * kTileVectors;
          const auto place_a = [&](int s, int m) { return window[m] + offset[s]; };
          if (vectors >= kTileVectors && middle == kMiddle) {
            multiply_steps<T, true>(acc1, place_a, expand, 0, 0, exact);
          } else {
            multiply_steps<T, false>(acc1, place_a, expand, vectors * V, middle, exact);
          }
        }
        if (index == first_chunk + t.group_chunks - 1) {
          if (works || !Sizes::kProject) finish(first_middle, middle);
          first_chunk = index + 1;
          ++group;
        }
      });
  if constexpr (Sizes::kProject) {
    __syncthreads();
    const int columns = output_columns();
    Floats<kLaneColumns> sums = broadcast<kLaneColumns>(0.f);
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) {
      const int row = warp_row() + m * kFragmentRows;
      store_fused<T, Sizes, 0>(a, t, acc2[m], row, output_column(), columns, output_scales,
                               output_shifts, a.project_activation, sums);
      if constexpr (Sizes::kColumns > kResultColumns) {
        if (columns <= kResultColumns) continue;
        store_fused<T, Sizes, kResultColumns / 8>(
            a, t, acc2[m], row, output_column() + kResultColumns, columns - kResultColumns,
            output_scales + kResultColumns, output_shifts + kResultColumns, a.project_activation,
            sums);
      }
    }
  }
}

}  // namespace effnet::cuda
