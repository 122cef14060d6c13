"""Measured tiles: kept, taken again without measuring, never in the way, and the same numbers."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch

from sift_compiler.errors import UserError
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import SparseConv2d
from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.options import CompileOptions
from sift_compiler.runtimes.tvm import tune
from sift_compiler.runtimes.tvm.runtime import TvmRuntime
from sift_compiler.runtimes.tvm.target import host_cpu
from sift_compiler.runtimes.tvm.tune import Timing, Tuned

TOLERANCE = 1e-5
SPEC = LayerSpec(kind="conv2d", weight_shape=(12, 10, 3, 3), nnz=270, padding=(1, 1))


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path))
    every = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *a: every(*a)[:2])
    torch.manual_seed(0)


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, and lets the second candidate win: times on a shared machine decide no test."""
    counts: list[str] = []
    real = tune._race

    def race(trials, factors, rounds, one_thread):
        times = real(trials, factors, 1, one_thread)
        assert all(time > 0 for time in times)
        counts.append("measured")
        return [2.0, 1.0, *[3.0] * (len(times) - 2)]

    monkeypatch.setattr(tune, "_race", race)
    return counts


def layer() -> SparseConv2d:
    return SparseConv2d(10, 12, 3, padding=1, sparsity=0.75, bias=False)


def run(level: str, shape=(16, 10, 6, 6), made: SparseConv2d | None = None):
    made = made or layer()
    kernel = TvmRuntime().build(SPEC, "layer", 1, tune=level)
    x = torch.randn(shape)
    with torch.no_grad():
        y, expected = kernel(x, made.values, made.index, None), made.double()(x.double())
        made.float()
    assert float((y - expected).abs().max() / expected.abs().max()) < TOLERANCE
    return kernel.plan(shape)


def test_a_measured_tile_is_kept_and_taken_again_without_measuring(measured):
    rules = run("off")
    first = run("quick")
    assert measured == ["measured"]
    assert first.tile != rules.tile
    assert "fastest of" in first.reason
    assert [run(level).tile for level in ("quick", "off", "quick")] == [first.tile] * 3
    assert run("off", (48, 10, 6, 6)).tile == first.tile, "another number of whole vectors of images"
    assert len(measured) == 1
    run("full")
    run("full")
    assert len(measured) == 2, "a thorough measurement does not rest on a quick one"


def test_images_that_fill_no_vector_are_measured_for_themselves(measured):
    plan = run("quick", (19, 10, 6, 6))
    assert len(plan.parts) == len(measured) == 2
    assert all("measured" in part.reason for part in plan.parts)


def test_images_side_by_side_are_measured_as_such(measured, monkeypatch):
    made, lanes = layer(), host_cpu().lanes
    built: list[str] = []
    prepare = tune.prepare_live

    def prepared(*arguments):
        made = prepare(*arguments)
        built.append(type(made).__name__)
        return made

    monkeypatch.setattr(tune, "prepare_live", prepared)
    run("quick", (lanes, 10, 6, 6), made)
    assert set(built) == {"Part"}
    built.clear()
    kernel, x = TvmRuntime().build(SPEC, "layer", 1, tune="quick"), torch.randn(2 * lanes, 10, 6, 6)
    with torch.no_grad():
        y, expected = kernel(to_image_vectors(x, lanes), made.values, made.index, None), made.double()(x.double())
    assert float((from_image_vectors(y) - expected).abs().max() / expected.abs().max()) < TOLERANCE
    assert set(built) == {"LanePart"}
    assert "fastest of" in kernel.plan((2, 10, 6, 6, lanes)).reason
    again = TvmRuntime().build(SPEC, "layer", 1)
    again(to_image_vectors(x, lanes)[:1], made.float().values, made.index, None)
    assert again.plan((1, 10, 6, 6, lanes)).tile == kernel.plan((2, 10, 6, 6, lanes)).tile
    assert len(measured) == 2


@pytest.mark.parametrize("damage", ["truncated", "illegal", "unmeasured"])
def test_a_damaged_entry_is_measured_anew(measured, tmp_path, damage, caplog):
    run("quick")
    (entry,) = (tmp_path / "tiles").glob("*.tile")
    plain = json.loads(entry.read_text())
    if damage == "truncated":
        entry.write_text(entry.read_text()[:50])
    else:
        plain["tile"]["rows" if damage == "illegal" else "channels"] = 77
        entry.write_text(json.dumps(plain))
        # Its checksum is right all the same.
        beside = entry.with_suffix(".json")
        record = json.loads(beside.read_text())
        record.update(bytes=entry.stat().st_size, sha256=hashlib.sha256(entry.read_bytes()).hexdigest())
        beside.write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        run("off")
        assert len(measured) == 1
        run("quick")
    assert len(measured) == 2
    assert "measured tile" in caplog.text
    run("quick")
    assert len(measured) == 2


def test_without_a_place_to_keep_it_a_tile_is_measured_by_every_process_said_once(
    measured, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tune, "default_folder", lambda: tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        tiles = {run("quick").tile for _ in range(2)}
    assert len(measured) == 2
    assert len(tiles) == 1
    assert len([line for line in caplog.messages if "measures its tiles anew" in line]) == 1


def test_who_is_not_clearly_faster_does_not_replace_the_rules_tile(monkeypatch):
    monkeypatch.setattr(tune, "_race", lambda trials, *_, **__: [1.0, *[0.99] * (len(trials) - 1)])
    assert "none of" in run("quick").reason
    assert run("off").reason == run("quick").reason


def test_the_slow_drop_out_early():
    calls = [0, 0, 0]

    def trial(which: int, turns: int):
        def call() -> None:
            calls[which] += 1
            sum(range(turns))

        return call

    best = tune._race([trial(0, 20_000), trial(1, 20_000), trial(2, 2_000_000)], [1.0, 3.0, 1.0], 6, True)
    assert best[0] < best[1] < best[2]
    assert calls[2] < 7 > calls[1]


def test_plain_data_and_back():
    tile = tune.Tile(lanes="batch", vector=8, rows=2, width=3, channels=4)
    tuned = Tuned(level="full", tile=tile, timings=(Timing(tile=tile, microseconds=1.5),))
    assert Tuned.from_plain(json.loads(json.dumps(tuned.to_plain()))) == tuned


def test_an_unknown_level_is_refused():
    with pytest.raises(UserError, match="quick"):
        CompileOptions(tune="fast")
