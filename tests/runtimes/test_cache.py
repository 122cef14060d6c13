"""Compiled kernels on disk: what is a key, what is a miss, two processes at once, folders that cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sift_compiler.errors import UserError
from sift_compiler.runtimes import cache as cache_module
from sift_compiler.runtimes import fingerprint as fingerprint_module
from sift_compiler.runtimes.cache import Form, KernelCache, contents, default_folder
from sift_compiler.runtimes.fingerprint import Fingerprint, source_digest

KEY = Fingerprint(
    generator="package.generator", constants=(("rows", "3"), ("width", "7")), target="llvm znver4",
    features=("avx2", "fma"), toolchain=(("llvm", "22"), ("tvm", "0.27")), source="0" * 64,
)  # fmt: skip
TEXT = {"txt": Form[str](lambda code, path: void(path.write_text(code)), lambda path: path.read_text())}


def void(_: object) -> None:
    """Forms return nothing."""


def counted(results: list[str], code: str = "code") -> str:
    results.append(code)
    return code


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Fingerprint)])
def test_every_field_is_in_the_digest(field):
    value = getattr(KEY, field)
    other = dataclasses.replace(KEY, **{field: value + "x" if isinstance(value, str) else value[:-1]})
    assert other.digest != KEY.digest


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("sift_compiler.runtimes.tvm.sparse_kernel", ("sift_compiler.runtimes.tvm.transpose",)),
        (
            "sift_compiler.runtimes.tvm.winograd_kernel",
            ("sift_compiler.runtimes.tvm.winograd_steps", "sift_compiler.lowering.winograd"),
        ),
        (
            "sift_compiler.runtimes.tvm.winograd_space",
            ("sift_compiler.runtimes.tvm.winograd_steps", "sift_compiler.lowering.winograd"),
        ),
    ],
    ids=["sparse", "winograd", "winograd space"],
)
def test_the_source_digest_follows_imports(module, imported, monkeypatch):
    before, read = source_digest(module), fingerprint_module._source
    assert before is not None
    for edited in (module, *imported):
        monkeypatch.setattr(
            fingerprint_module, "_source", lambda name, edited=edited: read(name) + ("\n#" if name == edited else "")
        )
        source_digest.cache_clear()
        assert source_digest(module) != before, edited
    monkeypatch.setattr(fingerprint_module, "_source", lambda name: None)
    source_digest.cache_clear()
    assert source_digest(module) is None
    monkeypatch.undo()
    source_digest.cache_clear()
    assert source_digest(module) == before


def test_a_kernel_is_built_once_and_then_loaded(tmp_path):
    built: list[str] = []
    for _ in range(3):
        assert KernelCache(tmp_path / "new", TEXT).get(KEY, lambda: counted(built)) == "code"
    assert built == ["code"]
    assert contents(tmp_path / "new").kernels == 1
    assert contents(tmp_path / "missing") == cache_module.Contents(0, 0)


@pytest.mark.parametrize("damage", ["truncated", "changed", "no artifact", "record", "foreign", "form"])
def test_what_does_not_fit_is_a_miss_with_a_reason(tmp_path, damage, caplog):
    kernels, built = KernelCache(tmp_path, TEXT), []
    kernels.get(KEY, lambda: counted(built))
    artifact, record = tmp_path / f"{KEY.digest}.txt", tmp_path / f"{KEY.digest}.json"
    plain = json.loads(record.read_text())
    if damage == "truncated":
        artifact.write_text("co")
    elif damage == "changed":
        artifact.write_text("dode")
    elif damage == "no artifact":
        artifact.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:40])
    elif damage == "foreign":
        plain["fingerprint"]["target"] = "llvm skylake"
        record.write_text(json.dumps(plain))
    else:
        plain["form"] = "exe"
        record.write_text(json.dumps(plain))
    with caplog.at_level(logging.WARNING):
        assert kernels.get(KEY, lambda: counted(built, "newer")) == "newer"
        assert kernels.try_load(KEY) == "newer", "repaired"
    assert len(built) == 2
    assert damage == "no artifact" or "is not used" in caplog.text


def test_the_best_form_that_can_be_written_is_stored(tmp_path):
    def impossible(code: str, path: Path) -> None:
        raise FileNotFoundError("no linker")

    kernels = KernelCache(tmp_path, {"so": Form[str](impossible, Path.read_text), **TEXT})
    assert kernels.get(KEY, lambda: "code") == "code"
    assert [file.suffix for file in sorted(tmp_path.glob("*.[jst]*"))] == [".json", ".txt"]


@pytest.mark.parametrize("obstacle", ["below a file", "full disk"])
def test_without_a_writable_folder_kernels_live_in_memory_said_once(tmp_path, obstacle, caplog, monkeypatch):
    folder = tmp_path
    if obstacle == "below a file":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "cache"
    else:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sift_compiler.whole_file.os.replace", full)
    built: list[str] = []
    with caplog.at_level(logging.WARNING):
        for turn in range(3):
            other = dataclasses.replace(KEY, source=str(turn))
            assert KernelCache(folder, TEXT).get(other, lambda: counted(built)) == "code"
    assert len(built) == 3
    assert len([record for record in caplog.records if "Nothing can be stored" in record.getMessage()]) == 1
    assert not list(tmp_path.glob("*.txt")), "nothing unfinished stays"


def test_a_failing_build_is_the_callers_and_leaves_nothing(tmp_path):
    def fail() -> str:
        raise ValueError("cannot")

    with pytest.raises(ValueError, match="cannot"):
        KernelCache(tmp_path, TEXT).get(KEY, fail)
    assert contents(tmp_path).kernels == 0


RACER = """
import sys, time
from pathlib import Path
from sift_compiler.runtimes.cache import Form, KernelCache
from tests_key import KEY
def build():
    with open(sys.argv[1] + "/built", "a") as log: log.write("x")
    time.sleep(0.5)
    return "code"
form = Form(lambda code, path: path.write_text(code) and None, lambda path: path.read_text())
print(KernelCache(Path(sys.argv[1]) / "cache", {"txt": form}).get(KEY, build))
"""


def test_of_two_processes_one_builds(tmp_path):
    (tmp_path / "tests_key.py").write_text(
        f"from sift_compiler.runtimes.fingerprint import Fingerprint\nKEY = {KEY!r}\n", encoding="utf-8"
    )
    (tmp_path / "racer.py").write_text(RACER, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "racer.py"), str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [racer.communicate(timeout=60)[0] for racer in racers] == ["code\n"] * 3
    assert (tmp_path / "built").read_text() == "x"


def test_the_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path / "kernels"))
    assert default_folder() == tmp_path / "kernels"
    monkeypatch.delenv("SIFT_CACHE_DIR")
    assert "sift_compiler" in default_folder().parts
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="SIFT_CACHE_DIR"):
        default_folder()


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_written(tmp_path, caplog):
    def half(code: str, path: Path) -> None:
        path.write_text(code[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    kernels, built = KernelCache(tmp_path, {"txt": Form[str](half, Path.read_text)}), []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert kernels.get(KEY, lambda: counted(built)) == "code"
    assert len(built) == 2, "what was written by half is not found"
    assert {file.suffix for file in tmp_path.iterdir()} <= {".lock"}
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]


def test_a_disk_that_is_full_when_the_record_comes_leaves_no_kernel(tmp_path, monkeypatch):
    real = Path.write_text

    def full(self: Path, text: str, **options: str) -> int:
        if self.suffix == ".json":
            real(self, text[:10], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    kernels = KernelCache(tmp_path, TEXT)
    assert kernels.get(KEY, lambda: "code") == "code"
    assert kernels.try_load(KEY) is None
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.undo()
    assert kernels.get(KEY, lambda: "newer") == "newer"
    assert kernels.try_load(KEY) == "newer"


@pytest.mark.skipif(os.name != "posix", reason="folders are made read-only by their mode")
def test_a_folder_that_is_read_only_is_read(caplog):
    # Not below pytest's folder: another user, as whom root has to look, cannot enter that.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        _read_only(Path(place) / "cache", caplog)


def _read_only(folder, caplog):
    KernelCache(folder, TEXT).get(KEY, lambda: "code")
    other = dataclasses.replace(KEY, source="1" * 64)
    (folder / f"{KEY.digest}.lock").unlink(missing_ok=True)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # to whom modes mean nothing
            os.seteuid(65534)
        with caplog.at_level(logging.WARNING):
            assert KernelCache(folder, TEXT).get(KEY, lambda: "newer") == "code"
            assert not caplog.records
            assert KernelCache(folder, TEXT).get(other, lambda: "newer") == "newer"
        assert any("Nothing can be stored" in record.getMessage() for record in caplog.records)
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert contents(folder).kernels == 1
