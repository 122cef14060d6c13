"""What one training run of the study is: a data set, a method, a seed and a recipe that all methods share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sift_compiler.errors import UserError, unknown_name

METHODS = ("dense", "static", "set", "rigl", "bidst", "static-nm", "bame", "dense-wide")
"""Dense; Sparse Wide with unstructured masks (static, SET, RigL, BiDST-style) and with N:M masks (static, BAME-style); and the network
of the sparse ones' width without masks, which costs many times the FLOPs and is a reference only."""

BY_WIDTH = ("dense", "dense-wide")
"""Methods without masks."""

STRUCTURED = ("static-nm", "bame")
"""Methods with N:M masks."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How all networks of a data set are trained, dense and sparse: SGD with Nesterov momentum; the learning rate rises from 0 and falls
    to 0 as a cosine. It was chosen on the dense network and on held-out training images."""

    widths: tuple[int, ...]
    """Channels of the dense network's stages."""
    epochs: int
    batch_size: int
    learning_rate: float
    """At its highest."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of weights; norms and biases do not decay."""
    augment: bool
    """Whether training images are shifted by up to 4 pixels and flipped at random."""
    train_limit: int | None = None
    """Training images used, the first ones; None: all."""
    held_out: int = 0
    """Training images, the last ones, that are not trained on but tested on, instead of the test set: for choosing settings."""
    mask_updates: int = 20
    """Mask updates in the first 75 % of training, about; they set the steps between two."""
    drop_fraction: float = 0.3
    """Share of the active weights replaced at the first update by SET, RigL and BAME-style."""
    group: int = 16
    """m of N:M masks; widths are multiples of it, for all methods."""
    last: int = 3
    """Evaluations behind the mean of the last: at the end of training, and 3 %, 6 %, … of the steps before it."""

    def __post_init__(self) -> None:
        for field, least in (("epochs", 1), ("batch_size", 2), ("mask_updates", 1), ("group", 2), ("last", 1)):
            if getattr(self, field) < least:
                raise UserError(f"{field} {getattr(self, field)} is not possible: it must be at least {least}.")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate {self.learning_rate} is not possible: it must be above 0.")
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"widths {self.widths} are not possible: every stage needs at least one channel.")


RECIPES = {
    "fashion-mnist": Recipe(widths=(16, 32), epochs=1, batch_size=64, learning_rate=0.2, augment=False),
    "cifar100": Recipe(widths=(16, 32, 64), epochs=1, batch_size=64, learning_rate=0.2, augment=True),
}
"""By data set. Short, so that a run takes a minute on one free core; learning rates: the best of .1, .2 and .4, .2 where it equals .4."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run."""

    dataset: str
    method: str
    seed: int
    """Of the initial weights, the first masks, their random moves, the order of the images and their augmentation."""
    sparsity: float
    """As asked for; what is applied balances FLOPs. 0 for dense."""
    run: str
    """``"compiled"``: sparse networks by torch.compile(backend="sift"), dense ones by inductor; ``"eager"``."""
    recipe: Recipe

    def __post_init__(self) -> None:
        if self.dataset not in RECIPES:
            raise unknown_name("data set", self.dataset, RECIPES)
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.method == "dense" and self.sparsity:
            raise UserError(f"The dense network has sparsity 0, not {self.sparsity}.")
        if self.method != "dense" and not 0 < self.sparsity < 1:
            raise UserError(f"Sparsity {self.sparsity} is not possible: it must lie between 0 and 1, such as 0.9.")

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries, as they come back from JSON."""
        plain = dataclasses.asdict(self)
        return plain | {"recipe": plain["recipe"] | {"widths": list(self.recipe.widths)}}


def cells(
    dataset: str, methods: list[str], seeds: list[int], sparsity: float, run: str, recipe: Recipe
) -> list[Cell]:  # fmt: skip
    """Every method with every seed; a whole seed comes before the next."""
    return [
        Cell(
            dataset=dataset, method=method, seed=seed, sparsity=0.0 if method == "dense" else sparsity, run=run,
            recipe=recipe,
        )
        for seed in seeds
        for method in methods
    ]  # fmt: skip
