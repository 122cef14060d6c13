"""Compiled kernels on disk: loaded in a millisecond, compiled once for all processes of a user.

An artifact is one file, ``<digest>.<format>``, and a record ``<digest>.json`` beside it that holds the fingerprint, the size and the
checksum. Both appear whole, by being renamed into place, the record last: without a record there is no artifact. An artifact whose
record, fingerprint or checksum does not fit is a miss with a logged reason; it is rebuilt and replaced.

Nothing on disk may stop a computation: a folder that cannot be written, a full disk or a lock that does not come free cost time, said
once, and kernels live in memory only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sift_compiler.observe.settings import from_environment
from sift_compiler.runtimes.fingerprint import Fingerprint
from sift_compiler.whole_file import appearing_whole

_log = logging.getLogger(__name__)
_LOCK_SECONDS = 60.0
"""How long to wait for another process that builds the same kernel; then both build it."""

_warned: set[Path] = set()

Code = TypeVar("Code")


def default_folder() -> Path:
    """``SIFT_CACHE_DIR``, else ``sift_compiler`` in the user's cache folder (on Linux ``~/.cache``).

    Raises:
        UserError: SIFT_CACHE_DIR names a file.
    """
    import platformdirs

    asked = from_environment().cache
    return asked if asked is not None else Path(platformdirs.user_cache_dir("sift_compiler", appauthor=False))


@dataclass(frozen=True)
class Form(Generic[Code]):
    """A kind of file that compiled code can be kept in.

    Attributes:
        write: writes code to a path; may raise anything.
        read: loads code from a path whose checksum is right; may raise anything.
    """

    write: Callable[[Code, Path], None]
    read: Callable[[Path], Code]


@dataclass(frozen=True)
class KernelCache(Generic[Code]):
    """The artifacts of one folder.

    Attributes:
        folder: where they are; made when the first one is stored.
        forms: kinds of files by suffix, the best first; code is stored in the first that can be written.
        what, again, otherwise: words for messages: what an artifact is, what a miss costs, and what not storing costs.
    """

    folder: Path
    forms: Mapping[str, Form[Code]]
    what: str = "kernel"
    again: str = "It is compiled anew"
    otherwise: str = "Every process compiles its kernels anew"

    def get(self, key: Fingerprint, build: Callable[[], Code]) -> Code:
        """The code of ``key``: loaded, or built and stored for the next process.

        Raises:
            Exception: what ``build`` raises; nothing else.
        """
        code = self.try_load(key)
        if code is not None:
            return code
        with self._locked(key):
            # Another process may have stored it while this one waited.
            code = self.try_load(key)
            if code is not None:
                return code
            made = build()
            stored = self.try_store(key, made)
        loaded = self.try_load(key) if stored else None
        return made if loaded is None else loaded

    def try_load(self, key: Fingerprint) -> Code | None:
        """The code of ``key``, or None: there is none, or what there is is damaged or foreign (logged). Never raises."""
        try:
            record = json.loads(self._record(key).read_text(encoding="utf-8"))
            if record["fingerprint"] != key.to_plain():
                self._miss(key, "it was made for something else")
                return None
            suffix = record["form"]
            if suffix not in self.forms:
                self._miss(key, f"its form {suffix!r} is not known")
                return None
            path = self._artifact(key, suffix)
            content = path.read_bytes()
            if len(content) != record["bytes"] or hashlib.sha256(content).hexdigest() != record["sha256"]:
                self._miss(key, f"{path.name} is damaged or truncated")
                return None
            return self.forms[suffix].read(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged record or a foreign binary fails in any way it likes
            self._miss(key, f"{type(error).__name__}: {error}")
            return None

    def try_store(self, key: Fingerprint, code: Code) -> bool:
        """Write ``code``, in the first form that can be. Says once why it could not. Never raises."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            return self._only_memory(str(error))
        reasons = []
        for suffix, form in self.forms.items():
            try:
                self._store(key, code, suffix, form)
                return True
            except Exception as error:  # linkers and compilers raise whatever they like
                reasons.append(f"{suffix}: {error.__cause__ or error}")
        return self._only_memory("; ".join(reasons))

    def _store(self, key: Fingerprint, code: Code, suffix: str, form: Form[Code]) -> None:
        path = self._artifact(key, suffix)
        with appearing_whole(path) as unfinished:
            form.write(code, Path(unfinished))
            content = Path(unfinished).read_bytes()
        record = {
            "form": suffix, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
            "fingerprint": key.to_plain(),
        }  # fmt: skip
        with appearing_whole(self._record(key)) as unfinished:
            Path(unfinished).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _only_memory(self, reason: str) -> bool:
        """Say once per folder that kernels are not kept; False."""
        if self.folder not in _warned:
            _warned.add(self.folder)
            _log.warning(
                "Nothing can be stored in %s (%s). %s. Name a folder that can be written to: export SIFT_CACHE_DIR=…",
                self.folder, reason, self.otherwise,
            )  # fmt: skip
        return False

    def _miss(self, key: Fingerprint, reason: str) -> None:
        _log.warning(
            "The cached %s %s in %s is not used: %s. %s.", self.what, key.digest, self.folder, reason, self.again
        )

    def _record(self, key: Fingerprint) -> Path:
        return self.folder / f"{key.digest}.json"

    def _artifact(self, key: Fingerprint, suffix: str) -> Path:
        return self.folder / f"{key.digest}.{suffix}"

    @contextlib.contextmanager
    def _locked(self, key: Fingerprint) -> Iterator[None]:
        """One process builds, the others wait. Where there can be no lock, all build; renames keep that harmless."""
        import filelock

        lock = filelock.FileLock(self.folder / f"{key.digest}.lock", timeout=_LOCK_SECONDS)
        held = False
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.acquire()
            held = True
        except (OSError, NotImplementedError) as error:  # filelock.Timeout is an OSError
            _log.info("Building without a lock: %s", error)
        try:
            yield
        finally:
            if held:
                lock.release()


@dataclass(frozen=True)
class Contents:
    """What a folder of kernels holds."""

    kernels: int
    bytes: int


def contents(folder: Path) -> Contents:
    """Count the kernels of ``folder`` and the bytes of its files; an unreadable or missing folder counts as empty."""
    kernels = size = 0
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                kernels += file.suffix == ".json"
                size += file.stat().st_size
    return Contents(kernels, size)
