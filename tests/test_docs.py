"""README and docs: their python code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from sift_compiler.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
COMMAND = re.compile(r"^\s+sift (.*)$", re.MULTILINE)
SCRIPT = re.compile(r"^\s+(?:python|torchrun\b.*) ((?:benchmarks|examples)/\S+\.py)((?:.*\\\n)*.*)$", re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))], ids=named)
def test_python_blocks_run_one_after_another(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.compiler.reset()
    text = page.read_text(encoding="utf-8")
    space: dict[str, object] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), space)
    assert blocks


def test_readme_has_code_to_run() -> None:
    assert len(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) >= 3


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page: Path) -> None:
    for goal in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / goal).exists(), goal


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_options_exist(page: Path) -> None:
    commands = get_command(app).commands
    for line in COMMAND.findall(page.read_text(encoding="utf-8")):
        words = line.split("#")[0].split()
        command = commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_scripts_and_their_options_exist(page: Path) -> None:
    for name, rest in SCRIPT.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / name).read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)--[a-z-]+", re.sub(r"#.*", "", rest)):
            assert f'"{option}"' in source, f"{name} {option}"


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"^    make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets
