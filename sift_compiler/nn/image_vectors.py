"""Images side by side in vectors: [N, C, H, W] as [N / lanes, C, H, W, lanes], the layout between sparse convolutions.

A vector holds the same position of ``lanes`` images. What works on channels and positions works on either layout.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def to_image_vectors(x: Tensor, lanes: int) -> Tensor:
    """[N, C, H, W] → [N / lanes, C, H, W, lanes], contiguous; N is a multiple of ``lanes``."""
    return x.reshape(x.shape[0] // lanes, lanes, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


def from_image_vectors(y: Tensor) -> Tensor:
    """[N / lanes, C, H, W, lanes] → [N, C, H, W], contiguous."""
    return y.permute(0, 4, 1, 2, 3).reshape(y.shape[0] * y.shape[4], *y.shape[1:4])


def by_image(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer``, which maps [N, C, H, W] to [N, M, H', W'], on either layout."""
    if x.dim() != 5:
        return layer(x)
    return to_image_vectors(layer(from_image_vectors(x)), x.shape[4])
