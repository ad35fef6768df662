"""Squeeze-and-excitation: pooled sums, the gate, the scaling, and their gradients.

``channel_sums_out`` and ``channel_scale_out``
    All of the traffic: the kernels of ``batch_norm_act``, without BN and activation. The sums are
    those of the forward kernel; scaled and shifted is its gradient, grad_output * gate +
    grad_pooled.
``squeeze_excite_gate_kernel`` and ``squeeze_excite_gate_grad_kernel``
    A program takes an image through both matrix-vector products. The vector between them goes
    through global memory and a barrier: any S will do, and another product reads it in another
    layout anyway. Programs that share a multiprocessor share the weights in its L1.
``squeeze_excite_weight_grads_kernel``
    Products of an (N, C) with an (N, S) matrix, summed over the images: a tile a program, all
    images in order, so there is nothing left to reduce.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.activations import Activation
from effnet_kernels.triton.activations import activate, activate_grad, activation_name
from effnet_kernels.triton.batch_norm_act import (
    NUM_WARPS,
    batch_norm_act,
    batch_norm_act_backward_out,
    load_channels,
)
from effnet_kernels.triton.launch import device_guard, index_type, vector_width

# Mean, variance, weight, bias, eps and activation that change nothing.
NO_BATCH_NORM_ACT = (None, None, None, None, 0.0, Activation.identity)

# A tile of weights: 32 elements a thread, as many loads in flight as hide most of L2's latency.
GATE_ELEMENTS = 8192
GATE_BLOCK_S = 64
# Two programs of eight warps a multiprocessor.
GATE_REGISTERS = 128

# The tile of a weight's gradient, small because S is and the tiles should be a few hundred, and the
# images that it takes at a time.
GRAD_BLOCK_C = 32
GRAD_BLOCK_S = 16
GRAD_BLOCK_N = 32


@triton.jit
def matrix_vector(
    p_matrix, p_vector, o_r, m_r, columns,
    ACTIVATION: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum over k of matrix[o_r, k] * act(vector[k]): one float32 value for each of the rows o_r.

    matrix: (any, columns), contiguous, any float dtype; vector: (columns,) float32. SUM: the type
    of sums across threads. Long sums, over C, deserve float64; short ones would only be slower.
    """
    total = tl.zeros([o_r.shape[0], BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        m_k = o_k < columns
        o_tile = o_r[:, None].to(INDEX) * columns + o_k[None, :]
        tile = tl.load(p_matrix + o_tile, mask=m_r[:, None] & m_k[None, :], other=0.0)
        vector = activate(tl.load(p_vector + o_k, mask=m_k, other=0.0), ACTIVATION)
        total += tile.to(tl.float32) * vector[None, :]
    return tl.sum(total.to(SUM), 1).to(tl.float32)


@triton.jit
def vector_matrix(
    p_vector, p_matrix, rows, columns, o_c, m_c,
    SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum over k of vector[k] * matrix[k, o_c]: one float32 value for each of the columns o_c.

    vector: (rows,) float32; matrix: (rows, columns), contiguous, any float dtype. SUM as in
    ``matrix_vector``.
    """
    total = tl.zeros([BLOCK, o_c.shape[0]], tl.float32)
    for start in tl.range(0, rows, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        m_k = o_k < rows
        o_tile = o_k[:, None].to(INDEX) * columns + o_c[None, :]
        tile = tl.load(p_matrix + o_tile, mask=m_k[:, None] & m_c[None, :], other=0.0)
        vector = tl.load(p_vector + o_k, mask=m_k, other=0.0)
        total += tile.to(tl.float32) * vector[:, None]
    return tl.sum(total.to(SUM), 0).to(tl.float32)


@triton.jit(do_not_specialize=["channel_vectors", "squeezed_vectors"])
def squeeze_excite_gate_kernel(
    p_pooled,  # (N, C) float32
    inverse_pixels,
    p_reduce_weight,  # (S, C)
    p_reduce_bias,  # (S,), or None
    p_expand_weight,  # (C, S)
    p_expand_bias,  # (C,), or None
    p_hidden,  # (N, S) float32
    p_gate,  # (N, C) float32
    channel_vectors,
    squeezed_vectors,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    CHANNEL_VECTOR: tl.constexpr,
    SQUEEZED_VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """hidden = reduce_weight (pooled / pixels) + reduce_bias,
    gate = g(expand_weight act(hidden) + expand_bias).

    The grid is the images; tiles are (BLOCK_S, BLOCK_C) of reduce_weight, then (BLOCK_C, BLOCK_S)
    of expand_weight.
    """
    C = channel_vectors * CHANNEL_VECTOR
    S = squeezed_vectors * SQUEEZED_VECTOR
    image = tl.program_id(0).to(tl.int64)
    p_pooled += image * C
    p_hidden += image * S
    p_gate += image * C

    for start in tl.range(0, S, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < S
        sums = matrix_vector(
            p_reduce_weight, p_pooled, o_s, m_s, C, "identity", tl.float64, INDEX, BLOCK_C
        )
        hidden = sums * inverse_pixels + load_channels(p_reduce_bias, o_s, m_s, 0.0)
        tl.store(p_hidden + o_s, hidden, mask=m_s)
    # Each thread wrote some of the hidden values, and reads others from here on.
    tl.debug_barrier()
    for start in tl.range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        sums = matrix_vector(
            p_expand_weight, p_hidden, o_c, m_c, S, ACTIVATION, tl.float32, INDEX, BLOCK_S
        )
        expanded = sums + load_channels(p_expand_bias, o_c, m_c, 0.0)
        tl.store(p_gate + o_c, activate(expanded, GATE), mask=m_c)


@triton.jit
def gate_grad(grad, gate, GATE: tl.constexpr):
    """``grad * g'`` element by element, from the gate's value rather than what it is the gate of.

    A hardsigmoid that rounds to 0 or 1 counts as flat.
    """
    if GATE == "sigmoid":
        return grad * (gate * (1.0 - gate))
    else:
        tl.static_assert(GATE == "hardsigmoid", "unknown gate")
        return tl.where((gate > 0.0) & (gate < 1.0), grad * (1.0 / 6.0), 0.0)


@triton.jit(do_not_specialize=["channel_vectors", "squeezed_vectors"])
def squeeze_excite_gate_grad_kernel(
    p_grad_gate,  # (N, C) float32
    inverse_pixels,
    p_hidden,  # (N, S) float32
    p_gate,  # (N, C) float32
    p_reduce_weight,  # (S, C)
    p_expand_weight,  # (C, S)
    p_grad_expanded,  # (N, C) float32
    p_activated,  # (N, S) float32
    p_grad_hidden,  # (N, S) float32
    p_grad_pooled,  # (N, C) float32
    channel_vectors,
    squeezed_vectors,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    CHANNEL_VECTOR: tl.constexpr,
    SQUEEZED_VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """grad_expanded = grad_gate * g', grad_hidden = act'(hidden) * (grad_expanded expand_weight),
    grad_pooled = grad_hidden reduce_weight / pixels; and activated = act(hidden).

    Grid and tiles as in ``squeeze_excite_gate_kernel``, expand_weight first.
    """
    C = channel_vectors * CHANNEL_VECTOR
    S = squeezed_vectors * SQUEEZED_VECTOR
    image = tl.program_id(0).to(tl.int64)
    p_grad_gate += image * C
    p_hidden += image * S
    p_gate += image * C
    p_grad_expanded += image * C
    p_activated += image * S
    p_grad_hidden += image * S
    p_grad_pooled += image * C

    for start in tl.range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        grad = tl.load(p_grad_gate + o_c, mask=m_c, other=0.0)
        gate = tl.load(p_gate + o_c, mask=m_c, other=0.0)
        tl.store(p_grad_expanded + o_c, gate_grad(grad, gate, GATE), mask=m_c)
    # Each thread wrote some of the values, and reads others from here on.
    tl.debug_barrier()
    for start in tl.range(0, S, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < S
        sums = vector_matrix(
            p_grad_expanded, p_expand_weight, C, S, o_s, m_s, tl.float64, INDEX, BLOCK_C
        )
        hidden = tl.load(p_hidden + o_s, mask=m_s, other=0.0)
        tl.store(p_activated + o_s, activate(hidden, ACTIVATION), mask=m_s)
        tl.store(p_grad_hidden + o_s, activate_grad(sums, hidden, ACTIVATION), mask=m_s)
    tl.debug_barrier()
    for start in tl.range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        sums = vector_matrix(
            p_grad_hidden, p_reduce_weight, S, C, o_c, m_c, tl.float32, INDEX, BLOCK_S
        )
        tl.store(p_grad_pooled + o_c, sums * inverse_pixels, mask=m_c)


@triton.jit(do_not_specialize=["images", "channel_vectors", "squeezed_vectors"])
def squeeze_excite_weight_grads_kernel(
    p_grad_expanded,  # (N, C) float32
    p_activated,  # (N, S) float32
    p_pooled,  # (N, C) float32
    p_grad_hidden,  # (N, S) float32
    inverse_pixels,
    p_grad_reduce_weight,  # (S, C)
    p_grad_reduce_bias,  # (S,)
    p_grad_expand_weight,  # (C, S)
    p_grad_expand_bias,  # (C,)
    images,
    channel_vectors,
    squeezed_vectors,
    CHANNEL_VECTOR: tl.constexpr,
    SQUEEZED_VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """grad_expand_weight[c, s] = sum over n of grad_expanded[n, c] * activated[n, s],
    grad_reduce_weight[s, c] = sum over n of grad_hidden[n, s] * pooled[n, c] / pixels,
    and the biases' gradients, the sums over n of grad_expanded and grad_hidden.

    The grid is (channel blocks, blocks of S, 2): expand_weight's tiles, then reduce_weight's.
    """
    C = channel_vectors * CHANNEL_VECTOR
    S = squeezed_vectors * SQUEEZED_VECTOR
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_c = o_c < C
    m_s = o_s < S
    expand = tl.program_id(2) == 0
    if expand:
        p_channels = p_grad_expanded
        p_squeezed = p_activated
    else:
        p_channels = p_pooled
        p_squeezed = p_grad_hidden

    products = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    channel_sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    squeezed_sums = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for start in tl.range(0, images, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        row = o_n[:, None].to(tl.int64)
        m_n = (o_n < images)[:, None]
        channels = tl.load(p_channels + row * C + o_c[None, :], mask=m_n & m_c[None, :], other=0.0)
        squeezed = tl.load(p_squeezed + row * S + o_s[None, :], mask=m_n & m_s[None, :], other=0.0)
        # In float32 throughout: TF32 would lose half the digits.
        products = tl.dot(tl.trans(channels), squeezed, products, input_precision="ieee")
        channel_sums += channels
        squeezed_sums += squeezed

    m_tile = m_c[:, None] & m_s[None, :]
    if expand:
        p_tile = p_grad_expand_weight + o_c[:, None].to(INDEX) * S + o_s[None, :]
        tl.store(p_tile, products.to(p_grad_expand_weight.dtype.element_ty), mask=m_tile)
        if tl.program_id(1) == 0:
            bias = tl.sum(channel_sums, 0).to(p_grad_expand_bias.dtype.element_ty)
            tl.store(p_grad_expand_bias + o_c, bias, mask=m_c)
    else:
        p_tile = p_grad_reduce_weight + o_s[None, :].to(INDEX) * C + o_c[:, None]
        products *= inverse_pixels
        tl.store(p_tile, products.to(p_grad_reduce_weight.dtype.element_ty), mask=m_tile)
        if tl.program_id(0) == 0:
            bias = tl.sum(squeezed_sums, 0).to(p_grad_reduce_bias.dtype.element_ty)
            tl.store(p_grad_reduce_bias + o_s, bias, mask=m_s)


class GatePlan(NamedTuple):
    """The tiles of the gate's kernels."""

    channel_vectors: int
    squeezed_vectors: int
    channel_vector: int
    squeezed_vector: int
    index: tl.dtype
    block_c: int
    block_s: int
    warps: int


@functools.lru_cache(maxsize=1024)
def gate_plan(channels: int, squeezed: int, itemsize: int) -> GatePlan:
    """All of S where it fits, and the channels that are left; ``itemsize`` is the weights'."""
    channel_vector = vector_width(channels, itemsize)
    squeezed_vector = vector_width(squeezed, itemsize)
    block_s = min(triton.next_power_of_2(squeezed), GATE_BLOCK_S)
    block_c = min(triton.next_power_of_2(channels), GATE_ELEMENTS // block_s)
    return GatePlan(
        channels // channel_vector, squeezed // squeezed_vector, channel_vector, squeezed_vector,
        index_type(channels * squeezed), block_c, block_s, 8 if block_c * block_s > 2048 else 4,
    )  # fmt: skip


def channel_sums_out(input: Tensor, other: Tensor | None, sums: Tensor) -> None:
    """sums[n, c] = sum over pixels of input, or of input * other: schema in csrc/ops.cpp."""
    batch_norm_act(input, other, *NO_BATCH_NORM_ACT, None, None, None, None, sums)


def channel_scale_out(input: Tensor, scale: Tensor, shift: Tensor | None, output: Tensor) -> None:
    """output = input * scale[n, c] (+ shift[n, c]): schema in csrc/ops.cpp."""
    batch_norm_act_backward_out(
        input, input, *NO_BATCH_NORM_ACT, scale, shift, None, None, False, output
    )


def squeeze_excite_gate_out(
    pooled: Tensor, pixels: int, reduce_weight: Tensor, reduce_bias: Tensor | None,
    expand_weight: Tensor, expand_bias: Tensor | None, activation: int, gate_activation: int,
    hidden: Tensor, gate: Tensor,
) -> None:  # fmt: skip
    """The gate and the hidden values before their activation: schema in csrc/ops.cpp."""
    S, C = reduce_weight.shape[:2]
    plan = gate_plan(C, S, reduce_weight.element_size())
    with device_guard(pooled):
        squeeze_excite_gate_kernel[(pooled.shape[0],)](
            pooled, 1.0 / pixels, reduce_weight, reduce_bias, expand_weight, expand_bias,
            hidden, gate, plan.channel_vectors, plan.squeezed_vectors,
            ACTIVATION=activation_name(activation), GATE=activation_name(gate_activation),
            CHANNEL_VECTOR=plan.channel_vector, SQUEEZED_VECTOR=plan.squeezed_vector,
            INDEX=plan.index, BLOCK_C=plan.block_c, BLOCK_S=plan.block_s,
            num_warps=plan.warps, num_stages=1, maxnreg=GATE_REGISTERS,
        )  # fmt: skip


def squeeze_excite_gate_backward_out(
    grad_gate: Tensor, pooled: Tensor, pixels: int, hidden: Tensor, gate: Tensor,
    reduce_weight: Tensor, expand_weight: Tensor, activation: int, gate_activation: int,
    grad_pooled: Tensor, grad_reduce_weight: Tensor, grad_reduce_bias: Tensor,
    grad_expand_weight: Tensor, grad_expand_bias: Tensor,
) -> None:  # fmt: skip
    """All gradients of the gate, in two kernels: schema in csrc/ops.cpp."""
    N = pooled.shape[0]
    S, C = reduce_weight.shape[:2]
    plan = gate_plan(C, S, reduce_weight.element_size())
    with device_guard(pooled):
        grad_expanded = torch.empty_like(gate)
        activated, grad_hidden = torch.empty_like(hidden), torch.empty_like(hidden)
        squeeze_excite_gate_grad_kernel[(N,)](
            grad_gate, 1.0 / pixels, hidden, gate, reduce_weight, expand_weight,
            grad_expanded, activated, grad_hidden, grad_pooled,
            plan.channel_vectors, plan.squeezed_vectors,
            ACTIVATION=activation_name(activation), GATE=activation_name(gate_activation),
            CHANNEL_VECTOR=plan.channel_vector, SQUEEZED_VECTOR=plan.squeezed_vector,
            INDEX=plan.index, BLOCK_C=plan.block_c, BLOCK_S=plan.block_s,
            num_warps=plan.warps, num_stages=1, maxnreg=GATE_REGISTERS,
        )  # fmt: skip
        squeeze_excite_weight_grads_kernel[(-(-C // GRAD_BLOCK_C), -(-S // GRAD_BLOCK_S), 2)](
            grad_expanded, activated, pooled, grad_hidden, 1.0 / pixels,
            grad_reduce_weight, grad_reduce_bias, grad_expand_weight, grad_expand_bias,
            N, plan.channel_vectors, plan.squeezed_vectors,
            CHANNEL_VECTOR=plan.channel_vector, SQUEEZED_VECTOR=plan.squeezed_vector,
            INDEX=plan.index, BLOCK_N=GRAD_BLOCK_N, BLOCK_C=GRAD_BLOCK_C, BLOCK_S=GRAD_BLOCK_S,
            num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
