"""Export to a TVM shared library: loaded in a process without torch, it equals eager."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sift_compiler import nn as sift_nn
from sift_compiler.errors import RuntimeBuildError, UnsupportedError, UserError
from sift_compiler.runtimes.tvm.export import export_tvm
from tests.runtimes.emulation import TRIPLE, missing

RUN = """
import sys
sys.modules["torch"] = None  # importing torch is an error from here on
import numpy as np
import tvm
from tvm import relax
machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
output = machine["main"](tvm.runtime.tensor(np.load(sys.argv[2])))[0].numpy()
np.save(sys.argv[3], output)
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Sequential(
            sift_nn.SparseConv2d(16, 19, 3, 2, 1, sparsity=0.5, bias=False), nn.BatchNorm2d(19), nn.ReLU()
        )
        self.branch = sift_nn.SparseConv2d(16, 19, 1, 2, sparsity=0.75)
        self.empty = sift_nn.SparseLinear(19, 20, sparsity=1.0)
        self.hidden = sift_nn.SparseLinear(19, 20, sparsity=0.5)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = (self.body(x) + self.branch(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x) + self.empty(x)))


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not trivial
            model(torch.randn(8, 1, 9, 11))
    return model.eval()


@pytest.mark.parametrize("batch", [1, 16, 18])
def test_a_library_runs_without_torch_and_equals_eager(batch, tmp_path):
    model, x = network(), torch.randn(batch, 1, 9, 11)
    library = export_tvm(model, (x,), tmp_path / "model.so")
    np.save(tmp_path / "x.npy", x.numpy())
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.double()(x.double()).numpy()
    error = np.abs(np.load(tmp_path / "y.npy") - expected).max() / np.abs(expected).max()
    assert error <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.so", "x.npy", "y.npy"]


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    model, x = network(), torch.randn(2, 1, 9, 11)
    with pytest.raises(UserError, match=r"Known: host.*aarch64-linux-gnu"):
        export_tvm(model, (x,), tmp_path / "model.so", target="abacus")
    with pytest.raises(UserError, match="does not exist"):
        export_tvm(model, (x,), tmp_path / "nowhere" / "model.so")
    with pytest.raises(UnsupportedError, match="float32"):
        export_tvm(network().double(), (x.double(),), tmp_path / "model.so")

    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(UnsupportedError, match="cannot import"):
        export_tvm(Odd(), (x,), tmp_path / "model.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(missing() is not None, reason=f"no cross compiler: {missing()}")
@pytest.mark.parametrize("batch", [1, 5])
def test_a_library_for_another_platform_holds_its_code(batch, tmp_path):
    library = export_tvm(network(), (torch.randn(batch, 1, 9, 11),), tmp_path / "model.so", target=TRIPLE)
    head = library.read_bytes()[:20]
    assert head[:4] == b"\x7fELF"
    assert int.from_bytes(head[18:20], "little") == 183  # EM_AARCH64
    listed = subprocess.run([f"{TRIPLE}-nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert "sift_sparse_tile" in listed
    assert [path.name for path in tmp_path.iterdir()] == ["model.so"]


def test_a_missing_cross_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt install g\\+\\+-aarch64-linux-gnu"):
        export_tvm(network(), (torch.randn(1, 1, 9, 11),), tmp_path / "model.so", target=TRIPLE)
    assert not list(tmp_path.iterdir())


def test_a_failing_linker_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.so"
    path.write_bytes(b"before")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeBuildError, match="C\\+\\+ compiler"):
        export_tvm(nn.Sequential(nn.ReLU()), (torch.randn(2, 3),), path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.so"]
