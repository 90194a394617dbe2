"""The operators in torch: fakes, refusals, gradients, the GIL, and the choice of the Isa."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from products import INT8_STEMS, STEMS, packed_case, same_bits, static_case
from torch import Tensor

import gossamer as gs
from gossamer import _C, ops, reference, testing
from gossamer.packed import Packed, pack
from gossamer.testing import CASES, FORMATS, Case, ImageCase

CASE = Case("ops", 6, 24, 20)
IMAGE = ImageCase("ops", (2, 6, 5, 7), (3, 2), stride=(2, 1), sides=(1, 1, 0, 1))


def arguments(packed: Packed, x: Tensor, bias: Tensor | None, conv: list[int] | None) -> tuple:
    """What the operator of a packed weight is called with."""
    weight = list(packed.buffers())
    more = {"spmm": [packed.n, None], "gemm_int8": [None], "spmm_int8": [None]}.get(
        packed.kernel, []
    )
    if hasattr(packed, "x_affine"):
        more = []
    return (x, *weight, *more, bias, packed.k, 2, conv)


def operator_of(stem: str) -> Any:
    return getattr(ops, f"_{stem}")


# What compilers are told.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_opcheck_of_products(stem: str, dtype: torch.dtype) -> None:
    packed, bias = packed_case(stem, CASE), CASE.bias()
    x = CASE.x(dtype)
    for rows in (x, x[0], x.view(2, 3, 24), x[:0], x[:1]):
        torch.library.opcheck(operator_of(stem), arguments(packed, rows, bias, None))
    torch.library.opcheck(operator_of(stem), arguments(packed, x, None, None))


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("stem", STEMS)
def test_opcheck_of_convolutions(stem: str, planar: bool) -> None:
    for case in (IMAGE, *CASES["im2col"]):
        columns = case.kernel[0] * case.kernel[1] * -(-case.shape[1] // 4) * 4
        packed = pack(Case("conv", 1, columns, 5).weight(), FORMATS[stem])
        x = case.x().contiguous(memory_format=torch.channels_last)
        call = arguments(packed, x, None, case.conv(planar))
        torch.library.opcheck(
            operator_of(stem), call, test_utils=("test_schema", "test_faketensor")
        )
    call = arguments(packed_case(stem, Case("conv", 1, 48, 5)), IMAGE.x(), None, IMAGE.conv(planar))
    call = (call[0].contiguous(memory_format=torch.channels_last), *call[1:])
    torch.library.opcheck(operator_of(stem), call)


def test_opcheck_of_sums_in_place() -> None:
    packed = packed_case("spmm", CASE)
    x, y = CASE.x(), packed.matmul(CASE.x())
    weight = list(packed.buffers())
    torch.library.opcheck(ops._spmm_, (x, *weight, CASE.n, y, CASE.bias(), CASE.k, 1, None))


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_opcheck_of_static_products(stem: str) -> None:
    packed = static_case(stem, CASE)
    for rows in (CASE.x(), CASE.x()[0], CASE.x()[:0]):
        torch.library.opcheck(operator_of(stem), arguments(packed, rows, CASE.bias(), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_of_the_others(dtype: torch.dtype) -> None:
    x = CASE.x(dtype)
    for rows in (x, x[0], x.view(2, 3, 24), x[:0]):
        for affine in (None, torch.tensor([0.1, 7.0])):
            torch.library.opcheck(operator_of("quantize_rows"), (rows, affine))
    image = IMAGE.x(dtype).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(operator_of("im2col"), (image, IMAGE.conv()))


# Refusals.


def every_call(stem: str) -> Callable[[Tensor], object]:
    if stem == "quantize_rows":
        return ops.quantize_rows
    return packed_case(stem, CASE).matmul


@pytest.mark.parametrize("stem", [*STEMS, "quantize_rows"])
def test_wrong_dtypes_and_devices(stem: str) -> None:
    call = every_call(stem)
    for dtype in (torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(
            TypeError, match=f"x has dtype {dtype}: use float32, bfloat16 or float16"
        ):
            call(torch.zeros(2, 24).to(dtype))
    with pytest.raises(RuntimeError, match=r"x is on meta, but .* move x with x.cpu\(\)"):
        call(torch.zeros(2, 24, device="meta"))


@pytest.mark.parametrize("stem", STEMS)
def test_wrong_shapes(stem: str) -> None:
    packed = packed_case(stem, CASE)
    for shape in ((2, 23), (25,), (2, 1), (3, 0), (24, 2), ()):
        with pytest.raises(RuntimeError, match=r"x of shape .* must end with k=24"):
            packed.matmul(torch.zeros(shape))
    for bias in (torch.zeros(19), torch.zeros(20, 1), torch.zeros(20).double(), torch.zeros(())):
        with pytest.raises(
            RuntimeError, match=r"bias of shape .* must be float32 and of shape .20"
        ):
            packed.matmul(CASE.x(), bias)
    with pytest.raises(ValueError, match="activation 'tanh' is unknown: use one of none, relu"):
        packed.matmul(CASE.x(), activation="tanh")


@pytest.mark.parametrize("stem", STEMS)
def test_wrong_weights_and_numbers(stem: str) -> None:
    packed, op = packed_case(stem, CASE), operator_of(stem)
    good = arguments(packed, CASE.x(), None, None)
    for place, (name, buffer) in enumerate(packed.named_buffers(), 1):
        shorter = [buffer[1:]] if name not in ("scale", "rows") else []  # they say what n is
        for wrong in (buffer.double(), torch.stack([buffer, buffer], -1)[..., 0], *shorter):
            bad = list(good)
            bad[place] = wrong
            with pytest.raises(RuntimeError, match=r"gossamer: \w+ of shape"):
                op(*bad)
    k, activation, conv = -3, -2, -1
    for place, value, message in (
        (k, 25, "must end with k=25"),
        (k, -24, "must end with k=-24"),
        (activation, 6, "activation 6 is unknown"),
        (activation, -1, "activation -1 is unknown"),
        (conv, IMAGE.conv(), r"must be \(images, channels, height, width\)"),
    ):
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match=message):
            op(*bad)


def test_k_has_a_limit() -> None:
    k, x = 65537, torch.zeros(1, 65537)
    panels, scale = torch.zeros(1, 65544 // 4, 16, 4, dtype=torch.int8), torch.ones(1)
    sums, entries = torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.uint8)
    rows = torch.zeros(0, 2, dtype=torch.uint16)
    codes = torch.zeros(1, 65568 // 8, 16, 4, dtype=torch.uint8)
    cells = {unit: torch.zeros(_C.cell_count(1, k, unit) + 1, 2).int() for unit in (1, 4)}
    calls = {
        "gemm_int8": (x, panels, scale, sums, None, None, k),
        "gemm_w8": (x, panels, scale, None, k),
        "gemm_int4": (x, codes, codes[..., 0].char(), scale, sums, None, k),
        "spmm": (x, torch.zeros(0), entries, rows, cells[1], 1, None, None, k),
        "spmm_int8": (
            *(x, entries.view(0, 1).char(), entries, rows, cells[4], scale, sums),
            *(None, None, k),
        ),
    }
    for stem, call in calls.items():
        with pytest.raises(RuntimeError, match=r"k=65537 overflows int32 .limit 65536.: split"):
            operator_of(stem)(*call, 0, None)


@pytest.mark.parametrize("stem", STEMS)
def test_wrong_geometry(stem: str) -> None:
    packed = packed_case(stem, Case("conv", 1, 48, 5))
    x = IMAGE.x()
    for place, value, message in (
        (0, 2, "has 32 columns, the weight k=48"),
        (0, 0, "every size, stride and dilation must be at least 1"),
        (0, 2**62, "columns|must be at least 1"),
        (2, 0, "must be at least 1"),
        (3, -1, "must be at least 1"),
        (4, 0, "must be at least 1"),
        (5, -2, "must be at least 1"),
        (5, 99, "gives an output of"),
        (6, -4, "must be at least 1"),
        (8, -1, "must be at least 1"),
    ):
        conv = IMAGE.conv()
        conv[place] = value
        with pytest.raises(RuntimeError, match=message):
            packed.matmul(x, conv=conv)
    with pytest.raises(RuntimeError, match="conv needs 11 integers, got 10"):
        packed.matmul(x, conv=IMAGE.conv()[:10])
    # Contiguous images are for int8 weights and fp32 sparse ones; another layout is nobody's.
    for image in (x.mT,) if stem in (*INT8_STEMS, "spmm") else (x.mT, x):
        with pytest.raises(RuntimeError, match="channels_last"):
            operator_of(stem)(*arguments(packed, image, None, IMAGE.conv()))


def test_quantize_rows_needs_a_row() -> None:
    for x in (torch.zeros(3, 0), torch.zeros(0), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"k=0|at least one dimension"):
            ops.quantize_rows(x)
    assert [t.shape for t in ops.quantize_rows(torch.zeros(0, 5))] == [(0, 5), (0,), (0,)]


@pytest.mark.parametrize("stem", STEMS)
def test_a_refused_call_keeps_nothing(stem: str) -> None:
    good = arguments(pack(CASE.weight(), FORMATS[stem]), CASE.x(), CASE.bias(), None)
    tensors = [i for i, value in enumerate(good) if isinstance(value, Tensor)]
    for wrong in tensors:
        call = [v.clone() if isinstance(v, Tensor) else v for v in good]
        call[wrong] = torch.zeros(3, 3)
        alive = [weakref.ref(call[i]) for i in tensors]
        with pytest.raises(RuntimeError):
            operator_of(stem)(*call)
        del call
        gc.collect()
        assert not any(ref() is not None for ref in alive), wrong


# Gradients.


@pytest.mark.parametrize("stem", STEMS)
def test_a_gradient_is_a_sentence(stem: str) -> None:
    packed, x = packed_case(stem, CASE), CASE.x()
    want = packed.matmul(x)
    y = packed.matmul(x.clone().requires_grad_())
    assert y.requires_grad and same_bits(y.detach(), want)
    with pytest.raises(RuntimeError, match=r"inference only: train the dense .*torch.no_grad\(\)"):
        y.sum().backward()
    with torch.no_grad():
        assert not packed.matmul(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert same_bits(packed.matmul(x.clone()), want)


@pytest.mark.parametrize("compiled", [False, True])
def test_with_gradients_on_the_result_may_be_written_to(compiled: bool) -> None:
    packed, x = packed_case("gemm_int8", CASE), CASE.x()

    def call(x: Tensor) -> Tensor:
        return torch.relu_(packed.matmul(x))

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    y = run(x.clone().requires_grad_())
    assert same_bits(y.detach(), packed.matmul(x).relu())
    with pytest.raises(RuntimeError, match="inference only"):
        y.sum().backward()


def test_negated_views_are_read_negated() -> None:
    x = CASE.x()
    view = torch._neg_view(x)
    assert view.is_neg()
    for stem in STEMS:
        packed = packed_case(stem, CASE)
        assert same_bits(packed.matmul(view), packed.matmul(-x))


# The GIL.


def ran_meanwhile(work: Callable[[], object], times: int = 20000) -> bool:
    """Did the main thread get to run while another thread did `work`, up to that many times?

    Nothing takes the GIL from a thread here: the main thread runs only where `work` lets go of it,
    if the system wakes it before `work` is done, which is why there are many times.
    """
    main_ran: list[bool] = []
    ready = threading.Event()

    def other() -> None:
        ready.set()
        for _ in range(times):
            work()
            if main_ran:
                return
        seen.append(False)

    seen: list[bool] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    gc.collect()
    gc.disable()  # what it deletes may let go of the GIL
    try:
        thread = threading.Thread(target=other)
        thread.start()
        ready.wait()
        main_ran.append(True)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
        gc.enable()
    return not seen


def test_the_gil_is_free_while_a_kernel_runs() -> None:
    assert not ran_meanwhile(lambda: sum(range(1000)), 500)  # Python keeps it: the method works
    case = Case("gil", 128, 512, 512)
    x = case.x()
    for stem in STEMS:
        assert ran_meanwhile(partial(packed_case(stem, case).matmul, x)), stem
    assert ran_meanwhile(lambda: ops.quantize_rows(x))
    image = torch.zeros(2, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    assert ran_meanwhile(lambda: ops.im2col(image, [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]))


def test_raw_pointer_entries_let_go_of_the_gil_too() -> None:
    case = Case("raw", 128, 512, 512)
    x, y, packed = case.x(), torch.empty(128, 512), packed_case("gemm_int8", case)
    pointers = [packed.panels.data_ptr(), packed.scale.data_ptr(), packed.wsum.data_ptr()]
    assert ran_meanwhile(lambda: _C.gemm_int8(x.data_ptr(), 128, 512, *pointers, y.data_ptr(), 512))
    assert same_bits(y, packed.matmul(x))


# The Isa.


def run_python(code: str, isa: str) -> str:
    environment = {**os.environ, "GOSSAMER_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", [*_C.isas(), ""])
def test_the_environment_chooses_the_isa(name: str) -> None:
    assert run_python("import gossamer as gs; print(gs.isa())", name) == (name or _C.isas()[0])


# No CPU has both of these; avx9000 is nobody's.
ABSENT = [name for name in ("avxvnni", "neon", "avx9000") if name not in _C.isas()]


@pytest.mark.parametrize("name", ABSENT)
def test_an_isa_that_this_cpu_has_not_is_one_sentence(name: str) -> None:
    code = """
import torch, gossamer as gs
from gossamer import ops
for call in (gs.isa, lambda: ops.quantize_rows(torch.zeros(1, 8)), lambda: ops.im2col(
             torch.zeros(1, 4, 3, 3), [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1])):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""
    lines = run_python(code, name).splitlines()
    sentence = (
        f"GOSSAMER_ISA={name} names no instruction set that this CPU has: "
        f"use one of {', '.join(_C.isas())}"
    )
    assert lines[0] == f"ValueError {sentence}"
    assert lines[1] == lines[2] == f"RuntimeError gossamer: {sentence}"


def test_use_isa_knows_only_what_runs_here() -> None:
    before = gs.isa()
    for name in (*ABSENT, ""):
        with pytest.raises(ValueError, match=f"cannot run the instruction set '{name}'"):
            _C.use_isa(name)
    assert gs.isa() == before and _C.isas()[-1] == "base"
    with pytest.raises(KeyError), testing.isa("base"):
        assert gs.isa() == "base"
        raise KeyError
    assert gs.isa() == before


def test_a_denormal_half_is_read_when_torch_flushes_denormals(isa: str) -> None:
    x = torch.tensor([[3e-8, 1e-7]], dtype=torch.float16)
    want = reference.quantize_rows(x)[1]
    try:
        torch.set_flush_denormal(True)
        got = ops.quantize_rows(x)[1]
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, want)
