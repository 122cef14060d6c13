"""benchmarks/rewrites.py runs and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rewrites.py"


def run(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--architectures", "mlp", "--steps", "5", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_prints_json_of_every_rewrite_and_its_refusals():
    found = json.loads(run("--members", "doped,parallel", "--sparsities", "0.1,0.75", "--json"))
    assert found["steps"] == 5
    doped, _, one_branch, parallel = found["results"]
    for result in (doped, parallel):
        assert abs(result["flop_ratio"] - 1) < 1e-3
        assert result["learns"]
    assert parallel["search_space"] == 4 * (64 * 256 + 256 * 256)
    assert "1.111 branches" in one_branch["refused"]
