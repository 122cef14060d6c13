"""What tests of runtimes share."""

from __future__ import annotations

import pytest
import torch

from sift_compiler.runtimes import registry
from sift_compiler.runtimes.tvm.target import cpu_facts, host_cpu


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=registry.names())
def runtime(request: pytest.FixtureRequest) -> str:
    """The name of every runtime in turn."""
    return str(request.param)


@pytest.fixture(params=["host", "x86-64-v3", "x86-64"])
def cpu(request: pytest.FixtureRequest) -> str:
    """The name of this processor, and of two that it can stand in for."""
    name = host_cpu().name if request.param == "host" else str(request.param)
    if host_cpu().lanes < cpu_facts(name).lanes:
        pytest.skip(f"this machine is not an {name}")
    return name
