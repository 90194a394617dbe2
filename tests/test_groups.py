"""Grouped convolutions that are not depthwise: 1x4 blocks, of static formats."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import calibrated, gives, images, lively, run, static
from products import same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer.geometry import conv_rows, conv_weight, over_all_channels, weight_matrix
from gossamer.layers import unsupported
from gossamer.observed import observed
from gossamer.packed import pack

STATIC = gs.Int8(activations="static")
BLOCKS = gs.SparseInt8(activations="static")
# Inputs, outputs, groups: a group may have a part of a block of four channels, or several.
SIZES = [(8, 8, 2), (12, 24, 3), (6, 9, 3), (10, 20, 2), (32, 16, 4), (8, 16, 8)]


@pytest.mark.parametrize("inputs, outputs, groups", SIZES)
def test_the_matrix_is_that_of_all_channels(inputs: int, outputs: int, groups: int) -> None:
    conv = nn.Conv2d(inputs, outputs, (3, 2), groups=groups, padding=1)
    matrix, x = weight_matrix(conv), torch.randn(2, inputs, 6, 5)
    want = run(conv, x)
    got = (conv_rows(conv, x) @ matrix.T + conv.bias).view(2, *want.shape[2:], outputs)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), want)
    assert torch.equal(conv_weight(matrix, conv.weight.shape, groups), conv.weight)
    assert over_all_channels(conv.weight, groups).count_nonzero() == conv.weight.numel()


@pytest.mark.parametrize("inputs, outputs, groups", SIZES)
@pytest.mark.parametrize("format", [STATIC, BLOCKS], ids=lambda f: f.name)
def test_a_layer_like_any_other(
    tmp_path: Path, isa: str, format: Any, inputs: int, outputs: int, groups: int
) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, groups=groups)
    dense, x = nn.Sequential(first, nn.Conv2d(outputs, 4, 1)), torch.randn(3, inputs, 15, 14)
    model = calibrated(copy.deepcopy(dense), x)
    report = gs.compress_(model, format)
    assert report.rows[0].after == "Conv2d SparseInt8(activations=static)"
    layer: Any = model[0]
    assert layer.groups == groups and layer.packed.format == BLOCKS
    y, want = run(model, x), run(dense, x)
    assert (y - want).norm() < 0.03 * want.norm()
    back = layer.to_dense()
    assert back.groups == groups and torch.equal(back.weight, layer.unpack())
    assert (back.weight - first.weight).abs().max() < 0.02 * first.weight.abs().max()
    gs.save(model, tmp_path / "model.safetensors")
    loaded = copy.deepcopy(dense)
    gs.load_(loaded, tmp_path / "model.safetensors")
    assert same_bits(run(loaded, x), y) and loaded[0].groups == groups


def test_a_layer_has_the_blocks_of_its_groups_alone() -> None:
    conv, x = nn.Conv2d(64, 64, 3, groups=16), torch.randn(1, 64, 9, 9)
    model = calibrated(nn.Sequential(conv), x)
    gs.compress_(model, STATIC)
    packed: Any = model[0].packed
    # Nine taps of one block an output, and one of zeros: rows have an even number.
    assert len(packed.values) == 64 * 10


def test_other_formats_leave_it_to_torch() -> None:
    dense = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    for format in (gs.Int8(), gs.Int8(activations="none"), gs.Int4(), gs.Sparse(), gs.SparseInt8()):
        model = copy.deepcopy(dense)
        (row,) = gs.compress_(model, format).rows
        assert row.note == "groups=2: grouped convolutions are for Int8(activations='static')"
        assert type(model[0]) is nn.Conv2d
        with pytest.raises(ValueError, match="groups=2: grouped convolutions are for"):
            gs.Conv2d.from_dense(dense[0], format)
    assert unsupported(dense[0]) is None and unsupported(dense[0], BLOCKS) is None


def test_groups_that_do_not_fit() -> None:
    model = calibrated(nn.Sequential(nn.Conv2d(8, 8, 1)), torch.randn(1, 8, 4, 4))
    gs.compress_(model, STATIC)
    packed: Any = model[0].packed
    with pytest.raises(ValueError, match=r"groups=3 must divide 8 inputs and 8 outputs"):
        gs.Conv2d(packed, None, 8, 8, (1, 1), groups=3)
    whole = pack(torch.ones(8, 8), BLOCKS, (-1.0, 1.0))
    with pytest.raises(ValueError, match="groups=2: an output has weights outside of its group"):
        gs.Conv2d(whole, None, 8, 8, (1, 1), groups=2)
    with pytest.raises(ValueError, match=r"must be SparseInt8\(activations='static'\), it is Int8"):
        gs.Conv2d(packed, None, 8, 8, (1, 1), groups=2)
    halves = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    grouped = gs.Conv2d(pack(halves, BLOCKS, (-1.0, 1.0)), None, 8, 8, (1, 1), groups=2)
    kept = grouped.to_dense().weight
    with pytest.raises(RuntimeError, match="groups=2: an output has weights outside of its group"):
        grouped.load_state_dict({f"packed.{name}": b for name, b in whole.state_dict().items()})
    assert torch.equal(grouped.to_dense().weight, kept)


def test_fused_it_stays_8_bits() -> None:
    class Net(nn.Module):
        """The bottleneck of a ResNeXt."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1)
            self.middle, self.norm = nn.Conv2d(32, 32, 3, 1, 1, groups=8), nn.BatchNorm2d(32)
            self.down, self.last = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            y = F.relu(self.norm(self.middle(F.relu(self.up(x)))))
            y = F.relu(self.down(y) + x)
            return self.last(y).mean((2, 3))

    torch.manual_seed(0)
    dense, x = lively(Net()), images(8, 32)
    model = static(dense, x)
    fused = gs.fuse(model, x)
    assert gives(fused)["middle"] == "int8" and gives(fused)["down"] == "int8"
    want = run(dense, x)
    error, own = ((run(m, x) - want).norm() / want.norm() for m in (fused, model))
    assert error < max(2 * own, 0.02)


def test_calibration_and_scores() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(12, 24, 3, padding=1, groups=3), torch.randn(4, 12, 9, 8)
    x[:, 4] *= 10
    model = calibrated(nn.Sequential(conv), x, hessian=True)
    seen: Any = observed(model[0])
    assert seen.hessian is None and seen.mean.shape == weight_matrix(conv).shape[1:]
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="exclude grouped convolutions"):
        gs.prune_(copy.deepcopy(model), 0.5, "unstructured", "layer", score="sparsegpt")
    gs.prune_(twin, 0.5, "unstructured", score="wanda")
    kept = twin[0].weight != 0
    # Channel 4 is the first of the second group: outputs 8 to 15 keep what reads it.
    assert kept[8:16, 0].float().mean() > 0.9 and kept[:8, 0].float().mean() < 0.7
    plain = copy.deepcopy(model)
    gs.compress_(model, STATIC)
    gs.compress_(plain, STATIC, bias_correction=False)
    want = run(nn.Sequential(conv), x)
    exact, wrong = ((run(m[0].to_dense(), x) - want).mean((0, 2, 3)) for m in (model, plain))
    assert exact.abs().max() < 1e-4 < wrong.abs().max()


def test_training_on_the_kernel() -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(8, 12, 3, groups=4)), torch.randn(2, 8, 9, 9))
    dense, x = copy.deepcopy(model), torch.randn(2, 8, 9, 9)
    gs.qat_(model, STATIC)
    y = model(x)
    y.square().sum().backward()
    dense(x).square().sum().backward()
    got, want = model[0].weight.grad, dense[0].weight.grad
    assert (got - want).norm() < 0.05 * want.norm()
    gs.compress_(model, STATIC)
    assert same_bits(run(model, x), y.detach())
