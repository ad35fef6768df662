"""The first half of MBConv in one launch: expand convolution, depthwise convolution, pooled sums.

The expanded tensor, six times the input, never exists as a whole. A program takes one unit of work
after another: a tile of output pixels of an image, of BLOCK_C expanded channels. For each it
multiplies the tile's input pixels and their halo with its part of the expand weight, and leaves the
activated result in its scratch, some SCRATCH_BYTES of global memory that no other program
touches; then it runs the depthwise convolution over that.

Triton has no shared memory that a kernel could address, and the taps of a depthwise convolution
read a pixel at k*k places. So the scratch is in global memory, but there are only as many programs
as run at a time: their scratch together, a few tens of megabytes, is written and read in L1 and L2
and has no reason to go to DRAM.

Traffic of DRAM: the input, once for all channel blocks (programs that run together read the same
image), and the output. Traffic of L2, in tensors: the input times the channel blocks, times the
halo; the expanded tensor with its halo, written and read; the output. A whole image has no halo.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_kernels.triton.activations import activate, activation_name
from effnet_kernels.triton.batch_norm_act import load_batch_norm, sum_partials
from effnet_kernels.triton.depthwise_conv_bn_act import (
    ELEMENTS,
    NUM_WARPS,
    REGISTERS,
    TILE_REGISTERS,
    convolve_rows,
    filter_taps,
    spatial_tile,
    tile_rows,
)
from effnet_kernels.triton.launch import (
    device_guard,
    index_type,
    multiprocessors,
    splits,
    vector_width,
)
from effnet_kernels.triton.pointwise_conv_bn_act import (
    activate_product,
    channel_slice,
    load_weight,
    precision,
)


@triton.jit(
    do_not_specialize=[
        "H", "W", "OH", "OW", "input_vectors", "channel_vectors", "pad_top", "pad_left",
        "unit_rows", "unit_columns", "halo_rows", "halo_columns", "row_units", "image_units",
        "units", "program_units", "channel_blocks",
    ]
)  # fmt: skip
def expand_depthwise_kernel(
    p_input,  # (N, H, W, I)
    p_expand_weight,  # (C, I)
    p_expand_mean,  # (C,)
    p_expand_var,
    p_expand_bn_weight,
    p_expand_bn_bias,
    expand_eps,
    p_taps,  # (k*k, C) float32 if PACKED, else the weight, (C, 1, k, k)
    p_mean,  # (C,)
    p_var,
    p_bn_weight,
    p_bn_bias,
    eps,
    p_scratch,  # (programs, halo_rows, halo_columns, BLOCK_C)
    p_output,  # (N, OH, OW, C)
    p_pooled,  # (image_units, N, C) float32, or None
    H,
    W,
    OH,
    OW,
    input_vectors,
    channel_vectors,
    pad_top,
    pad_left,
    unit_rows,
    unit_columns,
    halo_rows,
    halo_columns,
    row_units,
    image_units,
    units,
    program_units,
    channel_blocks,
    EXPAND_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    INPUT_VECTOR: tl.constexpr,
    VECTOR: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
    SLICED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """expanded = act_e(bn_e(input expand_weight^T)), output = act(bn(depthwise(expanded))), and
    pooled, the sums of output over its pixels, one row a unit of an image.

    A unit is unit_rows x unit_columns output pixels of an image; it needs at most halo_rows x
    halo_columns pixels of expanded, zeros beside the image not counted. It reads those of the
    input, in products of BLOCK_P pixels, writes and reads as many of its scratch, and writes its
    output in tiles of ROWS x BLOCK_W pixels. Units are numbered through the batch, down the columns
    of an image, then across. The grid is (ranges of program_units, channel blocks), the last
    fastest. SLICED: I is more than BLOCK_I; else the weight stays where it was loaded to.
    """
    I = input_vectors * INPUT_VECTOR  # noqa: E741
    C = channel_vectors * VECTOR
    pid = tl.program_id(0)
    o_b = tl.arange(0, BLOCK_C)
    o_c = (pid % channel_blocks) * BLOCK_C + o_b
    m_c = o_c < C
    o_i = tl.arange(0, BLOCK_I)
    p_scratch += pid.to(tl.int64) * (halo_rows * halo_columns) * BLOCK_C
    scratch_pitch = halo_columns * BLOCK_C
    output_pitch = OW.to(INDEX) * C
    images = units // image_units
    if not SLICED:
        weight = load_weight(p_expand_weight, I, o_i, o_c, o_i < I, m_c, INDEX)

    first = pid // channel_blocks * program_units
    for unit in tl.range(first, tl.minimum(first + program_units, units)):
        image = (unit // image_units).to(tl.int64)
        oh0 = unit % image_units % row_units * unit_rows
        ow0 = unit % image_units // row_units * unit_columns
        row0 = tl.maximum(oh0 * STRIDE - pad_top, 0)
        column0 = tl.maximum(ow0 * STRIDE - pad_left, 0)
        row_end = tl.minimum(row0 + halo_rows, H)
        pixels = (row_end - row0) * halo_columns
        p_image = p_input + image * H * W * I

        for start in tl.range(0, pixels, BLOCK_P):
            o_p = start + tl.arange(0, BLOCK_P)
            o_h = row0 + o_p // halo_columns
            o_w = column0 + o_p % halo_columns
            m_p = ((o_p < pixels) & (o_w < W))[:, None]
            o_pixel = (o_h.to(INDEX) * W + o_w)[:, None] * I
            if SLICED:
                sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
                for i in tl.range(0, I, BLOCK_I):
                    m_i = i + o_i < I
                    x = tl.load(
                        p_image + (o_pixel + (i + o_i)[None, :]), mask=m_p & m_i[None, :], other=0.0
                    )
                    weight = load_weight(p_expand_weight, I, i + o_i, o_c, m_i, m_c, INDEX)
                    sums = tl.dot(x, weight, sums, input_precision=PRECISION)
            else:
                x = tl.load(
                    p_image + (o_pixel + o_i[None, :]), mask=m_p & (o_i < I)[None, :], other=0.0
                )
                sums = tl.dot(x, weight, input_precision=PRECISION)
            # Half of the columns at a time: on sm_100 a thread has a whole row of them, and a
            # register for each of BN's values of each, which all at once would spill.
            columns = tl.permute(tl.reshape(sums, [BLOCK_P, 2, BLOCK_C // 2]), (0, 2, 1))
            halves = tl.split(columns)
            for half in tl.static_range(2):
                o_half = half * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
                o_k = (pid % channel_blocks) * BLOCK_C + o_half
                y = activate_product(
                    halves[half], p_expand_mean, p_expand_var, p_expand_bn_weight,
                    p_expand_bn_bias, expand_eps, o_k, o_k < C, EXPAND_ACTIVATION,
                )  # fmt: skip
                o_scratch = o_p[:, None] * BLOCK_C + o_half[None, :]
                tl.store(p_scratch + o_scratch, y.to(p_scratch.dtype.element_ty), mask=m_p)

        # Threads read below what others wrote above. The barrier is the block's (bar.sync), which
        # orders global memory among its threads too; the compiler moves no access across it. Lines
        # in L1 cannot be stale: only this program, on this multiprocessor, ever wrote them, and its
        # stores update its own L1.
        tl.debug_barrier()
        p_origin = p_scratch - (row0 * scratch_pitch + column0 * BLOCK_C)
        pooled = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
        oh_end = tl.minimum(oh0 + unit_rows, OH)
        for oh in tl.range(oh0, oh_end, ROWS):
            for ow in tl.range(ow0, tl.minimum(ow0 + unit_columns, OW), BLOCK_W):
                o_w = ow + tl.arange(0, BLOCK_W)
                accumulators = convolve_rows(
                    p_origin, p_taps, 1.0, 0.0, oh * STRIDE - pad_top, o_w * STRIDE - pad_left,
                    row_end, W, scratch_pitch, BLOCK_C, o_b, C, o_c, m_c, False, ACTIVATION,
                    KERNEL, STRIDE, PACKED, INDEX, ROWS, BLOCK_W, BLOCK_C,
                )  # fmt: skip
                # Loaded here, from L1, so that they take no registers while the taps are added.
                mean, scale, bias = load_batch_norm(
                    p_mean, p_var, p_bn_weight, p_bn_bias, eps, o_c, m_c
                )
                m_output = (o_w < OW)[:, None] & m_c[None, :]
                o_output = o_w[:, None].to(INDEX) * C + o_c[None, :]
                for r in tl.static_range(ROWS):
                    m_row = m_output & (oh + r < oh_end)
                    o_row = image * OH * output_pitch + ((oh + r) * output_pitch + o_output)
                    y = activate((accumulators[r] - mean) * scale + bias, ACTIVATION)
                    if p_pooled is not None:
                        pooled += tl.where(m_row, y, 0.0)
                    tl.store(p_output + o_row, y.to(p_output.dtype.element_ty), mask=m_row)
        if p_pooled is not None:
            row = (unit % image_units).to(tl.int64) * images + image
            tl.store(p_pooled + row * C + o_c, tl.sum(pooled, 0), mask=m_c)
        # The next unit overwrites what is read above.
        tl.debug_barrier()


# The scratch of a program: what those of a multiprocessor write fits its L1, beside their shared
# memory, and what all write fits half of L2.
SCRATCH_BYTES = 65536
# Registers of a thread, in all and for the tile of the depthwise convolution, where a block has 128
# channels, twice the accumulators and vectors in the product, or each element an address of its
# own: two programs fit a multiprocessor then, where three do with REGISTERS.
WIDE_BLOCK = 128
WIDE_REGISTERS = 255
WIDE_TILE_REGISTERS = 200
# Pixels of a product, and the bytes of an input pixel that may be in shared memory at once, beside
# as many for each channel of the weight.
BLOCK_P = 64
INPUT_BYTES = 256


class ExpandPlan(NamedTuple):
    """The launch of ``expand_depthwise_kernel``, in its terms."""

    input_vectors: int
    channel_vectors: int
    unit_rows: int
    unit_columns: int
    halo_rows: int
    halo_columns: int
    row_units: int
    image_units: int
    units: int
    program_units: int
    channel_blocks: int
    input_vector: int
    vector: int
    index: tl.dtype
    sliced: bool
    rows: int
    block_i: int
    block_w: int
    block_c: int
    programs: int
    registers: int
    stages: int


def halo(outputs: int, size: int, kernel: int, stride: int) -> int:
    """Input pixels, in one direction and of ``size``, that ``outputs`` output pixels need."""
    return min(size, (outputs - 1) * stride + kernel)


def unit_extent(
    H: int, W: int, OH: int, OW: int, kernel: int, stride: int, block_w: int, pixels: int
) -> tuple[int, int]:
    """(rows, columns) of a unit: few pixels expanded twice, in at most ``pixels`` of scratch.

    Columns are whole tiles of ``block_w``. One row of one tile is the least, whatever it takes.
    """

    def rows_of(columns: int) -> int:
        most = pixels // halo(columns, W, kernel, stride)
        rows = OH if most >= H else max((most - kernel) // stride + 1, 1)
        return -(-OH // -(-OH // min(rows, OH)))

    def fits(columns: int) -> bool:
        return columns == block_w or kernel * halo(columns, W, kernel, stride) <= pixels

    def expanded(columns: int) -> int:
        rows = rows_of(columns)
        down = -(-OH // rows) * halo(rows, H, kernel, stride)
        return down * -(-OW // columns) * halo(columns, W, kernel, stride)

    columns = min(filter(fits, range(block_w, OW + block_w, block_w)), key=expanded)
    return rows_of(columns), columns


@functools.lru_cache(maxsize=1024)
def expand_plan(
    batch: int, inputs: int, channels: int, H: int, W: int, OH: int, OW: int,
    kernel: int, stride: int, itemsize: int, multiprocessors: int,
) -> ExpandPlan:  # fmt: skip
    """As many programs as run at a time, each with a range of units of its channel block."""
    block_w, block_c = spatial_tile(OW, channels, 32 * NUM_WARPS * ELEMENTS, kernel, stride)
    unit_rows, unit_columns = unit_extent(
        H, W, OH, OW, kernel, stride, block_w, SCRATCH_BYTES // (block_c * itemsize)
    )
    row_units = -(-OH // unit_rows)
    image_units = row_units * -(-OW // unit_columns)
    channel_blocks = -(-channels // block_c)
    input_vector, vector = (vector_width(n, itemsize) for n in (inputs, channels))
    wide = block_c == WIDE_BLOCK or vector == 1
    # Beside the tile: what the loop over units holds, and the addresses.
    held = 5 + 14 * (vector == 1)
    rows = tile_rows(
        unit_rows, kernel, stride, kernel - stride, 1, itemsize, held,
        WIDE_TILE_REGISTERS if wide else TILE_REGISTERS,
    )  # fmt: skip
    ranges, program_units = splits(
        batch * image_units, channel_blocks, multiprocessors * (2 if wide else 3), False
    )
    block_i = max(triton.next_power_of_2(inputs), 16)
    if block_i * itemsize > INPUT_BYTES:
        block_i = channel_slice(inputs, itemsize, True)
    sliced = inputs > block_i
    return ExpandPlan(
        inputs // input_vector, channels // vector, unit_rows, unit_columns,
        halo(unit_rows, H, kernel, stride), halo(unit_columns, W, kernel, stride),
        row_units, image_units, batch * image_units, program_units, channel_blocks,
        input_vector, vector, index_type(max(H * W * inputs, OH * OW * channels)),
        sliced, rows, block_i, block_w, block_c, ranges * channel_blocks,
        WIDE_REGISTERS if wide else REGISTERS, 3 if sliced else 2,
    )  # fmt: skip


def expand_depthwise_out(
    input: Tensor, expand_weight: Tensor, expand_mean: Tensor, expand_var: Tensor,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None, expand_eps: float,
    expand_activation: int,
    weight: Tensor, mean: Tensor, var: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    eps: float, stride: int, pad_top: int, pad_left: int, activation: int, allow_tf32: bool,
    output: Tensor, pooled: Tensor | None,
) -> None:  # fmt: skip
    """output = act(bn(depthwise(act_e(bn_e(expand(input)))))) and pooled, its sums: schema in
    csrc/ops.cpp.
    """
    N, inputs, H, W = input.shape
    C, OH, OW = output.shape[1:]
    kernel = weight.shape[2]
    plan = expand_plan(
        N, inputs, C, H, W, OH, OW, kernel, stride, input.element_size(), multiprocessors(input)
    )
    with device_guard(input):
        scratch = torch.empty(
            plan.programs * plan.halo_rows * plan.halo_columns * plan.block_c,
            dtype=input.dtype, device=input.device,
        )  # fmt: skip
        sums = pooled
        if pooled is not None and plan.image_units > 1:
            sums = torch.empty(plan.image_units * N * C, dtype=torch.float32, device=input.device)
        taps, packed = filter_taps(weight, input, output)
        expand_depthwise_kernel[(plan.programs,)](
            input, expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias,
            expand_eps, taps, mean, var, bn_weight, bn_bias, eps,
            scratch, output, sums,
            H, W, OH, OW, plan.input_vectors, plan.channel_vectors, pad_top, pad_left,
            plan.unit_rows, plan.unit_columns, plan.halo_rows, plan.halo_columns,
            plan.row_units, plan.image_units, plan.units, plan.program_units, plan.channel_blocks,
            EXPAND_ACTIVATION=activation_name(expand_activation, input.dtype),
            ACTIVATION=activation_name(activation, input.dtype), PRECISION=precision(allow_tf32),
            KERNEL=kernel, STRIDE=stride, INPUT_VECTOR=plan.input_vector, VECTOR=plan.vector,
            PACKED=packed, INDEX=plan.index, SLICED=plan.sliced, ROWS=plan.rows, BLOCK_P=BLOCK_P,
            BLOCK_I=plan.block_i, BLOCK_W=plan.block_w, BLOCK_C=plan.block_c,
            num_warps=NUM_WARPS, num_stages=plan.stages, maxnreg=plan.registers,
        )  # fmt: skip
        if pooled is not None and sums is not None and sums is not pooled:
            sum_partials(sums, plan.image_units, pooled)
