"""Sums in the memory of their residuals: the same bits, and only where nobody reads these later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_nets import ResNet, images, lively, run, static
from products import same_bits
from torch import Tensor, fx, nn

import gossamer as gs
from gossamer import ops
from gossamer.timing import threads

FORMATS: dict[str, Any] = {
    "int8": gs.Int8(activations="static"),
    "1x4": gs.SparseInt8(activations="static"),
    "fp32": gs.Sparse(),
}


def packed_net(net: nn.Module, format: str, x: Tensor) -> nn.Module:
    dense = lively(net)
    if format == "fp32":
        gs.prune_(dense, 0.5, "unstructured")
        gs.compress_(dense, FORMATS[format])
        return dense
    return static(dense, x, FORMATS[format])


def reused(fused: fx.GraphModule) -> list[fx.Node]:
    return [node for node in fused.graph.nodes if node.op == "call_module" and len(node.args) == 3]


def without_reuse(fused: fx.GraphModule) -> fx.GraphModule:
    plain = copy.deepcopy(fused)
    for node in reused(plain):
        node.args = node.args[:2]
    plain.recompile()
    return plain


@pytest.mark.parametrize("format", FORMATS)
def test_bits_do_not_depend_on_it(format: str, isa: str) -> None:
    x = images(3, 33)
    fused = gs.fuse(packed_net(ResNet(), format, x), x)
    assert len(reused(fused)) >= 2
    plain = without_reuse(fused)
    assert not reused(plain)
    last = x.contiguous(memory_format=torch.channels_last)
    for image in (x, last, x[:1]):
        before = image.clone()
        want = run(plain, image)
        for count in (1, 2):
            with threads(count):
                assert same_bits(run(fused, image), want)
        assert torch.equal(image, before)


def test_a_result_has_the_memory_of_its_residual() -> None:
    fused = gs.fuse(packed_net(ResNet(), "1x4", images(1, 32)), images(1, 32))
    seen: dict[str, list[int]] = {}
    for node in reused(fused):
        module = fused.get_submodule(str(node.target))

        def note(_: Any, given: Any, y: Tensor, name: str = str(node.target)) -> None:
            seen[name] = [given[1].data_ptr(), y.data_ptr()]

        module.register_forward_hook(note)
    run(fused, images(1, 32))
    assert seen and all(residual == y for residual, y in seen.values())


class Block(nn.Module):
    """Two sums; `use` is what the model does with the first one's residual beside."""

    def __init__(self, use: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.conv, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        residual = torch.relu(self.first(x))
        y = torch.relu(self.conv(torch.relu(self.last(residual))) + residual)
        return self.use(self, x, residual, y)


READ_LATER: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "returned": lambda net, x, residual, y: (y, residual),
    "convolved": lambda net, x, residual, y: net.last(y) + net.last(residual),
    "added again": lambda net, x, residual, y: torch.relu(net.last(y) + residual),
    "a view": lambda net, x, residual, y: (y, residual.flatten(2)),
    "a function": lambda net, x, residual, y: y.mean() + torch.sin(residual).mean(),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("use", READ_LATER)
def test_what_is_read_later_stays(format: str, use: str) -> None:
    x = torch.randn(2, 4, 9, 9)
    model = packed_net(Block(READ_LATER[use]), format, x)
    fused = gs.fuse(model, x)
    first = [node for node in fused.graph.nodes if str(node.target) == "conv"]
    assert len(first) == 1 and len(first[0].args) <= 2
    got, want = run(fused, x), run(without_reuse(fused), x)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    assert all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("format", FORMATS)
def test_an_input_of_the_model_stays(format: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv(x) + x)  # the residual is what it convolves, too
            return torch.relu(self.conv(y) + y)

    x = torch.randn(2, 4, 9, 9)
    fused, before = gs.fuse(packed_net(Own(), format, x), x), x.clone()
    assert not reused(fused)
    run(fused, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spmm_over_its_residual(dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(70, 50)
    gs.prune_(nn.Sequential(dense), 0.7, "unstructured")
    layer, x = gs.Linear.from_dense(dense, gs.Sparse()), torch.randn(37, 70, dtype=dtype)
    residual = torch.randn(37, 50, dtype=dtype)
    with torch.no_grad():
        for activation in ops.ACTIVATIONS:
            layer.activate_with(activation)
            want, own = layer(x, residual), residual.clone()
            assert layer(x, own, reuse=True) is own
            assert same_bits(own, want)


def test_gradients_and_compilers_see_no_writing() -> None:
    dense = nn.Linear(8, 8)
    layer = gs.Linear.from_dense(dense, gs.Sparse())
    x, residual = torch.ones(2, 8, requires_grad=True), torch.ones(2, 8)
    y = layer(x, residual, reuse=True)
    assert torch.equal(residual, torch.ones(2, 8)) and y is not residual
    with pytest.raises(RuntimeError, match="inference only"):
        y.sum().backward()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x, residual, reuse=True), layer(x, residual))
    assert torch.equal(residual, torch.ones(2, 8))


@pytest.mark.parametrize("format", FORMATS)
def test_a_residual_that_is_read_at_the_same_time_is_refused(format: str) -> None:
    x = torch.randn(2, 4, 9, 9)
    model = packed_net(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), format, x)
    layer: Any = model[0]  # type: ignore[index]
    with torch.no_grad(), pytest.raises(RuntimeError, match="the residual is x itself"):
        if format == "fp32":
            layer(x, x, reuse=True)
        else:
            affine = layer.packed.x_affine
            q = ops.block(x, affine)
            layer.convolve(q, affine, q, affine, reuse=True)
    empty = torch.zeros(0, 4, 9, 9)
    if format == "fp32":
        assert layer(empty, empty.clone(), reuse=True).shape == empty.shape


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_does_not_run_after_its_input_is_written_over(format: str, view: bool) -> None:
    """It would, to add what became of its input, which the model computes behind it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.stem(x)) - 0.5
            y = self.conv(x)
            other = (x.view(x.shape) if view else x).relu_()
            return self.last(torch.relu(y + other))

    torch.manual_seed(0)
    x = images(3, 16)
    model = packed_net(Net(), format, x)
    fused = gs.fuse(model, x)
    want = run(model, x)
    bound = 1e-5 if format == "fp32" else 0.02
    assert (run(fused, x) - want).norm() < bound * want.norm()
