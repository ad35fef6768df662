// The CUDA kernels of BN + activation, as PyTorch calls them: checks, vectors or not, cutting into
// blocks, workspaces, launches.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../ops.h"
#include "batch_norm_act.cuh"
#include "batch_norm_act.h"
#include "batch_statistics.cuh"
#include "row_launches.cuh"

namespace effnet::cuda {
namespace {

// A group an image where something is given or summed per image; else one of all pixels, so that
// blocks do not end where images do.
template <int V, class Arguments>
RowTiling image_tiling(const Device& device, const Arguments& a, bool by_image) {
  return row_tiling<V>(device, by_image ? a.batch : 1, by_image ? a.pixels : a.batch * a.pixels,
                       a.channels);
}

// batch_norm_act_kernel on vectors of V, then the sums of each image from its chunks'.
template <class T, int V, bool kOther>
void launch_batch_norm_act(const Device& device, const BatchNormAct& a, const void* other,
                           void* output, void* gated_other, void* sums, const Tensor& like) {
  const bool by_image = a.gate != nullptr || sums != nullptr;
  const RowTiling tiling = image_tiling<V>(device, a, by_image);
  const ImageSums partial(like, static_cast<float*>(sums), a.batch, tiling.chunks, a.channels);
  device.launch(batch_norm_act_kernel<T, V, kOther>, block_count(tiling), thread_count(tiling),
                row_shared_bytes(tiling, V, sums != nullptr ? 1 : 0),
                static_cast<const T*>(a.input), a.bn, a.activation,
                static_cast<const float*>(a.gate), static_cast<const T*>(other), tiling,
                static_cast<T*>(output), static_cast<T*>(gated_other), partial.data());
  partial.add_up(device);
}

}  // namespace

void merge_moments(const Device& device, const double* moments, int64_t slots, int channels,
                   void* mean, void* var) {
  STD_TORCH_CHECK(slots <= INT32_MAX, "too large: ", slots, " partial statistics");
  device.launch(batch_statistics_kernel, ceil_div(channels, kStatisticsChannels),
                kStatisticsThreads, kStatisticsSharedBytes, moments, static_cast<int>(slots),
                channels, static_cast<float*>(mean), static_cast<float*>(var));
}

template <class T>
void BatchNormActLaunches<T>::statistics(const Device& device, const ChannelStatistics& a,
                                         const Tensor& like) {
  for_vector<T>(a.channels, {a.input}, [&](auto vector) {
    constexpr int V = vector();
    const RowTiling tiling = image_tiling<V>(device, a, false);
    const Tensor partial =
        workspace(like, 3 * int64_t{tiling.chunks} * a.channels, ScalarType::Double);
    double* const moments = static_cast<double*>(partial.mutable_data_ptr());
    device.launch(channel_statistics_kernel<T, V>, block_count(tiling), thread_count(tiling),
                  statistics_shared_bytes(tiling, V), static_cast<const T*>(a.input), tiling,
                  moments);
    merge_moments(device, moments, tiling.chunks, a.channels, a.mean, a.var);
  });
}

template <class T>
void BatchNormActLaunches<T>::forward(const Device& device, const BatchNormActForward& a,
                                      const Tensor& like) {
  for_vector<T>(a.channels, {a.input, a.gate, a.residual, a.output}, [&](auto vector) {
    constexpr int V = vector();
    if (a.residual != nullptr && a.output != nullptr) {
      launch_batch_norm_act<T, kPairVector<V>, true>(device, a, a.residual, a.output, nullptr,
                                                     a.pooled, like);
    } else {
      launch_batch_norm_act<T, V, false>(device, a, nullptr, a.output, nullptr, a.pooled, like);
    }
  });
}

template <class T>
void BatchNormActLaunches<T>::gate(const Device& device, const BatchNormActGate& a,
                                   const Tensor& like) {
  for_vector<T>(a.channels, {a.input, a.gate, a.grad_output, a.gated, a.grad_gated},
                [&](auto vector) {
                  launch_batch_norm_act<T, kPairVector<vector()>, true>(
                      device, a, a.grad_output, a.gated, a.grad_gated, a.grad_gate, like);
                });
}

template <class T>
void BatchNormActLaunches<T>::sums(const Device& device, const BatchNormActSums& a,
                                   const Tensor& like) {
  for_vector<T>(a.channels, {a.input, a.gate, a.grad_output, a.grad_pooled}, [&](auto vector) {
    constexpr int V = kPairVector<vector()>;
    const bool by_image = a.gate != nullptr || a.grad_pooled != nullptr;
    const RowTiling tiling = image_tiling<V>(device, a, by_image);
    const int64_t slots = tiling.groups * tiling.chunks;
    const Tensor partial = workspace(like, 2 * slots * a.channels);
    device.launch(batch_norm_act_sums_kernel<T, V>, block_count(tiling), thread_count(tiling),
                  row_shared_bytes(tiling, V, 2), static_cast<const T*>(a.grad_output),
                  static_cast<const T*>(a.input), a.bn, a.activation,
                  static_cast<const float*>(a.gate), static_cast<const float*>(a.grad_pooled),
                  tiling, floats(partial));
    reduce_partials(device, floats(partial), 2, slots, a.channels, 0, 1,
                    static_cast<float*>(a.grad_bn_bias), static_cast<float*>(a.grad_bn_weight));
  });
}

template <class T>
void BatchNormActLaunches<T>::backward(const Device& device, const BatchNormActBackward& a) {
  // What is linear in u already has been through the gate and the activation.
  const void* const gate = a.linear ? nullptr : a.gate;
  const void* const grad_pooled = a.linear ? nullptr : a.grad_pooled;
  const Activation activation = a.linear ? Activation::identity : a.activation;
  for_vector<T>(
      a.channels, {a.input, a.grad_output, a.grad_input, gate, grad_pooled}, [&](auto vector) {
        constexpr int V = kPairVector<vector()>;
        const RowTiling tiling =
            image_tiling<V>(device, a, gate != nullptr || grad_pooled != nullptr);
        device.launch(
            batch_norm_act_backward_kernel<T, V>, block_count(tiling), thread_count(tiling),
            row_shared_bytes(tiling, V, 0), static_cast<const T*>(a.grad_output),
            static_cast<const T*>(a.input), a.bn, activation, static_cast<const float*>(gate),
            static_cast<const float*>(grad_pooled), static_cast<const float*>(a.grad_bn_bias),
            static_cast<const float*>(a.grad_bn_weight),
            static_cast<float>(1. / (static_cast<double>(a.batch) * a.pixels)), a.linear, tiling,
            static_cast<T*>(a.grad_input));
      });
}

template struct BatchNormActLaunches<float>;
template struct BatchNormActLaunches<__half>;
template struct BatchNormActLaunches<__nv_bfloat16>;

namespace {

void channel_statistics_out(Tensor input, Tensor mean, Tensor var) {
  const ChannelStatistics a = check_channel_statistics(input, mean, var);
  for_launches<BatchNormActLaunches>("channel_statistics_out", a.dtype, [&](auto launches) {
    launches.statistics(Device(input), a, input);
  });
}

void batch_norm_act_out(Tensor input, Tensor mean, Tensor var, OptionalTensor bn_weight,
                        OptionalTensor bn_bias, double eps, int64_t activation, OptionalTensor gate,
                        OptionalTensor residual, OptionalTensor output, OptionalTensor pooled) {
  const BatchNormActForward a = check_batch_norm_act(input, mean, var, bn_weight, bn_bias, eps,
                                                     activation, gate, residual, output, pooled);
  for_launches<BatchNormActLaunches>("batch_norm_act_out", a.dtype, [&](auto launches) {
    launches.forward(Device(input), a, input);
  });
}

void batch_norm_act_sums_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var,
                             OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                             int64_t activation, OptionalTensor gate, OptionalTensor grad_pooled,
                             Tensor grad_bn_weight, Tensor grad_bn_bias) {
  const BatchNormActSums a =
      check_batch_norm_act_sums(grad_output, input, mean, var, bn_weight, bn_bias, eps, activation,
                                gate, grad_pooled, grad_bn_weight, grad_bn_bias);
  for_launches<BatchNormActLaunches>("batch_norm_act_sums_out", a.dtype, [&](auto launches) {
    launches.sums(Device(input), a, input);
  });
}

void batch_norm_act_backward_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var,
                                 OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                                 int64_t activation, OptionalTensor gate,
                                 OptionalTensor grad_pooled, OptionalTensor grad_bn_weight,
                                 OptionalTensor grad_bn_bias, bool linear, Tensor grad_input) {
  const BatchNormActBackward a = check_batch_norm_act_backward(
      grad_output, input, mean, var, bn_weight, bn_bias, eps, activation, gate, grad_pooled,
      grad_bn_weight, grad_bn_bias, linear, grad_input);
  for_launches<BatchNormActLaunches>("batch_norm_act_backward_out", a.dtype,
                                     [&](auto launches) { launches.backward(Device(input), a); });
}

void batch_norm_act_gate_out(Tensor grad_output, Tensor input, Tensor mean, Tensor var,
                             OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                             int64_t activation, Tensor gate, Tensor grad_gate, Tensor gated,
                             Tensor grad_gated) {
  const BatchNormActGate a =
      check_batch_norm_act_gate(grad_output, input, mean, var, bn_weight, bn_bias, eps, activation,
                                gate, grad_gate, gated, grad_gated);
  for_launches<BatchNormActLaunches>("batch_norm_act_gate_out", a.dtype, [&](auto launches) {
    launches.gate(Device(input), a, input);
  });
}

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFNET_LIBRARY, EFFNET_CUDA_DISPATCH_KEY, m) {
  m.impl("channel_statistics_out", TORCH_BOX(&effnet::cuda::channel_statistics_out));
  m.impl("batch_norm_act_out", TORCH_BOX(&effnet::cuda::batch_norm_act_out));
  m.impl("batch_norm_act_sums_out", TORCH_BOX(&effnet::cuda::batch_norm_act_sums_out));
  m.impl("batch_norm_act_backward_out", TORCH_BOX(&effnet::cuda::batch_norm_act_backward_out));
  m.impl("batch_norm_act_gate_out", TORCH_BOX(&effnet::cuda::batch_norm_act_gate_out));
}
