"""Examples in the docs and in docstrings run, and give what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from builds import ROOT

import gossamer

# The modules that a user calls or reads. cli parses arguments: its example is the command.
MODULES = [
    name for _, name, _ in pkgutil.iter_modules(gossamer.__path__) if not name.startswith("_")
]


def run(test: doctest.DocTest) -> int:
    """Runs the examples of one text and returns how many there were."""
    shown: list[str] = []
    results = doctest.DocTestRunner().run(test, out=shown.append)
    assert not results.failed, "".join(shown)
    return results.attempted


@pytest.mark.parametrize("page", ["docs/formats.md"])
def test_page(page: str) -> None:
    # The fences of Markdown are no output of the example before them.
    text = re.sub(r"^```\w*$", "", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert run(doctest.DocTestParser().get_doctest(text, {}, Path(page).name, page, 0)) > 20


@pytest.mark.parametrize("name", ["", *MODULES])
def test_docstrings(name: str) -> None:
    module = importlib.import_module(f"gossamer.{name}".removesuffix("."))
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        run(test)
