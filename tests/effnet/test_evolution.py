"""Evolution of stage tables: what mutations make, how the search goes and goes on."""

from __future__ import annotations

import random
from pathlib import Path

import effnet
import pytest
import torch
from effnet.__main__ import main
from effnet.data import digits
from effnet.description import Description, describe
from effnet.efficientnet import create_model
from effnet.evolution import Individual, Judgement, Proxy, Space, evolve, mutate, reward
from effnet.training import Phase, Recipe
from train_worker import few_digits

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = effnet.VARIANTS["efficientnetv2_b0"]._replace(
    width=0.25, depth=0.3, resolution=16, stem_stride=1
)
FIRST = effnet.scaled(BASE).stages
NETWORK = Description(BASE, 10, 1, mean=(0.5,), std=(0.5,))


def test_reward() -> None:
    """At the target the accuracy itself; twice the FLOPs cost 4.7 % of it."""
    assert reward(0.8, 1e9, 1e9) == pytest.approx(0.8)
    assert reward(0.8, 2e9, 1e9) == pytest.approx(0.8 * 2**-0.07)
    assert reward(0.8, 1e9, 1e9, weight=0) == 0.8
    with pytest.raises(ValueError, match="cost: got 0"):
        reward(0.8, 0, 1)


def test_mutations_change_one_thing() -> None:
    """Of one stage; all kinds of them occur, and every table can be built."""
    chooser = random.Random(0)
    changed = set()
    table = FIRST
    for _ in range(300):
        child = mutate(table, Space(), chooser)
        places = [i for i, (a, b) in enumerate(zip(table, child, strict=True)) if a != b]
        assert len(places) == 1
        before, after = table[places[0]], child[places[0]]
        names = {n for n in effnet.Stage._fields if getattr(before, n) != getattr(after, n)}
        kind = "fused" if "fused" in names else names.pop()
        assert kind == "fused" or not names
        changed.add(kind)
        assert after.stride == before.stride
        assert after.channels % 8 == 0 and after.channels >= 8
        assert 1 <= after.layers <= 6
        assert not after.fused or (after.kernel_size, after.squeeze) == (3, 0.0)
        table = child
    assert changed == {"expand", "kernel_size", "channels", "layers", "squeeze", "fused"}
    with torch.device("meta"):
        model = create_model(BASE._replace(stages=table, width=1.0, depth=1.0), 10, 1)
        assert model(torch.empty(2, 1, 16, 16)).shape == (2, 10)


def test_deep_stages_can_mutate() -> None:
    """One that has more layers than a mutation gives keeps them or loses some."""
    deep = (FIRST[0]._replace(layers=15),)
    chooser = random.Random(0)
    layers = {mutate(deep, Space(), chooser)[0].layers for _ in range(60)}
    assert layers == {14, 15}


def wanted(stages: tuple[effnet.Stage, ...]) -> Judgement:
    """The nearer to a certain table the better, at a cost that is always the same."""
    target = [(5, True, 40), (3, False, 48), (5, False, 24)]
    score = 0.0
    for stage, (kernel_size, fused, channels) in zip(stages, target * 2, strict=True):
        score += (stage.kernel_size == kernel_size) + (stage.fused == fused)
        score += 1 / (1 + abs(stage.channels - channels) / 8)
    return Judgement(score / 18, 1.0)


def test_evolution_beats_chance() -> None:
    """After as many tables: it finds better ones than mutants of the first are."""
    found = {}
    for way, population in (("evolution", 10), ("chance", 10**6)):
        bests = []
        for seed in range(5):
            history = evolve(FIRST, wanted, rounds=150, population=population, seed=seed)
            assert len(history) == len({individual.stages for individual in history}) == 150
            bests.append(max(individual.reward for individual in history))
        found[way] = sum(bests) / 5
    assert found["evolution"] > found["chance"] + 0.1, found


def test_parents_are_of_the_last_generation() -> None:
    """The oldest die: a parent is among the last ones, and the best of its sample at least."""
    history = evolve(FIRST, wanted, rounds=60, population=8, sample=8)
    assert (history[0].stages, history[0].parent) == (FIRST, -1)
    assert all(individual.parent == 0 for individual in history[1:8])
    for turn in range(8, 60):
        living = range(turn - 8, turn)
        best = max(living, key=lambda place: history[place].reward)
        assert history[history[turn].parent].reward == history[best].reward


@pytest.mark.parametrize("after", [0, 1, 5, 10, 23])
def test_search_goes_on(after: int) -> None:
    """From a part of its history as if it had not stopped."""
    whole = evolve(FIRST, wanted, rounds=24)
    seen: list[Individual] = []
    assert evolve(FIRST, wanted, rounds=24, history=whole[:after], progress=seen.append) == whole
    assert seen == whole[after:]


def test_cost_counts() -> None:
    """Of two equally accurate tables the cheaper one is the better, by the weight."""

    def judge(stages: tuple[effnet.Stage, ...]) -> Judgement:
        return Judgement(0.9, float(sum(stage.channels * stage.layers for stage in stages)))

    history = evolve(FIRST, judge, rounds=40, weight=-0.5)
    assert history[0].reward == 0.9
    best = max(history, key=lambda individual: individual.reward)
    assert best.cost == min(individual.cost for individual in history) < history[0].cost
    assert best.reward == pytest.approx(0.9 * (best.cost / history[0].cost) ** -0.5)


def test_proxy() -> None:
    """Trains the table it is given, always from the same weights."""
    recipe = Recipe((Phase(16),), epochs=1, batch=32)
    proxy = Proxy(NETWORK, few_digits(), recipe, torch.device("cpu"))
    first = proxy(FIRST)
    assert proxy(FIRST) == first
    wide = tuple(stage._replace(channels=stage.channels + 8) for stage in FIRST)
    assert proxy(wide).cost > first.cost
    model = create_model(BASE, 10, 1)
    assert first.cost == effnet.complexity(model, 16, 1).multiply_adds
    timed = Proxy(NETWORK, few_digits(), recipe, torch.device("cpu"), latency=True)(FIRST)
    assert timed.accuracy == first.accuracy
    assert 0 < timed.cost < 1


def test_errors() -> None:
    """One line."""
    with pytest.raises(ValueError, match="sample: got 0, expected 1 or more"):
        evolve(FIRST, wanted, sample=0)
    with pytest.raises(ValueError, match="target: got -1"):
        evolve(FIRST, wanted, target=-1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on where it was cut off, even within a line, and what it finds can be trained."""
    out = tmp_path / "search"
    words = (
        "evolve --data digits --model efficientnetv2_b0 --width 0.25 --depth 0.3 --resolution 8 "
        f"--stem-stride 1 --epochs 1 --batch 128 --population 2 --out {out}"
    ).split()
    assert main([*words, "--rounds", "3", "--plot", str(tmp_path / "evolve.png")]) == 0
    text = capsys.readouterr().out
    assert "3/3  accuracy" in text
    assert (tmp_path / "evolve.png").stat().st_size > 1000
    whole = (out / "history.jsonl").read_text()
    assert whole.count("\n") == 4
    best = (out / "best.json").read_text()
    # Killed after the last but one table's line, within the last one's.
    (out / "history.jsonl").write_text(whole[:-30])
    (out / "best.json").unlink()
    assert main([*words, "--rounds", "3", "--resume"]) == 0
    assert (out / "history.jsonl").read_text() == whole
    assert (out / "best.json").read_text() == best
    assert "3/3" in capsys.readouterr().out
    described = describe(str(out / "best.json"))
    assert (described.num_classes, described.in_chans, described.mean) == (10, 1, (0.5,))
    assert described.variant.resolution == 8
    assert main([*words, "--rounds", "4"]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*words, "--rounds", "4", "--epochs", "2", "--resume"]) == 2
    assert "is of another search" in capsys.readouterr().err
    assert main([*words, "--rounds", "4", "--root", "elsewhere", "--resume"]) == 2
    assert "is of another search" in capsys.readouterr().err
    lines = whole.splitlines()
    (out / "history.jsonl").write_text("\n".join([lines[0], "{}", *lines[2:]]))
    assert main([*words, "--rounds", "4", "--resume"]) == 2
    assert "line 2 of" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "other"), "--resume"]) == 2
    assert "no history in" in capsys.readouterr().err
    run = tmp_path / "run"
    words = f"train --data digits --model {out / 'best.json'} --batch 512 --epochs 1 --out {run}"
    assert main(words.split()) == 0
    trained = describe(str(run / "model.json")).variant
    assert trained.stages == described.variant.stages
    assert len(digits().test) == 360
