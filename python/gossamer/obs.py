"""Optimal brain surgery, column by column: what a weight loses, those after it make up for.

For a layer y = x @ w^T with inputs of second moment H = mean(x x^T), the output's squared error of
w + d is d H d^T. Once columns 0..j are decided, the best that the columns after j can do has a
closed form, and one triangular factor of H^-1 holds it for every j. What "decided" means is the
caller's: rounded to a grid (GPTQ), or dropped (SparseGPT).
Sources: Hassibi & Stork 1993, Frantar et al. 2022 (GPTQ, arXiv 2210.17323), Frantar & Alistarh
2023 (SparseGPT, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import Pattern, lowest

BLOCK = 128  # columns: their updates stay in L2, later columns get theirs in one product
DAMPING = 0.01  # of the mean of H's diagonal

Decide = Callable[[int, Tensor], Tensor]
"""(j, ahead) -> (n), the final column j.

`ahead` (columns, n) holds column j and those after it in its block, as they are after all updates.
"""


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular u with u^T u = (H + damping * mean(diag H) * I)^-1.

    The damping keeps directions that the calibration data hardly saw, or never, from being moved
    at will: with fewer rows than columns, or inputs that are always zero, H alone has no inverse.

    Args:
        hessian: (k, k) float32, the mean of x x^T.
        damping: above 0.

    Returns:
        (k, k) float32. Computed in float64: the condition number comes to 100 k.

    Raises:
        ValueError: the Hessian is not a finite square matrix, or the damping not above 0.

    Example:
        >>> import torch
        >>> u = inverse_factor(torch.diag(torch.tensor([4.0, 1.0])), damping=1e-9)
        >>> (u.T @ u).diagonal()
        tensor([0.2500, 1.0000])
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"a Hessian must be (k, k), got shape {tuple(hessian.shape)}")
    if not torch.isfinite(hessian).all():
        raise ValueError(
            "the Hessian holds a NaN or an Inf: look for it in the inputs of the calibration"
        )
    if not damping > 0:
        raise ValueError(f"damping={damping} must be above 0: {DAMPING} is usual")
    h = hessian.double()
    h.diagonal().add_(damping * h.diagonal().mean().item() or 1.0)
    # H = a a^T with a upper triangular (Cholesky from the last column to the first); u = a^-1.
    a = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(a, identity, upper=True).float()


def walk(weight: Tensor, factor: Tensor, decide: Decide, block: int = BLOCK) -> Tensor:
    """The weight (n, k) float32 after `decide` has settled each column in turn, on a copy.

    Each column's error e = w_j - decide(j), over u_jj, goes to the columns c behind it as
    -e u_jc / u_jj: they are then the least-squares solution, given what is settled.

    Args:
        weight: (n, k) float32.
        factor: (k, k), see `inverse_factor`.
        decide: see `Decide`; called for j = 0 .. k - 1.
        block: columns of which `decide` sees as much as is left.

    Example:
        >>> import torch
        >>> h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that say nearly the same
        >>> drop_first = lambda j, ahead: ahead[0] * j
        >>> walk(torch.tensor([[1.0, 1.0]]), inverse_factor(h, 1e-6), drop_first)
        tensor([[0.0000, 1.9000]])
    """
    w = weight.t().contiguous()  # a column is a row here: contiguous
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            decided = decide(j, w[j:stop])
            error = errors[j - start] = (w[j] - decided) / factor[j, j]
            w[j] = decided
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return w.t().contiguous()


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """|| x (weight - other)^T || / || x weight^T ||, over the inputs whose mean x x^T is H.

    Example:
        >>> import torch
        >>> output_error(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.eye(2)) ** 2
        0.5000000000000001
    """
    h, difference = hessian.double(), (weight - other).double()
    total = ((weight.double() @ h) * weight).sum()
    return (((difference @ h) * difference).sum().clamp(min=0) / total).sqrt().item()


def prune_weight(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: str = "unstructured",
    mask: Tensor | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """SparseGPT: drops blocks of a layer's weights, and lets the others make up for them.

    The output's squared error of dropping a block b alone is |u_bb^-T w_b|^2 (of one weight:
    w^2 / u_jj^2), with the columns before it settled. For N of M, each group of M columns drops the
    M - N of least error when the walk comes to it. Else the least of the blocks go, in each stretch
    of `BLOCK` columns as many as a ranking of the whole layer gave it, chosen anew when the walk
    comes to it.

    Args:
        weight: (n, k), any float dtype.
        hessian: (k, k), see `inverse_factor`.
        sparsity: share of blocks to drop, in [0, 1). "N:M" needs none: 1 - N / M.
        pattern: "unstructured", "1x4", "16x16", "32x32" or "N:M", such as "2:4"; see
            `masks.Pattern`.
        mask: (n, k) bool, False where a weight is gone already and stays at zero: these are the
            first to be dropped. By default none is.
        damping: see `inverse_factor`.

    Returns:
        The new weight (n, k) float32, and its mask, True where a weight was kept.

    Raises:
        ValueError: sizes that do not fit, a weight or Hessian that is not finite, an argument out
            of its range, a pattern that is not one of these.

    Example:
        >>> import torch
        >>> h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that say nearly the same
        >>> prune_weight(torch.tensor([[1.0, 1.1]]), h, sparsity=0.5, damping=1e-6)
        (tensor([[0.0000, 2.0000]]), tensor([[False,  True]]))
    """
    form = Pattern.named(pattern)
    if not form.width:
        raise ValueError(f"pattern={pattern!r} drops whole outputs, which no other can make up for")
    if not form.of and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is not in [0, 1): give the share to drop")
    weight = _checked(weight, hessian)
    k, unit = weight.shape[1], form.of or form.width
    # Columns behind the last make its block or group whole. They are zeros, and touch no other.
    more = -k % unit
    factor = torch.block_diag(
        inverse_factor(hessian, damping), torch.eye(more, device=hessian.device)
    )
    columns = F.pad(weight, (0, more))
    alive = F.pad(torch.ones_like(weight, dtype=torch.bool) if mask is None else mask, (0, more))
    drop = _Drop(columns.t(), factor, alive.t().contiguous(), form, sparsity)
    settled = walk(columns, factor, drop, drop.block)
    return settled[:, :k].contiguous(), drop.alive.t()[:, :k].contiguous()


def _checked(weight: Tensor, hessian: Tensor) -> Tensor:
    """The weight as float32, or the sentence that says why it cannot be worked on."""
    if weight.dim() != 2 or hessian.shape != 2 * weight.shape[1:]:
        raise ValueError(
            f"the weight is {tuple(weight.shape)} and the Hessian {tuple(hessian.shape)}: "
            "they must be (n, k) and (k, k)"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            "the weight holds a NaN or an Inf: return to a checkpoint from before it appeared"
        )
    return weight.detach().float()


class _Drop:
    """The decision of `prune_weight`: chooses for a stretch at its first column, then drops."""

    def __init__(
        self, columns: Tensor, factor: Tensor, alive: Tensor, form: Pattern, sparsity: float
    ) -> None:
        self.factor, self.alive = factor, alive
        self.width, self.height, self.fewer = form.width, form.height, form.of - form.keep
        unit = form.of or form.width
        self.block = max(unit, BLOCK - BLOCK % unit)
        self.stretch = form.of or self.block
        self.counts: list[int] = []
        if not form.of:
            scores = self._scores(0, columns)
            # The layer keeps its best block, whatever the sparsity.
            count = min(round(sparsity * scores.numel()), scores.numel() - 1)
            dropped = lowest(scores.flatten(), count).view_as(scores)
            self.counts = [int(part.sum()) for part in dropped.split(self.block // form.width)]

    def __call__(self, j: int, ahead: Tensor) -> Tensor:
        if j % self.stretch == 0:
            scores = self._scores(j, ahead[: self.stretch])
            if self.fewer:
                keep = scores.argsort(dim=0, stable=True).argsort(0) >= self.fewer
            else:
                keep = ~lowest(scores.flatten(), self.counts[j // self.stretch]).view_as(scores)
            keep = keep.repeat_interleave(self.height, 1)[:, : self.alive.shape[1]]
            self.alive[j : j + self.stretch] &= keep.repeat_interleave(self.width, 0)
        return ahead[0].where(self.alive[j], 0.0)

    def _scores(self, j: int, columns: Tensor) -> Tensor:
        """(blocks, n / height): the error of dropping each block from column j on; -1 if gone."""
        width, stop = self.width, j + len(columns)
        tiles = self.factor[j:stop, j:stop].unflatten(0, (-1, width)).unflatten(2, (-1, width))
        u = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (blocks, width, width)
        blocks = columns.unflatten(0, (-1, width))
        lost = torch.linalg.solve_triangular(u.mT, blocks, upper=False).square().sum(1)
        alive = self.alive[j:stop].unflatten(0, (-1, width)).any(1)
        # Outputs do not make up for each other: their errors add.
        short = (0, -lost.shape[1] % self.height)
        lost = F.pad(lost, short).unflatten(1, (-1, self.height)).sum(2)
        gone = ~F.pad(alive, short).unflatten(1, (-1, self.height)).any(2)
        return lost.masked_fill(gone, -1.0)
