"""ONNX Runtime and OpenVINO as peers: their numbers, and the reasons where there are none."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from effnet_kernels.bench import engines, models
from effnet_kernels.bench.results import Row

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MODEL = "mobilenetv3_small_050"
BOTH = pytest.mark.parametrize("name", engines.ENGINES)


def row_of(name: str, dtype: torch.dtype, mode: str = "inference") -> Row:
    """An engine's row on a small image, without times."""
    problem = models.Problem(MODEL, 32, 2, dtype, mode)
    rows = {row.contender: row for row in models.match(problem, CPU, only=[name]).check()}
    assert set(rows) == {"eager", name}
    return rows[name]


@BOTH
def test_float32(name: str) -> None:
    """The model's logits. A slip of layout, padding or weights would show at a hundredth."""
    pytest.importorskip("onnx")
    pytest.importorskip(name)
    row = row_of(name, torch.float32)
    assert row.failed is None, row.failed
    assert row.errors["logits"].largest < 1e-5
    # What it holds is not of PyTorch's allocator.
    assert row.peak_memory is None


def test_onnxruntime_refuses_bfloat16() -> None:
    """It would compute in float32."""
    pytest.importorskip("onnxruntime")
    row = row_of("onnxruntime", torch.bfloat16)
    assert row.failed is not None
    assert "has no convolution in torch.bfloat16" in row.failed


def test_openvino_computes_in_bfloat16_or_says_why_not() -> None:
    """Float32 under the name of bfloat16 would be a hundred times closer than one rounding."""
    pytest.importorskip("onnx")
    openvino = pytest.importorskip("openvino")
    row = row_of("openvino", torch.bfloat16)
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert row.failed is None, row.failed
        assert 1e-4 < row.errors["logits"].largest < 0.1
    else:
        assert row.failed == "UnavailableError: it does not compute in bf16 on this CPU"


class _Compiled:
    """A compiled model that took other settings than it was given."""

    def __init__(self, precision: str, threads: int) -> None:
        self.properties = {
            "INFERENCE_PRECISION_HINT": type("Type", (), {"to_string": lambda _: precision})(),
            "INFERENCE_NUM_THREADS": threads,
        }

    def get_property(self, name: str) -> Any:
        return self.properties[name]


@pytest.mark.parametrize(
    ("precision", "threads", "words"),
    [("f32", 1, "computes in f32 where bf16 is asked for"),
     ("bf16", 2, "runs 2 threads where 1 are asked for")],
)  # fmt: skip
def test_openvino_checks_what_it_got(
    precision: str, threads: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hint that the plugin replaces is a failure, although the model would run."""

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "BF16"]

        def read_model(self, file: Any) -> None:
            return None

        def compile_model(self, *arguments: Any) -> _Compiled:
            return _Compiled(precision, threads)

    package = type("openvino", (), {"Core": Core})
    monkeypatch.setitem(sys.modules, "openvino", package)  # type: ignore[arg-type]
    monkeypatch.setattr(engines, "onnx_file", lambda model, images: b"")
    row = row_of("openvino", torch.bfloat16)
    assert row.failed is not None
    assert words in row.failed


@BOTH
def test_missing_package_is_a_failed_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and the row says what to install."""
    monkeypatch.setitem(sys.modules, name, None)
    row = row_of(name, torch.float32)
    assert row.failed is not None
    assert row.failed.startswith(f"UnavailableError: {name} does not import")
    assert "pip install 'effnet_kernels[peers]'" in row.failed
    assert not row.wrong


def test_inference_only() -> None:
    """None of them has a training step, nor has the compiled model without frozen parameters."""
    problem = models.Problem(MODEL, 32, 2, torch.float32, "training")
    only = [*engines.ENGINES, "compile-unfrozen"]
    match = models.match(problem, CPU, only=only)
    assert [contender.name for contender in match.contenders] == ["eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_the_others(dtype: torch.dtype) -> None:
    """Float32 and NCHW, in memory of their own, but the numbers that eager is given."""
    problem = models.Problem(MODEL, 32, 2, dtype, "inference")
    match = models.match(problem, CPU, only=[*engines.ENGINES, "eager-nchw"])
    sets = {contender.name: contender.inputs[0].images for contender in match.contenders}
    for name in engines.ENGINES:
        assert sets[name].dtype == torch.float32
        assert sets[name].is_contiguous()
        assert torch.equal(sets[name], sets["eager"].float())
    pointers = [images.data_ptr() for images in sets.values()]
    assert len(set(pointers)) == len(pointers)


def test_forward_takes_what_it_is_called_with() -> None:
    """The engine is made once, in the first call, from a copy in float32 of the model as it was."""
    made = []

    def engine(model: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Any:
        made.append((next(model.parameters()).dtype, images.shape, dtype))
        return lambda batch: batch + 1

    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines.ENGINES, "openvino", engine)
        forward = engines.lazy_forward("openvino", model, torch.bfloat16)
        assert made == []
        for _ in range(2):
            assert torch.equal(forward(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    assert made == [(torch.float32, (1, 2), torch.bfloat16)]
    assert model.weight.dtype == torch.bfloat16
