"""The suite of whole models, on a small image."""

from __future__ import annotations

import pytest
import torch

import effnet_kernels
from effnet_kernels.bench import command, models

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("mode", "dtype"), [("inference", torch.bfloat16), ("training", torch.float32)]
)
def test_converted_model_is_right(mode: str, dtype: torch.dtype) -> None:
    """Stock and converted run, and the converted one keeps the error rule."""
    problem = models.Problem("test_efficientnet", 64, 2, dtype, mode)
    rows = models.match(problem, CPU, only=["cpu"]).check()
    assert [row.contender for row in rows] == ["eager", "cpu"]
    for row in rows:
        assert row.failed is None, row.failed
        assert not row.wrong, (row.contender, row.excess, row.errors)
    assert set(rows[1].errors) == ({"logits", "grad"} if mode == "training" else {"logits"})


def test_exact_gradients() -> None:
    """The yardstick, which recomputes activations to save memory, is the plain float64 model's."""
    problem = models.Problem("test_efficientnet", 64, 2, torch.float32, "training")
    match = models.match(problem, CPU, only=[])
    plain = models.create(problem.model).double().train()
    images = match.contenders[0].inputs[0].images.double()
    logits = plain(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(2))
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    torch.testing.assert_close(match.exact["logits"], logits)
    torch.testing.assert_close(match.exact["grad"], torch.cat([g.flatten() for g in gradients]))


def test_logits_are_meaningful() -> None:
    """Calibrated BN statistics keep the activations' scale up to the classifier."""
    with torch.no_grad():
        logits = models.create("test_efficientnet")(torch.randn(2, 3, 64, 64))
    assert logits.std() > 0.01


def test_resolved() -> None:
    """A model's spelling on the command line."""
    assert models.resolved("efficientnet_b0@96") == ("efficientnet_b0", 96)
    assert models.resolved("efficientnet_b4")[1] == 320
    assert [models.resolved(spelling)[1] for spelling in models.MODELS] == [224, 380, 300, 384]
    with pytest.raises(ValueError, match="timm has no 'efficientnet_c0'"):
        models.resolved("efficientnet_c0")
    with pytest.raises(ValueError, match="got size 'big'"):
        models.resolved("efficientnet_b0@big")


def test_flops() -> None:
    """EfficientNet-B0's published 0.39 billion multiplications, linear in the batch."""
    stock = models.create("efficientnet_b0")

    def flops(batch: int, mode: str) -> int:
        problem = models.Problem("efficientnet_b0", 224, batch, torch.float32, mode)
        return models.flops(stock, problem)

    forward = flops(1, "inference")
    assert forward / 2 == pytest.approx(0.39e9, rel=0.02)
    assert flops(4, "inference") == 4 * forward
    # Backward twice forward, depthwise convolutions too, but for the stem's gradient by the images.
    stem = 2 * 32 * 3 * 3 * 3 * 112 * 112
    assert flops(2, "training") == 2 * (3 * forward - stem)
    assert all(parameter.device == CPU for parameter in stock.parameters())


def test_row_has_the_flops() -> None:
    """Every row of a problem; 16-bit ones have no other arithmetic."""
    counted = set()
    for dtype in (torch.float32, torch.bfloat16):
        problem = models.Problem("test_efficientnet", 64, 2, dtype, "inference")
        match = models.match(problem, CPU, only=[])
        counted |= {row.flops for row in match.check()}
    assert len(counted) == 1
    assert counted.pop() == models.flops(models.create("test_efficientnet"), problem)


def test_compiled_without_frozen_parameters_is_right() -> None:
    """``compile-unfrozen`` gives the model's numbers."""
    problem = models.Problem("a convolution", 8, 2, torch.float32, "inference")
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.SiLU()]
    stock = torch.nn.Sequential(*layers, torch.nn.Flatten()).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    row = models.match_on(stock, images, problem, CPU, only=["compile-unfrozen"]).check()[1]
    assert row.contender == "compile-unfrozen"
    assert row.failed is None, row.failed
    assert not row.wrong, (row.excess, row.errors)


@pytest.mark.parametrize("name", ["cpu+prepared", "onnxruntime"])
def test_nothing_is_packed_under_autocast(name: str) -> None:
    """A prepared model would run as a converted one there, under another name."""
    problem = models.Problem("test_efficientnet", 64, 2, torch.bfloat16, "inference-autocast")
    match = models.match(problem, CPU, only=[name])
    assert [contender.name for contender in match.contenders] == ["eager"]


@pytest.mark.parametrize("mode", models.MODES)
def test_prepared(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cpu+prepared`` is what ``prepare`` makes of the stock model, in inference only."""
    prepared = []

    def prepare(model: torch.nn.Module) -> torch.nn.Module:
        prepared.append(model)
        return model

    monkeypatch.setattr(effnet_kernels, "prepare", prepare)
    problem = models.Problem("test_efficientnet", 64, 2, torch.float32, mode)
    match = models.match(problem, CPU, only=["cpu+prepared"])
    names = [contender.name for contender in match.contenders]
    if mode.startswith("training"):
        assert names == ["eager"]
        assert not prepared
    else:
        assert names == ["eager", "cpu+prepared"]
        assert not prepared[0].training


def test_contenders_on_the_command_line() -> None:
    """What ``--only`` takes for whole models."""
    names = command._contenders(models, CPU)
    assert {"eager", "compile", "compile-unfrozen", "onnxruntime", "openvino", "cpu"} < {*names}
    assert names[-3:] == ["cpu", "cpu+prepared", "cpu+compile"]
    command.check_only(["onnxruntime", "openvino", "compile-unfrozen"], models, CPU)
    # What takes minutes runs where it is asked for.
    assert {*names} - {*command._affordable(models, CPU)} == {"compile-max", "xla"}
    with pytest.raises(ValueError, match="got 'onnx', expected some of eager"):
        command.check_only(["onnx"], models, CPU)
