"""gptq_: packs to the very integers it rounded to, and changes outputs less than rounding does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.calibrate import weight_matrix
from gossamer.obs import output_error
from gossamer.packed import pack, packed_from_buffers

FORMATS = [
    gs.Int8(),
    gs.Int8(activations="none"),
    gs.Int4(),
    gs.Int4(group=32),
    gs.SparseInt8(),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 16, 21),
        nn.Linear(21, 5),
    )


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def calibrated(model: nn.Module, hessian: bool = True) -> nn.Module:
    with gs.calibrate(model, hessian=hessian):
        model(images(200))
    return model


def correlated(k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return x.T @ x / 500


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_compress_packs_the_same_integers_and_scales(format: Any) -> None:
    model = calibrated(net())
    names = list(model.state_dict())
    report = gs.gptq_(model, format)
    assert [bool(row.after) for row in report] == [True] * 4
    assert list(model.state_dict()) == names
    copied, weights = copy.deepcopy(model), [weight_matrix(model[i]) for i in (0, 2, 4, 5)]
    kept = [vars(model[i])["_gossamer_rounded"] for i in (0, 2, 4, 5)]
    for version in (model, copied):
        gs.compress_(version, format)
        for i, weight, packed in zip((0, 2, 4, 5), weights, kept, strict=True):
            assert torch.equal(version[i].packed.unpack(), weight)
            for name, buffer in version[i].packed.named_buffers():
                assert torch.equal(buffer, packed.get_buffer(name))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("k", [5, 32, 150])
def test_outputs_change_less_than_by_rounding_to_nearest(format: Any, k: int) -> None:
    hessian = correlated(k)
    weight = torch.randn(24, k, generator=torch.Generator().manual_seed(1))
    packed = pack(weight, format, hessian=hessian)
    buffers = dict(packed.named_buffers())
    # Nothing that a kernel could not survive: lanes within 16 bits, padding empty.
    assert packed_from_buffers(24, k, format, buffers).unpack().shape == weight.shape
    error = output_error(weight, packed.unpack(), hessian=hessian)
    nearest = output_error(weight, pack(weight, format).unpack(), hessian=hessian)
    assert error < nearest * (1.05 if k == 5 else 0.9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("format", [gs.Int8(), gs.SparseInt8()], ids=str)
def test_lanes_that_are_full_overflow_nowhere(format: Any, sign: int) -> None:
    # Equal weights fill every lane to the brim, and what rounding loses pushes the same way.
    weight = sign * (torch.ones(5, 64) + torch.rand(5, 64) * 1e-2)
    packed = pack(weight, format, hessian=correlated(64))
    packed_from_buffers(5, 64, format, dict(packed.named_buffers()))
    assert (packed.unpack() - weight).abs().max() < 0.2


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_inputs_that_were_never_seen_are_rounded_to_nearest(format: Any) -> None:
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(1)) * 0.1
    packed, plain = pack(weight, format, hessian=torch.zeros(70, 70)), pack(weight, format)
    step = weight.abs().amax() / 32 if isinstance(format, gs.Int8 | gs.SparseInt8) else 0
    assert (packed.unpack() - plain.unpack()).abs().max() <= step
    if isinstance(format, gs.Int4):
        assert torch.equal(packed.unpack(), plain.unpack())


def test_empty_blocks_stay_empty() -> None:
    model = net()
    gs.prune_(model, 0.6, pattern="1x4", exclude="0")
    empty = [(weight_matrix(model[i]) == 0).unflatten(1, (-1, 4)).all(2) for i in (2, 4)]
    assert empty[1].float().mean() > 0.3
    gs.gptq_(calibrated(model), gs.SparseInt8())
    for i, blocks in zip((2, 4), empty, strict=True):
        now = (weight_matrix(model[i]) == 0).unflatten(1, (-1, 4)).all(2)
        assert now[blocks].all()


def test_a_weight_that_changed_is_rounded_to_nearest() -> None:
    model = calibrated(net())
    gs.gptq_(model, gs.Int4())
    with torch.no_grad():
        model[5].weight[0, 0] += 0.01
    changed = model[5].weight.detach().clone()
    gs.compress_(model, gs.Int4())
    assert torch.equal(model[5].packed.unpack(), pack(changed, gs.Int4()).unpack())


def test_another_format_packs_anew() -> None:
    model = calibrated(net())
    gs.gptq_(model, gs.Int4())
    gs.compress_(model, gs.Int8())
    assert model[5].packed.format == gs.Int8()


def test_what_is_left_alone_has_a_row_with_the_reason() -> None:
    model = calibrated(net())
    model.append(nn.Linear(5, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    formats = {"0": None, "2": gs.Sparse(), "4": gs.Int4(), "*": gs.Int8()}
    rows = {row.name: row for row in gs.gptq_(model, formats)}
    assert rows["0"].note == "left alone by pattern '0'"
    assert rows["2"].note == "left alone: Sparse keeps fp32 weights"
    assert rows["6"].note == "left alone: the calibration did not reach it"
    assert rows["4"].after == "Linear on the grid of Int4" and "GPTQ" in rows["4"].note
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed == {"4.weight", "5.weight"}


def test_shared_weights_are_rounded_once_and_tied_ones_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(12, 8)
            self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)
            self.two.weight = self.one.weight
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.two(self.one(self.words(ids))))

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(12)
    with gs.calibrate(model, hessian=True):
        model(ids)
    rows = {row.name: row for row in gs.gptq_(model, gs.Int4())}
    assert rows["one"].after and rows["two"].note == "shares the weight of 'one'"
    assert "left alone: tied to 'words'" in rows["head"].note
    rounded = model.one.weight.detach().clone()
    gs.compress_(model, gs.Int4())
    assert torch.equal(model.two.packed.unpack(), rounded)


def test_without_hessians_it_says_what_to_run() -> None:
    for model in (net(), calibrated(net(), hessian=False)):
        with pytest.raises(ValueError, match=r"gs.calibrate\(model, hessian=True\)"):
            gs.gptq_(model, gs.Int4())


def test_a_bad_weight_is_named_and_leaves_the_model_as_it_was() -> None:
    model = calibrated(net())
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="layer '4': the weight holds a NaN"):
        gs.gptq_(model, gs.Int4())
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=r"the Hessian is \(3, 3\)"):
        pack(torch.ones(2, 4), gs.Int8(), hessian=torch.eye(3))
