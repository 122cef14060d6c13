"""What a measured tile holds good for: layers of one geometry with masks that are alike, not one mask."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.sharing import measured_loads
from sift_compiler.lowering.specification import LayerSpec


def tuning_key(
    spec: LayerSpec, choice: Choice, size: tuple[int, int], index: npt.NDArray[np.int32], cpu: CpuFacts, threads: int
) -> dict[str, Any]:
    """What decides which tile is fastest, by name.

    Args:
        spec: the layer. Of its kept weights only the share enters, in steps of 19 %.
        choice: the part of the batch, with the rules' tile. Groups of whole vectors of images are alike, however many; so are numbers of
            tokens up to the same power of two.
        size: height and width of the input; (1, 1) for a linear layer.
        index: int32 [slots], the mask.
        cpu: the processor, its caches included.
        threads: workers of the kernel.
    """
    tile = choice.tile
    if spec.kind == "linear":
        items = f"up to {1 << (choice.count - 1).bit_length()} tokens"
    else:
        items = "whole vectors of images" if tile.lanes == "batch" else f"{choice.count} images"
    kept, entries = int((index >= 0).sum()), math.prod(spec.weight_shape)
    loads = measured_loads(index, spec)
    return {
        "layer": dataclasses.replace(spec, nnz=0, bias=False),
        "density": round(4 * math.log2(max(kept, 1) / max(entries, 1))),
        "loads of two and four rows": (round(16 * loads[1]), round(8 * loads[3])),
        "size": size, "items": items, "lanes": tile.lanes, "rivals": choice.rivals, "cpu": cpu, "threads": threads,
    }  # fmt: skip
