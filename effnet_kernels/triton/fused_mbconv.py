"""Fused-MBConv in one launch: a k x k convolution, and a 1x1 convolution of its result.

Both are matrix products for the tensor cores. A program has a tile of BLOCK_P output pixels. It
walks over the middle width in chunks of BLOCK_M channels; for each it sums the k x k convolution
over its k*k*C terms, brings the sums through BatchNorm and the activation in registers, and
multiplies them, as the left factor, with their part of the project weight:

    z = act(bn(sum of input[pixel moved by tap, channel] @ expand_weight))    (BLOCK_P, BLOCK_M)
    sums += z @ project_weight                                                (BLOCK_P, BLOCK_K)

- The terms are one row of the channels-last weight, taps and channels alike, so that slices of
  BLOCK_R of them waste nothing where C is no power of two.
- No im2col exists: a slice of the left factor is gathered from the image, with zeros beside it, by
  asynchronous copies while the slice before it is multiplied.
- Programs that run together have neighbouring pixels, and the same weights: DRAM sees both once.

Traffic of L2, in elements a tile: BLOCK_P * k*k*C for each chunk, and both weights whole. It is
what bounds the kernel beside the products: a tile should have many pixels, and a chunk, if the
registers hold it, the whole middle width. Without a project weight the chunks are programs of
their own, since nothing joins them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.triton import tiles
from effnet_kernels.triton.activations import activate, activation_name
from effnet_kernels.triton.batch_norm_act import load_channels, load_invstd, sum_partials
from effnet_kernels.triton.launch import (
    Hardware,
    device_guard,
    hardware,
    index_type,
    vector_width,
)
from effnet_kernels.triton.pointwise_conv_bn_act import finish_tile, load_weight, precision


@triton.jit
def fold_batch_norm(p_mean, p_var, p_weight, p_bias, eps, o_c, m_c):
    """(scale, shift), float32 vectors: bn(x) = x * scale + shift, as in ``activate_product``."""
    scale = load_channels(p_weight, o_c, m_c, 1.0) * load_invstd(p_var, eps, o_c, m_c)
    mean = load_channels(p_mean, o_c, m_c, 0.0)
    return scale, load_channels(p_bias, o_c, m_c, 0.0) - mean * scale


@triton.jit
def activate_piece(sums, scale, shift, o_column, ACTIVATION: tl.constexpr):
    """act(bn(sums)) of the columns o_column, which are places in the vectors scale and shift.

    A gather goes through shared memory. Without it, every thread would load and fold the vectors of
    BatchNorm for all of its columns: a tenth of the program's time.
    """
    scale, shift = tl.gather(scale, o_column, 0), tl.gather(shift, o_column, 0)
    return activate(sums * scale[None, :] + shift[None, :], ACTIVATION)


@triton.jit
def split_columns(block, PIECE: tl.constexpr):
    """The tuple of a block's columns, PIECE at a time."""
    if block.shape[1] <= PIECE:
        return (block,)
    else:
        halves = tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return split_columns(left, PIECE) + split_columns(right, PIECE)


@triton.jit
def convolve_tile(
    p_image, p_weight, H, W, terms, o_h, o_w, o_pixel, o_m, m_m,
    PRECISION: tl.constexpr, C: tl.constexpr, KERNEL: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The k x k convolution at a tile of pixels, of the middle channels o_m: (BLOCK_P, BLOCK_M).

    The first tap of pixel p meets row o_h[p] and column o_w[p], which is at p_image + o_pixel[p];
    beside the image there are zeros.
    """
    TERMS: tl.constexpr = KERNEL * KERNEL * C
    sums = tl.zeros([o_h.shape[0], o_m.shape[0]], tl.float32)
    # Its end is an argument: a loop over constants would be unrolled, however long.
    for start in tl.range(0, terms, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        o_row = o_r // C // KERNEL
        o_column = o_r // C % KERNEL
        m_r = o_r < TERMS
        # As unsigned numbers: what is negative is large.
        o_ih = (o_h[:, None] + o_row[None, :]).to(tl.uint32)
        o_iw = (o_w[:, None] + o_column[None, :]).to(tl.uint32)
        m_x = (o_ih < H.to(tl.uint32)) & (o_iw < W.to(tl.uint32)) & m_r[None, :]
        o_term = (o_row * W + o_column) * C + o_r % C
        x = tl.load(p_image + (o_pixel[:, None] + o_term[None, :]), mask=m_x, other=0.0)
        weight = load_weight(p_weight, TERMS, o_r, o_m, m_r, m_m, INDEX)
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    return sums


@triton.jit(
    do_not_specialize=[
        "H", "W", "OH", "OW", "pad_top", "pad_left", "groups", "group_pixels", "splits",
        "middle_vectors", "feature_vectors", "column_blocks", "terms",
    ]
)  # fmt: skip
def fused_mbconv_kernel(
    p_input,  # (N, H, W, C)
    p_expand_weight,  # (M, KERNEL, KERNEL, C)
    p_expand_mean,  # (M,)
    p_expand_var,
    p_expand_bn_weight,
    p_expand_bn_bias,
    expand_eps,
    p_project_weight,  # (K, M), or None
    p_project_mean,  # (K,), or None like those that follow
    p_project_var,
    p_project_bn_weight,
    p_project_bn_bias,
    project_eps,
    p_residual,  # (N, OH, OW, K), or None
    p_output,  # (N, OH, OW, K); K is M without a project weight
    p_pooled,  # (splits, groups, M) float32, or None
    H,
    W,
    OH,
    OW,
    pad_top,
    pad_left,
    groups,
    group_pixels,
    splits,
    middle_vectors,
    feature_vectors,
    column_blocks,
    terms,
    EXPAND_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    MIDDLE_VECTOR: tl.constexpr,
    FEATURE_VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
):
    """z[p, m] = act(bn(sum over taps and c of input[p moved, c] * expand_weight[m, tap, c])),
    output[p, k] = act(bn(sum over m of z[p, m] * project_weight[k, m])) + residual[p, k]; without a
    project weight z + residual, and pooled: sums of z by group.

    The output pixels of the batch are groups of group_pixels (the images, where there is something
    to pool), each cut into ``splits`` tiles of BLOCK_P. The grid is (groups, splits, column
    blocks), the last fastest: blocks of BLOCK_K features, or of BLOCK_M without a project weight.
    """
    M = middle_vectors * MIDDLE_VECTOR
    K = feature_vectors * FEATURE_VECTOR
    dtype = p_output.dtype.element_ty
    pid = tl.program_id(0)
    column_block = pid % column_blocks
    group = (pid // column_blocks) // splits
    split = (pid // column_blocks) % splits
    first = split * BLOCK_P
    origin = group.to(tl.int64) * group_pixels + first
    o_p = tl.arange(0, BLOCK_P)
    m_p = first + o_p < group_pixels

    image = origin // (OH * OW)
    o_q = (origin % (OH * OW)).to(tl.int32) + o_p
    o_oh = o_q % (OH * OW) // OW
    # Pixels beside the tile are beside the image too.
    o_h = tl.where(m_p, o_oh * STRIDE - pad_top, -KERNEL)
    o_w = o_q % OW * STRIDE - pad_left
    o_image = (o_q // (OH * OW)).to(INDEX)
    o_pixel = ((o_image * H + o_h) * W + o_w) * C
    p_image = p_input + image * H * W * C

    o_k = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    if p_project_weight is None:
        sums = convolve_tile(
            p_image, p_expand_weight, H, W, terms, o_h, o_w, o_pixel, o_k, o_k < K,
            PRECISION, C, KERNEL, INDEX, BLOCK_R,
        )  # fmt: skip
        scale, shift = fold_batch_norm(
            p_expand_mean, p_expand_var, p_expand_bn_weight, p_expand_bn_bias, expand_eps, o_k,
            o_k < K,
        )  # fmt: skip
    else:
        sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        for chunk in tl.range(0, M, BLOCK_M):
            o_m = chunk + tl.arange(0, BLOCK_M)
            scale, shift = fold_batch_norm(
                p_expand_mean, p_expand_var, p_expand_bn_weight, p_expand_bn_bias, expand_eps, o_m,
                o_m < M,
            )  # fmt: skip
            # To where the tensor cores read it, before the convolution.
            weights = ()
            for piece in tl.static_range(BLOCK_M // PIECE):
                o_piece = chunk + piece * PIECE + tl.arange(0, PIECE)
                weight = load_weight(p_project_weight, M, o_piece, o_k, o_piece < M, o_k < K, INDEX)
                weights = weights + (weight,)  # noqa: RUF005 (no unpacking in Triton)
            expanded = split_columns(
                convolve_tile(
                    p_image, p_expand_weight, H, W, terms, o_h, o_w, o_pixel, o_m, o_m < M,
                    PRECISION, C, KERNEL, INDEX, BLOCK_R,
                ),
                PIECE,
            )  # fmt: skip
            for piece in tl.static_range(BLOCK_M // PIECE):
                o_piece = piece * PIECE + tl.arange(0, PIECE)
                z = activate_piece(expanded[piece], scale, shift, o_piece, EXPAND_ACTIVATION)
                sums = tl.dot(z.to(dtype), weights[piece], sums, input_precision=PRECISION)
        scale, shift = fold_batch_norm(
            p_project_mean, p_project_var, p_project_bn_weight, p_project_bn_bias, project_eps, o_k,
            o_k < K,
        )  # fmt: skip

    pieces = split_columns(sums, PIECE)
    for piece in tl.static_range(len(pieces)):
        o_piece = piece * pieces[piece].shape[1] + tl.arange(0, pieces[piece].shape[1])
        o_column = column_block * BLOCK_K + o_piece
        y = activate_piece(pieces[piece], scale, shift, o_piece, ACTIVATION)
        if p_project_weight is None:
            y = y.to(dtype).to(tl.float32)
        if p_pooled is not None:
            pooled = tl.sum(tl.where(m_p[:, None], y, 0.0), 0)
            row = split.to(tl.int64) * groups + group
            tl.store(p_pooled + row * K + o_column, pooled, mask=o_column < K)
        finish_tile(
            y, p_residual, p_output,
            origin * K + (o_p[:, None].to(INDEX) * K + o_column[None, :]),
            m_p[:, None] & (o_column < K)[None, :], False, 1,
        )  # fmt: skip


# Bytes of a pixel's slice of terms: a row of shared memory as the tensor cores read it.
SLICE_BYTES = 128
# Of a multiprocessor and one of its clocks, roughly those of sm_90: products of 16-bit factors on
# the tensor cores, bytes that come from L2, and activations.
PRODUCTS = 2048
L2_BYTES = 32
ACTIVATIONS = 12
# Clocks until the first slices of a program are there, and its last pixels gone.
LATENCY = 1500
# Programs of 4 and of 8 warps that run together, and the registers that leaves to a thread. Tensor
# memory, where there is one, has room for two programs.
PROGRAMS = {4: 3, 8: 1}
REGISTERS = {4: 168, 8: 255}
TENSOR_MEMORY_PROGRAMS = {4: 2, 8: 1}
TENSOR_MEMORY_REGISTERS = {4: 255, 8: 255}
# Float32 sums that a thread can hold, in programs of 4 and of 8 warps: where the tensor cores read
# their factors from shared memory, and where those take registers.
SUMS = {4: 96, 8: 160}
SUMS_BESIDE_FACTORS = {4: 48, 8: 96}
# Those beside float32 factors; and beside the parts of them, by pixels of the tile.
SUMS_OF_FLOAT32 = 96
SUMS_BESIDE_PARTS = {64: 40, 128: 64}


class FusedPlan(NamedTuple):
    """The launch of ``fused_mbconv_kernel``, in its terms."""

    groups: int
    group_pixels: int
    splits: int
    middle_vectors: int
    feature_vectors: int
    column_blocks: int
    middle_vector: int
    feature_vector: int
    index: tl.dtype
    block_p: int
    block_r: int
    block_m: int
    block_k: int
    piece: int
    warps: int
    stages: int
    registers: int

    @property
    def grid(self) -> tuple[int]:
        """One-dimensional: programs."""
        return (self.groups * self.splits * self.column_blocks,)


def block_of(columns: int, most: int = 256) -> int:
    """Columns of a block that holds ``columns`` of them, or ``most``."""
    block: int = max(min(triton.next_power_of_2(columns), most), 16)
    return block


def feature_block(problem: tiles.BlockProblem) -> int:
    """Features of a tile, all of them if any thread can hold their sums; 0 if none are projected.

    More of them are programs of their own, each with the convolution of the whole tile.
    """
    return block_of(problem.features, 512 // problem.itemsize) if problem.features else 0


def piece_of(problem: tiles.BlockProblem, hardware: Hardware) -> int:
    """Columns of the sums that are activated at a time, where the middle width or K has more.

    Fewer where factors of 16 bits are in registers too: a few would be spilled.
    """
    return 64 if hardware.asynchronous or problem.itemsize == 4 else 32


def shared_bytes(problem: tiles.BlockProblem, tile: tiles.Tile) -> int:
    """Shared memory of a program: slices on their way, the project weight, and barriers."""
    slices = tile.stages * tile.channels * (tile.pixels + tile.features)
    weight = tile.features * feature_block(problem)
    return (slices + weight) * problem.itemsize + 256


def clocks(problem: tiles.BlockProblem, tile: tiles.Tile, hardware: Hardware) -> float:
    """About how long the launch takes with ``tile``."""
    terms, itemsize = problem.kernel**2 * problem.channels, problem.itemsize
    block_k = feature_block(problem)
    chunks = -(-problem.middle // tile.features)
    blocks = -(-problem.features // block_k) if block_k else chunks
    steps = -(-terms // tile.channels)
    columns = tile.features * (chunks if block_k else 1)
    products = tile.pixels * columns * (steps * tile.channels + block_k)
    products *= itemsize // 2 * (3 if problem.precise else 1)
    loaded = tile.pixels * terms * (chunks if block_k else 1)
    loaded += problem.middle * (terms + problem.features) if block_k else tile.features * terms
    busy = max(products / PRODUCTS, loaded * itemsize / L2_BYTES)
    rest = tile.pixels * columns / ACTIVATIONS + LATENCY
    together = TENSOR_MEMORY_PROGRAMS if hardware.tensor_memory else PROGRAMS
    resident = min(together[tile.warps], hardware.shared // shared_bytes(problem, tile))
    programs = -(-problem.pixels // tile.pixels) * blocks
    waves = -(-programs // (hardware.multiprocessors * resident))
    return waves * max(resident * busy, busy + rest)


def tiles_of(problem: tiles.BlockProblem, hardware: Hardware) -> Iterator[tiles.Tile]:
    """The tiles that fit the registers and the shared memory."""
    block_k = feature_block(problem)
    terms = problem.kernel**2 * problem.channels
    block_r = block_of(terms, SLICE_BYTES // problem.itemsize)
    pixels, widest = (64, 128), block_of(problem.middle)
    if block_k > 128:
        pixels, widest = (64,), min(widest, 64)
    if problem.precise and not hardware.asynchronous:
        pixels, widest = (64,), min(widest, 32)
    if vector_width(problem.channels, problem.itemsize) * problem.itemsize < 4:
        # No asynchronous copy moves less than 4 bytes: all that is loaded passes through registers.
        pixels, widest, block_r = (64,), min(widest, 64), min(block_r, 32)
    for block_p, block_m, warps in itertools.product(pixels, (16, 32, 64, 128, 256), (4, 8)):
        most = (SUMS if hardware.asynchronous else SUMS_BESIDE_FACTORS)[warps]
        if problem.itemsize == 4:
            most = SUMS_BESIDE_PARTS[block_p] if problem.precise else SUMS_OF_FLOAT32
        # With all that a thread of 4 warps keeps of 128 pixels there is no room for two products.
        small = warps == 4 and (problem.itemsize == 4 or (block_p == 128 and block_k))
        if small or block_m > widest or block_p * (block_m + block_k) > 32 * warps * most:
            continue
        for stages in (2, 3):
            tile = tiles.Tile(block_p, block_r, block_m, warps, stages)
            if shared_bytes(problem, tile) <= hardware.shared:
                yield tile


def usual_tile(problem: tiles.BlockProblem, hardware: Hardware) -> tiles.Tile:
    """The tile of a problem that nothing is known of: the fastest by ``clocks``; of several, with
    most stages and fewest warps.
    """
    return min(
        tiles_of(problem, hardware),
        key=lambda tile: (clocks(problem, tile, hardware), -tile.stages, tile.warps),
    )


@functools.lru_cache(maxsize=1024)
def fused_plan(
    problem: tiles.BlockProblem, batch: int, H: int, W: int, OH: int, OW: int, pool: bool,
    hardware: Hardware, tile: tiles.Tile | None,
) -> FusedPlan:  # fmt: skip
    """Tiles of the pixels of an image where there is something to ``pool``, of the whole batch
    elsewhere; ``tile``: a measured one, or None.
    """
    _, kernel, C, M, features, itemsize, _ = problem
    block_p, block_r, block_m, warps, stages = tile or usual_tile(problem, hardware)
    groups, group_pixels = (batch, OH * OW) if pool else (1, batch * OH * OW)
    K = features or M
    block_k = feature_block(problem) or block_m
    middle_vector, feature_vector = (vector_width(n, itemsize) for n in (M, K))
    images = block_p // (OH * OW) + 2
    return FusedPlan(
        groups, group_pixels, -(-group_pixels // block_p),
        M // middle_vector, K // feature_vector, -(-K // block_k), middle_vector, feature_vector,
        index_type(max(images * H * W * C, block_p * K, M * kernel * kernel * C, K * M)),
        block_p, block_r, block_m, block_k, min(block_m, piece_of(problem, hardware)), warps,
        stages, (TENSOR_MEMORY_REGISTERS if hardware.tensor_memory else REGISTERS)[warps],
    )  # fmt: skip


def fused_mbconv_out(
    input: Tensor, expand_weight: Tensor, expand_mean: Tensor, expand_var: Tensor,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None, expand_eps: float,
    expand_activation: int, stride: int, pad_top: int, pad_left: int,
    project_weight: Tensor | None, project_mean: Tensor | None, project_var: Tensor | None,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, project_eps: float,
    project_activation: int, residual: Tensor | None, allow_tf32: bool, output: Tensor,
    pooled: Tensor | None,
) -> None:  # fmt: skip
    """output = act_p(bn_p(project(act_e(bn_e(conv(input)))))) + residual; or, without a project
    weight, the convolution's part and pooled, its sums: schema in csrc/ops.cpp.
    """
    N, C, H, W = input.shape
    K, OH, OW = output.shape[1:]
    M, _, kernel, _ = expand_weight.shape
    problem = tiles.BlockProblem(
        N * OH * OW, kernel, C, M, 0 if project_weight is None else K, input.element_size(),
        input.dtype == torch.float32 and not allow_tf32,
    )  # fmt: skip
    plan = fused_plan(
        problem, N, H, W, OH, OW, pooled is not None, hardware(input),
        tiles.measured(tiles.architecture(input), problem),
    )  # fmt: skip
    activation = expand_activation if project_weight is None else project_activation
    with device_guard(input):
        sums = pooled
        if pooled is not None and plan.splits > 1:
            sums = torch.empty(plan.splits * N * M, dtype=torch.float32, device=input.device)
        fused_mbconv_kernel[plan.grid](
            input, expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias,
            expand_eps, project_weight, project_mean, project_var, project_bn_weight,
            project_bn_bias, project_eps, residual, output, sums,
            H, W, OH, OW, pad_top, pad_left, plan.groups, plan.group_pixels, plan.splits,
            plan.middle_vectors, plan.feature_vectors, plan.column_blocks, kernel * kernel * C,
            EXPAND_ACTIVATION=activation_name(expand_activation, input.dtype),
            ACTIVATION=activation_name(activation, input.dtype),
            PRECISION=precision(allow_tf32), KERNEL=kernel, STRIDE=stride, C=C,
            MIDDLE_VECTOR=plan.middle_vector, FEATURE_VECTOR=plan.feature_vector, INDEX=plan.index,
            BLOCK_P=plan.block_p, BLOCK_R=plan.block_r, BLOCK_M=plan.block_m,
            BLOCK_K=plan.block_k, PIECE=plan.piece,
            num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.registers,
        )  # fmt: skip
        if pooled is not None and sums is not None and sums is not pooled:
            sum_partials(sums, plan.splits, pooled)
