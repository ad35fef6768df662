// A dense k x k convolution of channels-last images of 16-bit elements from few channels to few,
// with BN, activation and residual: the stem, and Fused-MBConv blocks that do not expand. One
// launch, bound by memory.
//
//     output[p, m] = activation(bn(sum over e of window(p)[e] * weight[m, e])) + residual[p, m]
//
// where e runs over the filter's k * k * C elements, rounded to T before the residual is added.
//
// Block. It walks over tiles: some whole rows of an image's output. While one is computed, the next
// one's input rows, the halo, are on their way. Whole rows of input and of output are contiguous in
// memory: copies and stores are of 16 bytes a lane, whatever the number of channels, and a window
// needs no bounds, since the zeros on the left and the right of the image stay where they are.
//
// Product. The weights stay in registers for the whole walk, and a warp takes 16 of the tile's
// pixels at a time, for all output channels or its part of them. Depth has no gaps. With C a
// multiple of 8, e goes by vectors of 8 channels, and a step of m16n8k16 takes two, of whatever
// taps: ldmatrix is given the places of its rows. With fewer, a row of the filter is k * C
// contiguous elements of the image, which are read in words of two: where a row begins with an odd
// element, its words begin one before, and of a word that reaches out of the window that half is
// made zero. Three channels and 3 x 3 taps are 15 words, two steps.
//
// Words want windows to begin with elements of one parity: stride * C is even. In shared memory
// lines begin so that 16 bytes of the image's row are aligned to 16.
//
// Bank conflicts: pixels of vectors are an odd number of them apart. (With stride 2 two rows of a
// matrix share a bank.) Of a step's words, which may be of two rows of the filter, two may.
//
// What fills the last step up is multiplied by zero: an infinity in a window may give NaN where the
// convolution itself has an infinity.
#pragma once

#include "gemm.cuh"

namespace effnet::cuda {

// kSteps: that hold the filter. kColumnFragments: of 8 output channels, of a warp. kWords: the
// window is read in words, not in vectors.
template <bool kWords_, int kSteps_, int kColumnFragments_, int kWarps_, int kBlocks_>
struct DenseSizes {
  static constexpr bool kWords = kWords_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kColumnFragments = kColumnFragments_;
  static constexpr int kColumns = kColumnFragments * 8;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kBlocks_;
  // Of a warp's results: an odd number of vectors from row to row.
  static constexpr int kResultPitch = (kColumnFragments | 1) * 16;
  static constexpr int kResultBytes = kFragmentRows * kResultPitch;
  static constexpr int kStores = (kColumnFragments + 1) / 2;  // of a lane
};

// How the output is cut into tiles, and a block's shared memory.
struct DenseTiling {
  int parts;                    // of the output channels; warps have them in turn
  int part;                     // channels of one, a multiple of 8
  int rows, tiles;              // output rows of a tile, tiles of an image
  int step_images, step_tiles;  // from a block's tile to its next one
  uint32_t row_factor;          // p * row_factor >> 32 is p / out_w
  // The filter as words of two elements: contiguous runs, of the window and of the weight.
  int runs, run_elements, run_words;
  int lead;  // elements of a run's first word that are before it
  // The halo: lines of the input, from its first column or the padding before that on.
  int halo_rows;
  int pixel_pitch, line_pitch;  // bytes
  int pixel_step, line_step;    // from an output's window to the next one's, and on to the next row
  int first;                    // where the first output's window begins
  int origin, end;              // where the image's first column is, and where its last one ends
  int piece, pieces;            // bytes that are copied at a time, and how many are a line
  int gap_shift, gap;           // after every 1 << gap_shift pieces
  int stage_bytes;
  // Offsets in shared memory.
  int norms, results, bytes;
};

// Starts to copy a line of the halo. `from` is not read if it does not exist.
template <int kBytes>
EFFNET_DEVICE void copy_line(const DenseTiling& t, char* to, const char* from, bool exists) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < t.pieces; i += 32) {
    char* const place = to + i * kBytes + (i >> t.gap_shift) * t.gap;
    if constexpr (kBytes == 2) {
      *reinterpret_cast<uint16_t*>(place) =
          exists ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t{0};
    } else {
      copy_async<kBytes>(place, exists ? from + i * kBytes : from, exists ? kBytes : 0);
    }
  }
}

// Starts to copy the halo of a tile, a line a warp.
template <class Sizes>
EFFNET_DEVICE void copy_lines(const FusedMbconv& a, const DenseTiling& t, char* stage,
                              int64_t image, int tile) {
  const ConvShape& shape = a.shape;
  const int first_h = tile * t.rows * shape.stride - shape.pad_top;
  const char* const input = static_cast<const char*>(a.input);
  for (int line = static_cast<int>(threadIdx.x) / 32; line < t.halo_rows; line += Sizes::kWarps) {
    const int h = first_h + line;
    const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(shape.in_h);
    const char* const from =
        exists ? input + (image * shape.in_h + h) * shape.in_w * a.in_channels * 2 : input;
    char* const to = stage + line * t.line_pitch + t.origin;
    if constexpr (Sizes::kWords) {
      switch (t.piece) {
        case 16:
          copy_line<16>(t, to, from, exists);
          break;
        case 8:
          copy_line<8>(t, to, from, exists);
          break;
        case 4:
          copy_line<4>(t, to, from, exists);
          break;
        default:
          copy_line<2>(t, to, from, exists);
      }
    } else {
      copy_line<16>(t, to, from, exists);
    }
  }
}

// Shared memory (DenseTiling has the offsets):
//     halo      two stages of halo_rows lines
//     norms     scales and shifts of two neighbouring output channels at a time
//     results   [warp][row], of T
template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, Sizes::kBlocks)
    dense_conv_kernel(const __grid_constant__ FusedMbconv a,
                      const __grid_constant__ DenseTiling t) {
  constexpr int kSteps = Sizes::kSteps;
  constexpr int N = Sizes::kColumnFragments;
  constexpr int V = kTileVector<T>;
  char* const shared = reinterpret_cast<char*>(dynamic_shared_memory);
  float* const norms = reinterpret_cast<float*>(shared + t.norms);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int r = lane / 4, q = lane % 4;
  const int first_channel = warp % t.parts * t.part;

  int64_t image = block_index() / t.tiles;
  int tile = block_index() - static_cast<int>(image) * t.tiles;
  copy_lines<Sizes>(a, t, shared, image, tile);
  commit_copies();

  // What lines have beside the image's row stays zero.
  for (int line = warp; line < 2 * t.halo_rows; line += Sizes::kWarps) {
    char* const bytes = shared + line * t.line_pitch;
    const auto clear = [&](int begin, int end) {
      for (int i = begin + lane * 2; i < end; i += 64) {
        *reinterpret_cast<uint16_t*>(bytes + i) = 0;
      }
    };
    clear(0, t.origin);
    clear(t.end, t.line_pitch);
  }
  for (int i = threadIdx.x; i < t.parts * Sizes::kColumns; i += Sizes::kThreads) {
    const ChannelNorm norm = i < a.out_channels ? channel_norm<T>(a.expand_bn, i) : ChannelNorm{};
    float* const pair = norms + i / 2 * 4 + i % 2;
    pair[0] = norm.scale;
    pair[2] = norm.shift();
  }

  // The weights; and where what the lane reads of a window is: words, and the halves of them that
  // are of the window, or the row that it gives ldmatrix.
  constexpr int kReads = Sizes::kWords ? 2 * kSteps : kSteps;
  uint32_t weights[kSteps][N][2];
  int offsets[kReads];
  [[maybe_unused]] uint32_t masks[kReads];
  // Of the lane's n-th output channel; of the last one for those beyond, which are not stored.
  const auto filter = [&](int n) {
    const int channel = min(first_channel + n * 8 + r, a.out_channels - 1);
    return static_cast<const uint16_t*>(a.expand_weight) + channel * t.runs * t.run_elements;
  };
  if constexpr (Sizes::kWords) {
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int run = (i * 4 + q) / t.run_words, word = i * 4 + q - run * t.run_words;
      const int e = 2 * word - t.lead;
      const bool exists = run < t.runs;
      const bool lower = exists && e >= 0, upper = exists && e + 1 < t.run_elements;
      offsets[i] = exists ? run * t.line_pitch + word * 4 : 0;
      masks[i] = (lower ? 0xffffu : 0u) | (upper ? 0xffff0000u : 0u);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint16_t* const elements = filter(n) + run * t.run_elements + e;
        weights[i / 2][n][i % 2] =
            (lower ? elements[0] : 0u) | (upper ? uint32_t{elements[1]} << 16 : 0u);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(filter(n)) + q;
#pragma unroll
      for (int h = 0; h < 2 * kSteps; ++h) {
        weights[h / 2][n][h % 2] = h * 4 + q < t.run_words ? words[h * 4] : 0u;
      }
    }
    // Of the vector: its row and column in the filter, its first channel.
    int row = 0, column = 0, channel = 0;
    const auto next_vector = [&] {
      channel += V;
      if (channel < a.in_channels) return;
      channel = 0;
      if (++column < a.shape.kernel) return;
      column = 0;
      ++row;
    };
    if (lane_place_a(lane).v > 0) next_vector();
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      offsets[i] =
          row < a.shape.kernel ? row * t.line_pitch + column * t.pixel_pitch + channel * 2 : 0;
      next_vector();
      next_vector();
    }
  }

  // The vectors of a fragment of results that the lane stores: where they are in it, and in output.
  const int vectors = max(min(a.out_channels - first_channel, t.part), 0) / V;
  char* const results = shared + t.results + warp * Sizes::kResultBytes;
  int rows[Sizes::kStores], result[Sizes::kStores], element[Sizes::kStores];
#pragma unroll
  for (int i = 0; i < Sizes::kStores; ++i) {
    const int index = lane + 32 * i;
    const int row = index / max(vectors, 1), v = index - row * vectors;
    rows[i] = index < kFragmentRows * vectors ? row : INT32_MAX / 2;
    result[i] = row * Sizes::kResultPitch + v * 16;
    element[i] = row * a.out_channels + v * V;
  }

  const int stride_pixels = Sizes::kWarps / t.parts * kFragmentRows;
  int stage = 0;
#pragma unroll 1
  while (image < a.shape.batch) {
    int64_t next_image = image + t.step_images;
    int next_tile = tile + t.step_tiles;
    if (next_tile >= t.tiles) {
      next_tile -= t.tiles;
      ++next_image;
    }
    wait_for_copy_groups<0>();
    __syncthreads();
    // All are done with the tile before, whose stage that is.
    if (next_image < a.shape.batch) {
      copy_lines<Sizes>(a, t, shared + (stage ^ t.stage_bytes), next_image, next_tile);
    }
    commit_copies();

    const char* const halo = shared + stage + t.first;
    const int first_row = tile * t.rows;
    const int pixels = min(t.rows, a.shape.out_h - first_row) * a.shape.out_w;
    const int64_t tile_element =
        (image * a.shape.out_h + first_row) * a.shape.out_w * a.out_channels + first_channel;
    // Where the window of a pixel of the tile begins; of the last one for those beyond.
    const auto window = [&](int pixel) {
      const int p = min(pixel, pixels - 1);
      const int row = static_cast<int>(uint64_t{static_cast<uint32_t>(p)} * t.row_factor >> 32);
      return halo + p * t.pixel_step + row * t.line_step;
    };
#pragma unroll 1
    for (int first = warp / t.parts * kFragmentRows; first < pixels; first += stride_pixels) {
      const int64_t first_element = tile_element + int64_t{first} * a.out_channels;
      Vector<T, V> residual[Sizes::kStores];
      if (a.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < Sizes::kStores; ++i) {
          if (first + rows[i] >= pixels) continue;
          residual[i] =
              load_vector<V>(static_cast<const T*>(a.residual) + first_element + element[i]);
        }
        __syncwarp();
      }
      float acc[N][4] = {};
      if constexpr (Sizes::kWords) {
        const char* const upper = window(first + r);
        const char* const lower = window(first + r + 8);
        const auto word = [&](const char* p, int i) {
          return *reinterpret_cast<const uint32_t*>(p + offsets[i]) & masks[i];
        };
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const uint32_t words[4] = {word(upper, 2 * s), word(lower, 2 * s), word(upper, 2 * s + 1),
                                     word(lower, 2 * s + 1)};
#pragma unroll
          for (int n = 0; n < N; ++n) {
            multiply_matrices<T>(acc[n], words[0], words[1], words[2], words[3], weights[s][n][0],
                                 weights[s][n][1]);
          }
        }
      } else {
        const char* const row = window(first + lane_place_a(lane).row);
        uint32_t words[2][4];  // of a step, and of the next one, which are on their way
        load_matrices(words[0], row + offsets[0]);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          if (s + 1 < kSteps) load_matrices(words[(s + 1) % 2], row + offsets[s + 1]);
          const uint32_t (&w)[4] = words[s % 2];
#pragma unroll
          for (int n = 0; n < N; ++n) {
            multiply_matrices<T>(acc[n], w[0], w[1], w[2], w[3], weights[s][n][0],
                                 weights[s][n][1]);
          }
        }
      }

      Floats<4 * N> y;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Floats<4> norm = load<4>(norms + (first_channel + n * 8 + 2 * q) * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[n * 4 + i] = fmaf(acc[n][i], norm[i % 2], norm[2 + i % 2]);
        }
      }
      y = activate<Math<T, 4 * N>>(a.expand_activation, y);
      __syncwarp();  // All lanes have read the fragment before.
      char* const write = results + r * Sizes::kResultPitch + q * 4;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          store(reinterpret_cast<T*>(write + i * 8 * Sizes::kResultPitch + n * 16),
                slice<2>(y, 2 * n + i));
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Sizes::kStores; ++i) {
        if (first + rows[i] >= pixels) continue;
        Vector<T, V> z = load_vector<V>(reinterpret_cast<const T*>(results + result[i]));
        if (a.residual != nullptr) {
          z = pack<T, V>(unpack<T, V>(z) + unpack<T, V>(residual[i]));
        }
        *reinterpret_cast<Vector<T, V>*>(static_cast<T*>(a.output) + first_element + element[i]) =
            z;
      }
    }
    stage ^= t.stage_bytes;
    image = next_image;
    tile = next_tile;
  }
}

}  // namespace effnet::cuda
