"""The depthwise op on every kernel backend that can run here, against float64 and eager."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from devices import device_of, interpreted, skip_in_interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.depthwise_cases import CASES, Case, depthwise_output_shape, make_arguments, run

import effnet_kernels
from effnet_kernels import use_backend
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act


def check(
    case: Case, dtype: torch.dtype, backend: str, seed: int = 0, roundings: int | None = None
) -> None:
    arguments = make_arguments(case, dtype, device_of(backend), seed)
    ours = run(case, arguments, backend)
    eager = run(case, arguments, "eager")
    exact = run(case, arguments, "eager", double=True)
    assert ours["output"].shape == depthwise_output_shape(case)
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, result in ours.items():
        # The batch's statistics are those of the stored convolution, rounded value by value.
        of_stored = name in ("batch_mean", "batch_var")
        assert_error_rule(
            f"{name} of {case}",
            result,
            eager[name],
            exact[name],
            dtype if of_stored or roundings else result.dtype,
            GRADIENT if name.startswith("grad") else FORWARD,
            roundings,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, kernel_backend: str) -> None:
    """Results and gradients are at most 2x and 3x eager's own error from float64."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    check(case, dtype, kernel_backend)


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "channels"),
    [
        *itertools.product((3, 5, 7), (1, 2), ((1, 1), (7, 7), (33, 17)), (8, 24, 96, 1152, 13)),
    ],
)
@pytest.mark.parametrize("batch", [0, 1])
def test_every_shape_on_cpu(
    kernel: int, stride: int, size: tuple[int, int], channels: int, batch: int
) -> None:
    """The full grid of shapes; an empty batch gives empty results and gradients of zero."""
    case = Case(batch, channels, *size, kernel=kernel, stride=stride, pool=True)
    if batch:
        check(case, torch.float32, "cpu")
        return
    case = dataclasses.replace(case, training=True)
    results = run(case, make_arguments(case, torch.float32, "cpu"), "cpu")
    assert results["output"].shape == depthwise_output_shape(case)
    for name, result in results.items():
        assert not result.any(), name


SMOOTH = ["identity", "silu", "sigmoid"]
KINKED = ["relu", "relu6", "hardswish", "hardsigmoid"]


@st.composite
def _cases(draw: st.DrawFn, largest: int, activations: list[str]) -> Case:
    kernel = draw(st.sampled_from([3, 5, 7]))
    pads = tuple(draw(st.integers(0, kernel - 1)) for _ in range(4))
    left, right, top, bottom = pads
    return Case(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 70)),
        draw(st.integers(max(1, kernel - top - bottom), largest)),
        draw(st.integers(max(1, kernel - left - right), largest)),
        kernel=kernel,
        stride=draw(st.sampled_from([1, 2])),
        padding=pads,
        activation=draw(st.sampled_from(activations)),
        pool=draw(st.booleans()),
        prologue=draw(st.none() | st.sampled_from(activations)),
        affine=draw(st.booleans()),
        layout=draw(st.sampled_from(["channels_last", "contiguous", "strided"])),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=_cases(20, SMOOTH + KINKED), seed=st.integers(0, 9))
def test_any_geometry_on_cpu(case: Case, seed: int) -> None:
    """Any extent, channel count, padding and stride of memory.

    A search for the worst of all small tensors finds sums that cancel, where eager is exact by
    luck; a wrong offset or mask is far above the roundings allowed here.
    """
    check(case, torch.float32, "cpu", seed, roundings=100)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=_cases(20, SMOOTH), seed=st.integers(0, 9))
def test_any_geometry_on_cpu_in_bfloat16(case: Case, seed: int) -> None:
    """The same in bfloat16; where a derivative jumps, one rounding is worth the whole of it."""
    check(case, torch.bfloat16, "cpu", seed, roundings=8)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=_cases(9, SMOOTH + KINKED), seed=st.integers(0, 9))
def test_any_geometry_on_triton(case: Case, seed: int) -> None:
    """The same on the Triton kernels."""
    check(case, torch.float32, "triton", seed, roundings=100)


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training: bool) -> None:
    """The C++ derivative is that of the function, in float64."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    image, weight = leaf(2, 3, 5, 4), leaf(3, 1, 3, 3)
    vectors = [leaf(3) for _ in range(4)]
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def function(image, weight, bn_weight, bn_bias, scale, shift):
        result = depthwise_conv_bn_act(
            image, weight, mean, var, bn_weight, bn_bias, 2, 1, training=training, pool=True,
            prologue=Prologue(scale, shift, "silu"),
        )  # fmt: skip
        return result.output, result.pooled

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(function, (image, weight, *vectors))


def test_deterministic(kernel_backend: str) -> None:
    """The same bits every time."""
    size = (2, 16, 9, 10) if interpreted(kernel_backend) else (4, 40, 19, 23)
    case = Case(*size, kernel=5, training=True, pool=True, prologue="silu")
    arguments = make_arguments(case, torch.float32, device_of(kernel_backend))
    first, second = (run(case, arguments, kernel_backend) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_gradients_asked_for_one_at_a_time(kernel_backend: str) -> None:
    """Each gradient alone is the gradient among all."""
    case = Case(2, 9, 6, 7, stride=2, prologue="silu", training=True)
    arguments = make_arguments(case, torch.float32, device_of(kernel_backend))
    together = run(case, arguments, kernel_backend)
    names = ("input", "weight", "bn_weight", "bn_bias", "scale", "shift")
    for wanted in names:
        leaves = {n: getattr(arguments, n).detach().requires_grad_(n == wanted) for n in names}
        with use_backend(kernel_backend):
            result = depthwise_conv_bn_act(
                leaves["input"], leaves["weight"], None, None, leaves["bn_weight"],
                leaves["bn_bias"], 2, "same", training=True, eps=1e-3,
                prologue=Prologue(leaves["scale"], leaves["shift"], "silu"),
            )  # fmt: skip
        (grad,) = torch.autograd.grad(result.output, leaves[wanted], arguments.grad_output)
        torch.testing.assert_close(grad, together[f"grad {wanted}"])


def test_only_pooled_is_used(kernel_backend: str) -> None:
    """A loss of the pooled sums alone has the gradient of summing the output."""
    device = device_of(kernel_backend)
    image = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    weight = torch.randn(8, 1, 3, 3, device=device)
    ones = torch.ones(8, device=device)
    with use_backend(kernel_backend):
        result = depthwise_conv_bn_act(image, weight, ones, ones, padding=1, pool=True)
    (pooled,) = torch.autograd.grad(result.pooled.sum(), image, retain_graph=True)
    (summed,) = torch.autograd.grad(result.output.sum(), image)
    torch.testing.assert_close(pooled, summed)


def test_double_backward_is_an_error() -> None:
    """No silent wrong second derivative."""
    image = torch.randn(1, 8, 6, 6, requires_grad=True)
    ones = torch.ones(8)
    with use_backend("cpu"):
        output = depthwise_conv_bn_act(image, torch.randn(8, 1, 3, 3), ones, ones, padding=1).output
        (grad,) = torch.autograd.grad(output.sum(), image, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def _call(**changes):
    arguments = {
        "input": torch.randn(2, 8, 6, 6),
        "weight": torch.randn(8, 1, 3, 3),
        "running_mean": torch.zeros(8),
        "running_var": torch.ones(8),
        "padding": 1,
    }
    return depthwise_conv_bn_act(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input": [1, 2]}, TypeError, "input"),
        ({"input": torch.randn(8, 6, 6)}, ValueError, "input: got 3 dimensions"),
        ({"input": torch.ones(2, 8, 6, 6, dtype=torch.int32)}, TypeError, "input: got dtype"),
        ({"input": torch.randn(2, 8, 6, 6).to_sparse()}, TypeError, "input: got layout"),
        ({"input": torch.randn(2, 7, 6, 6)}, ValueError, "weight"),
        ({"input": torch.randn(2, 8, 6, 6).bfloat16()}, TypeError, "weight: got dtype"),
        (
            {"input": torch.randn(2, 8, 6, 6, device="meta")},
            ValueError,
            "weight: got a tensor on cpu",
        ),
        ({"weight": torch.randn(8, 2, 3, 3)}, ValueError, "weight"),
        ({"weight": torch.randn(8, 1, 4, 4)}, ValueError, "weight"),
        ({"weight": torch.randn(8, 1, 3, 5)}, ValueError, "weight"),
        ({"weight": torch.randn(8, 1, 3)}, ValueError, "weight: got 3 dimensions"),
        ({"weight": None}, TypeError, "weight"),
        ({"running_mean": torch.zeros(7)}, ValueError, "running_mean"),
        ({"running_mean": None}, ValueError, "running_mean"),
        ({"running_var": torch.ones(8, dtype=torch.int64)}, TypeError, "running_var"),
        ({"running_var": torch.ones(8, device="meta")}, ValueError, "running_var"),
        ({"bn_weight": torch.ones(8, 1)}, ValueError, "bn_weight"),
        ({"bn_bias": 3.0}, TypeError, "bn_bias"),
        ({"stride": 3}, ValueError, "stride: got 3"),
        ({"stride": (1, 2)}, ValueError, "stride"),
        ({"stride": 1.5}, TypeError, "stride"),
        ({"dilation": 2}, ValueError, "dilation: got 2"),
        ({"padding": 3}, ValueError, "padding"),
        ({"padding": -1}, ValueError, "padding"),
        ({"padding": "valid"}, ValueError, "padding"),
        ({"padding": (1, 1, 1)}, TypeError, "padding"),
        ({"input": torch.randn(2, 8, 2, 6), "padding": 0}, ValueError, "input: got 2 x 6 pixels"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"eps": "small"}, TypeError, "eps"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu'"),
        ({"prologue": (1, 2)}, TypeError, "prologue"),
        ({"prologue": Prologue(torch.ones(7), torch.ones(8))}, ValueError, "prologue.scale"),
        (
            {"prologue": Prologue(torch.ones(8), torch.ones(8), "tanh")},
            ValueError,
            "prologue.activation",
        ),
        ({"input": torch.randn(1, 8, 1, 1), "training": True}, ValueError, "input"),
    ],
)
def test_bad_input_is_named(changes, error, words) -> None:
    """Whatever is wrong is said before any kernel runs, by the argument's name."""
    with pytest.raises(error, match=words):
        _call(**changes)


def test_demanded_backend_that_cannot() -> None:
    """A demanded backend that cannot take a call says why, and nothing else runs in its place."""
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was demanded, but"):
        _call()
    with pytest.raises(ValueError, match="name: got 'tpu'"), use_backend("tpu"):
        pass


def test_kernels_survive_wrong_tensors() -> None:
    """The C++ entry refuses what would read out of bounds, whoever calls it."""
    ones = torch.ones(8)
    image = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    good = {
        "input": image, "weight": torch.randn(8, 1, 3, 3), "mean": ones, "var": ones,
        "bn_weight": None, "bn_bias": None, "eps": 1e-5, "stride": 1, "padding": (1, 1, 1, 1),
        "activation": 3, "prologue_scale": None, "prologue_shift": None, "prologue_activation": 0,
        "pool": False,
    }  # fmt: skip
    function = torch.ops.effnet_kernels.depthwise_conv_bn_act
    function(*good.values())
    wrong = [
        {"input": torch.randn(8, 6, 6)},
        {"input": image.double()},
        {"input": torch.randn(1, 8, 0, 6)},
        {"weight": torch.randn(7, 1, 3, 3)},
        {"weight": torch.randn(8, 1, 4, 4)},
        {"weight": torch.randn(8, 9)},
        {"mean": torch.ones(3)},
        {"var": torch.ones(8, dtype=torch.int64)},
        {"stride": 0},
        {"padding": (9, 1, 1, 1)},
        {"padding": (-1, 1, 1, 1)},
        {"activation": 99},
        {"prologue_scale": ones},
    ]
    for change in wrong:
        with pytest.raises(RuntimeError):
            function(*{**good, **change}.values())
    # The same argument checks serve the kernels that fill tensors of the caller's.
    gradients = {
        "grad_output": image, "grad_pooled": None, "conv": image, "mean": ones, "var": ones,
        "bn_weight": None, "bn_bias": None, "eps": 1e-5, "batch_stats": True,
        **{name: good[name] for name in ("input", "weight", "stride", "padding", "activation")},
        "prologue_scale": None, "prologue_shift": None, "prologue_activation": 0,
        "needs_input": True, "needs_weight": True,
    }  # fmt: skip
    backward = torch.ops.effnet_kernels.depthwise_conv_bn_act_backward
    backward(*gradients.values())
    for change in ({"grad_output": torch.randn(1, 8, 60, 60)}, {"grad_pooled": torch.ones(1, 3)}):
        with pytest.raises(RuntimeError):
            backward(*{**gradients, **change}.values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_opcheck(training: bool, pool: bool, kernel_backend: str) -> None:
    """Schemas, fakes (with strides) and autograd registration hold for the registered ops."""
    device = device_of(kernel_backend)
    image = torch.randn(2, 8, 7, 5, device=device).contiguous(memory_format=torch.channels_last)
    weight, ones = torch.randn(8, 1, 3, 3, device=device), torch.ones(8, device=device)
    tail = (1e-3, 2, [1, 1, 1, 1], 3, None, None, 0, pool)
    ops = (
        torch.ops.effnet_kernels_triton if kernel_backend == "triton" else torch.ops.effnet_kernels
    )
    torch.library.opcheck(
        ops.depthwise_conv_bn_act.default, (image, weight, ones, ones, ones, ones, *tail)
    )
    leaves = [t.detach().clone().requires_grad_() for t in (image, weight, ones, ones)]
    frozen = (None, None) if training else (ones, ones)
    torch.library.opcheck(
        ops.depthwise_conv_bn_act_train.default,
        (leaves[0], leaves[1], *frozen, leaves[2], leaves[3], *tail),
    )
    conv = torch.randn(2, 8, 4, 3, device=device).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        ops.depthwise_conv_bn_act_backward.default,
        (
            conv, torch.randn(2, 8, device=device) if pool else None, conv, ones, ones, ones, ones,
            1e-3, training, image, weight, *tail[1:7], True, True,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(training: bool) -> None:
    """One graph, the same numbers, forward and backward, no recompilation for a new batch size."""
    weight = torch.randn(8, 1, 5, 5, requires_grad=True)
    mean, var = torch.zeros(8), torch.ones(8)

    def function(image):
        result = depthwise_conv_bn_act(
            image, weight, mean, var, None, None, 2, "same", training=training
        )
        return result.output * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (2, 3, 4):
        image = torch.randn(batch, 8, 9, 9, requires_grad=True)
        expected, result = function(image), compiled(image)
        torch.testing.assert_close(result, expected)
        grads = [torch.autograd.grad(y.square().sum(), (image, weight)) for y in (expected, result)]
        torch.testing.assert_close(grads[1], grads[0])
    torch._dynamo.reset()


def test_export_non_strict() -> None:
    """``torch.export`` keeps the op, and the exported program gives the same numbers."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 1, 3, 3))
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, image):
            return depthwise_conv_bn_act(image, self.weight, self.mean, self.var, stride=2).output

    block, image = Block(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        exported = torch.export.export(block, (image,), strict=False)
        assert any("effnet_kernels" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(image), block(image))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low: torch.dtype) -> None:
    """Under autocast the op computes in the lower precision, with BN's vectors in float32."""
    image, weight, ones = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.ones(8)
    with torch.autocast("cpu", low):
        output = depthwise_conv_bn_act(image, weight, ones, ones, ones, ones, padding=1).output
    expected = depthwise_conv_bn_act(
        image.to(low), weight.to(low), ones, ones, ones, ones, padding=1
    ).output
    assert output.dtype == low
    torch.testing.assert_close(output, expected)


def test_disable_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """``EFFNET_KERNELS_DISABLE`` sends calls to PyTorch's own ops, demanded backend or not."""
    monkeypatch.setattr(effnet_kernels.backends, "_disabled", True)
    with use_backend("cpu"), torch.profiler.profile() as profile:
        _call()
    names = {event.key for event in profile.key_averages()}
    assert not any(name.startswith("effnet_kernels") for name in names)
    assert any("conv" in name for name in names)
    assert effnet_kernels.backends.select("op", torch.ones(1)) == "eager"
