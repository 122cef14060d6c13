"""Winograd's convolution of images in the usual order, against a float64 oracle: any geometry, batch, size, mask and epilogue."""

from __future__ import annotations

import pytest
import torch

from sift_compiler.lowering.epilogue import Epilogue
from tests.runtimes.forced_winograd import ALL, build, error, force, parts
from tests.runtimes.test_conformance import TOLERANCE, layer, sparse_mask

TILES = pytest.mark.parametrize("reach", [4, 6])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "reach"),
    [
        ((2, 2), 1, (1, 0), 6),
        ((3, 3), 2, (1, 1), 6),
        ((3, 3), 1, (0, 0), 4),
        ((3, 3), 1, (1, 1), 6),
        ((3, 3), 1, (0, 1), 6),
        ((3, 3), 1, (2, 2), 4),
        ((5, 6), 2, (1, 2), 4),
        ((5, 6), 2, (2, 0), 6),
        ((4, 4), 1, (0, 3), 6),
        ((7, 7), 2, (3, 3), 6),
        ((5, 5), 1, (2, 2), 6),
    ],
)
def test_any_geometry(
    kernel: tuple[int, int], stride: int, padding: tuple[int, int], reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, reach)
    one = layer(sparse_mask((11, 7, *kernel)), stride=(stride, stride), padding=padding)
    assert error(build(one), one, torch.randn(2, 7, 13, 19)) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 17])
def test_any_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((13, 17, 3, 3)), padding=(1, 1))
    assert error(build(one), one, torch.randn(batch, 17, 9, 11)) < TOLERANCE


@TILES
@pytest.mark.parametrize("size", [(1, 1), (1, 13), (2, 2), (3, 70), (20, 1), (7, 3), (37, 33), (16, 64)])
def test_odd_sizes(size: tuple[int, int], reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, reach)
    one = layer(sparse_mask((9, 8, 3, 3)), padding=(1, 1))
    assert error(build(one), one, torch.randn(2, 8, *size)) < TOLERANCE


@TILES
@pytest.mark.parametrize(("channels", "more"), [(1, 1), (7, 11), (13, 17), (5, 131), (131, 5)])
def test_any_number_of_channels(channels: int, more: int, reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, reach)
    mask = torch.rand(more, channels, 3, 3) < 0.5
    mask[0, 0, 1, 2] = True
    one = layer(mask, padding=(1, 1))
    kernel = build(one)
    assert error(kernel, one, torch.randn(2, channels, 9, 14)) < TOLERANCE
    if more > 100:
        (part,) = parts(kernel)
        assert part._at_once < part._blocks, "sums are transformed back piece by piece"


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("size", [(1, 1), (9, 11), (37, 33)])
def test_any_number_of_threads(threads: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((26, 10, 3, 3)), padding=(1, 1))
    assert error(build(one, threads=threads), one, torch.randn(3, 10, *size)) < TOLERANCE


@pytest.mark.parametrize("kept", ["one", "last", "all", "one row"])
def test_extreme_masks(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    mask = torch.full((10, 9, 3, 3), kept == "all")
    if kept == "one row":
        mask[3] = True
    elif kept != "all":
        mask.view(-1)[-1 if kept == "last" else 200] = True
    one = layer(mask, padding=(1, 1))
    assert error(build(one), one, torch.randn(3, 9, 5, 6)) < TOLERANCE


@pytest.mark.parametrize(
    "epilogue",
    [ALL, Epilogue(scaled=True), Epilogue(scaled=True, activation="relu"), Epilogue(scaled=True, residual=True)],
    ids=str,
)
def test_what_is_added_and_cut_off_is_said_at_run_time(epilogue: Epilogue, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((13, 17, 3, 3)), padding=(1, 1))
    assert error(build(one, epilogue=epilogue), one, torch.randn(2, 17, 9, 11)) < TOLERANCE


def test_one_thread_another_shape_and_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6, 2)
    one = layer(sparse_mask((13, 17, 3, 3)), padding=(1, 1), bias=False)
    kernel = build(one, threads=1, epilogue=Epilogue(scaled=True, residual=True, activation="relu6"))
    for batch, size in ((1, (9, 11)), (3, (2, 33)), (2, (40, 40))):
        assert error(kernel, one, torch.randn(batch, 17, *size)) < TOLERANCE


def test_arguments_come_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((7, 5, 3, 3)), padding=(1, 1))
    kernel = build(one)
    assert error(kernel, one, torch.randn(3, 5, 8, 9).to(memory_format=torch.channels_last)) < TOLERANCE
    assert error(kernel, one, torch.randn(3 * 5 * 72 + 1)[1:].view(3, 5, 8, 9)) < TOLERANCE
    one.values = torch.randn(one.spec.nnz + 1)[1:]
    assert one.bias is not None
    one.bias = torch.randn(8)[1:]
    x = torch.randn(3, 5, 8, 9)
    before = [t.clone() for t in (x, one.values, one.index, one.bias)]
    assert error(kernel, one, x) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(before, (x, one.values, one.index, one.bias), strict=True))
