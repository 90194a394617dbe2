"""What a killed run goes on from: files and folders that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_STEP = "step-"
_TEMPORARY = ".writing-"


class Checkpoints:
    """The newest checkpoint of a run: `folder/step-N`, which appears whole or not at all.

    Args:
        folder: of the run; made when the first checkpoint is written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder)
        ...     for step in (5, 10):
        ...         path = checkpoints.prepare(step)
        ...         _ = (path / "weights").write_text("...")
        ...         checkpoints.publish(step)
        ...     checkpoints.newest().name
        'step-10'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def newest(self) -> Path | None:
        """The folder of the last complete checkpoint."""
        return max(self._all(), key=_step, default=None)

    def prepare(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into; what was left there is gone."""
        path = self.temporary(step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def publish(self, step: int) -> None:
        """Syncs what was written to disk and gives it its name; then removes older checkpoints."""
        temporary, path = self.temporary(step), self.folder / f"{_STEP}{step}"
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        os.rename(temporary, path)
        _sync(self.folder)
        for older in self._all():
            if older != path:
                shutil.rmtree(older)

    def discard(self, step: int) -> None:
        """Removes what `prepare` began."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints, and what a killed run left half written."""
        for path in [*self._all(), *self.folder.glob(f"{_TEMPORARY}*")]:
            shutil.rmtree(path)

    def temporary(self, step: int) -> Path:
        """The folder that `prepare` makes."""
        return self.folder / f"{_TEMPORARY}{step}"

    def _all(self) -> list[Path]:
        return [p for p in self.folder.glob(f"{_STEP}*") if p.name[len(_STEP) :].isdecimal()]


def _step(path: Path) -> int:
    return int(path.name[len(_STEP) :])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file beside `path`, syncs and renames it: the old one survives a failure."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def require_same(old: Any, new: Any, what: str, where: Callable[[str], str] | None = None) -> None:
    """Refuses to go on with another configuration, naming the first difference.

    Args:
        old: what the run was started with, as JSON gives it back.
        new: what it is to go on with.
        what: the run, for the sentence.
        where: key, such as `"prune.sparsity"`, -> where it is written now; default nowhere.

    Raises:
        ValueError: the two differ.

    Example:
        >>> require_same({"clip": 1.0}, {"clip": None}, "the checkpoint")
        Traceback (most recent call last):
        ValueError: the checkpoint was made with clip=1.0, and now clip=None: go on with what it \
was made with, or start anew in another folder
    """
    difference = _difference(old, json.loads(json.dumps(new)), "")
    if difference is not None:
        key, before, now = difference
        prefix = where(key) if where else ""
        raise ValueError(
            f"{prefix}{what} was made with {key}={before}, and now {key}={now}: "
            "go on with what it was made with, or start anew in another folder"
        )


def _difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(n for n in new if n not in old)]:
            path = f"{key}.{name}" if key else str(name)
            if name not in old or name not in new:
                return path, old.get(name, "absent"), new.get(name, "absent")
            if (found := _difference(old[name], new[name], path)) is not None:
                return found
        return None
    return None if old == new else (key, old, new)
