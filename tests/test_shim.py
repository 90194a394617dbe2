"""csrc/torch/shim.h, written by hand, declares exactly what torch's own header declares."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch
from builds import ROOT

SHIM = (ROOT / "csrc" / "torch" / "shim.h").read_text()
LINE = re.compile(r"^SHIM\((?P<type>\w+), (?P<name>\w+), \((?P<arguments>.*)\)\);$", re.MULTILINE)
NAMES = {match["name"] for match in LINE.finditer(SHIM)}


def compile_beside_torch(shim: str, folder: Path, names: set[str] = NAMES) -> str:
    """Compiles `shim` behind torch's header and returns the compiler's errors.

    torch's header comes first: each of our names must be there already (`decltype`), and declaring
    an extern "C" function again with other types is an error, as is another meaning of a handle.
    """
    (folder / "shim.h").write_text(shim)
    known = "".join(f"using known_{name} = decltype(&{name});\n" for name in sorted(names))
    source = folder / "both.cpp"
    source.write_text(f'#include <torch/csrc/stable/c/shim.h>\n{known}#include "shim.h"\n')
    done = subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", str(source)),
            # Only what torch 2.10 had: the oldest that the package supports.
            *("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch.__path__[0]}/include"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert (done.returncode == 0) == (" error: " not in done.stderr), done.stderr
    return done.stderr


def refused(errors: str) -> set[str]:
    """The functions that some error line is about."""
    lines = [line for line in errors.splitlines() if " error: " in line]
    return {name for name in NAMES if any(re.search(rf"\b{name}\b", line) for line in lines)}


def test_signatures_are_those_of_torch(tmp_path: Path) -> None:
    assert len(NAMES) == SHIM.count("\nSHIM("), "a SHIM line that CMake's stub would not see"
    errors = compile_beside_torch(SHIM, tmp_path)
    assert not errors, errors


def test_a_wrong_result_type_is_an_error_in_every_line(tmp_path: Path) -> None:
    wrong = LINE.sub(r"SHIM(double, \g<name>, (\g<arguments>));", SHIM)
    assert refused(compile_beside_torch(wrong, tmp_path)) == NAMES


def test_a_wrong_argument_is_an_error_in_every_line(tmp_path: Path) -> None:
    def change(match: re.Match[str]) -> str:
        arguments = match["arguments"]
        # The narrower or otherwise constant type that a slip of the pen would leave there.
        for right, slip in (("int64_t", "int32_t"), ("const char*", "char*"), ("*", "* const*")):
            if right in arguments:
                return match[0].replace(right, slip, 1)
        return match[0].replace("Handle ", "Handle* ", 1) if arguments else match[0]

    wrong = LINE.sub(change, SHIM)
    changed = {match["name"] for match in LINE.finditer(SHIM) if match["arguments"]}
    assert refused(compile_beside_torch(wrong, tmp_path)) == changed


def test_a_name_that_torch_has_not_is_an_error(tmp_path: Path) -> None:
    assert "torch_list_length" in compile_beside_torch(SHIM, tmp_path, {"torch_list_length"})
