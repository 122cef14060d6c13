"""``sift inspect`` of how masks moved: from the report of a sift.Recorder, or from what sift.save kept of a schedule."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sift_compiler import archive
from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.masking.history import LayerUpdate, MaskUpdate
from sift_compiler.recorder import FORMAT, plain_update

_SUFFIXES = (".json", ".jsonl")

HEADS = (
    "layer",
    "updates",
    "density",
    "dropped",
    "grown",
    "regrown",
    "IoU",
    "IoU first",
    "explored",
    "flipped back",
    "revisited",
)
"""Of the columns of :meth:`MaskHistory.rows`."""


@dataclass(frozen=True, kw_only=True)
class MaskHistory:
    """How the masks of a model moved.

    Attributes:
        method: name and options of the mask method.
        updates: oldest first.
    """

    method: Mapping[str, Any]
    updates: tuple[MaskUpdate, ...]

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"method": dict(self.method), "updates": [plain_update(each) for each in self.updates]}

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text per layer: counts are sums over all updates, the rest is that of its last; "-" where nothing was measured."""
        by_layer: dict[str, list[LayerUpdate]] = {}
        for update in self.updates:
            for layer in update.layers:
                by_layer.setdefault(layer.name, []).append(layer)
        return [_row(name, found) for name, found in by_layer.items()]

    def summary(self) -> str:
        """One line on all of it."""
        name = str(self.method.get("name"))
        if not self.updates:
            return f"{name}: masks have not moved."
        last = self.updates[-1]
        explored = "" if last.explored_fraction is None else f", explored fraction {last.explored_fraction:.4f}"
        return (
            f"{name}: {len(self.updates)} update(s), the last after step {last.step} with drop fraction {last.drop_fraction:.4f}; "
            f"IoU {last.iou:.4f}{explored}"
        )


def is_mask_report(source: str) -> bool:
    """Whether ``source`` names a report rather than a model."""
    return Path(source).suffix in _SUFFIXES


def read_report(path: Path) -> MaskHistory:
    """The report that a sift.Recorder wrote; a last line that was cut short is left out.

    Raises:
        UserError: there is no such file, or it is something else.
        StaleArtifactError: it is damaged or of another version.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Pass the file that was given to sift.Recorder(report=…)."
        ) from error
    try:
        first = json.loads(lines[0])
        version, method = first["format"], first["method"]
        first["layers"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not a report of sift.Recorder: its first line does not tell method and layers."
        ) from error
    if version != FORMAT:
        raise StaleArtifactError(f"{path} has format {version!r}; this version reads {FORMAT}.")
    updates = []
    for number, line in enumerate(lines[1:], 2):
        try:
            updates.append(_update(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise StaleArtifactError(
                f"{path}, line {number}: this is not a mask update ({error}). The file was changed."
            ) from error
    return MaskHistory(method=method, updates=tuple(updates))


def saved_history(source: str) -> MaskHistory | None:
    """What a ``.pt2`` file of sift.save holds of a mask schedule; None if it holds none, or is another kind of model."""
    path = Path(source)
    if path.suffix != ".pt2" or not path.is_file():
        return None
    with zipfile.ZipFile(path) as opened:
        name = next((one for one in opened.namelist() if one.endswith(archive.METADATA)), None)
        masks = None if name is None else json.loads(opened.read(name))["masks"]
    if masks is None:
        return None
    return MaskHistory(method=masks["method"], updates=tuple(MaskUpdate.from_plain(each) for each in masks["updates"]))


def _update(plain: Mapping[str, Any]) -> MaskUpdate:
    """The inverse of :func:`plain_update`; what follows from the rest is left out."""
    layers = [_fields(LayerUpdate, layer) for layer in plain["layers"]]
    return MaskUpdate.from_plain({**_fields(MaskUpdate, plain), "layers": layers})


def _fields(kind: type[LayerUpdate] | type[MaskUpdate], plain: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: plain[each.name] for each in dataclasses.fields(kind)}


def _row(name: str, updates: list[LayerUpdate]) -> tuple[str, ...]:
    last = updates[-1]
    explored = last.explored / last.numel if last.explored is not None and last.numel else None
    return (
        name, str(len(updates)), _shown(last.density),
        *(f"{sum(getattr(each, count) for each in updates):,}" for count in ("dropped", "grown", "regrown")),
        _shown(last.iou), _shown(last.iou_initial), _shown(explored),
        *(_summed(updates, count) for count in ("oscillated", "revisited")),
    )  # fmt: skip


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def _summed(updates: list[LayerUpdate], count: str) -> str:
    found = [getattr(each, count) for each in updates]
    return "-" if any(each is None for each in found) else f"{sum(found):,}"
