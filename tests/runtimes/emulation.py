"""Kernels for another processor, run under emulation: what `compiled` returns for it is a call of qemu."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sift_compiler.runtimes.tvm import build

TRIPLE = "aarch64-linux-gnu"
_COMPILER, _EMULATOR = f"{TRIPLE}-g++", "qemu-aarch64"
_SOURCE = Path(__file__).parent / "aarch64" / "run_kernel.cpp"
_LINE = 64


def missing() -> str | None:
    """What is not installed that emulation needs, None if nothing is."""
    for program, package in ((_COMPILER, "g++-aarch64-linux-gnu"), (_EMULATOR, "qemu-user")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian and Ubuntu: apt install {package})"
    return None


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.returncode}: {done.stdout}{done.stderr}")


class Emulation:
    """A folder with the program that runs kernels, and the kernels.

    Attributes:
        calls: generators of the kernels that ran, by name, and how often.
    """

    def __init__(self, folder: Path) -> None:
        import tvm_ffi

        self._folder, self._program = folder, folder / "run_kernel"
        self._libraries: dict[tuple[object, ...], tuple[Path, str]] = {}
        self.calls: dict[str, int] = {}
        include = Path(tvm_ffi.__file__).parent / "include"
        _run([_COMPILER, "-O1", "-Wall", "-I", include, "-o", self._program, _SOURCE, "-rdynamic", "-ldl"])

    def library(self, generator: Callable[..., Any], constants: dict[str, Any]) -> dict[str, Callable[..., None]]:
        """Stands for the library that a kernel is taken from."""
        key = (generator, *sorted(constants.items()))
        symbol = build._symbol(generator)
        if key not in self._libraries:
            stem = self._folder / f"{generator.__name__}-{len(self._libraries)}"
            module = build.compile_anew(generator, TRIPLE, **constants).mod
            module.write_to_file(f"{stem}.o", "o")
            _run([_COMPILER, "-shared", "-o", f"{stem}.so", f"{stem}.o", "-lm"])
            self._libraries[key] = Path(f"{stem}.so"), f"__tvm_ffi_{symbol}"
        made = self._libraries[key]

        def call(*arguments: Any) -> None:
            self.calls[generator.__name__] = self.calls.get(generator.__name__, 0) + 1
            self._call(*made, arguments)

        return {symbol: call}

    def _call(self, library: Path, symbol: str, arguments: tuple[Any, ...]) -> None:
        head, data, places = [struct.pack("<q", len(arguments))], [], {}
        at = -(-(8 + 48 * len(arguments)) // _LINE) * _LINE
        for which, one in enumerate(arguments):
            if isinstance(one, Tensor):
                assert one.dim() == 1
                assert one.is_contiguous()
                kind = 2 if one.is_floating_point() else 3
                head.append(struct.pack("<6q", kind, at, 8 * one.element_size(), one.numel(), 0, 0))
                places[which] = at
                written = one.detach().numpy().tobytes()
                data.append(written + bytes(-len(written) % _LINE))
                at += len(data[-1])
            elif isinstance(one, float):
                head.append(struct.pack("<4qdq", 1, 0, 0, 0, one, 0))
            else:
                head.append(struct.pack("<6q", 0, int(one), 0, 0, 0, 0))
        start = b"".join(head)
        file = self._folder / "arguments"
        file.write_bytes(start + bytes(-len(start) % _LINE) + b"".join(data))
        _run([_EMULATOR, "-L", f"/usr/{TRIPLE}", self._program, library, symbol, file])
        after = bytearray(file.read_bytes())
        for which, place in places.items():
            tensor = arguments[which]
            if tensor.numel():
                now = torch.frombuffer(after, dtype=tensor.dtype, count=tensor.numel(), offset=place)
                before = torch.frombuffer(bytearray(tensor.detach().numpy().tobytes()), dtype=tensor.dtype)
                if not torch.equal(now.view(torch.uint8), before.view(torch.uint8)):
                    tensor.data.copy_(now)
