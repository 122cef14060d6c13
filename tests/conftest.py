"""What several test files share."""

from __future__ import annotations

import importlib.util
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_kernel_cache() -> Iterator[None]:
    """Tests, and what they start, neither find the user's compiled kernels nor leave any."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIFT_CACHE_DIR", folder)
        yield


def _example(name: str) -> types.ModuleType:
    """A file of examples/, loaded by its path as a script would be."""
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models() -> types.ModuleType:
    """examples/models.py."""
    return _example("models")


@pytest.fixture(scope="session")
def architectures() -> types.ModuleType:
    """examples/architectures.py; what needs the package transformers is skipped without it."""
    pytest.importorskip("transformers")
    return _example("architectures")
