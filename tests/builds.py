"""Compilers and CMake, for the tests that build something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    """The path of a build tool: beside Python, where the test extra installs it, or on PATH."""
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert found, f"{name} is missing: install the package with its test extra, or {name} itself"
    return found


def output(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a command prints on stdout; a failure shows all that it printed."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    shown = " ".join(map(str, command))
    assert done.returncode == 0, (
        f"{shown}\nended with {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def build(source: Path, folder: Path, *options: str, targets: tuple[str, ...] = ("all",)) -> Path:
    """Configures the CMake project `source` in `folder`, builds it and returns the folder."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    output(tool("cmake"), "-G", "Ninja", ninja, "-S", source, "-B", folder, *options)
    output(tool("cmake"), "--build", folder, "--target", *targets)
    return folder
