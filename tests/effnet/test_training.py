"""The training loop: what it does to images, its phases, what it learns, and that a run which was
killed goes on as if it had not been.
"""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import effnet
import pytest
import torch
from effnet.augment import RandAugmented, Strength, distort, mix, resize
from effnet.checkpoints import load_features
from effnet.data import InMemory, digits, load
from effnet.training import Phase, Recipe, Trainer, progressive
from train_worker import few_digits, recipe, small_model

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    """A fresh one."""
    return torch.Generator().manual_seed(seed)


def test_distort() -> None:
    """Nothing at magnitude 0, the same for the same generator, another for each image."""
    plain = distort(IMAGES, 12, 0.0, False, generator())
    torch.testing.assert_close(plain, resize(IMAGES, 12), rtol=1e-4, atol=1e-4)
    strong = distort(IMAGES, 8, 1.0, True, generator(1))
    assert strong.shape == (6, 3, 8, 8)
    assert torch.equal(strong, distort(IMAGES, 8, 1.0, True, generator(1)))
    assert not torch.equal(strong, distort(IMAGES, 8, 1.0, True, generator(2)))
    alike = distort(IMAGES[:1].expand(6, -1, -1, -1), 8, 1.0, True, generator(1))
    assert len({tuple(image.flatten().tolist()) for image in alike}) == 6


def test_mirrors() -> None:
    """Half of the images at magnitude 0 are mirrored."""
    many = IMAGES[:1].expand(200, -1, -1, -1)
    plain = resize(many[:1], 12)
    result = distort(many, 12, 0.0, True, generator())
    same = (result - plain).abs().amax((1, 2, 3)) < 1e-4
    flipped = (result - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same | flipped).all()
    assert 60 < int(same.sum()) < 140


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_mix(way: str) -> None:
    """Images and targets are mixed in the same shares."""
    images = torch.arange(4.0)[:, None, None, None].expand(-1, 1, 10, 10)
    targets = torch.eye(4)
    for seed in range(20):
        mixed, shares = mix(images, targets, Strength(**{way: 1.0}), generator(seed))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        means = mixed.mean((1, 2, 3))
        torch.testing.assert_close(means, shares @ torch.arange(4.0), rtol=1e-4, atol=1e-4)
        if way == "cutmix":
            assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}
    assert mix(images, targets, Strength(), generator())[0] is images


def test_progressive() -> None:
    """Equal steps of everything, resolutions of whole multiples."""
    phases = progressive(
        Phase(128, 0.1, Strength(0.0, 0.0, 0.0)), Phase(300, 0.3, Strength(0.6, 0.2, 1.0)), 4
    )
    assert [phase.resolution for phase in phases] == [128, 184, 240, 300]
    assert [phase.drop_rate for phase in phases] == pytest.approx([0.1, 1 / 6, 7 / 30, 0.3])
    assert [phase.strength.magnitude for phase in phases] == pytest.approx([0, 0.2, 0.4, 0.6])
    held = progressive(phases[0], phases[-1], 5, hold=2)
    assert held == (*phases, phases[-1])
    with pytest.raises(ValueError, match="phases: got 1"):
        progressive(phases[0], phases[-1], 1)
    with pytest.raises(ValueError, match="hold: got 2, expected 1 to 1"):
        progressive(phases[0], phases[-1], 2, hold=2)


def test_schedule() -> None:
    """A rise, a cosine to 0, phases of equal length."""
    trainer = Trainer(small_model(), few_digits(), recipe(epochs=10, warmup=0.1))
    rates = [trainer.lr(step) for step in range(trainer.steps)]
    assert trainer.steps == 60
    assert max(rates) == rates[5] == rates[6] == trainer.recipe.lr
    assert rates[0] == pytest.approx(trainer.recipe.lr / 6)
    assert rates[-1] < 0.01 * trainer.recipe.lr
    sizes = [trainer.phase(step).resolution for step in range(trainer.steps)]
    assert sizes == [8] * 20 + [12] * 20 + [16] * 20


def test_resumed_run_is_the_same(tmp_path: Path) -> None:
    """Losses, weights and averaged weights are equal to the bit."""
    whole = Trainer(small_model(), few_digits(), recipe(), tmp_path / "whole")
    whole.fit()
    half = Trainer(small_model(), few_digits(), recipe(), tmp_path / "half", save_every=4)
    half.fit(until=9)  # the last checkpoint is of step 8
    again = Trainer(small_model(), few_digits(), recipe(), tmp_path / "half", save_every=4)
    assert again.resume()
    assert again.step == 8
    again.fit()
    assert again.log == whole.log
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert whole.averaged is not None and again.averaged is not None
    for mine, other in zip(again.averaged.parameters(), whole.averaged.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_randaugment(tmp_path: Path) -> None:
    """Another change for each image and step, the same ones after resumption and from other
    processes, stronger ones at a larger magnitude.
    """
    source = RandAugmented(InMemory(torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8),
                                    torch.tensor([3, 5])))  # fmt: skip
    image, label = source[1, 9.0, 7]
    assert (label, image.dtype, image.shape) == (5, torch.uint8, (3, 24, 24))
    state = torch.random.get_rng_state()
    assert torch.equal(image, source[1, 9.0, 7][0])
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({tuple(source[1, 9.0, seed][0].flatten().tolist()) for seed in range(20)}) > 10
    plain = source[1, 0.4, 0][0].float()
    assert all(torch.equal(source[1, 0.0, seed][0].float(), plain) for seed in range(50))
    changes = [
        sum(float((source[1, m, seed][0].float() - plain).abs().mean()) for seed in range(60))
        for m in (3.0, 20.0)
    ]
    assert changes[0] < changes[1]

    def settings() -> Recipe:
        phases = progressive(
            Phase(8, 0.0, Strength(randaugment=2)), Phase(16, 0.1, Strength(randaugment=6)), 2
        )
        return recipe(phases=phases, epochs=2)

    whole = Trainer(small_model(), few_digits(), settings())
    whole.fit()
    half = Trainer(small_model(), few_digits(), settings(), tmp_path, save_every=4)
    half.fit(until=9)
    again = Trainer(small_model(), few_digits(), settings(), tmp_path, workers=1)
    assert again.resume()
    again.fit()
    assert again.log == whole.log
    other = Trainer(small_model(), few_digits(), recipe(phases=settings().phases[1:], epochs=2))
    other.fit()
    assert other.log != whole.log


def test_tests_are_in_the_log() -> None:
    """Every second epoch and the last; they change nothing."""
    plain = Trainer(small_model(), few_digits(), recipe())
    tested = Trainer(small_model(), few_digits(), recipe(), test_every=2)
    plain.fit()
    tested.fit()
    found = [row.step for row in tested.log if row.accuracy is not None]
    assert found == [11, 17]
    assert tested.log[-1].accuracy == tested.evaluate() == plain.evaluate()
    assert [row._replace(accuracy=None) for row in tested.log] == plain.log


def test_killed_run_goes_on(tmp_path: Path) -> None:
    """kill -9 loses the steps since the last checkpoint, and nothing else."""
    worker = Path(__file__).parents[1] / "train_worker.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(folder: str, pause: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, worker, tmp_path / folder, str(pause)],
            stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip

    process = start("killed", 0.05)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 7:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    for folder in ("killed", "whole"):
        output, _ = start(folder, 0.0).communicate(timeout=120)
        first = int(output.split()[0])
        assert first == (0 if folder == "whole" else first)
        assert folder == "whole" or 6 <= first <= 12
    logs = [
        list(csv.reader((tmp_path / folder / "log.csv").open())) for folder in ("killed", "whole")
    ]
    assert len(logs[0]) == 1 + 18
    assert logs[0] == logs[1]


def test_torchrun(tmp_path: Path) -> None:
    """Two processes share an epoch; the first one writes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "effnet", "train", "--data", "digits", "--resolution", "8", "--width", "0.25",
        "--depth", "0.3", "--stem-stride", "1", "--epochs", "1", "--batch", "128",
        "--out", str(tmp_path),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step 5/5" in result.stdout
    assert result.stdout.count("test accuracy") == 1
    assert (tmp_path / "weights.pt").exists()


def test_learns_the_digits() -> None:
    """To 96 % in a few epochs, from the averaged weights, in bfloat16's autocast."""
    torch.manual_seed(0)
    plain = Recipe((Phase(16, 0.1, Strength(0.3)),), epochs=6, lr=1e-2, ema=0.95, amp="bfloat16")
    trainer = Trainer(small_model(), digits(), plain)
    trainer.fit()
    losses = [step.loss for step in trainer.log]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert trainer.evaluate() >= 0.96


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd", "adamw"])
def test_optimizers(optimizer: str) -> None:
    """Each lowers the loss; BN and biases are not decayed."""
    settings = recipe(optimizer=optimizer, epochs=4, lr={"sgd": 0.1}.get(optimizer, 2e-3))
    trainer = Trainer(small_model(), few_digits(), settings)
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] in (0.02, 0.0)
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    trainer.fit()
    losses = [step.loss for step in trainer.log]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_transfer() -> None:
    """What was learned of five digits helps with the other five: from few images in few steps it
    is better than a fresh network, whose BN must learn its statistics, too.
    """
    before = digits(classes=(0, 1, 2, 3, 4))
    torch.manual_seed(0)
    pretraining = Recipe((Phase(16, 0.1, Strength(0.3)),), epochs=5, lr=1e-2)
    teacher = effnet.EfficientNet(
        WIDE, 5, 1, stem_channels=16, head_channels=64, stem_stride=1, drop_path_rate=0.0
    )
    Trainer(teacher, before, pretraining).fit()
    after = digits(classes=(5, 6, 7, 8, 9))
    train = after.train
    assert isinstance(train, InMemory)
    after = after._replace(train=InMemory(train.images[:80], train.classes[:80]))
    accuracies = {}
    for way in ("transferred", "fresh"):
        torch.manual_seed(1)
        model = effnet.EfficientNet(
            WIDE, 5, 1, stem_channels=16, head_channels=64, stem_stride=1, drop_path_rate=0.0
        )
        settings = {"epochs": 6, "batch": 20, "lr": 1e-2}
        if way == "transferred":
            load_features(model, effnet.to_timm(teacher))
            settings |= {"layer_decay": 0.9, "frozen_norms": True}
        statistics = model.head.bn.running_mean.clone()
        trainer = Trainer(model, after, Recipe((Phase(16, 0.1),), **settings))
        trainer.fit()
        assert torch.equal(model.head.bn.running_mean, statistics) == (way == "transferred")
        accuracies[way] = trainer.evaluate()
    assert accuracies["transferred"] > accuracies["fresh"] + 0.2, accuracies
    assert accuracies["transferred"] > 0.7


def test_layers_learn_at_their_rates() -> None:
    """The classifier at the full rate, each layer before it at a share of the next one's."""
    trainer = Trainer(small_model(), few_digits(), recipe(layer_decay=0.5))
    trainer.fit(until=1)
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
    model, full = trainer.model, trainer.lr(0)
    assert rates[model.classifier.weight] == full
    assert rates[model.head.conv.weight] == full / 2
    assert rates[model.stages[2][0].project_conv.weight] == full / 4
    assert rates[model.stem.expand_conv.weight] == full / 2**5


def test_checkpointing() -> None:
    """The same losses and running statistics with less kept."""
    runs = []
    for checkpointing in (False, True):
        trainer = Trainer(small_model(), few_digits(), recipe(checkpointing=checkpointing))
        trainer.fit(until=4)
        runs.append(trainer)
    for one, other in zip(runs[0].log, runs[1].log, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for name, tensor in runs[0].model.state_dict().items():
        torch.testing.assert_close(
            runs[1].model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name
        )


def test_digits() -> None:
    """All of them, or some classes, renumbered."""
    data = digits()
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    some = digits(classes=(7, 3))
    assert isinstance(some.train, InMemory)
    assert set(some.train.classes.tolist()) == {0, 1}
    assert some.classes == 2
    image, label = some.test[0]
    assert image.dtype == torch.uint8
    assert label in (0, 1)


def test_folder(tmp_path: Path) -> None:
    """Pictures in folders of classes, brought to one size."""
    from PIL import Image

    for split in ("train", "val"):
        for number, name in enumerate(("cats", "dogs")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                picture = Image.new("RGB", (20 + i, 30), (100 * number, 50, 50))
                picture.save(tmp_path / split / name / f"{i}.png")
    data = load("folder", tmp_path, size=16)
    assert (len(data.train), len(data.test), data.classes, data.in_chans) == (6, 6, 2, 3)
    image, label = data.train[5]
    assert image.shape == (3, 16, 16)
    assert (label, int(image[0, 0, 0])) == (1, 100)
    trainer = Trainer(
        effnet.EfficientNet(STAGES, 2), data, Recipe((Phase(16),), epochs=1, batch=4), workers=1
    )
    trainer.fit()
    assert math.isfinite(trainer.log[0].loss)


STAGES = (effnet.Stage(1, 3, 2, 8, 1), effnet.Stage(4, 3, 2, 16, 1))
WIDE = (effnet.Stage(1, 3, 1, 16, 1), effnet.Stage(4, 3, 2, 32, 1), effnet.Stage(4, 3, 1, 32, 1))


def test_errors(tmp_path: Path) -> None:
    """One line that says what is right instead."""
    with pytest.raises(ValueError, match="data: got 'digit', expected digits, folder, CIFAR10"):
        load("digit")
    with pytest.raises(ValueError, match="expected a folder with train and test"):
        load("folder", tmp_path)
    with pytest.raises(ValueError, match="optimizer: got 'adam'"):
        recipe(optimizer="adam")
    with pytest.raises(ValueError, match="batch: got 97 in 1 processes"):
        Trainer(small_model(), few_digits(), recipe(batch=97))
    trainer = Trainer(small_model(), few_digits(), recipe(), tmp_path)
    assert not trainer.resume()
    trainer.fit(until=1)
    trainer.save()
    with pytest.raises(ValueError, match="is of another recipe"):
        Trainer(small_model(), few_digits(), recipe(lr=1.0), tmp_path).resume()
    other = effnet.EfficientNet(STAGES, 10, 1)
    with pytest.raises(ValueError, match="is of another model"):
        Trainer(other, few_digits(), recipe(), tmp_path).resume()
    with pytest.raises(ValueError, match="is of another set of images"):
        Trainer(small_model(), few_digits(80), recipe(), tmp_path).resume()
    (tmp_path / "checkpoint.pt").write_bytes(b"half of a chec")
    with pytest.raises(ValueError, match="cannot be read"):
        Trainer(small_model(), few_digits(), recipe(), tmp_path).resume()
