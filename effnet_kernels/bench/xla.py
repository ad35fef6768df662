"""XLA as a peer, by way of JAX: a stock model's operators, each in JAX's words, compiled as one.

``torch.export`` says which operators those are, so the model is timm's own and its parameters are
where they were. Layouts, fusions and the algorithms of convolutions are XLA's business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils.dlpack import from_dlpack

from effnet_kernels.bench import engines
from effnet_kernels.bench.engines import UnavailableError

NAME = "xla"
"""The contender's name."""

Call = Callable[..., tuple[Tensor, ...]]


def lazy_call(model: nn.Module, compute: torch.dtype | None) -> Call:
    """A forward pass of ``model`` by XLA, or in training mode a whole step, made in the first call
    and for that call's shape of images.

    Args:
        model: a stock model, in evaluation mode for a forward pass, in training mode for a forward
            and backward pass. Its running statistics stay as they are: PyTorch's are updated, which
            is two vectors a BN.
        compute: what convolutions and matrix products take their operands in, as under autocast;
            the parameters' own dtype if None.

    Returns:
        A function of images (N, C, H, W) that returns logits (N, classes), or of images and classes
        (N,) int32 that returns logits and the gradients of the mean cross-entropy by the model's
        parameters, in their order.

    Raises:
        UnavailableError: in the first call: JAX is not installed, does not see the images' device,
            or on a CPU would not take as many threads as PyTorch; or an operator is not known here.
    """
    return engines.lazily(lambda images: _make(model, images, compute))


def _make(model: nn.Module, images: Tensor, compute: torch.dtype | None) -> Call:
    # XLA would take three quarters of a GPU's memory at its start, which the others need, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = engines.package("jax")
    try:
        jax.devices(images.device.type)
    except RuntimeError as error:
        raise UnavailableError(f"JAX has no {images.device.type}: {error}") from None
    if images.device.type == "cpu":
        # As XLA counts them; it cannot be told otherwise once it runs.
        told = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC")
        threads = int(told) if told else len(os.sched_getaffinity(0))
        if torch.get_num_threads() != threads:
            raise UnavailableError(
                f"it runs {threads} threads where {torch.get_num_threads()} are asked for"
            )
    with torch.no_grad():
        exported = torch.export.export(model, (images,))
    evaluator = _Evaluator(exported.graph_module, compute, jax)

    def to_jax(tensor: Tensor) -> Any:
        # The same memory; what either stream has still to do is waited for on the device.
        return jax.dlpack.from_dlpack(tensor.detach().contiguous())

    state = {**exported.state_dict, **exported.constants}
    # What the graph takes, by its name in the model; None for the images.
    inputs = [
        None if spec.kind is InputKind.USER_INPUT else spec.target
        for spec in exported.graph_signature.input_specs
    ]
    parameters = {name: to_jax(p) for name, p in model.named_parameters()}
    fixed = {name: to_jax(state[name]) for name in inputs if name and name not in parameters}

    def forward(parameters: dict[str, Any], fixed: dict[str, Any], images: Any) -> Any:
        known = {**parameters, **fixed}
        (logits,) = evaluator.run(*(known[name] if name else images for name in inputs))
        return logits

    def loss(parameters: dict[str, Any], fixed: dict[str, Any], images: Any, classes: Any) -> Any:
        logits = forward(parameters, fixed, images)
        likelihoods = jax.nn.log_softmax(logits.astype("float32"))
        picked = jax.numpy.take_along_axis(likelihoods, classes[:, None], axis=1)
        return -picked.mean(), logits

    run = jax.jit(jax.grad(loss, has_aux=True) if model.training else forward)
    asynchronous = images.is_cuda

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        results = run(parameters, fixed, *map(to_jax, arguments))
        if not asynchronous:
            jax.block_until_ready(results)
        if not model.training:
            return (from_dlpack(results),)
        gradients, logits = results
        return from_dlpack(logits), *(from_dlpack(gradients[name]) for name in parameters)

    return call


class _Evaluator(torch.fx.Interpreter):
    """A graph of ATen operators on JAX's arrays, NCHW."""

    def __init__(self, graph: torch.fx.GraphModule, compute: torch.dtype | None, jax: Any) -> None:
        super().__init__(graph)
        self.lax, self.nn, self.np = jax.lax, jax.nn, jax.numpy
        self.compute = None if compute is None else str(compute).removeprefix("torch.")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator's counterpart among the methods, by its name and without its overload."""
        name = str(target).split(".")[1].removesuffix("_")
        method = getattr(self, f"op_{name}", None)
        if method is None:
            raise UnavailableError(f"{target} has no counterpart here")
        return method(*args, **kwargs)

    def _operands(self, *arrays: Any) -> Any:
        return [a if self.compute is None or a is None else a.astype(self.compute) for a in arrays]

    def op_conv2d(
        self, x: Any, weight: Any, bias: Any = None, stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
    ) -> Any:  # fmt: skip
        x, weight, bias = self._operands(x, weight, bias)
        y = self.lax.conv_general_dilated(
            x, weight, stride, [(p, p) for p in padding], rhs_dilation=dilation,
            dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=groups,
        )  # fmt: skip
        return y if bias is None else y + bias[:, None, None]

    def op_linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        x, weight, bias = self._operands(x, weight, bias)
        y = x @ weight.T
        return y if bias is None else y + bias

    def op_batch_norm(
        self, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float,
        eps: float, cudnn_enabled: bool,
    ) -> Any:  # fmt: skip
        wide = x.astype(self.np.promote_types(x.dtype, "float32"))
        if training:
            # In one pass, as JAX's own libraries do it.
            mean = wide.mean((0, 2, 3))
            var = (wide * wide).mean((0, 2, 3)) - mean * mean
        scale = weight * self.lax.rsqrt(var.astype(wide.dtype) + eps)
        shift = bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)

    def op_silu(self, x: Any) -> Any:
        return self.nn.silu(x)

    def op_relu(self, x: Any) -> Any:
        return self.nn.relu(x)

    def op_hardtanh(self, x: Any, least: float = -1.0, most: float = 1.0) -> Any:
        return self.np.clip(x, least, most)

    def op_sigmoid(self, x: Any) -> Any:
        return self.nn.sigmoid(x)

    def op_hardswish(self, x: Any) -> Any:
        return self.nn.hard_swish(x)

    def op_hardsigmoid(self, x: Any) -> Any:
        return self.nn.hard_sigmoid(x)

    def op_add(self, x: Any, y: Any) -> Any:
        return x + y

    def op_mul(self, x: Any, y: Any) -> Any:
        return x * y

    def op_mean(self, x: Any, dims: Sequence[int], keepdim: bool = False) -> Any:
        return x.mean(tuple(dims), keepdims=keepdim)

    def op_adaptive_avg_pool2d(self, x: Any, size: Sequence[int]) -> Any:
        if list(size) != [1, 1]:
            raise UnavailableError(f"adaptive_avg_pool2d to {size} has no counterpart here")
        return x.mean((2, 3), keepdims=True)

    def op_flatten(self, x: Any, start: int = 0, end: int = -1) -> Any:
        end %= x.ndim
        return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])

    def op_pad(self, x: Any, pad: Sequence[int], mode: str, value: float | None = None) -> Any:
        pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
        widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs
        return self.np.pad(x, widths, mode, constant_values=value or 0)
