"""Pointwise (1x1) convolution + BatchNorm + activation + residual: one matrix product.

A channels-last image is a matrix of H*W pixels by C channels, so the convolution is that matrix
times the transposed weight. The tile is BLOCK_P pixels by BLOCK_K features; EfficientNet's products
are bound by memory, and the launch is made for that:

- Program ids run over the feature blocks first: programs that run together read the same pixels,
  one of them from DRAM and the others from L2. The weight never leaves L2.
- Where C fits one slice of BLOCK_C channels, a program keeps its part of the weight and walks over
  many tiles of pixels, each loaded while the one before it is multiplied. Else a program has one
  tile, and its loop runs over the slices.
- The epilogue works on the accumulators and rounds once.

Traffic of a tile, in elements: BLOCK_P * C of the input (from DRAM once in ceil(K / BLOCK_K)
times), BLOCK_P * BLOCK_K of the output, and of the residual where there is one. Wider tiles would
read less from L2 but hold more registers than two programs of eight warps have.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.triton import tiles
from effnet_kernels.triton.activations import activate, activation_name
from effnet_kernels.triton.batch_norm_act import load_batch_norm, load_channels, sum_partials
from effnet_kernels.triton.launch import (
    PROGRAMS_PER_MULTIPROCESSOR,
    device_guard,
    index_type,
    multiprocessors,
    splits,
    vector_width,
)


@triton.jit
def load_prologue(
    p_scale, p_shift, p_gate, group, groups, C, o_image, o_c, m_c,
    IMAGES: tl.constexpr,
):  # fmt: skip
    """(scale, shift, gate) of the channels o_c, float32: (1, BLOCK_C) each, or (BLOCK_P, BLOCK_C)
    the gate of a tile of IMAGES images from ``group`` on. Without pointers, ones and zeros.
    """
    scale = load_channels(p_scale, o_c, m_c, 1.0)[None, :]
    shift = load_channels(p_shift, o_c, m_c, 0.0)[None, :]
    if p_gate is None:
        gate = tl.full([1, o_c.shape[0]], 1.0, tl.float32)
    else:
        p_gate += group.to(tl.int64) * C
        gate = tl.load(p_gate + o_c, mask=m_c, other=0.0)[None, :]
        # A row for each pixel would be twice the bytes of the pixels, through shared memory.
        for i in tl.static_range(1, IMAGES):
            m_i = m_c & (group + i < groups)
            gate_i = tl.load(p_gate + i * C + o_c, mask=m_i, other=0.0)[None, :]
            gate = tl.where((o_image == i)[:, None], gate_i, gate)
    return scale, shift, gate


@triton.jit
def load_pixels(
    p_input, o_tile, m_tile, scale, shift, gate,
    PROLOGUE: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """act(input * scale + shift) * gate, rounded to the input's dtype: the product's left factor.

    What it is beside the mask meets zeros of the weight, or pixels that are not stored.
    """
    x = tl.load(p_input + o_tile, mask=m_tile, other=0.0)
    if PROLOGUE or GATE:
        z = x.to(tl.float32)
        if PROLOGUE:
            z = activate(z * scale + shift, ACTIVATION)
        if GATE:
            z *= gate
        x = z.to(x.dtype)
    return x


@triton.jit
def load_weight(p_weight, C, o_c, o_k, m_c, m_k, INDEX: tl.constexpr):
    """The (BLOCK_C, BLOCK_K) tile of the transpose of a (K, C) weight, zeros beside the mask."""
    o_tile = o_k[None, :].to(INDEX) * C + o_c[:, None]
    return tl.load(p_weight + o_tile, mask=m_c[:, None] & m_k[None, :], other=0.0)


@triton.jit
def activate_product(
    sums, p_mean, p_var, p_weight, p_bias, eps, o_k, m_k, ACTIVATION: tl.constexpr
):  # fmt: skip
    """act(bn(sums)) of a product's (BLOCK_P, BLOCK_K) accumulators.

    The mean is folded into the bias: a product that is far from zero has rounding errors as large
    as this adds, and a vector less to hold is a register for every fourth column.
    """
    mean, scale, bias = load_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_k, m_k)
    return activate(sums * scale + (bias - mean * scale), ACTIVATION)


@triton.jit
def finish_tile(
    y, p_residual, p_output, o_tile, m_tile,
    POOL: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Adds the residual, stores the tile; the (IMAGES, BLOCK_K) sums of its images, if POOL."""
    if p_residual is not None:
        y += tl.load(p_residual + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_output + o_tile, y.to(p_output.dtype.element_ty), mask=m_tile)
    if POOL:
        y = tl.where(m_tile, y, 0.0)
        return tl.sum(tl.reshape(y, [IMAGES, y.shape[0] // IMAGES, y.shape[1]]), 1)
    else:
        return tl.zeros([IMAGES, y.shape[1]], tl.float32)


@triton.jit(
    do_not_specialize=[
        "groups", "group_pixels", "program_pixels", "splits", "channel_vectors", "feature_vectors",
        "feature_blocks",
    ]
)  # fmt: skip
def pointwise_conv_kernel(
    p_input,  # (pixels, C)
    p_weight,  # (K, C)
    p_mean,  # (K,)
    p_var,
    p_bn_weight,
    p_bn_bias,
    eps,
    p_prologue_scale,  # (C,) float32, or None
    p_prologue_shift,
    p_gate,  # (groups, C) float32, or None
    p_residual,  # (pixels, K), or None
    p_output,  # (pixels, K)
    p_pooled,  # (splits, groups, K) float32, or None
    groups,
    group_pixels,
    program_pixels,
    splits,
    channel_vectors,
    feature_vectors,
    feature_blocks,
    ACTIVATION: tl.constexpr,
    PROLOGUE_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNEL_VECTOR: tl.constexpr,
    FEATURE_VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    IMAGES: tl.constexpr,
    SLICED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """output[p, k] = act(bn(sum over c of z[p, c] * weight[k, c])) + residual[p, k],
    z[p, c] = prologue(input[p, c]) * gate[group of p, c]; pooled: sums of output by group.

    The pixels are groups of group_pixels (the images, where there is a gate or something to pool),
    each split into ranges of program_pixels. A tile is BLOCK_P pixels of a group, or IMAGES whole
    groups of at most BLOCK_P / IMAGES pixels, one after the other; by BLOCK_K features. The grid is
    (groups / IMAGES, splits, feature blocks), the last fastest. SLICED: C is more than BLOCK_C, and
    a range is one tile.
    """
    C = channel_vectors * CHANNEL_VECTOR
    K = feature_vectors * FEATURE_VECTOR
    PROLOGUE: tl.constexpr = p_prologue_scale is not None
    GATE: tl.constexpr = p_gate is not None
    POOL: tl.constexpr = p_pooled is not None
    pid = tl.program_id(0)
    o_k = (pid % feature_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    group = (pid // feature_blocks) // splits * IMAGES
    split = (pid // feature_blocks) % splits
    first = split.to(tl.int64) * program_pixels
    count = tl.minimum(group_pixels - first, program_pixels).to(tl.int32)
    origin = group.to(tl.int64) * group_pixels + first

    o_c = tl.arange(0, BLOCK_C)
    o_image = tl.arange(0, BLOCK_P) // (BLOCK_P // IMAGES)
    o_pixel = tl.arange(0, BLOCK_P) % (BLOCK_P // IMAGES)
    m_image = group + o_image < groups
    o_p = o_pixel[:, None].to(INDEX)
    if IMAGES > 1:
        o_p += o_image[:, None] * group_pixels

    if SLICED:
        m_p = (m_image & (o_pixel < count))[:, None]
        sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        for start in tl.range(0, C, BLOCK_C):
            m_c = start + o_c < C
            scale, shift, gate = load_prologue(
                p_prologue_scale, p_prologue_shift, p_gate, group, groups, C, o_image,
                start + o_c, m_c, IMAGES,
            )  # fmt: skip
            z = load_pixels(
                p_input, origin * C + (o_p * C + (start + o_c)[None, :]), m_p & m_c[None, :],
                scale, shift, gate, PROLOGUE, GATE, PROLOGUE_ACTIVATION,
            )  # fmt: skip
            weight = load_weight(p_weight, C, start + o_c, o_k, m_c, m_k, INDEX)
            sums = tl.dot(z, weight, sums, input_precision=PRECISION)
        y = activate_product(sums, p_mean, p_var, p_bn_weight, p_bn_bias, eps, o_k, m_k, ACTIVATION)
        pooled = finish_tile(
            y, p_residual, p_output, origin * K + (o_p * K + o_k[None, :]), m_p & m_k[None, :],
            POOL, IMAGES,
        )  # fmt: skip
    else:
        m_c = o_c < C
        scale, shift, gate = load_prologue(
            p_prologue_scale, p_prologue_shift, p_gate, group, groups, C, o_image, o_c, m_c, IMAGES
        )
        weight = load_weight(p_weight, C, o_c, o_k, m_c, m_k, INDEX)
        pooled = tl.zeros([IMAGES, BLOCK_K], tl.float32)
        for start in tl.range(0, count, BLOCK_P):
            m_p = (m_image & (start + o_pixel < count))[:, None]
            z = load_pixels(
                p_input, (origin + start) * C + (o_p * C + o_c[None, :]), m_p & m_c[None, :],
                scale, shift, gate, PROLOGUE, GATE, PROLOGUE_ACTIVATION,
            )  # fmt: skip
            sums = tl.dot(z, weight, input_precision=PRECISION)
            y = activate_product(
                sums, p_mean, p_var, p_bn_weight, p_bn_bias, eps, o_k, m_k, ACTIVATION
            )
            pooled += finish_tile(
                y, p_residual, p_output, (origin + start) * K + (o_p * K + o_k[None, :]),
                m_p & m_k[None, :], POOL, IMAGES,
            )  # fmt: skip

    if POOL:
        o_group = group + tl.arange(0, IMAGES)
        o_row = split.to(tl.int64) * groups + o_group
        m_tile = (o_group < groups)[:, None] & m_k[None, :]
        tl.store(p_pooled + o_row[:, None] * K + o_k[None, :], pooled, mask=m_tile)


# Pixels of a tile, and the fewest that an image takes of it.
BLOCK_P = 128
IMAGE_PIXELS = 32
# Bytes of a pixel's slice of channels. What a prologue or a gate changes passes through registers
# on its way to the tensor cores, and so do the parts that float32 is split into: those get half.
SLICE_BYTES = 128
# Slices, or tiles of pixels, that are on their way or in shared memory.
NUM_STAGES = 3


class PointwisePlan(NamedTuple):
    """The launch of ``pointwise_conv_kernel``, in its terms."""

    groups: int
    group_pixels: int
    program_pixels: int
    splits: int
    channel_vectors: int
    feature_vectors: int
    feature_blocks: int
    channel_vector: int
    feature_vector: int
    index: tl.dtype
    images: int
    sliced: bool
    block_p: int
    block_c: int
    block_k: int
    warps: int
    stages: int

    @property
    def grid(self) -> tuple[int]:
        """One-dimensional: programs."""
        return (-(-self.groups // self.images) * self.splits * self.feature_blocks,)


def feature_block(channels: int, features: int) -> int:
    """Features of a tile: few idle columns, few times that the pixels are read.

    An idle column of the epilogue costs about as much as two channels of a pixel read from L2.
    """
    return min((64, 32, 16), key=lambda block: -(-features // block) * (channels + 2 * block))


def channel_slice(channels: int, itemsize: int, transformed: bool) -> int:
    """Channels of a slice; ``transformed``: see SLICE_BYTES."""
    most = SLICE_BYTES // itemsize // (2 if transformed or itemsize == 4 else 1)
    block: int = max(min(triton.next_power_of_2(channels), most), 16)
    return block


def precision(allow_tf32: bool) -> str:
    """How ``tl.dot`` multiplies float32 factors.

    Three TF32 products of the high and low parts keep float32's digits, at tensor core speed.
    """
    return "tf32" if allow_tf32 else "tf32x3"


def usual_tile(problem: tiles.Problem, multiprocessors: int) -> tiles.Tile:
    """The tile of a problem that nothing is known of."""
    block_k = feature_block(problem.channels, problem.features)
    programs = -(-problem.pixels // BLOCK_P) * -(-problem.features // block_k)
    block_p = BLOCK_P // 2 if programs < 2 * multiprocessors else BLOCK_P
    return tiles.Tile(
        block_p,
        channel_slice(problem.channels, problem.itemsize, problem.transformed),
        block_k,
        8 if block_p * block_k > 64 * 64 else 4,
        NUM_STAGES,
    )


@functools.lru_cache(maxsize=1024)
def pointwise_plan(
    batch: int, pixels: int, channels: int, features: int, itemsize: int,
    by_image: bool, transformed: bool, pool: bool, multiprocessors: int, tile: tiles.Tile | None,
) -> PointwisePlan:  # fmt: skip
    """Tiles of the pixels of an image where ``by_image``, of the whole batch elsewhere; ``tile``:
    a measured one, or None.
    """
    groups, group_pixels = (batch, pixels) if by_image else (1, batch * pixels)
    problem = tiles.Problem(batch * pixels, channels, features, itemsize, transformed)
    block_p, block_c, block_k, warps, stages = tile or usual_tile(problem, multiprocessors)
    feature_blocks = -(-features // block_k)
    rows = min(max(triton.next_power_of_2(group_pixels), IMAGE_PIXELS), block_p)
    images = block_p // rows if by_image else 1
    pixel_tiles = -(-group_pixels // block_p)
    if channels > block_c:
        parts, each = pixel_tiles, 1
    else:
        parts, each = splits(
            pixel_tiles, -(-groups // images) * feature_blocks,
            multiprocessors * PROGRAMS_PER_MULTIPROCESSOR, pool,
        )  # fmt: skip
    channel_vector, feature_vector = (vector_width(n, itemsize) for n in (channels, features))
    return PointwisePlan(
        groups, group_pixels, each * block_p, parts,
        channels // channel_vector, features // feature_vector, feature_blocks,
        channel_vector, feature_vector,
        index_type(max(block_p * channels, block_p * features, channels * features)),
        images, channels > block_c, block_p, block_c, block_k, warps, stages,
    )  # fmt: skip


def pointwise_conv_bn_act_out(
    input: Tensor, weight: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    gate: Tensor | None, residual: Tensor | None, allow_tf32: bool,
    output: Tensor, pooled: Tensor | None,
) -> None:  # fmt: skip
    """output = act(bn(conv(prologue(input) * gate))) + residual, and pooled, its sums: schema in
    csrc/ops.cpp.
    """
    N, C, H, W = input.shape
    K = weight.shape[0]
    transformed = gate is not None or prologue_scale is not None
    problem = tiles.Problem(N * H * W, C, K, input.element_size(), transformed)
    plan = pointwise_plan(
        N, H * W, C, K, input.element_size(), gate is not None or pooled is not None,
        transformed, pooled is not None, multiprocessors(input),
        tiles.measured(tiles.architecture(input), problem),
    )  # fmt: skip
    with device_guard(input):
        sums = pooled
        if pooled is not None and plan.splits > 1:
            sums = torch.empty(plan.splits * N * K, dtype=torch.float32, device=input.device)
        pointwise_conv_kernel[plan.grid](
            input, weight, mean, var, bn_weight, bn_bias, eps, prologue_scale, prologue_shift,
            gate, residual, output, sums,
            plan.groups, plan.group_pixels, plan.program_pixels, plan.splits,
            plan.channel_vectors, plan.feature_vectors, plan.feature_blocks,
            ACTIVATION=activation_name(activation, input.dtype),
            PROLOGUE_ACTIVATION=activation_name(prologue_activation, input.dtype),
            PRECISION=precision(allow_tf32), CHANNEL_VECTOR=plan.channel_vector,
            FEATURE_VECTOR=plan.feature_vector, INDEX=plan.index, IMAGES=plan.images,
            SLICED=plan.sliced, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c, BLOCK_K=plan.block_k,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        if pooled is not None and sums is not None and sums is not pooled:
            sum_partials(sums, plan.splits, pooled)
