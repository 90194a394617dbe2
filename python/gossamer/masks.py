"""Which blocks of weights go: patterns, exact ranks, and masks of one bit a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import conv_matrix, conv_weight

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Pattern:
    """Which weights live and die together, and how many may live side by side.

    Args:
        name: as the user writes it.
        width: inputs of a block; 0 stands for all weights of an output.
        keep, of: at most `keep` of `of` consecutive inputs live; 0 of 0 is no limit.
        height: outputs of a block.

    Example:
        >>> Pattern.named("2:4")
        Pattern(name='2:4', width=1, keep=2, of=4, height=1)
    """

    name: str
    width: int
    keep: int = 0
    of: int = 0
    height: int = 1

    @classmethod
    def named(cls, name: str) -> Pattern:
        """The pattern that is called so.

        Raises:
            ValueError: there is none.
        """
        fixed = {"unstructured": (1, 1), "1x4": (1, 4), "channel": (1, 0)}
        fixed |= {"16x16": (16, 16), "32x32": (32, 32)}
        if name in fixed:
            height, width = fixed[name]
            return cls(name, width, height=height)
        n_of_m = re.fullmatch(r"(\d{1,3}):(\d{1,3})", str(name))
        if n_of_m and 0 < int(n_of_m[1]) < int(n_of_m[2]):
            return cls(name, 1, int(n_of_m[1]), int(n_of_m[2]))
        raise ValueError(
            f"pattern={name!r} is unknown: choose one of {list(fixed)}, "
            "or N of M inputs that live, such as '2:4'"
        )

    @property
    def sparsity(self) -> float | None:
        """What the pattern implies, or None."""
        return 1 - self.keep / self.of if self.of else None

    def blocks(self, weight: Tensor) -> Tensor:
        """(n, k) or (n, c, kh, kw) as (n, [kh, kw,] blocks, weights of a block), zero-padded.

        Of blocks higher than 1, (n / height, blocks, weights of a block): a convolution's lie in
        its matrix (tap, channel up to 4), which is what a product reads.
        """
        if not self.width:
            return weight.flatten(1).unsqueeze(1)
        if self.height > 1:
            matrix = conv_matrix(weight) if weight.dim() == 4 else weight
            n, k = matrix.shape
            padded = F.pad(matrix, (0, -k % self.width, 0, -n % self.height))
            tiles = padded.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
            return tiles.transpose(1, 2).flatten(2)
        inputs_last = weight.movedim(1, -1)
        padded = F.pad(inputs_last, (0, -inputs_last.shape[-1] % self.width))
        return padded.reshape(*padded.shape[:-1], -1, self.width)

    def spread(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """One bool a block -> one bool a weight, in the weight's `shape`."""
        if not self.width:
            return keep.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        wide = keep.repeat_interleave(self.width, -1)
        if self.height > 1:
            wide = wide.repeat_interleave(self.height, 0)[: shape[0]]
            if len(shape) == 2:
                return wide[:, : shape[1]].contiguous()
            k = shape[2] * shape[3] * (shape[1] + -shape[1] % 4)
            return conv_weight(wide[:, :k], shape)
        return wide[..., : shape[1]].movedim(-1, 1).contiguous()


def choose(
    energies: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    pattern: str = "unstructured",
    scope: str = "global",
    cap: float = 1.0,
) -> dict[str, Tensor]:
    """The masks that keep the blocks of most energy and drop `sparsity` of all blocks.

    A block's score is the sum of its weights' energies, in units of its layer's mean score: a
    layer's scale says how wide it is and what norm follows it, not how much it matters, and raw
    scores would empty the widest layers. What must live (each layer's best block, what is above
    the cap, N of M) has an infinite score, so that one ranking fills the other layers up.

    Args:
        energies: name -> float, (n, k) or (n, c, kh, kw): how much each weight matters, from 0.
        masks: name -> bool, True where a weight is kept now; the others are dropped first.
        sparsity: share of blocks to drop, in [0, 1); exact up to rounding to whole blocks, unless
            more must live. For all layers, or name -> share where `scope` is not global.
        pattern: see `Pattern.named`.
        scope: `"global"` ranks the blocks of all layers together, `"layer"` each layer's,
            `"output"` each output's within its layer: all outputs lose the same number, but one.
        cap: the largest share of one layer's blocks that may be dropped.

    Example:
        >>> import torch
        >>> from gossamer.masks import choose
        >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
        >>> choose({"fc": weight}, {"fc": torch.ones(2, 4).bool()}, sparsity=0.5)["fc"].int()
        tensor([[0, 0, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    form, chosen = Pattern.named(pattern), dict[str, Tensor]()
    for pool in [list(energies)] if scope == "global" else [[name] for name in energies]:
        scores = [_scores(energies[n], masks[n], form, scope == "output", cap) for n in pool]
        flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        share = sparsity[pool[0]] if isinstance(sparsity, Mapping) else sparsity
        count = min(round(share * len(flat)), int(flat.isfinite().sum()))
        dropped = lowest(flat, count).split([score.numel() for score in scores])
        for name, score, drop in zip(pool, scores, dropped, strict=True):
            keep = ~drop.view(score.shape).to(score.device)
            chosen[name] = form.spread(keep, energies[name].shape)
    return chosen


def _scores(energy: Tensor, mask: Tensor, form: Pattern, by_output: bool, cap: float) -> Tensor:
    """Energy of each block over the layer's mean; -1 if dropped before, inf if it must live."""
    # A short block has fewer weights and a lower score: rightly, as it costs what a full one costs.
    score = form.blocks(energy).sum(-1)
    score = score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)
    dropped = ~form.blocks(mask).any(-1)
    score.masked_fill_(dropped, -1.0)
    lives = torch.zeros_like(dropped)
    if form.of:
        groups = F.pad(score, (0, -score.shape[-1] % form.of), value=-2.0)
        best = _ranks(groups.unflatten(-1, (-1, form.of))) >= form.of - form.keep
        lives = best.flatten(-2)[..., : score.shape[-1]].clone()
    if by_output and form.width:
        score = _ranks(score.flatten(1)).view_as(score).to(score.dtype).masked_fill_(dropped, -1.0)
    # 0.57 of 100 blocks is 57, though 0.57 * 100 is less.
    least = max(1, score.numel() - math.floor(cap * score.numel() + 1e-6))
    lives.view(-1)[lowest(-score.flatten(), least)] = True
    return score.masked_fill_(lives, math.inf)


def _ranks(score: Tensor) -> Tensor:
    """0 for the lowest of each last dimension, 1 for the next, ...; equals in their order."""
    return score.argsort(dim=-1, stable=True).argsort(-1)


def lowest(score: Tensor, count: int) -> Tensor:
    """True at exactly `count` of the lowest scores (1-d), evenly among those tied at the limit."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # Not kthvalue: torch.use_deterministic_algorithms forbids it on CUDA.
    limit = score.topk(count, largest=False, sorted=False).values.max()
    chosen = score < limit
    ties = (score == limit).nonzero().flatten()
    rest = count - int(chosen.sum())
    chosen[ties[torch.arange(rest, device=score.device) * len(ties) // rest]] = True
    return chosen


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as uint8 of an eighth its length, the first one the lowest bit.

    Example:
        >>> import torch
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    flat = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(
        -1, dtype=torch.uint8
    )


# The eight bools of each byte as one int64: looking them up takes 0.22 ms for 2.4 million weights,
# shifts 1.9 ms, and AdamW on these weights 5 ms.
_BYTES = (
    ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.bool).view(torch.int64).flatten()
)


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor that `pack_bits` packed.

    Example:
        >>> import torch
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    flat = _BYTES.to(bits.device).index_select(0, bits.int()).view(torch.bool)
    return flat[: math.prod(shape)].view(shape)
