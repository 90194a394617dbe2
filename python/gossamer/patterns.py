"""Layers chosen by name: a pattern is a shell glob, or a regular expression after `re:`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_SHOWN = 8


def matches(name: str, pattern: str) -> bool:
    """`name` fits `pattern` as a whole.

    Args:
        name: a module's name as `named_modules` gives it, such as `"encoder.0.fc"`.
        pattern: a glob (`*` any characters, dots too; `?` one; `[01]` one of these), case
            sensitive; or `"re:"` and a regular expression.

    Raises:
        ValueError: what follows `re:` is not a regular expression.

    Example:
        >>> from gossamer.patterns import matches
        >>> matches("encoder.0.fc", "encoder.*"), matches("encoder.0.fc", r"re:encoder\\.\\d")
        (True, False)
    """
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def select(names: Iterable[str], patterns: str | Iterable[str]) -> list[str]:
    """The `names` that at least one of `patterns` matches, in their own order.

    Args:
        names: the layers to choose from.
        patterns: one pattern or several, see `matches`.

    Raises:
        ValueError: a pattern matches nothing, which is nearly always a misspelt name.

    Example:
        >>> from gossamer.patterns import select
        >>> select(["stem", "body.0", "body.1"], ("body.*", "stem"))
        ['stem', 'body.0', 'body.1']
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if matches(name, pattern)}
        if not found:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ValueError(f"pattern {pattern!r} matches no layer; layers are: {shown}")
        chosen |= found
    return [name for name in names if name in chosen]
