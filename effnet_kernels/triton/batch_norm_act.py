"""BatchNorm + activation on channels-last tensors: statistics, forward, backward.

A (N, C, H, W) channels-last tensor is a matrix of N*H*W pixels by C channels. A program owns
BLOCK_C channels and a contiguous range of pixels, of which it holds BLOCK_P at a time; vectors of
one value a channel stay in its registers. Program ids run over the channel blocks first: programs
that run together read neighbouring channels of the same pixels, whole cache lines between them.

Each kernel reads and writes every element once. Where something has a value for each image and
channel (a gate, pooled sums), the pixels are in groups, one an image, and a program takes one group
after another, or a part of one; else the whole batch is one group.

=====================================  =======================  ==========================
kernel                                 reads                    writes
=====================================  =======================  ==========================
``channel_statistics_kernel``          input
``batch_norm_act_kernel``              input (residual, other)  (output) (gated other)
``batch_norm_act_grad_sums_kernel``    grad_output, input
``batch_norm_act_grad_input_kernel``   grad_output, input       grad_input
=====================================  =======================  ==========================

The kernels that write images walk from the last pixel to the first, the others forward: what one
kernel leaves in L2, the end of what it read or wrote, is where the next begins.

Sums over pixels never use atomics. Each program writes one partial row, and a second, small kernel
adds the rows in a fixed order, so that results are the same bits every time. A thread sums in
float32; sums across threads are in float64, which costs nothing there and keeps the rounding of a
whole sum to that of its threads'.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.triton.activations import activate, activate_grad, activation_name
from effnet_kernels.triton.launch import (
    PROGRAMS_PER_MULTIPROCESSOR,
    device_guard,
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
def load_invstd(p_var, eps, o_c, m_c):
    """1 / sqrt(var + eps), float32 (BLOCK_C,); ones where p_var is None."""
    if p_var is None:
        return tl.full(o_c.shape, 1.0, tl.float32)
    else:
        return tl.rsqrt(load_channels(p_var, o_c, m_c, 1.0) + eps)


@triton.jit
def load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c):
    """(mean, scale, bias), each (1, BLOCK_C) float32: bn(x) = (x - mean) * scale + bias.

    scale = weight / sqrt(var + eps). The mean is not folded into the bias: where it is far from
    zero, x - mean loses nothing, and x * scale - mean * scale much. Without pointers bn(x) = x.
    """
    invstd = load_invstd(p_var, eps, o_c, m_c)
    scale = load_channels(p_weight, o_c, m_c, 1.0) * invstd
    mean = load_channels(p_mean, o_c, m_c, 0.0)
    bias = load_channels(p_bias, o_c, m_c, 0.0)
    return mean[None, :], scale[None, :], bias[None, :]


@triton.jit
def load_statistics_grad(
    p_var, p_weight, eps, p_grad_weight, p_grad_bias, inverse_count, o_c, m_c
):  # fmt: skip
    """(constant, slope), (1, BLOCK_C) float32 each: how the batch statistics answer to x.

    constant = scale * grad_bias / count, slope = scale * invstd * grad_weight / count; zeros where
    p_grad_weight is None, with frozen statistics.
    """
    constant = load_channels(p_grad_bias, o_c, m_c, 0.0)
    slope = load_channels(p_grad_weight, o_c, m_c, 0.0)
    if p_grad_weight is not None:
        invstd = load_invstd(p_var, eps, o_c, m_c)
        each = load_channels(p_weight, o_c, m_c, 1.0) * invstd * inverse_count
        constant *= each
        slope *= each * invstd
    return constant[None, :], slope[None, :]


@triton.jit
def batch_norm_act_grad(
    grad, x, mean, scale, bias, constant, slope, ACTIVATION: tl.constexpr, LINEAR: tl.constexpr,
    FROZEN: tl.constexpr,
):  # fmt: skip
    """The gradient of act(bn(x)) with respect to x, for the gradient ``grad`` of its result.

    scale * (du - (grad_bias + xhat * grad_weight) / count), du = grad * act'(bn(x)); LINEAR: grad
    is scale * du already; FROZEN: scale * du alone.
    """
    centered = x - mean
    dx = grad if LINEAR else activate_grad(grad, centered * scale + bias, ACTIVATION) * scale
    if not FROZEN:
        dx -= constant + centered * slope
    return dx


@triton.jit
def pixel_range(
    groups, program_groups, group_pixels, program_pixels, splits, channel_blocks, C,
    BLOCK_C: tl.constexpr, BY_IMAGE: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """What a program works on: (o_c, m_c, group, group_end, pixel, count, row).

    Its channels and their mask; a range of groups; of each, ``count`` pixels from ``pixel`` on; and
    the number of this range, a row of partial sums. The grid is (ranges of program_groups, splits
    of a group, channel blocks), the last fastest; the other way round with LAST_FIRST. Without
    BY_IMAGE there is one group, and constants make its loop none.
    """
    pid = tl.program_id(0)
    if LAST_FIRST:
        pid = tl.num_programs(0) - 1 - pid
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // channel_blocks
    pixel = (row % splits).to(tl.int64) * program_pixels
    count = tl.minimum(group_pixels - pixel, program_pixels).to(tl.int32)
    if BY_IMAGE:
        group = (row // splits).to(tl.int64) * program_groups
        group_end = tl.minimum(group + program_groups, groups)
    else:
        group = tl.full([], 0, tl.int64)
        group_end = tl.full([], 1, tl.int64)
    return o_c, o_c < C, group, group_end, pixel, count, row


@triton.jit
def moments(center, deviations, squares, count):
    """(mean, M2), float64 (BLOCK_C,), of ``count`` values a channel.

    M2 is the sum of squares about the mean. ``deviations`` and ``squares``, (any, BLOCK_C) float32,
    are sums of deviations from ``center`` and of their squares.
    """
    off_center = tl.sum(deviations.to(tl.float64), 0) / count
    m2 = tl.sum(squares.to(tl.float64), 0) - off_center * off_center * count
    return center + off_center, m2


@triton.jit
def store_moments(p_partials, mean, m2, count, C, channel_blocks, o_c, m_c):
    """Writes a program's row for ``merge_statistics``; its id runs over the channel blocks first.

    p_partials: means (rows, C), M2 (rows, C), counts (rows,), float64.
    """
    rows = (tl.num_programs(0) // channel_blocks).to(tl.int64)
    row = tl.program_id(0) // channel_blocks
    p_row = p_partials + row.to(tl.int64) * C + o_c
    tl.store(p_row, mean, mask=m_c)
    tl.store(p_row + rows * C, m2, mask=m_c)
    if tl.program_id(0) % channel_blocks == 0:
        tl.store(p_partials + 2 * rows * C + row, count.to(tl.float64))


# What the kernels over pixels are given of their plan, and are not compiled anew for.
_EXTENTS = [
    "groups", "program_groups", "group_pixels", "program_pixels", "splits", "channel_vectors",
    "channel_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=_EXTENTS)
def channel_statistics_kernel(
    p_input,  # (pixels, C)
    p_partials,  # means, M2 (rows, C) each, counts (rows,): float64
    groups,
    program_groups,
    group_pixels,
    program_pixels,
    splits,
    channel_vectors,
    channel_blocks,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean of a program's pixels and the sum of squares about it (M2), a row of partials.

    Grid as in ``pixel_range``, of one group; the tile is BLOCK_P pixels. Sums are of deviations
    from a center, the mean of the program's first tile. A center far from the mean costs digits of
    the squares, but it is that of BLOCK_P values, which then are as far from the mean: with
    BLOCK_P * distance^2 no more than the true M2 of all programs, the float32 sums of a program of
    n tiles lose at most about n * 2^-24 of it, on any input.
    """
    C = channel_vectors * VECTOR
    o_c, m_c, _, _, first, count, _ = pixel_range(
        groups, program_groups, group_pixels, program_pixels, splits, channel_blocks, C, BLOCK_C,
        BY_IMAGE=False, LAST_FIRST=False,
    )  # fmt: skip
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]

    m_first = (o_p < count)[:, None] & m_c[None, :]
    x = tl.load(p_input + (first * C + o_tile), mask=m_first, other=0.0).to(tl.float32)
    center = tl.sum(x, 0) / tl.minimum(count, BLOCK_P).to(tl.float32)
    deviations = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # The first tile a second time, from L1.
    for start in tl.range(0, count, BLOCK_P):
        m_tile = (start + o_p < count)[:, None] & m_c[None, :]
        p_tile = (first + start) * C + o_tile
        x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        deviation = tl.where(m_tile, x - center[None, :], 0.0)
        deviations += deviation
        squares += deviation * deviation
    mean, m2 = moments(center, deviations, squares, count)
    store_moments(p_partials, mean, m2, count, C, channel_blocks, o_c, m_c)


@triton.jit(do_not_specialize=_EXTENTS)
def batch_norm_act_kernel(
    p_input,  # (groups, pixels, C)
    p_other,  # (groups, pixels, C), or None
    p_mean,  # (C,), or None, like the next three
    p_var,
    p_weight,
    p_bias,
    eps,
    p_gate,  # (groups, C) float32, or None for ones
    p_residual,  # (groups, pixels, C), or None
    p_output,  # (groups, pixels, C), or None
    p_gated_other,  # (groups, pixels, C), or None; may be p_other
    p_sums,  # (splits, groups, C) float32, or None
    groups,
    program_groups,
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
    """v = act((input - mean) / sqrt(var + eps) * weight + bias); then any of

    output = v * gate + residual, gated_other = other * gate, sums = sum over a group's pixels of v,
    or of v * other where that is given.

    What is wanted is what has a pointer. Grid as in ``pixel_range``; the tile is BLOCK_P pixels.
    """
    C = channel_vectors * VECTOR
    o_c, m_c, group, group_end, first, count, row = pixel_range(
        groups, program_groups, group_pixels, program_pixels, splits, channel_blocks, C, BLOCK_C,
        BY_IMAGE=p_gate is not None or p_sums is not None, LAST_FIRST=p_output is not None,
    )  # fmt: skip
    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]
    for image in tl.range(group, group_end):
        gate = load_channels(p_gate, image * C + o_c, m_c, 1.0)[None, :]
        origin = image * group_pixels + first
        sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in tl.range(0, count, BLOCK_P):
            m_tile = (start + o_p < count)[:, None] & m_c[None, :]
            p_tile = (origin + start) * C + o_tile
            x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            v = activate((x - mean) * scale + bias, ACTIVATION)
            product = v
            if p_other is not None:
                other = tl.load(p_other + p_tile, mask=m_tile, other=0.0).to(tl.float32)
                product *= other
            if p_sums is not None:
                sums += tl.where(m_tile, product, 0.0)
            if p_output is not None:
                y = v * gate
                if p_residual is not None:
                    y += tl.load(p_residual + p_tile, mask=m_tile, other=0.0).to(tl.float32)
                tl.store(p_output + p_tile, y.to(p_output.dtype.element_ty), mask=m_tile)
            if p_gated_other is not None:
                gated = (other * gate).to(p_gated_other.dtype.element_ty)
                tl.store(p_gated_other + p_tile, gated, mask=m_tile)
        if p_sums is not None:
            p_row = p_sums + ((row % splits).to(tl.int64) * groups + image) * C + o_c
            tl.store(p_row, tl.sum(sums.to(tl.float64), 0).to(tl.float32), mask=m_c)


@triton.jit(do_not_specialize=_EXTENTS)
def batch_norm_act_grad_sums_kernel(
    p_grad_output,  # (groups, pixels, C)
    p_input,  # (groups, pixels, C)
    p_mean,  # (C,)
    p_var,
    p_weight,
    p_bias,
    eps,
    p_gate,  # (groups, C) float32, or None for ones
    p_grad_pooled,  # (groups, C) float32, or None for zeros
    p_partials,  # (2, rows, C) float32
    groups,
    program_groups,
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
    """A program's sums of du * xhat (partials[0]) and of du (partials[1]), one row of each.

    xhat = (input - mean) / sqrt(var + eps), and du = (grad_output * gate + grad_pooled) *
    act'(xhat * weight + bias). Grid as in ``pixel_range``; the tile is BLOCK_P pixels.
    """
    C = channel_vectors * VECTOR
    o_c, m_c, group, group_end, first, count, row = pixel_range(
        groups, program_groups, group_pixels, program_pixels, splits, channel_blocks, C, BLOCK_C,
        BY_IMAGE=p_gate is not None or p_grad_pooled is not None, LAST_FIRST=False,
    )  # fmt: skip
    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]
    sum_du = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_du_centered = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for image in tl.range(group, group_end):
        gate = load_channels(p_gate, image * C + o_c, m_c, 1.0)[None, :]
        grad_pooled = load_channels(p_grad_pooled, image * C + o_c, m_c, 0.0)[None, :]
        origin = image * group_pixels + first
        for start in tl.range(0, count, BLOCK_P):
            m_tile = (start + o_p < count)[:, None] & m_c[None, :]
            p_tile = (origin + start) * C + o_tile
            grad = tl.load(p_grad_output + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            # Beside the mask grad is 0, and so is what it adds to both sums.
            grad *= gate
            if p_grad_pooled is not None:
                grad += tl.where(m_tile, grad_pooled, 0.0)
            centered = x - mean
            du = activate_grad(grad, centered * scale + bias, ACTIVATION)
            sum_du += du
            sum_du_centered += du * centered
    invstd = load_invstd(p_var, eps, o_c, m_c)
    p_row = p_partials + row.to(tl.int64) * C + o_c
    second = (tl.num_programs(0) // channel_blocks).to(tl.int64) * C
    sum_du_xhat = tl.sum(sum_du_centered.to(tl.float64), 0) * invstd
    tl.store(p_row, sum_du_xhat.to(tl.float32), mask=m_c)
    tl.store(p_row + second, tl.sum(sum_du.to(tl.float64), 0).to(tl.float32), mask=m_c)


@triton.jit(do_not_specialize=_EXTENTS)
def batch_norm_act_grad_input_kernel(
    p_grad_output,  # (groups, pixels, C)
    p_input,  # (groups, pixels, C)
    p_mean,  # (C,), or None, like the next three
    p_var,
    p_weight,
    p_bias,
    eps,
    p_gate,  # (groups, C) float32, or None for ones
    p_grad_pooled,  # (groups, C) float32, or None for zeros
    p_grad_weight,  # (C,) float32, or None with frozen statistics
    p_grad_bias,
    inverse_count,
    p_grad_input,  # (groups, pixels, C); may be p_grad_output
    groups,
    program_groups,
    group_pixels,
    program_pixels,
    splits,
    channel_vectors,
    channel_blocks,
    ACTIVATION: tl.constexpr,
    LINEAR: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_input = weight * invstd * (du - (grad_bias + xhat * grad_weight) / pixels), with du as
    in ``batch_norm_act_grad_sums_kernel``, which gives grad_weight and grad_bias.

    Frozen statistics: only the first part. LINEAR: grad_output is the first part already. Where
    nothing depends on the input (frozen and the identity), the compiler leaves out its loads.
    Grid as in ``pixel_range``; the tile is BLOCK_P pixels.
    """
    C = channel_vectors * VECTOR
    o_c, m_c, group, group_end, first, count, _ = pixel_range(
        groups, program_groups, group_pixels, program_pixels, splits, channel_blocks, C, BLOCK_C,
        BY_IMAGE=p_gate is not None or p_grad_pooled is not None, LAST_FIRST=True,
    )  # fmt: skip
    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c)
    constant, slope = load_statistics_grad(
        p_var, p_weight, eps, p_grad_weight, p_grad_bias, inverse_count, o_c, m_c
    )
    o_p = tl.arange(0, BLOCK_P)
    o_tile = o_p[:, None].to(INDEX) * C + o_c[None, :]
    for image in tl.range(group, group_end):
        gate = load_channels(p_gate, image * C + o_c, m_c, 1.0)[None, :]
        grad_pooled = load_channels(p_grad_pooled, image * C + o_c, m_c, 0.0)[None, :]
        origin = image * group_pixels + first
        for start in tl.range(0, count, BLOCK_P):
            m_tile = (start + o_p < count)[:, None] & m_c[None, :]
            p_tile = (origin + start) * C + o_tile
            grad = tl.load(p_grad_output + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            x = tl.load(p_input + p_tile, mask=m_tile, other=0.0).to(tl.float32)
            dx = batch_norm_act_grad(
                grad * gate + grad_pooled, x, mean, scale, bias, constant, slope, ACTIVATION,
                LINEAR, FROZEN=p_grad_weight is None,
            )  # fmt: skip
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
    # Rounding may leave less than nothing of a constant's; NaN comes through.
    var = tl.sum(squares, 0) / pixels
    tl.store(p_mean + o_c, mean.to(tl.float32), mask=m_c)
    tl.store(p_var + o_c, tl.where(var < 0.0, 0.0, var).to(tl.float32), mask=m_c)


class PixelPlan(NamedTuple):
    """The launch of a kernel over groups of pixels.

    Attributes:
        rows: programs of a channel block.
        splits: programs of a group and channel block.
        grid: one-dimensional, programs.
        extents: the kernel's last arguments, ``_EXTENTS``.
        options: its constants and warps.
    """

    rows: int
    splits: int
    grid: tuple[int]
    extents: tuple[int, ...]
    options: dict[str, Any]


def channel_block(channels: int) -> int:
    """Channels a program: a power of two that leaves few lanes idle, over short lines if it must.

    32 bfloat16 channels of a pixel are half a cache line, two sectors; the programs that read the
    other half run at the same time.
    """
    penalty = {16: 1.2, 32: 1.05, 64: 1.0}
    return min(penalty, key=lambda block: -(-channels // block) * block * penalty[block])


@functools.lru_cache(maxsize=1024)
def pixel_plan(
    groups: int, group_pixels: int, channels: int, itemsize: int, multiprocessors: int,
    reduced: bool = False,
) -> PixelPlan:  # fmt: skip
    """The launch of a kernel over pixels: 16 elements a thread at a time.

    Args:
        groups: of pixels, one an image or one in all.
        group_pixels: pixels of a group.
        channels: of a pixel.
        itemsize: bytes of an element.
        multiprocessors: of the device.
        reduced: a group has sums, which another kernel adds where the group is split.
    """
    block_c = channel_block(channels)
    block_p = 16 * 32 * NUM_WARPS // block_c
    blocks = -(-channels // block_c)
    programs = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    ranges, program_groups = splits(groups, blocks, programs, False)
    tiles = -(-group_pixels // block_p)
    # A program of many groups has enough of them whole.
    parts, each = (1, tiles)
    if program_groups == 1 or groups == 1:
        parts, each = splits(tiles, blocks * groups, programs, reduced)
    vector = vector_width(channels, itemsize)
    return PixelPlan(
        ranges * parts,
        parts,
        (ranges * parts * blocks,),
        (groups, program_groups, group_pixels, each * block_p, parts, channels // vector, blocks),
        {
            "VECTOR": vector, "INDEX": index_type(block_p * channels), "BLOCK_P": block_p,
            "BLOCK_C": block_c, "num_warps": NUM_WARPS, "num_stages": 1,
        },
    )  # fmt: skip


def image_plan(input: Tensor, by_image: bool, reduced: bool = False) -> PixelPlan:
    """``pixel_plan`` for the pixels of ``input``, a group an image or all one group."""
    N, C, H, W = input.shape
    groups = N if by_image else 1
    return pixel_plan(
        groups, N * H * W // groups, C, input.element_size(), multiprocessors(input), reduced
    )


def channel_statistics_out(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of each channel: schema in csrc/ops.cpp."""
    C = input.shape[1]
    plan = image_plan(input, False)
    with device_guard(input):
        partials = torch.empty(plan.rows * (2 * C + 1), dtype=torch.float64, device=input.device)
        channel_statistics_kernel[plan.grid](input, partials, *plan.extents, **plan.options)
        merge_statistics(partials, plan.rows, mean, var)


def batch_norm_act(
    input: Tensor, other: Tensor | None, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    gate: Tensor | None, residual: Tensor | None,
    output: Tensor | None, gated_other: Tensor | None, sums: Tensor | None,
) -> None:  # fmt: skip
    """Launches ``batch_norm_act_kernel``, whose docstring says what it fills; sums: (N, C)."""
    by_image = gate is not None or sums is not None
    plan = image_plan(input, by_image, reduced=sums is not None)
    with device_guard(input):
        partials = sums
        if sums is not None and plan.splits > 1:
            partials = torch.empty(
                plan.splits * sums.numel(), dtype=torch.float32, device=input.device
            )
        batch_norm_act_kernel[plan.grid](
            input, other, mean, var, bn_weight, bn_bias, eps, gate, residual,
            output, gated_other, partials, *plan.extents,
            ACTIVATION=activation_name(activation, input.dtype), **plan.options,
        )  # fmt: skip
        if sums is not None and partials is not None and plan.splits > 1:
            sum_partials(partials, plan.splits, sums)


def batch_norm_act_out(
    input: Tensor, mean: Tensor, var: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    eps: float, activation: int, gate: Tensor | None, residual: Tensor | None,
    output: Tensor | None, pooled: Tensor | None,
) -> None:  # fmt: skip
    """output = v * gate + residual, v = act(bn(input)), and pooled, the sums of v over H and W:
    schema in csrc/ops.cpp.
    """
    batch_norm_act(
        input, None, mean, var, bn_weight, bn_bias, eps, activation, gate, residual,
        output, None, pooled,
    )  # fmt: skip


def batch_norm_act_gate_out(
    grad_output: Tensor, input: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int, gate: Tensor,
    grad_gate: Tensor, gated: Tensor, grad_gated: Tensor,
) -> None:  # fmt: skip
    """The gradient of a gate, and what it gates once more: schema in csrc/ops.cpp."""
    batch_norm_act(
        input, grad_output, mean, var, bn_weight, bn_bias, eps, activation, gate, None,
        gated, grad_gated, grad_gate,
    )  # fmt: skip


def batch_norm_act_sums_out(
    grad_output: Tensor, input: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    gate: Tensor | None, grad_pooled: Tensor | None, grad_bn_weight: Tensor, grad_bn_bias: Tensor,
) -> None:  # fmt: skip
    """grad_bn_weight = sum(du * xhat), grad_bn_bias = sum(du): schema in csrc/ops.cpp."""
    plan = image_plan(input, gate is not None or grad_pooled is not None)
    with device_guard(input):
        partials = torch.empty(
            2 * plan.rows * grad_bn_weight.numel(), dtype=torch.float32, device=input.device
        )
        batch_norm_act_grad_sums_kernel[plan.grid](
            grad_output, input, mean, var, bn_weight, bn_bias, eps, gate, grad_pooled, partials,
            *plan.extents, ACTIVATION=activation_name(activation, input.dtype), **plan.options,
        )  # fmt: skip
        sum_partials(partials, plan.rows, grad_bn_weight, grad_bn_bias)


def batch_norm_act_backward_out(
    grad_output: Tensor, input: Tensor, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    gate: Tensor | None, grad_pooled: Tensor | None,
    grad_bn_weight: Tensor | None, grad_bn_bias: Tensor | None, linear: bool, grad_input: Tensor,
) -> None:  # fmt: skip
    """grad_input, which may be grad_output: schema in csrc/ops.cpp."""
    N, _, H, W = input.shape
    plan = image_plan(input, gate is not None or grad_pooled is not None)
    with device_guard(input):
        batch_norm_act_grad_input_kernel[plan.grid](
            grad_output, input, mean, var, bn_weight, bn_bias, eps, gate, grad_pooled,
            grad_bn_weight, grad_bn_bias, 1.0 / (N * H * W), grad_input, *plan.extents,
            ACTIVATION=activation_name(activation, input.dtype), LINEAR=linear, **plan.options,
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
