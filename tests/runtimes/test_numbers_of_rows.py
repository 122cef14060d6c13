"""Every number of rows that a tile may compute at once, whatever the rules would choose for the layer, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch

from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.tile import Lanes, Tile
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.target import host_cpu
from tests.runtimes.test_conformance import TOLERANCE, layer, sparse_mask


@pytest.mark.parametrize("rows", range(1, 7))
@pytest.mark.parametrize(("lanes", "images"), [("batch", 16), ("space", 2)])
def test_rows_of_a_tile(lanes: Lanes, images: int, rows: int) -> None:
    one, cpu = layer(sparse_mask((13, 10, 3, 3), 0.5), padding=(1, 1)), host_cpu()
    tile = Tile(lanes=lanes, vector=cpu.lanes, rows=rows, width=2, channels=4)
    count = cpu.lanes if lanes == "batch" else images
    part = Part(one.spec, Choice(tile=tile, first=0, count=count, reason="this test"), (5, 7), cpu, 1)
    x, y = torch.randn(count, 10, 5, 7), torch.full((count, 13, 5, 7), torch.nan)
    assert one.bias is not None
    part.repack(one.index.numpy())
    part.run(x, one.values, one.bias, y)
    expected = one.oracle(x)
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE
