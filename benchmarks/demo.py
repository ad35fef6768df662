"""Stock and converted EfficientNet-B0 side by side on a real photograph: same numbers, less time.

The photographs are scikit-learn's. Weights are random but seeded, with BN statistics of the
photographs, unless --checkpoint brings trained ones. On an NVIDIA GPU in bfloat16, else in float32.
The exit status is 1 where the converted model's error from float64 exceeds the rule.
"""

from __future__ import annotations

import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch

# isort: split
import argparse
import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import effnet_kernels
from effnet_kernels.bench import accuracy, environment, models, peers, report
from effnet_kernels.bench.results import BASELINE, Row

MODEL, SIZE, BATCHES = "efficientnet_b0", 224, (1, 8)
CONTENDERS = (BASELINE, "compile")


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message is one line."""


def crops(count: int, seed: int) -> Tensor:
    """Square crops of the photographs at the model's size, normalised: (count, 3, SIZE, SIZE).

    The first is the middle of china.jpg.
    """
    generator = np.random.default_rng(seed)
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    images = []
    for index in range(count):
        photograph = photographs[index % 2]
        height, width, _ = photograph.shape
        side = height if index == 0 else int(generator.integers(SIZE // 2, height))
        top = int(generator.integers(0, height - side + 1))
        left = (width - side) // 2 if index == 0 else int(generator.integers(0, width - side + 1))
        crop = torch.from_numpy(photograph[top : top + side, left : left + side].copy())
        image = crop.permute(2, 0, 1)[None].float() / 255
        image = F.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)
        images.append(image)
    mean = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(timm.data.IMAGENET_DEFAULT_STD).view(3, 1, 1)
    return (torch.cat(images) - mean) / std


def load(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch.save file.

    Raises:
        CheckpointError: the file is missing, corrupt, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason[:120]})") from None
    except Exception as error:  # safetensors' own error is no public class
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: holds no state dict of tensors")
    return state


def build(checkpoint: Path | None) -> nn.Module:
    """The stock model in evaluation mode.

    Raises:
        CheckpointError: the checkpoint does not fit it.
    """
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(MODEL)
    if checkpoint is None:
        models.calibrate(model, [crops(8, seed) for seed in range(3)])
        return model.eval()
    state = {name.removeprefix("module."): t for name, t in load(checkpoint).items()}
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [n for n in expected if n in state and state[n].shape != expected[n].shape]
    for what, names in (("lacks", missing), ("has unknown", unexpected), ("misshapes", shapes)):
        if names:
            raise CheckpointError(
                f"{checkpoint}: not of {MODEL}: it {what} {len(names)} tensors, {names[0]} first"
            )
    model.load_state_dict(state)
    return model.eval()


def largest_error(logits: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest logit."""
    return accuracy.errors(logits, exact).largest


def main() -> int:
    """Shows what is replaced, that the numbers are the same, and the time it takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=".safetensors or .pth")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of timing for each batch size (default: 6)"
    )
    arguments = parser.parse_args()
    console = report.console()
    device = environment.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        stock = build(arguments.checkpoint)
    except CheckpointError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    backends = peers.our_backends(device, dtype)
    if not backends:
        print(
            f"demo.py: no kernels run on {device}: see python -m effnet_kernels info",
            file=sys.stderr,
        )
        return 2
    ours = [*backends]
    if device.type == "cpu":
        ours += [f"{backend}+prepared" for backend in backends]
    weights = arguments.checkpoint or "random weights, BN statistics of the photographs"
    console.print(f"{MODEL}, {weights}, on {environment.device_name(device)}", highlight=False)

    converted = effnet_kernels.convert(copy.deepcopy(stock).to(device, dtype))
    console.print("\n[bold]What convert() replaced[/]")
    console.print(str(effnet_kernels.report(converted)), highlight=False, markup=False)
    if not effnet_kernels.report(converted).taken:
        print("demo.py: convert() took no block", file=sys.stderr)
        return 1

    console.print("\n[bold]china.jpg[/]")
    photograph = crops(1, 0).to(device, dtype)
    eager = copy.deepcopy(stock).to(device, dtype)
    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(photograph.double())
        logits, theirs = converted(photograph), eager(photograph)
    console.print(
        f"logits {' '.join(f'{x:+.4f}' for x in exact[0, :5].tolist())} ..., "
        f"standard deviation {exact.std().item():.3g}",
        highlight=False,
    )
    if arguments.checkpoint is not None:
        for name, given in (("stock", theirs), ("converted", logits)):
            top = given[0].float().topk(5).indices.tolist()
            console.print(f"top-5 classes, {name}: {top}", highlight=False)
    console.print(
        f"largest error against float64, relative to the largest logit: stock "
        f"{largest_error(theirs, exact):.2e}, converted {largest_error(logits, exact):.2e}",
        highlight=False,
    )

    console.print("\n[bold]Time[/]")
    rows: list[Row] = []
    for batch in BATCHES:
        problem = models.Problem(MODEL, SIZE, batch, dtype, "inference")
        with console.status(f"timing batch {batch} (torch.compile takes a minute)"):
            match = models.match_on(
                stock, crops(batch, 0), problem, device, only=[*CONTENDERS, *ours]
            )
            rows += match.run(kinds=("warm",), seconds=arguments.seconds)
    console.print(table(rows))
    console.print(
        f"[dim]median of calls in turns, speed-up over eager channels-last; error: the largest "
        f"from float64, of rule: its share of what is allowed, {accuracy.FORWARD:g} times "
        "eager's[/]"
    )
    broken = [r for r in rows if r.contender in ours and (r.wrong or r.failed is not None)]
    for row in broken:
        reason = row.failed or f"the error is {row.excess:.2f} times what is allowed"
        print(f"demo.py: {row.contender}, batch {row.batch}: {reason}", file=sys.stderr)
    if not broken:
        console.print("[green]same numbers: the error rule holds[/]")
    return 1 if broken else 0


def table(rows: list[Row]) -> Table:
    """A line a contender, with columns for each batch size."""
    made = Table(box=SIMPLE)
    made.add_column("")
    for batch in BATCHES:
        for heading in (f"batch {batch}", "images/s", "speed-up", "error", "of rule"):
            made.add_column(heading, justify="right", no_wrap=True)
    for contender in dict.fromkeys(row.contender for row in rows):
        label = f"converted ({contender})" if contender not in models.PEERS else contender
        cells = [label]
        for row in rows:
            if row.contender != contender:
                continue
            if row.failed is not None:
                cells += ["failed", "-", "-", "-", "-"]
                continue
            median = row.timings["warm"].median
            cells += [
                report.seconds(median),
                f"{row.batch / median:.0f}",
                report.speedup(row, "warm"),
                f"{row.errors['logits'].largest:.1e}",
                f"{row.excess:.2f}",
            ]
        made.add_row(*cells)
    return made


if __name__ == "__main__":
    sys.exit(main())
