"""sift bench: engines get the same weights, answers are compared, and what is missing is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sift_compiler as sift
from sift_compiler.cli import app
from sift_compiler.commands import bench as bench_module
from sift_compiler.commands.bench import bench, dense_twin
from sift_compiler.commands.peers import peer_pythons
from sift_compiler.errors import UserError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), sift.nn.SparseConv2d(8, 12, 3, 2, 1, groups=2, sparsity=0.6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), sift.nn.SparseLinear(12, 5, bias=False, sparsity=0.5),
    ).eval()  # fmt: skip


X = (torch.zeros(1, 3, 9, 9),)


def measure(against, **changes):
    chosen = {"batches": [3], "threads": 1, "rounds": 2, "pythons": {}, **changes}
    return bench(changes.pop("model", None) or model(), X, against, **{k: v for k, v in chosen.items() if k != "model"})


def test_the_dense_twin_computes_the_same():
    x = torch.randn(4, 3, 9, 9)
    twin = dense_twin(model())
    assert not any(isinstance(layer, (sift.nn.SparseConv2d, sift.nn.SparseLinear)) for layer in twin.modules())
    torch.testing.assert_close(twin(x), model()(x), rtol=1e-5, atol=1e-6)


def test_every_engine_is_measured_on_the_same_weights():
    made = measure(["onnxruntime"], batches=[3, 1])
    assert [(each.engine, each.batch) for each in made.times] == [
        ("sift", 3), ("onnxruntime", 3), ("sift", 1), ("onnxruntime", 1),
    ]  # fmt: skip
    for each in made.times:
        assert each.runs == 2
        assert 0 < each.fastest_ms <= each.median_ms <= each.slowest_ms
        assert each.error < 1e-5
    assert made.times[1].times_sift == made.times[1].median_ms / made.times[0].median_ms
    assert made.machine["cores"] >= 1


def test_another_model_runs_in_the_same_turns():
    made = measure(["onnxruntime"], ancestor=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval())
    assert [each.engine for each in made.times] == ["sift", "onnxruntime", "onnxruntime, ancestor"]
    assert all(each.error < 1e-5 for each in made.times)
    assert made.times[2].times_sift == made.times[2].median_ms / made.times[0].median_ms


def test_an_engine_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_module, "dense_twin", lambda made: dense_twin(made).apply(double))
    with pytest.raises(UserError, match="sift deviates from torch"):
        measure([])


def double(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        with torch.no_grad():
            layer.weight.mul_(2)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'openvino'"):
        measure(["openvin"])
    with pytest.raises(UserError, match="at least 1"):
        measure([], rounds=0)
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho it broke >&2\n")
    silent.chmod(0o755)
    with pytest.raises(UserError, match=r"its process ended \(it broke\).*--peer-python deepsparse=PATH"):
        measure(["deepsparse"], pythons={"deepsparse": str(silent)})
    with pytest.raises(UserError, match="no file"):
        peer_pythons(["openvino=" + str(tmp_path / "none")])
    with pytest.raises(UserError, match="NAME=PATH"):
        peer_pythons(["openvino"])
    assert peer_pythons([f"openvino={sys.executable}"]) == {"openvino": sys.executable}


def test_the_command(tmp_path: Path):
    (tmp_path / "small.py").write_text(
        "from torch import nn\ndef mlp():\n    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    arguments = ["bench", f"{tmp_path / 'small.py'}:mlp", "--input", "f32[1,8]", "--batch", "2", "--rounds", "1"]
    shown = CliRunner().invoke(app, [*arguments, "--against", "onnxruntime"])
    assert shown.exit_code == 0, shown.output
    assert "times sift" in shown.output
    told = CliRunner().invoke(app, [*arguments, "--against", "", "--threads", "1", "--json"])
    assert [each["engine"] for each in json.loads(told.stdout)["times"]] == ["sift"]
