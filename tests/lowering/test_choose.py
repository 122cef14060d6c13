"""Tile choices: legal for the machine and the shape, and explained."""

from __future__ import annotations

import pytest

from sift_compiler.errors import UserError
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.choose_pairs import choose_pairs
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.packing import packing
from sift_compiler.lowering.sharing import unstructured_loads
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile

AVX512 = CpuFacts(name="avx512", lanes=16, registers=32)
AVX2 = CpuFacts(name="avx2", lanes=8, registers=16)


def conv(sparsity: float, width: int = 360, stride: int = 1, kernel: int = 3) -> LayerSpec:
    shape = (width, width, kernel, kernel)
    nnz = int(width * width * kernel * kernel * (1 - sparsity))
    return LayerSpec(
        kind="conv2d", weight_shape=shape, nnz=nnz, stride=(stride, stride), padding=(kernel // 2, kernel // 2)
    )


@pytest.mark.parametrize("cpu", [AVX512, AVX2])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 14, 28, 57])
@pytest.mark.parametrize("batch", [1, 7, 16, 19, 64])
def test_accumulators_fit_registers_and_every_image_is_computed(
    cpu: CpuFacts, sparsity: float, size: int, batch: int
) -> None:
    parts = choose(conv(sparsity), (batch, 360, size, size), cpu)
    done: set[int] = set()
    for part in parts:
        assert part.tile.accumulators + 2 <= cpu.registers
        assert part.tile.vector == cpu.lanes
        assert part.reason
        if part.tile.lanes == "batch":
            assert part.tile.height <= size
            assert part.tile.width <= size
            assert part.count % cpu.lanes == 0
        done |= set(range(part.first, part.first + part.count))
    assert done >= set(range(batch))


def test_sparser_layers_share_fewer_rows() -> None:
    rows = [choose(conv(s), (16, 360, 28, 28), AVX512)[0].tile.rows for s in (0.5, 0.75, 0.9)]
    assert rows[0] == 3
    assert rows == sorted(rows, reverse=True)


def test_one_image_takes_lanes_over_positions() -> None:
    (part,) = choose(conv(0.5), (1, 360, 28, 28), AVX512)
    assert part.tile.lanes == "space"


def test_tokens_fill_the_tile() -> None:
    spec = LayerSpec(kind="linear", weight_shape=(1536, 1536), nnz=1536 * 768)
    (part,) = choose(spec, (512, 1536), AVX512)
    assert part.tile.vectors > 1
    (part,) = choose(spec, (3, 1536), AVX512)
    assert part.tile.vectors == 1
    assert choose(spec, (0, 1536), AVX512) == ()


def test_packing_shares_borders_and_leaves_out_unread_phases() -> None:
    tile = Tile(lanes="space", vector=16, rows=1, width=2, channels=4)
    layout = packing(conv(0.5), 2, (28, 28), tile)
    assert (layout.rows, layout.pitch) == (29, 29)
    image = Tile(lanes="batch", vector=16, rows=1, width=7, channels=4)
    assert packing(conv(0.5, stride=2, kernel=1), 1, (28, 28), image).phases == ((0, 0),)
    assert len(packing(conv(0.5, stride=2), 1, (28, 28), image).phases) == 4


def test_an_impossible_tile_is_refused() -> None:
    with pytest.raises(UserError, match="rows"):
        Tile(lanes="batch", vector=16, rows=7, width=1, channels=1)
    with pytest.raises(UserError, match="width"):
        Tile(lanes="batch", vector=16, rows=1, width=0, channels=1)


@pytest.mark.parametrize("cpu", [AVX512, AVX2])
def test_few_tokens_run_row_by_row(cpu: CpuFacts) -> None:
    spec = LayerSpec(kind="linear", weight_shape=(1536, 768), nnz=1536 * 192)
    lanes = [choose(spec, (tokens, 768), cpu)[0].tile.lanes for tokens in (1, 2, 4 * cpu.lanes, 8 * cpu.lanes)]
    assert lanes == ["weights", "tokens", "tokens", "pairs"]
    for tokens in range(1, 4 * cpu.lanes + 1):
        (part,) = choose(spec, (tokens, 768), cpu)
        assert part.tile.accumulators + 2 <= cpu.registers
        assert part.tile.lanes != "tokens" or part.tile.vector * part.tile.width >= tokens
    (part,) = choose(spec, (2, 768), cpu, whole_vectors=True)
    assert part.tile.lanes == "batch"


def test_rows_need_a_vector_of_values_and_room_for_the_input() -> None:
    spec = LayerSpec(kind="linear", weight_shape=(64, 64), nnz=AVX512.lanes - 1)
    assert choose(spec, (1, 64), AVX512)[0].tile.lanes == "batch"
    wide = LayerSpec(kind="linear", weight_shape=(64, 1 << 20), nnz=1 << 20)
    assert choose(wide, (1, 1 << 20), AVX512)[0].tile.lanes == "weights"
    assert choose(wide, (8, 1 << 20), AVX512)[0].tile.lanes == "batch"


@pytest.mark.parametrize("cpu", [AVX512, AVX2, CpuFacts(name="sse", lanes=4, registers=16)])
@pytest.mark.parametrize("tokens", [65, 100, 128, 200, 2048])
@pytest.mark.parametrize("kept", [0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("features", [1, 50, 768, 9708])
def test_pairs_fit_registers_caches_and_tokens(cpu: CpuFacts, tokens: int, kept: float, features: int) -> None:
    spec = LayerSpec(kind="linear", weight_shape=(640, features), nnz=int(640 * features * kept))
    choice = choose_pairs(spec, tokens, cpu)
    assert choice is not None
    tile = choice.tile
    assert (tile.lanes, tile.rows, tile.height) == ("pairs", 2, 1)
    assert tile.accumulators + 3 <= cpu.registers
    assert tile.width * tile.vector <= tokens
    assert tile.channels <= features
    assert 4 * tile.channels * tile.width * tile.vector <= cpu.l1_bytes


def test_dense_layers_and_less_than_a_vector_do_not_run_in_pairs() -> None:
    dense = LayerSpec(kind="linear", weight_shape=(64, 64), nnz=64 * 64)
    assert choose_pairs(dense, 512, AVX512) is None
    assert choose(dense, (512, 64), AVX512)[0].tile.lanes == "batch"
    sparse = LayerSpec(kind="linear", weight_shape=(64, 64), nnz=64 * 16)
    assert choose_pairs(sparse, 15, AVX512) is None
    assert choose_pairs(sparse, 16, AVX512) is not None


def test_masks_in_blocks_of_rows_do_not_run_in_pairs() -> None:
    spec = LayerSpec(kind="linear", weight_shape=(64, 64), nnz=64 * 16)
    assert choose(spec, (512, 64), AVX512, loads=unstructured_loads(0.25))[0].tile.lanes == "pairs"
    assert choose(spec, (512, 64), AVX512, loads=(1.0, 0.5, 0.5, 0.25))[0].tile.lanes == "batch"
