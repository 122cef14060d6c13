"""Winograd's convolution in vectors narrower than this machine's, in both layouts, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch

from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from tests.runtimes.forced_winograd import ALL, build, error, force
from tests.runtimes.test_conformance import TOLERANCE, layer, sparse_mask
from tests.runtimes.test_image_vectors import PROCESSORS

CASES = {
    "haswell": (1, (PLAIN, Epilogue(residual=True, activation="relu"))),
    "x86-64": (2, (ALL, Epilogue(scaled=True))),
}
"""Threads and epilogues; both epilogues are compiled as one."""


@pytest.mark.parametrize("side_by_side", [False, True], ids=["usual order", "side by side"])
@pytest.mark.parametrize("processor", [name for name in PROCESSORS if name != "host"])
def test_narrower_vectors(processor: str, side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (threads, epilogues), shape = CASES[processor], list(CASES).index(processor)
    force(monkeypatch, 6, shape)
    for padding, epilogue in zip(((1, 1), (2, 0)), epilogues, strict=True):
        one = layer(sparse_mask((13, 7, 3, 3)), padding=padding)
        kernel = build(one, processor=processor, epilogue=epilogue, threads=threads)
        lanes = kernel.cpu.lanes
        for batch, size in ((2 * lanes, (9, 11)), (lanes, (3, 41)), (1, (14, 14)))[: 2 if side_by_side else 3]:
            assert error(kernel, one, torch.randn(batch, 7, *size), side_by_side=side_by_side) < TOLERANCE
