"""A small EfficientNet learns the digits, through the fused op and through PyTorch's own ops."""

from __future__ import annotations

import effnet
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from effnet_kernels import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, EPOCHS, TEST = 64, 12, 360
STAGES = (
    effnet.Stage(expand=1, kernel_size=3, stride=1, channels=32, layers=1),
    effnet.Stage(expand=4, kernel_size=3, stride=2, channels=48, layers=1),
    effnet.Stage(expand=4, kernel_size=5, stride=2, channels=80, layers=2),
)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits as (N, 1, 8, 8) images and their labels, in a fixed random order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def train(backend: str) -> tuple[list[float], float]:
    """The loss at every step and the accuracy at the end, from seed 0."""
    images, labels = digits()
    torch.manual_seed(0)
    model = effnet.EfficientNet(
        effnet.scale_stages(STAGES, 0.5, 1.0),
        10,
        1,
        stem_channels=16,
        head_channels=640,
        stem_stride=1,
        drop_rate=0.1,
        drop_path_rate=0.05,
    ).to(memory_format=torch.channels_last)
    steps = EPOCHS * ((len(images) - TEST) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    losses = []
    with use_backend(backend):
        for _ in range(EPOCHS):
            order = torch.randperm(len(images) - TEST) + TEST
            for index in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
                noisy = images[index] + 0.4 * torch.randn(BATCH, *images.shape[1:])
                loss = F.cross_entropy(model(noisy), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            right = model(images[:TEST]).argmax(1) == labels[:TEST]
    return losses, right.float().mean().item()


def test_digits() -> None:
    """Both runs start from the same weights and draw the same random numbers.

    They differ by rounding alone, some 1e-7 of the loss in a step. Each step hands its error to
    all later ones, and how fast it grows depends on the path: here it stays below 1e-6 over the
    first 30 steps. So those must agree to 1e-4, which no wrong gradient survives, and the means
    over an epoch to 5 %; both must learn.
    """
    fused, accuracy = train("cpu")
    stock, stock_accuracy = train("eager")
    fused_curve, stock_curve = torch.tensor(fused), torch.tensor(stock)
    torch.testing.assert_close(fused_curve[:30], stock_curve[:30], rtol=1e-4, atol=0.0)
    by_epoch = [curve.view(EPOCHS, -1).mean(1) for curve in (fused_curve, stock_curve)]
    torch.testing.assert_close(*by_epoch, rtol=0.05, atol=0.01)
    assert by_epoch[0][-1] < 0.1 * by_epoch[0][0]
    assert accuracy >= 0.97, accuracy
    assert stock_accuracy >= 0.97, stock_accuracy
