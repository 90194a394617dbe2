"""The Report's table and JSON: plain, complete, with only the columns that say something."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gossamer.report import Report, Row, in_bytes, render

ROWS = [
    Row("encoder.0.fc", (64, 256), "Linear", "Linear Int8", 0.25, 65_792, 16_768, 0.5, 0.2, "gemm"),
    Row("stem", (8, 3, 3, 3), "Conv2d", "", 0.0, 896, None, 0.1, 0.3, "", "kept: dense is faster"),
]


def test_table_has_one_row_a_layer_and_the_totals() -> None:
    header, _, first, second, totals = str(Report(ROWS)).splitlines()
    for word in ("layer", "shape", "before", "after", "zeros", "bytes", "ms", "kernel", "note"):
        assert word in header
    for cell in ("encoder.0.fc", "64 x 256", "25 %", "65,792 -> 16,768", "0.5 -> 0.2", "gemm"):
        assert cell in first
    assert "kept: dense is faster" in second
    # The stem stays dense: it goes on costing 896 bytes and 0.1 ms.
    assert totals == "1 of 2 layers compressed, 66,688 -> 17,664 bytes, 0.6 -> 0.3 ms"


def test_columns_empty_in_all_rows_are_left_out() -> None:
    text = str(Report([Row("fc", (2, 2), "Linear", "Linear Int8", 0.0)]))
    assert "after" in text
    for absent in ("bytes", "ms", "kernel", "note"):
        assert absent not in text


def test_untimed_rows_do_not_count_in_the_milliseconds() -> None:
    rows = [*ROWS, Row("late", (2, 2), "Linear", "Linear Int8", 0.0, 16, 8)]
    assert str(Report(rows)).splitlines()[-1].endswith("0.6 -> 0.3 ms")


def test_title_stands_above_and_alone_if_there_are_no_rows() -> None:
    assert str(Report([], "nothing to compress")) == "nothing to compress"
    assert str(Report(ROWS, "title")).splitlines()[0] == "title"
    assert str(Report()) == ""


def test_iterates_and_has_a_length() -> None:
    report = Report(ROWS)
    assert list(report) == ROWS and len(report) == 2


def test_json_round_trip() -> None:
    rows = json.loads(json.dumps(Report(ROWS).to_json()))
    assert rows[0]["name"] == "encoder.0.fc" and rows[0]["shape"] == [64, 256]
    assert rows[1]["note"] == "kept: dense is faster" and rows[1]["bytes_after"] is None


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "a[0]", ":smile:", "x" * 500, "a\\[b"])
def test_names_appear_as_they_are(name: str) -> None:
    assert name in str(Report([Row(name, (1, 1), "Linear", "", 0.0, note="why " * 100)]))


def test_the_model_itself_has_a_name_in_the_table() -> None:
    assert "(the model)" in str(Report([Row("", (1, 1), "Conv1d", "", 0.0)]))


@pytest.mark.parametrize("variables", [{"COLUMNS": "20"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_printing_needs_no_terminal_and_no_unicode(variables: dict[str, str]) -> None:
    code = (
        "from gossamer.report import Report, Row;"
        "print(Report([Row('a.long.name.' * 9, (1, 1), 'Linear', '', 0.0, note='because ' * 40)]))"
    )
    environment = {**os.environ, **variables, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    ).stdout.decode("ascii")
    assert "a.long.name." * 9 in output and ("because " * 40).strip() in output
    assert "\x1b" not in output and len(output.splitlines()) == 4


def test_render_aligns_and_closes_every_line() -> None:
    lines = render(["left", ">right"], [["a", "1"], ["bb", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| a    |     1 |"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1 kB"), (90_868_376, "90.9 MB"),
     (999_999, "1 MB"), (5e12, "5000 GB")],
)  # fmt: skip
def test_sizes_are_short(number: float, text: str) -> None:
    assert in_bytes(number) == text
