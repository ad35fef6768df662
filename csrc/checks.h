// From the tensors of an op call to the arguments of a kernel. Everything that would make a kernel
// read or write out of bounds is an error here, with a message that names the argument. The same
// checks serve CPU and CUDA tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

namespace effnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An extent that fits the kernels' integers, with room for rows and columns beyond the last one.
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() / 4;

// The tensors of one call: all on the device of the first one, with its dtype or the one it
// accumulates in.
class __attribute__((visibility("hidden"))) Checks {
 public:
  Checks(const char* op, const char* name, const Tensor& first)
      : op_(op), first_name_(name), device_(first.device()) {
    switch (first.scalar_type()) {
      case ScalarType::Float:
        dtype_ = Dtype::float32;
        break;
      case ScalarType::Half:
        dtype_ = Dtype::float16;
        break;
      case ScalarType::BFloat16:
        dtype_ = Dtype::bfloat16;
        break;
      case ScalarType::Double:
        dtype_ = Dtype::float64;
        break;
      default:
        STD_TORCH_CHECK(false, op_, ": ", name,
                        " must be float32, float16, bfloat16 or float64, not ",
                        torch::headeronly::toString(first.scalar_type()));
    }
  }

  Dtype dtype() const { return dtype_; }

  // A value that fits an int and is in [low, high].
  int integer(const char* name, int64_t value, int64_t low, int64_t high) const {
    STD_TORCH_CHECK(low <= value && value <= high, op_, ": ", name, " must be in [", low, ", ",
                    high, "], not ", value);
    return static_cast<int>(value);
  }

  Activation activation(const char* name, int64_t code) const {
    return static_cast<Activation>(integer(name, code, 0, kActivations - 1));
  }

  // Dense in the order N, H, W, C, of the call's dtype. The stride of an extent of 1 is never used
  // and may be anything.
  void* channels_last(const char* name, const Tensor& t, int64_t n, int64_t c, int64_t h,
                      int64_t w) const {
    on_device(name, t);
    has_dtype(name, t, dtype_);
    STD_TORCH_CHECK(t.dim() == 4, op_, ": ", name, " must have 4 dimensions (N, C, H, W), not ",
                    t.dim());
    const int64_t size[4] = {n, c, h, w};
    const int64_t stride[4] = {h * w * c, 1, w * c, c};
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    for (int d = 0; d < 4; ++d) {
      STD_TORCH_CHECK(sizes[d] == size[d], op_, ": ", name, " must have shape (", n, ", ", c, ", ",
                      h, ", ", w, "), but its size(", d, ") is ", sizes[d]);
      STD_TORCH_CHECK(size[d] == 1 || strides[d] == stride[d], op_, ": ", name,
                      " must be dense channels-last, but its stride(", d, ") is ", strides[d],
                      " and not ", stride[d]);
    }
    return data(t);
  }

  void* channels_last(const char* name, const OptionalTensor& t, int64_t n, int64_t c, int64_t h,
                      int64_t w) const {
    return t ? channels_last(name, *t, n, c, h, w) : nullptr;
  }

  // Contiguous, of the call's dtype.
  void* matrix(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    dense(name, t, shape);
    has_dtype(name, t, dtype_);
    return data(t);
  }

  void* matrix(const char* name, const OptionalTensor& t,
               std::initializer_list<int64_t> shape) const {
    return t ? matrix(name, *t, shape) : nullptr;
  }

  // The weight of a depthwise convolution: (C, 1, k, k), contiguous, of the call's dtype.
  void* depthwise_weight(const char* name, const Tensor& t, int64_t c, int64_t k) const {
    on_device(name, t);
    has_dtype(name, t, dtype_);
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == c && t.size(1) == 1 && t.size(2) == k &&
                        t.size(3) == k && t.is_contiguous(),
                    op_, ": ", name, " must be contiguous and have shape (", c, ", 1, ", k, ", ", k,
                    ")");
    return data(t);
  }

  void* depthwise_weight(const char* name, const OptionalTensor& t, int64_t c, int64_t k) const {
    return t ? depthwise_weight(name, *t, c, k) : nullptr;
  }

  // The weight of a pointwise convolution: (K, C) or (K, C, 1, 1), contiguous, of the call's dtype.
  const void* pointwise_weight(const char* name, const Tensor& t, int64_t k, int64_t c) const {
    on_device(name, t);
    has_dtype(name, t, dtype_);
    const bool kernel = t.dim() == 4 && t.size(2) == 1 && t.size(3) == 1;
    STD_TORCH_CHECK(
        (t.dim() == 2 || kernel) && t.size(0) == k && t.size(1) == c && t.is_contiguous(), op_,
        ": ", name, " must be contiguous and have shape (", k, ", ", c, ") or (", k, ", ", c,
        ", 1, 1)");
    return t.const_data_ptr();
  }

  // (C,): float32 or the call's dtype; float64 in a float64 call.
  ChannelVector channel_vector(const char* name, const Tensor& t, int64_t c) const {
    dense(name, t, {c});
    const Dtype accumulate = accumulate_dtype(dtype_);
    if (t.scalar_type() == scalar_type(accumulate)) return {t.const_data_ptr(), accumulate};
    has_dtype(name, t, dtype_);
    return {t.const_data_ptr(), dtype_};
  }

  ChannelVector channel_vector(const char* name, const OptionalTensor& t, int64_t c) const {
    return t ? channel_vector(name, *t, c) : ChannelVector{};
  }

  // Contiguous, of the accumulate dtype.
  void* accumulated(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    dense(name, t, shape);
    has_dtype(name, t, accumulate_dtype(dtype_));
    return data(t);
  }

  void* accumulated(const char* name, const OptionalTensor& t,
                    std::initializer_list<int64_t> shape) const {
    return t ? accumulated(name, *t, shape) : nullptr;
  }

  BatchNorm batch_norm(const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, int64_t c) const {
    STD_TORCH_CHECK(eps >= 0, op_, ": eps must be at least 0, not ", eps);
    return {channel_vector("mean", mean, c), channel_vector("var", var, c),
            channel_vector("bn_weight", weight, c), channel_vector("bn_bias", bias, c), eps};
  }

  Prologue prologue(const OptionalTensor& scale, const OptionalTensor& shift, int64_t code,
                    int64_t c) const {
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), op_,
                    ": prologue_scale and prologue_shift must be given together");
    return {accumulated("prologue_scale", scale, {c}), accumulated("prologue_shift", shift, {c}),
            activation("prologue_activation", code)};
  }

  // The geometry of the call. Every window must overlap the input: with 0 <= pad_top, pad_left < k
  // that leaves less than k rows and columns of padding at the end, too.
  ConvShape conv_shape(const Tensor& input, const Tensor& weight, int64_t stride, int64_t pad_top,
                       int64_t pad_left, const char* output_name, const Tensor& output) const {
    STD_TORCH_CHECK(input.dim() == 4, op_, ": input must have 4 dimensions (N, C, H, W), not ",
                    input.dim());
    STD_TORCH_CHECK(output.dim() == 4, op_, ": ", output_name,
                    " must have 4 dimensions (N, C, OH, OW), not ", output.dim());
    STD_TORCH_CHECK(weight.dim() == 4, op_, ": a convolution's weight must have 4 dimensions, not ",
                    weight.dim());
    const int64_t k = weight.size(3);
    STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, op_, ": the kernel size must be 3, 5 or 7, not ",
                    k);
    ConvShape s;
    s.batch = input.size(0);
    STD_TORCH_CHECK(s.batch >= 1, op_, ": input must not be empty");
    s.channels = integer("input.size(1)", input.size(1), 1, kMaxExtent);
    s.in_h = integer("input.size(2)", input.size(2), 1, kMaxExtent);
    s.in_w = integer("input.size(3)", input.size(3), 1, kMaxExtent);
    s.out_h = integer("the output height", output.size(2), 1, kMaxExtent);
    s.out_w = integer("the output width", output.size(3), 1, kMaxExtent);
    s.kernel = static_cast<int>(k);
    s.stride = integer("stride", stride, 1, 2);
    s.pad_top = integer("pad_top", pad_top, 0, k - 1);
    s.pad_left = integer("pad_left", pad_left, 0, k - 1);
    STD_TORCH_CHECK(int64_t{s.out_h - 1} * s.stride - s.pad_top < s.in_h, op_,
                    ": the output height ", s.out_h, " is too large for the input height ", s.in_h);
    STD_TORCH_CHECK(int64_t{s.out_w - 1} * s.stride - s.pad_left < s.in_w, op_,
                    ": the output width ", s.out_w, " is too large for the input width ", s.in_w);
    return s;
  }

 private:
  // Of results as well as of arguments: their tensors are no different.
  static void* data(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

  static ScalarType scalar_type(Dtype dtype) {
    switch (dtype) {
      case Dtype::float16:
        return ScalarType::Half;
      case Dtype::bfloat16:
        return ScalarType::BFloat16;
      case Dtype::float64:
        return ScalarType::Double;
      default:
        return ScalarType::Float;
    }
  }

  void on_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == device_, op_, ": ", name, " must be on the device of ",
                    first_name_);
  }

  void has_dtype(const char* name, const Tensor& t, Dtype dtype) const {
    STD_TORCH_CHECK(t.scalar_type() == scalar_type(dtype), op_, ": ", name, " must be ",
                    torch::headeronly::toString(scalar_type(dtype)), ", not ",
                    torch::headeronly::toString(t.scalar_type()));
  }

  void dense(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    on_device(name, t);
    bool same = t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
    std::string text;
    int d = 0;
    for (const int64_t size : shape) {
      same = same && t.size(d++) == size;
      if (!same) break;
    }
    if (same) return;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, op_, ": ", name, " must be contiguous and have shape (", text, ")");
  }

  const char* op_;
  const char* first_name_;
  torch::stable::Device device_;
  Dtype dtype_;
};

struct OutputSize {
  int64_t height, width;
};

// What a depthwise convolution of `input` gives. padding: top, left, bottom, right, each less than
// the kernel.
inline OutputSize depthwise_output_size(const char* op, const Tensor& input, const Tensor& weight,
                                        int64_t stride, const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(input.dim() == 4, op, ": input must have 4 dimensions (N, C, H, W), not ",
                  input.dim());
  STD_TORCH_CHECK(weight.dim() == 4, op, ": weight must have 4 dimensions (C, 1, k, k), not ",
                  weight.dim());
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, not ", stride);
  STD_TORCH_CHECK(padding.size() == 4, op, ": padding must be 4 numbers, not ", padding.size());
  const int64_t k = weight.size(2);
  for (const int64_t side : padding) {
    STD_TORCH_CHECK(0 <= side && side < k, op, ": padding must be in [0, ", k - 1, "], not ", side);
  }
  const int64_t height = input.size(2) + padding[0] + padding[2];
  const int64_t width = input.size(3) + padding[1] + padding[3];
  STD_TORCH_CHECK(height >= k && width >= k, op, ": input must have ", k, " rows and columns, ",
                  "padding included, not ", height, " and ", width);
  return {(height - k) / stride + 1, (width - k) / stride + 1};
}

inline DepthwiseInference check_depthwise_inference(
    const Tensor& input, const Tensor& weight, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, int64_t stride,
    int64_t pad_top, int64_t pad_left, int64_t activation, const OptionalTensor& prologue_scale,
    const OptionalTensor& prologue_shift, int64_t prologue_activation, const Tensor& output,
    const OptionalTensor& pooled) {
  const Checks check("depthwise_conv_bn_act_out", "input", input);
  const ConvShape s = check.conv_shape(input, weight, stride, pad_top, pad_left, "output", output);
  const int64_t n = s.batch, c = s.channels;
  DepthwiseInference a{};
  a.dtype = check.dtype();
  a.shape = s;
  a.input = check.channels_last("input", input, n, c, s.in_h, s.in_w);
  a.weight = check.depthwise_weight("weight", weight, c, s.kernel);
  a.bn = check.batch_norm(mean, var, bn_weight, bn_bias, eps, c);
  a.activation = check.activation("activation", activation);
  a.prologue = check.prologue(prologue_scale, prologue_shift, prologue_activation, c);
  a.output = check.channels_last("output", output, n, c, s.out_h, s.out_w);
  a.pooled = check.accumulated("pooled", pooled, {n, c});
  return a;
}

inline DepthwiseTraining check_depthwise_training(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, double eps, int64_t stride, int64_t pad_top, int64_t pad_left,
    int64_t activation, const OptionalTensor& prologue_scale, const OptionalTensor& prologue_shift,
    int64_t prologue_activation, bool batch_stats, const Tensor& conv, const Tensor& mean,
    const Tensor& var, const OptionalTensor& output, const OptionalTensor& pooled) {
  const Checks check("depthwise_conv_bn_act_train_out", "input", input);
  const ConvShape s = check.conv_shape(input, weight, stride, pad_top, pad_left, "conv", conv);
  const int64_t n = s.batch, c = s.channels;
  DepthwiseTraining a{};
  a.dtype = check.dtype();
  a.shape = s;
  a.input = check.channels_last("input", input, n, c, s.in_h, s.in_w);
  a.weight = check.depthwise_weight("weight", weight, c, s.kernel);
  a.bn = check.batch_norm(mean, var, bn_weight, bn_bias, eps, c);
  a.activation = check.activation("activation", activation);
  a.prologue = check.prologue(prologue_scale, prologue_shift, prologue_activation, c);
  a.batch_stats = batch_stats;
  a.conv = check.channels_last("conv", conv, n, c, s.out_h, s.out_w);
  if (batch_stats) {
    a.batch_mean = check.accumulated("mean", mean, {c});
    a.batch_var = check.accumulated("var", var, {c});
  }
  a.output = check.channels_last("output", output, n, c, s.out_h, s.out_w);
  STD_TORCH_CHECK(output || !pooled, "depthwise_conv_bn_act_train_out: pooled needs output");
  a.pooled = check.accumulated("pooled", pooled, {n, c});
  return a;
}

inline DepthwiseBackward check_depthwise_backward(
    const Tensor& grad_output, const OptionalTensor& grad_pooled, const Tensor& conv,
    const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, double eps, int64_t activation, bool batch_stats,
    const Tensor& input, const Tensor& weight, int64_t stride, int64_t pad_top, int64_t pad_left,
    const OptionalTensor& prologue_scale, const OptionalTensor& prologue_shift,
    int64_t prologue_activation, const OptionalTensor& grad_input,
    const OptionalTensor& grad_weight, const Tensor& grad_bn_weight, const Tensor& grad_bn_bias,
    const OptionalTensor& grad_prologue_scale, const OptionalTensor& grad_prologue_shift) {
  const Checks check("depthwise_conv_bn_act_backward_out", "input", input);
  const ConvShape s =
      check.conv_shape(input, weight, stride, pad_top, pad_left, "grad_output", grad_output);
  const int64_t n = s.batch, c = s.channels;
  DepthwiseBackward a{};
  a.dtype = check.dtype();
  a.shape = s;
  a.grad_output = check.channels_last("grad_output", grad_output, n, c, s.out_h, s.out_w);
  a.grad_pooled = check.accumulated("grad_pooled", grad_pooled, {n, c});
  a.conv = check.channels_last("conv", conv, n, c, s.out_h, s.out_w);
  a.bn = check.batch_norm(mean, var, bn_weight, bn_bias, eps, c);
  a.activation = check.activation("activation", activation);
  a.batch_stats = batch_stats;
  a.input = check.channels_last("input", input, n, c, s.in_h, s.in_w);
  a.weight = check.depthwise_weight("weight", weight, c, s.kernel);
  a.prologue = check.prologue(prologue_scale, prologue_shift, prologue_activation, c);
  a.grad_input = check.channels_last("grad_input", grad_input, n, c, s.in_h, s.in_w);
  a.grad_weight = check.depthwise_weight("grad_weight", grad_weight, c, s.kernel);
  a.grad_bn_weight = check.accumulated("grad_bn_weight", grad_bn_weight, {c});
  a.grad_bn_bias = check.accumulated("grad_bn_bias", grad_bn_bias, {c});
  a.grad_prologue_scale = check.accumulated("grad_prologue_scale", grad_prologue_scale, {c});
  a.grad_prologue_shift = check.accumulated("grad_prologue_shift", grad_prologue_shift, {c});
  const bool wanted = a.prologue.scale != nullptr && a.grad_input != nullptr;
  STD_TORCH_CHECK(
      (a.grad_prologue_scale != nullptr) == wanted && (a.grad_prologue_shift != nullptr) == wanted,
      "depthwise_conv_bn_act_backward_out: grad_prologue_scale and "
      "grad_prologue_shift must be given exactly when there are a prologue and a "
      "grad_input");
  return a;
}

// Extents that fit the kernels' integers.
inline void check_image_extents(const Checks& check, const Tensor& t, int64_t& batch,
                                int64_t& pixels, int& channels) {
  STD_TORCH_CHECK(t.dim() == 4 && t.numel() > 0, "input must be (N, C, H, W) and not empty");
  batch = t.size(0);
  channels = check.integer("input.size(1)", t.size(1), 1, kMaxExtent);
  pixels = t.size(2) * t.size(3);
}

inline PointwiseInference check_pointwise_inference(
    const Tensor& input, const Tensor& weight, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, int64_t activation,
    const OptionalTensor& prologue_scale, const OptionalTensor& prologue_shift,
    int64_t prologue_activation, const OptionalTensor& gate, const OptionalTensor& residual,
    bool allow_tf32, const Tensor& output, const OptionalTensor& pooled) {
  const char* op = "pointwise_conv_bn_act_out";
  const Checks check(op, "input", input);
  PointwiseInference a{};
  a.dtype = check.dtype();
  check_image_extents(check, input, a.batch, a.pixels, a.in_channels);
  STD_TORCH_CHECK(weight.dim() >= 1, op, ": weight must be a matrix");
  a.out_channels = check.integer("weight.size(0)", weight.size(0), 1, kMaxExtent);
  const int64_t n = a.batch, c = a.in_channels, k = a.out_channels;
  const int64_t h = input.size(2), w = input.size(3);
  a.input = check.channels_last("input", input, n, c, h, w);
  a.weight = check.pointwise_weight("weight", weight, k, c);
  a.bn = check.batch_norm(mean, var, bn_weight, bn_bias, eps, k);
  a.activation = check.activation("activation", activation);
  a.prologue = check.prologue(prologue_scale, prologue_shift, prologue_activation, c);
  a.gate = check.accumulated("gate", gate, {n, c});
  a.residual = check.channels_last("residual", residual, n, k, h, w);
  a.allow_tf32 = allow_tf32;
  a.output = check.channels_last("output", output, n, k, h, w);
  a.pooled = check.accumulated("pooled", pooled, {n, k});
  return a;
}

inline ExpandDepthwise check_expand_depthwise(
    const Tensor& input, const Tensor& expand_weight, const Tensor& expand_mean,
    const Tensor& expand_var, const OptionalTensor& expand_bn_weight,
    const OptionalTensor& expand_bn_bias, double expand_eps, int64_t expand_activation,
    const Tensor& weight, const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, double eps, int64_t stride, int64_t pad_top, int64_t pad_left,
    int64_t activation, bool allow_tf32, const Tensor& output, const OptionalTensor& pooled) {
  const Checks check("expand_depthwise_out", "input", input);
  ExpandDepthwise a{};
  a.dtype = check.dtype();
  a.shape = check.conv_shape(input, weight, stride, pad_top, pad_left, "output", output);
  a.in_channels = a.shape.channels;
  a.shape.channels = check.integer("weight.size(0)", weight.size(0), 1, kMaxExtent);
  const int64_t n = a.shape.batch, c = a.shape.channels;
  a.input = check.channels_last("input", input, n, a.in_channels, a.shape.in_h, a.shape.in_w);
  a.expand_weight = check.pointwise_weight("expand_weight", expand_weight, c, a.in_channels);
  a.expand_bn =
      check.batch_norm(expand_mean, expand_var, expand_bn_weight, expand_bn_bias, expand_eps, c);
  a.expand_activation = check.activation("expand_activation", expand_activation);
  a.weight = check.depthwise_weight("weight", weight, c, a.shape.kernel);
  a.bn = check.batch_norm(mean, var, bn_weight, bn_bias, eps, c);
  a.activation = check.activation("activation", activation);
  a.allow_tf32 = allow_tf32;
  a.output = check.channels_last("output", output, n, c, a.shape.out_h, a.shape.out_w);
  a.pooled = check.accumulated("pooled", pooled, {n, c});
  return a;
}

inline FusedMbconv check_fused_mbconv(
    const Tensor& input, const Tensor& expand_weight, const Tensor& expand_mean,
    const Tensor& expand_var, const OptionalTensor& expand_bn_weight,
    const OptionalTensor& expand_bn_bias, double expand_eps, int64_t expand_activation,
    int64_t stride, int64_t pad_top, int64_t pad_left, const OptionalTensor& project_weight,
    const OptionalTensor& project_mean, const OptionalTensor& project_var,
    const OptionalTensor& project_bn_weight, const OptionalTensor& project_bn_bias,
    double project_eps, int64_t project_activation, const OptionalTensor& residual, bool allow_tf32,
    const Tensor& output, const OptionalTensor& pooled) {
  const char* op = "fused_mbconv_out";
  const Checks check(op, "input", input);
  FusedMbconv a{};
  a.dtype = check.dtype();
  a.shape = check.conv_shape(input, expand_weight, stride, pad_top, pad_left, "output", output);
  a.in_channels = a.shape.channels;
  a.shape.channels = check.integer("expand_weight.size(0)", expand_weight.size(0), 1, kMaxExtent);
  a.out_channels = check.integer("output.size(1)", output.size(1), 1, kMaxExtent);
  const ConvShape& s = a.shape;
  const int64_t n = s.batch, m = s.channels, k = a.out_channels;
  a.input = check.channels_last("input", input, n, a.in_channels, s.in_h, s.in_w);
  a.expand_weight =
      check.channels_last("expand_weight", expand_weight, m, a.in_channels, s.kernel, s.kernel);
  a.expand_bn =
      check.batch_norm(expand_mean, expand_var, expand_bn_weight, expand_bn_bias, expand_eps, m);
  a.expand_activation = check.activation("expand_activation", expand_activation);
  if (project_weight) {
    STD_TORCH_CHECK(project_mean && project_var, op,
                    ": project_mean and project_var must be given with project_weight");
    STD_TORCH_CHECK(!pooled, op, ": pooled must be None with a project_weight");
    a.project_weight = check.pointwise_weight("project_weight", *project_weight, k, m);
    a.project_bn = check.batch_norm(*project_mean, *project_var, project_bn_weight, project_bn_bias,
                                    project_eps, k);
    a.project_activation = check.activation("project_activation", project_activation);
  } else {
    STD_TORCH_CHECK(k == m, op, ": without a project_weight output must have ", m,
                    " channels, not ", k);
  }
  a.residual = check.channels_last("residual", residual, n, k, s.out_h, s.out_w);
  a.allow_tf32 = allow_tf32;
  a.output = check.channels_last("output", output, n, k, s.out_h, s.out_w);
  a.pooled = check.accumulated("pooled", pooled, {n, m});
  return a;
}

inline ChannelStatistics check_channel_statistics(const Tensor& input, const Tensor& mean,
                                                  const Tensor& var) {
  const Checks check("channel_statistics_out", "input", input);
  ChannelStatistics a{};
  a.dtype = check.dtype();
  check_image_extents(check, input, a.batch, a.pixels, a.channels);
  const int64_t c = a.channels;
  a.input = check.channels_last("input", input, a.batch, c, input.size(2), input.size(3));
  a.mean = check.accumulated("mean", mean, {c});
  a.var = check.accumulated("var", var, {c});
  return a;
}

// Fills what is common to the functions around BN + activation, and checks the rest.
class __attribute__((visibility("hidden"))) BatchNormActChecks {
 public:
  BatchNormActChecks(const char* op, BatchNormAct& a, const Tensor& input, const Tensor& mean,
                     const Tensor& var, const OptionalTensor& bn_weight,
                     const OptionalTensor& bn_bias, double eps, int64_t activation,
                     const OptionalTensor& gate)
      : check_(op, "input", input) {
    a.dtype = check_.dtype();
    check_image_extents(check_, input, a.batch, a.pixels, a.channels);
    n_ = a.batch;
    c_ = a.channels;
    h_ = input.size(2);
    w_ = input.size(3);
    a.input = image("input", input);
    a.bn = check_.batch_norm(mean, var, bn_weight, bn_bias, eps, c_);
    a.activation = check_.activation("activation", activation);
    a.gate = by_image("gate", gate);
  }

  void* image(const char* name, const OptionalTensor& t) const {
    return check_.channels_last(name, t, n_, c_, h_, w_);
  }
  void* vector(const char* name, const OptionalTensor& t) const {
    return check_.accumulated(name, t, {c_});
  }
  void* by_image(const char* name, const OptionalTensor& t) const {
    return check_.accumulated(name, t, {n_, c_});
  }

 private:
  Checks check_;
  int64_t n_, c_, h_, w_;
};

inline BatchNormActForward check_batch_norm_act(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, double eps, int64_t activation, const OptionalTensor& gate,
    const OptionalTensor& residual, const OptionalTensor& output, const OptionalTensor& pooled) {
  const char* op = "batch_norm_act_out";
  BatchNormActForward a{};
  const BatchNormActChecks check(op, a, input, mean, var, bn_weight, bn_bias, eps, activation,
                                 gate);
  STD_TORCH_CHECK(output || pooled, op, ": output or pooled must be given");
  a.residual = check.image("residual", residual);
  a.output = check.image("output", output);
  a.pooled = check.by_image("pooled", pooled);
  return a;
}

inline BatchNormActSums check_batch_norm_act_sums(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, int64_t activation,
    const OptionalTensor& gate, const OptionalTensor& grad_pooled, const Tensor& grad_bn_weight,
    const Tensor& grad_bn_bias) {
  BatchNormActSums a{};
  const BatchNormActChecks check("batch_norm_act_sums_out", a, input, mean, var, bn_weight, bn_bias,
                                 eps, activation, gate);
  a.grad_output = check.image("grad_output", grad_output);
  a.grad_pooled = check.by_image("grad_pooled", grad_pooled);
  a.grad_bn_weight = check.vector("grad_bn_weight", grad_bn_weight);
  a.grad_bn_bias = check.vector("grad_bn_bias", grad_bn_bias);
  return a;
}

inline BatchNormActBackward check_batch_norm_act_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, int64_t activation,
    const OptionalTensor& gate, const OptionalTensor& grad_pooled,
    const OptionalTensor& grad_bn_weight, const OptionalTensor& grad_bn_bias, bool linear,
    const Tensor& grad_input) {
  const char* op = "batch_norm_act_backward_out";
  BatchNormActBackward a{};
  const BatchNormActChecks check(op, a, input, mean, var, bn_weight, bn_bias, eps, activation,
                                 gate);
  STD_TORCH_CHECK(grad_bn_weight.has_value() == grad_bn_bias.has_value(), op,
                  ": grad_bn_weight and grad_bn_bias must be given together");
  a.grad_output = check.image("grad_output", grad_output);
  a.grad_pooled = check.by_image("grad_pooled", grad_pooled);
  a.grad_bn_weight = check.vector("grad_bn_weight", grad_bn_weight);
  a.grad_bn_bias = check.vector("grad_bn_bias", grad_bn_bias);
  a.linear = linear;
  a.grad_input = check.image("grad_input", grad_input);
  return a;
}

inline BatchNormActGate check_batch_norm_act_gate(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, int64_t activation,
    const Tensor& gate, const Tensor& grad_gate, const Tensor& gated, const Tensor& grad_gated) {
  BatchNormActGate a{};
  const BatchNormActChecks check("batch_norm_act_gate_out", a, input, mean, var, bn_weight, bn_bias,
                                 eps, activation, gate);
  a.grad_output = check.image("grad_output", grad_output);
  a.grad_gate = check.by_image("grad_gate", grad_gate);
  a.gated = check.image("gated", gated);
  a.grad_gated = check.image("grad_gated", grad_gated);
  return a;
}

inline ChannelSums check_channel_sums(const Tensor& input, const OptionalTensor& other,
                                      const Tensor& sums) {
  const Checks check("channel_sums_out", "input", input);
  ChannelSums a{};
  a.dtype = check.dtype();
  check_image_extents(check, input, a.batch, a.pixels, a.channels);
  const int64_t n = a.batch, c = a.channels, h = input.size(2), w = input.size(3);
  a.input = check.channels_last("input", input, n, c, h, w);
  a.other = check.channels_last("other", other, n, c, h, w);
  a.sums = check.accumulated("sums", sums, {n, c});
  return a;
}

inline ChannelScale check_channel_scale(const Tensor& input, const Tensor& scale,
                                        const OptionalTensor& shift, const Tensor& output) {
  const Checks check("channel_scale_out", "input", input);
  ChannelScale a{};
  a.dtype = check.dtype();
  check_image_extents(check, input, a.batch, a.pixels, a.channels);
  const int64_t n = a.batch, c = a.channels, h = input.size(2), w = input.size(3);
  a.input = check.channels_last("input", input, n, c, h, w);
  a.scale = check.accumulated("scale", scale, {n, c});
  a.shift = check.accumulated("shift", shift, {n, c});
  a.output = check.channels_last("output", output, n, c, h, w);
  return a;
}

// What is common to both directions of a gate: its extents, activations and matrices.
template <class Gate>
void check_gate_extents(const char* op, Gate& a, const Checks& weights, int64_t channels,
                        int64_t pixels, const Tensor& reduce_weight, const Tensor& expand_weight,
                        int64_t activation, int64_t gate_activation) {
  STD_TORCH_CHECK(reduce_weight.dim() >= 1, op, ": reduce_weight must be (S, C)");
  a.weight_dtype = weights.dtype();
  a.accumulate = accumulate_dtype(a.weight_dtype);
  a.channels = weights.integer("pooled.size(1)", channels, 1, kMaxExtent);
  a.squeezed = weights.integer("reduce_weight.size(0)", reduce_weight.size(0), 1, kMaxExtent);
  STD_TORCH_CHECK(pixels >= 1, op, ": pixels must be at least 1, not ", pixels);
  a.pixels = pixels;
  a.reduce_weight = weights.pointwise_weight("reduce_weight", reduce_weight, a.squeezed, channels);
  a.expand_weight = weights.pointwise_weight("expand_weight", expand_weight, channels, a.squeezed);
  a.activation = weights.activation("activation", activation);
  a.gate_activation = weights.activation("gate_activation", gate_activation);
  STD_TORCH_CHECK(
      a.gate_activation == Activation::sigmoid || a.gate_activation == Activation::hardsigmoid, op,
      ": gate_activation must be sigmoid or hardsigmoid");
}

// A gate but for its tensors of values.
inline void check_gate(const char* op, SqueezeExciteGate& a, const Checks& weights,
                       int64_t channels, int64_t pixels, const Tensor& reduce_weight,
                       const OptionalTensor& reduce_bias, const Tensor& expand_weight,
                       const OptionalTensor& expand_bias, int64_t activation,
                       int64_t gate_activation) {
  check_gate_extents(op, a, weights, channels, pixels, reduce_weight, expand_weight, activation,
                     gate_activation);
  a.reduce_bias = weights.matrix("reduce_bias", reduce_bias, {a.squeezed});
  a.expand_bias = weights.matrix("expand_bias", expand_bias, {a.channels});
}

inline int64_t pooled_channels(const char* op, const Tensor& pooled) {
  STD_TORCH_CHECK(pooled.dim() == 2 && pooled.numel() > 0, op,
                  ": pooled must be (N, C) and not empty");
  return pooled.size(1);
}

inline SqueezeExciteGate check_squeeze_excite_gate(const Tensor& pooled, int64_t pixels,
                                                   const Tensor& reduce_weight,
                                                   const OptionalTensor& reduce_bias,
                                                   const Tensor& expand_weight,
                                                   const OptionalTensor& expand_bias,
                                                   int64_t activation, int64_t gate_activation,
                                                   const Tensor& hidden, const Tensor& gate) {
  const char* op = "squeeze_excite_gate_out";
  const Checks check(op, "reduce_weight", reduce_weight);
  SqueezeExciteGate a{};
  check_gate(op, a, check, pooled_channels(op, pooled), pixels, reduce_weight, reduce_bias,
             expand_weight, expand_bias, activation, gate_activation);
  a.batch = pooled.size(0);
  const int64_t n = a.batch, c = a.channels, s = a.squeezed;
  a.pooled = check.accumulated("pooled", pooled, {n, c});
  a.hidden = check.accumulated("hidden", hidden, {n, s});
  a.gate = check.accumulated("gate", gate, {n, c});
  return a;
}

inline SqueezeExciteGateBackward check_squeeze_excite_gate_backward(
    const Tensor& grad_gate, const Tensor& pooled, int64_t pixels, const Tensor& hidden,
    const Tensor& gate, const Tensor& reduce_weight, const Tensor& expand_weight,
    int64_t activation, int64_t gate_activation, const Tensor& grad_pooled,
    const Tensor& grad_reduce_weight, const Tensor& grad_reduce_bias,
    const Tensor& grad_expand_weight, const Tensor& grad_expand_bias) {
  const char* op = "squeeze_excite_gate_backward_out";
  const Checks check(op, "reduce_weight", reduce_weight);
  SqueezeExciteGateBackward a{};
  check_gate_extents(op, a, check, pooled_channels(op, pooled), pixels, reduce_weight,
                     expand_weight, activation, gate_activation);
  a.batch = pooled.size(0);
  const int64_t n = a.batch, c = a.channels, s = a.squeezed;
  a.grad_gate = check.accumulated("grad_gate", grad_gate, {n, c});
  a.pooled = check.accumulated("pooled", pooled, {n, c});
  a.hidden = check.accumulated("hidden", hidden, {n, s});
  a.gate = check.accumulated("gate", gate, {n, c});
  a.grad_pooled = check.accumulated("grad_pooled", grad_pooled, {n, c});
  a.grad_reduce_weight = check.matrix("grad_reduce_weight", grad_reduce_weight, {s, c});
  a.grad_reduce_bias = check.matrix("grad_reduce_bias", grad_reduce_bias, {s});
  a.grad_expand_weight = check.matrix("grad_expand_weight", grad_expand_weight, {c, s});
  a.grad_expand_bias = check.matrix("grad_expand_bias", grad_expand_bias, {c});
  return a;
}

// A convolution's weight and the BN after it, as an op takes them.
struct __attribute__((visibility("hidden"))) ConvBn {
  const Tensor& weight;
  const Tensor& mean;
  const Tensor& var;
  const OptionalTensor& bn_weight;
  const OptionalTensor& bn_bias;
  double eps;
  int64_t activation;
};

struct __attribute__((visibility("hidden"))) SqueezeExcite {
  const Tensor& reduce_weight;
  const OptionalTensor& reduce_bias;
  const Tensor& expand_weight;
  const OptionalTensor& expand_bias;
  int64_t activation, gate_activation;
};

inline MbconvInference check_mbconv(const Tensor& input, const ConvBn* expand,
                                    const ConvBn& depthwise, int64_t stride, int64_t pad_top,
                                    int64_t pad_left, const SqueezeExcite* squeeze_excite,
                                    const ConvBn& project, bool residual, const Tensor& output) {
  const char* op = "mbconv";
  const Checks check(op, "input", input);
  MbconvInference a{};
  a.dtype = check.dtype();
  ConvShape& s = a.shape;
  s = check.conv_shape(input, depthwise.weight, stride, pad_top, pad_left, "output", output);
  a.in_channels = s.channels;
  s.channels = check.integer("depthwise_weight.size(0)", depthwise.weight.size(0), 1, kMaxExtent);
  a.out_channels = check.integer("output.size(1)", output.size(1), 1, kMaxExtent);
  const int64_t n = s.batch, c = s.channels, k = a.out_channels;
  a.input = check.channels_last("input", input, n, a.in_channels, s.in_h, s.in_w);
  if (expand != nullptr) {
    a.expand_weight = check.pointwise_weight("expand_weight", expand->weight, c, a.in_channels);
    a.expand_bn = check.batch_norm(expand->mean, expand->var, expand->bn_weight, expand->bn_bias,
                                   expand->eps, c);
    a.expand_activation = check.activation("expand_activation", expand->activation);
  } else {
    STD_TORCH_CHECK(s.channels == a.in_channels, op, ": without an expansion the depthwise weight ",
                    "must have ", a.in_channels, " channels, not ", s.channels);
  }
  a.weight = check.depthwise_weight("depthwise_weight", depthwise.weight, c, s.kernel);
  a.bn = check.batch_norm(depthwise.mean, depthwise.var, depthwise.bn_weight, depthwise.bn_bias,
                          depthwise.eps, c);
  a.activation = check.activation("depthwise_activation", depthwise.activation);
  if (squeeze_excite != nullptr) {
    const Checks weights(op, "reduce_weight", squeeze_excite->reduce_weight);
    const bool wide = a.dtype == Dtype::float64;
    STD_TORCH_CHECK(wide == (weights.dtype() == Dtype::float64), op,
                    ": reduce_weight must be float64 exactly where input is");
    SqueezeExciteGate& g = a.gate;
    check_gate(op, g, weights, s.channels, int64_t{s.out_h} * s.out_w,
               squeeze_excite->reduce_weight, squeeze_excite->reduce_bias,
               squeeze_excite->expand_weight, squeeze_excite->expand_bias,
               squeeze_excite->activation, squeeze_excite->gate_activation);
    g.batch = 1;
  }
  a.project_weight = check.pointwise_weight("project_weight", project.weight, k, c);
  a.project_bn = check.batch_norm(project.mean, project.var, project.bn_weight, project.bn_bias,
                                  project.eps, k);
  a.project_activation = check.activation("project_activation", project.activation);
  a.residual = residual;
  STD_TORCH_CHECK(!residual || (k == a.in_channels && s.out_h == s.in_h && s.out_w == s.in_w), op,
                  ": a residual needs an output of the input's shape");
  a.output = check.channels_last("output", output, n, k, s.out_h, s.out_w);
  return a;
}

}  // namespace effnet
