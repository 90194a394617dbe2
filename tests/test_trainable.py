"""Sparse(trainable=True): gradients, optimizers, compile and checkpoints, against dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer as gs
from gossamer import ops, reference
from gossamer.geometry import conv_matrix
from gossamer.packed import pack
from gossamer.packed.index import Index, entry_places
from gossamer.packed.trainable import PackedTrainableSparse

FORMAT = gs.Sparse(trainable=True)
CONVS: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1},
    "three by three": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "inputs that nothing reads": {"kernel_size": 2, "stride": 3},
    "wide padding": {
        "kernel_size": (2, 3),
        "stride": (3, 2),
        "padding": (4, 0),
        "dilation": (1, 2),
    },
    "same": {"kernel_size": (4, 3), "padding": "same", "bias": False},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


def prune(module: Any, density: float = 0.3) -> Any:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.weight.mul_(torch.rand(module.weight.shape, generator=g) < density)
    return module


def at_entries(layer: Any, dense: Tensor) -> Tensor:
    matrix = dense if dense.dim() == 2 else conv_matrix(dense)
    return matrix[places(layer.packed)]


def places(packed: Any) -> tuple[Tensor, Tensor]:
    return entry_places(packed.n, 1, Index(packed.columns, packed.rows, packed.cells))


def same(got: Tensor, want: Tensor) -> None:
    """Within the rounding of sums of some hundred terms near 1."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def check(dense: Any, layer: Any, x: Tensor, activation: str = "none") -> None:
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, want = layer(ours), reference.activate(dense(theirs), activation)
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    same(y, want)
    same(ours.grad, theirs.grad)
    same(layer.packed.values.grad, at_entries(layer, dense.weight.grad))
    if dense.bias is not None:
        same(layer.bias.grad, dense.bias.grad)
    with torch.no_grad():
        same(layer(x), want)  # the fused activation


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_linear_has_the_gradients_of_dense(isa: str, activation: str) -> None:
    dense = prune(nn.Linear(110, 70))
    check(
        dense,
        gs.Linear.from_dense(dense, FORMAT, None, activation),
        torch.randn(3, 25, 110),
        activation,
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CONVS)
def test_conv2d_has_the_gradients_of_dense(isa: str, name: str, channels_last: bool) -> None:
    dense = prune(nn.Conv2d(6, 9, **CONVS[name]))
    x = torch.randn(3, 6, 13, 14)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(dense, gs.Conv2d.from_dense(dense, FORMAT), x)


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two products in plain float64, on the same values and the same index."""

    def rows_of(x: Tensor, conv: Any) -> Tensor:
        return x if conv is None else reference.im2col(x, conv)

    # A bitmap is what GPUs read in place of the index.
    def spmm(x, values, columns, rows, cells, n, bias, k, _=0, conv=None, *mapped):  # type: ignore
        weight = torch.zeros(n, k, dtype=torch.float64)
        weight[entry_places(n, 1, Index(columns, rows, cells))] = values
        y = rows_of(x, conv) @ weight.T + (0 if bias is None else bias)
        if conv is None:
            return y
        height = (x.shape[2] + conv[6] + conv[7] - conv[4] * (conv[0] - 1) - 1) // conv[2] + 1
        return y.reshape(len(x), height, -1, n).movedim(-1, 1)

    def sddmm(x, dy, columns, rows, cells, n, k, conv=None, *mapped):  # type: ignore
        dy = dy if conv is None else dy.movedim(1, -1)
        whole = reference.sddmm(rows_of(x, conv).reshape(-1, k), dy.reshape(-1, n))
        return whole[entry_places(n, 1, Index(columns, rows, cells))]

    monkeypatch.setattr(ops, "spmm", spmm)
    monkeypatch.setattr(ops, "sddmm", sddmm)


@pytest.mark.parametrize("kind", ["linear", *CONVS])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    in_float64(monkeypatch)
    layer: Any
    if kind == "linear":
        layer = gs.Linear.from_dense(prune(nn.Linear(9, 6)), FORMAT)
        x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    else:
        layer = gs.Conv2d.from_dense(prune(nn.Conv2d(3, 4, **CONVS[kind])), FORMAT)
        x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    packed = layer.packed
    values = packed.values.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()

    def run(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        del packed.values
        packed.values = values
        conv = None if kind == "linear" else [*layer._conv, 1]
        if kind == "circular":
            x = F.pad(x, (1, 1, 1, 1), mode="circular")
        return packed.multiply(x, bias, 0, conv)

    assert torch.autograd.gradcheck(run, (x, values, bias))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that comes out of any operation."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_dense_weight_or_gradient_is_built(kind: str) -> None:
    dense: Any = nn.Linear(200, 300) if kind == "linear" else nn.Conv2d(32, 64, 3, padding=1)
    x = torch.randn(4, 200) if kind == "linear" else torch.randn(1, 32, 3, 3)
    model = nn.Sequential(prune(dense, 0.05))
    gs.compress_(model, FORMAT)
    optimizer = torch.optim.AdamW(model.parameters())
    x.requires_grad_()
    with Largest() as largest:
        model(x).square().sum().backward()
        optimizer.step()
    entries = len(model[0].packed.values)
    assert entries <= 0.06 * dense.weight.numel()
    assert largest.size < 0.2 * dense.weight.numel()
    moments = [v for v in optimizer.state[model[0].packed.values].values() if v.dim()]
    assert [len(v) for v in moments] == [entries, entries]


def masked_step(model: nn.Sequential, optimizer: Any, masks: dict[int, Tensor]) -> None:
    for i, mask in masks.items():
        model[i].weight.grad.mul_(mask)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_it_trains_as_a_masked_dense_model_does(optimizer: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(prune(nn.Linear(40, 60)), nn.ReLU(), prune(nn.Linear(60, 10)))
    sparse = copy.deepcopy(dense)
    gs.compress_(sparse, FORMAT)
    masks = {i: dense[i].weight != 0 for i in (0, 2)}
    kwargs = {"lr": 1e-2} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    ours, theirs = optimizer(sparse.parameters(), **kwargs), optimizer(dense.parameters(), **kwargs)
    first = None
    for _ in range(10):
        for _ in range(2):  # gradients add up over two batches
            x, target = torch.randn(16, 40), torch.randint(10, (16,))
            loss = F.cross_entropy(sparse(x), target)
            loss.backward()
            F.cross_entropy(dense(x), target).backward()
        masked_step(sparse, ours, {})
        masked_step(dense, theirs, masks)
        first = first or loss.item()
    same(sparse[0].unpack(), dense[0].weight)
    same(sparse[2].bias, dense[2].bias)
    assert torch.equal(sparse[0].unpack() != 0, masks[0])


def test_compile_traces_forward_and_backward() -> None:
    model = nn.Sequential(
        prune(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), nn.Flatten(), prune(nn.Linear(8 * 36, 10))
    )
    gs.compress_(model, FORMAT)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 6, 6)
    model(x).square().mean().backward()
    compiled(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        same(theirs.grad, ours.grad)


def test_a_run_resumes_from_a_checkpoint(tmp_path: Any) -> None:
    model = nn.Sequential(prune(nn.Linear(20, 30)), nn.ReLU(), prune(nn.Conv2d(1, 2, 3)))[:1]
    gs.compress_(model, FORMAT)
    optimizer = torch.optim.Adam(model.parameters())

    def step(model: nn.Module, optimizer: Any) -> None:
        model(torch.ones(2, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    step(model, optimizer)
    again = nn.Sequential(prune(nn.Linear(20, 30), 0.5))  # other non-zeros, of another number
    gs.compress_(again, FORMAT)
    values = again[0].packed.values
    resumed = torch.optim.Adam(again.parameters())
    state = torch.load(tmp_path / "c")
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert again[0].packed.values is values
    step(again, resumed)
    assert torch.equal(again[0].unpack(), model[0].unpack())
    gs.save(again, tmp_path / "s.safetensors")
    loaded = gs.load_(nn.Sequential(nn.Linear(20, 30)), tmp_path / "s.safetensors")
    assert torch.equal(loaded[0].unpack(), model[0].unpack())
    x = torch.randn(3, 20, requires_grad=True)
    loaded(x).sum().backward()
    assert x.grad is not None and isinstance(loaded[0].packed.values, nn.Parameter)


def test_what_was_trained_is_packed_again() -> None:
    model = nn.Sequential(prune(nn.Linear(16, 16)), prune(nn.Linear(16, 8)), nn.Linear(8, 4))
    gs.compress_(model, {"[01]": FORMAT, "2": gs.Int8()})
    report = gs.compress_(model, {"0": gs.SparseInt8(), "1": FORMAT, "2": gs.Int8()})
    assert [row.after for row in report.rows] == ["Linear SparseInt8", "", ""]
    assert report.rows[0].before == "Linear Sparse(trainable=True)"
    assert [row.note for row in report.rows[1:]] == [
        "already Sparse(trainable=True)",
        "already Int8",
    ]
    assert list(model.parameters()) == list(model[1].parameters())
    fused = gs.Linear.from_dense(prune(nn.Linear(8, 8)), FORMAT, activation="relu")
    twice = nn.Sequential(fused, nn.Identity(), fused)
    want = twice(torch.ones(1, 8))
    gs.compress_(twice, gs.Sparse())
    assert twice[0] is twice[2] and twice[0].activation == "relu"
    same(twice(torch.ones(1, 8)), want)


def test_layers_that_share_a_weight_share_its_gradient() -> None:
    model = nn.Sequential(prune(nn.Linear(8, 8)), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    dense = copy.deepcopy(model)
    gs.compress_(model, FORMAT)
    assert model[0].packed is model[1].packed
    x = torch.randn(3, 8)
    model(x).sum().backward()
    dense(x).sum().backward()
    same(model[0].packed.values.grad, at_entries(model[0], dense[0].weight.grad))


def test_16_bit_inputs_and_modes() -> None:
    layer = gs.Linear.from_dense(prune(nn.Linear(32, 16)), FORMAT)
    layer.half()
    assert layer.packed.values.dtype == torch.float32  # master weights
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.packed.values.grad.dtype == torch.float32
    layer.requires_grad_(False)
    assert layer(torch.ones(1, 32)).grad_fn is None
    x = torch.ones(1, 32, requires_grad=True)
    layer(x).sum().backward()  # gradients pass a frozen layer
    assert layer.packed.values.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()


def test_what_cannot_train_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="trainable=1 must be True or False"):
        gs.Sparse(trainable=1)
    with pytest.raises(ValueError, match=r"sum over 70000 outputs .* \(limit 65536\): split"):
        pack(torch.ones(70000, 1), FORMAT)
    dense = prune(nn.Conv2d(3, 4, 2))
    stray = torch.zeros(4, 16)
    stray[0, 3] = 1.0  # the fourth channel is padding
    with pytest.raises(ValueError, match="entries behind its 3 channels"):
        gs.Conv2d.from_dense(dense, FORMAT, pack(stray, FORMAT))


def test_an_empty_weight_learns_its_bias() -> None:
    layer = gs.Linear.from_dense(prune(nn.Linear(5, 3), 0.0), FORMAT)
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).sum().backward()
    assert len(layer.packed.values) == 0 and torch.equal(x.grad, torch.zeros(2, 5))
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))
    assert isinstance(layer.packed, PackedTrainableSparse)
