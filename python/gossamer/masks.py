"""Which blocks of weights matter least: scores, exact ranks and the masks made from them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = {"unstructured": 1, "1x4": 4}  # name -> inputs that live and die together: a block
SCOPES = ("global", "layer")


def choose(
    weights: dict[str, Tensor],
    masks: dict[str, Tensor],
    sparsity: float,
    pattern: str = "unstructured",
    scope: str = "global",
) -> dict[str, Tensor]:
    """The masks that keep the best blocks of `weights` and drop `sparsity` of all blocks.

    A block's score is its squared norm, so that the weight matrix changes least (Frobenius). It
    counts in units of its layer's mean score: a layer's scale says how wide it is and what norm
    follows it, not how much it matters, and raw magnitudes would empty the widest layers. Each
    layer keeps its best block, so that none is cut off.

    Args:
        weights: name -> (n, k) or (n, c, kh, kw), any floating dtype and device.
        masks: name -> bool, True where a weight is kept now; the others are dropped first.
        sparsity: share of blocks to drop, in [0, 1); exact up to rounding to whole blocks.
        pattern: one of `PATTERNS`.
        scope: `"global"` ranks the blocks of all layers together, `"layer"` each layer's.

    Raises:
        ValueError: a weight is NaN or Inf.

    Example:
        >>> import torch
        >>> from gossamer.masks import choose
        >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
        >>> choose({"fc": weight}, {"fc": torch.ones(2, 4).bool()}, sparsity=0.5)["fc"].int()
        tensor([[0, 0, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    width, chosen = PATTERNS[pattern], dict[str, Tensor]()
    for pool in [list(weights)] if scope == "global" else [[name] for name in weights]:
        scores = [_scores(name, weights[name], masks[name], width) for name in pool]
        flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        count = min(round(sparsity * len(flat)), len(flat) - len(pool))
        dropped = _lowest(flat, count).split([score.numel() for score in scores])
        for name, score, drop in zip(pool, scores, dropped, strict=True):
            keep = ~drop.view(score.shape).to(score.device)
            chosen[name] = _spread(keep, weights[name].shape, width)
    return chosen


def _scores(name: str, weight: Tensor, mask: Tensor, width: int) -> Tensor:
    """Squared norm of each block over the layer's mean; -1 if dropped before, inf at the best."""
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(
            f"layer {name!r} has {bad} weights that are NaN or Inf and cannot be ranked: "
            "return to a checkpoint from before they appeared"
        )
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    tiny = torch.finfo(size.dtype).tiny  # for layers of zeros only
    # Divided first: the squares of weights near 1e-20 or 1e+20 are outside the range of fp32.
    score = _blocks(size / size.max().clamp_min(tiny), width).square().sum(-1)
    # A short block has fewer weights and a lower score: rightly, as it costs what a full one costs.
    score = score / score.mean().clamp_min(tiny)
    score.masked_fill_(~_blocks(mask, width).any(-1), -1.0)
    score.view(-1)[score.argmax()] = math.inf
    return score


def _blocks(weight: Tensor, width: int) -> Tensor:
    """(n, k) or (n, c, kh, kw) as (n, [kh, kw,] blocks, width), zero-padded: inputs come last."""
    inputs_last = weight.movedim(1, -1)
    padded = F.pad(inputs_last, (0, -inputs_last.shape[-1] % width))
    return padded.reshape(*padded.shape[:-1], -1, width)


def _spread(keep: Tensor, shape: torch.Size, width: int) -> Tensor:
    """One bool a block -> one bool a weight, in the weight's `shape`."""
    return keep.repeat_interleave(width, -1)[..., : shape[1]].movedim(-1, 1).contiguous()


def _lowest(score: Tensor, count: int) -> Tensor:
    """True at exactly `count` of the lowest scores (1-d), evenly among those tied at the limit."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # Not kthvalue: torch.use_deterministic_algorithms forbids it on CUDA.
    limit = score.topk(count, largest=False, sorted=False).values.max()
    lowest = score < limit
    ties = (score == limit).nonzero().flatten()
    rest = count - int(lowest.sum())
    lowest[ties[torch.arange(rest, device=score.device) * len(ties) // rest]] = True
    return lowest
