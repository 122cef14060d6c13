"""What a user of ``sift demo`` can choose, and what each data set takes where nothing was chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sift_compiler.demo.datasets import NAMES
from sift_compiler.errors import UserError, unknown_name
from sift_compiler.options import SET, MaskMethod, RigL, Static
from sift_compiler.runtimes import registry

METHODS = ("rigl", "set", "static")
"""Mask methods of the demo."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the networks of one data set are trained: SGD with Nesterov momentum, the learning rate falls to 0 as a cosine.

    All networks of a demo, dense and sparse, take the same recipe.
    """

    width: int
    """Channels of the dense network's first stage."""
    epochs: int
    batch_size: int
    train_limit: int | None
    """Training images used; None: all."""
    seeds: int
    curve_images: int = 512
    """Test images (the first ones) behind each point of the accuracy curve; the final accuracy takes all of them."""
    learning_rate: float = 0.1
    """At the first step."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of weights; norms and biases do not decay."""


# The digits are cut short so that the dense network does not solve them outright, and so that the default demo, three
# networks with three seeds each, stays under three minutes on two slow cores. The real sets are larger: these defaults
# are a first look of some minutes, not a result; --epochs, --train-limit and --seeds make one.
RECIPES = {
    "digits": Recipe(width=24, epochs=16, batch_size=32, train_limit=256, seeds=3),
    "fashion-mnist": Recipe(width=16, epochs=5, batch_size=64, train_limit=2048, seeds=1),
    "cifar100": Recipe(width=16, epochs=5, batch_size=64, train_limit=2048, seeds=1),
}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of ``sift demo``; None stands for the data set's own default (:data:`RECIPES`)."""

    dataset: str = "digits"
    data: Path | None = None
    """Folder of the data set, or its parent; digits need none."""
    out: Path = Path("sift-demo")
    """Folder for the figure, the report and the trained sparse network; made if missing."""
    epochs: int | None = None
    seeds: int | None = None
    """How many seeds; they are 0, 1, 2, …"""
    sparsity: tuple[float, ...] = (0.75, 0.9)
    """One Sparse Wide network each, in (0, 1)."""
    method: str = "rigl"
    """How masks move: ``rigl``, ``set`` or ``static``."""
    runtime: str = "tvm"
    """Who runs the sparse layers."""
    batch_size: int | None = None
    train_limit: int | None = None
    """Use only so many training images."""
    threads: int = 1
    """Threads of torch and of the sparse kernels. One by default: the networks are small, and a busy machine cannot distort the times."""

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("data set", self.dataset, NAMES),
            ("mask method", self.method, METHODS),
            ("runtime", self.runtime, registry.names()),
        ):
            if name not in known:
                raise unknown_name(kind, name, known)
        for field, least in (("epochs", 1), ("seeds", 1), ("batch_size", 2), ("train_limit", 2), ("threads", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise UserError(f"--{field.replace('_', '-')} {value} is not possible: it must be at least {least}.")
        if not self.sparsity or len(set(self.sparsity)) != len(self.sparsity):
            raise UserError(f"--sparsity must be given at least once, each value once; got {list(self.sparsity)}.")
        for value in self.sparsity:
            if not 0 < value < 1:
                raise UserError(f"--sparsity {value} is not possible: it must lie between 0 and 1, such as 0.9.")

    @property
    def recipe(self) -> Recipe:
        """The data set's recipe with what was chosen."""
        base = RECIPES[self.dataset]
        return dataclasses.replace(
            base,
            epochs=self.epochs or base.epochs,
            batch_size=self.batch_size or base.batch_size,
            train_limit=self.train_limit or base.train_limit,
            seeds=self.seeds or base.seeds,
        )


def mask_method(name: str, steps: int, seed: int) -> MaskMethod:
    """The method called ``name`` for a training of ``steps`` optimizer steps.

    As in the paper masks rest after 75 % of training and the drop fraction starts at 0.3. The paper's 100 steps between
    updates are too many for a training this short, so there are about 20 updates, every 100 steps at most.
    """
    if name == "static":
        return Static(seed=seed)
    end = int(0.75 * steps)
    kind = RigL if name == "rigl" else SET
    return kind(seed=seed, end_step=end, delta_t=max(1, min(100, end // 20)))
