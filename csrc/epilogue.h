// What every kernel does to a value after (or before) the convolution: the activations and their
// derivatives, written once for the scalar, SIMD and CUDA kernels.
//
// `Math` supplies the arithmetic for a value type V (float on the GPU, a SIMD vector on the CPU):
//   V Math::set(constant)           broadcast; double constants serve a Math of double
//   V Math::min(V, V), Math::max(V, V)
//   V Math::sixth(V)                a sixth of it
//   V Math::sigmoid(V)
//   V Math::silu(V)                 x * sigmoid(x)
//   V Math::if_positive(V x, V y)   x > 0 ? y : 0, element by element
// The activation is an ordinary argument: kernels pass a compile-time constant, which folds the
// switch away, or a value that is uniform over the launch, which costs one predicted branch a
// vector.
#pragma once

#if defined(__CUDACC__)
#define EFFNET_INLINE __host__ __device__ __forceinline__
#else
#define EFFNET_INLINE inline __attribute__((always_inline))
#endif

namespace effnet {

// The values are part of the op schemas; effnet_kernels/activations.py holds the same list.
enum class Activation : int {
  identity = 0,
  relu = 1,
  relu6 = 2,
  silu = 3,
  hardswish = 4,
  sigmoid = 5,
  hardsigmoid = 6,
};

constexpr int kActivations = 7;

// 1/6 in two parts of one sign. As one float32 it is off by a quarter of an epsilon, always to the
// same side: a network of hard-swish adds that up, layer by layer.
constexpr float kSixth = 0x1.555554p-3f, kSixthRest = 0x1.555556p-27f;

template <class Math, class V>
EFFNET_INLINE V activate(Activation activation, V x) {
  switch (activation) {
    case Activation::identity:
      return x;
    case Activation::relu:
      return Math::max(x, Math::set(0.f));
    case Activation::relu6:
      return Math::min(Math::max(x, Math::set(0.f)), Math::set(6.f));
    case Activation::silu:
      return Math::silu(x);
    case Activation::hardswish:
      return Math::sixth(x *
                         Math::min(Math::max(x + Math::set(3.f), Math::set(0.f)), Math::set(6.f)));
    case Activation::sigmoid:
      return Math::sigmoid(x);
    case Activation::hardsigmoid:
      return Math::sixth(Math::min(Math::max(x + Math::set(3.f), Math::set(0.f)), Math::set(6.f)));
  }
  return x;
}

// d activate(x) / dx, with PyTorch's choice at the kinks.
template <class Math, class V>
EFFNET_INLINE V activate_grad(Activation activation, V x) {
  const V zero = Math::set(0.f), one = Math::set(1.f);
  switch (activation) {
    case Activation::identity:
      return one;
    case Activation::relu:
      return Math::if_positive(x, one);
    case Activation::relu6:
      return Math::if_positive(x, Math::if_positive(Math::set(6.f) - x, one));
    case Activation::silu: {
      const V s = Math::sigmoid(x);
      return s * (one + x * (one - s));
    }
    case Activation::hardswish: {
      // x/3 + 1/2 inside (-3, 3), 0 below and 1 above.
      const V inside = x * Math::set(1.0 / 3) + Math::set(0.5f);
      const V above = Math::if_positive(x - Math::set(3.f), one - inside);
      return Math::if_positive(x + Math::set(3.f), inside + above);
    }
    case Activation::sigmoid: {
      const V s = Math::sigmoid(x);
      return s * (one - s);
    }
    case Activation::hardsigmoid:
      return Math::if_positive(x + Math::set(3.f),
                               Math::if_positive(Math::set(3.f) - x, Math::set(1.0 / 6)));
  }
  return zero;
}

// activate(x) to its rounding, and its derivative in `grad`: those that are made of a sigmoid
// compute one.
template <class Math, class V>
EFFNET_INLINE V activate_with_grad(Activation activation, V x, V& grad) {
  if (activation == Activation::silu || activation == Activation::sigmoid) {
    const V one = Math::set(1.f), s = Math::sigmoid(x);
    if (activation == Activation::sigmoid) {
      grad = s * (one - s);
      return s;
    }
    grad = s * (one + x * (one - s));
    return x * s;
  }
  grad = activate_grad<Math>(activation, x);
  return activate<Math>(activation, x);
}

}  // namespace effnet
