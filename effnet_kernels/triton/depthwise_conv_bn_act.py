"""Depthwise convolution + BatchNorm + activation: forward, training forward and backward.

A depthwise convolution has no reduction over channels, so nothing for the tensor cores: each kernel
here multiplies vectors of channels in float32, and its speed is that of the loads. Tensors are
channels-last; a thread holds 16 bytes of channels of one pixel, neighbouring threads the next
channels, then the next column.

``depthwise_conv_kernel`` (inference, training forward)
    A tile is ROWS x BLOCK_W output pixels of BLOCK_C channels. A thread keeps the accumulators of
    all ROWS rows of its column in registers. For each of the k columns of the filter it loads the k
    weights of that column and the (ROWS - 1) * stride + k input rows once each, and every loaded
    row serves all the output rows that it reaches. The loop over filter columns is a loop at run
    time, although k is a constant: unrolled, the compiler would load all columns ahead and spill.
``depthwise_conv_grad_weight_kernel``
    A thread walks down a strip of one column with the k*k sums of its channels in registers and
    the last k rows of grad_conv in a ring, so each row of grad_conv and of the input is loaded once
    (per filter column). grad_conv, the gradient of the convolution's output, is computed here on
    the way and written for the next kernel.
``depthwise_conv_grad_input_kernel``
    The forward kernel turned around, in gather form. With stride 2 the input's rows and columns
    split by parity, and each parity meets a fixed subset of the taps: rows of both parities are
    accumulated side by side, columns one parity after the other, and no lane ever idles on a tap
    that does not reach it.

Backward traffic, in tensors of the output's size (y) and the input's (x): sums over du read 2y; the
weight kernel reads 2y + x and writes y; the input kernel reads y and writes x: 6y + 2x. A pass of
its own for grad_conv would make it 7y + 2x; the weight kernel can do it for nothing because its
strips do not overlap. Recomputing grad_conv in the input kernel, 5y + 2x, would take the
activation's derivative once per filter column and halo, about k * (ROWS + k - 1) / ROWS times an
element, which costs more than the bytes.

The filter is first copied to (k*k, C) float32, a launch of a microsecond or two: in its own
(C, 1, k, k) layout the weights of neighbouring channels are k*k apart, and every load would touch
as many cache lines as it has threads. For small images, where a launch costs more, it is read as it
is (``PACKED``: see ``filter_taps``).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.triton.activations import activate, activate_grad, activation_name
from effnet_kernels.triton.batch_norm_act import (
    batch_norm_act_backward_out,
    batch_norm_act_grad,
    batch_norm_act_out,
    batch_norm_act_sums_out,
    load_batch_norm,
    load_channels,
    load_statistics_grad,
    merge_statistics,
    moments,
    store_moments,
    sum_partials,
)
from effnet_kernels.triton.launch import (
    PROGRAMS_PER_MULTIPROCESSOR,
    device_guard,
    index_type,
    multiprocessors,
    splits,
    vector_width,
)


@triton.jit
def add_product(sums, AT: tl.constexpr, x, factors, FACTOR: tl.constexpr):
    """The tuple ``sums`` with x * factors[FACTOR] added to sums[AT]."""
    new = sums[AT] + x * factors[FACTOR]
    return sums[:AT] + (new,) + sums[AT + 1 :]  # noqa: RUF005 (no unpacking in Triton)


@triton.jit
def load_input(
    p_input, o_tile, m_tile, scale, shift, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr
):
    """An input tile in float32, through the prologue; zeros, untouched by it, in the padding."""
    x = tl.load(p_input + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if PROLOGUE:
        x = tl.where(m_tile, activate(x * scale + shift, ACTIVATION), 0.0)
    return x


@triton.jit
def load_filter_column(
    p_taps, column, o_c, m_c, C,
    KERNEL: tl.constexpr, PACKED: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Column ``column`` of the filters of BLOCK_C channels: KERNEL blocks (BLOCK_W, BLOCK_C).

    Each row of a block is the same. Loaded as a vector, a tap would come in another layout than the
    tile's and change over through shared memory; so, every thread loads what it needs, from L1.
    """
    o_channel = tl.broadcast_to(o_c[None, :], (BLOCK_W, BLOCK_C))
    if PACKED:
        o_tap = column * C + o_channel
        pitch = KERNEL * C
    else:
        o_tap = column + o_channel * (KERNEL * KERNEL)
        pitch = KERNEL
    taps = ()
    for i in tl.static_range(KERNEL):
        tap = tl.load(p_taps + i * pitch + o_tap, mask=m_c[None, :], other=0.0)
        taps = taps + (tap.to(tl.float32),)  # noqa: RUF005 (no unpacking in Triton)
    return taps


@triton.jit
def convolve_rows(
    p_image, p_taps, prologue_scale, prologue_shift, row0, o_column0, rows, columns,
    pitch, pixel_pitch, o_pixel, C, o_c, m_c,
    PROLOGUE: tl.constexpr, PROLOGUE_ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution of ROWS rows of BLOCK_W output pixels: ROWS float32 blocks.

    Element (h, w) of channel o_c[i] is at p_image + h * pitch + w * pixel_pitch + o_pixel[i]; where
    h is not in 0 .. rows - 1 or w not in 0 .. columns - 1, it is a zero of the padding. The first
    tap of the first output row meets input row row0, and input columns o_column0.
    """
    accumulators = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * ROWS
    for j in tl.range(KERNEL):
        taps = load_filter_column(p_taps, j, o_c, m_c, C, KERNEL, PACKED, BLOCK_W, BLOCK_C)
        o_iw = o_column0 + j
        m_column = ((o_iw >= 0) & (o_iw < columns))[:, None] & m_c[None, :]
        o_column = o_iw[:, None].to(INDEX) * pixel_pitch + o_pixel[None, :]
        for row in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
            ih = row0 + row
            x = load_input(
                p_image, ih * pitch + o_column, m_column & ((ih >= 0) & (ih < rows)),
                prologue_scale, prologue_shift, PROLOGUE, PROLOGUE_ACTIVATION,
            )  # fmt: skip
            for r in tl.static_range(ROWS):
                if row - r * STRIDE >= 0 and row - r * STRIDE < KERNEL:
                    accumulators = add_product(accumulators, r, x, taps, row - r * STRIDE)
    return accumulators


@triton.jit(
    do_not_specialize=[
        "H", "W", "OH", "OW", "channel_vectors", "pad_top", "pad_left", "row_tiles", "image_tiles",
        "group_tiles", "program_tiles", "splits", "channel_blocks",
    ]
)  # fmt: skip
def depthwise_conv_kernel(
    p_input,  # (N, H, W, C)
    p_taps,  # (k*k, C) float32 if PACKED, else the weight, (C, 1, k, k)
    p_prologue_scale,  # (C,) float32, or None
    p_prologue_shift,
    p_mean,  # (C,), or None: no BN and no output
    p_var,
    p_bn_weight,
    p_bn_bias,
    eps,
    p_conv,  # (N, OH, OW, C), or None
    p_statistics,  # means, M2 (rows, C) each, counts (rows,): float64; or None
    p_output,  # (N, OH, OW, C), or None
    p_pooled,  # (splits, N, C) float32, or None
    H,
    W,
    OH,
    OW,
    channel_vectors,
    pad_top,
    pad_left,
    row_tiles,
    image_tiles,
    group_tiles,
    program_tiles,
    splits,
    channel_blocks,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROLOGUE_ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """conv = depthwise(prologue(input)); then any of: store it, its statistics, act(bn(conv)).

    What is wanted is what has a pointer:

    - p_output: act((conv - mean) / sqrt(var + eps) * bn_weight + bn_bias), and its sums p_pooled.
      Computed from the float32 conv, or from the stored one where p_conv is given.
    - p_conv: conv, rounded to its dtype.
    - p_statistics: one row a program of the mean of the stored conv and the sum of squares about
      it (M2). A tile's accumulators are still in registers when their mean is known, so its sums
      are taken about a center close to it, where float32 is enough; Chan's formula merges the
      tiles in float64.

    Tiles are numbered through the batch, down the columns of tiles of an image, then across them.
    Groups of group_tiles (an image each where there is pooling, else everything) are split into
    ranges of program_tiles. The grid is (groups, splits, channel blocks), the last fastest; a
    program's rows of the next tile begin in what its last tile left in L1.
    """
    C = channel_vectors * VECTOR
    PROLOGUE: tl.constexpr = p_prologue_scale is not None
    pid = tl.program_id(0)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    group = (pid // channel_blocks) // splits
    split = (pid // channel_blocks) % splits
    first = group * group_tiles + split * program_tiles
    last = tl.minimum(first + program_tiles, (group + 1) * group_tiles)
    pitch = W.to(INDEX) * C
    output_pitch = OW.to(INDEX) * C

    prologue_scale = load_channels(p_prologue_scale, o_c, m_c, 1.0)[None, :]
    prologue_shift = load_channels(p_prologue_shift, o_c, m_c, 0.0)[None, :]
    if p_pooled is not None:
        groups = tl.num_programs(0) // channel_blocks // splits
        p_pooled += (split.to(tl.int64) * groups + group) * C
    pooled = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    count = tl.full([], 0.0, tl.float64)
    union_mean = tl.zeros([BLOCK_C], tl.float64)
    union_m2 = tl.zeros([BLOCK_C], tl.float64)

    for tile in tl.range(first, last):
        image = (tile // image_tiles).to(tl.int64)
        row0 = (tile % image_tiles % row_tiles) * ROWS
        col0 = (tile % image_tiles // row_tiles) * BLOCK_W
        o_w = col0 + tl.arange(0, BLOCK_W)
        p_image = p_input + image * H * pitch
        input_row0 = row0 * STRIDE - pad_top

        accumulators = convolve_rows(
            p_image, p_taps, prologue_scale, prologue_shift, input_row0, o_w * STRIDE - pad_left,
            H, W, pitch, C, o_c, C, o_c, m_c, PROLOGUE, PROLOGUE_ACTIVATION,
            KERNEL, STRIDE, PACKED, INDEX, ROWS, BLOCK_W, BLOCK_C,
        )  # fmt: skip
        if p_conv is not None:
            # What follows is of the conv that is stored: statistics of another one would not
            # normalise it.
            stored = ()
            for r in tl.static_range(ROWS):
                conv = accumulators[r].to(p_conv.dtype.element_ty).to(tl.float32)
                stored = stored + (conv,)  # noqa: RUF005 (no unpacking in Triton)
            accumulators = stored
        m_output = (o_w < OW)[:, None] & m_c[None, :]
        o_output = o_w[:, None].to(INDEX) * C + o_c[None, :]
        if p_statistics is not None:
            tile_count = tl.minimum(ROWS, OH - row0) * tl.minimum(BLOCK_W, OW - col0)
            tile_count = tile_count.to(tl.float32)
            total = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            for r in tl.static_range(ROWS):
                total += tl.where(m_output & (row0 + r < OH), accumulators[r], 0.0)
            center = tl.sum(total, 0) / tile_count
            residual = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            squares = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            for r in tl.static_range(ROWS):
                distance = accumulators[r] - center[None, :]
                distance = tl.where(m_output & (row0 + r < OH), distance, 0.0)
                residual += distance
                squares += distance * distance
            tile_mean, tile_m2 = moments(center, residual, squares, tile_count)
            delta = tile_mean - union_mean
            union = count + tile_count
            union_mean += delta * (tile_count / union)
            union_m2 += tile_m2 + delta * delta * (count * (tile_count / union))
            count = union
        if p_output is not None:
            # Loaded here, from L1, so that they take no registers while the taps are added.
            mean, scale, bias = load_batch_norm(
                p_mean, p_var, p_bn_weight, p_bn_bias, eps, o_c, m_c
            )
        for r in tl.static_range(ROWS):
            m_row = m_output & (row0 + r < OH)
            o_row = image * OH * output_pitch + ((row0 + r) * output_pitch + o_output)
            y = accumulators[r]
            if p_conv is not None:
                tl.store(p_conv + o_row, y.to(p_conv.dtype.element_ty), mask=m_row)
            if p_output is not None:
                y = activate((y - mean) * scale + bias, ACTIVATION)
                if p_pooled is not None:
                    pooled += tl.where(m_row, y, 0.0)
                tl.store(p_output + o_row, y.to(p_output.dtype.element_ty), mask=m_row)

    if p_pooled is not None:
        tl.store(p_pooled + o_c, tl.sum(pooled, 0), mask=m_c)
    if p_statistics is not None:
        store_moments(p_statistics, union_mean, union_m2, count, C, channel_blocks, o_c, m_c)


@triton.jit(
    do_not_specialize=[
        "H", "W", "OH", "OW", "channel_vectors", "pad_top", "pad_left", "strips", "strip_rows",
        "image_units", "units", "program_units", "channel_blocks",
    ]
)  # fmt: skip
def depthwise_conv_grad_weight_kernel(
    p_grad_output,  # (N, OH, OW, C)
    p_grad_pooled,  # (N, C) float32, or None
    p_conv,  # (N, OH, OW, C)
    p_mean,  # (C,)
    p_var,
    p_bn_weight,
    p_bn_bias,
    eps,
    p_grad_bn_weight,  # (C,) float32, or None with frozen statistics
    p_grad_bn_bias,
    inverse_count,
    p_input,  # (N, H, W, C)
    p_prologue_scale,  # (C,) float32, or None
    p_prologue_shift,
    p_grad_conv,  # (N, OH, OW, C), or None
    p_partials,  # (splits, C, k*k) float32
    H,
    W,
    OH,
    OW,
    channel_vectors,
    pad_top,
    pad_left,
    strips,
    strip_rows,
    image_units,
    units,
    program_units,
    channel_blocks,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PROLOGUE_ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_weight[i, j] = sum over output pixels of grad_conv[oh, ow] * p[oh*s + i, ow*s + j].

    p is the padded, prologued input; grad_conv = bn_weight * invstd * (du - (grad_bn_bias + xhat *
    grad_bn_weight) / (N*OH*OW)) as in ``batch_norm_act_grad_input_kernel``, written on the way.

    A unit is a strip of strip_rows output rows of BLOCK_W columns of an image; a program takes
    program_units of them, and its sums are one row of partials. At step t the ring holds grad_conv
    of rows t, t-1, ..., and the input rows t*s + (0 .. s-1) - pad_top are loaded: row t*s + parity
    meets output row t - m through tap i = m*s + parity. The last steps of a strip only empty the
    ring. The grid is (splits, channel blocks), the last fastest.
    """
    C = channel_vectors * VECTOR
    PROLOGUE: tl.constexpr = p_prologue_scale is not None
    DEPTH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    pid = tl.program_id(0)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    split = pid // channel_blocks
    pitch = W.to(INDEX) * C
    output_pitch = OW.to(INDEX) * C

    prologue_scale = load_channels(p_prologue_scale, o_c, m_c, 1.0)[None, :]
    prologue_shift = load_channels(p_prologue_shift, o_c, m_c, 0.0)[None, :]
    mean, scale, bias = load_batch_norm(p_mean, p_var, p_bn_weight, p_bn_bias, eps, o_c, m_c)
    constant, slope = load_statistics_grad(
        p_var, p_bn_weight, eps, p_grad_bn_weight, p_grad_bn_bias, inverse_count, o_c, m_c
    )
    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    sums = (zero,) * (KERNEL * KERNEL)

    first = split * program_units
    for unit in tl.range(first, tl.minimum(first + program_units, units)):
        image = (unit // image_units).to(tl.int64)
        row0 = (unit % image_units % strips) * strip_rows
        row1 = tl.minimum(row0 + strip_rows, OH)
        o_w = (unit % image_units // strips) * BLOCK_W + tl.arange(0, BLOCK_W)
        m_output = (o_w < OW)[:, None] & m_c[None, :]
        o_output = o_w[:, None].to(INDEX) * C + o_c[None, :]
        p_image = p_input + image * H * pitch
        grad_pooled = zero
        if p_grad_pooled is not None:
            grad_pooled += load_channels(p_grad_pooled + image * C, o_c, m_c, 0.0)[None, :]

        ring = (zero,) * DEPTH
        for t in tl.range(row0, row1 + (DEPTH - 1)):
            m_row = m_output & (t < row1)
            o_row = image * OH * output_pitch + (t * output_pitch + o_output)
            grad = tl.load(p_grad_output + o_row, mask=m_row, other=0.0).to(tl.float32)
            conv = tl.load(p_conv + o_row, mask=m_row, other=0.0).to(tl.float32)
            grad_conv = batch_norm_act_grad(
                grad + grad_pooled, conv, mean, scale, bias, constant, slope, ACTIVATION,
                LINEAR=False, FROZEN=p_grad_bn_weight is None,
            )  # fmt: skip
            grad_conv = tl.where(m_row, grad_conv, 0.0)
            if p_grad_conv is not None:
                tl.store(
                    p_grad_conv + o_row, grad_conv.to(p_grad_conv.dtype.element_ty), mask=m_row
                )
            ring = (grad_conv,) + ring[: DEPTH - 1]  # noqa: RUF005 (no unpacking in Triton)

            for parity in tl.static_range(STRIDE):
                ih = t * STRIDE + parity - pad_top
                for j in tl.static_range(KERNEL):
                    o_iw = o_w * STRIDE + (j - pad_left)
                    m_column = ((o_iw >= 0) & (o_iw < W))[:, None] & m_c[None, :]
                    x = load_input(
                        p_image, ih * pitch + (o_iw[:, None].to(INDEX) * C + o_c[None, :]),
                        m_column & ((ih >= 0) & (ih < H)),
                        prologue_scale, prologue_shift, PROLOGUE, PROLOGUE_ACTIVATION,
                    )  # fmt: skip
                    for m in tl.static_range(DEPTH):
                        if m * STRIDE + parity < KERNEL:
                            sums = add_product(sums, (m * STRIDE + parity) * KERNEL + j, x, ring, m)

    p_row = p_partials + (split.to(tl.int64) * C + o_c) * (KERNEL * KERNEL)
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(p_row + tap, tl.sum(sums[tap], 0), mask=m_c)


@triton.jit(
    do_not_specialize=[
        "H", "W", "OH", "OW", "channel_vectors", "pad_top", "pad_left", "row_tiles", "image_tiles",
        "tiles", "program_tiles", "channel_blocks",
    ]
)  # fmt: skip
def depthwise_conv_grad_input_kernel(
    p_grad_conv,  # (N, OH, OW, C)
    p_taps,  # (k*k, C) float32
    p_input,  # (N, H, W, C), read with a prologue only
    p_prologue_scale,  # (C,) float32, or None
    p_prologue_shift,
    p_grad_input,  # (N, H, W, C)
    p_partials,  # (2, splits, C) float32, with a prologue
    H,
    W,
    OH,
    OW,
    channel_vectors,
    pad_top,
    pad_left,
    row_tiles,
    image_tiles,
    tiles,
    program_tiles,
    channel_blocks,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PROLOGUE_ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_p[ih, iw] = sum over (i, j) of grad_conv[(ih + pad - i)/s, (iw + pad - j)/s] * w[i, j].

    Without a prologue grad_input = grad_p. With one, v = input * scale + shift, dv = grad_p *
    act'(v), grad_input = dv * scale, and a program's sums of dv * input and dv are a row of
    partials.

    ih + pad_top = a*s + parity: it is reached through the taps i = m*s + parity only, from output
    row a - m. So a tile is ROWS values of a, all parities of rows at once, by BLOCK_W values of b,
    which is to columns what a is to rows; the column parities are a loop. Tiles are numbered and
    split as in ``depthwise_conv_kernel``; the grid is (splits, channel blocks), the last fastest.
    """
    C = channel_vectors * VECTOR
    PROLOGUE: tl.constexpr = p_prologue_scale is not None
    DEPTH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    pid = tl.program_id(0)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    split = pid // channel_blocks
    pitch = W.to(INDEX) * C
    output_pitch = OW.to(INDEX) * C

    prologue_scale = load_channels(p_prologue_scale, o_c, m_c, 1.0)[None, :]
    prologue_shift = load_channels(p_prologue_shift, o_c, m_c, 0.0)[None, :]
    sum_dv_x = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    sum_dv = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)

    first = split * program_tiles
    for tile in tl.range(first, tl.minimum(first + program_tiles, tiles)):
        image = (tile // image_tiles).to(tl.int64)
        a0 = pad_top // STRIDE + (tile % image_tiles % row_tiles) * ROWS
        o_b = (
            pad_left // STRIDE + (tile % image_tiles // row_tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
        )
        p_image = p_grad_conv + image * OH * output_pitch
        for column_parity in tl.range(STRIDE):
            accumulators = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * (ROWS * STRIDE)
            for n in tl.range((KERNEL - column_parity + STRIDE - 1) // STRIDE):
                taps = load_filter_column(
                    p_taps, n * STRIDE + column_parity, o_c, m_c, C, KERNEL, True, BLOCK_W, BLOCK_C
                )
                o_ow = o_b - n
                m_column = ((o_ow >= 0) & (o_ow < OW))[:, None] & m_c[None, :]
                o_column = o_ow[:, None].to(INDEX) * C + o_c[None, :]
                for row in tl.static_range(ROWS + DEPTH - 1):
                    oh = a0 + (row - (DEPTH - 1))
                    grad_conv = tl.load(
                        p_image + (oh * output_pitch + o_column),
                        mask=m_column & ((oh >= 0) & (oh < OH)),
                        other=0.0,
                    ).to(tl.float32)
                    for r in tl.static_range(ROWS):
                        for i in tl.static_range(KERNEL):
                            if r + (DEPTH - 1) - row == i // STRIDE:
                                accumulators = add_product(
                                    accumulators, r * STRIDE + i % STRIDE, grad_conv, taps, i
                                )

            o_iw = o_b * STRIDE + (column_parity - pad_left)
            m_column = ((o_iw >= 0) & (o_iw < W))[:, None] & m_c[None, :]
            o_column = o_iw[:, None].to(INDEX) * C + o_c[None, :]
            for k in tl.static_range(ROWS * STRIDE):
                ih = a0 * STRIDE + k - pad_top
                m_tile = m_column & ((ih >= 0) & (ih < H))
                o_tile = image * H * pitch + (ih * pitch + o_column)
                grad = accumulators[k]
                if PROLOGUE:
                    x = tl.load(p_input + o_tile, mask=m_tile, other=0.0).to(tl.float32)
                    v = x * prologue_scale + prologue_shift
                    dv = tl.where(m_tile, activate_grad(grad, v, PROLOGUE_ACTIVATION), 0.0)
                    sum_dv_x += dv * x
                    sum_dv += dv
                    grad = dv * prologue_scale
                tl.store(p_grad_input + o_tile, grad.to(p_grad_input.dtype.element_ty), mask=m_tile)

    if PROLOGUE:
        p_row = p_partials + split.to(tl.int64) * C + o_c
        second = (tl.num_programs(0) // channel_blocks).to(tl.int64) * C
        tl.store(p_row, tl.sum(sum_dv_x.to(tl.float64), 0).to(tl.float32), mask=m_c)
        tl.store(p_row + second, tl.sum(sum_dv.to(tl.float64), 0).to(tl.float32), mask=m_c)


# Warps a program, and elements a thread holds of a row of a tile.
NUM_WARPS = 4
ELEMENTS = 8
# Registers a thread may have: three programs a multiprocessor. Left alone, the compiler takes up to
# 255 to load further ahead, and only two programs fit.
REGISTERS = 168
# Bytes of the images from which packing the filter is predicted to pay its launch.
PACK_FROM = 4 << 20
# Two programs are better than spills with the sums of 7 x 7 taps, which no EfficientNet has, and as
# good where images are so small that all programs run at a time.
REGISTERS_OF_FEW = 255
# Those of REGISTERS for accumulators, weights and rows in flight; the rest are addresses and masks.
TILE_REGISTERS = 140
# Programs a multiprocessor of the weight gradient. Each writes k*k partial sums a channel, so they
# are few, but all that fit at a time (three) are there twice.
GRAD_WEIGHT_PROGRAMS = 6


class Tile(NamedTuple):
    """Rows, columns and channels of a program's tile."""

    rows: int
    width: int
    channels: int


class TilePlan(NamedTuple):
    """The launch of a kernel over tiles of images.

    Attributes:
        tile: rows and columns are of the kernel's own tile grid.
        row_tiles: tiles of a column of them.
        image_tiles: tiles of an image.
        groups: of tiles; programs never cross them.
        group_tiles: tiles of a group.
        program_tiles: tiles of a program, the last one's of a group excepted.
        splits: programs of a group and channel block.
        channel_blocks: blocks of channels.
        vector: channels that one access moves.
    """

    tile: Tile
    row_tiles: int
    image_tiles: int
    groups: int
    group_tiles: int
    program_tiles: int
    splits: int
    channel_blocks: int
    vector: int

    @property
    def grid(self) -> tuple[int]:
        """One-dimensional: programs."""
        return (self.groups * self.splits * self.channel_blocks,)


def spatial_tile(
    width: int, channels: int, elements: int, kernel: int, stride: int
) -> tuple[int, int]:
    """(columns, channels) of a tile of ``elements``: few idle lanes, few columns loaded twice."""

    def cost(columns: int) -> float:
        block = elements // columns
        idle = -(-width // columns) * columns / width * -(-channels // block) * block / channels
        halo = ((columns - 1) * stride + kernel) / (columns * stride)
        # Under 64 bytes of a pixel a warp's load touches many cache lines.
        short = {8: 1.4, 16: 1.15}.get(block, 1.0)
        return idle * (1 + 0.2 * (halo - 1)) * short

    columns = min((c for c in (4, 8, 16, 32, 64) if 8 <= elements // c <= 128), key=cost)
    return columns, elements // columns


def tile_rows(
    height: int, taps: int, loads: int, halo: int, sums: int, itemsize: int, registers: int,
    most: int = TILE_REGISTERS,
) -> int:  # fmt: skip
    """Rows of a tile: few idle rows, few halo rows, and no more than fit in registers.

    Args:
        height: rows of the image.
        taps: rows of the filter column that is held.
        loads: rows loaded for a row of the tile.
        halo: rows loaded beside these.
        sums: rows of accumulators for a row of the tile.
        itemsize: bytes of an element as it is loaded.
        registers: what else the kernel holds for each of a thread's elements.
        most: registers that a thread has for all of this.
    """

    def fits(rows: int) -> bool:
        # The compiler loads some rows ahead of others, not all.
        ahead = (rows * loads + halo) * (1 + itemsize) / 6
        held = rows * sums + taps + ahead + registers
        return rows == 1 or ELEMENTS * held <= most

    def cost(rows: int) -> float:
        # To load a row takes about 1.75 times the instructions of adding its product with a tap.
        return -(-height // rows) * (1.75 * (rows * loads + halo) + rows * taps)

    return min(filter(fits, range(1, 9)), key=lambda rows: (cost(rows), rows))


@functools.lru_cache(maxsize=1024)
def conv_plan(
    batch: int, channels: int, height: int, width: int, kernel: int, stride: int,
    itemsize: int, prologue: bool, statistics: bool, by_image: bool, multiprocessors: int,
) -> TilePlan:  # fmt: skip
    """The launch of ``depthwise_conv_kernel``; ``height`` and ``width`` are the output's."""
    columns, block_c = spatial_tile(width, channels, 32 * NUM_WARPS * ELEMENTS, kernel, stride)
    one_by_one = vector_width(channels, itemsize) == 1
    rows = tile_rows(
        height, kernel, stride, kernel - stride, 1, itemsize,
        6 * prologue + 4 * statistics + 7 * one_by_one,
    )  # fmt: skip
    tile = Tile(rows, columns, block_c)
    return tile_plan(
        tile, batch, channels, height, width, itemsize, by_image,
        multiprocessors * PROGRAMS_PER_MULTIPROCESSOR,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def grad_input_plan(
    batch: int, channels: int, height: int, width: int, pad_top: int, pad_left: int,
    kernel: int, stride: int, itemsize: int, prologue: bool, multiprocessors: int,
) -> TilePlan:  # fmt: skip
    """The launch of ``depthwise_conv_grad_input_kernel``; the extent is the input's."""
    rows = (height - 1 + pad_top) // stride - pad_top // stride + 1
    columns = (width - 1 + pad_left) // stride - pad_left // stride + 1
    depth = -(-kernel // stride)
    block_w, block_c = spatial_tile(columns, channels, 32 * NUM_WARPS * ELEMENTS, depth, 1)
    height_of_tile = tile_rows(rows, kernel, 1, depth - 1, stride, itemsize, 4 * prologue)
    tile = Tile(height_of_tile, block_w, block_c)
    return tile_plan(
        tile, batch, channels, rows, columns, itemsize, False,
        multiprocessors * PROGRAMS_PER_MULTIPROCESSOR,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def grad_weight_plan(
    batch: int, channels: int, height: int, width: int, kernel: int, stride: int,
    itemsize: int, prologue: bool, multiprocessors: int,
) -> TilePlan:  # fmt: skip
    """The launch of ``depthwise_conv_grad_weight_kernel``; the extent is the output's.

    A tile is a strip: whole columns of the image, cut only where there are too few programs. A
    thread holds k*k sums of a few channels: 4 for k = 5 and 2 for k = 7 make 100 registers. Where
    more registers go to rows in flight, to 4-byte elements or to the prologue, it is 2 at once.
    """
    narrow = kernel + 2 * prologue > 5 or (kernel == 5 and (stride == 2 or itemsize == 4))
    elements = 32 * NUM_WARPS * (2 if narrow else 4)
    block_w, block_c = spatial_tile(width, channels, elements, kernel, stride)
    units = batch * -(-width // block_w) * -(-channels // block_c)
    strips = -(-multiprocessors * GRAD_WEIGHT_PROGRAMS // units)
    # A strip loads kernel - stride input rows more than its own; keep that a small part.
    rows = min(height, max(-(-height // strips), 2 * kernel))
    tile = Tile(rows, block_w, block_c)
    return tile_plan(
        tile, batch, channels, height, width, itemsize, False,
        multiprocessors * GRAD_WEIGHT_PROGRAMS,
    )  # fmt: skip


def tile_plan(
    tile: Tile, batch: int, channels: int, height: int, width: int, itemsize: int,
    by_image: bool, programs: int,
) -> TilePlan:  # fmt: skip
    """Spreads the tiles of a batch of ``height`` x ``width`` images over about ``programs``."""
    row_tiles = -(-height // tile.rows)
    image_tiles = row_tiles * -(-width // tile.width)
    groups = batch if by_image else 1
    group_tiles = image_tiles * batch // groups
    channel_blocks = -(-channels // tile.channels)
    parts, program_tiles = splits(group_tiles, groups * channel_blocks, programs, by_image)
    return TilePlan(
        tile, row_tiles, image_tiles, groups, group_tiles, program_tiles, parts, channel_blocks,
        vector_width(channels, itemsize),
    )  # fmt: skip


def filter_taps(weight: Tensor, *images: Tensor) -> tuple[Tensor, bool]:
    """The filters as a kernel over ``images`` loads them, and whether they are packed.

    Returns:
        (k*k, C) float32 and True, or for small images ``weight`` itself and False.
    """
    if sum(image.nbytes for image in images) < PACK_FROM:
        return weight, False
    return packed_taps(weight), True


def packed_taps(weight: Tensor) -> Tensor:
    """(C, 1, k, k) as (k*k, C) float32: see the module's docstring."""
    C, _, k, _ = weight.shape
    taps = torch.empty((k * k, C), dtype=torch.float32, device=weight.device)
    return taps.copy_(weight.view(C, k * k).t())


def depthwise_conv_bn_act_out(
    input: Tensor, weight: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, pad_top: int, pad_left: int, activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    output: Tensor, pooled: Tensor | None,
) -> None:  # fmt: skip
    """output = act(bn(conv(prologue(input)))) and pooled, its sums: schema in csrc/ops.cpp."""
    with device_guard(input):
        _convolve(
            input, weight, mean, var, bn_weight, bn_bias, eps, stride, pad_top, pad_left,
            activation, prologue_scale, prologue_shift, prologue_activation,
            None, None, output, pooled,
        )  # fmt: skip


def depthwise_conv_bn_act_train_out(
    input: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, pad_top: int, pad_left: int, activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    batch_stats: bool,
    conv: Tensor, mean: Tensor, var: Tensor, output: Tensor | None, pooled: Tensor | None,
) -> None:  # fmt: skip
    """The same, and the convolution for the backward pass: schema in csrc/ops.cpp.

    With frozen statistics it is one kernel. With those of the batch, mean and var are known only
    when all of conv is, so output is written by a second pass over conv. Without an output there is
    none.
    """
    with device_guard(input):
        if not batch_stats:
            _convolve(
                input, weight, mean, var, bn_weight, bn_bias, eps, stride, pad_top, pad_left,
                activation, prologue_scale, prologue_shift, prologue_activation,
                conv, None, output, pooled,
            )  # fmt: skip
            return
        _convolve(
            input, weight, None, None, None, None, eps, stride, pad_top, pad_left, activation,
            prologue_scale, prologue_shift, prologue_activation, conv, (mean, var), None, None,
        )  # fmt: skip
        if output is not None:
            batch_norm_act_out(
                conv, mean, var, bn_weight, bn_bias, eps, activation, None, None, output, pooled
            )


def _convolve(
    input: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, pad_top: int, pad_left: int, activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    conv: Tensor | None, statistics: tuple[Tensor, Tensor] | None,
    output: Tensor | None, pooled: Tensor | None,
) -> None:  # fmt: skip
    N, C, H, W = input.shape
    result = conv if output is None else output
    assert result is not None
    OH, OW = result.shape[2:]
    kernel = weight.shape[2]
    plan = conv_plan(
        N, C, OH, OW, kernel, stride, input.element_size(), prologue_scale is not None,
        statistics is not None, pooled is not None, multiprocessors(input),
    )  # fmt: skip
    sums = pooled
    if pooled is not None and plan.splits > 1:
        sums = torch.empty(plan.splits * N * C, dtype=torch.float32, device=input.device)
    rows = plan.groups * plan.splits
    partials = None
    if statistics is not None:
        partials = torch.empty(rows * (2 * C + 1), dtype=torch.float64, device=input.device)
    taps, packed = filter_taps(weight, input, result)
    depthwise_conv_kernel[plan.grid](
        input, taps, prologue_scale, prologue_shift,
        mean, var, bn_weight, bn_bias, eps, conv, partials, output, sums,
        H, W, OH, OW, C // plan.vector, pad_top, pad_left,
        plan.row_tiles, plan.image_tiles, plan.group_tiles, plan.program_tiles, plan.splits,
        plan.channel_blocks,
        KERNEL=kernel, STRIDE=stride, ACTIVATION=activation_name(activation, input.dtype),
        PROLOGUE_ACTIVATION=activation_name(prologue_activation, input.dtype), VECTOR=plan.vector,
        PACKED=packed, INDEX=index_type(max(H * W, OH * OW) * C), ROWS=plan.tile.rows,
        BLOCK_W=plan.tile.width, BLOCK_C=plan.tile.channels,
        num_warps=NUM_WARPS, num_stages=1, maxnreg=REGISTERS if packed else REGISTERS_OF_FEW,
    )  # fmt: skip
    if statistics is not None:
        assert partials is not None
        merge_statistics(partials, rows, *statistics)
    if pooled is not None and sums is not None and sums is not pooled:
        sum_partials(sums, plan.splits, pooled)


def depthwise_conv_bn_act_backward_out(
    grad_output: Tensor, grad_pooled: Tensor | None, conv: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    batch_stats: bool,
    input: Tensor, weight: Tensor, stride: int, pad_top: int, pad_left: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    grad_input: Tensor | None, grad_weight: Tensor | None,
    grad_bn_weight: Tensor, grad_bn_bias: Tensor,
    grad_prologue_scale: Tensor | None, grad_prologue_shift: Tensor | None,
) -> None:  # fmt: skip
    """All gradients that are not None: schema in csrc/ops.cpp, passes in the module's docstring."""
    with device_guard(input):
        bn = (mean, var, bn_weight, bn_bias, eps, activation)
        batch_norm_act_sums_out(
            grad_output, conv, *bn, None, grad_pooled, grad_bn_weight, grad_bn_bias
        )
        # How much of the gradient goes through the statistics; with frozen ones, none.
        through = (grad_bn_weight, grad_bn_bias) if batch_stats else (None, None)
        grad_conv = None if grad_input is None else torch.empty_like(conv)
        if grad_weight is not None:
            _grad_weight(
                grad_output, grad_pooled, conv, bn, through, input, stride, pad_top, pad_left,
                prologue_scale, prologue_shift, prologue_activation, grad_conv, grad_weight,
            )  # fmt: skip
        elif grad_conv is not None:
            batch_norm_act_backward_out(
                grad_output, conv, *bn, None, grad_pooled, through[0], through[1], False, grad_conv
            )
        if grad_input is not None:
            assert grad_conv is not None
            _grad_input(
                grad_conv, weight, input, stride, pad_top, pad_left,
                prologue_scale, prologue_shift, prologue_activation,
                grad_input, grad_prologue_scale, grad_prologue_shift,
            )  # fmt: skip


def _grad_weight(
    grad_output: Tensor, grad_pooled: Tensor | None, conv: Tensor,
    bn: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, int],
    through: tuple[Tensor, Tensor] | tuple[None, None],
    input: Tensor, stride: int, pad_top: int, pad_left: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    grad_conv: Tensor | None, grad_weight: Tensor,
) -> None:  # fmt: skip
    N, C, H, W = input.shape
    OH, OW = conv.shape[2:]
    kernel = grad_weight.shape[2]
    *vectors, eps, activation = bn
    plan = grad_weight_plan(
        N, C, OH, OW, kernel, stride, input.element_size(), prologue_scale is not None,
        multiprocessors(input),
    )  # fmt: skip
    partials = torch.empty(
        plan.splits * grad_weight.numel(), dtype=torch.float32, device=input.device
    )
    depthwise_conv_grad_weight_kernel[plan.grid](
        grad_output, grad_pooled, conv, *vectors, eps, *through, 1.0 / (N * OH * OW),
        input, prologue_scale, prologue_shift, grad_conv, partials,
        H, W, OH, OW, C // plan.vector, pad_top, pad_left,
        plan.row_tiles, plan.tile.rows, plan.image_tiles, plan.group_tiles, plan.program_tiles,
        plan.channel_blocks,
        KERNEL=kernel, STRIDE=stride, ACTIVATION=activation_name(activation, input.dtype),
        PROLOGUE_ACTIVATION=activation_name(prologue_activation, input.dtype), VECTOR=plan.vector,
        INDEX=index_type(max(H * W, OH * OW) * C), BLOCK_W=plan.tile.width,
        BLOCK_C=plan.tile.channels,
        num_warps=NUM_WARPS, num_stages=1, maxnreg=REGISTERS if kernel < 7 else REGISTERS_OF_FEW,
    )  # fmt: skip
    sum_partials(partials, plan.splits, grad_weight)


def _grad_input(
    grad_conv: Tensor, weight: Tensor, input: Tensor, stride: int, pad_top: int, pad_left: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    grad_input: Tensor, grad_scale: Tensor | None, grad_shift: Tensor | None,
) -> None:  # fmt: skip
    N, C, H, W = input.shape
    OH, OW = grad_conv.shape[2:]
    kernel = weight.shape[2]
    plan = grad_input_plan(
        N, C, H, W, pad_top, pad_left, kernel, stride, input.element_size(),
        prologue_scale is not None, multiprocessors(input),
    )  # fmt: skip
    partials = None
    if prologue_scale is not None:
        partials = torch.empty(2 * plan.splits * C, dtype=torch.float32, device=input.device)
    depthwise_conv_grad_input_kernel[plan.grid](
        grad_conv, packed_taps(weight), input, prologue_scale, prologue_shift, grad_input, partials,
        H, W, OH, OW, C // plan.vector, pad_top, pad_left,
        plan.row_tiles, plan.image_tiles, plan.group_tiles, plan.program_tiles,
        plan.channel_blocks,
        # Not bfloat16's sigmoid, which the compiler has no register for.
        KERNEL=kernel, STRIDE=stride, PROLOGUE_ACTIVATION=activation_name(prologue_activation),
        VECTOR=plan.vector, INDEX=index_type(max(H * W, OH * OW) * C), ROWS=plan.tile.rows,
        BLOCK_W=plan.tile.width, BLOCK_C=plan.tile.channels,
        num_warps=NUM_WARPS, num_stages=1, maxnreg=REGISTERS,
    )  # fmt: skip
    if partials is not None:
        assert grad_scale is not None
        sum_partials(partials, plan.splits, grad_scale, grad_shift)
