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

MODULES = [
    "gossamer",
    *(
        name
        for _, name, _ in pkgutil.walk_packages(gossamer.__path__, "gossamer.")
        if not name.startswith("gossamer._")
    ),
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


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        run(test)
