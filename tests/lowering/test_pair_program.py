"""The pair program of a mask, walked as the kernel does, is the mask; the compiled packer makes the same program."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sift_compiler.errors import UserError
from sift_compiler.lowering.pair_program import COLUMN, FIELDS, PairProgram, pack_pairs
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.pair_packer import PairPacker
from sift_compiler.runtimes.tvm.target import host_cpu

UNIT = 12


def unpack(program: PairProgram, spec: LayerSpec, channels: int, panel: int) -> list[int]:
    """Flat dense position of every packed value, in order."""
    blocks = -(-spec.in_channels // channels)
    found: list[int] = []
    at = pair = 0
    for part, top in enumerate(range(0, spec.out_channels, panel)):
        height = min(panel, spec.out_channels - top)
        for block in range(blocks):
            assert program.starts[part * blocks + block].tolist() == [at, len(found)]
            met = []
            for _ in range((height + 1) // 2):
                first, second, both, alone, rest = program.pairs[pair].tolist()
                assert both % 2 == 0
                assert min(alone, rest) >= 0
                rows = [first // UNIT, second // UNIT]
                met += rows
                # The features of both rows, then those of either in turn, then the rest of the second.
                steps = [rows] * both + [[rows[k % 2]] for k in range(2 * alone)] + [[rows[1]]] * rest
                for step in steps:
                    column = block * channels + int(program.columns[at]) * COLUMN // UNIT
                    assert program.columns[at] % (UNIT // COLUMN) == 0
                    assert all(row < height for row in step)
                    found += [(top + row) * spec.in_channels + column for row in step]
                    at += 1
                pair += 1
            assert sorted(met)[:height] == list(range(height))
    assert (pair, at) == (len(program.pairs), len(program.columns))
    return found


@pytest.mark.parametrize(("channels", "panel"), [(1, 4), (7, 16), (30, 64), (40, 7)])
@pytest.mark.parametrize(("shape", "nnz"), [((9, 30), 100), ((33, 30), 990), ((50, 60), 3), ((5, 4), 0), ((1, 1), 1)])
@pytest.mark.parametrize("empty", [0, 2])
def test_a_program_holds_every_kept_weight_once(
    channels: int, panel: int, shape: tuple[int, int], nnz: int, empty: int
) -> None:
    rng = np.random.default_rng(0)
    index = rng.permutation(np.concatenate((rng.permutation(shape[0] * shape[1])[:nnz], [-1] * empty))).astype(np.int32)
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index))
    program = pack_pairs(index, spec, channels, panel, UNIT)
    assert program.columns.dtype == np.int16
    assert {a.dtype for a in (program.pairs, program.starts, program.order)} == {np.dtype(np.int32)}
    assert program.pairs.shape[1] == FIELDS
    assert len(program.order) == len(index)
    found = unpack(program, spec, channels, panel)
    assert found == index[program.order[: len(found)]].tolist()
    assert sorted(found) == sorted(index[index >= 0].tolist())


def test_order_of_the_index_carries_no_meaning() -> None:
    rng = np.random.default_rng(0)
    index = np.sort(rng.permutation(40 * 50)[:400]).astype(np.int32)
    spec = LayerSpec(kind="linear", weight_shape=(40, 50), nnz=400)
    shuffled = rng.permutation(400)
    first, second = (pack_pairs(each, spec, 13, 16, UNIT) for each in (index, index[shuffled]))
    assert np.array_equal(index[first.order], index[shuffled][second.order])
    assert np.array_equal(first.columns, second.columns)
    assert np.array_equal(first.pairs, second.pairs)


def test_partners_are_alike_and_so_are_neighbours() -> None:
    rng = np.random.default_rng(0)
    index = np.flatnonzero(rng.random(600 * 300) < 0.25).astype(np.int32)
    spec = LayerSpec(kind="linear", weight_shape=(600, 300), nnz=len(index))
    pairs = pack_pairs(index, spec, 100, 608, UNIT).pairs
    # By chance a quarter of a row's weights would be shared.
    assert 2 * pairs[:, 2].sum() > 0.3 * len(index)
    assert pairs[:, 4].sum() < 0.005 * len(index)
    changes = (np.diff(pairs[:, 2:4].reshape(3, 300, 2), axis=1) != 0).any(axis=2)
    assert changes.mean() < 0.25


@pytest.mark.parametrize(("channels", "panel"), [(1, 4), (7, 16), (33, 20), (64, 1024)])
@pytest.mark.parametrize(
    ("shape", "nnz"),
    [((9, 30), 100), ((33, 30), 990), ((50, 60), 1), ((150, 67), 3000), ((1, 1), 1), ((300, 200), 6000)],
)
def test_the_compiled_packer_makes_the_same(channels: int, panel: int, shape: tuple[int, int], nnz: int) -> None:
    rng = np.random.default_rng(0)
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=nnz)
    packer = PairPacker(spec, channels, panel, UNIT, host_cpu().name)
    for empty in (0, 3, 1, 0):  # several masks in turn: nothing of one may be left for the next
        index = rng.permutation(shape[0] * shape[1])[:nnz].astype(np.int32)
        if empty:
            index[::empty] = -1 - index[::empty]
        expected = pack_pairs(index, spec, channels, panel, UNIT)
        made = packer.pack(torch.from_numpy(index))
        for field in dataclasses.fields(PairProgram):
            one, other = getattr(made, field.name), getattr(expected, field.name)
            assert one.dtype == other.dtype
            assert np.array_equal(one, other), field.name


def test_a_block_that_two_bytes_do_not_reach_is_refused() -> None:
    spec = LayerSpec(kind="linear", weight_shape=(2, 5000), nnz=1)
    with pytest.raises(UserError, match="channels"):
        PairPacker(spec, 5000, 16, 64, host_cpu().name)
