"""Runs of layers in one call: the same bits, and only where nothing could see the difference."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fused_nets import (
    FORMATS,
    Chain,
    Dense,
    ResNet,
    UNet,
    assert_same,
    fused_net,
    images,
    one_by_one,
    run,
    static,
)
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

import gossamer as gs
from gossamer import ops
from gossamer.fuse import chain
from gossamer.timing import threads

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS)


@EVERY_FORMAT
@pytest.mark.parametrize("net", [ResNet, Chain, UNet, Dense], ids=lambda net: net.__name__)
def test_bits_are_those_of_one_layer_after_the_other(
    net: type[nn.Module], format: str, isa: str, calls: list[int]
) -> None:
    x = images(3, 32)
    fused = fused_net(net(), format, x)
    chains = len(chain.chains_of(fused.graph))
    assert chains or net is not ResNet
    last = x.contiguous(memory_format=torch.channels_last)
    for image in (x, last, x[:1], x[..., :24]):
        before = image.clone()
        want = one_by_one(fused, image)
        for count in (1, 2):
            with threads(count):
                calls.clear()
                assert_same(run(fused, image), want)
                assert len(calls) >= chains  # more, in pieces
        assert torch.equal(image, before)


class Tangle(nn.Module):
    """Values that two chains share, that are returned, and that are x and residual at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (
            nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.relu(self.a(x))
        second = torch.relu(self.b(first) + first)
        between = torch.sigmoid(self.c(second))
        third = torch.relu(self.d(between) + first)
        fourth = torch.relu(self.e(third) + third)
        return third, self.f(fourth), second


@EVERY_FORMAT
def test_values_of_several_chains(format: str, calls: list[int]) -> None:
    x = torch.randn(2, 4, 9, 11)
    fused = fused_net(Tangle(), format, x)
    got = run(fused, x)
    # Values that others read; bytes go back to floats in the chain.
    assert calls == ([3, 2] if format == "fp32" else [3, 3])
    assert_same(got, one_by_one(fused, x))
    assert_same(run(fused, x), got)


@EVERY_FORMAT
def test_hooks_see_their_layers(format: str, calls: list[int]) -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), format, x)
    want, name = run(fused, x), "layers.0.conv2"
    assert calls
    layer = fused.get_submodule(name)
    seen: list[Any] = []
    for register in (
        lambda: layer.register_forward_hook(lambda *given: seen.append(given[0])),
        lambda: layer.register_forward_pre_hook(lambda *given: seen.append(given[0])),
        lambda: register_module_forward_hook(lambda *given: seen.append(given[0])),
    ):
        seen.clear()
        calls.clear()
        handle = register()
        try:
            assert_same(run(fused, x), want)
        finally:
            handle.remove()
        assert layer in seen and not calls
        assert_same(run(fused, x), want)
        assert calls
    calls.clear()
    layer.forward = layer.forward
    assert_same(run(fused, x), want)
    assert not calls


@EVERY_FORMAT
def test_layers_count_as_they_are_now(format: str, calls: list[int]) -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), format, x)
    name = "layers.0.conv1"
    want = run(fused, x)
    assert calls
    other = copy.deepcopy(fused)
    image: Any = other.get_submodule(name)
    layer = image if format == "fp32" else image.layer

    def differs_and_is_right() -> None:
        got = run(other, x)
        assert not torch.equal(got, want)
        assert_same(got, one_by_one(other, x))
        assert_same(run(fused, x), want)

    layer.activate_with("gelu")
    differs_and_is_right()
    layer.activate_with("relu")
    assert_same(run(other, x), want)
    layer.bias = layer.bias + 1
    differs_and_is_right()
    layer.bias = layer.bias - 1
    packed = layer.packed
    layer.packed = packed.scaled(torch.full((packed.n,), 0.5))
    differs_and_is_right()
    layer.packed = packed
    shifted = copy.deepcopy(image)
    (shifted if format == "fp32" else shifted.layer).bias.add_(1)
    other.set_submodule(name, shifted)
    differs_and_is_right()
    other.load_state_dict(fused.state_dict())
    assert_same(run(other, x), want)
    bias = f"{name}.{'' if format == 'fp32' else 'layer.'}bias"
    with torch.no_grad():
        got = torch.func.functional_call(other, {bias: layer.bias + 1}, (x,))
    assert not torch.equal(got, want)
    assert_same(run(other, x), want)


def test_a_layer_of_another_kind_is_called_by_itself(calls: list[int]) -> None:
    fused = fused_net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "fp32", images())
    assert run(fused, images()).shape == (2, 8, 17, 17) and calls
    calls.clear()
    fused.set_submodule("1", gs.Conv2d.from_dense(nn.Conv2d(8, 8, 3), gs.Int8()))
    assert run(fused, images()).shape == (2, 8, 17, 17)
    fused.set_submodule("1", nn.Conv2d(8, 8, 3))
    assert run(fused, images()).shape == (2, 8, 17, 17) and not calls


# Floats.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_of_bytes_gives_floats(dtype: torch.dtype, calls: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1))
    model, x = static(net, images()).to(dtype), images().to(dtype)
    fused = gs.fuse(model, x)
    y = run(fused, x)
    assert y.dtype == dtype and calls == [1]
    assert_same(y, one_by_one(fused, x))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True)], ids=str)
def test_floats_are_pooled_in_the_chain(pool: nn.Module, calls: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), pool, nn.MaxPool2d(2), nn.Flatten())
    x = images()
    model = static(net, x)
    fused = gs.fuse(model, x)
    y = run(fused, x)
    assert_same(y, run(model, x))
    assert calls == [1] and [row.runs for row in fused.report][2:] == [
        *("Conv2d Int8(activations=static)", "SeparableMaxPool2d", "SeparableMaxPool2d", "Flatten")
    ]
    with pytest.raises(RuntimeError, match="too small"):
        run(fused, x[..., :5, :5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_floats(dtype: torch.dtype, calls: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    fused, x = fused_net(net, "fp32", images()), images().to(dtype)
    assert_same(run(fused, x), one_by_one(fused, x))
    assert calls == [1] and run(fused, x).dtype == dtype


def test_images_of_any_strides(calls: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    fused, x = fused_net(net, "fp32", torch.randn(2, 4, 9, 9)), torch.randn(2, 4, 9, 9)
    strided = torch.randn(2, 4, 9, 18)[..., ::2]
    for image, form, chains in (
        (x, torch.contiguous_format, 1),
        (x.contiguous(memory_format=torch.channels_last), torch.channels_last, 1),
        (strided, torch.contiguous_format, 0),
        (x.transpose(2, 3), torch.contiguous_format, 0),
    ):
        calls.clear()
        y = run(fused, image)
        assert_same(y, one_by_one(fused, image))
        assert y.is_contiguous(memory_format=form) and len(calls) == chains
    assert run(fused, x[0]).shape == (8, 5, 5)


def test_a_gradient_is_refused_as_by_a_layer() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    fused = fused_net(net, "fp32", torch.randn(2, 4, 9, 9))
    y = fused(torch.randn(2, 4, 9, 9, requires_grad=True))
    with pytest.raises(RuntimeError, match="inference only"):
        y.sum().backward()


# Errors, compilers, and what is kept.


@EVERY_FORMAT
def test_an_error_is_that_of_the_layer(format: str) -> None:
    x = images(1, 21)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    fused = fused_net(net, format, x)
    with pytest.raises(ValueError, match="smaller than"):
        run(fused, images(1, 6))
    with pytest.raises((ValueError, RuntimeError), match="channels"):
        run(fused, torch.randn(1, 9, 21, 21))
    assert_same(run(fused, x), one_by_one(fused, x))


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@EVERY_FORMAT
def test_compilers_and_tracers_see_layers(format: str, calls: list[int]) -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), format, x)
    want = run(fused, x)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,))
        called = {str(node.target) for node in exported.graph.nodes}
        assert not any("chain" in name for name in called)
        assert_same(exported.module()(x), want)
        assert_same(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), want)
    names = [str(node.target) for node in Leaves().trace(fused).nodes]
    assert names == [str(node.target) for node in fused.graph.nodes]
    assert "_chain" not in fused.code


@EVERY_FORMAT
def test_nothing_is_kept(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), format, x)
    given: list[Any] = []
    own = ops.chain

    def noted(values: list[Tensor], *more: Any) -> list[Tensor]:
        given.extend(map(weakref.ref, values))
        return own(values, *more)

    monkeypatch.setattr(ops, "chain", noted)
    result = weakref.ref(run(fused, x.clone()))
    gc.collect()
    assert given and not any(ref() is not None for ref in (*given, result))
    run(fused, x)
    buffers: list[Any] = list(fused.buffers())
    counts = [b._use_count() for b in buffers]
    for size in (32, 1, 32):
        run(fused, images(1, size))
    assert [b._use_count() for b in buffers] == counts


def test_a_chain_is_kept_as_long_as_its_network() -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), "int8", x)
    buffer: Any = fused.get_submodule("layers.0.conv1.layer").bias
    before = buffer._use_count()
    run(fused, x)
    assert buffer._use_count() == before + 1
    run(fused, x)
    assert buffer._use_count() == before + 1
    del fused
    gc.collect()
    assert buffer._use_count() == before


def test_tensors_that_are_given_other_memory() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = images()
    fused = fused_net(net, "int8", x)
    before = run(fused, x)
    bias: Any = fused.get_submodule("0").layer.bias
    old = bias.data
    bias.data = old + 1
    assert not torch.equal(run(fused, x), before)
    assert_same(run(fused, x), one_by_one(fused, x))
    bias.data = torch.zeros(3)
    with pytest.raises(RuntimeError, match="bias of shape"):
        run(fused, x)
    bias.data = old
    assert_same(run(fused, x), before)


@EVERY_FORMAT
def test_no_images(format: str, calls: list[int]) -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), format, x)
    assert run(fused, x[:0]).shape == (0, *run(fused, x).shape[1:]) and calls


@EVERY_FORMAT
def test_threads_of_a_server_share_a_network(format: str) -> None:
    x = images(1, 32)
    fused = fused_net(ResNet(), format, x)
    want = run(fused, x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run(fused, x), range(32)):
            assert_same(got, want)
