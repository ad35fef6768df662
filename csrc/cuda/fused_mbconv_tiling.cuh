// How the Fused-MBConv block is cut into tiles, and which kernel takes them. Host code without
// torch headers: the tests ask it what a block takes.
#pragma once

#include <algorithm>
#include <type_traits>

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
  static int align(int x, int unit) { return (x + unit - 1) / unit * unit; }

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

// Calls body(candidate) for the tile of a block of type T; whether one fits the device.
template <class T, class Body>
bool with_fused_tile(const DeviceLimits& device, const FusedMbconv& a, const Body& body) {
  if (a.project_weight == nullptr) {
    return with_better_fused<T, WideFused<0>, SmallFused<0>>(device, a, body);
  }
  if (a.out_channels <= WideFused<8>::kColumns &&
      with_better_fused<T, WideFused<8>, SmallFused<8>>(device, a, body)) {
    return true;
  }
  return with_better_fused<T, WideFused<12>, SmallFused<12>>(device, a, body);
}

}  // namespace effnet::cuda
