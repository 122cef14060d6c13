"""Time of the first call of a compiled Sparse Wide ResNet-18, cold and warm, part by part; prints JSON.

    python benchmarks/compile_time.py --sparsity 0.9 --batch 16 --threads 2

Cold: a fresh process with an empty kernel cache and an empty inductor cache. Warm: the next fresh process. ``compile`` is the first call
less a steady one, the median of three; ``imports`` (of torch, inductor, TVM) and ``load`` (reading the archive) come before it and are
not part of it. Seconds of wall time, and of processor time of the process with the children that have ended. Of ``compile``:

- ahead: making kernels ready, in as many threads as are given; of that, summed over threads and in wall time only,
  kernels: TIR, LLVM and linking, or reading the cache (``compiled`` counts those that were compiled), and packing: the programs of the masks;
- graph: finding sparse layers and fusing what follows them;
- inductor: everything inductor does with the rest of the graph, or finding that it is not worth it;
- dynamo: what is left: the trace, guards, plans and tables of layers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SIZE = 224
_STEADY = 3
_PARTS = ("ahead", "graph", "inductor")
_IN_THREADS = ("kernels", "compiled", "packing")

Seconds = dict[str, float]


def _now() -> Seconds:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": time.perf_counter(), "processor": time.process_time() + children.ru_utime + children.ru_stime}


def _since(begin: Seconds) -> Seconds:
    now = _now()
    return {clock: now[clock] - begin[clock] for clock in now}


class Stopwatch:
    """Seconds spent inside wrapped functions, those of others inside them in the same thread left out."""

    def __init__(self) -> None:
        self.spent: dict[str, Seconds] = {}
        self.calls: Counter[str] = Counter()
        self._local = threading.local()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted as ``part``."""

        def call(*args: Any, **keywords: Any) -> Any:
            inner = {"wall": 0.0, "processor": 0.0}
            inside: list[Seconds] = self._local.__dict__.setdefault("inside", [])
            inside.append(inner)
            begin = _now()
            try:
                return function(*args, **keywords)
            finally:
                taken = _since(begin)
                inside.pop()
                total = self.spent.setdefault(part, {"wall": 0.0, "processor": 0.0})
                for clock, seconds in taken.items():
                    total[clock] += seconds - inner[clock]
                    if inside:
                        inside[-1][clock] += seconds
                self.calls[part] += 1

        return call


@contextlib.contextmanager
def _watched(watch: Stopwatch) -> Iterator[Callable[..., Any]]:
    """Inside, the parts of a compilation are timed. Yields the backend."""
    from sift_compiler import dynamo
    from sift_compiler.runtimes.tvm import build
    from sift_compiler.runtimes.tvm.mask_packer import MaskPacker

    with (
        mock.patch.object(build, "_from_disk", watch.timed("kernels", build._from_disk)),
        mock.patch.object(build, "compile_anew", watch.timed("compiled", build.compile_anew)),
        mock.patch.object(MaskPacker, "pack", watch.timed("packing", MaskPacker.pack)),
        mock.patch.object(dynamo, "prepare_ahead", watch.timed("ahead", dynamo.prepare_ahead)),
        mock.patch.object(dynamo, "_compile_rest", watch.timed("inductor", dynamo._compile_rest)),
    ):
        yield watch.timed("graph", dynamo.sift)


def measure(path: Path, batch: int, threads: int) -> dict[str, Any]:
    """The first call in this process, see the module's text."""
    begin = _now()
    import torch
    import torch._inductor.compile_fx
    import tvm

    import sift_compiler as sift

    imports = _since(begin)
    torch.set_num_threads(threads)
    begin = _now()
    model, x, watch = sift.load(path).eval(), torch.randn(batch, 3, SIZE, SIZE), Stopwatch()
    load = _since(begin)
    with torch.no_grad(), _watched(watch) as backend:
        run = torch.compile(model, backend=backend, dynamic=False, options={"threads": threads})
        begin = _now()
        run(x)
        first = _since(begin)
    with torch.no_grad():
        calls = []
        for _ in range(_STEADY):
            begin = _now()
            run(x)
            calls.append(_since(begin))
    steady = {clock: statistics.median(call[clock] for call in calls) for clock in first}
    made = watch.calls["compiled"]
    none = {"wall": 0.0, "processor": 0.0}
    parts = {part: watch.spent.get(part, none) for part in _PARTS}
    threaded = {part: watch.spent.get(part, none)["wall"] for part in _IN_THREADS}
    threaded["kernels"] += threaded.pop("compiled")
    whole = {clock: first[clock] - steady[clock] for clock in first}
    parts["dynamo"] = {clock: seconds - sum(each[clock] for each in parts.values()) for clock, seconds in whole.items()}
    times = {"compile": whole, **parts, "steady_call": steady, "imports": imports, "load": load}
    return {
        "compiled": made, "kernels": watch.calls["kernels"], "tvm": tvm.__version__,
        "seconds": {name: {clock: round(value, 3) for clock, value in each.items()} for name, each in times.items()},
        "seconds_of_threads": {name: round(value, 3) for name, value in threaded.items()},
    }  # fmt: skip


def _in_fresh_process(archive: Path, caches: Path, batch: int, threads: int) -> dict[str, Any]:
    places = {"SIFT_CACHE_DIR": str(caches / "kernels"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    command = [sys.executable, __file__, "--worker", str(archive), "--batch", str(batch), "--threads", str(threads)]
    before = os.getloadavg()[0]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | places).stdout
    return {"load_average_before": round(before, 1), **json.loads(said)}


def compare(sparsity: float, batch: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Cold and warm, ``repeats`` times."""
    from inference import network

    import sift_compiler as sift

    results = []
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "model.pt2"
        sift.save(network(sparsity), archive)
        for turn in range(repeats):
            caches = Path(folder) / str(turn)
            results += [
                {"start": start, **_in_fresh_process(archive, caches, batch, threads)} for start in ("cold", "warm")
            ]
    return results


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="pairs of a cold and a warm process")
    parser.add_argument(
        "--worker", type=Path, metavar="ARCHIVE", help="measure in this process, with the caches there are"
    )
    chosen = parser.parse_args()
    if chosen.worker:
        json.dump(measure(chosen.worker, chosen.batch, chosen.threads), sys.stdout)
        return
    from sift_compiler.demo.machine import this_machine

    results = compare(chosen.sparsity, chosen.batch, chosen.threads, chosen.repeats)
    settings = {"sparsity": chosen.sparsity, "batch": chosen.batch, "threads": chosen.threads}
    json.dump({"machine": dataclasses.asdict(this_machine()), **settings, "starts": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
