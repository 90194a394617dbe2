"""Names and patterns: globs, regular expressions and the error for a pattern without a match."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.patterns import matches, select

NAMES = ["stem", "encoder.0.fc", "encoder.1.fc", "encoder.10.fc", "head", "Head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stem", ["stem"]),
        ("encoder.*", ["encoder.0.fc", "encoder.1.fc", "encoder.10.fc"]),
        ("encoder.?.fc", ["encoder.0.fc", "encoder.1.fc"]),
        ("encoder.[1-9].*", ["encoder.1.fc"]),
        ("*", NAMES),
        ("head", ["head"]),
        ("[hH]ead", ["head", "Head"]),
        (r"re:encoder\.\d+\.fc", ["encoder.0.fc", "encoder.1.fc", "encoder.10.fc"]),
        ("re:.*ead", ["head", "Head"]),
        (r"re:encoder\.1.*", ["encoder.1.fc", "encoder.10.fc"]),
    ],
)
def test_each_kind_of_pattern(pattern: str, expected: list[str]) -> None:
    assert [name for name in NAMES if matches(name, pattern)] == expected
    assert select(NAMES, [pattern]) == expected


@pytest.mark.parametrize("pattern", ["encoder", "re:encoder", "re:fc", "fc", "HEAD"])
def test_a_pattern_fits_the_whole_name_in_its_case(pattern: str) -> None:
    assert not any(matches(name, pattern) for name in NAMES)


def test_select_keeps_the_order_of_the_names_and_takes_each_once() -> None:
    assert select(iter(NAMES), ("head", "encoder.*", "stem", "re:.*d")) == [
        "stem",
        "encoder.0.fc",
        "encoder.1.fc",
        "encoder.10.fc",
        "head",
        "Head",
    ]


def test_a_plain_string_is_one_pattern_not_many_letters() -> None:
    assert select(NAMES, "head") == ["head"]


def test_no_patterns_select_nothing() -> None:
    assert select(NAMES, ()) == []


def test_a_pattern_without_a_match_is_an_error_that_lists_the_layers() -> None:
    with pytest.raises(ValueError, match=r"pattern 'tail' matches no layer; layers are: a, b$"):
        select(["a", "b"], ["a", "tail"])
    many = [f"layer{i}" for i in range(100)]
    with pytest.raises(ValueError, match=r"layer7, \.\.\.$"):
        select(many, "tail")


def test_a_broken_regular_expression_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"pattern 're:\(' is not a regular expression: .+"):
        matches("a", "re:(")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab.", max_size=4), unique=True), st.data())
def test_names_select_themselves(names: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    assert set(select(names, wanted)) == set(wanted)
