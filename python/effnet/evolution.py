"""Evolution of stage tables: mutate a good one, train the child on a proxy task, let the oldest die
(regularised evolution, arXiv:1802.01548).

What it climbs is the papers' own objective, ``reward``: EfficientNet's by FLOPs, MnasNet's
(arXiv:1807.11626) by latency. A table that is found small, on small images, is then scaled up.

    history = evolve(table.stages, Proxy(Description(table, 10), data, recipe, device), rounds=50)
    best = max(history, key=lambda individual: individual.reward)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from effnet.complexity import complexity
from effnet.data import Data
from effnet.description import Description
from effnet.efficientnet import scale_channels, scaled
from effnet.search import as_fused, as_mbconv
from effnet.training import Recipe, Trainer
from effnet.variants import Stage
from effnet_kernels.bench.timing import Contender
from effnet_kernels.bench.timing import measure as measure_times


def reward(accuracy: float, cost: float, target: float, weight: float = -0.07) -> float:
    """``accuracy * (cost / target) ** weight``: what a search maximises.

    Args:
        accuracy: of a trained network.
        cost: its FLOPs or its latency.
        target: the cost that is wanted, in the same unit.
        weight: how much a difference from it matters.

    Raises:
        ValueError: a cost is not positive.
    """
    if cost <= 0 or target <= 0:
        raise ValueError(f"cost: got {cost} for a target of {target}, expected positive numbers")
    return float(accuracy * (cost / target) ** weight)


class Judgement(NamedTuple):
    """What a proxy task says of a table.

    Attributes:
        accuracy: of the trained network, in [0, 1].
        cost: its multiply-adds, or its latency in seconds.
    """

    accuracy: float
    cost: float


class Individual(NamedTuple):
    """A table that was tried.

    Attributes:
        stages: the table.
        accuracy: as judged.
        cost: as judged.
        reward: of both.
        parent: its parent's place in the history; -1 for the first.
    """

    stages: tuple[Stage, ...]
    accuracy: float
    cost: float
    reward: float
    parent: int


class Space(NamedTuple):
    """What a mutation can make of a stage: another value of one of these, or the other kind of
    block.

    Attributes:
        expands: of the expanded channels over the input's.
        kernel_sizes: of depthwise convolutions; dense ones are 3x3.
        most_layers: in a stage that has no more already.

    Channels grow and shrink by a quarter, in multiples of 8.
    """

    expands: tuple[int, ...] = (1, 3, 4, 6)
    kernel_sizes: tuple[int, ...] = (3, 5)
    most_layers: int = 6


def mutate(stages: Sequence[Stage], space: Space, chooser: random.Random) -> tuple[Stage, ...]:
    """The table with one thing changed in one of its stages."""
    place = chooser.randrange(len(stages))
    stage = stages[place]
    quarter = scale_channels(stage.channels, 0.25, 0.0)
    children = [
        *(stage._replace(expand=expand) for expand in space.expands),
        *(stage._replace(layers=stage.layers + more) for more in (-1, 1)),
        *(stage._replace(channels=stage.channels + more) for more in (-quarter, quarter)),
        as_mbconv(stage) if stage.fused else as_fused(stage),
    ]
    if not stage.fused:
        children += [stage._replace(kernel_size=size) for size in space.kernel_sizes]
        children.append(stage._replace(squeeze=0.0 if stage.squeeze else 0.25))
    most = max(space.most_layers, stage.layers)
    within = [c for c in children if c != stage and 1 <= c.layers <= most and c.channels >= 8]
    return (*stages[:place], chooser.choice(within), *stages[place + 1 :])


def evolve(
    first: Sequence[Stage],
    judge: Callable[[tuple[Stage, ...]], Judgement],
    *,
    rounds: int = 50,
    population: int = 10,
    sample: int = 4,
    target: float | None = None,
    weight: float = -0.07,
    space: Space | None = None,
    seed: int = 0,
    history: Sequence[Individual] = (),
    progress: Callable[[Individual], None] | None = None,
) -> list[Individual]:
    """Searches tables.

    The population is the last ``population`` tables of the history. The first of all are ``first``
    and mutants of it; then each is a mutant of the best of ``sample`` of the population. No table
    is judged twice. What a round does is decided by the seed and the history before it, so a search
    that was interrupted goes on from its history as it would have gone on.

    Args:
        first: where the search begins.
        judge: of a table.
        rounds: tables that are judged, with those of ``history``.
        population: how many can be parents.
        sample: how many of them compete to be.
        target: the cost that is wanted; the first table's unless given.
        weight: of the cost in the reward.
        space: of mutations.
        seed: of all that is random here.
        history: of the search that is gone on with.
        progress: is called with each new individual.

    Returns:
        All tables in the order in which they were judged.

    Raises:
        ValueError: a number is out of range.
    """
    for name, number in (("rounds", rounds), ("population", population), ("sample", sample)):
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected 1 or more")
    if target is not None and target <= 0:
        raise ValueError(f"target: got {target}, expected a positive number")
    space = space or Space()
    history = list(history)
    known = {individual.stages for individual in history}
    for turn in range(len(history), rounds):
        chooser = random.Random(f"{seed} {turn}")
        parent, child = -1, tuple(first)
        if 0 < turn < population:
            parent = 0
        elif turn:
            living = range(turn - population, turn)
            chosen = chooser.sample(living, min(sample, population))
            parent = max(chosen, key=lambda place: history[place].reward)
        if turn:
            child = history[parent].stages
            while child in known:
                child = mutate(child, space, chooser)
        accuracy, cost = judge(child)
        target = target or (history[0].cost if history else cost)
        found = Individual(child, accuracy, cost, reward(accuracy, cost, target, weight), parent)
        known.add(child)
        history.append(found)
        if progress is not None:
            progress(found)
    return history


class Proxy:
    """A proxy task: a table's network is trained as a recipe says, on few and small images.

    Args:
        base: what is around the table: stem, head, resolution, how images are normalised; its own
            stages are not used.
        data: to train and test on.
        recipe: how; every network begins from its seed.
        device: where.
        latency: judge seconds of an image in inference on the device, not multiply-adds.
    """

    def __init__(
        self, base: Description, data: Data, recipe: Recipe, device: torch.device, *,
        latency: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.recipe = base._replace(variant=scaled(base.variant)), recipe
        self.data = data._replace(mean=base.mean, std=base.std)
        self.device, self.latency = device, latency

    def __call__(self, stages: tuple[Stage, ...]) -> Judgement:
        """Of one table."""
        torch.manual_seed(self.recipe.seed)
        table = self.base.variant._replace(stages=stages)
        model = self.base._replace(variant=table).build().to(self.device)
        trainer = Trainer(model, self.data, self.recipe)
        trainer.fit()
        accuracy = trainer.evaluate()
        if not self.latency:
            cost = complexity(model, table.resolution, self.data.in_chans).multiply_adds
            return Judgement(accuracy, cost)
        images = torch.zeros(
            1, self.data.in_chans, table.resolution, table.resolution, device=self.device
        )
        contender = Contender("table", model.eval(), [images])
        with torch.no_grad():
            times = measure_times([contender], self.device, cold=False, seconds=0.5)
        return Judgement(accuracy, times["table"].median)
