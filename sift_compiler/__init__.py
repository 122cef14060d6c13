"""Rewrite dense PyTorch models into iso-FLOP sparse ones, train them with moving masks, run them as mask-specialised code.

The public names are loaded when they are first used: ``import sift_compiler`` alone loads nothing, not even torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sift_compiler.densify import dense_state_dict, densify, to_dense
    from sift_compiler.errors import (
        InfeasibleError,
        PassError,
        RuntimeBuildError,
        SiftError,
        StaleArtifactError,
        UnsupportedError,
        UserError,
    )
    from sift_compiler.export import export
    from sift_compiler.from_masked import from_masked
    from sift_compiler.ir.mask_structure import NM, Block, Channel, ConstantFanIn, TransposableNM, Unstructured
    from sift_compiler.ir.pattern import Pattern
    from sift_compiler.masking.bame import BAME
    from sift_compiler.masking.bidst import BiDST
    from sift_compiler.masking.gradual import GMP, GraNet
    from sift_compiler.masking.mest import MEST
    from sift_compiler.masking.rule import DynamicMethod, MovingMethod
    from sift_compiler.masking.snfs import SNFS
    from sift_compiler.masking.snip import snip
    from sift_compiler.masking.srigl import SRigL
    from sift_compiler.masking.straight_through import SRSTE, TopKAST
    from sift_compiler.nn import SparseConv2d, SparseLinear
    from sift_compiler.nn.storage import compact, dense_storage
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
    from sift_compiler.recorder import Recorder
    from sift_compiler.report import report
    from sift_compiler.rewrite import rewrite
    from sift_compiler.schedule import schedule
    from sift_compiler.storage import load, load_checkpoint, save

_HOMES = {
    "BAME": "masking.bame",
    "BiDST": "masking.bidst",
    "Block": "ir.mask_structure",
    "Channel": "ir.mask_structure",
    "CompileOptions": "options",
    "ConstantFanIn": "ir.mask_structure",
    "DynamicMethod": "masking.rule",
    "GMP": "masking.gradual",
    "GraNet": "masking.gradual",
    "InfeasibleError": "errors",
    "LowRank": "options",
    "MEST": "masking.mest",
    "MovingMethod": "masking.rule",
    "NM": "ir.mask_structure",
    "PassError": "errors",
    "Pattern": "ir.pattern",
    "Recorder": "recorder",
    "RigL": "options",
    "RuntimeBuildError": "errors",
    "SET": "options",
    "SNFS": "masking.snfs",
    "SRSTE": "masking.straight_through",
    "SRigL": "masking.srigl",
    "SiftError": "errors",
    "SparseConv2d": "nn",
    "SparseDoped": "options",
    "SparseFactorized": "options",
    "SparseLinear": "nn",
    "SparseParallel": "options",
    "SparseWide": "options",
    "StaleArtifactError": "errors",
    "Static": "options",
    "TopKAST": "masking.straight_through",
    "TransposableNM": "ir.mask_structure",
    "Unstructured": "ir.mask_structure",
    "UnsupportedError": "errors",
    "UserError": "errors",
    "compact": "nn.storage",
    "dense_state_dict": "densify",
    "dense_storage": "nn.storage",
    "densify": "densify",
    "export": "export",
    "from_masked": "from_masked",
    "load": "storage",
    "load_checkpoint": "storage",
    "report": "report",
    "rewrite": "rewrite",
    "save": "storage",
    "schedule": "schedule",
    "snip": "masking.snip",
    "to_dense": "densify",
}
"""Every public name and the module it is defined in."""

__all__ = [
    "BAME",
    "GMP",
    "MEST",
    "NM",
    "SET",
    "SNFS",
    "SRSTE",
    "BiDST",
    "Block",
    "Channel",
    "CompileOptions",
    "ConstantFanIn",
    "DynamicMethod",
    "GraNet",
    "InfeasibleError",
    "LowRank",
    "MovingMethod",
    "PassError",
    "Pattern",
    "Recorder",
    "RigL",
    "RuntimeBuildError",
    "SRigL",
    "SiftError",
    "SparseConv2d",
    "SparseDoped",
    "SparseFactorized",
    "SparseLinear",
    "SparseParallel",
    "SparseWide",
    "StaleArtifactError",
    "Static",
    "TopKAST",
    "TransposableNM",
    "Unstructured",
    "UnsupportedError",
    "UserError",
    "compact",
    "dense_state_dict",
    "dense_storage",
    "densify",
    "export",
    "from_masked",
    "load",
    "load_checkpoint",
    "report",
    "rewrite",
    "save",
    "schedule",
    "snip",
    "to_dense",
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
