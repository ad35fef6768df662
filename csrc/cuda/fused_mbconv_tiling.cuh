// How the Fused-MBConv block is cut into tiles, and which kernel takes them. Host code without
// torch headers: the tests ask it what a block takes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dense_conv.cuh"
#include "fused_mbconv.cuh"
#include "limits.cuh"

namespace effnet::cuda {

// The tiles: of 128 pixels for throughput; of 32 pixels with the middle channels dealt out to four
// warps, or without a second product of 64, where there would be too few blocks for the device.
// The accumulators of 96 output channels leave room for two blocks on a multiprocessor, those of 64
// or of the first product alone for three. Slices are for inputs so wide that speed is no question:
// one tile of each kind takes them.
template <int kOutputFragments>
using WideFused =
    FusedSizes<2, 4, 1, kOutputFragments, kOutputFragments <= 8 ? 3 : 2, (kOutputFragments > 8)>;
template <int kOutputFragments>
using SmallFused = std::conditional_t<kOutputFragments == 0, FusedSizes<1, 4, 1, 0, 4, true>,
                                      FusedSizes<2, 1, 4, kOutputFragments, 2, false>>;

// The tile of one kind that is predicted to be done first.
template <class T, class Sizes>
class FusedCandidate {
 public:
  FusedCandidate(const DeviceLimits& device, const FusedMbconv& a) : device_(device), a_(a) {
    const ConvShape& s = a.shape;
    tiling_.groups =
        static_cast<int>(ceil_div(s.channels, int64_t{kTileDepth<T>} * Sizes::kWarpsAcross));
    tiling_.middle = std::min(align(s.channels, kFragmentRows), kTileDepth<T>);
    tiling_.constants =
        std::min(tiling_.groups * Sizes::kWarpsAcross * kTileDepth<T>, kFusedConstants);
    tiling_.stage_bytes = Sizes::kWarpsAcross * tiling_.middle * kTileRowBytes;
    if constexpr (Sizes::kProject) {
      tiling_.parts = static_cast<int>(ceil_div(a.out_channels, Sizes::kColumns));
      tiling_.part = align(static_cast<int>(ceil_div(a.out_channels, tiling_.parts)), 16);
    }
    for (int width = std::min(s.out_w, Sizes::kRows); width > 0; width = next_width(width)) {
      // The same number of tiles, as even as may be.
      choose(static_cast<int>(ceil_div(s.out_w, ceil_div(s.out_w, width))));
    }
  }

  bool found() const { return best_.stages > 0; }
  double cost() const { return cost_; }

  const FusedTiling& tiling() const { return best_; }
  int64_t blocks() const { return blocks(best_); }

 private:
  // All widths down to a fragment's, then a few.
  static int next_width(int width) { return width > 8 ? align(width, 8) - 8 : width / 2; }

  int64_t blocks(const FusedTiling& t) const {
    return ceil_div(a_.shape.batch, t.images) * t.tiles_h * t.tiles_w * t.parts;
  }

  // Fills in the shared memory's layout, as many stages as there is room for; whether it fits in
  // `most` bytes. Two stages at least: of 9 taps or more there are two chunks.
  static bool fill_layout(FusedTiling& t, int most) {
    const int scales = 2 * (t.constants + Sizes::kColumns) * static_cast<int>(sizeof(float));
    for (t.stages = std::min(t.slice_chunks, kFusedMostStages); t.stages >= 2; --t.stages) {
      int end = t.stages * t.stage_bytes;
      const auto place = [&](int bytes) {
        const int offset = end;
        end += align(bytes, kTileRowBytes);
        return offset;
      };
      t.project = place(Sizes::kWarpsAcross * Sizes::kColumns * kTileRowBytes);
      t.halo = place((t.slices > 1 ? 2 : 1) * t.halo_bytes);
      // What the results take the place of, if there is a second product, is done with.
      t.results = Sizes::kProject ? 0 : end;
      end = std::max(end, t.results + align(Sizes::kResultBytes, kTileRowBytes));
      t.table = place(t.slice_chunks * kTileVectors * static_cast<int>(sizeof(int)));
      t.sources = place(t.slice_chunks * kTileVectors * static_cast<int>(sizeof(int)));
      t.windows = place(Sizes::kRows * static_cast<int>(sizeof(int)));
      t.pixels = place(Sizes::kRows * static_cast<int>(sizeof(int)));
      t.scales = place(scales);
      t.bytes = end;
      if (t.bytes <= most) return true;
    }
    return false;
  }

  // Pitches of the halo's pixels and lines, for slices of slice_vectors.
  void fill_pitches(FusedTiling& t) const {
    const ConvShape& s = a_.shape;
    t.pixel_pitch = (t.slice_vectors | 1) * 16;
    const int columns = s.stride == 1 ? t.halo_w : 2 * t.odd_columns;
    t.line_pitch = columns * t.pixel_pitch;
    for (int pad = 0; pad < kTileRowBytes; pad += 16) {
      const int next_line = s.stride * (t.line_pitch + pad);
      if ((next_line - t.tile_w * t.pixel_pitch) % kTileRowBytes != 0) continue;
      t.line_pitch += pad;
      break;
    }
    t.halo_bytes = t.images * t.halo_h * t.line_pitch;
    t.row_vectors = s.kernel * s.kernel * t.slice_vectors;
    t.slice_chunks = static_cast<int>(ceil_div(t.row_vectors, kTileVectors));
    t.group_chunks = t.slices * t.slice_chunks;
    t.chunks = t.groups * t.group_chunks;
  }

  // Weighs tiles of this width.
  void choose(int width) {
    const ConvShape& s = a_.shape;
    FusedTiling t = tiling_;
    t.tile_w = width;
    t.tiles_w = static_cast<int>(ceil_div(s.out_w, width));
    t.tiles_h = static_cast<int>(ceil_div(s.out_h, Sizes::kRows / width));
    t.tile_h = static_cast<int>(ceil_div(s.out_h, t.tiles_h));
    t.images = 1;
    if (t.tiles_h * t.tiles_w == 1 && a_.pooled == nullptr) {
      t.images = static_cast<int>(std::min<int64_t>(s.batch, Sizes::kRows / (t.tile_h * t.tile_w)));
    }
    t.rows = t.images * t.tile_h * t.tile_w;
    t.halo_h = (t.tile_h - 1) * s.stride + s.kernel;
    t.halo_w = (t.tile_w - 1) * s.stride + s.kernel;
    t.odd_columns = (t.halo_w + 1) / 2;
    if constexpr (!Sizes::kProject) {
      // As many as there are multiprocessors for.
      t.parts = 1;
      const int64_t tiles = blocks(t);
      const int64_t wanted = std::clamp<int64_t>(device_.multiprocessors / tiles, 1, t.groups);
      t.part = static_cast<int>(ceil_div(t.groups, wanted));
      t.parts = static_cast<int>(ceil_div(t.groups, t.part));
    }
    const int64_t count = blocks(t);
    const int vectors = static_cast<int>(ceil_div(a_.in_channels, kTileVector<T>));
    const int beside = static_cast<int>(
        std::min<int64_t>(Sizes::kBlocks, ceil_div(count, device_.multiprocessors)));
    int resident = 0;
    for (t.slices = 1; resident == 0; t.slices += t.slices == 1 ? 1 : 2) {
      t.slice_vectors = static_cast<int>(ceil_div(vectors, t.slices));
      fill_pitches(t);
      for (resident = beside; resident > 0; --resident) {
        if (fill_layout(t, device_.shared_bytes(resident))) break;
      }
      if (resident > 0 || !Sizes::kSliced || t.slice_vectors == 1) break;
    }
    if (resident == 0) return;

    // In cycles: of a block alone on its multiprocessor, where each step waits for its fragments,
    // and its share of a full one, where the tensor cores and the instructions of copies are what
    // blocks wait for.
    const int columns = std::min(align(s.channels, 16), kTileDepth<T>);
    const int groups = Sizes::kProject ? t.groups : t.part;
    const double steps =
        static_cast<double>(groups) * t.slices * static_cast<double>(ceil_div(t.row_vectors, 2));
    double products = steps * (columns / 8);
    if (Sizes::kProject) products += groups * kTileSteps * (align(t.part, 16) / 8.);
    products *= Sizes::kRowFragments;
    const double halos = t.slices > 1 ? groups * t.slices : 1;
    const double copies = halos * t.images * t.halo_h * t.halo_w * t.slice_vectors /
                          static_cast<double>(Sizes::kThreads);
    const double activations = static_cast<double>(groups) * Sizes::kRowFragments * columns / 2;
    const double alone = 8.5 * products + 24. * steps + 30. * copies + 12. * activations + 3000.;
    const double busy = 6.5 * products + 30. * copies;
    const int64_t rounds = ceil_div(count, int64_t{device_.multiprocessors} * resident);
    const double cost = static_cast<double>(rounds) * std::max(alone, resident * busy);
    if (found() && cost >= cost_) return;
    cost_ = cost;
    best_ = t;
  }

  const DeviceLimits device_;
  const FusedMbconv& a_;
  FusedTiling tiling_{}, best_{};
  double cost_ = 0.;
};

// Calls body(candidate) for the better of two tiles; whether there is one.
template <class T, class Wide, class Small, class Body>
bool with_better_fused(const DeviceLimits& device, const FusedMbconv& a, const Body& body) {
  const FusedCandidate<T, Wide> wide(device, a);
  const FusedCandidate<T, Small> small(device, a);
  if (small.found() && (!wide.found() || small.cost() < wide.cost())) {
    body(small);
  } else if (wide.found()) {
    body(wide);
  }
  return wide.found() || small.found();
}

// The tile of the dense convolution alone (dense_conv.cuh) that is predicted to be done first, if
// these sizes serve the call.
template <class T, class Sizes>
class DenseCandidate {
 public:
  DenseCandidate(const DeviceLimits& device, const FusedMbconv& a) : device_(device), a_(a) {
    if (!fill_filter() || !fill_parts()) return;
    for (int rows = 1; rows <= a.shape.out_h; ++rows) {
      if (rows > 1 && rows * a.shape.out_w > kMostPixels) break;
      choose(static_cast<int>(ceil_div(a.shape.out_h, ceil_div(a.shape.out_h, rows))));
    }
  }

  bool found() const { return best_.rows > 0; }
  double cost() const { return cost_; }

  const DenseTiling& tiling() const { return best_; }
  int64_t blocks() const { return blocks_; }

 private:
  static constexpr int kMostPixels = 2048;  // of a tile of more than a row
  static constexpr int kMostWidth = 32768;  // for which row_factor is exact

  // The filter's words and the lines of the halo; whether these sizes take them.
  bool fill_filter() {
    const ConvShape& s = a_.shape;
    const int columns = s.kernel * a_.in_channels, bytes = a_.in_channels * 2;
    const int reach = std::max(s.in_w + s.pad_left, (s.out_w - 1) * s.stride + s.kernel);
    const auto input = reinterpret_cast<uintptr_t>(a_.input);
    DenseTiling& t = tiling_;
    if constexpr (Sizes::kWords) {
      if (s.stride * a_.in_channels % 2 != 0) return false;
      const int before = s.pad_left * a_.in_channels;
      t.lead = before % 2;
      t.runs = s.kernel;
      t.run_elements = columns;
      t.run_words = (columns + t.lead + 1) / 2;
      t.pixel_pitch = bytes;
      t.origin = align(before * 2, 16);
      t.first = t.origin - (before + t.lead) * 2;
      // A last word may reach one element out of the window.
      t.line_pitch = align(t.origin - before * 2 + reach * bytes + 2, 16);
      const int line = s.in_w * bytes;
      for (t.piece = 16; t.piece > 2 && (line % t.piece != 0 || input % t.piece != 0);) {
        t.piece /= 2;
      }
    } else {
      const int vectors = a_.in_channels / kTileVector<T>;
      const bool odd = vectors % 2 != 0, power = (vectors & (vectors - 1)) == 0;
      if (a_.in_channels % kTileVector<T> != 0 || (!odd && !power)) return false;
      if (input % 16 != 0 || reinterpret_cast<uintptr_t>(a_.expand_weight) % 4 != 0) return false;
      t.runs = 1;
      t.run_elements = s.kernel * columns;
      t.run_words = t.run_elements / 2;
      t.gap = odd ? 0 : 16;
      if (!odd) {
        while (1 << t.gap_shift < vectors) ++t.gap_shift;
      }
      t.pixel_pitch = bytes + t.gap;
      t.origin = s.pad_left * t.pixel_pitch;
      t.line_pitch = reach * t.pixel_pitch;
      t.piece = 16;
    }
    t.pieces = s.in_w * bytes / t.piece;
    t.end = t.origin + s.in_w * t.pixel_pitch;
    t.pixel_step = s.stride * t.pixel_pitch;
    t.line_step = s.stride * t.line_pitch - s.out_w * t.pixel_step;
    t.row_factor = static_cast<uint32_t>(((int64_t{1} << 32) + s.out_w - 1) / s.out_w);
    return t.runs * t.run_words <= Sizes::kSteps * 8 && s.out_w > 1 && s.out_w <= kMostWidth;
  }

  // As many warps share pixels as their registers ask for.
  bool fill_parts() {
    DenseTiling& t = tiling_;
    for (t.parts = 1; t.parts * Sizes::kColumns < a_.out_channels; t.parts *= 2) {
    }
    t.part = align(static_cast<int>(ceil_div(a_.out_channels, t.parts)), kTileVector<T>);
    return t.parts <= kMostParts;
  }
  static constexpr int kMostParts = Sizes::kWords ? 4 : 2;
  static_assert(Sizes::kWarps % kMostParts == 0, "each pixel has warps for all of its parts");

  // Weighs tiles of so many rows.
  void choose(int rows) {
    const ConvShape& s = a_.shape;
    if (rows == best_.rows) return;
    DenseTiling t = tiling_;
    t.rows = rows;
    t.tiles = static_cast<int>(ceil_div(s.out_h, rows));
    t.halo_rows = (rows - 1) * s.stride + s.kernel;
    const int64_t stage = int64_t{t.halo_rows} * t.line_pitch;
    const int norms = t.parts * Sizes::kColumns * 2 * static_cast<int>(sizeof(float));
    const int64_t bytes = 2 * stage + norms + Sizes::kWarps * Sizes::kResultBytes;
    const int64_t tiles = s.batch * t.tiles;
    int beside = static_cast<int>(
        std::min<int64_t>(Sizes::kBlocks, ceil_div(tiles, device_.multiprocessors)));
    while (beside > 0 && bytes > device_.shared_bytes(beside)) --beside;
    if (beside == 0) return;
    t.stage_bytes = static_cast<int>(stage);
    t.norms = 2 * t.stage_bytes;
    t.results = t.norms + norms;
    t.bytes = static_cast<int>(bytes);

    // In cycles: of a tile alone, whose warps wait for their fragments, and of its share of a
    // multiprocessor's instructions and memory.
    const double products = Sizes::kSteps * Sizes::kColumnFragments;
    const double instructions = 90. + 2. * products + 30. * Sizes::kColumnFragments;
    const double fragments = static_cast<double>(
        ceil_div(ceil_div(int64_t{rows} * s.out_w, kFragmentRows), Sizes::kWarps / t.parts));
    const double lines = static_cast<double>(ceil_div(t.halo_rows, Sizes::kWarps));
    const double copies = lines * (20. + 8. * static_cast<double>(ceil_div(t.pieces, 32)));
    const double alone = fragments * (4. * instructions + 300.) + 4. * copies + 1500.;
    const double busy = (fragments * instructions + copies) * Sizes::kWarps / 4. +
                        static_cast<double>(stage) / 32. + 200.;
    const int64_t grid = std::min(tiles, int64_t{device_.multiprocessors} * beside);
    const double cost = static_cast<double>(ceil_div(tiles, grid)) * std::max(alone, beside * busy);
    if (found() && cost >= cost_) return;
    t.step_images = static_cast<int>(grid / t.tiles);
    t.step_tiles = static_cast<int>(grid % t.tiles);
    blocks_ = grid;
    cost_ = cost;
    best_ = t;
  }

  const DeviceLimits device_;
  const FusedMbconv& a_;
  DenseTiling tiling_{}, best_{};
  int64_t blocks_ = 0;
  double cost_ = 0.;
};

// Calls body(candidate) for the first of some sizes that serves; whether one does.
template <class T, class... Sizes, class Body>
bool with_first_dense(const DeviceLimits& device, const FusedMbconv& a, const Body& body) {
  const auto take = [&](const auto& candidate) {
    if (candidate.found()) body(candidate);
    return candidate.found();
  };
  return (take(DenseCandidate<T, Sizes>(device, a)) || ...);
}

// As with_fused_tile, for a convolution from few channels to few of 16 bits, where the output's
// channels are whole vectors and sums are not wanted.
template <class T, class Body>
bool with_dense_tile(const DeviceLimits& device, const FusedMbconv& a, const Body& body) {
  if constexpr (sizeof(T) == 2) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (a.pooled != nullptr || a.out_channels % kTileVector<T> != 0 || !aligned(a.output) ||
        !aligned(a.residual)) {
      return false;
    }
    // Up to 24 output channels, or 32, in each of one, two or four parts. Then vectors of up to 16,
    // 24, 32 and 40 input channels: 3 x 3 filters of two or three fragments take 36 to 92
    // registers. The widest lines leave room for one block, which then has all the warps.
    const bool narrow = a.out_channels <= 24 || (a.out_channels > 32 && a.out_channels <= 48) ||
                        (a.out_channels > 64 && a.out_channels <= 96);
    return (narrow ? with_first_dense<T, DenseSizes<true, 2, 3, 4, 5>>(device, a, body)
                   : with_first_dense<T, DenseSizes<true, 2, 4, 4, 5>>(device, a, body)) ||
           with_first_dense<T, DenseSizes<false, 9, 2, 4, 5>, DenseSizes<false, 14, 3, 4, 3>,
                            DenseSizes<false, 18, 2, 12, 1>, DenseSizes<false, 23, 2, 12, 1>>(
               device, a, body);
  } else {
    return false;
  }
}

// Calls body(candidate) for the tile of a block of type T; whether one fits the device.
template <class T, class Body>
bool with_fused_tile(const DeviceLimits& device, const FusedMbconv& a, const Body& body) {
  if (a.project_weight == nullptr) {
    if (with_dense_tile<T>(device, a, body)) return true;
    return with_better_fused<T, WideFused<0>, SmallFused<0>>(device, a, body);
  }
  if (a.out_channels <= WideFused<8>::kColumns &&
      with_better_fused<T, WideFused<8>, SmallFused<8>>(device, a, body)) {
    return true;
  }
  return with_better_fused<T, WideFused<12>, SmallFused<12>>(device, a, body);
}

}  // namespace effnet::cuda
