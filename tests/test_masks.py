"""Which weights are pruned: the plain loops' choice, exact counts, ties, scales and dtypes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gossamer as gs
from gossamer.geometry import conv_matrix
from gossamer.masks import choose
from gossamer.prune import Pruner, prune_
from gossamer.scores import energy


def small_model(seed: int = 0) -> nn.Sequential:
    """Sizes that 4 divides and sizes that it does not, taps, groups."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
        nn.Linear(10, 3),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    kinds = (nn.Linear, nn.Conv2d)
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, kinds)}


def energies(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, weight in dense.items():
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(weight)
        found[name] = energy(name, layer, "magnitude")
    return found


def blocks(weight: Tensor, width: int) -> list[tuple[tuple[int, ...], ...]]:
    """Indices of each block, by plain loops: the specification of the patterns."""
    found = []
    outputs, inputs = weight.shape[:2]
    for tap in itertools.product(*map(range, weight.shape[2:])):
        for n, c in itertools.product(range(outputs), range(0, inputs, width)):
            found.append(tuple((n, i, *tap) for i in range(c, min(c + width, inputs))))
    return found


def expected_masks(
    dense: dict[str, Tensor], sparsity: float, width: int, scope: str
) -> dict[str, Tensor]:
    """Which weights live, in float64 and by sorting; for weights without ties."""
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
    for pool in [list(dense)] if scope == "global" else [[name] for name in dense]:
        ranked, total = [], 0
        for name in pool:
            energy = {
                block: sum(float(dense[name][index]) ** 2 for index in block)
                for block in blocks(dense[name], width)
            }
            mean, best, total = sum(energy.values()) / len(energy), max(energy.values()), total
            total += len(energy)
            ranked += [(e / mean, name, b) for b, e in energy.items() if e < best]
        ranked.sort(key=lambda entry: entry[0])
        for _, name, block in ranked[: round(sparsity * total)]:
            for index in block:
                masks[name][index] = False
    return masks


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("pattern", "width"), [("unstructured", 1), ("1x4", 4)])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.9, 0.97])
def test_the_masks_are_those_of_the_plain_loops(
    sparsity: float, pattern: str, width: int, scope: str
) -> None:
    model = small_model()
    dense = copy.deepcopy(weights(model))
    expected = expected_masks(dense, sparsity, width, scope)
    prune_(model, sparsity, pattern, scope)
    for name, weight in weights(model).items():
        assert torch.equal(weight, dense[name] * expected[name]), name


def test_a_convolution_block_is_four_input_channels_at_one_tap() -> None:
    conv = nn.Conv2d(8, 2, 3)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.weight[1, 4:8, 2, 0] = 2.0
        conv.weight[0, 0:4, 1, 1] = 1.5
    prune_(conv, sparsity=1 - 2 / 36, pattern="1x4")
    kept = conv.weight.nonzero()
    assert {tuple(index) for index in kept.tolist()} == {
        *((1, c, 2, 0) for c in range(4, 8)),
        *((0, c, 1, 1) for c in range(4)),
    }


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["unstructured", "1x4"]),
    st.sampled_from(["global", "layer"]),
    st.integers(0, 3),
    st.integers(0, 2**30),
)
def test_sparsity_is_exact_whatever_the_ties(
    sparsity: float, pattern: str, scope: str, values: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 8), "b": (2, 5), "c": (4, 6, 2, 1)}
    dense = {
        name: torch.randint(-values, values + 1, shape, generator=generator).float()
        for name, shape in shapes.items()
    }
    kept = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    masks = choose(energies(dense), kept, sparsity, pattern, scope)
    width = {"unstructured": 1, "1x4": 4}[pattern]
    alive, total = {}, {}
    for name, mask in masks.items():
        per_block = [{bool(mask[index]) for index in block} for block in blocks(mask, width)]
        assert all(len(states) == 1 for states in per_block), "a block lives or dies as a whole"
        alive[name], total[name] = sum(True in states for states in per_block), len(per_block)
    assert min(alive.values()) >= 1
    for pool in [list(shapes)] if scope == "global" else [[name] for name in shapes]:
        all_blocks = sum(total[name] for name in pool)
        drop = min(round(sparsity * all_blocks), all_blocks - len(pool))
        assert sum(alive[name] for name in pool) == all_blocks - drop


def test_ties_are_spread_over_the_rows() -> None:
    layer = nn.Linear(16, 8)
    nn.init.constant_(layer.weight, 0.5)
    prune_(layer, 0.5)
    zeros = (layer.weight == 0).sum(dim=1)
    assert int(zeros.sum()) == 64 and int(zeros.min()) >= 7 and int(zeros.max()) <= 9


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_no_layer_is_emptied(scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 2), nn.Linear(8, 2), nn.Linear(4, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 4) * 1e-3)
        model[2].weight.zero_()
    pruner = Pruner(model, 0.999, "1x4", scope=scope)
    pruner.finish()
    for name, mask in pruner.masks.items():
        assert int(mask.sum()) >= 4, name
    assert int((model[1].weight != 0).sum()) == 4
    assert int(pruner.masks["3"].sum()) == 4


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e3, 1e30])
def test_a_layers_scale_does_not_decide(factor: float) -> None:
    dense = weights(small_model())
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
    expected = choose(energies(dense), kept, 0.8, "1x4")
    # A power of two scales without rounding, so not even a near tie may turn.
    exact = 2.0 ** round(torch.tensor(factor).log2().item())
    scaled = choose(energies(dense | {"2": dense["2"] * exact}), kept, 0.8, "1x4")
    assert all(torch.equal(scaled[name], expected[name]) for name in dense)


def test_what_was_dropped_is_dropped_again_before_other_zeros() -> None:
    weight, kept = torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    kept[:, 5] = False
    mask = choose({"fc": weight}, {"fc": kept}, 5 / 32)["fc"]
    assert not mask[:, 5].any() and int(mask.sum()) == 27


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_a_layer_of_its_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64, dtype=dtype))
    dense, expected = copy.deepcopy(weights(model)), copy.deepcopy(model).double()
    prune_(expected, 0.75, "1x4", "layer")
    prune_(model, 0.75, "1x4", "layer")
    assert model[1].weight.dtype == dtype
    for name, weight in weights(model).items():
        assert torch.equal(weight != 0, weights(expected)[name] != 0), name
        assert torch.equal(weight[weight != 0], dense[name][weight != 0]), name


def test_channels_last_weights_get_the_same_masks() -> None:
    model, other = small_model(), small_model().to(memory_format=torch.channels_last)
    prune_(model, 0.7, "1x4")
    prune_(other, 0.7, "1x4")
    assert other[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(w, weights(other)[name]) for name, w in weights(model).items())


def test_equal_weights_give_equal_masks() -> None:
    model = small_model().to(torch.bfloat16)  # few distinct values: many ties
    one, two = Pruner(model, 0.6), Pruner(copy.deepcopy(model), 0.6)
    one.step()
    two.step()
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("shape", [(70, 45), (64, 96), (20, 6, 3, 3), (3, 5)], ids=str)
def test_a_square_block_lives_or_dies_as_a_whole(shape: tuple[int, ...], size: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(size))
    kept = torch.ones(shape, dtype=torch.bool)
    mask = choose({"w": weight.square()}, {"w": kept}, 0.5, f"{size}x{size}")["w"]
    # Of a convolution, blocks of the matrix that a product reads: (tap, channel up to 4).
    sizes, lives, real = (
        conv_matrix(t) if t.dim() == 4 else t for t in (weight.square(), mask, kept)
    )
    sums: dict[tuple[int, int], float] = {}
    states: dict[tuple[int, int], bool] = {}
    for i, j in itertools.product(range(0, lives.shape[0], size), range(0, lives.shape[1], size)):
        block, whole, own = (t[i : i + size, j : j + size] for t in (lives, real, sizes))
        assert torch.equal(block, whole) or not block.any(), "all of its weights or none"
        sums[i, j], states[i, j] = float(own.sum()), bool(block.any())
    dropped = [sums[place] for place, alive in states.items() if not alive]
    assert len(dropped) == min(round(0.5 * len(sums)), len(sums) - 1)
    assert not dropped or max(dropped) < min(sums[p] for p, alive in states.items() if alive)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_square_blocks_by_every_score(score: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(20 * 16, 50))
    with gs.calibrate(model, hessian=True):
        model(torch.randn(8, 3, 6, 6))
    report = prune_(model, 0.75, "16x16", "layer", score=score)
    dead = 0
    weight = model[2].weight.detach()
    for i, j in itertools.product(range(0, 50, 16), range(0, 320, 16)):
        block = weight[i : i + 16, j : j + 16] != 0
        assert block.all() or not block.any()
        dead += not block.any()
    assert dead == 60
    assert "16 does not divide 50 outputs" in str(report)
