"""What figures are held to, and what a call costs in memory; for the other scripts."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gossamer.report import render


@dataclass(frozen=True)
class Bar:
    """One figure of an item: `measured` must be at least, or at most (`sense`), `limit`."""

    item: int
    what: str
    sense: str
    limit: float
    measured: float
    unit: str = "x"
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its bar."""
        over = self.measured >= self.limit
        return over if self.sense == ">=" else self.measured <= self.limit

    def cells(self) -> list[str]:
        """A row of the table."""
        wanted = f"{self.sense} {self.limit:.3g}{self.unit}"
        verdict = "pass" if self.passed else "MISS"
        return [
            *(str(self.item), self.what, wanted, f"{self.measured:.3g}{self.unit}", verdict),
            self.detail,
        ]


def hold(variables: dict[str, str]) -> None:
    """Starts this command again with environment variables that a library reads once."""
    if any(os.environ.get(name) != value for name, value in variables.items()):
        os.environ.update(variables)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def as_json(bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """The bars with their verdicts."""
    assert all(math.isfinite(bar.measured) for bar in bars)
    return [{**asdict(bar), "passed": bar.passed} for bar in bars]


def verdicts(bars: Sequence[dict[str, Any]]) -> str:
    """A table of what `as_json` gave, and how many are kept."""
    headers = [">item", "bar", ">wanted", ">measured", "verdict", "in detail"]
    kept = sum(bar["passed"] for bar in bars)
    names = [field.name for field in fields(Bar)]
    rows = [Bar(**{name: bar[name] for name in names}).cells() for bar in bars]
    return f"{kept} of {len(bars)} bars are kept.\n\n{render(headers, rows)}"


def own_process(preload: str) -> ProcessPoolExecutor:
    """A process in which nothing ran before but the import of a module."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([preload])  # imports torch once for all
    return ProcessPoolExecutor(1, mp_context=fresh)


def added_bytes(call: Callable[[], object]) -> int:
    """What a call adds to the peak of this process's memory, whatever allocates it."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free now would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    before = _status("VmRSS")
    call()
    # Less than none: a page was given back meanwhile.
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes in a line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
