"""What ends a CNN, in the chain of its layers: the mean, flatten, and linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_nets import FORMATS, assert_same, fused_net, images, lively, one_by_one, run, static
from torch import Tensor, nn

import gossamer as gs
from gossamer.fuse import chain


class Classifier(nn.Module):
    """What ends a CNN: a mean, perhaps flattened, and linear layers."""

    def __init__(self, last: Callable[[Tensor], Tensor], linear: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), last
        self.linear = linear or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.last(torch.relu(self.two(self.one(x)))))
        return y


def pooled(y: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean": (lambda y: y.mean((2, 3)), ""),
    "mean, keepdim": (lambda y: y.mean((2, 3), True), ""),
    "pool, flatten": (pooled, "flatten"),
    "pool, method": (lambda y: F.adaptive_avg_pool2d(y, 1).flatten(start_dim=1), "flatten"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_mean_in_a_chain(end: str, calls: list[int]) -> None:
    last, absorbed = ENDS[end]
    x = images()
    fused = fused_net(Classifier(last), "int8", x)
    got = run(fused, x)
    assert calls == [1] and got.shape == ((2, 6, 1, 1) if "keepdim" in end else (2, 6))
    row = list(fused.report)[-1]
    assert (row.runs, row.fused) == ("ImageMean", absorbed)
    assert_same(got, one_by_one(fused, x))


@pytest.mark.parametrize("flat", [lambda y: y.flatten(2), lambda y: y.flatten(1, 2), torch.flatten])
def test_what_flattens_otherwise_stays(flat: Callable[[Tensor], Tensor]) -> None:
    def end(y: Tensor) -> Tensor:
        return flat(F.adaptive_avg_pool2d(y, 1))

    net, x = Classifier(end), images()
    fused = fused_net(net, "int8", x)
    assert list(fused.report)[-1].runs == "flatten"
    assert run(fused, x).shape == run(net, x).shape
    assert_same(run(fused, x), one_by_one(fused, x))


@pytest.mark.parametrize("format", ["int8", "1x4"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_whole_classifier_is_one_call(format: str, dynamic: bool, calls: list[int]) -> None:
    linear = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=False))
    x = images()
    model = lively(Classifier(pooled, linear))
    if dynamic:
        gs.compress_(model, {"linear.*": gs.Int8() if format == "int8" else gs.SparseInt8()})
    fused = gs.fuse(static(model, x, FORMATS[format]), x)
    for image in (x, x[:1], x[..., :20], x.transpose(2, 3), x.double().float()):
        calls.clear()
        assert_same(run(fused, image), one_by_one(fused, image))
        assert calls == [1]
    with pytest.raises(TypeError, match=r"dtype torch\.float64"):
        run(fused, x.double())
    with pytest.raises(ValueError, match="fused for"):
        run(fused, x[0])


def test_a_linear_layer_of_other_floats_stays_by_itself(calls: list[int]) -> None:
    net = Classifier(lambda y: torch.sin(y.mean((2, 3))), nn.Linear(6, 4))
    x = images()
    fused = gs.fuse(static(net, x), x)
    assert_same(run(fused, x), one_by_one(fused, x))
    assert calls == [1]
    assert [len(each.links) for each in chain.chains_of(fused.graph)] == [4]
