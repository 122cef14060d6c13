"""sift inspect --times: every sparse layer on what it gets, with its tile, its share of the peak and where it breaks even."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sift_compiler as sift
from sift_compiler.cli import app
from sift_compiler.commands.tile_candidates import candidates_of
from sift_compiler.commands.timing import specification, time_layers
from sift_compiler.errors import UserError
from sift_compiler.lowering.candidates import candidates
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import LayerPlan, Timing
from sift_compiler.options import CompileOptions, Tune
from sift_compiler.runtimes.pruned import break_even
from sift_compiler.runtimes.tvm import tune
from sift_compiler.runtimes.tvm.runtime import TvmRuntime
from sift_compiler.runtimes.tvm.target import host_cpu
from sift_compiler.runtimes.tvm.tune import Tuned


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), sift.nn.SparseConv2d(8, 32, 3, 2, 1, sparsity=0.6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), sift.nn.SparseLinear(32, 16, sparsity=0.75),
    )  # fmt: skip


def test_every_sparse_layer_is_timed_on_its_own_input():
    made = model()
    before = made[1].running_mean.clone()
    times = time_layers(made, (torch.randn(16, 3, 10, 10),), threads=1, rounds=3)
    assert [(each.path, each.input_shape) for each in times] == [("2", (16, 8, 8, 8)), ("5", (16, 32))]
    for each in times:
        assert each.microseconds > 0
        assert each.dense_microseconds > 0
        assert 0 < each.of_peak < 1.2, "FLOPs of the kept weights cannot beat the peak but by noise"
        expected = break_even(each.sparsity, each.microseconds, each.dense_microseconds)
        assert each.break_even == pytest.approx(expected, rel=1e-9), "the same times, in other units"
        assert "lanes" in each.tile
        assert "sparsity" in each.reason
    assert made.training
    assert torch.equal(made[1].running_mean, before), "nothing was trained"
    assert not made[2]._forward_pre_hooks


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements of a machine where the second candidate takes half as long as all others."""
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path))

    def measure(spec, choice, size, index, cpu, threads, level, side_by_side=False):
        tiles = candidates(spec, choice, size, cpu, level)
        times = [10.0, 5.0, *(10.0 for _ in tiles[2:])]
        timings = tuple(Timing(tile=tile, microseconds=time) for tile, time in zip(tiles, times, strict=True))
        return Tuned(level=level, tile=tiles[1], timings=timings)

    monkeypatch.setattr(tune, "measure", measure)


def plan_of(layer: sift.nn.SparseConv2d, shape: tuple[int, ...], level: Tune) -> tuple[LayerPlan, CpuFacts]:
    winograd = CompileOptions().winograd
    kernel = TvmRuntime().build(specification(layer, torch.empty(0)), "layer", 1, tune=level, winograd=winograd)
    return kernel.plan(shape, layer.index), kernel.cpu


def test_candidates_are_those_measured_or_those_that_would_be(measured):
    layer, shape = model()[2], (35, 8, 8, 8)
    plan, cpu = plan_of(layer, shape, "off")
    before = candidates_of(plan, cpu)
    assert all(each.microseconds is None for each in before)
    plan, cpu = plan_of(layer, shape, "quick")
    after = candidates_of(plan, cpu)
    assert {(each.images, each.tile) for each in after} == {(each.images, each.tile) for each in before}
    assert {each.images for each in after} == {(part.first, part.count) for part in plan.parts}
    for each in after:
        assert each.microseconds == pytest.approx((5 if each.taken else 10) * each.images[1])
        assert not each.side_by_side
    taken = [each for each in after if each.taken]
    assert [each.tile for each in taken] == [str(part.tile) for part in plan.parts]
    assert sum(each.microseconds for each in taken) == pytest.approx(plan.microseconds)


def test_what_was_measured_for_images_side_by_side_is_shown(measured):
    layer, lanes = model()[2], host_cpu().lanes
    plan, _ = plan_of(layer, (2, 8, 8, 8, lanes), "quick")
    (time,) = time_layers(nn.Sequential(layer), (torch.randn(2 * lanes, 8, 8, 8),), threads=1, rounds=1)
    apart = [each for each in time.candidates if each.side_by_side]
    assert [each.tile for each in apart if each.taken] == [str(plan.tile)]
    assert all(each.microseconds and each.images == (0, 2 * lanes) for each in apart)
    alone = [each for each in time.candidates if not each.side_by_side]
    assert [each.tile for each in alone if each.taken] == [time.tile]
    assert all(each.microseconds is None for each in alone), "nobody measured those"


def test_break_even():
    assert break_even(0.5, 2.0, 4.0) == 0
    assert break_even(0.9, 1.0, 1.0) == pytest.approx(0.9)
    assert break_even(0.9, 2.0, 1.0) == pytest.approx(0.95)


def test_what_cannot_be_timed_says_why():
    (refused,) = time_layers(model()[2:3].double(), (torch.randn(1, 8, 9, 9, dtype=torch.float64),), threads=1)
    assert "float64" in refused.reason
    assert refused.microseconds is None
    with pytest.raises(UserError, match="calls none"):
        time_layers(nn.Linear(3, 3), (torch.randn(1, 3),), threads=1)


def test_the_command(tmp_path: Path):
    x = (torch.randn(2, 16),)
    dense = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    sift.save(sift.rewrite(dense, x, sift.SparseWide(sparsity=0.75)), tmp_path / "sparse.pt2")
    arguments = ["inspect", str(tmp_path / "sparse.pt2"), "--times", "--threads", "1"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "break-even" in shown.output
    times = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["times"]
    assert len(times) == 2
    assert all(each["microseconds"] > 0 for each in times)
    assert CliRunner().invoke(app, [*arguments[:-1], "0"]).exit_code == 2
