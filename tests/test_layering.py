"""The direction of imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sift_compiler", "passes", "runtimes", "tests", "examples", "benchmarks")


def sources(*folders: str) -> list[Path]:
    """Python files of the tree, each once: the symbolic links are not followed."""
    links = {ROOT / "sift_compiler" / "passes", ROOT / "sift_compiler" / "runtimes"}
    return sorted(file for name in folders for file in (ROOT / name).rglob("*.py") if not links & set(file.parents))


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_contracts_hold() -> None:
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if program is None:
        pytest.fail("lint-imports is missing: pip install -e '.[dev]'")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("file", sources(*FOLDERS), ids=lambda file: str(file.relative_to(ROOT)))
def test_folders_at_the_top_are_never_imported_by_their_own_name(file: Path) -> None:
    roots = {name.partition(".")[0] for name in imported(file)}
    assert not roots & {"passes", "runtimes"}


def test_masking_knows_no_graph() -> None:
    files = sources("sift_compiler/masking")
    assert files
    for file in files:
        assert not {name for name in imported(file) if name.startswith("torch.fx")}, file


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("from torch import fx\ndef f():\n    import passes.base\n", encoding="utf-8")
    assert {"torch.fx", "passes.base"} <= imported(file)
