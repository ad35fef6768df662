"""Stages measured in both ways, and the tables chosen from them."""

from __future__ import annotations

import itertools
from pathlib import Path

import effnet
import pytest
import torch
from effnet import search
from effnet.__main__ import main
from effnet.description import describe
from effnet.search import Cost, StageCosts

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = effnet.VARIANTS["efficientnetv2_b0"].stages


def measured(seconds: list[tuple[float, float]], parameters: list[tuple[int, int]]) -> list:
    """As if stages had those costs, (MBConv, fused)."""
    return [
        StageCosts(stage, 8, Cost(s[0], p[0]), Cost(s[1], p[1]))
        for stage, s, p in zip(STAGES, seconds, parameters, strict=False)
    ]


def test_choice_without_a_budget() -> None:
    """The faster of each stage."""
    costs = measured([(2, 1), (1, 3), (2, 2.5)], [(1, 9), (1, 9), (1, 9)])
    assert [stage.fused for stage in search.choose(costs)] == [True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_choice_is_the_best_within_a_budget(seed: int) -> None:
    """Against all tables."""
    generator = torch.Generator().manual_seed(seed)
    seconds = (torch.rand(6, 2, generator=generator) + 0.1).tolist()
    sizes = torch.randint(1, 9, (6, 2), generator=generator).tolist()
    costs = measured([tuple(s) for s in seconds], [tuple(p) for p in sizes])
    tables = [
        (
            sum(s[f] for s, f in zip(seconds, fused, strict=True)),
            sum(p[f] for p, f in zip(sizes, fused, strict=True)),
        )
        for fused in itertools.product((0, 1), repeat=6)
    ]

    def cost(stages: tuple[effnet.Stage, ...]) -> tuple[float, int]:
        fused = [stage.fused for stage in stages]
        return (
            sum(s[f] for s, f in zip(seconds, fused, strict=True)),
            sum(p[f] for p, f in zip(sizes, fused, strict=True)),
        )

    least_size = min(p for _, p in tables)
    budget = least_size + 3
    time, size = cost(search.choose(costs, most_parameters=budget))
    assert size <= budget
    assert time == pytest.approx(min(s for s, p in tables if p <= budget))
    limit = 1.2 * min(s for s, _ in tables)
    time, size = cost(search.choose(costs, most_seconds=limit))
    assert time <= limit
    assert size == min(p for s, p in tables if s <= limit)
    with pytest.raises(ValueError, match=r"budget: no table.*the smallest has"):
        search.choose(costs, most_parameters=least_size - 1)


def test_ways() -> None:
    """A stage in the other way and back has the same shapes."""
    for stage in STAGES:
        fused, mbconv = search.as_fused(stage), search.as_mbconv(stage)
        assert fused.fused and not mbconv.fused
        assert fused.squeeze == 0 and mbconv.squeeze == 0.25
        assert (fused.channels, fused.layers, fused.stride) == (
            mbconv.channels, mbconv.layers, mbconv.stride,
        )  # fmt: skip


def test_measure() -> None:
    """Every stage in both ways, with the parameters of the network that has it so."""
    table = effnet.VARIANTS["efficientnetv2_b0"]._replace(width=0.5, depth=0.3, resolution=32)
    found = search.measure(table, device=torch.device("cpu"), seconds=0.02)
    stages = effnet.scaled(table).stages
    assert [costs.resolution for costs in found] == [16, 8, 4, 2, 2, 1]
    assert all(cost.seconds > 0 for costs in found for cost in costs[2:])
    network = effnet.EfficientNet(
        tuple(map(search.as_fused, stages)), stem_channels=16, head_channels=64
    )
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in network.stages]
    assert [costs.fused.parameters for costs in found] == sizes


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a stage, a plot, and budgets."""
    words = ["search", "--model", "efficientnetv2_b0", "--resolution", "32", "--seconds", "0.02"]
    assert main([*words, "--plot", str(tmp_path / "stages.png")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 6 + 1
    assert all(line.split()[-1] in ("fused", "mbconv") for line in out[1:7])
    assert (tmp_path / "stages.png").stat().st_size > 1000
    chosen = tmp_path / "mine.json"
    assert main([*words, "--most-parameters", "7", "--out", str(chosen)]) == 0
    printed = capsys.readouterr().out.splitlines()
    table = describe(str(chosen)).variant
    assert (table.resolution, table.train_resolution) == (32, None)
    stages = table.stages
    assert [stage.fused for stage in stages] == [
        line.split()[-1] == "fused" for line in printed[1:7]
    ]
    assert main([*words, "--most-parameters", "0.1"]) == 2
    assert "budget: no table is within it" in capsys.readouterr().err
