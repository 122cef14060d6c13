"""The file of a saved module: a zip archive of torch.export and this package's own records in it.

A file appears whole or not at all, and is looked through before torch reads it: torch.export.load unpickles whatever an archive
declares as pickled, which could run code.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.whole_file import appearing_whole

METADATA, STATE = "sift/metadata.json", "sift/state.pt"


def write(program: ExportedProgram, target: Path, records: Mapping[str, bytes]) -> None:
    """Write ``program`` and ``records`` (content by name) to ``target``, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with appearing_whole(target) as unfinished:
        with open(unfinished, "w+b") as file:
            torch.export.save(program, file)
        with zipfile.ZipFile(unfinished, "a", zipfile.ZIP_STORED) as archive:
            root = archive.namelist()[0].split("/", 1)[0]
            for name, content in records.items():
                archive.writestr(f"{root}/{name}", content)


def read(source: Path) -> tuple[dict[str, Any], bytes]:
    """The description and the state of a saved file, after a look at the whole of it: that it is intact and holds no pickle.

    Raises:
        UserError: there is no such file, or it was not written here.
        StaleArtifactError: the file is damaged or refused.
    """
    foreign = UserError(
        f"{source} was not written by sift.save. To rewrite a program of torch.export, load it with torch.export.load and "
        "pass its module() to sift.rewrite."
    )
    with _looked_through(source, foreign) as archive:
        root = _root(archive)
        if {f"{root}/{METADATA}", f"{root}/{STATE}"} - set(archive.namelist()):
            raise foreign
        _refuse_pickles(archive, source)
        metadata: dict[str, Any] = json.loads(archive.read(f"{root}/{METADATA}"))
        return metadata, archive.read(f"{root}/{STATE}")


def load_program(source: Path) -> ExportedProgram:
    """A program that ``torch.export.save`` wrote, if it holds no pickle.

    Raises:
        UserError: there is no such file, or it holds no program.
        StaleArtifactError: the file is damaged, refused or of another version of torch.
    """
    foreign = UserError(f"{source} holds no program. Give a file that sift.save or torch.export.save wrote.")
    with _looked_through(source, foreign) as archive:
        _refuse_pickles(archive, source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\..*|copyreg")
            return torch.export.load(source)
    except Exception as error:  # torch raises anything from KeyError to AssertionError on a program it cannot read
        raise StaleArtifactError(
            f"{source} could not be read ({type(error).__name__}: {error}). Export the model again with torch {torch.__version__}."
        ) from error


@contextlib.contextmanager
def _looked_through(source: Path, foreign: UserError) -> Iterator[zipfile.ZipFile]:
    """The archive, every checksum tested; ``foreign`` is raised for a file that is none."""
    if not source.is_file():
        raise UserError(f"There is no file {source}. Pass the path that was given to sift.save.")
    try:
        with zipfile.ZipFile(source) as archive:
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"bad checksum of {broken}")
            yield archive
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error}).") from error
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, zipfile.BadZipFile) and not _begins_as_zip(source):
            raise foreign from error
        raise StaleArtifactError(
            f"{source} is damaged or was cut short ({error}). Copy it again from where it was saved, or use an older checkpoint."
        ) from error


def _root(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    return names[0].split("/", 1)[0] if names else ""


def _begins_as_zip(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(2) == b"PK"


def _refuse_pickles(archive: zipfile.ZipFile, source: Path) -> None:
    """torch.export.load unpickles whatever a file declares as pickled; files of sift.save never do."""
    names = archive.namelist()
    reason = "it holds a record twice" if len(set(names)) != len(names) else None
    configurations = [name for name in names if name.endswith(("_weights_config.json", "_constants_config.json"))]
    if len(configurations) != 2:
        reason = "it is not laid out as torch.export writes programs"
    for name in configurations:
        entries = json.loads(archive.read(name))["config"]
        if any(entry["use_pickle"] for entry in entries.values()):
            reason = "it holds pickled objects, which could run code"
    for name in names:
        # torch falls back to full unpickling where this fails.
        if "/data/sample_inputs/" in name:
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except Exception:  # whatever it is, the file is not taken
                reason = "its sample inputs are not plain tensors"
        elif ("/data/weights/" in name or "/data/constants/" in name) and name.endswith(".pt"):
            reason = "its tensors are in an old, pickled format"
    if reason is not None:
        raise StaleArtifactError(
            f"{source} is refused: {reason}. Load only files that sift.save or torch.export.save wrote."
        )
