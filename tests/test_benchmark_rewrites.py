"""benchmarks/rewrites.py runs and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rewrites.py"


def run(*arguments: str | Path) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_prints_json_of_every_rewrite_and_its_refusals():
    cells = ("--members", "doped,parallel", "--sparsities", "0.1,0.75")
    found = json.loads(run("--architectures", "mlp", "--steps", "5", *cells, "--json"))
    assert found["steps"] == 5
    doped, _, one_branch, parallel = found["results"]
    for result in (doped, parallel):
        assert abs(result["flop_ratio"] - 1) < 1e-3
        assert result["learns"]
        assert result["verdict"] == "yes"
    assert parallel["search_space"] == 4 * (64 * 256 + 256 * 256)
    assert "1.111 branches" in one_branch["refused"]
    assert one_branch["verdict"] == "refused"


def test_results_are_kept_and_shown_as_markdown(tmp_path):
    pytest.importorskip("transformers")
    asked = ("--architectures", "resnet", "--members", "wide", "--steps", "3", "--keep", tmp_path, "--markdown")
    first = run(*asked, "--sparsities", "0.5,0.9")
    kept = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert sorted(kept) == ["resnet-wide-0.5-3-0.01.json", "resnet-wide-0.9-3-0.01.json"]
    changed = json.loads(kept["resnet-wide-0.5-3-0.01.json"]) | {"flop_ratio": 1.25}
    (tmp_path / "resnet-wide-0.5-3-0.01.json").write_text(json.dumps(changed), encoding="utf-8")
    again = run(*asked, "--sparsities", "0.5,0.9")
    head, _, row, _, reason = first.splitlines()
    assert head == "| architecture | member | 0.5 | 0.9 |"
    assert row.startswith("| resnet | wide | 0.9999")
    assert row.endswith("| infeasible |"), "its stem alone costs more then"
    assert reason.startswith("- resnet, wide, 0.9: Widening by 3.1623 cannot cost the same FLOPs")
    assert "largest feasible widening" in reason
    assert "1.250000" in again, "taken from the folder, not measured again"
    assert "**not iso-FLOP**" in again


def test_published_sizes_are_planned():
    pytest.importorskip("transformers")
    (found,) = json.loads(
        run("--published", "--architectures", "vit_base", "--members", "wide", "--sparsities", "0.75", "--json")
    )["results"]
    assert abs(found["flop_ratio"] - 1) < 1e-6
    assert found["loss_after"] is None
    assert found["search_space"] == 4 * 12 * (4 * 768**2 + 2 * 768 * 3072)
