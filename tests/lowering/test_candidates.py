"""Tiles worth a measurement: legal, different, the rules' first; and what a measured tile holds good for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sift_compiler.lowering.candidates import candidates
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.packing import packing
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tuning_key import tuning_key

AVX512 = CpuFacts(name="avx512", lanes=16, registers=32)
AVX2 = CpuFacts(name="avx2", lanes=8, registers=16)
NEON = CpuFacts(name="neon", lanes=4, registers=32)


def conv(sparsity: float, width: int = 96) -> LayerSpec:
    nnz = int(width * width * 9 * (1 - sparsity))
    return LayerSpec(kind="conv2d", weight_shape=(width, width, 3, 3), nnz=nnz, padding=(1, 1))


@pytest.mark.parametrize("cpu", [AVX512, AVX2, NEON])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("size", [1, 3, 14, 57])
@pytest.mark.parametrize(("level", "most"), [("quick", 7), ("full", 24)])
def test_candidates_are_legal_and_differ(cpu, batch, size, level, most):
    spec = conv(0.8)
    for choice in choose(spec, (batch, 96, size, size), cpu):
        tiles = candidates(spec, choice, (size, size), cpu, level)
        assert tiles[0] == choice.tile
        assert 2 < len(tiles) == len(set(tiles)) <= most
        for tile in tiles:
            assert tile.lanes == choice.tile.lanes
            assert tile.accumulators + 2 <= cpu.registers
            assert 1 <= tile.channels <= 96
            packing(spec, choice.count, (size, size), tile)
            if tile.lanes == "batch":
                assert max(tile.height, tile.width) <= size
        assert candidates(spec, choice, (size, size), cpu, "off") == (choice.tile,)


@pytest.mark.parametrize("kept", [64, 200])
@pytest.mark.parametrize("tokens", [65, 130, 512])
@pytest.mark.parametrize("cpu", [AVX512, AVX2])
def test_tokens_vary_in_width_and_fill_their_tiles(cpu, tokens, kept):
    spec = LayerSpec(kind="linear", weight_shape=(256, 256), nnz=256 * kept)
    (choice,) = choose(spec, (tokens, 256), cpu)
    assert choice.tile.lanes == ("pairs" if kept == 64 else "batch")
    tiles = candidates(spec, choice, (1, 1), cpu, "full")
    assert tiles[0] == choice.tile
    assert len(tiles) == len(set(tiles))
    assert {tile.lanes for tile in tiles} == {choice.tile.lanes}
    assert len({tile.rows for tile in tiles}) == (1 if kept == 64 else 3)
    assert len({tile.width for tile in tiles}) > 2
    for tile in tiles:
        assert tile.height == 1
        assert tile.width * tile.vector <= tokens
        assert tile.accumulators + 2 <= cpu.registers
        assert 1 <= tile.channels <= 256


def masks() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    rows, columns = 32, 96 * 9
    single = random.random((rows, columns)) < 0.25
    pairs = np.repeat(random.random((rows // 2, columns)) < 0.25, 2, axis=0)
    return {name: np.flatnonzero(mask).astype(np.int32) for name, mask in (("single", single), ("pairs", pairs))}


def test_the_key_tells_layers_apart_but_not_masks_that_are_alike():
    spec = LayerSpec(kind="conv2d", weight_shape=(32, 96, 3, 3), nnz=32 * 216, padding=(1, 1))
    (choice,) = choose(spec, (16, 96, 14, 14), AVX512)
    index = masks()["single"]

    def key(**changed):
        given = {"spec": spec, "choice": choice, "size": (14, 14), "index": index, "cpu": AVX512, "threads": 1}
        return repr(sorted(tuning_key(**{**given, **changed}).items()))

    assert key() == key(index=index[5:]) == key(choice=dataclasses.replace(choice, count=64))
    assert key() == key(spec=dataclasses.replace(spec, nnz=7, bias=True)), "the mask tells how much is kept"
    others = [
        key(index=masks()["pairs"]), key(index=index[::2]), key(size=(7, 7)), key(threads=2),
        key(cpu=dataclasses.replace(AVX512, l2_bytes=2**21)), key(spec=dataclasses.replace(spec, stride=(2, 2))),
        key(choice=choose(spec, (3, 96, 14, 14), AVX512)[0]), key(choice=choose(spec, (4, 96, 14, 14), AVX512)[0]),
    ]  # fmt: skip
    assert len({key(), *others}) == len(others) + 1
