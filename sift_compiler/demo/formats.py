"""Files of the real data sets, read into raw pixels: gzip idx (Fashion-MNIST), binary records and WebP sheets (CIFAR-100).

Nothing here unpickles. A file that is damaged, short or of another kind is a UserError that names it.
"""

from __future__ import annotations

import gzip
import importlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sift_compiler.errors import UserError

Array = npt.NDArray[Any]

INSTALL = "pip install 'sift_compiler[demo]'"
"""What brings the packages only the demo needs."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A data set as it is stored.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N], from 0.
        scale: the value of full brightness, 255 or less.
    """

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array
    scale: int = 255


def need(module: str) -> Any:
    """Import a package that only the demo needs.

    Raises:
        UserError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"The demo needs {module.split('.')[0]}, which cannot be imported ({error}). Install it: {INSTALL}"
        ) from error


def read_idx(path: Path) -> Array:
    """A gzip-compressed idx file of unsigned bytes (LeCun's format), uint8 of the shape its header gives."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as a gzip file: {error}. Download it again.") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(f"{path} is not an idx file of unsigned bytes (its first bytes are {content[:4].hex(' ')}).")
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    found, expected = len(content) - 4 - 4 * dimensions, int(np.prod(shape, dtype=np.int64))
    if found != expected:
        raise UserError(f"{path} is cut short or padded: its header {shape} asks for {expected} bytes, it has {found}.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_fashion_mnist(folder: Path) -> Pixels:
    """The four official files; images become [N, 1, 28, 28]."""
    parts: list[Array] = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(
                f"{folder}: {part} has images {images.shape} and labels {labels.shape}; expected [N, height, width] and [N]."
            )
        parts += [images.reshape(len(images), 1, *images.shape[1:]), labels.astype(np.int64)]
    return Pixels(parts[0], parts[1], parts[2], parts[3])


_RECORD = 2 + 3 * 32 * 32


def read_cifar_records(folder: Path) -> Pixels:
    """CIFAR-100's binary version: per image one byte coarse label, one byte fine label, 3072 bytes red, green, blue."""
    parts: list[Array] = []
    for name in ("train.bin", "test.bin"):
        content = np.fromfile(folder / name, np.uint8)
        if content.size == 0 or content.size % _RECORD:
            raise UserError(
                f"{folder / name} has {content.size} bytes; expected a positive multiple of {_RECORD}. Download it again."
            )
        records = content.reshape(-1, _RECORD)
        parts += [records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1].astype(np.int64)]
    return Pixels(parts[0], parts[1], parts[2], parts[3])


def read_cifar_sheets(folder: Path) -> Pixels:
    """CIFAR-100 as lossless WebP sheets of stacked images, 32 pixels wide, and ``labels.npz`` (``y_train``, ``y_test``)."""
    try:
        with np.load(folder / "labels.npz", allow_pickle=False) as archive:
            labels = [archive["y_train"].astype(np.int64), archive["y_test"].astype(np.int64)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'labels.npz'} does not hold y_train and y_test: {error}.") from error
    parts: list[Array] = []
    for part, expected in zip(("train", "test"), labels, strict=True):
        sheets = [_read_sheet(path) for path in sorted(folder.glob(f"{part}-*.webp"))]
        images = np.concatenate(sheets) if sheets else np.zeros((0, 32, 32, 3), np.uint8)
        if len(images) != len(expected):
            raise UserError(
                f"{folder}: {len(images)} {part} images in {len(sheets)} sheets, but {len(expected)} labels."
            )
        parts += [np.ascontiguousarray(images.transpose(0, 3, 1, 2)), expected]
    return Pixels(parts[0], parts[1], parts[2], parts[3])


def _read_sheet(path: Path) -> Array:
    image = need("PIL.Image")
    try:
        with image.open(path) as opened:
            sheet = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error}.") from error
    if sheet.shape[1] != 32 or sheet.shape[0] % 32:
        raise UserError(
            f"{path} is {sheet.shape[1]} × {sheet.shape[0]} pixels; expected 32 wide and a multiple of 32 high."
        )
    return sheet.reshape(-1, 32, 32, 3)


def read_digits(seed: int = 0, test: int = 1000) -> Pixels:
    """scikit-learn's 1,797 handwritten digits, 8 × 8, 17 grey levels; the same split always: ``test`` images, the rest to train."""
    images, labels = need("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = images.astype(np.uint8).reshape(-1, 1, 8, 8)[order]
    labels = labels.astype(np.int64)[order]
    return Pixels(images[test:], labels[test:], images[:test], labels[:test], scale=16)
