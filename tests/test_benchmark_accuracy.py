"""benchmarks/accuracy.py trains every method on a tiny data set, resumes where it was stopped, and prints its table."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MOVING = ("set", "rigl", "bidst", "bame")
METHODS = ("dense", "static", "static-nm", *MOVING, "dense-wide")
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of pictures that are easy to tell apart, in the files of Fashion-MNIST: 192 to train on, 48 to test on."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, count in (("train", 192), ("t10k", 48)):
        labels = generator.integers(0, 3, count)
        images = generator.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[8 * label : 8 * label + 8] += 150
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            file = folder / f"{part}-{what}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return folder


@pytest.fixture(scope="module")
def main() -> Iterator[Main]:
    """The program's entry point, in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        specification = importlib.util.spec_from_file_location("benchmark_accuracy", BENCHMARKS / "accuracy.py")
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        yield module.main
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(main: Main, data: Path) -> Callable[..., int]:
    def call(output: Path, *arguments: str) -> int:
        fixed = [
            "--dataset", "fashion-mnist", "--data", str(data), "--widths", "8,16", "--group", "8", "--batch-size", "16", "--epochs", "2",
            "--sparsity", "0.75", "--mask-updates", "4", "--run", "eager",
        ]  # fmt: skip
        return main([*fixed, "--output", str(output), *arguments])

    return call


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def first(run: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results") / "results.jsonl"
    assert run(output, "--methods", ",".join(METHODS), "--seeds", "0") == 0
    return output


def test_every_method_trains_at_equal_flops_and_its_masks_do_what_they_should(first: Path):
    found = {record["cell"]["method"]: record["result"] for record in records(first)}
    assert tuple(found) == METHODS
    for method, result in found.items():
        assert not result["diverged"]
        assert result["accuracy"] > 0.5  # chance is a third
        assert result["loss"][-1] < result["loss"][0]
        assert result["steps"] == 24
        assert result["test_images"] == 48
        if method == "dense-wide":
            assert result["flop_ratio"] > 3
            assert result["masks"] is None
        elif method == "dense":
            assert result["masks"] is None
        else:
            assert abs(result["flop_ratio"] - 1) < 1e-3
            masks = result["masks"]
            assert masks["counts_exact"]
            assert masks["skipped"] == {"missing": 0, "not finite": 0}
            assert masks["structures"] == ["NM(n=2, m=8)" if method in ("static-nm", "bame") else "Unstructured()"]
            if method in MOVING:
                assert masks["updates"] == 5  # steps 0, 4, 8, 12, 16
                assert masks["explored"] >= 1 - masks["sparsity"]
            else:
                assert masks["updates"] == 0
                assert masks["last_over_first"] == 1
    assert len({result["masks"]["kept"] for result in found.values() if result["masks"]}) == 1
    for method in ("set", "rigl", "bame"):
        assert found[method]["masks"]["replaced"] > 0.3
        assert found[method]["masks"]["last_over_first"] < 1


def test_it_resumes_skips_what_is_finished_and_prints_the_spread_of_seeds(first: Path, run, capsys):
    before = first.read_text()
    assert run(first, "--methods", "dense,rigl", "--seeds", "0,1", "--table") == 0
    told = capsys.readouterr()
    assert "4 runs, 2 finished before" in told.err
    assert first.read_text().startswith(before)
    added = records(first)[len(METHODS) :]
    assert [(each["cell"]["method"], each["cell"]["seed"]) for each in added] == [("dense", 1), ("rigl", 1)]
    accuracies = [100 * each["result"]["accuracy"] for each in records(first) if each["cell"]["method"] == "dense"]
    row = next(line for line in told.out.splitlines() if line.startswith("| dense | 0 |"))
    assert f"| 2 | {np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} |" in row
    assert sum(line.startswith("| Sparse Wide") for line in told.out.splitlines()) == 6


def test_a_run_depends_on_its_settings_only(first: Path, run, tmp_path: Path):
    again = tmp_path / "again.jsonl"
    assert run(again, "--methods", "rigl", "--seeds", "0") == 0
    old = next(r["result"] for r in records(first) if (r["cell"]["method"], r["cell"]["seed"]) == ("rigl", 0))
    new = records(again)[0]["result"]
    assert new["curve"] == old["curve"]
    assert new["loss"] == old["loss"]
    assert new["masks"] == old["masks"]


def test_held_out_images_are_tested_on_and_not_trained_on(run, tmp_path: Path):
    output = tmp_path / "held-out.jsonl"
    assert run(output, "--methods", "dense", "--seeds", "0", "--held-out", "40") == 0
    (result,) = [record["result"] for record in records(output)]
    assert (result["train_images"], result["test_images"]) == (152, 40)


def test_what_cannot_be_is_refused(run, main: Main, tmp_path: Path, capsys):
    output = tmp_path / "results.jsonl"
    assert run(output, "--methods", "rigle") == 2
    assert "Did you mean 'rigl'?" in capsys.readouterr().err
    assert main(["--output", str(output)]) == 2
    assert "give --dataset to train, or --table" in capsys.readouterr().err
    output.write_text('{"something": "else"}\n')
    assert run(output, "--methods", "dense", "--seeds", "0") == 2
    assert "line 1, is not a result of this program" in capsys.readouterr().err
    assert output.read_text() == '{"something": "else"}\n'


def test_the_tables_in_the_docs_are_those_of_the_results_beside_them(main: Main, capsys):
    docs = BENCHMARKS.parent / "docs"
    assert main(["--output", str(docs / "accuracy.jsonl"), "--table"]) == 0
    tables = capsys.readouterr().out.strip()
    assert tables.startswith("**")
    assert tables in (docs / "accuracy.md").read_text(encoding="utf-8")
