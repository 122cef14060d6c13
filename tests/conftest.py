"""What several test files share."""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Tests, and what they start, neither find the user's compiled kernels nor leave any; those of all workers of a run are shared."""
    if hasattr(config, "workerinput"):
        return  # a worker of xdist: it has the environment of the process that started it
    folder, patch = tempfile.TemporaryDirectory(), pytest.MonkeyPatch()
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(patch.undo)
    patch.setenv("SIFT_CACHE_DIR", folder.name)


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., None]:
    """``start_ranks(work, count, *arguments)`` runs ``work(rank, *arguments)`` in processes of their own and waits for all.

    They are forks of one process that has imported what takes seconds and done nothing else.
    """
    import torch.multiprocessing

    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp", "sift_compiler.dynamo"])

    def start(work: Callable[..., None], count: int, *arguments: object) -> None:
        torch.multiprocessing.start_processes(work, args=arguments, nprocs=count, start_method="forkserver")

    return start


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet and all of Dynamo's counters are 0; nothing stays compiled."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


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
