"""Data sets by name, as normalised tensors: digits (built in), Fashion-MNIST and CIFAR-100 (from a folder)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sift_compiler.demo import formats
from sift_compiler.demo.formats import Array, Pixels
from sift_compiler.errors import UserError, unknown_name


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels.

    Attributes:
        name: as in :data:`NAMES`.
        train_images, test_images: float32 [N, C, H, W], ``(pixel / full brightness - mean) / std`` per channel.
        train_labels, test_labels: int64 [N], in [0, classes).
        classes: number of classes.
        mean, std: what the images were normalised with, one number per channel, of pixels in [0, 1].
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def limited(self, train: int | None) -> Dataset:
        """The same with the first ``train`` training images only; None keeps all.

        Raises:
            UserError: fewer than one, or more than there are.
        """
        if train is None:
            return self
        count = len(self.train_labels)
        if not 1 <= train <= count:
            raise UserError(f"{self.name} has {count} training images; a limit of {train} must lie in 1 to {count}.")
        return Dataset(
            self.name, self.train_images[:train], self.train_labels[:train], self.test_images, self.test_labels,
            self.classes, self.mean, self.std,
        )  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """One way the files of a data set may lie in a folder, and what reads them."""

    marks: tuple[str, ...]
    """Files that are there if and only if this is the way."""
    read: Callable[[Path], Pixels]


@dataclass(frozen=True)
class _Files:
    folders: tuple[str, ...]
    """Names that the set's own folder often has."""
    sources: tuple[_Source, ...]
    expected: str
    origin: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


_IDX = tuple(f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))

_FILES = {
    "fashion-mnist": _Files(
        ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
        (_Source(_IDX, formats.read_fashion_mnist),),
        ", ".join(_IDX),
        "https://github.com/zalandoresearch/fashion-mnist (folder data/fashion)",
        10,
        (0.2860,),
        (0.3530,),
    ),
    "cifar100": _Files(
        ("cifar100", "cifar-100-binary", "cifar-100"),
        (
            _Source(("train.bin", "test.bin"), formats.read_cifar_records),
            _Source(("labels.npz", "train-000.webp", "test-000.webp"), formats.read_cifar_sheets),
        ),
        "train.bin and test.bin (the binary version), or labels.npz with train-*.webp and test-*.webp (lossless sheets)",
        "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-100 binary version, unpacked)",
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}

NAMES = ("digits", *_FILES)
"""Known data sets."""


def load_dataset(name: str, folder: str | Path | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: one of :data:`NAMES`.
        folder: where its files lie, or the parent of that folder; not used for digits, which come with scikit-learn.

    Raises:
        UserError: an unknown name, a missing folder or file (says which files are expected and where to get them),
            a damaged file, or a package of the demo that is not installed.
    """
    if name == "digits":
        pixels = formats.read_digits()
        train = torch.from_numpy(pixels.train_images / pixels.scale)
        return _normalised(name, pixels, 10, (round(float(train.mean()), 4),), (round(float(train.std()), 4),))
    if name not in _FILES:
        raise unknown_name("data set", name, NAMES)
    files = _FILES[name]
    source, place = _locate(name, files, folder)
    return _normalised(name, source.read(place), files.classes, files.mean, files.std)


def check_folder(name: str, folder: str | Path | None) -> None:
    """Raise the UserError of :func:`load_dataset` for a missing folder or file, without reading any."""
    if name in _FILES:
        _locate(name, _FILES[name], folder)
    elif name != "digits":
        raise unknown_name("data set", name, NAMES)


def _locate(name: str, files: _Files, folder: str | Path | None) -> tuple[_Source, Path]:
    advice = f"Expected files: {files.expected}. Get them from {files.origin}."
    if folder is None:
        raise UserError(f"The data set {name!r} is not built in: give its folder (--data DIR). {advice}")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}, given as the folder of {name!r}, is not a folder. {advice}")
    for place in (root, *(root / inner for inner in files.folders)):
        for source in files.sources:
            if all((place / mark).is_file() for mark in source.marks):
                return source, place
    raise UserError(f"{root} does not hold the data set {name!r}. {advice} DIR is their folder or the parent of it.")


def _normalised(
    name: str, pixels: Pixels, classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:  # fmt: skip
    def images(raw: Array) -> Tensor:
        scaled = torch.tensor(raw, dtype=torch.float32).div_(pixels.scale)
        shape = (1, -1, 1, 1)
        return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))

    labels = [torch.tensor(part) for part in (pixels.train_labels, pixels.test_labels)]
    for part in labels:
        if part.numel() == 0 or int(part.min()) < 0 or int(part.max()) >= classes:
            raise UserError(f"The labels of {name!r} must lie in [0, {classes}) and there must be some.")
    return Dataset(
        name, images(pixels.train_images), labels[0], images(pixels.test_images), labels[1], classes, mean, std
    )
