"""BatchNorm as timm writes it: a module that calls F.batch_norm, asks for ranks and activates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import EVERY_STATIC, images, lively, run, static
from products import same_bits
from torch import Tensor, nn

import gossamer as gs


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module, affine: bool = True) -> None:
        super().__init__(channels, eps=1e-3, affine=affine)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        torch._assert(x.dim() > 3, "too few")
        y = F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias),
            training=False,
            eps=self.eps,
        )
        act: Tensor = self.act(self.drop(y))
        return act


class Net(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), NormAct(8, nn.ReLU(), affine)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), NormAct(8, nn.Identity(), affine)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.head(F.hardswish(x)).flatten(x.ndim - 3)


@pytest.mark.parametrize("affine", [True, False])
@EVERY_STATIC
def test_it_goes_into_the_layer(format: Any, affine: bool) -> None:
    x = images()
    dense = lively(Net(affine))
    model = static(dense, x, format)
    fused = gs.fuse(model, x)
    assert [row.fused for row in fused.report][1:] == [
        *("BatchNorm, ReLU", "BatchNorm, hardswish", "", "")
    ]
    assert [row.gives for row in fused.report] == ["int8"] * 3 + ["fp32"] * 2
    y = run(fused, x)
    want = run(dense, x)
    assert (y - want).norm() < 0.05 * want.norm()
    assert y.shape == want.shape
    plain = gs.fuse(dense, x)
    torch.testing.assert_close(run(plain, x), want, rtol=1e-4, atol=1e-4)
    assert not any(name.startswith("norm") for name, _ in fused.named_modules())


def test_where_it_stays() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.wide = (
                NormAct(3, nn.ReLU()),
                nn.Conv2d(3, 8, 1),
                nn.Linear(8, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.norm(x))
            batch = F.batch_norm(x, None, None, training=True)
            other = F.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)))
            return self.wide((batch + other).mean((2, 3)))

    x = images()
    model = lively(First())
    gs.compress_(model, gs.Int8())
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    notes = {row.name: row.note for row in fused.report}
    assert notes["norm.norm"] == "not folded: follows x, which is no layer"
    own = fused.get_submodule("norm.norm")
    assert own.running_mean.data_ptr() == model.norm.running_mean.data_ptr()
    assert own.weight.data_ptr() == model.norm.weight.data_ptr() and own.eps == model.norm.eps
    assert [row.runs for row in fused.report].count("batch_norm") == 2
