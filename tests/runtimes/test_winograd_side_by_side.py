"""Winograd's convolution of images side by side in vectors, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.nn.fused import Finish
from sift_compiler.runtimes.tvm import winograd_lane_part
from sift_compiler.runtimes.tvm.target import host_cpu
from tests.runtimes.forced_winograd import ALL, build, error, force, parts
from tests.runtimes.test_conformance import TOLERANCE, layer, sparse_mask

LANES = host_cpu().lanes


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "reach"),
    [
        ((2, 2), 1, (1, 0), 4),
        ((3, 3), 2, (1, 1), 4),
        ((3, 3), 1, (0, 0), 6),
        ((3, 3), 1, (1, 1), 4),
        ((3, 3), 1, (0, 1), 4),
        ((3, 3), 1, (2, 2), 6),
        ((5, 6), 2, (1, 2), 6),
        ((5, 6), 2, (2, 0), 4),
        ((7, 7), 2, (3, 3), 6),
        ((5, 5), 1, (2, 2), 6),
    ],
)
def test_any_geometry(
    groups: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int], reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    force(monkeypatch, reach)
    one = layer(sparse_mask((11, 7, *kernel)), stride=(stride, stride), padding=padding)
    assert error(build(one), one, torch.randn(groups * LANES, 7, 13, 19), side_by_side=True) < TOLERANCE


@pytest.mark.parametrize("reach", [4, 6])
@pytest.mark.parametrize("size", [(1, 1), (1, 13), (2, 2), (3, 70), (20, 1), (7, 3), (16, 16)])
def test_odd_sizes(size: tuple[int, int], reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, reach)
    one = layer(sparse_mask((9, 8, 3, 3)), padding=(1, 1))
    assert error(build(one), one, torch.randn(LANES, 8, *size), side_by_side=True) < TOLERANCE


@pytest.mark.parametrize(("channels", "more"), [(1, 1), (7, 11), (13, 17), (5, 131), (131, 5)])
def test_any_number_of_channels(channels: int, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    mask = torch.rand(more, channels, 3, 3) < 0.5
    mask[0, 0, 1, 2] = True
    one = layer(mask, padding=(1, 1))
    kernel = build(one)
    assert error(kernel, one, torch.randn(LANES, channels, 9, 14), side_by_side=True) < TOLERANCE
    if more > 100:
        (part,) = parts(kernel)
        assert part._at_once < part._blocks, "sums are transformed back piece by piece"


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("size", [(1, 1), (9, 30)])
def test_any_number_of_threads(threads: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((26, 10, 3, 3)), padding=(1, 1))
    assert error(build(one, threads=threads), one, torch.randn(LANES, 10, *size), side_by_side=True) < TOLERANCE


@pytest.mark.parametrize("kept", ["one", "last", "all", "one row"])
def test_extreme_masks(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    mask = torch.full((10, 9, 3, 3), kept == "all")
    if kept == "one row":
        mask[3] = True
    elif kept != "all":
        mask.view(-1)[-1 if kept == "last" else 200] = True
    one = layer(mask, padding=(1, 1))
    assert error(build(one), one, torch.randn(LANES, 9, 5, 6), side_by_side=True) < TOLERANCE


@pytest.mark.parametrize(
    "epilogue",
    [ALL, Epilogue(scaled=True), Epilogue(scaled=True, activation="relu"), Epilogue(scaled=True, residual=True)],
    ids=str,
)
def test_what_is_added_and_cut_off_is_said_at_run_time(epilogue: Epilogue, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((13, 17, 3, 3)), padding=(1, 1))
    assert error(build(one, epilogue=epilogue), one, torch.randn(LANES, 17, 9, 11), side_by_side=True) < TOLERANCE


def test_an_input_that_does_not_begin_on_a_cache_line(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)
    one = layer(sparse_mask((6, 5, 3, 3)))
    kernel = build(one, epilogue=Epilogue(scaled=True))
    scale = torch.ones(6)
    x = torch.randn(5 * 30 * LANES + 1)[1:].view(1, 5, 6, 5, LANES)
    y, again = (kernel(each, one.values, one.index, one.bias, Finish(scale, scale)) for each in (x, x.clone()))
    assert torch.equal(y, again)


def test_one_thread_another_activation_and_outputs_stored_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6, 1)
    monkeypatch.setattr(winograd_lane_part, "STREAMED_BYTES", 0)
    one = layer(sparse_mask((13, 17, 3, 3)), padding=(1, 1), bias=False)
    kernel = build(one, threads=1, epilogue=Epilogue(residual=True, activation="gelu"))
    for groups, size in ((1, (9, 11)), (3, (2, 33))):
        assert error(kernel, one, torch.randn(groups * LANES, 17, *size), side_by_side=True) < TOLERANCE
