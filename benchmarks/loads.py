"""What a load costs beside multiply-adds on this processor; prints JSON. x86-64 with AVX-512 and a C++ compiler.

    python benchmarks/loads.py [--rounds 5]

A loop of twenty multiply-adds of 16 float32 numbers, of which some load an operand: a whole vector of 64 bytes from a buffer of the
given size, or one number that is broadcast. GFLOP/s of one thread, the best of the rounds, in processor time. ``cost_of_a_load`` is the time that a load
adds, in multiply-adds, where every one loads from the smallest buffer. The sparse kernels are limited by it, see docs/performance.md.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sift_compiler.demo.machine import this_machine

_SUMS = 20
_LOADS = (0, 5, 10, 15, 20)
_KIBIBYTES = (4, 16, 32, 64, 512)
_TURNS = 3_000_000
_WHOLE, _BROADCAST = "whole vectors", "broadcasts"


def _loop(name: str, loads: int, kind: str) -> str:
    lines, bytes_each = [], 64 if kind == _WHOLE else 4
    operand = "{}(%0)" if kind == _WHOLE else "{}(%0)%{{1to16%}}"
    done = 0
    for i in range(_SUMS):
        loaded = (i + 1) * loads // _SUMS > i * loads // _SUMS
        source = operand.format(bytes_each * done) if loaded else "%%zmm30"
        done += loaded
        lines.append(f'"vfmadd231ps {source}, %%zmm31, %%zmm{i}\\n"')
    clobbered = ", ".join(f'"xmm{i}"' for i in range(_SUMS))
    return f"""extern "C" void {name}(const char *buffer, long bytes, long turns) {{
  asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\\n vpxord %%zmm31, %%zmm31, %%zmm31" ::: "xmm30", "xmm31");
  for (long done = 0; done < turns;)
    for (long at = 0; at + {max(1, bytes_each * loads)} <= bytes && done < turns; at += {max(1, bytes_each * loads)}, done++)
      asm volatile({" ".join(lines)} :: "r"(buffer + at) : {clobbered});
}}
"""


def main() -> None:
    """Parse, compile, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        parser.error("this processor has no AVX-512, for which the loops are written.")
    loops = {f"loop_{kind[0]}{loads}": (loads, kind) for kind in (_WHOLE, _BROADCAST) for loads in _LOADS}
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loops.cpp"), Path(folder, "loops.so")
        source.write_text("".join(_loop(name, *loop) for name, loop in loops.items()))
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-O1", "-mavx512f", "-shared", "-fPIC", "-o", library, source], check=True)
        code = ctypes.CDLL(str(library))
    memory = ctypes.create_string_buffer(max(_KIBIBYTES) * 1024 + 64)
    begin = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, (loads, kind) in loops.items():
        for size in _KIBIBYTES:
            best = float("inf")
            for _ in range(rounds):
                started = time.thread_time()
                getattr(code, name)(ctypes.c_void_p(begin), ctypes.c_long(size * 1024), ctypes.c_long(_TURNS))
                best = min(best, time.thread_time() - started)
            share = f"{loads / _SUMS:.2f} loads per multiply-add"
            rate = round(2 * 16 * _SUMS * _TURNS / best / 1e9, 1)
            rates.setdefault(kind, {}).setdefault(share, {})[f"{size} KiB"] = rate
    smallest = f"{_KIBIBYTES[0]} KiB"
    costs = {}
    for kind, by_share in rates.items():
        least, most = (list(by_share.values())[at][smallest] for at in (0, -1))
        costs[kind] = round(least / most - 1, 2)
    json.dump(
        {"machine": dataclasses.asdict(this_machine()), "gflops": rates, "cost_of_a_load": costs}, sys.stdout, indent=2
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
