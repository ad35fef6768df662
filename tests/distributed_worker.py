"""One process of the test of DistributedDataParallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch
from torch import nn


def run(rank: int, name: str, address: str, path: str) -> None:
    """Saves the gradients of a stock and of a converted model, averaged over the processes.

    Args:
        rank: of 2.
        name: of the model.
        address: where the processes meet.
        path: of the result, to which the rank is added.
    """
    from test_round_trip import images, make_models  # imports timm

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for model in make_models(name):
        replica = nn.parallel.DistributedDataParallel(model.train())
        logits = replica(images(rank))
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.save(results, f"{path}.{rank}")
    dist.destroy_process_group()
