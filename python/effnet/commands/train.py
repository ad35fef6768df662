"""``effnet train`` and ``effnet finetune``: a recipe, from fresh or from pretrained weights."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effnet.augment import Strength
from effnet.checkpoints import load_features, read_weights
from effnet.commands.options import (
    WEIGHTS,
    add_command,
    add_data,
    add_origin,
    add_table,
    load_data,
    of_data,
    positive,
    varied,
    with_origin,
)
from effnet.description import write_description
from effnet.files import replace
from effnet.training import OPTIMIZERS, Phase, Recipe, Step, Trainer, progressive
from effnet_kernels.bench.environment import default_device

_TRAIN_EXAMPLES = """\
examples:
  effnet train --data digits --resolution 32 --width 0.25 --depth 0.3 --stem-stride 1 \\
      --epochs 15 --lr 0.01 --out runs/digits
  effnet train --data folder --root flowers --model efficientnetv2_s --resolution 300 \\
      --progressive 128 --randaugment 15 --mixup 0.2 --amp bfloat16 --ema 0.999 --out runs/flowers
  effnet train ... --resume                            after an interruption, with the same options
  torchrun --nproc-per-node 4 -m effnet train ...      on four GPUs
"""
_FINETUNE_EXAMPLES = """\
example:
  effnet finetune --data Flowers102 --download --model efficientnet_b0 --weights b0.safetensors \\
      --epochs 20 --lr 1e-3 --amp bfloat16 --out runs/flowers
"""


def add(commands: Any) -> None:
    """The options of both."""
    train = add_command(
        commands, "train", "trains a model, or goes on with one that was interrupted",
        _TRAIN_EXAMPLES, run,
    )  # fmt: skip
    _add_common(train)
    train.set_defaults(
        weights=None, tensorflow=False, half=False, layer_decay=1.0, frozen_norms=False
    )
    finetune = add_command(
        commands, "finetune", "trains a model that was pretrained, for other classes",
        _FINETUNE_EXAMPLES, run,
    )  # fmt: skip
    _add_common(finetune)
    option = finetune.add_argument
    option("--weights", required=True, metavar="FILE", help=WEIGHTS)
    add_origin(finetune)
    option("--layer-decay", type=float, default=0.8, metavar="X",
           help="learning rate of a block over the next one's (default: 0.8)")  # fmt: skip
    option("--train-norms", dest="frozen_norms", action="store_false",
           help="let BN learn new statistics (default: it keeps the pretrained ones)")  # fmt: skip


# fmt: off
def _add_common(parser: Any) -> None:
    add_data(parser)
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="that load images (default: 0)")
    add_table(parser)
    of_images = parser.add_argument_group("images and regularisation").add_argument
    of_images("--progressive", type=positive, metavar="PIXELS",
              help="begin with images of this size and weak regularisation, in --phases")
    of_images("--phases", type=positive, default=4, metavar="N",
              help="of progressive learning (default: 4)")
    of_images("--hold", type=positive, default=1, metavar="N",
              help="how many of them are of the full size (default: 1)")
    of_images("--magnitude", type=float, default=0.3,
              help="of crops, turns and changes of light, 0 to 1 (default: 0.3)")
    of_images("--randaugment", type=float, default=0.0, help="its magnitude (default: 0, none)")
    of_images("--mixup", type=float, default=0.0, help="default: 0, none")
    of_images("--cutmix", type=float, default=0.0, help="default: 0, none")
    of_images("--drop-rate", type=float, default=0.2, help="default: 0.2")
    of_images("--drop-path-rate", type=float, default=0.2, help="default: 0.2")

    of_steps = parser.add_argument_group("optimization").add_argument
    of_steps("--epochs", type=positive, default=10, metavar="N", help="default: 10")
    of_steps("--batch", type=positive, default=64, metavar="N",
             help="images a step and process (default: 64)")
    of_steps("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    of_steps("--lr", type=float, default=2e-3, help="the highest (default: 0.002)")
    of_steps("--weight-decay", type=float, default=0.02, help="default: 0.02")
    of_steps("--label-smoothing", type=float, default=0.1, help="default: 0.1")
    of_steps("--ema", type=float, default=0.0, help="decay of averaged weights (default: 0, none)")
    of_steps("--amp", choices=("bfloat16", "float16"), help="autocast (default: none)")
    of_steps("--checkpointing", action="store_true", help="less memory, more time")
    of_steps("--seed", type=int, default=0, help="default: 0")

    of_run = parser.add_argument_group("run").add_argument
    of_run("--out", type=Path, required=True, metavar="FOLDER",
           help="of checkpoint.pt, log.csv, model.json and weights.pt")
    of_run("--resume", action="store_true", help="go on from the checkpoint in --out")
    of_run("--save-every", type=positive, default=100, metavar="STEPS",
           help="between checkpoints; each epoch ends with one, too (default: 100)")
    of_run("--test-every", type=positive, default=1, metavar="EPOCHS",
           help="between tests; the last epoch ends with one, too (default: 1)")
    of_run("--tensorboard", action="store_true", help="log to --out/tensorboard, too")
# fmt: on


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end."""
    device, distributed = default_device(), "RANK" in os.environ
    if distributed:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
    description = varied(arguments)
    resolution = description.variant.resolution
    data = load_data(description.variant, arguments)
    description = with_origin(of_data(description, data), arguments)
    data = data._replace(mean=description.mean, std=description.std)
    torch.manual_seed(arguments.seed)
    model = description.build(drop_path_rate=arguments.drop_path_rate).to(device)
    if arguments.weights is not None:
        load_features(model, read_weights(arguments.weights))
    trainer = Trainer(
        model, data, _recipe(resolution, arguments), arguments.out,
        save_every=arguments.save_every, test_every=arguments.test_every,
        workers=arguments.workers,
    )  # fmt: skip
    if arguments.resume and not trainer.resume():
        raise ValueError(f"out: there is no checkpoint in {str(arguments.out)!r} to resume from")
    if not arguments.resume and (arguments.out / "checkpoint.pt").exists():
        raise ValueError(
            f"out: there is a checkpoint in {str(arguments.out)!r}; --resume goes on with it, "
            "another folder begins anew"
        )
    if trainer.rank == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_description(arguments.out / "model.json", description)
    trainer.fit(progress=_progress(trainer, arguments) if trainer.rank == 0 else None)
    if trainer.rank == 0:
        best = model if trainer.averaged is None else trainer.averaged.module
        replace(arguments.out / "weights.pt", lambda path: torch.save(best.state_dict(), path))
        print(f"test accuracy {trainer.log[-1].accuracy:.2%}")
        print(f"wrote {arguments.out / 'weights.pt'} and {arguments.out / 'model.json'}")
    if distributed:
        torch.distributed.destroy_process_group()
    return 0


def _recipe(resolution: int, arguments: argparse.Namespace) -> Recipe:
    """How."""
    strength = Strength(
        arguments.magnitude, arguments.mixup, arguments.cutmix, arguments.randaugment
    )
    phases: tuple[Phase, ...] = (Phase(resolution, arguments.drop_rate, strength),)
    if arguments.progressive is not None:
        # A third of dropout and RandAugment, as V2's table 6 has it, and no mixing.
        weak = Strength(randaugment=arguments.randaugment / 3)
        first = Phase(arguments.progressive, arguments.drop_rate / 3, weak)
        phases = progressive(first, phases[0], arguments.phases, hold=arguments.hold)
    return Recipe(
        phases, epochs=arguments.epochs, batch=arguments.batch, optimizer=arguments.optimizer,
        lr=arguments.lr, weight_decay=arguments.weight_decay,
        label_smoothing=arguments.label_smoothing, ema=arguments.ema, amp=arguments.amp,
        layer_decay=arguments.layer_decay, frozen_norms=arguments.frozen_norms,
        checkpointing=arguments.checkpointing, seed=arguments.seed,
    )  # fmt: skip


def _progress(trainer: Trainer, arguments: argparse.Namespace) -> Callable[[Step], None]:
    """Shows steps: a bar on a terminal, a line an epoch, and TensorBoard's events."""
    from tqdm import tqdm

    began = time.perf_counter()
    bar = tqdm(total=trainer.steps, initial=trainer.step, unit="step", disable=None)
    events = None
    if arguments.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps that are taken again are dropped.
        folder = str(arguments.out / "tensorboard")
        events = SummaryWriter(folder, purge_step=trainer.step)

    def progress(step: Step) -> None:
        bar.update()
        bar.set_postfix(loss=f"{step.loss:.3f}", pixels=step.resolution, refresh=False)
        if events is not None:
            for name in ("loss", "lr", "resolution", "accuracy"):
                if getattr(step, name) is not None:
                    events.add_scalar(name, getattr(step, name), step.step)
        if trainer.step % trainer.steps_per_epoch == 0:
            tested = "" if step.accuracy is None else f"  test {step.accuracy:.2%}"
            bar.write(
                f"epoch {step.epoch + 1}/{trainer.recipe.epochs}  step {trainer.step}/"
                f"{trainer.steps}  {step.resolution} px  lr {step.lr:.2e}  loss {step.loss:.3f}"
                f"{tested}  {time.perf_counter() - began:.0f} s"
            )
            sys.stdout.flush()
            if events is not None:
                events.flush()
        if trainer.step == trainer.steps:
            bar.close()
            if events is not None:
                events.close()

    return progress
