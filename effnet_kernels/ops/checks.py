"""Argument checks that the public functions share: each error names the argument, says what it got
and what it needs, and comes before any kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_image(argument: str, tensor: Tensor) -> None:
    """``tensor`` is a floating-point (N, C, H, W) tensor.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another rank.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: got {type(tensor).__name__}, expected a Tensor")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{argument}: got dtype {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if tensor.ndim != 4:
        raise ValueError(
            f"{argument}: got {tensor.ndim} dimensions (shape {tuple(tensor.shape)}), "
            "expected 4: (N, C, H, W)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{argument}: got layout {tensor.layout}, expected a dense (strided) tensor"
        )


def check_same_device(argument: str, tensor: Tensor, device: torch.device) -> None:
    """``tensor`` lives on ``device``, where ``input`` does.

    Raises:
        ValueError: it does not.
    """
    if tensor.device != device:
        raise ValueError(
            f"{argument}: got a tensor on {tensor.device}, expected {device}, where input is"
        )


def check_channel_vector(
    argument: str,
    tensor: Tensor | None,
    channels: int,
    device: torch.device,
    whose: str = "the channels of input",
) -> None:
    """``tensor`` is None or a floating-point (C,) tensor; ``whose``: what C is, for a message.

    Raises:
        TypeError: it is neither None nor a floating-point tensor.
        ValueError: it has another shape or device.
    """
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: got {type(tensor).__name__}, expected a Tensor or None")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{argument}: got dtype {tensor.dtype}, expected a floating-point dtype")
    if tensor.ndim != 1 or tensor.shape[0] != channels:
        raise ValueError(
            f"{argument}: got shape {tuple(tensor.shape)}, expected ({channels},), {whose}"
        )
    check_same_device(argument, tensor, device)


def check_batch_norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    channels: int,
    device: torch.device,
    *,
    training: bool,
) -> None:
    """BN's vectors are (C,) or None, the running ones given unless ``training``.

    Raises:
        TypeError: one is neither None nor a floating-point tensor.
        ValueError: one has another shape or device, or is missing.
    """
    for argument, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
    ):
        check_channel_vector(argument, vector, channels, device)
    if not training and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing}: got None, expected a ({channels},) tensor unless training")


def check_residual(residual: Tensor | None, shape: tuple[int, ...], input: Tensor) -> None:
    """``residual`` is None or an image of ``shape`` in ``input``'s dtype.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape or device.
    """
    if residual is None:
        return
    check_shape("residual", residual, shape, input.device)
    if residual.dtype != input.dtype:
        raise TypeError(f"residual: got dtype {residual.dtype}, expected {input.dtype}, input's")


def check_shape(
    argument: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """``tensor`` is a floating-point tensor of ``shape``.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: got {type(tensor).__name__}, expected a Tensor or None")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{argument}: got dtype {tensor.dtype}, expected a floating-point dtype")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{argument}: got shape {tuple(tensor.shape)}, expected {shape}")
    check_same_device(argument, tensor, device)


def check_pointwise_weight(
    argument: str, weight: Tensor, input: Tensor, channels: int, *, cast: bool = False
) -> Tensor:
    """``weight``, a (K, ``channels``) matrix or 1x1 kernel of ``input``'s dtype, as a matrix.

    ``cast``: it will be cast to that dtype, and may have another.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape or device.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{argument}: got {type(weight).__name__}, expected a Tensor")
    shape = tuple(weight.shape)
    if weight.ndim not in (2, 4) or shape[2:] not in ((), (1, 1)) or shape[1] != channels:
        raise ValueError(
            f"{argument}: got shape {shape}, expected (K, {channels}) or (K, {channels}, 1, 1)"
        )
    check_weight_dtype(argument, weight, input, cast=cast)
    check_same_device(argument, weight, input.device)
    return weight.flatten(1)


def check_weight_dtype(argument: str, weight: Tensor, input: Tensor, *, cast: bool) -> None:
    """``weight`` has ``input``'s dtype, or one that can be ``cast`` to it.

    Raises:
        TypeError: it has not.
    """
    if weight.dtype != input.dtype and not (cast and weight.dtype in FLOATING):
        raise TypeError(f"{argument}: got dtype {weight.dtype}, expected {input.dtype}, input's")


def check_eps(argument: str, eps: float) -> None:
    """``eps`` is a number >= 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or NaN.
    """
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"{argument}: got {type(eps).__name__}, expected a float")
    if not eps >= 0:
        raise ValueError(f"{argument}: got {eps}, expected a number >= 0")


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast casts a convolution's ``input`` to, or None where it does not."""
    device = input.device.type
    if (
        device in ("cpu", "cuda")
        and torch.is_autocast_enabled(device)
        and input.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return None


def one_or_pair(argument: str, value: int | Sequence[int]) -> int:
    """A setting that PyTorch allows to differ by dimension and these kernels do not.

    Raises:
        TypeError: it is neither an integer nor a pair of them.
        ValueError: the pair's members differ.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) for v in value):
        if value[0] != value[1]:
            raise ValueError(
                f"{argument}: got {tuple(value)}, expected the same for height and width"
            )
        return value[0]
    raise TypeError(f"{argument}: got {value!r}, expected an int or a pair of ints")


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether any of them does."""
    for tensor in tensors:  # noqa: SIM110 - on every call; any() over a generator costs more
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def kernel_vector(tensor: Tensor | None, input: Tensor) -> Tensor | None:
    """A per-channel vector as the kernels read it: contiguous, float32 or ``input``'s dtype
    (float64 beside a float64 input).
    """
    if tensor is None:
        return None
    dtype = tensor.dtype
    if input.dtype == torch.float64:
        tensor = tensor.to(torch.float64)
    elif dtype != torch.float32 and dtype != input.dtype:
        tensor = tensor.float()
    return tensor.contiguous()


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over ``tensor`` and its per-channel values are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
