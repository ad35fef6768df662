"""Training: one loop for every recipe, with progressive learning and exact resumption.

Everything random in step s is drawn from generators seeded by (seed, s): which images, what is done
to them, dropout and drop path. So a run that was killed and goes on from its last checkpoint takes
the very steps that it would have taken.

Progressive learning (arXiv:2104.00298, section 4): the first phases train on small images with weak
regularisation, which is quick, and both grow to the recipe's own.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset

from effnet.augment import RandAugmented, Strength, distort, mix, resize
from effnet.data import Data
from effnet.efficientnet import EfficientNet
from effnet.files import replace
from effnet.images import normalise


class Phase(NamedTuple):
    """A part of training.

    Attributes:
        resolution: side of the images, in pixels.
        drop_rate: of dropout.
        strength: of the augmentation.
    """

    resolution: int
    drop_rate: float = 0.2
    strength: Strength = Strength()


def progressive(
    first: Phase, last: Phase, phases: int, *, hold: int = 1, multiple: int = 8
) -> tuple[Phase, ...]:
    """Phases of equal length from ``first`` to ``last``, in equal steps of everything: V2's
    algorithm 1.

    Args:
        first: of training.
        last: of training.
        phases: how many, 2 or more.
        hold: how many of them are ``last``, less than ``phases``. The paper's 1 is for hundreds of
            epochs; where there are few, one phase is too short to get used to the last size.
        multiple: of which resolutions between the two are.

    Raises:
        ValueError: ``phases`` or ``hold`` is out of range.
    """
    if phases < 2:
        raise ValueError(f"phases: got {phases}, expected 2 or more")
    if not 1 <= hold < phases:
        raise ValueError(f"hold: got {hold}, expected 1 to {phases - 1}, less than the phases")

    def between(low: float, high: float, share: float) -> float:
        return low + (high - low) * share

    found = [first]
    for i in range(1, phases - hold):
        share = i / (phases - hold)
        resolution = between(first.resolution, last.resolution, share) / multiple
        strength = (
            between(a, b, share) for a, b in zip(first.strength, last.strength, strict=True)
        )
        found.append(
            Phase(
                round(resolution) * multiple,
                between(first.drop_rate, last.drop_rate, share),
                Strength(*strength),
            )
        )
    return (*found, *[last] * hold)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        phases: one for training as usual, several for progressive learning; of equal length.
        epochs: over the training images.
        batch: images a step, of one process.
        optimizer: rmsprop, sgd or adamw.
        lr: the highest learning rate.
        weight_decay: of the optimizer, not for BN and biases.
        warmup: share of the steps in which the rate rises linearly; then it falls as a cosine.
        label_smoothing: share of the target that goes to all classes.
        ema: decay of the averaged weights, a step; 0 for none.
        amp: bfloat16 or float16 for autocast, or None.
        layer_decay: the learning rate of a block over that of the block after it; below 1, what is
            near the image keeps more of what it was pretrained to.
        frozen_norms: BN keeps the statistics that it was pretrained with.
        checkpointing: recompute blocks in backward instead of keeping what they computed.
        seed: of everything random.
    """

    phases: tuple[Phase, ...]
    epochs: int = 10
    batch: int = 64
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.02
    warmup: float = 0.1
    label_smoothing: float = 0.1
    ema: float = 0.0
    amp: str | None = None
    layer_decay: float = 1.0
    frozen_norms: bool = False
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what no later message would name.

        Raises:
            ValueError: a setting is out of range.
        """
        if not self.phases:
            raise ValueError("phases: got none, expected one or more")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer: got {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}"
            )
        if self.amp not in (None, "bfloat16", "float16"):
            raise ValueError(f"amp: got {self.amp!r}, expected bfloat16, float16 or None")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: got {self.layer_decay}, expected above 0 and at most 1")
        for name in ("warmup", "label_smoothing", "ema"):
            _check_range(name, getattr(self, name), 1.0, strict=name == "ema")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected 0 or more")
        for phase in self.phases:
            if phase.resolution < 1:
                raise ValueError(f"resolution: got {phase.resolution}, expected 1 or more")
            _check_range("drop_rate", phase.drop_rate, 1.0, strict=True)
            _check_range("magnitude", phase.strength.magnitude, 1.0)
            _check_range("randaugment", phase.strength.randaugment, 30.0)
            for name in ("mixup", "cutmix"):
                _check_range(name, getattr(phase.strength, name), math.inf)
        for name in ("epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")


def _check_range(name: str, value: float, most: float, *, strict: bool = False) -> None:
    if not (0 <= value < most or (value == most and not strict)):
        bound = "less than" if strict else "to"
        raise ValueError(f"{name}: got {value}, expected 0 {bound} {most:g}")


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # As the papers train: V1 and V2 by RMSProp.
    "rmsprop": lambda groups, lr: torch.optim.RMSprop(groups, lr, 0.9, 1e-3, momentum=0.9),
    # Fused: small networks' steps are mostly overhead.
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr, 0.9, nesterov=True, fused=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr, fused=True),
}


class Step(NamedTuple):
    """A row of the log.

    Attributes:
        step: from 0 on.
        epoch: from 0 on.
        resolution: of the images.
        lr: the learning rate.
        loss: of this process's images.
        accuracy: on the test images, after the last step of an epoch that ends with a test.
    """

    step: int
    epoch: int
    resolution: int
    lr: float
    loss: float
    accuracy: float | None = None


class Trainer:
    """A run of a recipe.

    Args:
        model: is trained; already on its device.
        data: to train and test on.
        recipe: how.
        folder: for checkpoints and the log; None keeps nothing.
        save_every: steps between two checkpoints; the end of an epoch has one, too.
        test_every: epochs between two tests; 0 for none.
        workers: processes that load images.

    In a process group (torchrun), each process trains on its share of every epoch, gradients are
    averaged, and the first process writes.
    """

    def __init__(
        self,
        model: EfficientNet,
        data: Data,
        recipe: Recipe,
        folder: str | Path | None = None,
        *,
        save_every: int = 100,
        test_every: int = 0,
        workers: int = 0,
    ) -> None:
        self.data, self.recipe, self.workers = data, recipe, workers
        self.save_every, self.test_every = save_every, test_every
        self._augmented: Dataset[tuple[Tensor, int]] | None = None
        if any(phase.strength.randaugment > 0 for phase in recipe.phases):
            self._augmented = RandAugmented(data.train)
        self.folder = None if folder is None else Path(folder)
        self.device = next(model.parameters()).device
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else 0
        self.world = torch.distributed.get_world_size() if distributed else 1
        self._parallel: nn.Module = self.model
        if distributed:
            devices = [self.device] if self.device.type == "cuda" else None
            self._parallel = nn.parallel.DistributedDataParallel(self.model, devices)
        self.model.checkpointing = recipe.checkpointing
        self.averaged = None
        if recipe.ema > 0:
            self.averaged = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True
            )
        self.optimizer = OPTIMIZERS[recipe.optimizer](_groups(self.model, recipe), recipe.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        images = len(data.train)  # type: ignore[arg-type]
        self.steps_per_epoch = images // (recipe.batch * self.world)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch: got {recipe.batch} in {self.world} processes, expected at most the "
                f"{images} training images in all"
            )
        self.steps = self.steps_per_epoch * recipe.epochs
        self.step = 0
        self.log: list[Step] = []

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        phases = self.recipe.phases
        return phases[min(step * len(phases) // self.steps, len(phases) - 1)]

    def lr(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then a cosine to 0."""
        rising = max(1, round(self.recipe.warmup * self.steps))
        if step < rising:
            return self.recipe.lr * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        return self.recipe.lr * (1 + math.cos(math.pi * share)) / 2

    def fit(
        self, *, until: int | None = None, progress: Callable[[Step], None] | None = None
    ) -> None:
        """Trains from where it is to the end, or to step ``until``.

        Args:
            until: a step before the end.
            progress: is called after every step.
        """
        end = self.steps if until is None else min(until, self.steps)
        while self.step < end:
            for images, classes in self._batches(self.step // self.steps_per_epoch):
                taken = self._take(images, classes)
                self.step += 1
                if self._tests():
                    taken = taken._replace(accuracy=self.evaluate())
                self.log.append(taken)
                if progress is not None:
                    progress(taken)
                if self.step % self.save_every == 0 or self.step % self.steps_per_epoch == 0:
                    self.save()
                if self.step >= end:
                    break

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of an epoch's batches, in an order that the epoch decides."""
        order = torch.randperm(
            len(self.data.train),  # type: ignore[arg-type]
            generator=_generator(self.recipe.seed, epoch, 1),
        )
        size, first = self.recipe.batch, self.step % self.steps_per_epoch
        batches: list[Any] = []
        for i in range(first, self.steps_per_epoch):
            indices = order[(i * self.world + self.rank) * size :][:size].tolist()
            batches.append(self._keys(epoch * self.steps_per_epoch + i, indices))
        yield from DataLoader(
            self._augmented or self.data.train, batch_sampler=batches, num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def _keys(self, step: int, indices: list[int]) -> list[Any]:
        """What the images of a step are asked for by."""
        if self._augmented is None:
            return indices
        magnitude = self.phase(step).strength.randaugment
        generator = _generator(self.recipe.seed, step, -1 - self.rank)
        seeds = torch.randint(1 << 62, (len(indices),), generator=generator).tolist()
        return [(index, magnitude, seed) for index, seed in zip(indices, seeds, strict=True)]

    def _tests(self) -> bool:
        """Whether the step before is followed by a test."""
        if self.test_every == 0 or self.step % self.steps_per_epoch:
            return False
        epoch = self.step // self.steps_per_epoch
        return epoch % self.test_every == 0 or epoch == self.recipe.epochs

    def _take(self, images: Tensor, classes: Tensor) -> Step:
        """One step."""
        step, recipe, phase = self.step, self.recipe, self.phase(self.step)
        generator = _generator(recipe.seed, step, 2 + self.rank)
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group["scale"]
        self.model.train()
        if recipe.frozen_norms:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        self.model.drop_rate = phase.drop_rate
        x = images.to(self.device, non_blocking=True)
        x = distort(x, phase.resolution, phase.strength.magnitude, self.data.mirrors, generator)
        x = normalise(x, self.data.mean, self.data.std)
        targets = F.one_hot(classes, self.data.classes).to(self.device, torch.float32)
        x, targets = mix(x, targets, phase.strength, generator)
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = getattr(torch, recipe.amp) if recipe.amp else torch.float32
        with torch.autocast(self.device.type, dtype, enabled=recipe.amp is not None):
            logits = self._parallel(x)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        epoch = step // self.steps_per_epoch
        return Step(step, epoch, phase.resolution, self.lr(step), loss.item())

    @torch.no_grad()
    def evaluate(self, resolution: int | None = None, *, averaged: bool = True) -> float:
        """The accuracy on the test images, in [0, 1].

        In a process group all processes call it; each tests its share, with the first one's
        statistics.

        Args:
            resolution: of the images; the last phase's unless given.
            averaged: of the averaged weights, where there are such.
        """
        model: nn.Module = self.model
        if averaged and self.averaged is not None:
            model = self.averaged
        model.eval()
        size = resolution or self.recipe.phases[-1].resolution
        images_in_all = len(self.data.test)  # type: ignore[arg-type]
        share = Subset(self.data.test, range(self.rank, images_in_all, self.world))
        if self.world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, classes in DataLoader(share, self.recipe.batch, num_workers=self.workers):
            images = resize(images.to(self.device), size)
            logits = model(normalise(images, self.data.mean, self.data.std))
            right += (logits.argmax(1) == classes.to(self.device)).sum()
        if self.world > 1:
            torch.distributed.all_reduce(right)
        return int(right) / max(images_in_all, 1)

    def save(self) -> None:
        """Writes a checkpoint and the log, so that at every moment there is a whole one."""
        if self.folder is None or self.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "of": self._identity(),
            "log": [tuple(row) for row in self.log],
        }
        replace(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
        replace(self.folder / "log.csv", self._write_log)

    def _identity(self) -> dict[str, str]:
        """What must be the same for the steps to be the same."""
        data = self.data
        sizes = [len(part) for part in (data.train, data.test)]  # type: ignore[arg-type]
        return {
            "recipe": repr(self.recipe),
            "model": repr(self.model),  # with strides, padding, drop path
            "set of images": repr((*sizes, *data[2:])),
            "number of processes": str(self.world),
        }

    def _write_log(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Step._fields)
            writer.writerows(self.log)

    def resume(self) -> bool:
        """Goes to where the folder's checkpoint is; whether there is one.

        Raises:
            ValueError: it cannot be read, or is of another recipe or model, in one line.
        """
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return False
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch.load raises half a dozen kinds for what is no checkpoint
            raise ValueError(f"checkpoint: {str(path)!r} cannot be read") from error
        for name, value in self._identity().items():
            if state.get("of", {}).get(name) != value:
                raise ValueError(
                    f"checkpoint: {str(path)!r} is of another {name}; train into another folder, "
                    "or with the settings that it was begun with"
                )
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.log = [Step(*row) for row in state["log"]]
        return True


def _groups(model: EfficientNet, recipe: Recipe) -> list[dict[str, Any]]:
    """The optimizer's groups: of each layer what is decayed and what is not, with the scale of
    their learning rate.
    """
    blocks = [block for stage in model.stages for block in stage.children()]
    layers: list[nn.Module] = [model.stem, *blocks, model.head, model.classifier]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for place, layer in enumerate(layers):
        scale = recipe.layer_decay ** (len(layers) - 1 - place)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


def _generator(*seeds: int) -> torch.Generator:
    """Of the CPU, at a place that ``seeds`` alone decide."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 6364136223846793005 + seed * 1442695040888963407 + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)
