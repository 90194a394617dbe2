"""The second-order walk against closed forms in float64, and SparseGPT on top of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.calibrate import weight_matrix
from gossamer.masks import Pattern
from gossamer.obs import BLOCK, _Drop, inverse_factor, output_error, prune_weight, walk
from gossamer.observed import observed


def correlated(k: int, rows: int = 400, seed: int = 0) -> Tensor:
    """A Hessian of inputs that say much the same, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, k, generator=generator) * 0.8 ** torch.arange(k)
    x = few @ torch.randn(k, k, generator=generator)
    x = x + 0.3 * torch.randn(rows, k, generator=generator)
    return x.T @ x / rows


def weights(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    h = hessian.double()
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_what_is_ahead_is_always_the_least_squares_solution(block: int) -> None:
    k, hessian, weight = 10, correlated(10), weights(5, 10)
    h, seen, settled = damped(hessian), [], []

    def decide(j: int, ahead: Tensor) -> Tensor:
        seen.append(ahead[0].clone())
        settled.append(ahead[0].round() if j % 3 else torch.zeros_like(ahead[0]))
        return settled[-1]

    result = walk(weight, inverse_factor(hessian), decide, block)
    assert torch.equal(result, torch.stack(settled, 1))
    for j in range(1, k):
        # min over d_ahead of d H d^T, with d_done given.
        done = torch.stack(settled[:j], 1).double() - weight[:, :j].double()
        change = -torch.linalg.solve(h[j:, j:], h[j:, :j] @ done.T)
        best = weight[:, j].double() + change[0]
        torch.testing.assert_close(seen[j].double(), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 4])
def test_a_score_is_the_error_that_dropping_the_block_costs(width: int) -> None:
    k, hessian, weight = 12, correlated(12), weights(3, 12)
    h, alive = damped(hessian), torch.ones(k, 3, dtype=torch.bool)
    form = Pattern("", width)
    drop = _Drop(weight.t(), inverse_factor(hessian), alive, form, 0.5)
    scores = drop._scores(0, weight.t().contiguous())
    for block in range(k // width):
        at, end = block * width, block * width + width
        for row in range(3):
            # Those after the block do what they can: the Schur complement is what remains.
            rest = h[end:, end:]
            cost = h[at:end, at:end] - h[at:end, end:] @ torch.linalg.solve(rest, h[end:, at:end])
            w = weight[row, at:end].double()
            assert float(scores[block, row]) == pytest.approx(float(w @ cost @ w), rel=1e-3)


def test_the_score_of_one_weight_is_that_of_hassibi_and_stork() -> None:
    hessian, weight = correlated(6), weights(1, 6)
    inverse = torch.linalg.inv(damped(hessian))
    # Dropping the first weight: w - w_0 / Hinv_00 * Hinv_0, at the cost of w_0^2 / Hinv_00.
    want = weight[0].double() - weight[0, 0] / inverse[0, 0] * inverse[0]
    got = walk(weight, inverse_factor(hessian), lambda j, ahead: ahead[0] * (j > 0))[0].double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    d = got - weight[0].double()
    cost = float(d @ damped(hessian) @ d)
    assert cost == pytest.approx(float(weight[0, 0] ** 2 / inverse[0, 0]), rel=1e-3)


@pytest.mark.parametrize("k", [5, 64, BLOCK + 3, 2 * BLOCK + 6])
@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4", "3:5", "1:2"])
def test_masks_keep_to_their_pattern(pattern: str, k: int) -> None:
    n, sparsity = 7, 0.6
    pruned, mask = prune_weight(weights(n, k), correlated(k), sparsity, pattern)
    assert pruned.shape == mask.shape == (n, k)
    assert (pruned[~mask] == 0).all() and (pruned[mask] != 0).all()
    padded = torch.nn.functional.pad(mask, (0, -k % 4))
    if pattern == "unstructured":
        assert int((~mask).sum()) == round(sparsity * n * k)
    elif pattern == "1x4":
        blocks = padded.view(n, -1, 4)
        last = blocks[:, -1, : k % 4 or 4]
        assert (blocks[:, :-1].all(2) == blocks[:, :-1].any(2)).all()
        assert (last.all(1) == last.any(1)).all()
        dropped = int((~blocks.any(2)).sum())
        assert dropped == round(sparsity * n * blocks.shape[1])
    else:
        keep, of = map(int, pattern.split(":"))
        groups = torch.nn.functional.pad(mask, (0, -k % of)).view(n, -1, of).sum(2)
        assert (groups[:, : k // of] == keep).all() and (groups <= keep).all()


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
def test_it_beats_magnitude_and_its_own_mask_without_update(pattern: str) -> None:
    hessian, weight = correlated(96), weights(16, 96)
    pruned, mask = prune_weight(weight, hessian, 0.5, pattern)
    width = 4 if pattern == "1x4" else 1
    size = weight.view(16, -1, width).square().sum(2)
    if pattern == "2:4":
        least = size.view(16, -1, 4).argsort(-1).argsort(-1).view(16, -1) < 2
    else:
        least = size < size.flatten().median()
    magnitude = weight.masked_fill(least.repeat_interleave(width, 1), 0)
    error = output_error(weight, pruned, hessian)
    assert error < 0.7 * output_error(weight, weight * mask, hessian)
    assert error < 0.7 * output_error(weight, magnitude, hessian)


def test_what_is_gone_goes_first_and_stays_zero() -> None:
    hessian, weight = correlated(160), weights(6, 160)
    _, first = prune_weight(weight, hessian, 0.3)
    again, second = prune_weight(weight * first, hessian, 0.5, mask=first)
    assert not (second & ~first).any() and (again[~first] == 0).all()
    assert int((~second).sum()) == round(0.5 * 6 * 160)


def test_the_best_weight_stays_whatever_the_sparsity() -> None:
    pruned, mask = prune_weight(weights(1, 4), correlated(4), 0.99)
    assert int(mask.sum()) == 1 and int((pruned != 0).sum()) == 1


def test_inputs_that_were_never_seen_make_a_plain_magnitude_choice() -> None:
    weight = weights(4, 64)
    pruned, mask = prune_weight(weight, torch.zeros(64, 64), 0.5)
    assert torch.equal(pruned, weight * mask)
    assert weight[mask].abs().min() > weight[~mask].abs().max()


@pytest.mark.parametrize("rows", [1, 8])
def test_fewer_rows_than_columns_and_dead_inputs_are_damped(rows: int) -> None:
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2))
    x[:, 10:20] = 0
    hessian, weight = x.T @ x / rows, weights(5, 40)
    pruned, mask = prune_weight(weight, hessian, 0.5)
    assert torch.isfinite(pruned).all()
    assert pruned.abs().max() < 10 * weight.abs().max()
    # Nothing is known of dead inputs: what is kept of them keeps its value.
    assert torch.equal(pruned[:, 10:20], (weight * mask)[:, 10:20])
    assert output_error(weight, pruned, hessian) < 0.2


def test_bad_arguments_are_sentences() -> None:
    hessian, weight = correlated(8), weights(2, 8)
    nan = hessian.clone()
    nan[1, 2] = float("nan")
    with pytest.raises(ValueError, match="Hessian holds a NaN"):
        prune_weight(weight, nan, 0.5)
    with pytest.raises(ValueError, match="weight holds a NaN"):
        prune_weight(weight / 0, hessian, 0.5)
    with pytest.raises(ValueError, match=r"the weight is \(2, 8\) and the Hessian \(3, 3\)"):
        prune_weight(weight, torch.eye(3), 0.5)
    with pytest.raises(ValueError, match=r"sparsity=1.5 is not in \[0, 1\)"):
        prune_weight(weight, hessian, 1.5)
    for pattern, message in (("4:2", "is unknown"), ("channel", "no other can make up for")):
        with pytest.raises(ValueError, match=message):
            prune_weight(weight, hessian, 0.5, pattern)
    with pytest.raises(ValueError, match="damping=0 must be above 0"):
        inverse_factor(hessian, 0)
    with pytest.raises(ValueError, match=r"must be \(k, k\), got shape \(2, 8\)"):
        inverse_factor(weight)


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
def test_prune_goes_this_way_too_convolutions_included(pattern: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    x = torch.randn(64, 3, 6, 6)
    with gs.calibrate(dense, hessian=True):
        dense(x)
    errors = {}
    for score in ("magnitude", "sparsegpt"):
        model = copy.deepcopy(dense)
        pruner = gs.Pruner(model, 0.5, pattern, scope="layer", score=score)
        pruner.finish()
        assert pruner.sparsity == pytest.approx(0.5, abs=0.05)
        for name, mask in pruner.masks.items():
            layer, before = model.get_submodule(name), dense.get_submodule(name)
            assert (layer.weight[~mask] == 0).all()
            seen = observed(before)
            assert seen is not None and seen.hessian is not None
            matrices = weight_matrix(before), weight_matrix(layer)
            errors[score, name] = output_error(*matrices, seen.hessian)
    # Pixels of noise say nothing of each other: there is nothing to make up in the convolution.
    assert errors["sparsegpt", "0"] < 1.02 * errors["magnitude", "0"]
    assert errors["sparsegpt", "3"] < 0.6 * errors["magnitude", "3"]
