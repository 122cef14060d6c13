"""Epilogue: what a kernel does to its finished sums before it stores them."""

from __future__ import annotations

from dataclasses import dataclass

from sift_compiler.errors import unknown_name
from sift_compiler.nn.fused import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """``y = activation((sum + bias) · scale + shift + residual)``; which of the parts there are, never their numbers."""

    scaled: bool = False
    """Whether there is a scale and a shift per output channel: batch norm in evaluation mode."""
    residual: bool = False
    """Whether a tensor of the output's shape is added."""
    activation: str = "none"
    """One of nn.fused.ACTIVATIONS."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)

    def __str__(self) -> str:
        parts = ["batch norm"] * self.scaled + ["add"] * self.residual
        return " + ".join(parts + [self.activation] * (self.activation != "none")) or "nothing"


PLAIN = Epilogue()
"""The sums and the bias are stored as they are."""
