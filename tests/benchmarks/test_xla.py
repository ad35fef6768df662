"""XLA as a peer: the model's own numbers in every mode, and the reasons where there are none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from effnet_kernels.bench import models, xla
from effnet_kernels.bench.results import Row

CPU = torch.device("cpu")
MODES = [(mode, torch.float32) for mode in ("inference", "training")]
MODES += [(mode, torch.bfloat16) for mode in models.MODES]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as XLA takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


def row_of(model: str, dtype: torch.dtype = torch.float32, mode: str = "inference") -> Row:
    """XLA's row without times; on a smaller image BN would be over two values."""
    problem = models.Problem(model, 64, 2, dtype, mode)
    rows = {row.contender: row for row in models.match(problem, CPU, only=["xla"]).check()}
    assert set(rows) == {"eager", "xla"}
    return rows["xla"]


@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_modes(mode: str, dtype: torch.dtype) -> None:
    """Logits and gradients keep the rule that ours keep: computed in the dtype, and not worse."""
    pytest.importorskip("jax")
    row = row_of("test_efficientnet", dtype, mode)
    assert row.failed is None, row.failed
    assert not row.wrong, (row.excess, row.errors)
    assert set(row.errors) == ({"logits", "grad"} if mode.startswith("training") else {"logits"})
    assert (row.errors["logits"].largest > 1e-4) == (dtype == torch.bfloat16)
    # What it holds is not of PyTorch's allocator.
    assert row.peak_memory is None


@pytest.mark.parametrize(
    "model", ["mobilenetv3_small_050", "tf_mobilenetv3_small_minimal_100", "efficientnet_lite0"]
)
def test_operators(model: str) -> None:
    """Hard-swish and its gate, padding as TensorFlow's, ReLU, ReLU6."""
    pytest.importorskip("jax")
    row = row_of(model)
    assert row.failed is None, row.failed
    assert row.errors["logits"].largest < 1e-5


def test_running_statistics_stay() -> None:
    """A step is no training of the model."""
    pytest.importorskip("jax")
    model = models.create("test_efficientnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call = xla.lazy_call(model, None)
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    first, again = call(images, classes), call(images, classes)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_operator_is_named() -> None:
    """A model of something else is no wrong answer."""
    pytest.importorskip("jax")
    call = xla.lazy_call(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()).eval(), None)
    with pytest.raises(xla.UnavailableError, match=r"aten\.gelu\.default has no counterpart"):
        call(torch.randn(1, 3, 4, 4))


def test_other_number_of_threads_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU XLA takes every processor, or as many as it is told, and never fewer for PyTorch's
    sake.
    """
    pytest.importorskip("jax")
    monkeypatch.setenv("PJRT_NPROC", "37")
    row = row_of("test_efficientnet")
    assert row.failed is not None
    assert row.failed.startswith("UnavailableError: it runs 37 threads where ")


def test_missing_device_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of PyTorch's that JAX has no plugin for."""
    jax = pytest.importorskip("jax")

    def devices(kind: str) -> None:
        raise RuntimeError(f"Unknown backend {kind}")

    monkeypatch.setattr(jax, "devices", devices)
    row = row_of("test_efficientnet")
    assert row.failed == "UnavailableError: JAX has no cpu: Unknown backend cpu"


def test_missing_package_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and the row says what to install."""
    monkeypatch.setitem(sys.modules, "jax", None)
    row = row_of("test_efficientnet")
    assert row.failed is not None
    assert row.failed.startswith("UnavailableError: jax does not import")
    assert "pip install 'effnet_kernels[peers]'" in row.failed
