"""Loaders of the demo's data sets, on tiny files in the real formats."""

import gzip
import struct

import numpy as np
import pytest
import torch

from sift_compiler.demo import formats
from sift_compiler.demo.datasets import check_folder, load_dataset
from sift_compiler.errors import UserError


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path):
    """Fashion-MNIST's layout with 6 and 3 images; returns the folder and the training pixels and labels."""
    random = np.random.default_rng(0)
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    made = {}
    for part, count in (("train", 6), ("t10k", 3)):
        images, labels = random.integers(0, 256, (count, 28, 28)), random.integers(0, 10, count)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
        made[part] = images, labels
    return folder, *made["train"]


@pytest.mark.parametrize("of_parent", [False, True])
def test_fashion_mnist_from_its_folder_or_the_parent(fashion, of_parent):
    folder, images, labels = fashion
    data = load_dataset("fashion-mnist", folder.parent if of_parent else folder)
    assert data.image_shape == (1, 28, 28)
    assert data.train_images.stride() == (784, 784, 28, 1), "slices must look alike to a compiler"
    assert len(data.test_labels) == 3
    assert data.train_labels.tolist() == labels.tolist()
    expected = (torch.tensor(images, dtype=torch.float64) / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(data.train_images[:, 0].double(), expected, rtol=0, atol=1e-6)


def test_cifar100_binary_records(tmp_path):
    random = np.random.default_rng(1)
    records = random.integers(0, 256, (4, 2 + 3072)).astype(np.uint8)
    records[:, 0] = 255  # the coarse label must not be taken
    records[:, 1] %= 100
    for name in ("train.bin", "test.bin"):
        records.tofile(tmp_path / name)
    data = load_dataset("cifar100", tmp_path)
    assert data.classes == 100
    assert data.train_labels.tolist() == records[:, 1].tolist()
    green = (records[2, 2 + 1024 : 2 + 2048].astype(np.float64) / 255 - 0.4865) / 0.2564
    np.testing.assert_allclose(data.train_images[2, 1].flatten().double().numpy(), green, atol=1e-6)


def test_cifar100_lossless_sheets(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(2).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    for part in ("train", "test"):
        for sheet, chosen in enumerate((pixels[:3], pixels[3:])):
            stacked = image.fromarray(chosen.reshape(-1, 32, 3))
            stacked.save(tmp_path / f"{part}-{sheet:03d}.webp", lossless=True)
    labels = np.arange(5)
    np.savez(tmp_path / "labels.npz", y_train=labels, y_test=labels)
    data = load_dataset("cifar100", tmp_path)
    blue = (pixels[4, :, :, 2].astype(np.float64) / 255 - 0.4409) / 0.2762
    np.testing.assert_allclose(data.train_images[4, 2].double().numpy(), blue, atol=1e-6)
    (tmp_path / "train-001.webp").unlink()
    with pytest.raises(UserError, match="3 train images in 1 sheets, but 5 labels"):
        load_dataset("cifar100", tmp_path)


def test_digits_are_the_same_split_every_time_and_normalised():
    pytest.importorskip("sklearn")
    first, second = load_dataset("digits"), load_dataset("digits")
    assert (len(first.train_labels), len(first.test_labels)) == (797, 1000)
    assert torch.equal(first.test_images, second.test_images)
    assert abs(float(first.train_images.mean())) < 1e-3
    assert abs(float(first.train_images.std()) - 1) < 1e-3
    assert len(first.limited(50).train_labels) == 50
    with pytest.raises(UserError, match="797 training images; a limit of 798"):
        first.limited(798)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar100"])
def test_a_missing_folder_or_file_says_what_is_expected_and_where_it_comes_from(tmp_path, name):
    wanted = {
        "fashion-mnist": "t10k-labels-idx1-ubyte.gz.*github.com/zalandoresearch",
        "cifar100": "train.bin.*kriz/cifar",
    }
    for folder, complaint in (
        (None, "--data DIR"),
        (tmp_path / "none", "is not a folder"),
        (tmp_path, "does not hold"),
    ):
        with pytest.raises(UserError, match=f"{complaint}.*{wanted[name]}"):
            check_folder(name, folder)


def test_damaged_files_and_unknown_names_are_refused(fashion, tmp_path):
    folder, *_ = fashion
    labels = folder / "train-labels-idx1-ubyte.gz"
    whole = gzip.decompress(labels.read_bytes())
    for content, complaint in (
        (b"no gzip", "gzip"),
        (gzip.compress(b"\0\0\x0d\x01"), "not an idx file"),
        (gzip.compress(whole[:-1]), "cut short"),
        (idx(np.arange(5)), r"images \(6, 28, 28\) and labels \(5,\)"),
        (idx(np.array([0, 1, 2, 3, 4, 10])), r"labels.*\[0, 10\)"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            load_dataset("fashion-mnist", folder)
    (tmp_path / "train.bin").write_bytes(bytes(3000))
    (tmp_path / "test.bin").write_bytes(bytes(3074))
    with pytest.raises(UserError, match=r"train.bin has 3000 bytes"):
        load_dataset("cifar100", tmp_path)
    with pytest.raises(UserError, match="Did you mean 'digits'"):
        load_dataset("digit")


def test_a_missing_package_is_named_with_the_way_to_install_it():
    with pytest.raises(UserError, match=r"needs no_such_package.*pip install 'sift_compiler\[demo\]'"):
        formats.need("no_such_package.inner")
