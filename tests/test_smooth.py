"""smooth_: the same function, smaller int8 errors, and norms that cannot be folded are reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer as gs
from gossamer.observed import observed


class Block(nn.Module):
    """A pre-norm layer; `norm1` is read by three linears, `norm2` through a dropout by one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        assert y.shape[-1] == y.size(-1)  # asks for no values
        x = x + F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        return x + self.down(F.gelu(self.up(self.dropout(self.norm2(x)))))


def outliers(seed: int = 0) -> Any:
    """A block two of whose channels leave the norms 40 times larger, for weights 20 times smaller.

    That is how trained transformers carry them.
    """
    torch.manual_seed(seed)
    block = Block().eval()
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight[[3, 17]] = 40
        for layer in (block.query, block.key, block.value, block.up):
            layer.weight[:, [3, 17]] /= 20
    return block


def calibrated(model: nn.Module, x: Tensor) -> Any:
    with gs.calibrate(model):
        model(x)
    return model


def test_the_function_stays_and_the_int8_error_falls() -> None:
    x = torch.randn(8, 16, 32)
    block = calibrated(outliers(), x)
    with torch.no_grad():
        want = block(x)
        rough = outliers()
        gs.compress_(rough, gs.Int8())
        error = (rough(x) - want).norm()
        report = gs.smooth_(block, (x,))
        notes = {row.name: row.note for row in report}
        assert notes == {"norm1": "into query, key, value", "norm2": "into up"}
        assert (block(x) - want).norm() < 1e-5 * want.norm()
        gs.compress_(block, gs.Int8())
        assert (block(x) - want).norm() < 0.5 * error


def test_given_pairs_do_the_same_as_traced_ones() -> None:
    x = torch.randn(4, 8, 32)
    traced, given = calibrated(outliers(), x), calibrated(outliers(), x)
    gs.smooth_(traced, (x,), alpha=0.75)
    pairs = {"norm1": ["query", "key", "value"], "norm2": ["up"]}
    gs.smooth_(given, pairs=pairs, alpha=0.75)
    for one, two in zip(traced.parameters(), given.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_scales_are_those_of_the_paper() -> None:
    x = torch.randn(64, 4) * torch.tensor([1.0, 8.0, 0.5, 0.0])
    model: Any = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 10.0, 2.0, 0.0]))
        model[1].weight[:, 2] = 0
    before = model[1].weight.detach().clone()
    calibrated(model, x)
    seen = observed(model[1])
    assert seen is not None
    gs.smooth_(model, (x,), alpha=0.25)
    want = seen.absmax[:2] ** 0.25 / before.abs().amax(0)[:2] ** 0.75
    torch.testing.assert_close(model[1].weight[:, :2], before[:, :2] * want)
    # Channels of zeros on either side keep their scale; what no longer holds is dropped.
    assert torch.equal(model[1].weight[:, 2:], before[:, 2:])
    assert observed(model[1]) is None


class Elsewhere(nn.Module):
    """Norms whose outputs go to a linear and somewhere else, or whose readers have other inputs."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("residual", "sliced", "returned", "bare", "twice", "unused", "ended"):
            self.add_module(name, nn.LayerNorm(8, elementwise_affine=name != "bare"))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> dict[str, Any]:
        one, two, three, four, five, six = self.linears
        y = self.residual(x)
        x = y + one(y)
        y = self.sliced(x)
        x = x + two(y) + two(y[:, :8]).sum()
        returned = self.returned(x)
        x = x + three(returned) + four(self.bare(x))
        x = x + five(self.twice(x)) + five(x)
        self.ended(x).mul_(1)
        return {"states": [x, (returned,)], "last": six(x)}


def test_norms_that_cannot_be_folded_are_left_alone_with_the_reason() -> None:
    torch.manual_seed(0)
    model, x = Elsewhere().eval(), torch.randn(3, 8)
    calibrated(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    notes = {row.name: row.note for row in gs.smooth_(model, (x,))}
    assert notes == {
        "residual": "left alone: its output is also read by add",
        "sliced": "left alone: its output is also read by __getitem__, "
        "linears.1, which has other inputs too",
        "returned": "left alone: its output is also read by the caller of the model",
        "bare": "left alone: it has no weight to fold scales into",
        "twice": "left alone: its output is also read by linears.4, which has other inputs too",
        "unused": "left alone: no nn.Linear reads its output",
        "ended": "left alone: its output is also read by mul_",
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shared_weights_are_left_alone() -> None:
    model: Any = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[3].weight = model[1].weight
    x = torch.randn(3, 8)
    notes = [row.note for row in gs.smooth_(calibrated(model, x), (x,))]
    assert notes == ["left alone: its output is also read by linear"] * 2
    model[3].weight, model[2].weight = nn.Parameter(model[1].weight.clone()), model[0].weight
    notes = [row.note for row in gs.smooth_(calibrated(model, x), (x,))]
    assert all("another norm, which shares its weight" in note for note in notes)


def test_torchs_own_encoder_is_traced_past_its_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        want = calibrated(layer, x)(x)
        notes = {row.name: row.note for row in gs.smooth_(layer, (x,))}
        torch.testing.assert_close(layer(x), want)
    assert notes["norm2"] == "into linear1"
    assert notes["norm1"].startswith("left alone: ")


def test_bad_arguments_are_sentences() -> None:
    x, block = torch.randn(2, 4, 32), outliers()
    for inputs, pairs in ((None, None), ((x,), {"norm1": ["up"]})):
        with pytest.raises(ValueError, match="give example_inputs, or pairs"):
            gs.smooth_(block, inputs, pairs=pairs)
    with pytest.raises(ValueError, match=r"alpha=2 is not in \[0, 1\]"):
        gs.smooth_(block, (x,), alpha=2)
    for pairs, message in (
        ({"norm3": ["up"]}, "'norm3', but the model has no such module"),
        ({"up": ["down"]}, "'up' is a Linear, not a norm"),
        ({"norm1": ["down"]}, "'down' is Linear.*: it must be an nn.Linear of"),
    ):
        with pytest.raises(ValueError, match=message):
            gs.smooth_(block, pairs=pairs)
    with pytest.raises(ValueError, match="'query' was not calibrated: run"):
        gs.smooth_(block, (x,))
    with pytest.raises(ValueError, match=r"has no nn.LayerNorm or nn.RMSNorm"):
        gs.smooth_(nn.Sequential(nn.Linear(4, 4)), (torch.ones(1, 4),))
