"""MODEL on the command line: a ``.pt2`` file, ``package.module:factory`` or ``path/to/file.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from sift_compiler import archive
from sift_compiler.errors import UserError
from sift_compiler.storage import load

FORMS = "a file.pt2, package.module:factory or path/to/file.py:factory"


def find_model(source: str) -> nn.Module | ExportedProgram:
    """The model that ``source`` names.

    A ``.pt2`` file is one of ``sift.save`` (a GraphModule comes back) or of ``torch.export.save`` (an ExportedProgram comes back).
    A factory is a function or class that makes the model without arguments, or the model itself; modules are also looked for in the
    working directory.

    Raises:
        UserError: there is no such file, module or factory, or the factory fails or makes something else.
        StaleArtifactError: a damaged file.
    """
    home, colon, name = source.rpartition(":")
    if colon and home and name.replace(".", "_").isidentifier():
        return _made(source, _attribute(source, _imported(source, home), name))
    path = Path(source)
    if path.suffix != ".pt2":
        raise UserError(f"MODEL {source!r} is not understood. Give {FORMS}.")
    return load(path) if not path.is_file() or _is_own(path) else archive.load_program(path)


def find_saved(source: str) -> fx.GraphModule:
    """The module of a file of ``sift.save``; see :func:`sift_compiler.storage.load`."""
    return load(source)


def sparse_module(found: nn.Module | ExportedProgram) -> nn.Module:
    """``found``, if it may hold sparse layers.

    Raises:
        UserError: it is an exported program, which is dense.
    """
    if not isinstance(found, nn.Module):
        raise UserError(
            "Only sparse layers run on compiled code; an exported dense program has none. Make it sparse: sift rewrite MODEL."
        )
    return found


def _is_own(path: Path) -> bool:
    """Whether ``sift.save`` wrote it; a file that is no archive counts too, so that ``load`` tells what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as opened:
            return any(name.endswith(archive.METADATA) for name in opened.namelist())
    except (OSError, zipfile.BadZipFile):
        return True


def _imported(source: str, home: str) -> ModuleType:
    try:
        if home.endswith(".py"):
            return _imported_file(Path(home))
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(home)
    except UserError:
        raise
    except Exception as error:  # an imported file may raise anything
        raise UserError(
            f"MODEL {source!r}: {home} cannot be imported: {type(error).__name__}: {error}. Give {FORMS}."
        ) from error


def _imported_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give {FORMS}.")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look a class's module up by name
    sys.path.insert(0, str(path.parent.absolute()))  # as python path/to/file.py does
    specification.loader.exec_module(module)
    return module


def _attribute(source: str, module: ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"MODEL {source!r}: there is no {name!r} in {module.__name__}.")
        found = getattr(found, part)
    return found


def _made(source: str, factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UserError(
            f"MODEL {source!r} names a {type(factory).__name__}, not a function or class that makes a model."
        )
    try:
        torch.manual_seed(0)
        model = factory()
    except Exception as error:  # a factory may raise anything
        raise UserError(
            f"MODEL {source!r} was called without arguments and failed: {type(error).__name__}: {error}. Name a function that "
            "needs no arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"MODEL {source!r} made a {type(model).__name__}, not a torch.nn.Module.")
    return model
