"""sift compile: code and measured tiles on disk for whoever runs the model next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sift_compiler as sift
from sift_compiler.cli import app
from sift_compiler.commands.compiling import compile_model
from sift_compiler.errors import UserError
from sift_compiler.runtimes.tvm import build, tune


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), sift.nn.SparseConv2d(8, 32, 3, 2, 1, sparsity=0.6), nn.ReLU())


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(build, "_compiled", {})
    every = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *a: every(*a)[:2])


def test_the_command_measures_and_the_next_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 4)
    )
    sift.save(sift.rewrite(dense, torch.randn(16, 3, 10, 10), sift.SparseWide(sparsity=0.5)), tmp_path / "m.pt2")
    arguments = ["compile", str(tmp_path / "m.pt2"), "--input", "f32[16,3,10,10]", "--threads", "1"]
    first = CliRunner().invoke(app, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    made = json.loads(first.stdout)
    assert made["tune"] == "quick"
    assert made["threads"] == 1
    assert made["layers"]
    for layer in made["layers"]:
        assert layer["microseconds"] > 0
        assert "measured" in layer["reason"]
        taken = [each for each in layer["candidates"] if each["taken"]]
        assert [each["tile"] for each in taken] == [layer["tile"]]
        assert taken[0]["microseconds"] == pytest.approx(layer["microseconds"])
        assert len(layer["candidates"]) == 2
    assert [layer["dense"] for layer in made["layers"]] == [True, *[False] * (len(made["layers"]) - 1)]
    assert list((tmp_path / "kept").rglob("*.tile"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("everything is on disk")

    torch._dynamo.reset()
    monkeypatch.setattr(build, "_compiled", {})
    monkeypatch.setattr(build, "compile_anew", never)
    monkeypatch.setattr(tune, "measure", never)
    second = CliRunner().invoke(app, [*arguments, "--tune", "off"])
    assert second.exit_code == 0, second.output
    assert "dense, on the kernels of the sparse layers" in second.stdout
    for layer in made["layers"]:
        assert layer["path"] in second.stdout
        assert layer["tile"] in second.stdout


def test_without_measuring_there_are_tiles_but_no_times():
    made = compile_model(model().train(), (torch.randn(3, 3, 9, 9),), tune="off", threads=1)
    # The first convolution is dense, and runs on the kernels of the sparse ones.
    assert [(each.path.split(".")[-1], each.microseconds) for each in made.layers] == [("0", None), ("1", None)]
    assert all("lanes" in layer.tile for layer in made.layers)


def test_what_cannot_be_compiled_says_why(tmp_path: Path):
    with pytest.raises(UserError, match="calls none"):
        compile_model(nn.Linear(3, 3), (torch.randn(1, 3),), tune="off", threads=1)
    refused = CliRunner().invoke(app, ["compile", "x.pt2", "--tune", "fast"])
    assert refused.exit_code == 2
    assert "quick" in refused.output
