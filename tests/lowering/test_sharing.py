"""How many loads of x a mask needs: exact on what is looked at, and what the choice of tiles makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.sharing import measured_loads, unstructured_loads
from sift_compiler.lowering.specification import LayerSpec

AVX512 = CpuFacts(name="avx512", lanes=16, registers=32)
AVX2 = CpuFacts(name="avx2", lanes=8, registers=16)


def flat(mask: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.flatnonzero(mask)).astype(np.int32)


def random_mask(*shape: int, density: float, rows: int = 1) -> np.ndarray:
    """Random blocks of ``rows`` outputs × 1 input."""
    units = np.random.default_rng(0).random((-(-shape[0] // rows), *shape[1:])) < density
    return units.repeat(rows, 0)[: shape[0]]


def spec_of(mask: np.ndarray, groups: int = 1) -> LayerSpec:
    kind = "conv2d" if mask.ndim == 4 else "linear"
    padding = (mask.shape[2] // 2,) * 2 if mask.ndim == 4 else (0, 0)
    return LayerSpec(
        kind=kind, weight_shape=mask.shape, nnz=int(mask.sum()), groups=groups, padding=(padding[0], padding[1])
    )


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (12, 9), (48, 4, 3, 3), (1, 30), (35, 11)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_loads_are_distinct_pairs_of_group_and_column(shape: tuple[int, ...], rows: int) -> None:
    mask = random_mask(*shape, density=0.4, rows=rows)
    columns = mask.reshape(shape[0], -1)
    for together, loads in enumerate(measured_loads(flat(mask), spec_of(mask)), 1):
        groups = (columns[first : first + together].any(0).sum() for first in range(0, shape[0], together))
        assert loads == pytest.approx(sum(groups) / columns.sum())


def test_rows_of_other_groups_of_a_convolution_share_nothing() -> None:
    assert (
        measured_loads(np.arange(30, dtype=np.int32)[:29], spec_of(np.ones((10, 1, 3, 1), bool), groups=10))
        == (1.0,) * 4
    )
    halves = measured_loads(np.arange(1, 72, dtype=np.int32), spec_of(np.ones((8, 9), bool)))
    assert halves[1] == pytest.approx(36 / 71)


def test_a_part_of_a_large_layer_tells_of_all() -> None:
    for rows in (1, 2, 4):
        mask = random_mask(400, 30, 3, 3, density=0.1, rows=rows)
        loads = measured_loads(flat(mask), spec_of(mask))
        assert loads[0] == 1
        assert loads[3] == pytest.approx(unstructured_loads(0.1)[4 // rows - 1] / rows, rel=0.03)


@pytest.mark.parametrize("index", [[], [-1, -7], [-1, 3]])
def test_slots_that_are_not_in_the_mask_do_not_count(index: list[int]) -> None:
    loads = measured_loads(np.array(index, np.int32), LayerSpec(kind="linear", weight_shape=(6, 4), nnz=len(index)))
    assert all(0 < one <= 1 for one in loads)
    assert loads[0] == 1


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_random_masks_by_the_formula(density: float) -> None:
    loads = unstructured_loads(density)
    assert loads[0] == pytest.approx(1)
    assert all(1 / rows <= one + 1e-9 for rows, one in enumerate(loads, 1))
    if density == 1:
        assert loads == pytest.approx((1, 1 / 2, 1 / 3, 1 / 4))


@pytest.mark.parametrize("cpu", [AVX512, AVX2])
@pytest.mark.parametrize("shape", [(16, 200, 28, 28), (1, 200, 28, 28), (1, 200, 14, 14, 0)])
def test_tiles_follow_the_blocks_of_a_mask(cpu: CpuFacts, shape: tuple[int, ...]) -> None:
    shape = tuple(size or cpu.lanes for size in shape)
    for rows in (2, 4):
        mask = random_mask(200, 200, 3, 3, density=0.1, rows=rows)
        spec = spec_of(mask)
        for choice in choose(spec, shape, cpu, loads=measured_loads(flat(mask), spec)):
            assert choice.tile.rows in (2, 4)
            assert choice.tile.accumulators + 2 <= cpu.registers
    found = {choice.tile.rows for choice in choose(spec, (cpu.lanes, 200, 28, 28), cpu, loads=(1.0, 0.5, 0.5, 0.25))}
    assert found <= {2, 4}


@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.5, 1.0])
def test_random_masks_are_tiled_as_without_a_mask(density: float) -> None:
    mask = random_mask(360, 100, 3, 3, density=density)
    spec = spec_of(mask)
    for shape in ((16, 100, 28, 28), (1, 100, 14, 14), (1, 100, 28, 28, 16)):
        assert choose(spec, shape, AVX512, loads=measured_loads(flat(mask), spec)) == choose(spec, shape, AVX512)
