"""Trains on the digits into a folder, as a process that a test kills and starts again."""

from __future__ import annotations

import sys
import time

import torch
from effnet.augment import Strength
from effnet.data import Data, InMemory, digits
from effnet.efficientnet import EfficientNet
from effnet.training import Phase, Recipe, Step, Trainer, progressive
from effnet.variants import Stage

STAGES = (Stage(1, 3, 1, 16, 1), Stage(4, 3, 2, 24, 1), Stage(4, 3, 1, 24, 1))


def small_model() -> EfficientNet:
    """Some 10,000 parameters, from seed 0."""
    torch.manual_seed(0)
    return EfficientNet(
        STAGES, 10, 1, stem_channels=16, head_channels=64, stem_stride=1, drop_path_rate=0.1
    )


def few_digits(images: int = 96) -> Data:
    """The first of them."""
    data = digits()
    train = data.train
    assert isinstance(train, InMemory)
    return data._replace(train=InMemory(train.images[:images], train.classes[:images]))


def recipe(**settings: object) -> Recipe:
    """Three phases with everything random in them."""
    phases = progressive(
        Phase(8, 0.0), Phase(16, 0.3, Strength(0.5, 0.2, 1.0)), phases=3, multiple=4
    )
    return Recipe(**{"phases": phases, "epochs": 3, "batch": 16, "ema": 0.9, **settings})  # type: ignore[arg-type]


def main(folder: str, pause: float) -> None:
    """Resumes where it can; waits after every step, so that there is time to be killed."""
    torch.set_num_threads(1)
    trainer = Trainer(small_model(), few_digits(), recipe(), folder, save_every=2)
    trainer.resume()

    def progress(step: Step) -> None:
        print(step.step, flush=True)
        time.sleep(pause)

    trainer.fit(progress=progress)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
