// Prints how Fused-MBConv blocks of models are cut into tiles: `fused_mbconv_tiles MULTIPROCESSORS
// BYTES`, with the shared memory of a multiprocessor, writes
//     block | kernel | threads | bytes of shared memory | thread blocks | rows of a tile in use
// for bfloat16. Compiled for the host, with the CUDA emulator's headers.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/fused_mbconv_tiling.cuh"

namespace effnet::cuda {
namespace {

struct Block {
  const char* name;
  int batch, size, channels, middle, features, stride, kernel;  // features 0: no second product
};

constexpr Block kBlocks[] = {
    {"stem 3-32, 1 image", 1, 224, 3, 32, 0, 2, 3},
    {"stem 3-32", 256, 224, 3, 32, 0, 2, 3},
    {"stem 3-24", 128, 300, 3, 24, 0, 2, 3},
    {"stem 3-48", 64, 456, 3, 48, 0, 2, 3},
    {"efficientnetv2_b0 32-16", 256, 112, 32, 16, 0, 1, 3},
    {"efficientnetv2_b3 40-16", 128, 150, 40, 16, 0, 1, 3},
    {"efficientnetv2_l 32-32", 64, 240, 32, 32, 0, 1, 3},
    {"efficientnetv2_s 24-24, 1 image", 1, 192, 24, 24, 0, 1, 3},
    {"efficientnetv2_s 24-24", 64, 192, 24, 24, 0, 1, 3},
    {"efficientnetv2_s 24-96-48 stride 2", 64, 192, 24, 96, 48, 2, 3},
    {"efficientnetv2_s 48-192-48, 1 image", 1, 96, 48, 192, 48, 1, 3},
    {"efficientnetv2_s 48-192-48", 64, 96, 48, 192, 48, 1, 3},
    {"efficientnetv2_s 48-192-64 stride 2", 64, 96, 48, 192, 64, 2, 3},
    {"efficientnetv2_s 64-256-64, 1 image", 1, 48, 64, 256, 64, 1, 3},
    {"efficientnetv2_s 64-256-64", 64, 48, 64, 256, 64, 1, 3},
    {"efficientnetv2_m 80-320-80", 64, 48, 80, 320, 80, 1, 3},
    {"efficientnetv2_l 96-384-96", 64, 60, 96, 384, 96, 1, 3},
    {"efficientnet_es 48-384-48", 64, 56, 48, 384, 48, 1, 3},
};

template <class T, class Sizes>
void print(const Block& block, const FusedCandidate<T, Sizes>& candidate) {
  const FusedTiling& t = candidate.tiling();
  std::printf(
      "%s | fused_mbconv_kernel<__nv_bfloat16, FusedSizes<%d, %d, %d, %d, %d, %s> > | %d | %d | "
      "%lld | %d/%d\n",
      block.name, Sizes::kRowFragments, Sizes::kWarpsDown, Sizes::kWarpsAcross, Sizes::kColumns / 8,
      Sizes::kBlocks, Sizes::kSliced ? "true" : "false", Sizes::kThreads, t.bytes,
      static_cast<long long>(candidate.blocks()), t.rows, Sizes::kRows);
}

template <class T, class Sizes>
void print(const Block& block, const DenseCandidate<T, Sizes>& candidate) {
  const DenseTiling& t = candidate.tiling();
  const int out = (block.size + block.stride - 1) / block.stride;
  const int in_use = t.rows * out;
  const int step = Sizes::kWarps / t.parts * kFragmentRows;
  std::printf(
      "%s | dense_conv_kernel<__nv_bfloat16, DenseSizes<%s, %d, %d, %d, %d> > | %d | %d | "
      "%lld | %d/%d\n",
      block.name, Sizes::kWords ? "true" : "false", Sizes::kSteps, Sizes::kColumnFragments,
      Sizes::kWarps, Sizes::kBlocks, Sizes::kThreads, t.bytes,
      static_cast<long long>(candidate.blocks()), in_use,
      static_cast<int>(ceil_div(in_use, step)) * step);
}

}  // namespace
}  // namespace effnet::cuda

int main(int argc, char** argv) {
  using namespace effnet;
  if (argc != 3) return 2;
  const cuda::DeviceLimits device{std::atoi(argv[1]), std::atoi(argv[2])};
  for (const cuda::Block& b : cuda::kBlocks) {
    FusedMbconv a{};
    a.dtype = Dtype::bfloat16;
    const int out = (b.size + b.stride - 1) / b.stride;
    a.shape = {b.batch, b.middle, b.size,   b.size,       out,
               out,     b.kernel, b.stride, b.kernel / 2, b.kernel / 2};
    a.in_channels = b.channels;
    a.out_channels = b.features > 0 ? b.features : b.middle;
    a.project_weight = b.features > 0 ? &a : nullptr;
    const bool fits = cuda::with_fused_tile<__nv_bfloat16>(
        device, a, [&](const auto& candidate) { cuda::print(b, candidate); });
    if (!fits) return 1;
  }
  return 0;
}
