"""Engines that ``sift bench`` compares with: each a process that runs once when asked."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from sift_compiler.errors import UserError, unknown_name

PEERS = ("onnxruntime", "openvino", "deepsparse")
"""Engines in a process of their own, see peer_worker."""
_WORKER = Path(__file__).with_name("peer_worker.py")
_OPSET = 13
"""The newest that every engine reads."""


@dataclass(frozen=True)
class Peer:
    """A running engine.

    Attributes:
        name: of the engine.
        version: of the engine.
        output: what it computed for the inputs.
        run: computes once and returns the milliseconds that took, of wall time and of processor time of all threads.
    """

    name: str
    version: str
    output: Tensor
    run: Callable[[], tuple[float, float]]


def peer_pythons(given: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH`` as a map of engines to the Python that has them.

    Raises:
        UserError: another form, an unknown engine or no such file.
    """
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--peer-python {text!r} is not understood. Give NAME=PATH: deepsparse=venv/bin/python.")
        if name not in PEERS:
            raise unknown_name("engine of --peer-python", name, PEERS)
        if not Path(path).is_file():
            raise UserError(f"--peer-python {text}: there is no file {path}.")
        found[name] = path
    return found


def write_onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write ``model`` as plain ONNX with dense initializers, zeros included: what engines that look for zeros read."""
    with torch.no_grad(), warnings.catch_warnings():
        # The older exporter: DeepSparse does not read what the newer one writes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(model, inputs, str(path), dynamo=False, opset_version=_OPSET)


@contextlib.contextmanager
def started(name: str, python: str | None, model: Path, inputs: tuple[Tensor, ...], threads: int) -> Iterator[Peer]:
    """A process with the engine ``name`` and ``model`` in it.

    Raises:
        UserError: the engine is missing or cannot run the model.
    """
    python = python or sys.executable
    given, output = model.with_name(f"{name}-inputs.npz"), model.with_name(f"{name}-output.npy")
    np.savez(given, **{f"x{position:03d}": tensor.numpy() for position, tensor in enumerate(inputs)})  # type: ignore[arg-type]
    command = [python, str(_WORKER), name, str(model), str(given), str(threads), str(output)]
    with (
        (model.with_name(f"{name}.log")).open("w+") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            began = _answer(process.stdout, log)
            if "ready" not in began:
                raise UserError(
                    f"{name} cannot be measured: {began['failed']}. It was started with {python}; another Python that has it: "
                    f"--peer-python {name}=PATH."
                )

            def run() -> tuple[float, float]:
                """Milliseconds of one run, wall and processor time."""
                assert process.stdin is not None
                _signal(process, "SIGCONT")
                process.stdin.write("run\n")
                process.stdin.flush()
                said = _answer(process.stdout, log)
                if "wall" not in said:
                    raise UserError(f"{name} stopped while it was measured: {said['failed']}.")
                _signal(process, "SIGSTOP")
                return float(said["wall"]), float(said["processor"])

            _signal(process, "SIGSTOP")
            yield Peer(name, began["ready"], torch.from_numpy(np.load(output)), run)
        finally:
            process.kill()


def _signal(process: subprocess.Popen[str], name: str) -> None:
    """Stop or continue an engine, where the system can: idle threads that spin would slow down the engine whose turn it is."""
    if hasattr(signal, name):
        process.send_signal(getattr(signal, name))


def _answer(channel: IO[str] | None, log: IO[str]) -> dict[str, Any]:
    assert channel is not None
    line = channel.readline()
    if not line:
        log.seek(0)
        lines = log.read().strip().splitlines()
        return {"failed": f"its process ended ({lines[-1] if lines else 'without a word'})"}
    answer: dict[str, Any] = json.loads(line)
    return answer
