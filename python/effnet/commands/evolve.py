"""``effnet evolve``: a search for a better stage table, by training many small networks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from effnet.augment import Strength
from effnet.commands.options import (
    add_command,
    add_data,
    add_table,
    load_data,
    of_data,
    positive,
    positive_number,
    varied,
)
from effnet.description import write_description
from effnet.efficientnet import scaled
from effnet.evolution import Individual, Proxy, evolve
from effnet.files import replace
from effnet.plots import plot_evolution
from effnet.training import Phase, Recipe
from effnet.variants import Stage
from effnet_kernels.bench.environment import default_device, device_name

_EXAMPLES = """\
examples:
  effnet evolve --data digits --width 0.25 --depth 0.3 --resolution 16 --stem-stride 1 \\
      --epochs 3 --rounds 50 --out runs/evolve --plot evolve.png        offline, some minutes
  effnet evolve ... --rounds 100 --resume                               fifty more
  effnet train --model runs/evolve/best.json --width 4 --depth 3 ...    what it found, larger
"""


# fmt: off
def add(commands: Any) -> None:
    """Its options."""
    parser = add_command(
        commands, "evolve", "searches stage tables by evolution, on a proxy task", _EXAMPLES, run
    )
    add_data(parser)
    add_table(parser)

    of_proxy = parser.add_argument_group("proxy task").add_argument
    of_proxy("--epochs", type=positive, default=3, metavar="N", help="default: 3")
    of_proxy("--batch", type=positive, default=64, metavar="N", help="default: 64")
    of_proxy("--lr", type=float, default=5e-3, help="the highest (default: 0.005)")

    of_search = parser.add_argument_group("search").add_argument
    of_search("--rounds", type=positive, default=50, metavar="N",
              help="tables to train (default: 50)")
    of_search("--population", type=positive, default=10, metavar="N",
              help="how many of the last ones can be parents (default: 10)")
    of_search("--sample", type=positive, default=4, metavar="N",
              help="how many of these compete to be (default: 4)")
    of_search("--latency", action="store_true",
              help="the cost is the time of an image on this device, not multiply-adds")
    of_search("--target", type=positive_number, metavar="COST",
              help="that is wanted, in millions of multiply-adds or ms (default: the first's)")
    of_search("--weight", type=float, default=-0.07,
              help="of the cost in the reward accuracy * (cost / target) ** weight "
              "(default: -0.07)")
    of_search("--seed", type=int, default=0, help="default: 0")

    of_run = parser.add_argument_group("run").add_argument
    of_run("--out", type=Path, required=True, metavar="FOLDER",
           help="of history.jsonl, every table that was tried, and best.json, for --model")
    of_run("--resume", action="store_true", help="go on from the history in --out")
    of_run("--plot", type=Path, metavar="FILE", help="such as evolve.png")
# fmt: on


def run(arguments: argparse.Namespace) -> int:
    """A line a table."""
    first = varied(arguments)
    first = first._replace(variant=scaled(first.variant))
    table = first.variant
    data = load_data(table, arguments)
    first = of_data(first, data)
    phase = Phase(table.resolution, 0.1, Strength(0.3))
    recipe = Recipe(
        (phase,), epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr,
        seed=arguments.seed,
    )  # fmt: skip
    device = default_device()
    unit, scale = ("ms", 1e-3) if arguments.latency else ("M multiply-adds", 1e6)
    # What must not change between a history and what is added to it.
    settings = {
        "model": repr(first), "data": [arguments.data, str(arguments.root)],
        "recipe": repr(recipe), "unit": unit,
        "device": device_name(device) if arguments.latency else "any",
        "population": arguments.population, "sample": arguments.sample,
        "target": arguments.target, "weight": arguments.weight,
    }  # fmt: skip
    path = arguments.out / "history.jsonl"
    history = _read_history(path, settings) if arguments.resume else []
    if not arguments.resume and path.exists():
        raise ValueError(
            f"out: there is a history in {str(arguments.out)!r}; --resume goes on with it, "
            "another folder begins anew"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [settings, *(individual._asdict() for individual in history)]
    replace(path, lambda file: file.write_text("".join(f"{json.dumps(line)}\n" for line in lines)))

    def best() -> Individual:
        return max(history, key=lambda individual: individual.reward)

    def keep_best() -> None:
        winner = first._replace(variant=table._replace(stages=best().stages))
        write_description(arguments.out / "best.json", winner)

    def progress(found: Individual) -> None:
        with path.open("a") as file:
            file.write(f"{json.dumps(found._asdict())}\n")
        history.append(found)
        mark = ""
        if best() is found:
            keep_best()
            mark = "  the best so far"
        print(
            f"{len(history)}/{arguments.rounds}  accuracy {found.accuracy:.2%}  "
            f"{found.cost / scale:.3g} {unit}  reward {found.reward:.4f}{mark}",
            flush=True,
        )

    if history:  # the process may have been killed before it wrote the last one's
        keep_best()
    evolve(
        table.stages, Proxy(first, data, recipe, device, latency=arguments.latency),
        rounds=arguments.rounds, population=arguments.population, sample=arguments.sample,
        target=arguments.target and arguments.target * scale, weight=arguments.weight,
        seed=arguments.seed, history=tuple(history), progress=progress,
    )  # fmt: skip
    print(
        f"{'expand':>6} {'kernel':>6} {'stride':>6} {'channels':>8} {'layers':>6} {'SE':>5}  block"
    )
    for stage in best().stages:
        block = "Fused-MBConv" if stage.fused else "MBConv"
        print(
            f"{stage.expand:>6} {stage.kernel_size:>6} {stage.stride:>6} {stage.channels:>8} "
            f"{stage.layers:>6} {stage.squeeze:>5}  {block}"
        )
    print(f"wrote {arguments.out / 'best.json'}")
    if arguments.plot is not None:
        plot_evolution(
            {"evolution": history},
            arguments.plot,
            "seconds" if arguments.latency else "multiply-adds",
        )
        print(f"wrote {arguments.plot}")
    return 0


def _read_history(path: Path, settings: dict[str, Any]) -> list[Individual]:
    """Of a search with the same settings.

    Raises:
        ValueError: there is none, or it is of another search; the message is one line.
    """
    if not path.exists():
        raise ValueError(f"out: there is no history in {str(path.parent)!r} to resume from")
    lines = path.read_text().splitlines()
    found: list[Any] = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
            if number:
                stages = tuple(Stage(*stage) for stage in found[-1]["stages"])
                found[-1] = Individual(**{**found[-1], "stages": stages})
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) - 1:
                del found[number:]  # the process was killed while it wrote
                break
            raise ValueError(f"out: line {number + 1} of {str(path)!r} is no table") from error
    if not found or found[0] != settings:
        raise ValueError(
            f"out: {str(path)!r} is of another search; search in another folder, or with the "
            "settings that it was begun with"
        )
    return found[1:]
