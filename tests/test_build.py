"""What was built: a C++ program finds it, and the libraries link and export what they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from builds import ROOT, build, output, tool

import gossamer as gs
from gossamer import packed
from gossamer.testing import CASES

M, K, N = 70, 1000, 200


def library(name: str) -> Path:
    """An installed library; an editable install has it in the second folder of the package."""
    found = [Path(folder, "lib", name) for folder in gs.__path__]
    return next(path for path in found if path.exists())


def write_weight(folder: Path, name: str, weight: packed.Packed) -> None:
    for buffer, tensor in weight.named_buffers():
        (folder / f"{name}.{buffer}").write_bytes(tensor.numpy().tobytes())


def test_a_cpp_program_uses_the_installed_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, bias, weight = torch.randn(M, K), torch.randn(N), torch.randn(N, K)
    weight *= torch.rand(N, -(-K // 4)).lt(0.2).repeat_interleave(4, 1)[:, :K]
    weights = {
        "int8": packed.pack(weight, gs.Int8()),
        "sparse": packed.pack(weight, gs.SparseInt8()),
    }
    (tmp_path / "x").write_bytes(x.numpy().tobytes())
    (tmp_path / "bias").write_bytes(bias.numpy().tobytes())
    for name, w in weights.items():
        write_weight(tmp_path, name, w)

    prefix = f"-DCMAKE_PREFIX_PATH={';'.join(gs.__path__)}"
    folder = build(ROOT / "tests" / "consumer", tmp_path / "build", prefix)
    *numbers, index, deep, isa = output(
        folder / "consumer", tmp_path, str(M), str(K), str(N)
    ).splitlines()

    got = torch.tensor([float.fromhex(number) for number in numbers]).reshape(2, M, N)
    for y, w in zip(got, weights.values(), strict=True):
        assert torch.equal(y, w.matmul(x, bias, "gelu"))
    assert index.startswith("index: ") and "lies outside its cell" in index
    assert deep == "deep: k=65537 overflows int32 (limit 65536): split the layer"
    assert isa == f"isa: {gs.isa()}, version: {gs.__version__}"


@pytest.mark.parametrize("absent", ["torch", "python", "gomp", "omp", "iomp5"])
def test_libgossamer_links_nothing_but_the_system(absent: str) -> None:
    assert f"lib{absent}" not in output(tool("readelf"), "-d", library("libgossamer.so"))


def test_the_operators_find_their_libraries() -> None:
    dynamic = output(tool("readelf"), "-d", library("libgossamer_torch.so"))
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert {"libtorch_cpu.so", "libgossamer.so"} <= needed
    assert not any(re.match(r"lib(python|gomp|c10|torch\.)", name) for name in needed)
    assert re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic) == ["$ORIGIN"]


@pytest.mark.parametrize("name", ["libgossamer.so", "libgossamer_torch.so"])
def test_only_the_c_abi_is_exported(name: str) -> None:
    symbols = output(tool("nm"), "-D", "-C", "--defined-only", library(name)).splitlines()
    # Weak ones are instances of std templates, the same in every library.
    strong = {line.split(" ", 2)[2] for line in symbols if line.split(" ", 2)[1] not in "WVu"}
    weak = [line.split(" ", 2)[2] for line in symbols if line.split(" ", 2)[1] in "WVu"]
    assert all(re.fullmatch(r"gossamer_\w+", symbol) for symbol in strong), strong
    assert all("std::" in symbol and "gossamer" not in symbol for symbol in weak), weak
    declared = set(
        re.findall(r"\b(gossamer_\w+)\(", (ROOT / "csrc/include/gossamer.h").read_text())
    )
    assert strong == (declared if name == "libgossamer.so" else {"gossamer_drop_chain"})


@pytest.fixture(scope="module")
def kernel_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The object files of every Isa; at -O1, which inlines less than -O3: no symbol is missing."""
    folder = tmp_path_factory.mktemp("objects")
    build(ROOT / "tests" / "native", folder, "-DGOSSAMER_SANITIZE=OFF", targets=("gossamer",))
    return sorted(folder.glob("gossamer/CMakeFiles/kernels_*.dir/**/*.o"))


def test_no_isa_leaks_code_into_another(kernel_objects: list[Path]) -> None:
    # Of equal weak symbols the linker keeps one: an AVX-512 copy could serve an AVX2 host.
    assert {path.stem for path in kernel_objects} >= {f"{stem}.cpp" for stem in CASES}
    for path in kernel_objects:
        isa = path.parts[-4].removeprefix("kernels_").removesuffix(".dir")
        for line in output(tool("nm"), "-C", path).splitlines():
            kind, symbol = re.fullmatch(r"[0-9a-f]* +(\w) (.*)", line).groups()
            if kind == "U":
                # memcpy and the like: nothing of C++, so neither exceptions nor std.
                own = symbol.startswith(f"gossamer::{isa}::")
                assert own or re.fullmatch(r"[a-z]\w*", symbol), f"{path} needs {symbol}"
            elif kind not in "trdbn":
                assert f"gossamer::{isa}::" in symbol, f"{path} shares {kind} {symbol}"
