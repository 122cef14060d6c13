"""The update hook that the mask-scheduling pass inserts in front of a sparse layer."""

from __future__ import annotations

from torch import nn

from sift_compiler.nn.growth import GrowthProbe


class MaskHook(nn.Module):
    """Names, inside the graph, where a mask method listens: ``%y = layer(%x, %hook)``.

    Its value is the constant handle of its probe. Removing the node (the strip-hooks pass) leaves the same function without mask updates.
    """

    def __init__(self) -> None:
        super().__init__()
        self._renew()

    def _renew(self) -> None:
        self.probe = GrowthProbe()
        self.handle = self.probe.handle

    def forward(self) -> int:
        """The handle of this hook's probe."""
        return self.handle

    def __getstate__(self) -> dict[str, object]:
        # A copy listens for itself: two layers must never share a probe.
        return {name: value for name, value in self.__dict__.items() if name not in ("probe", "handle")}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._renew()
