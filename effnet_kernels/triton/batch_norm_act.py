"""BatchNorm + activation (+ pooled sums) on channels-last tensors, forward and backward.

A (N, C, H, W) channels-last tensor is a matrix of N*H*W pixels by C channels. A program owns
BLOCK_C channels and a contiguous range of pixels, of which it holds BLOCK_P at a time; vectors of
one value a channel stay in its registers. Program ids run over the channel blocks first: programs
that run together read neighbouring channels of the same pixels, whole cache lines between them.

Sums over pixels never use atomics. Each program writes one partial row, and a second, small kernel
adds the rows in a fixed order, so that results are the same bits every time. A thread sums in
float32; sums across threads are in float64, which costs nothing there and keeps the rounding of a
whole sum to that of its threads'.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.triton.activations import activate, activate_grad, activation_name
from effnet_kernels.triton.launch import (
    PROGRAMS_PER_MULTIPROCESSOR,
    index_type,
    multiprocessors,
    splits,
    vector_width,
)

NUM_WARPS = 4


@triton.jit
def load_channels(p_vector, o_c, m_c, DEFAULT: tl.constexpr):
    """One float32 value a channel from a vector of any float dtype; DEFAULT where it is None."""
    if p_vector is None:
        return tl.full(o_c.shape, DEFAULT, tl.float32)
    else:
        return tl.load(p_vector + o_c, mask=m_c, other=DEFAULT).to(tl.float32)


@triton.jit
def load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c):
    """(mean, scale, bias), each (1, BLOCK_C) float32: bn(x) = (x - mean) * scale + bias.

    scale = weight / sqrt(var + eps). The mean is not folded into the bias: where it is far from
    zero, x - mean loses nothing, and x * scale - mean * scale much.
    """
    invstd = tl.rsqrt(load_channels(p_var, o_c, m_c, 1.0) + eps)
    scale = load_channels(p_weight, o_c, m_c, 1.0) * invstd
    mean = load_channels(p_mean, o_c, m_c, 0.0)
    bias = load_channels(p_bias, o_c, m_c, 0.0)
    return mean[None, :], scale[None, :], bias[None, :]


@triton.jit
def load_batch_norm_grad(
    p_mean, p_var, p_weight, p_bias, eps, p_grad_weight, p_grad_bias, inverse_count, o_c, m_c
):
    """(mean, scale, bias, constant, slope): what ``batch_norm_act_grad`` needs, (1, BLOCK_C) each.

    constant = scale * grad_bias / count and slope = scale * invstd * grad_weight / count are how
    the batch statistics answer to x; zeros where p_grad_weight is None, for frozen statistics.
    """
    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    invstd = tl.rsqrt(load_channels(p_var, o_c, m_c, 1.0) + eps)[None, :]
    grad_weight = load_channels(p_grad_weight, o_c, m_c, 0.0)[None, :]
    grad_bias = load_channels(p_grad_bias, o_c, m_c, 0.0)[None, :]
    constant = scale * grad_bias * inverse_count
    slope = scale * invstd * grad_weight * inverse_count
    return mean, scale, bias, constant, slope


@triton.jit
def batch_norm_act_grad(grad, x, mean, scale, bias, constant, slope, ACTIVATION: tl.constexpr):
    """The gradient of act(bn(x)) with respect to x, for the gradient ``grad`` of its result.

    scale * (du - (grad_bias + xhat * grad_weight) / count), du = grad * act'(bn(x)).
    """
    centered = x - mean
    du = activate_grad(grad, centered * scale + bias, ACTIVATION)
    return du * scale - (constant + centered * slope)


@triton.jit(
    do_not_specialize=[
        "group_pixels", "program_pixels", "splits", "channel_vectors", "channel_blocks",
    ]
)  # fmt: skip
def batch_norm_act_kernel(
    p_input,  # (pixels, C)
    p_mean,
    p_var,
    p_weight,
    p_bias,
    eps,
    p_output,  # (pixels, C)
    p_pooled,  # (splits, groups, C) float32, or None
    group_pixels,
    program_pixels,
    splits,
    channel_vectors,
    channel_blocks,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """output = act((input - mean) / sqrt(var + eps) * weight + bias); pooled sums output by group.

    The pixels are groups of group_pixels (the images, where there is something to pool), each split
    into ranges of program_pixels. The grid is (groups, splits, channel blocks), the last fastest.
    """
    C = channel_vectors * VECTOR
    pid = tl.program_id(0)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    group = (pid // channel_blocks) // splits
    split = (pid // channel_blocks) % splits
    first = split.to(tl.int64) * program_pixels
    count = tl.minimum(group_pixels - first, program_pixels).to(tl.int32)
    origin = group.to(tl.int64) * group_pixels + first

    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]
    pooled = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        m_tile = (start + o_p < count)[:, None] & m_c[None, :]
        p_tile = (origin + start) * C + o_tile
        x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        y = activate((x - mean) * scale + bias, ACTIVATION)
        if p_pooled is not None:
            pooled += tl.where(m_tile, y, 0.0)
        tl.store(p_output + p_tile, y.to(p_output.dtype.element_ty), mask=m_tile)
    if p_pooled is not None:
        row = split.to(tl.int64) * (tl.num_programs(0) // channel_blocks // splits) + group
        tl.store(p_pooled + row * C + o_c, tl.sum(pooled, 0), mask=m_c)


@triton.jit(
    do_not_specialize=["pixels", "image_pixels", "program_pixels", "channel_vectors",
                       "channel_blocks"]
)  # fmt: skip
def batch_norm_act_grad_sums_kernel(
    p_grad_output,  # (pixels, C)
    p_grad_pooled,  # (N, C) float32, or None
    p_input,  # (pixels, C)
    p_mean,
    p_var,
    p_weight,
    p_bias,
    eps,
    p_partials,  # (2, splits, C) float32
    pixels,
    image_pixels,
    program_pixels,
    channel_vectors,
    channel_blocks,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums of du * xhat (row 0) and of du (row 1) over ranges of program_pixels pixels.

    du = (grad_output + grad_pooled[n]) * act'(xhat * weight + bias). The grid is (splits, channel
    blocks), the last fastest.
    """
    C = channel_vectors * VECTOR
    pid = tl.program_id(0)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    split = pid // channel_blocks
    first = split.to(tl.int64) * program_pixels
    count = tl.minimum(pixels - first, program_pixels).to(tl.int32)

    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]
    sum_du = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_du_centered = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        m_tile = (start + o_p < count)[:, None] & m_c[None, :]
        p_tile = (first + start) * C + o_tile
        # Beside the mask grad is 0, and so is what it adds to both sums.
        grad = tl.load(p_grad_output + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        if p_grad_pooled is not None:
            grad += load_image_rows(
                p_grad_pooled, first + start, image_pixels, C, o_p, o_c, m_tile, INDEX
            )
        centered = x - mean
        du = activate_grad(grad, centered * scale + bias, ACTIVATION)
        sum_du += du
        sum_du_centered += du * centered
    invstd = tl.rsqrt(load_channels(p_var, o_c, m_c, 1.0) + eps)
    p_row = p_partials + split.to(tl.int64) * C + o_c
    second = (tl.num_programs(0) // channel_blocks).to(tl.int64) * C
    sum_du_xhat = tl.sum(sum_du_centered.to(tl.float64), 0) * invstd
    tl.store(p_row, sum_du_xhat.to(tl.float32), mask=m_c)
    tl.store(p_row + second, tl.sum(sum_du.to(tl.float64), 0).to(tl.float32), mask=m_c)


@triton.jit
def load_image_rows(p_rows, first, image_pixels, C, o_p, o_c, m_tile, INDEX: tl.constexpr):
    """For pixels first + o_p, the (BLOCK_P, BLOCK_C) float32 rows of their images in (N, C)."""
    # 64-bit division once, and 32-bit division of what is left by lane.
    image = first // image_pixels
    pixel = (first - image * image_pixels).to(INDEX) + o_p
    o_rows = image * C + (pixel // image_pixels)[:, None].to(tl.int64) * C + o_c[None, :]
    return tl.load(p_rows + o_rows, mask=m_tile, other=0.0)


@triton.jit(
    do_not_specialize=["pixels", "image_pixels", "program_pixels", "channel_vectors",
                       "channel_blocks"]
)  # fmt: skip
def batch_norm_act_grad_input_kernel(
    p_grad_output,  # (pixels, C)
    p_grad_pooled,  # (N, C) float32, or None
    p_input,  # (pixels, C)
    p_mean,
    p_var,
    p_weight,
    p_bias,
    eps,
    p_grad_weight,  # (C,) float32, or None with frozen statistics
    p_grad_bias,
    inverse_count,
    p_grad_input,  # (pixels, C)
    pixels,
    image_pixels,
    program_pixels,
    channel_vectors,
    channel_blocks,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_input = weight * invstd * (du - (grad_bias + xhat * grad_weight) / pixels).

    Grid and tile as in ``batch_norm_act_grad_sums_kernel``, which gives grad_weight and grad_bias.
    """
    C = channel_vectors * VECTOR
    pid = tl.program_id(0)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first = (pid // channel_blocks).to(tl.int64) * program_pixels
    count = tl.minimum(pixels - first, program_pixels).to(tl.int32)

    mean, scale, bias, constant, slope = load_batch_norm_grad(
        p_mean, p_var, p_weight, p_bias, eps, p_grad_weight, p_grad_bias, inverse_count, o_c, m_c
    )
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]
    for start in tl.range(0, count, BLOCK_P):
        m_tile = (start + o_p < count)[:, None] & m_c[None, :]
        p_tile = (first + start) * C + o_tile
        grad = tl.load(p_grad_output + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        if p_grad_pooled is not None:
            grad += load_image_rows(
                p_grad_pooled, first + start, image_pixels, C, o_p, o_c, m_tile, INDEX
            )
        dx = batch_norm_act_grad(grad, x, mean, scale, bias, constant, slope, ACTIVATION)
        tl.store(p_grad_input + p_tile, dx.to(p_grad_input.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "columns"])
def sum_partials_kernel(
    p_partials,  # (1 or 2, rows, columns) float32
    p_first,  # (columns,)
    p_second,  # (columns,), or None
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """first = partials[0].sum(0) and second = partials[1].sum(0), each in one fixed order.

    Grid: (column blocks, 1 or 2).
    """
    which = tl.program_id(1)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < columns
    o_r = tl.arange(0, BLOCK_R)
    p_partials += which.to(tl.int64) * rows * columns
    total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for start in tl.range(0, rows, BLOCK_R):
        m_tile = (start + o_r < rows)[:, None] & m_m[None, :]
        o_tile = (start + o_r)[:, None].to(tl.int64) * columns + o_m[None, :]
        total += tl.load(p_partials + o_tile, mask=m_tile, other=0.0)
    sums = tl.sum(total.to(tl.float64), 0).to(tl.float32)
    if p_second is None:
        tl.store(p_first + o_m, sums.to(p_first.dtype.element_ty), mask=m_m)
    else:
        if which == 0:
            tl.store(p_first + o_m, sums.to(p_first.dtype.element_ty), mask=m_m)
        else:
            tl.store(p_second + o_m, sums.to(p_second.dtype.element_ty), mask=m_m)


@triton.jit(do_not_specialize=["rows", "C"])
def merge_statistics_kernel(
    p_partials,  # means (rows, C), M2 (rows, C), counts (rows,): float64
    p_mean,  # (C,)
    p_var,  # (C,)
    rows,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of the union of ``rows`` samples of known count, mean and M2.

    Chan's formula for many samples at once: M2 = sum(M2) + sum(count * (mean - union mean)^2). It
    never subtracts large squares, so a mean far from zero costs no digits. One program for BLOCK_C
    channels, rows in a fixed order.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_r = tl.arange(0, BLOCK_R)
    p_m2 = p_partials + rows.to(tl.int64) * C
    p_counts = p_m2 + rows.to(tl.int64) * C

    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    count = tl.zeros([BLOCK_R], tl.float64)
    for start in tl.range(0, rows, BLOCK_R):
        m_r = start + o_r < rows
        o_tile = (start + o_r)[:, None].to(tl.int64) * C + o_c[None, :]
        n = tl.load(p_counts + start + o_r, mask=m_r, other=0.0)
        means = tl.load(p_partials + o_tile, mask=m_r[:, None] & m_c[None, :], other=0.0)
        total += means * n[:, None]
        count += n
    pixels = tl.sum(count, 0)
    mean = tl.sum(total, 0) / pixels

    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    for start in tl.range(0, rows, BLOCK_R):
        m_r = start + o_r < rows
        m_tile = m_r[:, None] & m_c[None, :]
        o_tile = (start + o_r)[:, None].to(tl.int64) * C + o_c[None, :]
        n = tl.load(p_counts + start + o_r, mask=m_r, other=0.0)
        means = tl.load(p_partials + o_tile, mask=m_tile, other=0.0)
        m2 = tl.load(p_m2 + o_tile, mask=m_tile, other=0.0)
        distance = means - mean[None, :]
        squares += m2 + n[:, None] * distance * distance
    tl.store(p_mean + o_c, mean.to(tl.float32), mask=m_c)
    tl.store(p_var + o_c, (tl.sum(squares, 0) / pixels).to(tl.float32), mask=m_c)


class PixelPlan(NamedTuple):
    """How ``groups`` of pixels are spread over programs."""

    groups: int
    group_pixels: int
    program_pixels: int
    splits: int
    channel_vectors: int
    channel_blocks: int
    vector: int
    index: tl.dtype
    block_p: int
    block_c: int

    @property
    def grid(self) -> tuple[int]:
        """One-dimensional: programs."""
        return (self.groups * self.splits * self.channel_blocks,)


def channel_block(channels: int) -> int:
    """Channels a program: a power of two that leaves few lanes idle, over short lines if it must.

    32 bfloat16 channels of a pixel are half a cache line, two sectors; the programs that read the
    other half run at the same time.
    """
    penalty = {16: 1.2, 32: 1.05, 64: 1.0}
    return min(penalty, key=lambda block: -(-channels // block) * block * penalty[block])


@functools.lru_cache(maxsize=1024)
def pixel_plan(
    groups: int, group_pixels: int, channels: int, itemsize: int, multiprocessors: int
) -> PixelPlan:
    """The launch of a kernel over pixels: 16 elements a thread at a time."""
    block_c = channel_block(channels)
    block_p = 16 * 32 * NUM_WARPS // block_c
    blocks = -(-channels // block_c)
    programs = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    tiles, each = splits(-(-group_pixels // block_p), blocks * groups, programs, groups > 1)
    vector = vector_width(channels, itemsize)
    return PixelPlan(
        groups, group_pixels, each * block_p, tiles, channels // vector, blocks, vector,
        index_type(block_p * channels), block_p, block_c,
    )  # fmt: skip


def batch_norm_act(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    output: Tensor,
    pooled: Tensor | None,
) -> None:
    """output = act(bn(input)), pooled[n, c] = its float32 sums over H and W; fills both."""
    N, C, H, W = input.shape
    groups = 1 if pooled is None else N
    plan = pixel_plan(groups, N * H * W // groups, C, input.element_size(), multiprocessors(input))
    partials = pooled
    if pooled is not None and plan.splits > 1:
        partials = torch.empty(plan.splits * N * C, dtype=torch.float32, device=input.device)
    batch_norm_act_kernel[plan.grid](
        input, mean, var, weight, bias, eps, output, partials,
        plan.group_pixels, plan.program_pixels, plan.splits, plan.channel_vectors,
        plan.channel_blocks,
        ACTIVATION=activation_name(activation), VECTOR=plan.vector, INDEX=plan.index,
        BLOCK_P=plan.block_p, BLOCK_C=plan.block_c, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    if partials is not None and pooled is not None and partials is not pooled:
        sum_partials(partials, plan.splits, pooled)


def batch_norm_act_grad_sums(
    grad_output: Tensor,
    grad_pooled: Tensor | None,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Fills grad_weight = sum(du * xhat) and grad_bias = sum(du), over all pixels."""
    N, C, H, W = input.shape
    plan = pixel_plan(1, N * H * W, C, input.element_size(), multiprocessors(input))
    partials = torch.empty(2 * plan.splits * C, dtype=torch.float32, device=input.device)
    batch_norm_act_grad_sums_kernel[plan.grid](
        grad_output, grad_pooled, input, mean, var, weight, bias, eps, partials,
        N * H * W, H * W, plan.program_pixels, plan.channel_vectors, plan.channel_blocks,
        ACTIVATION=activation_name(activation), VECTOR=plan.vector, INDEX=plan.index,
        BLOCK_P=plan.block_p, BLOCK_C=plan.block_c, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    sum_partials(partials, plan.splits, grad_weight, grad_bias)


def batch_norm_act_grad_input(
    grad_output: Tensor,
    grad_pooled: Tensor | None,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_input: Tensor,
) -> None:
    """Fills grad_input; grad_weight and grad_bias are None where the statistics are frozen."""
    N, C, H, W = input.shape
    plan = pixel_plan(1, N * H * W, C, input.element_size(), multiprocessors(input))
    batch_norm_act_grad_input_kernel[plan.grid](
        grad_output, grad_pooled, input, mean, var, weight, bias, eps,
        grad_weight, grad_bias, 1.0 / (N * H * W), grad_input,
        N * H * W, H * W, plan.program_pixels, plan.channel_vectors, plan.channel_blocks,
        ACTIVATION=activation_name(activation), VECTOR=plan.vector, INDEX=plan.index,
        BLOCK_P=plan.block_p, BLOCK_C=plan.block_c, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip


def sum_partials(partials: Tensor, rows: int, first: Tensor, second: Tensor | None = None) -> None:
    """first[:] = partials[0].sum(0), and second of partials[1], rounded to their dtypes.

    Args:
        partials: (2, rows, numel of first) float32, contiguous; (1, ...) without ``second``.
        rows: partial sums of each output.
        first: contiguous, any float dtype.
        second: the same numel, or None.
    """
    columns = first.numel()
    # Few columns: many rows at a time, so that one program's loop stays short.
    block_m = 8 if columns <= 2048 else 32
    sum_partials_kernel[(-(-columns // block_m), 1 if second is None else 2)](
        partials, first, second, rows, columns,
        BLOCK_R=2048 // block_m, BLOCK_M=block_m, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip


def merge_statistics(partials: Tensor, rows: int, mean: Tensor, var: Tensor) -> None:
    """Fills mean and biased var from (mean, M2, count) of ``rows`` samples of each channel.

    Args:
        partials: float64, rows * (2 * C + 1) values: means (rows, C), M2 (rows, C), counts (rows,).
        rows: the number of samples.
        mean: (C,) float32.
        var: (C,) float32.
    """
    C = mean.numel()
    merge_statistics_kernel[(-(-C // 8),)](
        partials, mean, var, rows, C,
        BLOCK_R=128, BLOCK_C=8, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
