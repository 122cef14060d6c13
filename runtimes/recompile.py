"""When a kernel must be brought up to date with its mask."""

from __future__ import annotations

from torch import Tensor


class MaskWatch:
    """Remembers the mask a kernel was last packed for.

    A mask is known by its index tensor's memory and version: every in-place write raises the version, and its memory is kept, so
    that it cannot be handed to another one. ``index`` must be written through the tensor itself (not ``.data``, not NumPy).
    """

    def __init__(self) -> None:
        self._index: Tensor | None = None
        self._version = -1

    def moved(self, index: Tensor) -> bool:
        """Whether ``index`` differs from what :meth:`seen` was given last."""
        known = self._index
        same = known is not None and index.data_ptr() == known.data_ptr() and index.numel() == known.numel()
        return not same or index._version != self._version

    def seen(self, index: Tensor) -> None:
        """The kernel now follows ``index``."""
        # An alias, because ``index.data = …`` gives the tensor itself other memory.
        self._index, self._version = index.detach(), index._version
