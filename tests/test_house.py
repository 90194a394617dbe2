"""The taste, executable: what CONTRIBUTING.md says of the tree, checked over every file of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builds import ROOT, output, tool
from house import (
    bare_cpp,
    cpp_functions,
    files,
    includes,
    python_functions,
    read,
    text_files,
    tree,
    under,
)

import gossamer
from gossamer import ops, reference, testing

PACKAGE = Path("python/gossamer")
CPP = under("csrc", ".cpp", ".h") + under("tests", ".cpp", ".h")
PYTHON = [path for path in files() if path.suffix == ".py"]
MODULES = [path for path in PYTHON if path.is_relative_to(PACKAGE)]
# All kernels but the table of them, and the loops that only measure what bounds them.
STEMS = sorted(
    path.stem for path in under("csrc/kernels", ".cpp") if path.stem not in ("table", "ceilings")
)


def listed(found: list[str]) -> str:
    return "\n".join(found)


# Who may include, import or name what.

PLAIN_C = {"<math.h>", "<stdint.h>", "<string.h>"}
# Arrows point one way: simd <- kernels <- isa <- the C ABI <- torch, Python.
INCLUDES = {
    "csrc/simd": {*PLAIN_C, "<immintrin.h>", "<arm_neon.h>", '"layout.h"', '"simd/quad.h"'},
    "csrc/kernels": {
        *(*PLAIN_C, '"kernels.h"', '"epilogue.h"', '"quantize.h"', '"lanes.h"', '"pixels.h"'),
        *('"blocks.h"', '"planes.h"', '"plane_writer.h"', '"depthwise.h"', '"winograd.h"'),
        *('"winograd_maps.h"', "GOSSAMER_SIMD"),
    },
    "csrc/include": {"<stdint.h>"},
    "csrc/torch": {
        *('"include/gossamer.h"', '"torch/shim.h"', '"torch/tensor.h"', '"torch/operands.h"'),
        '"torch/operators.h"',
    },
    "csrc/python": {'"gossamer.h"', "<sys/auxv.h>", "<pybind11/pybind11.h>", "<pybind11/stl.h>"},
}


@pytest.mark.parametrize("folder", INCLUDES)
def test_includes_point_one_way(folder: str) -> None:
    wrong = []
    for path in under(folder, ".cpp", ".h"):
        for name in includes(path):
            # A standard header without a dot is C++'s: fine where code is compiled once.
            standard = re.fullmatch(r"<(\w+|std(int|def)\.h)>", name)
            allowed = standard and folder in ("csrc/torch", "csrc/python")
            if name not in INCLUDES[folder] and not allowed:
                wrong.append(f"{path} includes {name}")
    assert not wrong, listed(wrong)


@pytest.mark.parametrize(
    ("what", "pattern", "home"),
    [
        ("intrinsics", r"\b(_mm\d*_\w+|__m\d+\w*|v\w+q_[fsu]\d+)\b|intrin\.h|neon\.h", "csrc/simd"),
        ("torch", r"\b(Aten|AOTI|aoti_torch_|torch_|c10::|at::)\w*|\b(torch|ATen)/", "csrc/torch"),
        ("Python", r"\b(pybind11|Py[A-Z]\w+)|\bPython\.h", "csrc/python"),
    ],
    ids=["intrinsics", "torch", "python"],
)
def test_one_folder_knows(what: str, pattern: str, home: str) -> None:
    found = []
    for path in under("csrc", ".cpp", ".h"):
        match = re.search(pattern, " ".join([*includes(path), bare_cpp(path)]))
        if match and not path.is_relative_to(home):
            found.append(f"{path} names {match[0]}, but only {home} knows {what}")
    assert not found, listed(found)


def test_kernels_use_nothing_that_every_isa_would_instantiate() -> None:
    banned = re.compile(r"\bstd::|\bthrow\b|\btry\b|\bnew\b|\bdelete\b|\bmalloc\b|\bthread_local\b")
    found = [
        f"{path}: {match[0]}"
        for path in under("csrc/kernels") + under("csrc/simd")
        for match in banned.finditer(bare_cpp(path))
    ]
    assert not found, listed(found)


# Each module (or subpackage) imports from those before it only; what is not listed may be imported
# by any.
ORDER = (
    ("formats", "ops", "obs"),
    ("packed",),
    ("layers",),
    ("calibrate",),
    ("compress",),
    ("prune", "distill", "checkpoint", "fuse", "gptq", "qat", "smooth"),
    ("integrations",),
    ("compare",),
    ("loop",),
    ("train",),
    ("tasks",),
    ("calls",),
    ("recipe",),
    ("bench",),
    ("road",),
    ("plots",),
    ("demo",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def dotted(path: Path) -> tuple[str, ...]:
    """gossamer, packed, index for python/gossamer/packed/index.py; __init__ is its package."""
    parts = path.relative_to("python").with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> set[str]:
    """Which of the package's modules and subpackages a module imports, anywhere in it."""
    package = dotted(path) if path.stem == "__init__" else dotted(path)[:-1]
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return {name[1] for name in found if name[0] == "gossamer" and len(name) > 1}


def test_imports_point_one_way() -> None:
    # gossamer/__init__.py gathers the public names: it stands above all.
    ranked = {path: dotted(path)[1] for path in MODULES if len(dotted(path)) > 1}
    wrong = [
        f"{path} imports {name}, which stands above it"
        for path, own in ranked.items()
        for name in sorted(imported(path))
        if own in RANK and RANK.get(name, -1) >= RANK[own] and name != own
    ]
    assert not wrong, listed(wrong)


def test_only_ops_names_the_operators() -> None:
    found = [
        str(path)
        for path in [*MODULES, *under("bench", ".py"), *under("examples", ".py")]
        if path != PACKAGE / "ops.py" and "torch.ops.gossamer" in read(path)
    ]
    assert not found, f"call gossamer.ops instead, in {listed(found)}"


KNOW_LAYOUTS = ("packed", "ops", "triton")


def test_only_packed_knows_layouts() -> None:
    # Buffers and index functions that are called so nowhere else; ops hands them through by name.
    layout = {"panels", "wsum", "block_columns", "chunk_rows", "cell_count", "check_index"}
    found = []
    for path in [*MODULES, *under("examples", ".py")]:
        # Kernels read what ops hands them.
        if path.is_relative_to(PACKAGE) and dotted(path)[1:2] in ((n,) for n in KNOW_LAYOUTS):
            continue
        for node in ast.walk(tree(path)):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            name = node.value if isinstance(node, ast.Constant) else name
            if isinstance(name, str) and name in layout:
                found.append(f"{path}:{node.lineno} names {name}")
    assert not found, listed(found)


# Sizes and names.


def test_files_are_short() -> None:
    code = [path for path in text_files() if path.suffix not in (".md", ".json")]
    limits = {p: 300 if p.is_relative_to("csrc/kernels") else 400 for p in code}
    lengths = {path: len(read(path).splitlines()) for path in code}
    found = [f"{p} has {n} lines, the limit is {limits[p]}" for p, n in lengths.items()]
    assert all(lengths[p] <= limits[p] for p in code), listed(
        [line for line, p in zip(found, code, strict=True) if lengths[p] > limits[p]]
    )


def test_functions_are_short() -> None:
    found = [
        f"{path}:{function.line}: {function.name} has {function.length} lines, the limit is 60"
        for path in PYTHON + CPP
        for function in (python_functions if path.suffix == ".py" else cpp_functions)(path)
        if function.length > 60
    ]
    assert not found, listed(found)


def test_the_brace_scan_sees_functions() -> None:
    names = {f.name: f.length for f in cpp_functions(Path("csrc/kernels/spmm.cpp"))}
    assert {"outputs", "cell", "chunks_of", "spmm"} <= names.keys()
    assert names["spmm"] > 10
    assert {"gemm", "quantize_rows"} <= {f.name for f in cpp_functions(Path("csrc/torch/ops.cpp"))}


BANNED = re.compile(r"^(utils?|helpers?|common|misc|manager|impl2)$")


def words(name: str) -> list[str]:
    """The parts of snake_case and CamelCase."""
    return re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])", name)


def defined_names(path: Path) -> set[str]:
    names = {path.stem}
    if path.suffix == ".py":
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    elif path.suffix in (".cpp", ".h"):
        names |= set(re.findall(r"\b[A-Za-z_]\w+\b", bare_cpp(path)))
    return names


def test_names_say_something() -> None:
    found = [
        f"{path}: {name}"
        for path in files()
        for name in sorted(defined_names(path))
        if name.startswith("new_") or any(BANNED.match(word.lower()) for word in words(name))
    ]
    assert not found, listed(found)


# One stem, five places; the public names.


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_is_in_its_places(stem: str) -> None:
    assert callable(getattr(ops, stem))
    assert callable(getattr(reference, stem))
    assert testing.CASES[stem]
    assert re.search(rf"\* {stem};", read(Path("csrc/kernels.h")))
    assert re.search(rf'{{"{stem}",\s+"{stem}\(', read(Path("csrc/torch/ops.cpp")))
    assert f"gossamer_{stem}(" in read(Path("csrc/include/gossamer.h"))
    assert f"csrc/kernels/{stem}.cpp" in read(Path("CMakeLists.txt"))
    assert read(Path(f"csrc/kernels/{stem}.cpp")).startswith(f"// {stem}: ")


def simd_names(path: Path) -> set[str]:
    """The functions and constants of a simd header that kernels may use: not a twin's own parts."""
    code = bare_cpp(path)
    functions = re.findall(r"^static inline [\w ]+ (\w+)\(", code, re.MULTILINE)
    return {*functions, *re.findall(r"^constexpr \w+ (\w+) =", code, re.MULTILINE)}


# Functions of base.h that serve only the others there.
BASE_ONLY = {"each", "cast", "from_bits", "to_bits", "widen", "narrow"}
CONTRACT = simd_names(Path("csrc/simd/base.h")) - BASE_ONLY


# What the x86 headers share is none of its own.
QUAD = Path("csrc/simd/quad.h")
SIMD = [path for path in under("csrc/simd", ".h") if path != QUAD]


@pytest.mark.parametrize("path", SIMD, ids=lambda path: path.stem)
def test_every_isa_keeps_the_whole_contract(path: Path) -> None:
    assert len(CONTRACT) > 30
    shared = simd_names(QUAD) if '"simd/quad.h"' in includes(path) else set()
    assert simd_names(path) | shared >= CONTRACT


def test_every_function_of_the_contract_has_a_check() -> None:
    constants = {name for name in CONTRACT if re.match("k[A-Z]", name)}
    checked = set(re.findall(r"(\w+)(?:<\w+>)?\(", bare_cpp(Path("tests/native/contract.cpp"))))
    assert checked >= CONTRACT - constants, CONTRACT - constants - checked


def test_nothing_has_a_case_or_an_operator_without_a_kernel() -> None:
    operators = re.findall(r'^ *\{"(\w+)",\s+"', read(Path("csrc/torch/ops.cpp")), re.MULTILINE)
    assert {operators.pop(), operators.pop()} == {"chain", "chain_keep"}  # calls of the others
    in_place = {name for name in operators if name.endswith("_")}
    assert sorted(testing.CASES) == sorted(set(operators) - in_place) == STEMS
    assert {name.rstrip("_") for name in in_place} <= set(STEMS)


PUBLIC = (
    "Comparison Conv2d Cosine Cubic DIST Distiller Format Hint History Int4 Int8 KD Linear "
    "OneShot Polynomial Pruner Relation Report Sensitivity Sparse SparseInt8 SquareHead "
    "calibrate compare compress_ fit fuse gptq_ integrations isa load_ prune_ qat_ save "
    "sensitivity slim_ smooth_"
)


def test_the_public_names_are_these() -> None:
    assert " ".join(sorted(gossamer.__all__)) == PUBLIC
    assert all(hasattr(gossamer, name) for name in gossamer.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(dotted(path)))
def test_public_functions_are_documented_and_typed(path: Path) -> None:
    module = importlib.import_module(".".join(dotted(path)))
    assert module.__doc__, f"{path} says nothing about itself"
    found = []
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        # getdoc inherits: a method may leave the word to the class it comes from.
        inside = vars(member).items() if inspect.isclass(member) else ()
        methods = [
            (f"{name}.{key}", getattr(member, key))
            for key, value in inside
            if not key.startswith("_") and (callable(value) or isinstance(value, property))
        ]
        found += [
            f"{path}: {n} has no docstring"
            for n, m in [(name, member), *methods]
            if (callable(m) or isinstance(m, property)) and not inspect.getdoc(m)
        ]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                continue  # its arguments are Triton's: tiles and scalars of any type
            bare = [a.arg for a in arguments if not a.annotation and a.arg not in ("self", "cls")]
            if bare or not node.returns:
                found.append(f"{path}:{node.lineno}: {node.name} lacks types: {bare or 'result'}")
    assert not found, listed(found)


# What is written.


def test_paths_that_are_named_exist() -> None:
    folders = sorted({path.parts[0] for path in files() if len(path.parts) > 1} - {".hypothesis"})
    pattern = rf"(?<![\w/.<>*-])(?:{'|'.join(map(re.escape, folders))})/[\w./*<>-]*\w"
    found = []
    for path in text_files():
        text = read(path)
        names = {m[0] for m in re.finditer(pattern, text) if not re.search(r"[*<>]", m[0])}
        links = set()
        if path.suffix == ".md":
            links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
        found += [f"{path} names {name}" for name in sorted(names) if not (ROOT / name).exists()]
        found += [
            f"{path} links {link}"
            for link in sorted(links)
            if not (ROOT / path.parent / link).exists()
        ]
    assert not found, listed(found)


def test_nothing_depends_on_one_machine() -> None:
    machine = r"(?<![\w.:/~-])/(?:home|root|work|tmp|opt|mnt|Users|usr/local|var)/\w+"
    hosts = r"\b(?:pypi|pythonhosted|pytorch|debian|npmjs)\.(?:org|com)/|--(?:extra-)?index-url"
    found = [
        f"{path}: {match[0]}"
        for path in text_files()
        if path.name != Path(__file__).name
        for match in re.finditer(f"{machine}|{hosts}", read(path))
    ]
    assert not found, listed(found)


# Tools, pinned in pyproject.toml.


@pytest.mark.parametrize(
    "command",
    ["ruff check --output-format concise", "ruff format --check --output-format concise", "mypy"],
)
def test_python_is_clean(command: str) -> None:
    output(sys.executable, "-m", *command.split(), cwd=ROOT)


def test_cpp_is_formatted() -> None:
    command = [tool("clang-format"), "--dry-run", "-Werror", *map(str, CPP)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wrong = sorted(set(re.findall(r"^([^:\s]+):\d+:\d+: error", done.stderr, re.MULTILINE)))
    assert not wrong, f"run clang-format -i on {' '.join(wrong)}"
    assert done.returncode == 0, done.stderr
