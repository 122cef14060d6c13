"""Memory that a compiled Sparse Wide ResNet-18 holds, beside ONNX Runtime on the same model run dense; prints JSON.

    python benchmarks/memory.py --sparsity 0.9 --batch 16 --threads 2

Each engine runs in a fresh process: it imports what it needs, makes the input and a place for the output, then reads the model from its
file, compiles it and calls it three times. ``held`` is how much the resident set has grown since the imports, weights and programs
included; ``peak`` the most it grew, while the file was read or the model compiled. Both engines get the weights of the same network (see
inference.py): ours as an archive of ``sift.save``, ONNX Runtime's as ONNX with dense weights. Kernels come from the cache: ours runs
twice, and the second process counts. Linux only: the figures are those of /proc/self.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inference import network

import sift_compiler as sift
from sift_compiler.commands.bench import dense_twin
from sift_compiler.commands.peer_worker import onnxruntime
from sift_compiler.commands.peers import write_onnx
from sift_compiler.demo.machine import this_machine

CALLS = 3
SIZE = 224
_MEGABYTE = 1e6

Run = Callable[[], Any]


def _resident() -> dict[str, float]:
    """Megabytes of this process: resident, of that without a file behind it, and the most that was resident since the last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    fields = {"held": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(status[field].split()[0]) * 1024 / _MEGABYTE for name, field in fields.items()}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _sift(path: Path, x: torch.Tensor, threads: int) -> Callable[[], tuple[Run, list[Any]]]:
    """Import what compiling needs; the function returned reads and compiles, and names what must stay alive."""
    import torch._inductor.compile_fx
    import tvm

    def start() -> tuple[Run, list[Any]]:
        model = sift.load(path).eval()
        run = torch.compile(model, backend="sift", dynamic=False, options={"threads": threads})
        return lambda: run(x), [model, run, tvm]

    return start


def _onnxruntime(path: Path, x: torch.Tensor, threads: int) -> Callable[[], tuple[Run, list[Any]]]:
    import onnxruntime as engine

    array = x.numpy()

    def start() -> tuple[Run, list[Any]]:
        run = onnxruntime(str(path), [array], threads)
        return run, [run, engine]

    return start


ENGINES = {"sift": _sift, "onnxruntime": _onnxruntime}


@torch.no_grad()
def measure(engine: str, path: Path, batch: int, threads: int) -> dict[str, float]:
    """Growth of this process in megabytes, see the module's text."""
    torch.set_num_threads(threads)
    x = torch.randn(batch, 3, SIZE, SIZE)
    y = torch.zeros(batch, 1000)
    start = ENGINES[engine](path, x, threads)
    gc.collect()
    _forget_peak()
    before = _resident()
    run, alive = start()
    for _ in range(CALLS):
        y.copy_(torch.as_tensor(run()))
    gc.collect()
    after = _resident()
    if not bool(y.isfinite().all()) or not alive:
        raise SystemExit(f"{engine} computed no numbers.")
    return {name: after[name] - before[name] for name in after}


def _in_fresh_process(engine: str, path: Path, batch: int, threads: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--worker",
        engine,
        str(path),
        "--batch",
        str(batch),
        "--threads",
        str(threads),
    ]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, float] = json.loads(said)
    return result


def compare(sparsity: float, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    """Both engines in ``repeats`` fresh processes each, medians."""
    with tempfile.TemporaryDirectory() as folder:
        archive, plain = Path(folder) / "model.pt2", Path(folder) / "model.onnx"
        model = network(sparsity)
        parameters = sum(each.numel() for each in model.parameters())
        sift.save(model, archive)
        write_onnx(dense_twin(model), (torch.zeros(batch, 3, SIZE, SIZE),), plain)
        del model
        _in_fresh_process("sift", archive, batch, threads)  # fills the kernel cache
        runs = {
            engine: [_in_fresh_process(engine, path, batch, threads) for _ in range(repeats)]
            for engine, path in (("sift", archive), ("onnxruntime", plain))
        }
        files = {"sift": archive.stat().st_size / _MEGABYTE, "onnxruntime": plain.stat().st_size / _MEGABYTE}
    megabytes = {
        engine: {name: round(statistics.median(each[name] for each in made), 1) for name in made[0]}
        | {"file": round(files[engine], 1)}
        for engine, made in runs.items()
    }
    ratios = {
        name: round(megabytes["onnxruntime"][name] / megabytes["sift"][name], 2)
        for name in ("held", "anonymous", "peak")
    }
    return {
        "sparsity": sparsity, "batch": batch, "threads": threads, "processes": repeats, "parameters": parameters,
        "megabytes": megabytes, "onnxruntime_times_sift": ratios,
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each engine")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "MODEL"), help="measure one engine in this process")
    chosen = parser.parse_args()
    if chosen.worker:
        engine, path = chosen.worker
        json.dump(measure(engine, Path(path), chosen.batch, chosen.threads), sys.stdout)
        return
    result = compare(chosen.sparsity, chosen.batch, chosen.threads, chosen.repeats)
    json.dump({"machine": dataclasses.asdict(this_machine()), **result}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
