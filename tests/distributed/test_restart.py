"""A process is killed in the middle of training; what torchrun starts anew ends where an undisturbed run ends, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sift_compiler as sift

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_distributed.py"
OPTIONS = ["--steps", "24", "--every", "4", "--delta-t", "2", "--batch", "32"]
PATIENCE = 240.0


def launch(folder, *more):
    """torchrun with two processes, its output in a file."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more, str(SCRIPT),
        "--checkpoint", str(folder / "run.pt2"), *OPTIONS,
    ]  # fmt: skip
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def workers_of(agent):
    """Process ids of the workers of torchrun, rank 0 first."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return sorted(int(child) for child in children if SCRIPT.name in Path(f"/proc/{child}/cmdline").read_text())


def wait_for(condition, agent, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert agent.poll() is None, f"torchrun ended before {what}"
        assert time.monotonic() < end, f"no {what} after {PATIENCE} s"
        time.sleep(0.02)


def finish(agent, folder):
    code = None
    try:
        code = agent.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for worker in workers_of(agent):  # the log then says where each of them waits
            os.kill(worker, signal.SIGABRT)
            time.sleep(1)
    finally:
        stop(agent)
    log = (folder / "log").read_text()
    assert code == 0, log
    return log


def stop(agent):
    """End torchrun and, through it, its workers."""
    if agent.poll() is None:
        agent.terminate()
        agent.wait(60)


def everything(folder):
    """What the last checkpoint holds, times left out."""
    checkpoint = sift.load_checkpoint(folder / "run.pt2")
    masks = {**checkpoint.masks, "updates": [{**each, "milliseconds": 0} for each in checkpoint.masks["updates"]]}
    return {
        "module": dict(checkpoint.module.state_dict()), "optimizer": checkpoint.optimizer, "masks": masks,
        "random": checkpoint.random, "extra": checkpoint.extra,
    }  # fmt: skip


def assert_same(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    else:
        assert one == other, where


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_a_killed_rank_changes_nothing_about_the_end(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    undisturbed = launch(calm)
    disturbed = launch(killed, "--max-restarts", "2")
    try:
        wait_for((killed / "run.pt2").exists, disturbed, "checkpoint")
        first = workers_of(disturbed)
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)  # the one that writes
        log, quiet = finish(disturbed, killed), finish(undisturbed, calm)
    finally:
        stop(undisturbed)
        stop(disturbed)
    assert "Signal 9 (SIGKILL)" in log or "exitcode: -9" in log, log
    resumed = [int(line.split()[-1]) for line in log.splitlines() if line.startswith("resumed at step")]
    assert len(resumed) == 1
    assert 4 <= resumed[0] < 24
    assert "resumed" not in quiet
    here, there = everything(killed), everything(calm)
    assert here["extra"]["step"] == 24
    assert len(here["masks"]["updates"]) == 9
    assert_same(here, there)
