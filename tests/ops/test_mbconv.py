"""MBConv as one op on every kernel backend that can run here, against float64 and eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import FORWARD, assert_error_rule, relative_errors
from devices import device_of, interpreted, skip_in_interpreter
from ops.block_cases import Case, Draw, in_double
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from effnet_kernels import backends, use_backend
from effnet_kernels.ops import SqueezeExcite, mbconv
from effnet_kernels.ops.mbconv_cost import expand_seconds, fuse_expand, halo

CASES = [
    Case(2, 16, 32, 16, 12, 14, squeezed=4, residual=True),
    Case(3, 16, 48, 24, 13, 9, kernel=5, stride=2, squeezed=4),
    Case(2, 24, 0, 16, 10, 7, squeezed=6),
    Case(1, 8, 24, 8, 7, 7, kernel=5, padding=2, residual=True, activation="hardswish"),
    Case(2, 13, 29, 11, 6, 5, stride=2, padding=(1, 0, 1, 0), squeezed=3, activation="relu"),
    Case(1, 5, 0, 3, 4, 3, kernel=7, padding=3, activation="relu6", affine=False),
    Case(2, 12, 20, 12, 1, 1, squeezed=2, residual=True),
    Case(4, 8, 16, 8, 5, 6, padding=1, residual=True, layout="contiguous"),
    Case(1, 40, 136, 33, 8, 8, stride=2, padding=1, squeezed=10, project_activation="relu6"),
    Case(3, 17, 0, 17, 9, 11, kernel=5, residual=True, activation="identity"),
]


def make_arguments(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The call's arguments by name."""
    draw = Draw(case, dtype, device)
    c, k, activation = case.expanded or case.channels, case.kernel, case.activation
    return {
        "input": draw.image(),
        "squeeze_excite": draw.squeeze_excite(c),
        "expand": draw.stage(c, case.channels, 1, 1, fan=case.channels, activation=activation)
        if case.expanded
        else None,
        "depthwise": draw.stage(c, 1, k, k, fan=k * k, activation=activation),
        "project": draw.stage(case.features, c, 1, 1, fan=c, activation=case.project_activation),
        "stride": case.stride,
        "padding": case.padding,
        "residual": case.residual,
    }


def run(arguments: dict[str, Any], backend: str) -> Tensor:
    """The block's output on ``backend``."""
    with use_backend(backend), torch.no_grad():
        return mbconv(**arguments)


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The output is at most 2x eager's own error from float64."""
    arguments = make_arguments(case, dtype, device_of(backend))
    ours, eager = run(arguments, backend), run(arguments, "eager")
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    exact = run(in_double(arguments), "eager")
    assert_error_rule(str(case), ours, eager, exact, dtype, FORWARD)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, fused: bool, kernel_backend: str) -> None:
    """Every kind of block, ragged extents too, with both ways to the depthwise result."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    if not fused and (kernel_backend == "cpu" or not case.expanded):
        pytest.skip("there is only one way")
    if (
        interpreted(kernel_backend)
        and not fused
        and not (case in CASES[:2] and dtype == torch.float32)
    ):
        pytest.skip("the interpreter is slow; the tests of the kernels have the rest")
    with fuse_expand(fused):
        check(case, dtype, kernel_backend)


@pytest.mark.parametrize("kernel", [3, 5])
def test_deep_products(kernel: int) -> None:
    """Sums over a thousand channels, as in the last stages: no worse than eager's own."""
    case = Case(2, 192, 1152, 192, 7, 7, kernel=kernel, squeezed=48, residual=True)
    arguments = make_arguments(case, torch.float32, "cpu")
    exact = run(in_double(arguments), "eager")
    ours, eager = (relative_errors(run(arguments, b), exact)[1] for b in ("cpu", "eager"))
    assert ours <= 1.5 * eager


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads: int) -> None:
    """The same bits, image by image or all threads on one."""
    before = torch.get_num_threads()
    arguments = make_arguments(CASES[1], torch.float32, "cpu")
    one = run({**arguments, "input": arguments["input"][:1]}, "cpu")
    torch.set_num_threads(threads)
    try:
        every = run(arguments, "cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(every[:1], one)


def test_float64() -> None:
    """float64 tensors are computed in float64."""
    for case in (CASES[1], CASES[4], CASES[5]):
        arguments = in_double(make_arguments(case, torch.float32, "cpu"))
        ours, exact = run(arguments, "cpu"), run(arguments, "eager")
        assert torch.allclose(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 16, 12, 14)], ids=str)
def test_empty(shape: tuple[int, ...], kernel_backend: str) -> None:
    """An empty batch gives an empty batch."""
    arguments = make_arguments(CASES[0], torch.float32, device_of(kernel_backend))
    arguments["input"] = arguments["input"].new_empty(shape)
    assert run(arguments, kernel_backend).shape == shape


def test_mixed_dtypes() -> None:
    """16-bit convolutions beside float32 squeeze-and-excitation and BN in 16 bits."""
    arguments = make_arguments(CASES[1], torch.bfloat16, "cpu")
    se = arguments["squeeze_excite"]
    arguments["squeeze_excite"] = SqueezeExcite(*(t.float() for t in se[:4]), *se[4:])
    depthwise = arguments["depthwise"]
    arguments["depthwise"] = depthwise._replace(
        running_mean=depthwise.running_mean.bfloat16(), bn_bias=depthwise.bn_bias.half()
    )
    ours = run(arguments, "cpu")
    exact = run(in_double(arguments), "eager")
    assert torch.allclose(ours.double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def _conv(name: str, **changes: Any) -> Any:
    return lambda arguments: {name: arguments[name]._replace(**changes)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda _: {"input": torch.zeros(2, 16, 5)}, ValueError, "input: got 3 dimensions"),
        (lambda _: {"expand": 3}, TypeError, "expand: got int, expected a ConvBn"),
        (_conv("expand", weight=torch.zeros(48, 15)), ValueError, r"expand\.weight: got shape"),
        (_conv("expand", running_var=None), TypeError, r"expand\.running_var: got None"),
        (_conv("depthwise", weight=torch.zeros(32, 1, 4, 4)), ValueError, "depthwise.weight: got"),
        (_conv("depthwise", weight=torch.zeros(40, 1, 3, 3)), ValueError, "depthwise.weight: got"),
        (_conv("depthwise", eps=-1.0), ValueError, r"depthwise\.eps: got -1"),
        (_conv("depthwise", activation="gelu"), ValueError, r"depthwise\.activation: got 'gelu'"),
        (_conv("project", bn_bias=torch.zeros(3)), ValueError, r"project\.bn_bias: got shape"),
        (_conv("squeeze_excite", gate="relu"), ValueError, "gate: got 'relu'"),
        (lambda _: {"squeeze_excite": 1}, TypeError, "squeeze_excite: got int"),
        (lambda _: {"stride": 3}, ValueError, "stride: got 3"),
        (lambda _: {"stride": 2}, ValueError, "residual: got True"),
        (lambda _: {"padding": 5}, ValueError, "padding: got 5"),
    ],
)
def test_errors(change: Any, error: type[Exception], message: str) -> None:
    """Bad arguments are named before anything runs, on the short way through Python too."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            mbconv(**{**arguments, **change(arguments)})


def test_gradient_is_an_error(kernel_backend: str) -> None:
    """The op is for inference, and says so."""
    arguments = make_arguments(CASES[0], torch.float32, device_of(kernel_backend))
    arguments["input"].requires_grad_()
    with use_backend(kernel_backend):
        output = mbconv(**arguments)
    with pytest.raises(RuntimeError, match="no derivative"):
        output.sum().backward()


def test_autocast() -> None:
    """Under autocast the op computes in the lower precision, as conv2d does."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert mbconv(**{**arguments, "residual": False}).dtype == torch.bfloat16
        assert mbconv(**arguments).dtype == torch.float32, "the residual's"


def test_compiles_to_one_op() -> None:
    """``torch.compile`` sees one op, whatever the size."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(mbconv, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments), mbconv(**arguments))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "batch", "demanded", "expected"),
    [
        ("pointwise_conv_bn_act_out", 256, None, "triton"),
        ("squeeze_excite_gate_out", 256, None, "triton"),
        ("depthwise_conv_bn_act_out", 256, None, "cuda"),
        ("pointwise_conv_bn_act_out", 1, None, "cuda"),
        ("pointwise_conv_bn_act_out", 256, "cuda", "cuda"),
    ],
)
def test_fastest_kernel(
    name: str, batch: int, demanded: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's where it measured faster, but never in place of what was demanded."""
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    with FakeTensorMode(), use_backend(demanded):
        image = torch.empty((batch, 480, 14, 14), dtype=torch.bfloat16, device="cuda")
        assert backends.fastest_kernel("cuda", name, image) is backends.kernel(expected, name)


def test_fastest_kernel_of_few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++ has 16-bit kernels of its own for them."""
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    name = "pointwise_conv_bn_act_out"
    for dtype, expected in ((torch.bfloat16, "cuda"), (torch.float32, "triton")):
        with FakeTensorMode():
            image = torch.empty((256, 480, 14, 14), dtype=dtype, device="cuda")
            kernel = backends.fastest_kernel("cuda", name, image, few_channels=True)
        assert kernel is backends.kernel(expected, name)


def test_cost_model() -> None:
    """Fused where launches are the time; what a tile's halo costs is in the estimate."""
    assert halo((14, 14), 5, 1) == 1.0
    assert halo((56, 56), 3, 1) == pytest.approx((18 / 16) ** 2)
    for batch, fuses in ((1, True), (256, False)):
        fused, separate = expand_seconds((batch, 16, 112, 112), 96, 3, 2, (56, 56), 2)
        assert (fused < separate) == fuses
    # Products on a machine without fast ones would not be worth computing twice.
    few, many = (expand_seconds((1, c, 7, 7), 64, 3, 1, (7, 7), 2)[0] for c in (8, 4096))
    assert few < many
