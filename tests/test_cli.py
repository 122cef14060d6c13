"""The sift command: what it prints, what it writes, its exit codes and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import sift_compiler as sift
from sift_compiler.cli import app
from sift_compiler.commands import doctor
from sift_compiler.commands.input_spec import example_input
from sift_compiler.nn import SparseLinear

MODEL = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

def failing():
    raise KeyError("nothing here")

number = 3
ready = mlp()
"""


def sift_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_json(*arguments: str | Path) -> dict[str, object]:
    result = sift_command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("models") / "example_of_cli.py"
    file.write_text(MODEL, encoding="utf-8")
    return f"{file}:mlp"


@pytest.fixture(scope="module")
def saved(factory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "sparse.pt2"
    result = sift_command("rewrite", factory, "--input", "f32[8,16]", "--sparsity", "0.75", "--out", path)
    assert result.exit_code == 0, result.output
    assert "ratio 1.0000" in result.output
    return path


def test_rewrite_writes_a_trainable_sparse_model(saved: Path) -> None:
    module = sift.load(saved)
    assert any(isinstance(each, SparseLinear) for each in module.modules())
    module(torch.randn(3, 16)).sum().backward()


def test_rewrite_reports_as_json_and_saves_nothing_unasked(factory: str) -> None:
    found = as_json("rewrite", factory, "--input", "f32[8,16]", "--sparsity", "0.5", "--dense", "4", "--round-to", "4")
    assert found["ratio"] == pytest.approx(1.0, abs=5e-3)
    assert found["file"] is None


@pytest.mark.parametrize("name", ["wide", "parallel", "factorized", "doped", "low-rank"])
def test_every_transformation_keeps_the_flops(factory: str, name: str) -> None:
    found = as_json("rewrite", factory, "--input", "f32[8,16]", "--sparsity", "0.5", "--transform", name)
    assert found["ratio"] == pytest.approx(1.0, abs=0.02)


def test_rewrite_takes_programs_and_ready_models(factory: str, tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    free = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(dense, (torch.randn(8, 16),), dynamic_shapes=free), tmp_path / "dense.pt2")
    ready = factory.replace(":mlp", ":ready")
    program = as_json("rewrite", tmp_path / "dense.pt2", "--sparsity", "0.5")
    module = as_json("rewrite", ready, "--sparsity", "0.5", "--input", "f32[8,16]")
    assert program["sparse_flops"] == module["sparse_flops"]


def test_same_seed_makes_the_same_file(factory: str, tmp_path: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        path = tmp_path / f"{name}.pt2"
        sift_command("rewrite", factory, "--input", "f32[8,16]", "--sparsity", "0.75", "--seed", seed, "--out", path)
    first, second, other = (sift.load(tmp_path / f"{name}.pt2").state_dict() for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_inspect_shows_sparse_and_dense_models(saved: Path, factory: str) -> None:
    sparse = as_json("inspect", saved)
    assert sparse["balance"] is not None
    kinds = [layer["kind"] for layer in sparse["layers"]]
    assert "SparseLinear" in kinds
    dense = as_json("inspect", factory, "--input", "f32[1,16]")
    assert dense["flops"] == 2 * (16 * 64 + 64 * 64 + 64 * 4)
    text = sift_command("inspect", saved).output
    assert "SparseLinear" in text
    assert "balanced for" in text


def test_reports_go_where_they_are_asked_to(factory: str, saved: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "rewrite.html", tmp_path / "rewrite.json"
    options = ("rewrite", factory, "--input", "f32[8,16]", "--sparsity", "0.5")
    text = sift_command(*options, "--report", page).output
    assert f"Report {page}" in text
    assert "example_of_cli.py:mlp: what sift made of it" in page.read_text(encoding="utf-8")
    printed = as_json(*options, "--report", data)
    assert printed["report"] == str(data)
    written = json.loads(data.read_text(encoding="utf-8"))
    assert written == {name: value for name, value in printed.items() if name not in ("file", "report")}
    assert written["check"]["difference"] == 0
    page = tmp_path / "inspect.html"
    assert f"Report {page}" in sift_command("inspect", saved, "--report", page).output
    assert "sparse.pt2: layer by layer" in page.read_text(encoding="utf-8")


def test_reports_that_cannot_be_are_refused_before_the_work(factory: str, saved: Path, tmp_path: Path) -> None:
    options = ("rewrite", factory, "--input", "f32[8,16]", "--sparsity", "0.5")
    out = tmp_path / "sparse.pt2"
    assert "Choose .html, .json, .txt" in refused(*options, "--out", out, "--report", tmp_path / "report.pdf")
    assert "Choose .html, .json, .txt" in refused("inspect", saved, "--report", tmp_path / "report")
    assert "--dry-run makes nothing" in refused(*options, "--dry-run", "--report", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_export_writes_onnx_of_any_batch(saved: Path, tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "model.onnx"
    found = as_json("export", saved, "--runtime", "onnx", "--out", path)
    assert found["bytes"] == path.stat().st_size
    x = torch.randn(5, 16)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = sift.load(saved).eval()(x)
    assert float((torch.from_numpy(y) - expected).abs().max()) < 1e-5


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(*arguments: str | Path) -> str:
    """The message of a command that ends with exit code 2, prints nothing else and shows no traceback."""
    result = sift_command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--sparsity": "1.0"}, "at least 0 and below 1"),
        ({"--sparsity": "-0.1"}, "at least 0 and below 1"),
        ({"--transform": "wied"}, "Did you mean 'wide'? Known: doped, factorized, low-rank, parallel, wide"),
        ({"--transform": "parallel", "--round-to": "4"}, "option of SparseParallel 'round_to'"),
        ({"--distribution": "erc"}, "Known: er, erk, uniform"),
        ({"--round-to": "0"}, "round_to must be at least 1"),
        ({"--input": "f32(8,16)"}, "f32[16,3,224,224]"),
        ({"--input": "f32[8,0]"}, "at least 1"),
        ({"--input": "f32[8,,16]"}, "whole numbers"),
        ({"--input": "f23[8,16]"}, "Did you mean 'f32'?"),
        ({"--input": "f32[8,17]"}, "does not run on the example inputs"),
        ({"--out": "missing/folder/model.pt2"}, "cannot be written"),
    ],
)
def test_bad_options_are_refused(factory: str, change: dict[str, str], message: str) -> None:
    options = {"--sparsity": "0.5", "--input": "f32[8,16]", **change}
    assert message in refused("rewrite", factory, *(part for pair in options.items() for part in pair))


def test_bad_models_are_refused(factory: str, tmp_path: Path) -> None:
    home = factory.removesuffix(":mlp")
    for name, message in (
        ("nothing", "there is no 'nothing'"), ("failing", "KeyError"), ("number", "names a int"), ("nn.ReLU", "no convolution"),
    ):  # fmt: skip
        assert message in refused("rewrite", f"{home}:{name}", "--sparsity", "0.5", "--input", "f32[8,16]")
    assert "not understood" in refused("inspect", "model.onnx")
    assert "cannot be imported" in refused("inspect", "no_such_package_of_mine:model")
    assert "There is no file" in refused("inspect", tmp_path / "none.pt2")
    assert "There is no file" in refused("inspect", f"{tmp_path}/none.py:model")
    assert "Give every one of them" in refused("inspect", factory)


def test_damaged_and_foreign_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    cut, flipped, text = tmp_path / "cut.pt2", tmp_path / "flipped.pt2", tmp_path / "text.pt2"
    cut.write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    flipped.write_bytes(
        content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 64]) + content[middle + 64 :]
    )
    text.write_text("not a model", encoding="utf-8")
    for file, message in ((cut, "damaged"), (flipped, "damaged"), (text, "was not written by sift.save")):
        assert message in refused("inspect", file)
        assert message in refused("export", file, "--runtime", "onnx", "--out", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_bad_exports_are_refused(saved: Path, tmp_path: Path) -> None:
    assert "Did you mean 'onnx'? Known: onnx, tvm" in refused(
        "export", saved, "--runtime", "onxx", "--out", tmp_path / "m"
    )
    assert "no targets" in refused(
        "export", saved, "--runtime", "onnx", "--target", "arm", "--out", tmp_path / "m.onnx"
    )
    assert "cannot be written" in refused("export", saved, "--runtime", "onnx", "--out", tmp_path / "none" / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bad_demo_options_are_refused() -> None:
    assert "Known: cifar100, digits, fashion-mnist" in refused("demo", "--dataset", "mnist")
    assert "--sparsity 1.5 is not possible" in refused("demo", "--sparsity", "1.5")


def test_process_exits_with_two_and_debug_shows_where(factory: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sift_compiler.cli", "rewrite", factory, "--sparsity", "2"]
    plain = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("Error: SparseWide(sparsity=2.0)")
    assert plain.stderr.count("\n") == 1
    debug = subprocess.run(command, capture_output=True, text=True, env={**environment, "SIFT_DEBUG": "1"}, check=False)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


def test_bad_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIFT_DEBUG", "yes")
    assert "Known: 0, 1" in refused("doctor")


# --- doctor and inputs ----------------------------------------------------------------------------------------------


def test_doctor_finds_everything_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = as_json("doctor")
    assert found["ok"] is True
    assert {"python", "torch", "apache-tvm", "C++ compiler", "cache folder", "kernel cache"} <= {
        check["name"] for check in found["checks"]
    }
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = sift_command("doctor")
    assert result.exit_code == 0
    assert "no-such-compiler not found" in result.output
    assert "apt install g++" in result.output


def test_doctor_tells_an_unwritable_cache_and_a_broken_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n", encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(file / "below"))
    monkeypatch.setenv("SIFT_CACHE_DIR", str(file / "below"))
    monkeypatch.setenv("CXX", str(file))
    checks = {check.name: check for check in doctor.examine()}
    assert not checks["cache folder"].ok
    assert "TORCHINDUCTOR_CACHE_DIR" in checks["cache folder"].advice
    assert "SIFT_CACHE_DIR" in checks["kernel cache"].advice
    assert "no headers" in checks["C++ compiler"].found
    assert not doctor.healthy(checks.values())
    assert sift_command("doctor").exit_code == 1


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [
        ("f32[2,3]", torch.float32, (2, 3)),
        (" bf16[ 4 ] ", torch.bfloat16, (4,)),
        ("i64[1,7]", torch.int64, (1, 7)),
        ("bool[2]", torch.bool, (2,)),
        ("f64[]", torch.float64, ()),
    ],
)
def test_input_descriptions(text: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = example_input(text)
    assert tensor.dtype == dtype
    assert tensor.shape == shape
