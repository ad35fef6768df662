"""Fused-MBConv as one op on every kernel backend that can run here, against float64 and eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import FORWARD, assert_error_rule
from devices import device_of, interpreted, skip_in_interpreter
from ops.block_cases import Case, Draw, in_double
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import SqueezeExcite, fused_mbconv

CASES = [
    Case(2, 16, 64, 16, 12, 14, residual=True),
    Case(2, 24, 24, 0, 9, 13, padding=1, residual=True),
    Case(3, 8, 32, 16, 11, 9, kernel=5, stride=2, squeezed=4, activation="relu"),
    Case(2, 13, 29, 11, 7, 10, stride=2, residual=False),
    Case(1, 48, 192, 48, 7, 7, padding=1, residual=True),
    Case(2, 12, 36, 12, 6, 6, padding=1, squeezed=3, residual=True, activation="hardswish"),
    Case(1, 3, 24, 0, 12, 11, stride=2, padding=(1, 0, 1, 0), activation="relu6"),
    Case(4, 8, 24, 8, 5, 6, padding=1, residual=True, layout="contiguous", affine=False),
    Case(2, 5, 17, 33, 1, 1, padding=1, project_activation="relu6"),
    Case(1, 7, 20, 7, 6, 5, kernel=5, padding=2, residual=True, activation="identity"),
    Case(1, 4, 8, 4, 8, 8, kernel=7, padding=3, residual=True),
    # Stems.
    Case(1, 3, 32, 0, 17, 19, stride=2, padding=1),
    Case(3, 3, 24, 0, 17, 18, stride=2),
    Case(3, 3, 40, 0, 18, 20, stride=2, activation="hardswish"),
    Case(1, 3, 48, 0, 16, 16, stride=2),
    Case(2, 1, 32, 0, 17, 19, stride=2, padding=1),
    Case(2, 4, 24, 0, 9, 8, stride=2),
    Case(2, 5, 40, 0, 9, 8, stride=2, padding=1),
]


def make_arguments(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The call's arguments by name."""
    draw = Draw(case, dtype, device)
    c, m, k = case.channels, case.expanded, case.kernel
    return {
        "input": draw.image(),
        "squeeze_excite": draw.squeeze_excite(m),
        "expand": draw.stage(m, c, k, k, fan=c * k * k, activation=case.activation),
        "project": draw.stage(case.features, m, 1, 1, fan=m, activation=case.project_activation)
        if case.features
        else None,
        "stride": case.stride,
        "padding": case.padding,
        "residual": case.residual,
    }


def run(arguments: dict[str, Any], backend: str) -> Tensor:
    """The block's output on ``backend``."""
    with use_backend(backend), torch.no_grad():
        return fused_mbconv(**arguments)


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The output is at most 2x eager's own error from float64."""
    arguments = make_arguments(case, dtype, device_of(backend))
    ours, eager = run(arguments, backend), run(arguments, "eager")
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    exact = run(in_double(arguments), "eager")
    assert_error_rule(str(case), ours, eager, exact, dtype, FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, kernel_backend: str) -> None:
    """Every kind of block, ragged extents too."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    check(case, dtype, kernel_backend)


# (channels, expanded, features, kernel, stride, squeezed) of timm's and torchvision's models: the
# narrowest and the widest of each kind.
CONFIGURATIONS = [
    (24, 24, 0, 3, 1, 0),
    (32, 32, 0, 3, 1, 0),
    (24, 96, 48, 3, 2, 0),
    (48, 192, 48, 3, 1, 0),
    (64, 256, 64, 3, 1, 0),
    (96, 384, 96, 3, 1, 0),
    (128, 512, 128, 3, 1, 0),
    (32, 256, 48, 3, 2, 0),
    (48, 768, 96, 3, 2, 0),
    (16, 96, 24, 5, 2, 4),
    (40, 320, 40, 5, 1, 10),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("size", [(14, 14), (9, 7)], ids=str)
def test_configurations(
    size: tuple[int, int], configuration: tuple[int, ...], dtype: torch.dtype, kernel_backend: str
) -> None:
    """The widths of real models."""
    if interpreted(kernel_backend):
        pytest.skip("the interpreter is slow: tests/triton/test_fused_mbconv.py")
    channels, expanded, features, kernel, stride, squeezed = configuration
    residual = stride == 1 and features in (0, channels)
    case = Case(
        2, channels, expanded, features, *size, kernel=kernel, stride=stride, squeezed=squeezed,
        residual=residual, activation="relu" if squeezed else "silu",
    )  # fmt: skip
    check(case, dtype, kernel_backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads: int) -> None:
    """The same bits, however the rows are shared."""
    before = torch.get_num_threads()
    arguments = make_arguments(Case(2, 16, 40, 16, 40, 33, residual=True), torch.float32, "cpu")
    one = run({**arguments, "input": arguments["input"][:1]}, "cpu")
    torch.set_num_threads(threads)
    try:
        every = run(arguments, "cpu")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(every[:1], one, rtol=0, atol=0)


@pytest.mark.parametrize("height", [1, 2, 63, 64, 65, 130])
def test_bands(height: int) -> None:
    """An image is cut into bands of rows, which see their neighbours' rows."""
    check(Case(1, 3, 5, 4, height, 4, padding=1), torch.float32, "cpu")
    check(Case(1, 3, 5, 4, height + 3, 4, kernel=5, stride=2), torch.float32, "cpu")


@pytest.mark.parametrize("height", range(1, 8))
def test_tiles_of_two_by_two(height: int) -> None:
    """On the CPU a 3 x 3 convolution of stride 1 goes by tiles of 2 x 2 results, not all whole."""
    for width in range(1, 8):
        padding = ((1, 1, 1, 1), (0, 2, 2, 0), (2, 1, 1, 1), (2, 2, 2, 2))[(height + width) % 4]
        same = padding[0] + padding[2] == padding[1] + padding[3] == 2
        check(
            Case(2, 21, 37, 21, height, width, padding=padding, residual=same),
            torch.float32, "cpu",
        )  # fmt: skip
        check(
            Case(2, 19, 19, 0, height, width, padding=padding, residual=same, activation="relu"),
            torch.float32, "cpu",
        )  # fmt: skip
        check(Case(1, 16, 41, 9, height, width, padding=padding, squeezed=5), torch.float32, "cpu")


def test_what_is_not_finite_stays_in_its_windows() -> None:
    """A tile's transforms bring no NaN to results whose window does not have it."""
    arguments = make_arguments(Case(1, 16, 24, 0, 9, 8, padding=1), torch.float32, "cpu")
    clean = run(arguments, "cpu")
    for row, column in ((0, 0), (3, 4), (4, 3), (8, 7)):
        image = arguments["input"].clone()
        image[0, 5, row, column] = float("nan")
        output = run({**arguments, "input": image}, "cpu")
        inside = torch.zeros(9, 8, dtype=torch.bool)
        inside[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
        assert output[..., inside].isnan().all()
        assert torch.equal(output[..., ~inside], clean[..., ~inside])


def test_float64() -> None:
    """float64 tensors are computed in float64."""
    for case in (CASES[0], CASES[2], CASES[6]):
        arguments = in_double(make_arguments(case, torch.float32, "cpu"))
        ours, exact = run(arguments, "cpu"), run(arguments, "eager")
        assert torch.allclose(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_empty(case: Case, kernel_backend: str) -> None:
    """An empty batch gives an empty batch."""
    arguments = make_arguments(case, torch.float32, device_of(kernel_backend))
    image = arguments["input"]
    arguments["input"] = image.new_empty((0, *image.shape[1:]))
    output = run(arguments, kernel_backend)
    assert output.shape == run(arguments, "eager").shape


def test_layouts_of_the_weight(kernel_backend: str) -> None:
    """A channels-last weight is the same weight."""
    arguments = make_arguments(CASES[7], torch.float32, device_of(kernel_backend))
    expected = run(arguments, kernel_backend)
    expand = arguments["expand"]
    weight = expand.weight.contiguous(memory_format=torch.channels_last)
    result = run({**arguments, "expand": expand._replace(weight=weight)}, kernel_backend)
    assert torch.equal(result, expected)


def test_mixed_dtypes() -> None:
    """16-bit convolutions beside float32 squeeze-and-excitation and BN in 16 bits."""
    arguments = make_arguments(CASES[2], torch.bfloat16, "cpu")
    se = arguments["squeeze_excite"]
    arguments["squeeze_excite"] = SqueezeExcite(*(t.float() for t in se[:4]), *se[4:])
    expand = arguments["expand"]
    arguments["expand"] = expand._replace(
        running_mean=expand.running_mean.bfloat16(), bn_bias=expand.bn_bias.half()
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
        (lambda _: {"expand": None}, TypeError, "expand: got NoneType, expected a ConvBn"),
        (_conv("expand", weight=torch.zeros(64, 16)), ValueError, r"expand\.weight: got 2"),
        (_conv("expand", weight=torch.zeros(64, 15, 3, 3)), ValueError, r"expand\.weight: got"),
        (_conv("expand", weight=torch.zeros(64, 16, 3, 5)), ValueError, r"expand\.weight: got"),
        (_conv("expand", weight=torch.zeros(64, 16, 4, 4)), ValueError, "with k 3, 5 or 7"),
        (_conv("expand", running_var=None), TypeError, r"expand\.running_var: got None"),
        (_conv("expand", eps=-1.0), ValueError, r"expand\.eps: got -1"),
        (_conv("expand", activation="gelu"), ValueError, r"expand\.activation: got 'gelu'"),
        (_conv("project", weight=torch.zeros(16, 63)), ValueError, r"project\.weight: got shape"),
        (_conv("project", bn_bias=torch.zeros(3)), ValueError, r"project\.bn_bias: got shape"),
        (lambda _: {"squeeze_excite": 1}, TypeError, "squeeze_excite: got int"),
        (lambda _: {"stride": 3}, ValueError, "stride: got 3"),
        (lambda _: {"stride": 2}, ValueError, "residual: got True"),
        (lambda _: {"project": None}, ValueError, "residual: got True"),
        (lambda _: {"padding": 5}, ValueError, "padding: got 5"),
    ],
)
def test_errors(change: Any, error: type[Exception], message: str) -> None:
    """Bad arguments are named before anything runs."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            fused_mbconv(**{**arguments, **change(arguments)})


def test_squeeze_excite_needs_project() -> None:
    """The gate is project's prologue."""
    arguments = make_arguments(CASES[2], torch.float32, "cpu")
    with pytest.raises(ValueError, match="squeeze_excite: got a SqueezeExcite, expected None"):
        fused_mbconv(**{**arguments, "project": None})


def test_gradient_is_an_error(kernel_backend: str) -> None:
    """The op is for inference, and says so."""
    arguments = make_arguments(CASES[7], torch.float32, device_of(kernel_backend))
    arguments["input"].requires_grad_()
    with use_backend(kernel_backend):
        output = fused_mbconv(**arguments)
    with pytest.raises(RuntimeError, match="no derivative"):
        output.sum().backward()


def test_autocast() -> None:
    """Under autocast the op computes in the lower precision, as conv2d does."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused_mbconv(**{**arguments, "residual": False}).dtype == torch.bfloat16
        assert fused_mbconv(**arguments).dtype == torch.float32, "the residual's"


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_compiles_to_one_op(case: Case) -> None:
    """``torch.compile`` sees one op."""
    arguments = make_arguments(case, torch.float32, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(fused_mbconv, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments), fused_mbconv(**arguments))
    torch._dynamo.reset()
