"""sift rewrite --dry-run: every layer, what would become of it and why; nothing is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sift_compiler.cli import app

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models.py"


def dry_run(*arguments: str) -> Result:
    given = ["rewrite", f"{MODELS}:small_cnn", "--input", "f32[2,1,8,8]", "--dry-run", *arguments]
    return CliRunner().invoke(app, given)


def test_the_plan_gives_a_reason_for_every_layer():
    result = dry_run("--sparsity", "0.75", "--transform", "doped", "--sigma", "relu", "--dense", "block2.conv2")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.output.splitlines() if line.strip()}
    assert lines["conv1"] == "32x1x3x3 dense 288 first convolution"
    assert lines["fc"] == "10x64 dense 640 classifier (writes an output of the model)"
    assert lines["block2.conv2"] == "64x64x3x3 dense 36,864 kept dense on request"
    assert lines["block1.conv1"] == "SparseDoped, rank 21, σ relu"
    assert "Nothing was made" in result.output


def test_the_plan_as_json_counts_what_the_rewrite_would_keep():
    result = dry_run("--sparsity", "0.9", "--transform", "parallel", "--distribution", "erk", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["replacements"]["block1.conv1"] == "SparseParallel, 10 branches, σ bn_relu"
    branches = [each for each in found["layers"] if each["origin"] == "block1.conv1"]
    assert [each["path"] for each in branches] == [f"block1.conv1.branch{number}" for number in range(10)]
    assert all(0 < each["kept"] < 32 * 32 * 9 for each in branches)
    assert (
        found["balance"]["kept_dense_flops"] + found["balance"]["sparsifiable_flops"] > found["balance"]["dense_flops"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--transform", "wide", "--sigma", "relu"), "option of SparseWide 'sigma'"),
        (("--transform", "doped", "--sigma", "gellu"), "Did you mean 'gelu'?"),
        (("--transform", "doped", "--out", "sparse.pt2"), "leave one of them out"),
        (("--transform", "parallel", "--sparsity", "0.1"), "1.111 branches"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    result = dry_run("--sparsity", "0.5", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
