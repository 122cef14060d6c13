"""sift rewrite: every option of the transformations from the command line, alone and mixed, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import sift_compiler as sift
from sift_compiler.cli import app
from sift_compiler.commands.transform_options import structure_of, transform_of
from sift_compiler.errors import UserError
from sift_compiler.ir.mask_structure import UNSTRUCTURED
from sift_compiler.option_values import TRANSFORMATION_NAMES
from sift_compiler.options import TRANSFORMATIONS

MODEL = """
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    '''A depthwise and a grouped convolution, then attention over positions.'''

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1)
        self.depthwise, self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1, groups=8)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.grouped(self.depthwise(self.up(self.stem(x)))).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        return self.head(self.out(y).mean(1))

net = Net
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("models") / "net_of_options.py"
    file.write_text(MODEL, encoding="utf-8")
    return f"{file}:net"


def sift_rewrite(model: str, *arguments: str) -> Result:
    given = ["rewrite", model, "--input", "f32[2,3,4,4]", "--sparsity", "0.75", *arguments]
    return CliRunner().invoke(app, given)


def planned(model: str, *arguments: str) -> dict[str, dict[str, object]]:
    result = sift_rewrite(model, "--dry-run", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return {layer["path"]: layer for layer in json.loads(result.stdout)["layers"]}


def test_the_names_that_help_tells_are_those_there_are() -> None:
    assert tuple(TRANSFORMATIONS) == TRANSFORMATION_NAMES


def test_every_field_of_every_transformation_has_an_option():
    known = {option for parameter in get_command(app).commands["rewrite"].params for option in parameter.opts}
    for kind in TRANSFORMATIONS.values():
        fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)}
        assert fields <= known, kind.__name__


@pytest.mark.parametrize(
    ("arguments", "path", "shape"),
    [
        ((), "qkv", [192, 64]),
        (("--attention", "head_dim_fixed"), "qkv", [192, 64]),
        (("--groups", "group_width_fixed"), "grouped", [64, 4, 1, 1]),
        (("--groups", "groups_fixed"), "grouped", [64, 8, 1, 1]),
        (("--pin", "out", "--round-to", "4"), "out", [32, 32]),
    ],
)
def test_choices_of_widening_arrive(model, arguments, path, shape):
    assert planned(model, *arguments)[path]["widened_shape"] == shape


def test_depthwise_by_both_formulas_says_why(model):
    assert planned(model)["depthwise"]["sparse"] is True
    found = planned(model, "--depthwise", "dense")
    assert found["depthwise"]["reason"] == "depthwise"
    text = sift_rewrite(model, "--dry-run", "--depthwise", "dense", "--dense", "up").output
    why = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for path, reason in (
        ("stem", "first convolution"), ("depthwise", "depthwise"), ("up", "kept dense on request"), ("head", "classifier"),
    ):  # fmt: skip
        assert "dense" in why[path]
        assert why[path].rstrip().endswith(reason) or reason in why[path]
    assert all(len(line.split()) >= 5 for path, line in why.items() if path in found), "every layer has a reason"


@pytest.mark.parametrize(
    "text", ["unstructured", "nm:2:4", "transposable:2:4", "block:2:4", "constant-fan-in", "channel"]
)
def test_structures(model, text):
    structure = structure_of(text)
    found = planned(model, "--structure", text, "--transform", "parallel", "--sigma", "relu")
    branch = found["qkv.branch0"]["structure"]
    assert structure == UNSTRUCTURED or branch == {
        key: value for key, value in structure.to_plain().items() if key != "name"
    }
    made = transform_of("wide", (), {"sparsity": 0.75, "structure": text})
    assert made == sift.SparseWide(sparsity=0.75, structure=structure)


def test_several_members_with_options_of_their_own(model, tmp_path):
    arguments = (
        "--member", "qkv=parallel,sigma=relu,structure=nm:1:4", "--member", "out=doped,sparsity=0.5", "--member", "up=dense",
        "--transform", "factorized", "--distribution", "erk", "--sigma", "gelu", "--init", "sparse_aware",
    )  # fmt: skip
    result = sift_rewrite(model, "--dry-run", "--json", *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["replacements"] == {
        "grouped": "SparseFactorized, inner width 64, σ gelu",
        "qkv": "SparseParallel, 4 branches, σ relu",
        "out": "SparseDoped, rank 8, σ gelu",
    }
    reasons = {layer["path"]: layer["reason"] for layer in found["layers"]}
    assert reasons["up"] == "its pattern keeps it as it is"
    result = sift_rewrite(model, *arguments, "--out", str(tmp_path / "mixed.pt2"))
    assert result.exit_code == 0, result.output
    module = sift.load(tmp_path / "mixed.pt2")
    assert module.get_submodule("qkv.branch3").structure == sift.NM(1, 4)


def test_members_without_a_transform_leave_the_rest(model):
    found = planned(model, "--member", "out=factorized")
    assert {path.partition(".")[0] for path, layer in found.items() if layer["sparse"]} == {"out"}
    assert found["up"]["reason"] == "no pattern names it"


def test_distribution_by_pattern(model):
    made = transform_of(None, (), {"sparsity": 0.5, "distribution": "up=0.9, qkv=0.6"})
    assert made == sift.SparseWide(sparsity=0.5, distribution={"up": 0.9, "qkv": 0.6})
    found = planned(model, "--distribution", "up=0.9,qkv=0.6")
    assert found["up"]["density"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention", "heads"), "Unknown attention 'heads'. Did you mean 'heads_fixed'?"),
        (("--depthwise", "none"), "Known: dense, sparse"),
        (("--groups", "group_fixed"), "Did you mean 'groups_fixed'?"),
        (("--init", "papre"), "Did you mean 'paper'?"),
        (("--structure", "nm:4"), "Expected is unstructured, nm:N:M"),
        (("--structure", "nm:4:2"), "n must be at least 1 and at most m"),
        (("--structure", "blocks:2:2"), "Did you mean 'block'?"),
        (("--distribution", "up=high"), "sparsities by pattern of module paths"),
        (("--distribution", "upp=0.5"), "names no layer that becomes sparse"),
        (("--transform", "low-rank", "--structure", "nm:2:4"), "option of LowRank 'structure'"),
        (("--member", "qkv"), "Write PATTERN=NAME"),
        (("--member", "qkv=parallell"), "Did you mean 'parallel'?"),
        (("--member", "qkv=parallel,sigma"), "write option=value"),
        (("--member", "qkv=parallel,round_to=4"), "option of SparseParallel 'round_to'"),
        (("--member", "qkv=parallel,seed=4"), "give --seed to the command"),
        (("--member", "qkv=parallel,sparsity=much"), "a number such as 0.75"),
        (("--member", "qkv=dense,sparsity=0.5"), "have no options"),
        (("--member", "qkv=parallel", "--member", "qkv=doped"), "names the pattern 'qkv' twice"),
        (("--member", "qkv=parallel", "--attention", "heads_fixed"), "option of SparseParallel 'attention'"),
        (("--member", "nothing=parallel"), "names no layer of the model"),
    ],
)
def test_what_is_wrong_is_said(model, arguments, message):
    result = sift_rewrite(model, "--dry-run", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr


def test_a_structure_is_what_its_text_says():
    for text in ("nm:2:x", "channel:2", "block:2", "unstructured:1", ""):
        with pytest.raises(UserError):
            structure_of(text)


def test_as_a_process(model, tmp_path):
    path = tmp_path / "sparse.pt2"
    command = [
        sys.executable, "-m", "sift_compiler.cli", "rewrite", model, "--input", "f32[2,3,4,4]", "--sparsity", "0.75",
        "--attention", "head_dim_fixed", "--groups", "group_width_fixed", "--depthwise", "dense", "--init", "sparse_aware",
        "--structure", "nm:2:4", "--distribution", "er", "--round-to", "4", "--seed", "3", "--dense", "up",
        "--out", path, "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio"] == pytest.approx(1, abs=1e-3)
    module = sift.load(path)
    assert module.get_submodule("grouped").groups == 16
    assert module.get_submodule("qkv").structure == sift.NM(2, 4)
