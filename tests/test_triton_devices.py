"""Devices: what is chosen, what moves, what is refused, and what an old GPU runs."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from builds import output
from fused_nets import EVERY_STATIC, Chain, images, static
from products import STEMS, packed_case, static_case
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gossamer as gs
from gossamer import ops, reference, testing
from gossamer.packed import pack
from gossamer.testing import Case

pytest.importorskip("triton")
from gossamer import triton as kernels
from gossamer.triton import tiles

CASE = Case("devices", 3, 100, 33, density=0.3, block=4)


def laid_out(stem: str) -> Any:
    """As a GPU has it, on the CPU."""
    packed = copy.deepcopy(packed_case(stem, CASE))
    packed._arrange(True)
    return packed


@pytest.mark.parametrize("stem", STEMS)
def test_a_state_dict_is_the_same_on_both_devices(stem: str) -> None:
    cpu, gpu = packed_case(stem, CASE), laid_out(stem)
    want, got = cpu.state_dict(), gpu.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    gpu._apply(lambda tensor: tensor.clone())  # back on a CPU, in its order
    assert all(b.is_contiguous() for b in gpu.buffers())
    assert torch.equal(gpu.matmul(CASE.x()), cpu.matmul(CASE.x()))
    again = laid_out(stem)
    again.load_state_dict(want)
    assert torch.equal(again.unpack(), cpu.unpack())


def test_panels_are_laid_out_by_rows_and_read_without_a_copy() -> None:
    packed = laid_out("gemm_int8")
    by_rows = sys.modules["gossamer.triton.gemm_int8"].by_rows
    assert by_rows(packed.panels).data_ptr() == packed.panels.data_ptr()
    assert by_rows(packed.panels).is_contiguous()
    assert torch.equal(by_rows(packed.panels), packed._integers())


def test_the_bitmap_finds_each_entry() -> None:
    for stem, unit in (("spmm", 1), ("spmm_int8", 4)):
        packed = laid_out(stem)
        bits, first = packed.bitmap.unbind(-1)
        stored = (bits[..., None] >> torch.arange(32)) & 1 > 0
        entry = (first[..., None] + stored.cumsum(-1) - 1)[stored]
        assert packed.bitmap.shape == (33, -(-100 // (32 * unit)), 2)
        dense = torch.zeros(*stored.shape, *packed.values.shape[1:])
        dense[stored] = packed.values[entry].float()
        dense = dense.flatten(1)[:, :100]
        if unit == 4:
            dense = dense * packed.scale[:, None]
        assert torch.equal(dense, packed.unpack())


def test_an_index_that_lists_a_place_twice_has_no_bitmap() -> None:
    packed: Any = pack(torch.ones(2, 3), gs.Sparse())
    packed.columns[1] = 0
    with pytest.raises(ValueError, match=r"twice or out of order.*pack the weight again"):
        packed._arrange(True)


def test_devices_that_do_not_go_together_are_a_sentence() -> None:
    packed, sparse = packed_case("gemm_int8", CASE), copy.deepcopy(packed_case("spmm", CASE))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 100, device="cuda")
        with pytest.raises(
            RuntimeError, match=r"x is on cuda:0 and the packed weight on cpu: move"
        ):
            packed.matmul(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, buffer in sparse._buffers.items():
            sparse._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        with pytest.raises(RuntimeError, match=r"moved one by one: .* layer.cuda\(\)"):
            sparse.matmul(torch.empty(3, 100, device="cuda"))


def test_images_on_two_devices_are_a_sentence() -> None:
    affine, conv = torch.tensor([0.1, 7.0]), [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    for stem in ("gemm_int8", "spmm_int8"):
        packed = static_case(stem, CASE)
        with FakeTensorMode(allow_non_fake_inputs=True):
            q = torch.empty(1, 25, 3, 3, 4, device="cuda", dtype=torch.uint8)
            with pytest.raises(RuntimeError, match="x is on cuda:0 and the packed weight on cpu"):
                packed.convolve(q, None, 0, conv, affine)
            with pytest.raises(RuntimeError, match="x is on cuda:0"):
                ops.unblock(q, affine, 100)
            with pytest.raises(RuntimeError, match="x is on cuda:0"):
                ops.block(torch.empty(1, 3, 4, 4, device="cuda"), affine)


def test_a_missing_triton_is_a_sentence() -> None:
    code = (
        "import sys, torch, gossamer as gs\n"
        "sys.modules['triton'] = None\n"
        "try:\n    import gossamer.triton\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "`pip install triton`" in output(sys.executable, "-c", code)


# GPUs without tensor cores for bytes.


def test_an_old_gpu_says_what_it_runs() -> None:
    sentence = r"compute capability 7.0, .* come with 7.5: .* floats"
    old = mock.patch.object(kernels, "chip", lambda device: tiles.chip_of("cuda", 70))
    with old, pytest.warns(UserWarning, match=sentence):
        assert not kernels.multiplies_bytes(torch.device("cuda:0"))
    with mock.patch.object(kernels, "chip", lambda device: tiles.chip_of("cuda", 75)):
        assert kernels.multiplies_bytes(torch.device("cuda:0"))


def as_on_an_old_gpu() -> Any:
    return mock.patch.multiple(
        ops, _on_gpu=lambda x, weight: True, _gpu=lambda device: kernels.older
    )


@pytest.mark.parametrize("stem", STEMS)
def test_an_old_gpu_multiplies_the_same_weight(stem: str) -> None:
    packed, x, bias = laid_out(stem), CASE.x(), CASE.bias()
    with as_on_an_old_gpu():
        y = packed.matmul(x, bias, "relu")
    torch.testing.assert_close(y, torch.relu(x @ packed.unpack().T + bias))
    conv = nn.Conv2d(5, 6, 3, 2, 1)
    layer = gs.Conv2d.from_dense(conv, testing.FORMATS[stem])
    images = torch.randn(2, 5, 7, 8)
    want = layer.to_dense()(images)
    layer.packed._arrange(True)
    with as_on_an_old_gpu():
        torch.testing.assert_close(layer(images), want)


def test_an_old_gpu_has_gradients_and_rows() -> None:
    packed, x, dy = laid_out("spmm"), CASE.x(), CASE.dy()
    index = (packed.columns, packed.rows, packed.cells, 33, 100)
    want = ops.sddmm(x, dy, *index)
    with as_on_an_old_gpu():
        got = ops.sddmm(x, dy, *index, None, packed.bitmap, packed.steps)
        torch.testing.assert_close(got, want)
        assert torch.equal(ops.quantize_rows(x)[0], reference.quantize_rows(x)[0])
        assert ops.im2col(torch.ones(1, 3, 4, 4), [2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 1]).shape == (
            9,
            16,
        )


@EVERY_STATIC
def test_an_old_gpu_runs_a_fused_model(format: Any) -> None:
    torch.manual_seed(0)
    x = images()
    fused: Any = gs.fuse(static(Chain(), x, format), x)
    with torch.no_grad():
        want = fused(x)
        for module in fused.modules():
            if hasattr(module, "_arrange"):
                module._arrange(True)
        with as_on_an_old_gpu():
            got = fused(x)
    assert (got - want).norm() < 0.02 * want.norm()  # bytes may be one apart


# Tiles.


def test_a_tile_fits_the_shared_memory_of_its_chip() -> None:
    table = sys.modules["gossamer.triton.gemm_int8"].TILES
    for capability, kilobytes in tiles.SHARED.items():
        on = tiles.chip_of("cuda", capability)
        for m in (1, 64, 4096):
            tile = tiles.choose(table, m, 4096, on, 1, 1)
            used = tile.stages * (tile.rows + tile.outputs) * tile.inputs
            assert tile.stages >= 1 and used <= kilobytes * 1024
    assert tiles.choose(table, 4096, 4096, tiles.chip_of("hip", 0), 1, 1).stages == 2


def test_few_rows_get_low_tiles_and_many_rows_high_ones() -> None:
    table = sys.modules["gossamer.triton.gemm_int8"].TILES
    on = tiles.chip_of("cuda", 90)
    rows = [tiles.choose(table, m, 4096, on, 1, 1).rows for m in (1, 16, 64, 128, 256, 1024, 8192)]
    assert rows == sorted(rows) and rows[0] == 16 and rows[-1] == 128
