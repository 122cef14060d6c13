"""Rewrite dense PyTorch models into iso-FLOP sparse ones, train them with moving masks, run them as mask-specialised code.

The public names are loaded when they are first used: ``import sift_compiler`` alone loads nothing, not even torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sift_compiler.errors import (
        PassError,
        RuntimeBuildError,
        SiftError,
        StaleArtifactError,
        UnsupportedError,
        UserError,
    )
    from sift_compiler.export import export
    from sift_compiler.ir.pattern import Pattern
    from sift_compiler.nn import SparseConv2d, SparseLinear
    from sift_compiler.options import (
        SET,
        CompileOptions,
        LowRank,
        RigL,
        SparseDoped,
        SparseFactorized,
        SparseParallel,
        SparseWide,
        Static,
    )
    from sift_compiler.report import report
    from sift_compiler.rewrite import rewrite
    from sift_compiler.schedule import schedule
    from sift_compiler.storage import load, load_checkpoint, save

_HOMES = {
    "CompileOptions": "options",
    "LowRank": "options",
    "PassError": "errors",
    "Pattern": "ir.pattern",
    "RigL": "options",
    "RuntimeBuildError": "errors",
    "SET": "options",
    "SiftError": "errors",
    "SparseConv2d": "nn",
    "SparseDoped": "options",
    "SparseFactorized": "options",
    "SparseLinear": "nn",
    "SparseParallel": "options",
    "SparseWide": "options",
    "StaleArtifactError": "errors",
    "Static": "options",
    "UnsupportedError": "errors",
    "UserError": "errors",
    "export": "export",
    "load": "storage",
    "load_checkpoint": "storage",
    "report": "report",
    "rewrite": "rewrite",
    "save": "storage",
    "schedule": "schedule",
}
"""Every public name and the module it is defined in."""

__all__ = [
    "SET",
    "CompileOptions",
    "LowRank",
    "PassError",
    "Pattern",
    "RigL",
    "RuntimeBuildError",
    "SiftError",
    "SparseConv2d",
    "SparseDoped",
    "SparseFactorized",
    "SparseLinear",
    "SparseParallel",
    "SparseWide",
    "StaleArtifactError",
    "Static",
    "UnsupportedError",
    "UserError",
    "export",
    "load",
    "load_checkpoint",
    "report",
    "rewrite",
    "save",
    "schedule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if name == "nn":
            return importlib.import_module("sift_compiler.nn")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "nn"})


class _Face(types.ModuleType):
    """Keeps ``sift.rewrite`` the function: loading the module of the same name would put itself in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
