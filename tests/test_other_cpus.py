"""The tables of CPUs that this one need not be: tests/native, emulated. No speed is seen here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import ROOT, build, output, tool

from gossamer import _C

NATIVE = ROOT / "tests" / "native"
PLAIN = "-DGOSSAMER_SANITIZE=OFF"  # guard pages remain


def need(present: bool, packages: str) -> None:
    """Skips the test on a user's machine; fails it where .ci/run has installed the packages."""
    sentence = f"emulation needs Debian's {packages}: apt-get install {packages}"
    if not present:
        required = os.environ.get("GOSSAMER_EMULATION") == "required"
        pytest.fail(sentence) if required else pytest.skip(sentence)


def bits(report: str) -> str:
    """The number that stands for all int8 results of a run."""
    return re.search(r"int8 bits (\w{16})", report)[1]


@pytest.fixture(scope="module")
def newer_x86(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build whose VNNI tables are made of SIMDe and AVX2."""
    if "avx2" not in _C.isas():
        pytest.skip("a CPU with AVX2 emulates those with VNNI: this one has not even that")
    include = (tool("c++"), "-E", "-x", "c++", "-include", "simde/simde-common.h", os.devnull)
    need(subprocess.run(include, capture_output=True).returncode == 0, "libsimde-dev")
    folder = tmp_path_factory.mktemp("newer_x86")
    return build(NATIVE, folder, PLAIN, "-DGOSSAMER_EMULATE=ON", targets=("native",))


@pytest.fixture(scope="module")
def newer_x86_report(newer_x86: Path) -> str:
    return output(newer_x86 / "native")


@pytest.fixture(scope="module")
def aarch64_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler, machine = "aarch64-linux-gnu-g++", "qemu-aarch64"
    found = shutil.which(compiler) and shutil.which(machine)
    need(bool(found), "g++-aarch64-linux-gnu qemu-user")
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    folder = tmp_path_factory.mktemp("aarch64")
    build(NATIVE, folder, PLAIN, *target, f"-DCMAKE_CXX_COMPILER={compiler}", targets=("native",))
    return output(machine, "-L", "/usr/aarch64-linux-gnu", folder / "native")


def test_the_vnni_tables_are_right_on_a_cpu_without_vnni(newer_x86_report: str) -> None:
    assert newer_x86_report.split(" on ")[1].split() == ["avx512vnni", "avxvnni", "avx2", "base"]


def test_that_run_used_no_instruction_beyond_avx2(newer_x86: Path) -> None:
    for binary in ("native", "gossamer/libgossamer.so"):
        code = output(tool("objdump"), "-d", "--no-show-raw-insn", newer_x86 / binary)
        assert "%ymm" in code
        newer = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|[23]\d)|vpdp")
        beyond = next(filter(newer.search, code.splitlines()), None)
        assert not beyond, f"{binary}: {beyond}"


def test_the_neon_table_is_right(aarch64_report: str) -> None:
    assert aarch64_report.split(" on ")[1].split() == ["neon", "base"]


def test_int8_bits_are_those_of_every_architecture(
    newer_x86_report: str, aarch64_report: str
) -> None:
    assert bits(newer_x86_report) == bits(aarch64_report)
