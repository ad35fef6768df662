// What every launch on rows of channels decides: the storage type, vectors or not, the tiling of
// rows, workspaces, and the reduction of partial sums.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "launch.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace effnet::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <int N>
using Constant = std::integral_constant<int, N>;

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) for the type of `dtype`.
template <class Body>
void for_type(const char* op, Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(Type<float>{});
    case Dtype::float16:
      return body(Type<__half>{});
    case Dtype::bfloat16:
      return body(Type<__nv_bfloat16>{});
    case Dtype::float64:
      STD_TORCH_CHECK(false, op, ": float64 is not supported on CUDA tensors");
  }
}

// Calls body(Launches<T>{}) for the type T of `dtype`.
template <template <class> class Launches, class Body>
void for_launches(const char* op, Dtype dtype, const Body& body) {
  for_type(op, dtype, [&](auto type) { body(Launches<typename decltype(type)::type>{}); });
}

// Whether every pointer allows accesses of `bytes` at each multiple of a vector of channels.
inline bool allows_vectors(int channels, int vector, std::initializer_list<const void*> pointers,
                           size_t bytes = 16) {
  if (channels % vector != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; });
}

// Calls body(Constant<V>): V is 16 bytes' worth of T, or 1.
template <class T, class Body>
void for_vector(int channels, std::initializer_list<const void*> pointers, const Body& body) {
  constexpr int kVector = 16 / sizeof(T);
  if (allows_vectors(channels, kVector, pointers)) {
    body(Constant<kVector>{});
  } else {
    body(Constant<1>{});
  }
}

// Calls body(Constant<K>, Constant<S>) for a depthwise convolution's kernel size and stride.
template <class Body>
void for_window(const ConvShape& shape, const Body& body) {
  const auto with_kernel = [&](auto kernel) {
    if (shape.stride == 1) {
      body(kernel, Constant<1>{});
    } else {
      body(kernel, Constant<2>{});
    }
  };
  switch (shape.kernel) {
    case 3:
      return with_kernel(Constant<3>{});
    case 5:
      return with_kernel(Constant<5>{});
    default:
      return with_kernel(Constant<7>{});
  }
}

// A workspace of the caching allocator: free for reuse on this stream when it goes out of scope,
// and part of a CUDA graph's pool during capture.
inline Tensor workspace(const Tensor& like, int64_t elements,
                        ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, {elements}, dtype);
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

template <int V>
RowTiling row_tiling(const Device& device, int64_t groups, int64_t rows, int channels) {
  RowTiling tiling;
  tiling.groups = groups;
  tiling.rows = rows;
  tiling.channels = channels;
  const int64_t vectors = ceil_div(channels, V);
  tiling.channel_blocks = static_cast<int>(ceil_div(vectors, 32));
  tiling.lanes = static_cast<int>(ceil_div(vectors, tiling.channel_blocks));
  tiling.row_lanes =
      static_cast<int>(std::min<int64_t>(kRowThreads / tiling.lanes, ceil_div(rows, kRowUnroll)));
  // About the square root: as many row lanes a part as parts.
  tiling.parts = 1;
  while (tiling.parts * tiling.parts < tiling.row_lanes) ++tiling.parts;

  // No block with less than one row of each thread's loads, nor with more than an int counts.
  const int64_t most = ceil_div(rows, int64_t{tiling.row_lanes} * kRowUnroll);
  const int64_t least = ceil_div(rows, int64_t{1} << 30);
  const int64_t per_chunk = groups * tiling.channel_blocks;
  const int64_t wave = int64_t{device.multiprocessors()} * kRowBlocks<V> *
                       (kRowThreads / (tiling.lanes * tiling.row_lanes));
  // One wave where its blocks are alike; more where there are so many groups that a last wave,
  // nearly empty, would take as long as a full one. In rows: what a block does once, twice the rows
  // in flight; a second launch, which adds up the chunks of a group, as much again.
  int64_t shortest = 0;
  for (int waves = 1; waves <= 8; ++waves) {
    const int64_t wanted = std::max(least, std::clamp<int64_t>(waves * wave / per_chunk, 1, most));
    const int64_t chunk = ceil_div(rows, wanted);
    const int64_t chunks = ceil_div(rows, chunk);
    const int64_t once = 2 * kRowUnroll * tiling.row_lanes;
    const int64_t time =
        ceil_div(per_chunk * chunks, wave) * (chunk + once) + (chunks > 1 ? once : 0);
    if (waves == 1 || time < shortest) {
      shortest = time;
      tiling.chunk = static_cast<int>(chunk);
      tiling.chunks = static_cast<int>(chunks);
    }
  }
  return tiling;
}

inline int64_t block_count(const RowTiling& t) { return t.groups * t.chunks * t.channel_blocks; }

inline int thread_count(const RowTiling& t) { return t.lanes * t.row_lanes; }

// output[o, c] = sum over slots of partial[o, slot, c]; see reduce_partials_kernel.
template <class Output>
void reduce_partials(const Device& device, const float* partial, int64_t outer, int64_t slots,
                     int channels, int64_t outer_stride, int64_t channel_stride, Output* first,
                     Output* second = nullptr) {
  STD_TORCH_CHECK(slots <= INT32_MAX, "too large: ", slots, " partial sums");
  // Few slots take few lanes, and a block then more channels.
  int lanes = 1;
  while (lanes < kReduceMaxLanes && lanes * kReduceUnroll / 2 < slots) lanes *= 2;
  const int channel_blocks = static_cast<int>(ceil_div(channels, kReduceThreads / lanes));
  device.launch(reduce_partials_kernel<Output>, outer * channel_blocks, kReduceThreads,
                kReduceSharedBytes, partial, static_cast<int>(slots), channels, lanes,
                channel_blocks, outer_stride, channel_stride, first, second);
}

// Where a kernel's blocks write sums of an image's parts, (batch, parts, channels) float32: a
// workspace that add_up sums into `result`, (batch, channels), or `result` itself where an image is
// one part. A template, so that the reduction is compiled only where it is launched.
template <class Output>
class __attribute__((visibility("hidden"))) ImageSums {
 public:
  // result: null where no sums are wanted. data() is, too, then.
  ImageSums(const Tensor& like, Output* result, int64_t batch, int64_t parts, int channels)
      : result_(result), batch_(batch), parts_(parts), channels_(channels) {
    if (result != nullptr && parts > 1) partial_ = workspace(like, batch * parts * channels);
  }

  Output* data() const { return partial_ ? floats(*partial_) : result_; }

  void add_up(const Device& device) const {
    if (!partial_) return;
    reduce_partials(device, floats(*partial_), batch_, parts_, channels_, channels_, 1, result_);
  }

 private:
  Output* result_;
  int64_t batch_, parts_;
  int channels_;
  OptionalTensor partial_;
};

}  // namespace effnet::cuda
