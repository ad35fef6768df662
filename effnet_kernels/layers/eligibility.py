"""What a stock convolution, a block and a call must be like for a fused op to stand in for them.

Each check gives the reason why not, or None. The adapters ask the same questions when a model is
converted and again at each call, since children can be replaced and hooks added in between; so the
checks read attributes and nothing else, and ``torch.compile`` traces through them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from effnet_kernels import backends

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
}
"""PyTorch's own modules by what the kernels call them."""


def module_refusal(module: nn.Module) -> str | None:
    """Why ``module`` may not be bypassed: what else hangs on its being called."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own (patched on the instance)"
    return None


def named_refusal(name: str, module: nn.Module) -> str | None:
    """``module_refusal`` with the module's name before it."""
    reason = module_refusal(module)
    return None if reason is None else f"{name} {reason}"


def depthwise_conv_refusal(name: str, conv: nn.Conv2d) -> str | None:
    """Why the depthwise op cannot stand in for ``conv``, whose class the caller has checked."""
    channels = conv.in_channels
    if conv.groups != channels or conv.out_channels != channels:
        return (
            f"{name} is not depthwise ({channels} to {conv.out_channels} channels in "
            f"{conv.groups} groups)"
        )
    return _window_refusal(name, conv)


def dense_conv_refusal(name: str, conv: nn.Conv2d) -> str | None:
    """Why the op of the dense k x k convolution cannot stand in for ``conv``, whose class the
    caller has checked.
    """
    if conv.groups != 1:
        return f"{name} has {conv.groups} groups, not 1"
    return _window_refusal(name, conv)


def _window_refusal(name: str, conv: nn.Conv2d) -> str | None:
    """Why no op has the windows of ``conv``."""
    kernel, stride, padding, weight = conv.kernel_size, conv.stride, conv.padding, conv.weight
    if kernel[0] != kernel[1] or kernel[0] not in (3, 5, 7):
        return f"{name} has kernel size {kernel}, not 3, 5 or 7"
    if stride[0] != stride[1] or stride[0] not in (1, 2):
        return f"{name} has stride {stride}, not 1 or 2"
    if conv.dilation != (1, 1):
        return f"{name} has dilation {conv.dilation}"
    if conv.bias is not None:
        return f"{name} has a bias"
    if conv.padding_mode != "zeros":
        return f"{name} pads with {conv.padding_mode!r}, not zeros"
    if not isinstance(padding, str) and (padding[0] >= kernel[0] or padding[1] >= kernel[0]):
        return f"{name} has padding {padding}, not less than its kernel"
    if _is_wrapper(weight):
        return f"{name}.weight is a {type(weight).__name__}"
    return named_refusal(name, conv)


def pointwise_conv_refusal(name: str, conv: nn.Module) -> str | None:
    """Why a product with a matrix cannot stand in for ``conv``."""
    if type(conv) is not nn.Conv2d:
        return f"{name} is a {type(conv).__name__}, not a Conv2d"
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
        return (
            f"{name} has kernel size {conv.kernel_size}, stride {conv.stride} and {conv.groups} "
            "groups, not 1"
        )
    if isinstance(conv.padding, str) or conv.padding != (0, 0):
        return f"{name} has padding {conv.padding}"
    if _is_wrapper(conv.weight):
        return f"{name}.weight is a {type(conv.weight).__name__}"
    return named_refusal(name, conv)


def squeeze_excite_parts_refusal(
    convs: dict[str, nn.Module],
    activations: dict[str, tuple[nn.Module, tuple[str, ...]]],
    names: dict[type[nn.Module], str],
) -> str | None:
    """Why the op cannot stand in for squeeze-and-excitation with these children, or None.

    Args:
        convs: the two 1x1 convolutions by name.
        activations: the two activations by name, each with those that the op has in its place.
        names: the activations by class.
    """
    for name, conv in convs.items():
        reason = pointwise_conv_refusal(name, conv)
        if reason is not None:
            return reason
    for name, (activation, known) in activations.items():
        if names.get(type(activation), "") not in known:
            return f"{name} is a {type(activation).__name__}, which no kernel knows"
        reason = named_refusal(name, activation)
        if reason is not None:
            return reason
    return None


def conv_padding(conv: nn.Conv2d) -> str | tuple[int, int]:
    """The padding of an ``nn.Conv2d`` of odd kernel size, as the op takes it."""
    padding = conv.padding
    if not isinstance(padding, str):
        return (padding[0], padding[1])
    # "same" needs stride 1, where PyTorch's rule and TensorFlow's agree.
    return "same" if padding == "same" else (0, 0)


def call_refusal(op: str, input: Tensor) -> str | None:
    """Why a call on ``input`` goes to the stock forward.

    Raises:
        RuntimeError: the backend that ``use_backend`` demands cannot take the call.
    """
    if not isinstance(input, Tensor):
        return f"input is a {type(input).__name__}, not a Tensor"
    if input.ndim != 4 or input.layout != torch.strided:
        return "input is not a dense (N, C, H, W) tensor"
    if _is_wrapper(input):
        return f"input is a {type(input).__name__}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit is tracing"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "an ONNX export is running"
    if nn_module._has_any_global_hook():
        return "hooks on all modules are registered"
    if backends.select(op, input) == backends.EAGER:
        return "no kernel backend takes the call"
    return None


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether the values are in other tensors (sharded, quantised), where no kernel would look."""
    return hasattr(type(tensor), "__tensor_flatten__")
