"""What tests of runtimes share."""

from __future__ import annotations

import pytest
import torch

from sift_compiler.runtimes import registry


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=registry.names())
def runtime(request: pytest.FixtureRequest) -> str:
    """The name of every runtime in turn."""
    return str(request.param)
