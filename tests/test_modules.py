"""A packed layer is a plain module: copies, files, dtypes, threads, torch.compile, torch.export."""

from __future__ import annotations

import copy
import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from products import same_bits
from torch import nn

import gossamer as gs
from gossamer import ops
from gossamer.compress import compress_
from gossamer.formats import Format
from gossamer.testing import FORMATS, assert_close

STEM_OF = {format: stem for stem, format in FORMATS.items()}
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def model_of(format: Format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(48),
        nn.Linear(48, 33),
        nn.GELU(),
        nn.Linear(33, 10, bias=False),
    ).eval()
    compress_(model, format)
    assert sum(isinstance(m, gs.Linear | gs.Conv2d) for m in model) == 4
    return model


@EVERY_FORMAT
def test_copies_and_state_dicts(format: Format) -> None:
    model, x = model_of(format), torch.randn(2, 3, 12, 12)
    want = model(x)
    assert same_bits(copy.deepcopy(model)(x), want)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = model_of(format)
    for p in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
        p.data.mul_(1.5)
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(other(x), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=False)(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@EVERY_FORMAT
def test_a_model_in_another_dtype(format: Format, dtype: torch.dtype) -> None:
    model, x = model_of(format), torch.randn(2, 3, 12, 12)
    before = {name: b.clone() for name, b in model.named_buffers() if "packed" in name}
    cast = copy.deepcopy(model).to(dtype)
    for name, buffer in cast.named_buffers():
        if "packed" in name:
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert cast.get_parameter("1.weight").dtype == dtype  # the rest of the model follows
    if dtype == torch.float64:
        with pytest.raises(TypeError, match=r"torch.float64: use float32"):
            cast(x.double())
        return
    y = cast(x.to(dtype))
    assert y.dtype == dtype
    # Ten layers of rounding to 16 bits; the scale of the result is its largest element.
    bound = 10 * 8 * torch.finfo(dtype).eps * model(x).abs().max()
    assert_close(y, model(x), bound.expand_as(y))


@EVERY_FORMAT
def test_eight_threads_get_the_bits_of_one(format: Format) -> None:
    model = model_of(format)
    inputs = [torch.randn(2 + i % 3, 3, 12, 12) for i in range(8)]
    with torch.inference_mode():
        want = [model(x) for x in inputs]
    start = Barrier(8)

    def work(i: int) -> bool:
        start.wait()
        with torch.inference_mode():
            return all(same_bits(model(inputs[i]), want[i]) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# Compilers.


@EVERY_FORMAT
def test_compile(format: Format) -> None:
    torch.compiler.reset()
    model = model_of(format)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for images in (2, 5):
            x = torch.randn(images, 3, 12, 12)
            assert same_bits(compiled(x), model(x))
        last = x.contiguous(memory_format=torch.channels_last)
        assert same_bits(compiled(last), model(last))


def test_compile_where_the_other_layers_can_be_trained() -> None:
    torch.compiler.reset()
    model, x = model_of(gs.Int8()), torch.randn(2, 3, 12, 12)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert y.requires_grad and same_bits(y.detach(), model(x).detach())
    with pytest.raises(RuntimeError, match="inference only"):
        y.sum().backward()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    torch.compiler.reset()
    # ReLU is the one kernel that inductor compiles here: it takes a while, and leaves all bits.
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 8))
    compress_(model, {"0": gs.Int8(), "2": gs.SparseInt8()})
    with torch.no_grad():
        for rows in (2, 5):
            x = torch.randn(rows, 24)
            assert same_bits(torch.compile(model, fullgraph=True)(x), model(x))


@EVERY_FORMAT
def test_export(format: Format) -> None:
    model, x = model_of(format), torch.randn(2, 3, 12, 12)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    operator = getattr(ops, f"_{STEM_OF[format]}")
    assert len(exported.graph.find_nodes(op="call_function", target=operator)) == 4
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for images in (2, 7):
        x = torch.randn(images, 3, 12, 12)
        assert same_bits(module(x), model(x))
