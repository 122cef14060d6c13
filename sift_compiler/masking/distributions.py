"""How much of each layer is kept, when the share of the whole network is given.

Uniform keeps the same share everywhere; it is the default, because in the iso-FLOP setting anything else breaks the FLOP balance.
Erdős–Rényi–Kernel (ERK) keeps more of small layers (RigL, Sec. 3; Mocanu et al. 2018 for the fully connected case).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sift_compiler.errors import UserError
from sift_compiler.ir.pattern import kept_entries

Shape = Sequence[int]


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """The density of each layer, all ``1 - sparsity``.

    Raises:
        UserError: ``sparsity`` is not in [0, 1).
    """
    _check(sparsity)
    return [1 - sparsity] * len(shapes)


def erdos_renyi_kernel(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """The density of each layer, in (0, 1], proportional to (sum of its shape) / (product of its shape) (RigL, Sec. 3).

    A layer whose share would exceed 1 becomes dense and the others make up for it, until all fit. All layers together keep as
    many weights as under :func:`uniform` (before rounding to whole weights).

    Raises:
        UserError: ``sparsity`` is not in [0, 1), or a shape holds no weight.
    """
    return _proportional(shapes, shapes, sparsity)


def erdos_renyi(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """As :func:`erdos_renyi_kernel`, from the first two sizes of each shape only: kernels do not count (Mocanu et al. 2018).

    Raises:
        UserError: as there.
    """
    return _proportional(shapes, [shape[:2] for shape in shapes], sparsity)


def _proportional(shapes: Sequence[Shape], counted: Sequence[Shape], sparsity: float) -> list[float]:
    """Densities proportional to sum / product of ``counted``, for weights of ``shapes``."""
    _check(sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    if not all(sizes):
        raise UserError(f"Every shape must hold at least one weight; got {[tuple(shape) for shape in shapes]}.")
    raw = [sum(shape) / math.prod(shape) for shape in counted]
    kept = [kept_entries(size, sparsity) for size in sizes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        sparse = [layer for layer in range(len(shapes)) if layer not in dense]
        # What uniform keeps in the sparse layers, less what the dense ones keep beyond uniform.
        budget = sum(kept[layer] for layer in sparse) - sum(sizes[layer] - kept[layer] for layer in dense)
        epsilon = budget / sum(raw[layer] * sizes[layer] for layer in sparse)
        largest = max(raw[layer] for layer in sparse)
        if epsilon * largest <= 1:
            return [1.0 if layer in dense else epsilon * raw[layer] for layer in range(len(shapes))]
        dense |= {layer for layer in sparse if raw[layer] == largest}
    return [1.0] * len(shapes)


def active_weights(shapes: Sequence[Shape], densities: Sequence[float]) -> list[int]:
    """Exact number of kept weights per layer: all but ``floor((1 - density) * size)`` of them."""
    return [kept_entries(math.prod(shape), 1 - density) for shape, density in zip(shapes, densities, strict=True)]


def _check(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity={sparsity!r} is not possible: it must be at least 0 and below 1.")
