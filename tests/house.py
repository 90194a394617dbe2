"""What the house rules are checked on: the files of the tree, and the functions in them."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from builds import ROOT

TEXT = {".py", ".cpp", ".h", ".txt", ".md", ".toml", ".in", ".json", ".yml", ".yaml", ".sh", ""}


@cache
def files() -> tuple[Path, ...]:
    """All files that git tracks, or would, relative to the root."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = sorted(set(done.stdout.splitlines()))
    return tuple(Path(name) for name in names if (ROOT / name).is_file())


def text_files() -> list[Path]:
    return [path for path in files() if path.suffix in TEXT and path.name != "LICENSE"]


def under(folder: str, *suffixes: str) -> list[Path]:
    """Files below a folder, with one of the suffixes if any are given."""
    inside = [path for path in files() if path.is_relative_to(folder)]
    return [path for path in inside if not suffixes or path.suffix in suffixes]


@cache
def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(read(path))


@dataclass(frozen=True)
class Function:
    """A function and its length; a docstring does not count, it is for the reader of `help`."""

    name: str
    line: int
    length: int


def python_functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            yield Function(node.name, node.lineno, length)


_NOISE = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+' | ^\s*\#(?:\\\n|[^\n])*""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def bare_cpp(path: Path) -> str:
    """C++ without comments, literals and preprocessor lines; every line stays where it was."""
    return _NOISE.sub(lambda match: "\n" * match[0].count("\n"), read(path))


def includes(path: Path) -> list[str]:
    """What a file includes, with its quotes or angle brackets, or the macro that stands for it."""
    return re.findall(r"^\s*#\s*include\s+(\S+)", read(path), re.MULTILINE)


def cpp_functions(path: Path) -> Iterator[Function]:
    """Function bodies: the outermost braces that follow a parenthesis, however they end.

    Namespaces, types, enums and initializers are no functions; a lambda belongs to what it is in.
    """
    code = bare_cpp(path)
    functions: list[bool] = []  # of the open braces: is it a function's?
    start = head = 0
    for match in re.finditer(r"[{};]", code):
        if match[0] == "{":
            before = code[head : match.start()]
            type_or_space = re.search(r"\b(namespace|struct|class|union|enum)\b[^()]*$", before)
            functions.append(not type_or_space and ")" in before)
            if functions[-1] and sum(functions) == 1:
                start = head + len(before) - len(before.lstrip())
        elif match[0] == "}" and functions and functions.pop() and not any(functions):
            name = re.search(r"([\w~]+)\s*\(", code[start:])
            line = code.count("\n", 0, start) + 1
            length = code.count("\n", start, match.end()) + 1
            yield Function(name[1] if name else "?", line, length)
        head = match.end()
