"""The table of measured tiles: what a launcher finds in it, and what the tuner would try."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from effnet_kernels.__main__ import main
from effnet_kernels.bench import tune
from effnet_kernels.triton import fused_mbconv, tiles
from effnet_kernels.triton.fused_mbconv import fused_plan
from effnet_kernels.triton.launch import Hardware, hardware
from effnet_kernels.triton.pointwise_conv_bn_act import pointwise_plan, usual_tile

PROBLEM = tiles.Problem(50176, 480, 112, 2, transformed=True)
TILE = tiles.Tile(128, 64, 128, 8, 3)
BLOCK = tiles.BlockProblem(294912, 3, 64, 256, 64, 2, precise=False)
BLOCK_TILE = tiles.Tile(128, 64, 256, 8, 4)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A table of one architecture, with one problem of an op."""
    sections = {
        op: [{"problem": problem._asdict(), "tile": tile._asdict(), "microseconds": 1.0}]
        for op, problem, tile in (
            ("pointwise_conv_bn_act", PROBLEM, TILE),
            ("fused_mbconv", BLOCK, BLOCK_TILE),
        )
    }
    (tmp_path / "sm_99.json").write_text(json.dumps(sections))
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    caches = (tiles._table, tiles._nearest)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("table")
def test_measured() -> None:
    """A problem that differs in the number of pixels alone, and not by much, has its tile."""
    assert tiles.measured("sm_99", PROBLEM) == TILE
    assert tiles.measured("sm_99", PROBLEM._replace(pixels=50176 * 4)) == TILE
    assert tiles.measured("sm_99", PROBLEM._replace(pixels=50176 * 5)) is None
    assert tiles.measured("sm_99", PROBLEM._replace(pixels=0)) is None
    assert tiles.measured("sm_99", PROBLEM._replace(transformed=False)) is None
    assert tiles.measured("sm_98", PROBLEM) is None
    assert tiles.measured(None, PROBLEM) is None
    with tiles.force(TILE._replace(warps=4)):
        assert tiles.measured(None, PROBLEM) == TILE._replace(warps=4)
    assert tiles.measured(None, PROBLEM) is None


@pytest.mark.usefixtures("table")
def test_measured_of_another_op() -> None:
    """Each op has its problems, and a tile that is forced is one of an op."""
    assert tiles.measured("sm_99", BLOCK._replace(pixels=BLOCK.pixels // 4)) == BLOCK_TILE
    assert tiles.measured("sm_99", BLOCK._replace(kernel=5)) is None
    with tiles.force(TILE, tiles.BlockProblem):
        assert tiles.measured(None, BLOCK) == TILE
        assert tiles.measured(None, PROBLEM) is None
    plan = fused_plan(BLOCK, 128, 48, 48, 48, 48, False, Hardware(132, 232448, 9), BLOCK_TILE)
    assert (plan.block_p, plan.block_r, plan.block_m, plan.warps, plan.stages) == BLOCK_TILE


def test_no_gpu_has_no_architecture() -> None:
    """In the interpreter the formula decides."""
    assert tiles.architecture(torch.empty(1)) is None


@pytest.mark.parametrize("shape", [(256, 49, 1152, 320), (1, 196, 80, 480), (8, 12544, 32, 16)])
def test_plan_takes_the_tile(shape: tuple[int, int, int, int]) -> None:
    """Tiles decide how a product is cut, a formula where none is given."""
    batch, pixels, channels, features = shape
    options = (2, True, True, False, 132)
    plan = pointwise_plan(*shape, *options, TILE)
    assert (plan.block_p, plan.block_c, plan.block_k, plan.warps, plan.stages) == TILE
    assert plan.sliced == (channels > TILE.channels)
    problem = tiles.Problem(batch * pixels, channels, features, 2, transformed=True)
    assert pointwise_plan(*shape, *options, None) == pointwise_plan(
        *shape, *options, usual_tile(problem, 132)
    )


def test_candidates() -> None:
    """All of them fit; the formula's own is among them, up to its stages."""
    for problem in tune.problems(["efficientnet_b0"], [256], torch.bfloat16):
        found = list(tune.candidates(problem, hardware(torch.empty(0))))
        assert len(found) == len(set(found)) >= 4
        for tile in found:
            assert tile.pixels * tile.features <= 128 * 32 * tile.warps
            assert tile.channels < 2 * max(problem.channels, 16)
        usual = usual_tile(problem, 132)
        assert any(usual[:3] == tile[:3] for tile in found), problem


def test_committed_tables() -> None:
    """What is in the package can be read."""
    for path in tiles.FOLDER.glob("*.json"):
        assert tiles._table(path.stem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "efficientnet_b0", "--jobs", "2"], "needs an NVIDIA GPU and Triton"),
        (["--models", "efficientnet_b9"], "--models: got 'efficientnet_b9'"),
    ],
)
def test_tune_says_what_it_needs(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and a status."""
    assert main(["tune", *options]) == 2
    assert words in capsys.readouterr().err


def test_problems() -> None:
    """Every product of a model, at every batch size."""
    one, two = (tune.problems(["efficientnet_b0"], n, torch.bfloat16) for n in ([256], [256, 1]))
    assert len(one) == 19
    assert len(two) == 38
    blocks = [
        key
        for key in tune.problems(["efficientnetv2_s"], [8], torch.bfloat16)
        if isinstance(key, tiles.BlockProblem)
    ]
    assert len(blocks) == 5
    for key in blocks:
        found = list(tune.candidates(key, hardware(torch.empty(0))))
        assert fused_mbconv.usual_tile(key, hardware(torch.empty(0))) in found
