"""Images and classes to train on: from memory, from folders, or of torchvision by name.

A source gives square uint8 images of one size; what training does to them, and to which size it
brings them, is ``augment``'s, on the device and by the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from effnet.images import MEAN, STD

TORCHVISION = (
    "CIFAR10", "CIFAR100", "Flowers102", "StanfordCars", "OxfordIIITPet", "FGVCAircraft", "Food101",
    "Caltech101",
)  # fmt: skip
"""The datasets of torchvision that ``load`` knows."""
_SPLITS = {"CIFAR10": None, "CIFAR100": None, "FGVCAircraft": ("trainval", "test"),
           "Flowers102": ("train", "test"), "OxfordIIITPet": ("trainval", "test"),
           "StanfordCars": ("train", "test"), "Food101": ("train", "test")}  # fmt: skip
_CALTECH_TEST = 5  # every fifth image: it has no split of its own


class Data(NamedTuple):
    """What ``load`` gives.

    Attributes:
        train: of ((C, H, W) uint8, class).
        test: likewise.
        class_names: of the classes, in order.
        in_chans: C.
        mirrors: whether an image's mirror image is as good.
        mean: of each channel, of values in [0, 1]: a network is given images less it, over ``std``.
        std: likewise.
    """

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    class_names: tuple[str, ...]
    in_chans: int
    mirrors: bool
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.class_names)


class InMemory(Dataset[tuple[Tensor, int]]):
    """Images and classes that are tensors already.

    Args:
        images: (N, C, H, W) uint8.
        classes: (N,) integers.
    """

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.classes[index])


class _Mapped(Dataset[tuple[Tensor, int]]):
    """Another library's dataset of pictures, as tensors of one size."""

    def __init__(self, source: Any, to_tensor: Callable[[Any], Tensor]) -> None:
        self._source, self._to_tensor = source, to_tensor

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._source[index]
        return self._to_tensor(image), int(label)


def digits(test: int = 360, *, classes: tuple[int, ...] = tuple(range(10))) -> Data:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels: no network, no files.

    Args:
        test: how many of all digits, in a fixed random order, are not trained on.
        classes: the digits wanted, numbered from 0 in this order.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(found.images)[order] * 15).to(torch.uint8)[:, None]
    labels = torch.tensor(found.target)[order]
    parts = []
    for part in (slice(test, None), slice(test)):
        own_images, own_labels = images[part], labels[part]
        chosen = torch.zeros(len(own_labels), dtype=torch.bool)
        numbered = torch.zeros_like(own_labels)
        for number, digit in enumerate(classes):
            chosen |= own_labels == digit
            numbered[own_labels == digit] = number
        parts.append(InMemory(own_images[chosen], numbered[chosen]))
    names = tuple(map(str, classes))
    return Data(parts[0], parts[1], names, 1, mirrors=False, mean=(0.5,), std=(0.5,))


def load(name: str, root: str | Path = "data", *, size: int = 256, download: bool = False) -> Data:
    """A dataset by name.

    Args:
        name: ``digits``, ``folder`` or one of ``TORCHVISION``.
        root: of ``folder``, with the folders ``train`` and ``test`` or ``val``, and in each one
            folder a class; where torchvision keeps its own.
        size: side to which pictures are brought, in pixels: somewhat more than what is trained on.
        download: fetch torchvision's where they are not there.

    Raises:
        ValueError: there is no such dataset, or it is not in ``root``; the message is one line.
        ImportError: a package that it needs is not installed.
    """
    if name == "digits":
        return digits()
    if name != "folder" and name not in TORCHVISION:
        raise ValueError(f"data: got {name!r}, expected digits, folder, {', '.join(TORCHVISION)}")
    from torchvision import datasets
    from torchvision.transforms import v2

    to_tensor: Any = v2.Compose(
        [v2.RGB(), v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    )

    def of(train: Any, test: Any, names: Sequence[str]) -> Data:
        return Data(
            _Mapped(train, to_tensor), _Mapped(test, to_tensor), tuple(names), 3, mirrors=True
        )

    root = Path(root)
    if name == "folder":
        found = {split: root / split for split in ("train", "test", "val")}
        held_out = found["test"] if found["test"].is_dir() else found["val"]
        if not (found["train"].is_dir() and held_out.is_dir()):
            raise ValueError(
                f"root: got {str(root)!r}, expected a folder with train and test (or val) in it"
            )
        train, test = (datasets.ImageFolder(str(path)) for path in (found["train"], held_out))
        if train.classes != test.classes:
            raise ValueError(f"root: the classes in train and {held_out.name} differ")
        return of(train, test, train.classes)
    create = getattr(datasets, name)
    try:
        if name == "Caltech101":
            every = create(str(root), download=download)
            held = range(0, len(every), _CALTECH_TEST)
            kept = [i for i in range(len(every)) if i not in held]
            return of(Subset(every, kept), Subset(every, held), every.categories)
        splits = _SPLITS[name]
        if splits is None:
            train, test = (
                create(str(root), train=is_train, download=download) for is_train in (True, False)
            )
        else:
            train, test = (create(str(root), split=split, download=download) for split in splits)
    except RuntimeError as error:
        raise ValueError(
            f"data: {name} is not in {str(root)!r} ({str(error).splitlines()[0]}); "
            "--download fetches it"
        ) from error
    return of(train, test, train.classes)
