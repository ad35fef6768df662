// The CUDA kernels of squeeze-and-excitation, as PyTorch calls them: checks, cutting into blocks,
// launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "../ops.h"
#include "row_launches.cuh"
#include "squeeze_excite.cuh"

namespace effnet::cuda {
namespace {

void channel_sums_out(Tensor input, OptionalTensor other, Tensor output) {
  const ChannelSums a = check_channel_sums(input, other, output);
  for_type("channel_sums_out", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Device device(input);
    for_vector<T>(a.channels, {a.input, a.other}, [&](auto vector) {
      constexpr int V = vector();
      const RowTiling tiling = row_tiling<V>(device, a.batch, a.pixels, a.channels);
      const ImageSums sums(input, static_cast<float*>(a.sums), a.batch, tiling.chunks, a.channels);
      const int threads = thread_count(tiling);
      device.launch(channel_sums_kernel<T, V>, block_count(tiling), threads,
                    sum_shared_bytes(tiling, V, threads), static_cast<const T*>(a.input),
                    static_cast<const T*>(a.other), tiling, sums.data());
      sums.add_up(device);
    });
  });
}

void channel_scale_out(Tensor input, Tensor scale, OptionalTensor shift, Tensor output) {
  const ChannelScale a = check_channel_scale(input, scale, shift, output);
  for_type("channel_scale_out", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Device device(input);
    for_vector<T>(a.channels, {a.input, a.scale, a.shift, a.output}, [&](auto vector) {
      constexpr int V = vector();
      const RowTiling tiling = row_tiling<V>(device, a.batch, a.pixels, a.channels);
      device.launch(channel_scale_kernel<T, V>, block_count(tiling), thread_count(tiling), 0,
                    static_cast<const T*>(a.input), static_cast<const float*>(a.scale),
                    static_cast<const float*>(a.shift), tiling, static_cast<T*>(a.output));
    });
  });
}

// Lanes of a warp that share a row: enough for one load each.
int lanes_of_row(int columns, int vector) {
  int lanes = 1;
  while (lanes < 32 && lanes * vector < columns) lanes *= 2;
  return lanes;
}

void squeeze_excite_gate_out(Tensor pooled, int64_t pixels, Tensor reduce_weight,
                             OptionalTensor reduce_bias, Tensor expand_weight,
                             OptionalTensor expand_bias, int64_t activation,
                             int64_t gate_activation, Tensor hidden, Tensor gate) {
  constexpr const char* kOp = "squeeze_excite_gate_out";
  const SqueezeExciteGate a =
      check_squeeze_excite_gate(pooled, pixels, reduce_weight, reduce_bias, expand_weight,
                                expand_bias, activation, gate_activation, hidden, gate);
  for_type(kOp, a.weight_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kGateVector<T>;
    const Device device(pooled);
    size_t bytes = a.squeezed * sizeof(float);
    STD_TORCH_CHECK(bytes <= static_cast<size_t>(device.shared_bytes(1)), kOp,
                    ": reduce_weight.size(0) must be at most ",
                    device.shared_bytes(1) / sizeof(float), " on this device, not ", a.squeezed);
    GateTiling tiling{};
    tiling.reduce_vectors = allows_vectors(a.channels, V, {a.reduce_weight, a.pooled});
    tiling.expand_vector = V;
    while (!allows_vectors(a.squeezed, tiling.expand_vector, {a.expand_weight},
                           tiling.expand_vector * sizeof(T))) {
      tiling.expand_vector /= 2;
    }
    tiling.reduce_lanes = lanes_of_row(a.channels, tiling.reduce_vectors ? V : 1);
    tiling.expand_lanes = lanes_of_row(a.squeezed, tiling.expand_vector);
    // Where multiprocessors would be idle, so many blocks an image that each takes a row a thread.
    const int64_t most = ceil_div(a.channels, kGateThreads / tiling.expand_lanes);
    const int64_t idle = device.multiprocessors() / std::max<int64_t>(a.batch, 1);
    tiling.parts = static_cast<int>(std::clamp<int64_t>(idle, 1, most));
    // The rows of each begin at a multiple of 16 bytes.
    tiling.rows = static_cast<int>(ceil_div(ceil_div(a.channels, tiling.parts), 8)) * 8;
    tiling.parts = static_cast<int>(ceil_div(a.channels, tiling.rows));
    constexpr size_t kMostKept = 48 * 1024;
    const auto keep = [&](size_t more) {
      const bool fits = bytes + more <= kMostKept;
      if (fits) bytes += more;
      return fits;
    };
    const int64_t row = int64_t{a.squeezed} * static_cast<int64_t>(sizeof(T));
    if (a.channels < static_cast<int>(kMostKept) && a.squeezed < static_cast<int>(kMostKept)) {
      bytes = GateTiling::aligned(a.squeezed) * sizeof(float);
      tiling.kept = keep(tiling.kept_floats(a.channels, a.squeezed) * sizeof(float));
      tiling.rows_kept = tiling.kept && a.channels * row % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(a.expand_weight) % 16 == 0 &&
                         keep(tiling.rows * row);
    }
    device.launch(squeeze_excite_gate_kernel<T>, a.batch * tiling.parts, kGateThreads, bytes, a,
                  tiling);
  });
}

// Of a (rows, columns) matrix, for a block of kGateThreads that adds up its rows.
RowTiling matrix_tiling(int rows, int columns, int vector) {
  RowTiling tiling{};
  tiling.rows = rows;
  tiling.channels = columns;
  const int64_t vectors = ceil_div(columns, vector);
  tiling.channel_blocks = static_cast<int>(ceil_div(vectors, kGateLanes));
  tiling.lanes = static_cast<int>(ceil_div(vectors, tiling.channel_blocks));
  tiling.row_lanes = std::min(kGateThreads / tiling.lanes, rows);
  tiling.parts = 1;
  while (tiling.parts * tiling.parts < tiling.row_lanes) ++tiling.parts;
  return tiling;
}

void squeeze_excite_gate_backward_out(Tensor grad_gate, Tensor pooled, int64_t pixels,
                                      Tensor hidden, Tensor gate, Tensor reduce_weight,
                                      Tensor expand_weight, int64_t activation,
                                      int64_t gate_activation, Tensor grad_pooled,
                                      Tensor grad_reduce_weight, Tensor grad_reduce_bias,
                                      Tensor grad_expand_weight, Tensor grad_expand_bias) {
  const SqueezeExciteGateBackward a = check_squeeze_excite_gate_backward(
      grad_gate, pooled, pixels, hidden, gate, reduce_weight, expand_weight, activation,
      gate_activation, grad_pooled, grad_reduce_weight, grad_reduce_bias, grad_expand_weight,
      grad_expand_bias);
  for_type("squeeze_excite_gate_backward_out", a.weight_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Device device(pooled);
    const Tensor values = workspace(pooled, a.batch * (a.channels + 2 * int64_t{a.squeezed}));
    GateWorkspace between;
    between.grad_expand = floats(values);
    between.activated = between.grad_expand + a.batch * a.channels;
    between.grad_hidden = between.activated + a.batch * a.squeezed;

    GateBackwardTiling tiling;
    tiling.reduce_vectors = allows_vectors(a.channels, kGateVector<T>, {a.reduce_weight});
    tiling.expand_vectors = allows_vectors(a.squeezed, kGateVector<T>, {a.expand_weight});
    const int reduce = tiling.reduce_vectors ? kGateVector<T> : 1;
    const int expand = tiling.expand_vectors ? kGateVector<T> : 1;
    tiling.reduce = matrix_tiling(a.squeezed, a.channels, reduce);
    tiling.expand = matrix_tiling(a.channels, a.squeezed, expand);
    device.launch(squeeze_excite_gate_backward_kernel<T>, a.batch, kGateThreads,
                  std::max(sum_shared_bytes(tiling.reduce, reduce, kGateThreads),
                           sum_shared_bytes(tiling.expand, expand, kGateThreads)),
                  a, between, tiling);

    const int squeezed_tiles = static_cast<int>(ceil_div(a.squeezed, kTileSqueezed));
    device.launch(squeeze_excite_gate_weights_kernel<T>,
                  ceil_div(a.channels, kTileChannels) * squeezed_tiles, kTileThreads,
                  kTileSharedBytes, a, between, squeezed_tiles);
  });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("channel_sums_out", TORCH_BOX(&effnet::cuda::channel_sums_out));
  m.impl("channel_scale_out", TORCH_BOX(&effnet::cuda::channel_scale_out));
  m.impl("squeeze_excite_gate_out", TORCH_BOX(&effnet::cuda::squeeze_excite_gate_out));
  m.impl("squeeze_excite_gate_backward_out",
         TORCH_BOX(&effnet::cuda::squeeze_excite_gate_backward_out));
}
