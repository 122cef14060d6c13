"""``sift doctor``: whether this machine can run everything, and what to do where it cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from sift_compiler.errors import UserError

_PACKAGE = "sift_compiler"
_CPU_FLAGS = ("sse4_2", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
_PROGRAM = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>{}.size()); }\n"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: whether it is as it should be.
        essential: whether training with compiled kernels needs it.
        found: what there is.
        advice: what to do; empty where all is well.
    """

    name: str
    ok: bool
    essential: bool
    found: str
    advice: str = ""


def examine() -> tuple[Check, ...]:
    """Look at everything: python, packages, processor, C++ compiler, cache folders, threads."""
    return (
        _python(),
        *(_package(name, module, essential, purpose) for name, module, essential, purpose in _PACKAGES),
        _processor(),
        _compiler(),
        _cache(),
        _kernel_cache(),
        _threads(),
    )


def healthy(checks: Iterable[Check]) -> bool:
    """Whether nothing essential is missing."""
    return all(check.ok for check in checks if check.essential)


_PACKAGES = (
    ("torch", "torch", True, "everything"),
    ("apache-tvm", "tvm", True, "compiled sparse kernels"),
    ("onnx", "onnx", False, "sift export --runtime onnx"),
    ("onnxscript", "onnxscript", False, "sift export --runtime onnx"),
    ("onnxruntime", "onnxruntime", False, "running exported ONNX models"),
    ("scikit-learn", "sklearn", False, "sift demo"),
    ("matplotlib", "matplotlib", False, "sift demo"),
)
"""Distribution, module, whether it is essential, and what it is for."""


def _python() -> Check:
    version = platform.python_version()
    wanted = importlib.metadata.metadata(_PACKAGE)["Requires-Python"] or ""
    ok = Requirement(f"python{wanted}").specifier.contains(version, prereleases=True)
    advice = "" if ok else f"Install Python {wanted}."
    return Check("python", ok, True, f"{version} ({sys.executable})", advice)


def _package(name: str, module: str, essential: bool, purpose: str) -> Check:
    wanted = _requirement(name)
    install = f'pip install "{wanted.name}{wanted.specifier}"'
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(module)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, essential, "not installed", f"Needed for {purpose}: {install}")
    except Exception as error:  # a broken native library raises anything from OSError to RuntimeError
        return Check(
            name,
            False,
            essential,
            f"cannot be imported: {type(error).__name__}: {error}",
            f"{install} --force-reinstall",
        )
    if not wanted.specifier.contains(version, prereleases=True):
        return Check(name, False, essential, version, f"{purpose} needs {wanted.specifier}: {install}")
    return Check(name, True, essential, version)


def _requirement(name: str) -> Requirement:
    """What this package asks of the distribution ``name``."""
    for line in importlib.metadata.requires(_PACKAGE) or ():
        requirement = Requirement(line)
        if requirement.name == name:
            return requirement
    return Requirement(name)


def _processor() -> Check:
    flags = _cpu_flags()
    known = [flag for flag in _CPU_FLAGS if flag in flags]
    found = (
        f"{platform.machine()}, {os.cpu_count()} logical cores, {', '.join(known) or 'no vector extension known here'}"
    )
    wide = bool({"avx2", "avx512f", "asimd"} & flags)
    advice = "" if wide else "Without AVX2, AVX-512 or NEON the sparse kernels run, but slowly."
    return Check("processor", wide, False, found, advice)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {"asimd"} if platform.machine() in ("arm64", "aarch64") else set()
    lines = [line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return set(lines[0].split()) if lines else set()


def _compiler() -> Check:
    """The compiler that torch's inductor calls: ``$CXX``, otherwise g++. It has to compile a small program."""
    name = os.environ.get("CXX") or "g++"
    advice = (
        "Without it the dense part of a compiled model runs in eager mode, and sift export --runtime tvm fails. Debian, Ubuntu: "
        "apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install. Another compiler: export CXX=clang++."
    )
    if shutil.which(name) is None:
        return Check("C++ compiler", False, False, f"{name} not found", advice)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _call(name, "-x", "c++", "-", "-o", str(Path(folder) / "program"), text=_PROGRAM)
        version = _call(name, "--version").splitlines()[0]
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        return Check("C++ compiler", False, False, f"{name} fails: {told.strip().splitlines()[-1]}", advice)
    return Check("C++ compiler", True, False, version)


def _call(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=60).stdout


def _cache() -> Check:
    """Where torch's inductor keeps what it compiled."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default_cache())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "Name a folder you may write to: export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor"
        return Check("cache folder", False, True, str(error), advice)
    return Check("cache folder", True, True, str(folder))


def _default_cache() -> str:
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:
        return tempfile.gettempdir()
    return default_cache_dir()


def _kernel_cache() -> Check:
    """Where compiled sparse kernels are kept; without it every process compiles its own."""
    try:
        from sift_compiler.runtimes.cache import contents, default_folder

        folder = default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (ImportError, OSError, UserError) as error:
        advice = "Every process compiles its kernels anew. Name a folder you may write to: export SIFT_CACHE_DIR=…"
        return Check("kernel cache", False, False, str(error), advice)
    held = contents(folder)
    return Check("kernel cache", True, False, f"{folder}: {held.kernels} kernels, {held.bytes / 1e6:.1f} MB")


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    setting = os.environ.get("OMP_NUM_THREADS")
    try:
        import torch

        threads = torch.get_num_threads()
    except Exception:  # torch has a line of its own
        return Check("threads", False, False, f"unknown; {cores} cores may be used", "Install torch first.")
    found = f"{threads} of {cores} usable cores, OMP_NUM_THREADS {'is not set' if setting is None else f'= {setting}'}"
    advice = "" if threads <= cores else f"More threads than cores slow each other down: export OMP_NUM_THREADS={cores}"
    return Check("threads", threads <= cores, False, found, advice)
