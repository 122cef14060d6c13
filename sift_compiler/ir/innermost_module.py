"""Which module of a model is running: the innermost one, by its first path."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class _Handle(Protocol):
    def remove(self) -> None: ...


class InnermostModule:
    """In its block, tells the path of the module whose forward is running.

    A stand-in for ``torch.utils.module_tracker.ModuleTracker``, which names a module that several others share by the last of its
    paths; here the first one holds, as in ``named_modules``. A module that the model does not own counts as part of its caller.

    Attributes:
        parents: the names under which ``torch.utils.flop_counter`` counts what is computed now: ``"Global"`` and that path.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parents = {"Global"}
        self._paths = {id(each): path for path, each in module.named_modules()}
        self._running: list[str] = []
        self._handles: list[_Handle] = []

    def __enter__(self) -> InnermostModule:
        self._handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._running.clear()
        self._show()

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        around = self._running[-1] if self._running else ""
        self._running.append(self._paths.get(id(module), around))
        self._show()

    def _leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self._running.pop()
        self._show()

    def _show(self) -> None:
        self.parents = {"Global", self._running[-1] if self._running else ""}
