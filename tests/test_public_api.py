"""Public names: they exist, are documented, and cost nothing until they are used."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import sift_compiler as sift

NAMES = {
    "BAME", "BiDST", "Block", "Channel", "CompileOptions", "ConstantFanIn", "DynamicMethod", "GMP", "GraNet",
    "InfeasibleError", "LowRank", "MEST", "MovingMethod", "NM", "PassError", "Pattern", "Recorder", "RigL", "RuntimeBuildError", "SET", "SNFS",
    "SRSTE", "SRigL", "SiftError", "SparseConv2d", "SparseDoped", "SparseFactorized", "SparseLinear",
    "SparseParallel", "SparseWide", "StaleArtifactError", "Static", "TopKAST", "TransposableNM", "Unstructured",
    "UnsupportedError", "UserError", "compact", "dense_state_dict", "dense_storage", "densify", "export", "from_masked",
    "load", "load_checkpoint", "report", "rewrite", "save", "schedule", "snip", "to_dense",
}  # fmt: skip


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(sift.__path__, "sift_compiler."):
        yield importlib.import_module(info.name)


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public modules, functions, classes and methods defined in ``module`` that have no docstring of their own."""
    if not module.__doc__:
        yield module.__name__
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__:
            yield f"{module.__name__}.{name}"
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            if not member.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                yield f"{module.__name__}.{name}.{member}"


def test_public_names_are_the_promised_ones_and_resolve() -> None:
    assert set(sift.__all__) == NAMES
    assert set(dir(sift)) >= NAMES
    for name in NAMES:
        assert callable(getattr(sift, name)), name
    assert isinstance(sift.nn, ModuleType)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rewrit'"):
        sift.rewrit  # noqa: B018


def test_everything_public_has_a_docstring() -> None:
    assert [name for module in modules() for name in undocumented(module)] == []


def test_functions_keep_their_names_when_their_modules_are_loaded() -> None:
    code = (
        "import sift_compiler.schedule, sift_compiler.rewrite, sift_compiler.report, sift_compiler.export, sift_compiler as sift\n"
        "print(*(type(getattr(sift, name)).__name__ for name in ('schedule', 'rewrite', 'report', 'export')))"
    )
    assert python(code).split() == ["function"] * 4


def test_import_loads_nothing_heavy() -> None:
    assert python("import sift_compiler, sys; print('torch' in sys.modules)") == "False"
    assert python("import sift_compiler.cli, sys; print('torch' in sys.modules)") == "False"
    code = (
        "import sift_compiler as sift, sys\n"
        "[getattr(sift, name) for name in sift.__all__]\n"
        "heavy = ('tvm', 'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'sklearn', 'typer')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert python(code) == "[]"


def test_doctor_runs_where_torch_does_not() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sift_compiler.commands.doctor import examine\n"
        "import sift_compiler.cli\n"
        "print(next(check.ok for check in examine() if check.name == 'torch'))"
    )
    assert python(code) == "False"


def test_torch_finds_the_backend_by_its_name() -> None:
    assert python("import torch; print('sift' in torch.compiler.list_backends())") == "True"
