"""The wheel: everything of the tree is in it, nothing else, and a tree without its symbolic links cannot be built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = {"passes": "../passes", "runtimes": "../runtimes"}
COPIED = ("sift_compiler", "passes", "runtimes", "pyproject.toml", "README.md", "LICENSE")


def copy_of_tree(place: Path) -> Path:
    """What a build needs, in a folder of its own: a build leaves files behind."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, place / name)
    return place


def build(tree: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    return subprocess.run([*command, "--wheel-dir", str(out), str(tree)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    result = build(copy_of_tree(tmp_path_factory.mktemp("tree")), out)
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("*.whl")
    return file


def test_links_point_at_the_folders() -> None:
    for name, goal in LINKS.items():
        link = ROOT / "sift_compiler" / name
        assert link.is_symlink()
        assert str(link.readlink()) == goal
        assert (link / "__init__.py").is_file()


def test_wheel_holds_every_module_and_only_this_package(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "sift_compiler").rglob("*.py")}
    for name in LINKS:  # rglob does not follow links
        expected |= {f"sift_compiler/{file.relative_to(ROOT)}" for file in (ROOT / name).rglob("*.py")}
    assert "sift_compiler/runtimes/tvm/runtime.py" in expected
    assert {file for file in files if file.endswith(".py")} == expected
    assert "sift_compiler/py.typed" in files
    roots = {file.partition("/")[0] for file in files}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"sift_compiler"}


def test_wheel_names_the_command_and_the_backend(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("entry_points.txt"))
        text = opened.read(name).decode()
        assert any(name.endswith("LICENSE") for name in opened.namelist())
    assert "sift = sift_compiler.cli:main" in text
    assert "[torch_dynamo_backends]\nsift = sift_compiler.dynamo:sift" in text


def test_tree_without_links_does_not_build(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_of_tree(tree)
    (tree / "sift_compiler" / "passes").unlink()
    result = build(tree, tmp_path / "out")
    assert result.returncode != 0
    assert "sift_compiler/passes" in result.stderr + result.stdout
    assert not list(tmp_path.glob("out/*.whl"))
