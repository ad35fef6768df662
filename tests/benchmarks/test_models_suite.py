"""The suite of whole models, on a small image."""

from __future__ import annotations

import pytest
import torch

from effnet_kernels.bench import models

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
