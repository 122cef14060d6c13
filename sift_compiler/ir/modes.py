"""Train and eval mode for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def training_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put ``module`` in train or eval mode; afterwards every submodule's own flag is what it was."""
    flags = [(each, each.training) for each in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for each, flag in flags:
            each.training = flag
