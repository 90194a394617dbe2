"""Report: what runs in each layer now, and why; the table that `compress_` returns and prints."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

_WIDE = 10_000  # columns: no row is that long, so rich neither wraps nor shortens a cell


@dataclass
class Row:
    """One layer: its name, what it was, what it is now, and the reason if it was left alone.

    Args:
        name: the layer's name in the model; "" is the model itself.
        shape: of the weight, as the dense module has it: (n, k), or (n, c, kh, kw).
        before: what ran there, e.g. "Linear".
        after: what runs there now, e.g. "Linear Int8"; "" where the layer was left alone.
        zeros: share of zeros in the weight, 0 to 1.
        bytes_before, bytes_after: of weight and bias. A weight that several layers share counts
            in the first of them only, so that a column's sum is what memory holds.
        ms_before, ms_after: time of one call, where both were timed.
        kernel: the stem that runs there now, e.g. "gemm_int8".
        note: the reason, if the layer was left alone, or anything else worth knowing.
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    zeros: float
    bytes_before: int | None = None
    bytes_after: int | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    kernel: str = ""
    note: str = ""


@dataclass
class Report:
    """Rows, one a layer; `str()` is a plain-text table that survives a pipe or a narrow terminal.

    Args:
        rows: one `Row` a layer, in the model's order.
        title: a sentence above the table.

    Example:
        >>> report = Report([Row("fc", (8, 16), "Linear", "Linear Int8", 0.5, 544, 200)])
        >>> print(report)
        | layer | shape  | before | after       | zeros |      bytes |
        |-------|--------|--------|-------------|-------|------------|
        | fc    | 8 x 16 | Linear | Linear Int8 |  50 % | 544 -> 200 |
        1 of 1 layers compressed, 544 -> 200 bytes
        >>> [row.name for row in report], len(report)
        (['fc'], 1)
    """

    rows: list[Row] = field(default_factory=list)
    title: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as a list of JSON-able dicts, one a layer.

        Example:
            >>> Report([Row("fc", (8, 16), "Linear", "", 0.0)]).to_json()[0]["shape"]
            [8, 16]
        """
        return [{**asdict(row), "shape": list(row.shape)} for row in self.rows]

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        if self.rows:
            lines += [render(*self._columns()), self._totals()]
        return "\n".join(lines)

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        """Headers and cells; a column that is empty in every row is left out."""
        columns = {
            "layer": [row.name or "(the model)" for row in self.rows],
            "shape": [" x ".join(map(str, row.shape)) for row in self.rows],
            "before": [row.before for row in self.rows],
            "after": [row.after for row in self.rows],
            ">zeros": [f"{100 * row.zeros:.0f} %" for row in self.rows],
            ">bytes": [_change(row.bytes_before, row.bytes_after, ",d") for row in self.rows],
            ">ms": [_change(row.ms_before, row.ms_after, ".3g") for row in self.rows],
            "kernel": [row.kernel for row in self.rows],
            "note": [row.note for row in self.rows],
        }
        kept = {header: cells for header, cells in columns.items() if any(cells)}
        return list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)]

    def _totals(self) -> str:
        compressed = sum(bool(row.after) for row in self.rows)
        parts = [f"{compressed} of {len(self.rows)} layers compressed"]
        sizes = [(r, r.bytes_before, r.bytes_after) for r in self.rows]
        times = [(r, r.ms_before, r.ms_after) for r in self.rows]
        for pairs, spec, unit in ((sizes, ",d", "bytes"), (times, ".3g", "ms")):
            known = [(row, b, a) for row, b, a in pairs if b is not None]
            # A layer that was left alone goes on as it was, whatever the other one would have cost.
            after = sum(a if row.after and a is not None else b for row, b, a in known)
            if known:
                parts.append(f"{_change(sum(b for _, b, _ in known), after, spec)} {unit}")
        return ", ".join(parts)


def _change(before: float | None, after: float | None, spec: str) -> str:
    numbers = [format(number, spec) for number in (before, after) if number is not None]
    return " -> ".join(numbers)


def render(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain ASCII text (which is also Markdown), as wide as its content.

    Args:
        headers: one a column; a leading ">" aligns the column to the right.
        rows: cells, one list a row.

    Example:
        >>> print(render(["a", ">b"], [["x", "1"], ["y", "10"]]))
        | a |  b |
        |---|----|
        | x |  1 |
        | y | 10 |
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN)
    for header in headers:
        justify: Literal["left", "right"] = "right" if header.startswith(">") else "left"
        table.add_column(Text(header.removeprefix(">")), justify=justify, no_wrap=True)
    for row in rows:
        # Text, not str: a layer's name may hold [brackets], which rich would read as a style.
        table.add_row(*(Text(cell) for cell in row))
    file = io.StringIO()
    plain = Console(
        file=file, width=_WIDE, color_system=None, force_jupyter=False, legacy_windows=False
    )
    plain.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip())


def in_bytes(number: float) -> str:
    """A size a human reads: three digits and a unit of 1000 bytes.

    Example:
        >>> in_bytes(90_868_376), in_bytes(12)
        ('90.9 MB', '12 B')
    """
    size, units = float(number), ["B", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size >= 99.5 else f"{size:.3g} {units[0]}"
