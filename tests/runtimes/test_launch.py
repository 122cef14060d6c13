"""Parallel loops run on OpenMP's threads, as many as were asked for, and say so when they fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tvm.script import tirx as T

from sift_compiler.runtimes.tvm import build, kernels, launch
from sift_compiler.runtimes.tvm.target import host_cpu


def who_works(*, workers: int, name: str):
    """``y[i]`` is the number of the OpenMP thread that ran iteration i, plus one."""

    @T.prim_func
    def kernel(y: T.handle):
        T.func_attr({"global_symbol": name})
        Y = T.match_buffer(y, (workers,), "int32", align=4, offset_factor=1)  # noqa: N806
        for worker in T.parallel(workers):
            Y[worker] = T.call_extern("int32", "omp_get_thread_num") + 1

    return kernel


SCRIPT = """
import sys, torch
from tests.runtimes.test_launch import who_works
from sift_compiler.runtimes.tvm import build
from sift_compiler.runtimes.tvm.target import ensure_pool, host_cpu
torch.set_num_threads(int(sys.argv[1]))
ensure_pool(int(sys.argv[2]))
y = torch.zeros(12, dtype=torch.int32)
for _ in range(3):
    build.compiled(who_works, host_cpu().name, workers=12)(y)
    torch.randn(1_000_000).relu_()
print(y.tolist())
"""


@pytest.mark.skipif(not launch.has_openmp(), reason="no OpenMP runtime with GCC's interface")
@pytest.mark.parametrize(("usual", "asked", "expected"), [(3, 1, 3), (2, 2, 2), (1, 4, 4), (1, 1, 1)])
def test_threads_are_those_of_openmp_and_as_many_as_were_asked_for(usual, asked, expected, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(usual), str(asked)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    share = -(-12 // expected)
    assert eval(made.stdout) == [i // share + 1 for i in range(12)]


def test_what_cannot_be_redirected_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_compiled", {})
    cpu = host_cpu().name
    build.compiled(kernels.gather, cpu, parallel=False)
    (library,) = tmp_path.glob("*.so")
    assert not launch.redirect(library), "it has no parallel loop"
    monkeypatch.setattr(launch, "_launcher", lambda: None)
    y = torch.zeros(12, dtype=torch.int32)
    build.compiled(who_works, cpu, workers=12)(y)
    assert y.tolist() == [1] * 12, "no thread of OpenMP but the first, which TVM's own count as"


def test_without_a_compiler_there_is_no_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    assert launch._launcher.__wrapped__() is None


def test_what_a_parallel_loop_raises_is_raised():
    kernel = build.compiled(who_works, host_cpu().name, workers=7)
    with pytest.raises(Exception, match="shape"):
        kernel(torch.zeros(3, dtype=torch.int32))
    y = torch.zeros(7, dtype=torch.int32)
    kernel(y)
    assert (y > 0).all()
