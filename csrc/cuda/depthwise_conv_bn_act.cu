// The CUDA launchers of the depthwise op: checks, choice of the kernel's instantiation, cutting
// into blocks, workspaces. The kernels are in depthwise_conv_bn_act.cuh and batch_norm_act.cuh.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../checks.h"
#include "../ops.h"
#include "batch_norm_act.cuh"
#include "depthwise_conv_bn_act.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace effnet::cuda {
namespace {

template <class T>
struct Type {
  using type = T;
};

template <int N>
using Constant = std::integral_constant<int, N>;

// Whether every pointer allows 16-byte accesses at each multiple of a vector of channels.
bool allows_vectors(int channels, int vector, std::initializer_list<const void*> pointers) {
  if (channels % vector != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// Calls body(Type<T>, Constant<V>): V is 16 bytes' worth of T, or 1.
template <class Body>
void for_vector(const char* op, Dtype dtype, int channels,
                std::initializer_list<const void*> pointers, const Body& body) {
  const auto with_type = [&](auto type) {
    constexpr int kVector = 16 / sizeof(typename decltype(type)::type);
    if (allows_vectors(channels, kVector, pointers)) {
      body(type, Constant<kVector>{});
    } else {
      body(type, Constant<1>{});
    }
  };
  switch (dtype) {
    case Dtype::float32:
      return with_type(Type<float>{});
    case Dtype::float16:
      return with_type(Type<__half>{});
    case Dtype::bfloat16:
      return with_type(Type<__nv_bfloat16>{});
    case Dtype::float64:
      STD_TORCH_CHECK(false, op, ": float64 is not supported on CUDA tensors");
  }
}

// Calls body(Constant<K>, Constant<S>).
template <class Body>
void for_window(const DepthwiseShape& shape, const Body& body) {
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
Tensor workspace(const Tensor& like, int64_t elements, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, {elements}, dtype);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// About how many threads a multiprocessor holds of these kernels (their registers allow no more);
// and of how many such waves a grid should be, so that the last one costs little.
constexpr int kResidentThreads = 512;
constexpr int kWaves = 4;

// Cuts the tensor whose patches the threads own, (batch, rows, columns, channels), into blocks.
// Large batches: a block goes through several images, which spares weights and partial results.
// Small ones: images are cut into segments of rows until every multiprocessor has work.
template <class Sizes>
DepthwiseTiling depthwise_tiling(const Device& device, int64_t batch, int channels, int rows,
                                 int columns) {
  DepthwiseTiling tiling;
  tiling.channel_blocks = static_cast<int>(ceil_div(channels, kBlockChannels));
  const int64_t patches = ceil_div(columns, kPatchW);
  tiling.bands = static_cast<int>(ceil_div(patches, Sizes::kMaxPatches));
  tiling.patches = static_cast<int>(ceil_div(patches, tiling.bands));

  const int64_t wave = std::max<int64_t>(
      1, int64_t{device.multiprocessors()} * kResidentThreads / (tiling.patches * Sizes::kLanes));
  const int64_t per_image = int64_t{tiling.channel_blocks} * tiling.bands;
  const int64_t most = ceil_div(rows, Sizes::kPatchH);
  const int64_t wanted = std::min(most, ceil_div(wave, batch * per_image));
  tiling.segment_rows = static_cast<int>(ceil_div(most, wanted)) * Sizes::kPatchH;
  tiling.segments = static_cast<int>(ceil_div(rows, tiling.segment_rows));
  tiling.images =
      std::clamp<int64_t>(batch * per_image * tiling.segments / (wave * kWaves), int64_t{1}, batch);
  tiling.chunks = ceil_div(batch, tiling.images);
  return tiling;
}

int64_t block_count(const DepthwiseTiling& t) {
  return t.chunks * t.segments * t.bands * t.channel_blocks;
}

int64_t slot_count(const DepthwiseTiling& t) { return t.chunks * t.segments * t.bands; }

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
  // Enough blocks to fill the device, but none with less than one row of each thread's loads.
  const int64_t most = ceil_div(rows, int64_t{tiling.row_lanes} * kRowUnroll);
  const int64_t wave = int64_t{device.multiprocessors()} * 2048 / (tiling.lanes * tiling.row_lanes);
  const int64_t wanted =
      std::clamp<int64_t>(kWaves * wave / (groups * tiling.channel_blocks), 1, most);
  tiling.chunk = ceil_div(rows, wanted);
  tiling.chunks = static_cast<int>(ceil_div(rows, tiling.chunk));
  return tiling;
}

int64_t block_count(const RowTiling& t) { return t.groups * t.chunks * t.channel_blocks; }

int thread_count(const RowTiling& t) { return t.lanes * t.row_lanes; }

// output[o, c] = sum over slots of partial[o, slot, c]; see reduce_partials_kernel.
template <class Output>
void reduce_partials(const Device& device, const float* partial, int64_t outer, int64_t slots,
                     int channels, int64_t outer_stride, int64_t channel_stride, Output* first,
                     Output* second = nullptr) {
  STD_TORCH_CHECK(slots <= INT32_MAX, "too large: ", slots, " partial sums");
  device.launch(reduce_partials_kernel<Output>, outer * ceil_div(channels, kReduceChannels),
                kReduceThreads, kReduceSharedBytes, partial, static_cast<int>(slots), channels,
                outer_stride, channel_stride, first, second);
}

void depthwise_conv_bn_act_out(Tensor input, Tensor weight, Tensor mean, Tensor var,
                               OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                               int64_t stride, int64_t pad_top, int64_t pad_left,
                               int64_t activation, OptionalTensor prologue_scale,
                               OptionalTensor prologue_shift, int64_t prologue_activation,
                               Tensor output, OptionalTensor pooled) {
  const DepthwiseInference a = check_depthwise_inference(
      input, weight, mean, var, bn_weight, bn_bias, eps, stride, pad_top, pad_left, activation,
      prologue_scale, prologue_shift, prologue_activation, output, pooled);
  const Device device(input);
  const DepthwiseShape& s = a.shape;
  for_vector("depthwise_conv_bn_act_out", a.dtype, s.channels, {a.input, a.output},
             [&](auto type, auto vector) {
               using T = typename decltype(type)::type;
               constexpr int V = vector();
               for_window(s, [&](auto kernel, auto step) {
                 constexpr int K = kernel(), S = step();
                 using Sizes = ForwardSizes<T, V, K, S>;
                 ForwardArguments<T> f{};
                 f.shape = s;
                 f.tiling = depthwise_tiling<Sizes>(device, s.batch, s.channels, s.out_h, s.out_w);
                 f.input = static_cast<const T*>(a.input);
                 f.weight = static_cast<const T*>(a.weight);
                 f.prologue = a.prologue;
                 f.bn = a.bn;
                 f.activation = a.activation;
                 f.output = static_cast<T*>(a.output);
                 f.pooled = static_cast<float*>(a.pooled);
                 const int64_t parts = int64_t{f.tiling.segments} * f.tiling.bands;
                 const bool reduced = a.pooled != nullptr && parts > 1;
                 OptionalTensor partial;
                 if (reduced) {
                   partial = workspace(input, s.batch * parts * s.channels);
                   f.pooled = floats(*partial);
                 }
                 device.launch(depthwise_conv_kernel<T, V, K, S>, block_count(f.tiling),
                               f.tiling.patches * Sizes::kLanes,
                               Sizes::shared_bytes(f.tiling.patches), f);
                 if (reduced) {
                   reduce_partials(device, f.pooled, s.batch, parts, s.channels, s.channels, 1,
                                   static_cast<float*>(a.pooled));
                 }
               });
             });
}

void depthwise_conv_bn_act_train_out(Tensor input, Tensor weight, OptionalTensor bn_weight,
                                     OptionalTensor bn_bias, double eps, int64_t stride,
                                     int64_t pad_top, int64_t pad_left, int64_t activation,
                                     OptionalTensor prologue_scale, OptionalTensor prologue_shift,
                                     int64_t prologue_activation, bool batch_stats, Tensor conv,
                                     Tensor mean, Tensor var, Tensor output,
                                     OptionalTensor pooled) {
  const DepthwiseTraining a = check_depthwise_training(
      input, weight, bn_weight, bn_bias, eps, stride, pad_top, pad_left, activation, prologue_scale,
      prologue_shift, prologue_activation, batch_stats, conv, mean, var, output, pooled);
  const Device device(input);
  const DepthwiseShape& s = a.shape;
  for_vector(
      "depthwise_conv_bn_act_train_out", a.dtype, s.channels, {a.input, a.conv, a.output},
      [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        constexpr int V = vector();
        for_window(s, [&](auto kernel, auto step) {
          constexpr int K = kernel(), S = step();
          using Sizes = ForwardSizes<T, V, K, S>;
          ForwardArguments<T> f{};
          f.shape = s;
          f.tiling = depthwise_tiling<Sizes>(device, s.batch, s.channels, s.out_h, s.out_w);
          f.input = static_cast<const T*>(a.input);
          f.weight = static_cast<const T*>(a.weight);
          f.prologue = a.prologue;
          f.training = true;
          f.output = static_cast<T*>(a.conv);
          const int64_t slots = slot_count(f.tiling);
          OptionalTensor partial;
          if (batch_stats) {
            partial = workspace(input, 3 * slots * s.channels, ScalarType::Double);
            f.moments = static_cast<double*>(partial->mutable_data_ptr());
          }
          device.launch(depthwise_conv_kernel<T, V, K, S>, block_count(f.tiling),
                        f.tiling.patches * Sizes::kLanes, Sizes::shared_bytes(f.tiling.patches), f);
          if (batch_stats) {
            STD_TORCH_CHECK(slots <= INT32_MAX, "too large: ", slots, " partial statistics");
            device.launch(batch_statistics_kernel, ceil_div(s.channels, kStatisticsChannels),
                          kStatisticsThreads, kStatisticsSharedBytes, f.moments,
                          static_cast<int>(slots), s.channels, static_cast<float*>(a.batch_mean),
                          static_cast<float*>(a.batch_var));
          }
        });

        const int64_t image = int64_t{s.out_h} * s.out_w;
        const bool pool = a.pooled != nullptr;
        const RowTiling tiling =
            row_tiling<V>(device, pool ? s.batch : 1, pool ? image : s.batch * image, s.channels);
        float* pooled_out = static_cast<float*>(a.pooled);
        const bool reduced = pool && tiling.chunks > 1;
        OptionalTensor partial;
        if (reduced) partial = workspace(input, s.batch * tiling.chunks * s.channels);
        device.launch(batch_norm_act_kernel<T, V>, block_count(tiling), thread_count(tiling),
                      pool ? thread_count(tiling) * V * sizeof(float) : 0,
                      static_cast<const T*>(a.conv), a.bn, a.activation, tiling,
                      static_cast<T*>(a.output), reduced ? floats(*partial) : pooled_out);
        if (reduced) {
          reduce_partials(device, floats(*partial), s.batch, tiling.chunks, s.channels, s.channels,
                          1, pooled_out);
        }
      });
}

void depthwise_conv_bn_act_backward_out(
    Tensor grad_output, OptionalTensor grad_pooled, Tensor conv, Tensor mean, Tensor var,
    OptionalTensor bn_weight, OptionalTensor bn_bias, double eps, int64_t activation,
    bool batch_stats, Tensor input, Tensor weight, int64_t stride, int64_t pad_top,
    int64_t pad_left, OptionalTensor prologue_scale, OptionalTensor prologue_shift,
    int64_t prologue_activation, OptionalTensor grad_input, OptionalTensor grad_weight,
    Tensor grad_bn_weight, Tensor grad_bn_bias, OptionalTensor grad_prologue_scale,
    OptionalTensor grad_prologue_shift) {
  const DepthwiseBackward a = check_depthwise_backward(
      grad_output, grad_pooled, conv, mean, var, bn_weight, bn_bias, eps, activation, batch_stats,
      input, weight, stride, pad_top, pad_left, prologue_scale, prologue_shift, prologue_activation,
      grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_prologue_scale,
      grad_prologue_shift);
  const Device device(input);
  const DepthwiseShape& s = a.shape;
  for_vector(
      "depthwise_conv_bn_act_backward_out", a.dtype, s.channels,
      {a.grad_output, a.conv, a.input, a.grad_input}, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        constexpr int V = vector();

        // Pass one: the gradients of BN's weight and bias, which batch statistics need before pass
        // two.
        const int64_t image = int64_t{s.out_h} * s.out_w;
        const bool pool = a.grad_pooled != nullptr;
        const RowTiling rows =
            row_tiling<V>(device, pool ? s.batch : 1, pool ? image : s.batch * image, s.channels);
        const int64_t row_slots = rows.groups * rows.chunks;
        {
          const Tensor partial = workspace(input, 2 * row_slots * s.channels);
          device.launch(batch_norm_act_backward_kernel<T, V>, block_count(rows), thread_count(rows),
                        thread_count(rows) * V * sizeof(float),
                        static_cast<const T*>(a.grad_output),
                        static_cast<const float*>(a.grad_pooled), static_cast<const T*>(a.conv),
                        a.bn, a.activation, rows, floats(partial));
          reduce_partials(device, floats(partial), 2, row_slots, s.channels, 0, 1,
                          static_cast<float*>(a.grad_bn_bias),
                          static_cast<float*>(a.grad_bn_weight));
        }
        if (a.grad_input == nullptr && a.grad_weight == nullptr) return;

        // Pass two: grad_conv, and from it the other gradients.
        for_window(s, [&](auto kernel, auto step) {
          constexpr int K = kernel(), S = step();
          using Sizes = BackwardSizes<T, V, K, S>;
          BackwardArguments<T> b{};
          b.shape = s;
          b.tiling = depthwise_tiling<Sizes>(device, s.batch, s.channels,
                                             s.in_h + s.pad_top - first_padded(s.pad_top, S),
                                             s.in_w + s.pad_left - first_padded(s.pad_left, S));
          b.grad_output = static_cast<const T*>(a.grad_output);
          b.grad_pooled = static_cast<const float*>(a.grad_pooled);
          b.conv = static_cast<const T*>(a.conv);
          b.bn = a.bn;
          b.activation = a.activation;
          if (batch_stats) {
            b.grad_bn_weight = static_cast<const float*>(a.grad_bn_weight);
            b.grad_bn_bias = static_cast<const float*>(a.grad_bn_bias);
          }
          b.input = static_cast<const T*>(a.input);
          b.weight = static_cast<const T*>(a.weight);
          b.prologue = a.prologue;
          b.grad_input = static_cast<T*>(a.grad_input);
          const int64_t slots = slot_count(b.tiling);
          const int64_t taps = a.grad_weight != nullptr ? K * K : 0;
          const int64_t vectors = a.grad_prologue_scale != nullptr ? 2 : 0;
          const Tensor partial = workspace(input, (taps + vectors) * slots * s.channels);
          if (taps > 0) b.partial_weight = floats(partial);
          if (vectors > 0) b.partial_prologue = floats(partial) + taps * slots * s.channels;
          device.launch(depthwise_conv_backward_kernel<T, V, K, S>, block_count(b.tiling),
                        b.tiling.patches * Sizes::kLanes, Sizes::shared_bytes(b.tiling.patches), b);
          if (taps > 0) {
            reduce_partials(device, b.partial_weight, taps, slots, s.channels, 1, K * K,
                            static_cast<T*>(a.grad_weight));
          }
          if (vectors > 0) {
            reduce_partials(device, b.partial_prologue, vectors, slots, s.channels, 0, 1,
                            static_cast<float*>(a.grad_prologue_scale),
                            static_cast<float*>(a.grad_prologue_shift));
          }
        });
      });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("depthwise_conv_bn_act_out", TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act_out));
  m.impl("depthwise_conv_bn_act_train_out",
         TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act_train_out));
  m.impl("depthwise_conv_bn_act_backward_out",
         TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act_backward_out));
}
