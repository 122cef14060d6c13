"""What masks that move cost: time of an update and of what watches every step, and memory of training.

    python benchmarks/masks.py [--method RigL] [--sparsity 0.9] [--batch 32] [--cycles 4] [--delta-t 100] [--no-time] [--no-memory]

The network is ResNet-18 for 32 × 32 inputs and its sparse-wide transformation of equal FLOPs.

``time``: training steps (forward, cross entropy, backward, SGD with momentum) of the sparse network under torch.compile with backend
"sift", one thread. Every third step is an update step, so there are three kinds: update steps, the steps that follow (their kernels take
up the new masks) and ordinary ones. Stop watches in the optimizer's hooks enclose the scheduler's. Reported are medians, and shares of an
ordinary step, an update every ``--delta-t`` steps: ``share_of_step`` is the sum of ``per_step`` (hooks of ordinary steps), ``update``
(choosing and moving in the hooks, keeping entries of dense gradients inside the backward pass) and ``repack`` (kernels);
``dense_gradient`` stands for itself: what backward takes longer on update steps. Methods that move masks without kernels' help and those
that watch every step are measured in the same way. Times are the processor time of the thread.

``memory``: all tensors that live after two training steps with mask updates, in bytes, by what they are; and those of the dense
ancestor. ``training_state_over_dense`` has all of it. Kernels' programs, which only compiled training has, are listed apart
(``programs``, with ``time``).

Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sift_compiler as sift
from sift_compiler.ir.mask_structure import Structure
from sift_compiler.masking import methods
from sift_compiler.masking.straight_through import SRSTE, TopKAST
from sift_compiler.nn import SparseLayer, live

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from models import resnet18_cifar

NEEDS: dict[str, dict[str, Any]] = {"GMP": {"final_sparsity": 0.95}, "GraNet": {"final_sparsity": 0.95}}
STRUCTURES: dict[str, Structure] = {"SRigL": sift.ConstantFanIn(), "BAME": sift.NM(2, 16)}
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def sparse_wide(method: str, sparsity: float) -> nn.Module:
    """The sparse network, with the structure and the storage that ``method`` needs."""
    structure = STRUCTURES.get(method, sift.Unstructured())
    round_to = 16 if method == "BAME" else 8
    wide = sift.SparseWide(sparsity=sparsity, structure=structure, round_to=round_to)
    model = sift.rewrite(resnet18_cifar(10), (torch.randn(2, 3, 32, 32),), wide)
    return sift.dense_storage(model) if issubclass(methods.METHODS[method], SRSTE | TopKAST) else model


def moving(method: str, delta_t: int, end_step: int) -> Any:
    """The method with updates at 0, delta_t, … until end_step."""
    kind = methods.METHODS[method]
    when = {} if method == "Static" else {"delta_t": delta_t, "end_step": end_step}
    return kind(**when, **NEEDS.get(method, {}))


def train_step(call: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    """One step; gradients stay until the next."""
    optimizer.zero_grad()
    F.cross_entropy(call(batch[0]), batch[1]).backward()
    optimizer.step()


def random_batch(size: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


# --- time -----------------------------------------------------------------------------------------------------------


class Watch:
    """A stop watch: seconds of this thread between start and stop, added up until :meth:`take`."""

    def __init__(self) -> None:
        self.spent, self._began = 0.0, 0.0

    def start(self, *_: object) -> None:
        self._began = time.thread_time()

    def stop(self, *_: object) -> None:
        self.spent += time.thread_time() - self._began

    def take(self) -> float:
        spent, self.spent = self.spent, 0.0
        return spent

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.start()
            try:
                return function(*arguments)
            finally:
                self.stop()

        return watched


def measure_time(method: str, sparsity: float, batch: int, cycles: int, delta_t: int) -> dict[str, Any]:
    """Medians over cycles of an update step, the step that follows, and an ordinary step; the first cycle warms up."""
    torch.manual_seed(0)
    model = sparse_wide(method, sparsity)
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    hooks, kept, backward = Watch(), Watch(), Watch()
    optimizer.register_step_pre_hook(hooks.start)
    optimizer.register_step_post_hook(hooks.start)
    masks = sift.schedule(model, optimizer, moving(method, 3, 3 * cycles + 4))
    masks._reduced = kept.around(masks._reduced)  # type: ignore[method-assign]
    optimizer.register_step_pre_hook(hooks.stop)
    optimizer.register_step_post_hook(hooks.stop)
    compiled = torch.compile(model, backend="sift", dynamic=False, options={"threads": 1})
    data = random_batch(batch)
    before, began = set(live._kernels), time.thread_time()
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for step in range(3 * cycles + 3):
        begin = time.thread_time()
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(data[0]), data[1])
        backward.start()
        loss.backward()
        backward.stop()
        optimizer.step()
        row = {"step": time.thread_time() - begin, "hooks": hooks.take(), "kept": kept.take()} | {
            "backward": backward.take()
        }
        if step >= 3:
            rows[("update", "following", "ordinary")[step % 3]].append(row)
        elif step == 0:
            first = time.thread_time() - began
    result = _shares(rows, delta_t) | {"first_step_with_compilation_ms": round(first * 1e3)}
    compiled_kernels = [live._kernels[handle] for handle in set(live._kernels) - before]
    weights = sum(layer.pattern.nnz for layer in _layers(model))
    return result | {"programs": _programs(compiled_kernels, weights), "updates_seen": len(masks.updates)}


def _shares(rows: dict[str, list[dict[str, float]]], delta_t: int) -> dict[str, Any]:
    middle = {
        kind: {key: statistics.median(row[key] for row in of_kind) for key in of_kind[0]}
        for kind, of_kind in rows.items()
    }
    update, following, ordinary = middle["update"], middle["following"], middle["ordinary"]
    step = ordinary["step"]
    dense = update["backward"] - update["kept"] - ordinary["backward"]
    costs = {
        "per_step": ordinary["hooks"],
        "update": (update["hooks"] + update["kept"] - ordinary["hooks"]) / delta_t,
        "repack": max(0.0, following["step"] - step) / delta_t,
    }
    return {
        "delta_t": delta_t,
        "milliseconds": {
            "ordinary_step": round(step * 1e3, 2),
            "update_step": round(update["step"] * 1e3, 2),
            "following_step": round(following["step"] * 1e3, 2),
            "hooks_of_an_ordinary_step": round(ordinary["hooks"] * 1e3, 3),
            "update_in_hooks": round(update["hooks"] * 1e3, 2),
            "update_in_backward": round(update["kept"] * 1e3, 2),
            "dense_gradient": round(dense * 1e3, 2),
        },
        "percent_of_step": {name: round(100 * cost / step, 4) for name, cost in costs.items()}
        | {
            "share_of_step": round(100 * sum(costs.values()) / step, 3),
            "dense_gradient": round(100 * dense / delta_t / step, 3),
        },
    }


# --- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(method: str, sparsity: float, optimizer: str, batch: int = 2) -> dict[str, Any]:
    """Bytes of all tensors that live after two steps, by kind; and over those of the dense ancestor."""
    dense, _ = _trained(lambda: resnet18_cifar(10), None, optimizer, batch)
    sparse, weights = _trained(lambda: sparse_wide(method, sparsity), moving(method, 1, 2), optimizer, batch)
    return {
        "dense": dense,
        "sparse": sparse,
        "training_state_over_dense": round(sum(sparse.values()) / sum(dense.values()), 4),
        "bytes_per_kept_weight": {kind: round(size / weights, 3) for kind, size in sparse.items()},
    }


def _trained(make: Callable[[], nn.Module], method: Any, optimizer_name: str, batch: int) -> tuple[dict[str, int], int]:
    gc.collect()
    others = {id(each) for each in _tensors()}
    torch.manual_seed(0)
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    masks = None if method is None else sift.schedule(model, optimizer, method)
    for _ in range(2):
        train_step(model, optimizer, random_batch(batch))
    gc.collect()
    kinds = _kinds(model, optimizer, masks)
    sizes = dict.fromkeys((*KINDS, "everything else"), 0)
    seen: set[int] = set()
    for tensor in _tensors():
        storage = tensor.untyped_storage()
        # Wrappers of the same memory count once. Those that lived before are not of this training.
        if storage.data_ptr() in seen or (id(tensor) in others and storage.data_ptr() not in kinds):
            continue
        seen.add(storage.data_ptr())
        sizes[kinds.get(storage.data_ptr(), "everything else")] += storage.nbytes()
    return sizes, sum(layer.pattern.nnz for layer in _layers(model))


KINDS = ("values and parameters", "gradients", "optimizer", "indices", "buffers", "memory of masks")


def _kinds(model: nn.Module, optimizer: torch.optim.Optimizer, masks: sift.MaskScheduler | None) -> dict[int, str]:
    """What the memory at an address is; tensors whose address is not here are something else."""
    memory = {} if masks is None else masks._memory
    indices = {id(layer.index) for layer in _layers(model)}
    by_kind = {
        "values and parameters": list(model.parameters()),
        "gradients": [each.grad for each in model.parameters() if each.grad is not None],
        "optimizer": [
            each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)
        ],
        "indices": [each for each in model.buffers() if id(each) in indices],
        "buffers": [each for each in model.buffers() if id(each) not in indices],
        "memory of masks": [each for kept in memory.values() for each in kept.values()],
    }
    return {each.untyped_storage().data_ptr(): kind for kind, tensors in by_kind.items() for each in tensors}


def _tensors() -> list[Tensor]:
    return [
        each
        for each in gc.get_objects()
        if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" and each.layout == torch.strided
    ]


def _layers(model: nn.Module) -> list[SparseLayer]:
    return [each for each in model.modules() if isinstance(each, SparseLayer)]


def _programs(kernels: list[Any], weights: int) -> dict[str, Any]:
    """Bytes of memory behind the arrays that compiled kernels hold, shared memory once; the layers' own tensors are not among them."""
    held: list[tuple[int, int]] = []
    seen: set[int] = set()
    queue: list[Any] = list(kernels)
    while queue:
        each = queue.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, np.ndarray):
            held.append((each.ctypes.data, each.ctypes.data + each.nbytes))
            queue.append(each.base)
        elif isinstance(each, Tensor):
            if not isinstance(each, nn.Parameter):
                storage = each.untyped_storage()
                held.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        elif isinstance(each, dict | list | tuple | set) or type(each).__module__.startswith("sift_compiler"):
            queue.extend(gc.get_referents(each))
    total = end = 0
    for first, last in sorted(held):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return {"kernels": len(kernels), "bytes": total, "bytes_per_kept_weight": round(total / max(1, weights), 3)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="RigL", choices=sorted(methods.METHODS))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cycles", type=int, default=4, help="of three steps each, after one that warms up")
    parser.add_argument("--delta-t", type=int, default=100, help="steps between two updates, for the shares")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    about = {"method": chosen.method, "sparsity": chosen.sparsity, "batch": chosen.batch, "clock": "thread"}
    result: dict[str, Any] = about | {"machine": platform.machine(), "torch": torch.__version__}
    if not chosen.no_memory:
        result["memory"] = {name: measure_memory(chosen.method, chosen.sparsity, name) for name in OPTIMIZERS}
    if not chosen.no_time:
        result["time"] = measure_time(chosen.method, chosen.sparsity, chosen.batch, chosen.cycles, chosen.delta_t)
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
