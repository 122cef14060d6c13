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
from sift_compiler.commands.timing import time_layers
from sift_compiler.errors import UserError
from sift_compiler.runtimes.pruned import break_even


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
