"""The saturation-aware scale: int8 weights whose products cannot overflow a 16-bit lane."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.obs import inverse_factor, walk

# Four weights whose products one 16-bit lane sums: 255 * 128 fits in int16, for either sign.
LANE_LIMIT = 128


def quantize_lanes(
    lanes: Tensor, outputs: Tensor, n: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 such that no lane can overflow 16 bits.

    A lane is the set of four weights whose u8 x s8 products a CPU without a 4-way dot sums in
    int16. The scale of an output is the smallest for which every weight fits in 127 and, of every
    lane, the positive weights together in 128 and the negative ones too, so that
    255 * 128 <= 32767 (docs/formats.md derives it). Rounding may overshoot 128 by one or two: the
    weight that gained most by it gives that back. With a scale that is given instead, the weights
    of a sign that are too much for their lane all shrink by what is too much.

    Args:
        lanes: (lanes, 4) float32.
        outputs: (lanes) int64, the output each lane belongs to.
        n: number of outputs.
        scale: (n) float32, if it is not to be chosen.

    Returns:
        q (lanes, 4) int8, scale (n) float32.
    """
    if scale is None:
        scale = lane_scale(lanes, outputs, n)
        exact = lanes / scale[outputs, None]
    else:
        exact = _cut_off(lanes / scale[outputs, None])
    q = exact.round().clamp_(-127, 127)
    for sign in (1, -1):
        over = _overflowing(q, sign).nonzero().squeeze(1)
        while len(over):
            part, goal = q[over] * sign, exact[over] * sign
            gain = torch.where(part > 0, part - goal, torch.full_like(part, -9.0))
            part[torch.arange(len(part)), gain.argmax(1)] -= 1
            q[over] = part * sign
            over = over[_overflowing(q[over], sign)]
    return q.to(torch.int8), scale


def lane_scale(lanes: Tensor, outputs: Tensor, n: int) -> Tensor:
    """The scales (n) of `quantize_lanes`."""
    # Divided first: four of the largest floats would overflow.
    share = lanes / LANE_LIMIT
    positive, negative = share.clamp(min=0).sum(1), share.clamp(max=0).sum(1).neg()
    need = torch.maximum(lanes.abs().amax(1) / 127, torch.maximum(positive, negative))
    scale = torch.zeros(n).scatter_reduce_(0, outputs, need, "amax")
    # An output of zeros, or of denormals that a float cannot divide by: any scale does.
    return torch.where(scale < 2.0**-120, torch.ones(()), scale)


def _cut_off(exact: Tensor) -> Tensor:
    """Lanes whose weights of either sign sum to LANE_LIMIT at most, and no more than 127 each."""
    exact = exact.clamp(-127, 127)
    positive, negative = exact.clamp(min=0), exact.clamp(max=0)
    up = LANE_LIMIT / positive.sum(1, keepdim=True).clamp(min=LANE_LIMIT)
    down = LANE_LIMIT / negative.sum(1, keepdim=True).neg().clamp(min=LANE_LIMIT)
    return positive * up + negative * down


def gptq_lanes(weight: Tensor, hessian: Tensor, lane: Tensor, scale: Tensor) -> Tensor:
    """Like `quantize_lanes`, but column by column, the next columns making up for the rounding.

    Args:
        weight: (n, k) float32.
        hessian: (k, k), see `gossamer.obs`.
        lane: (n, k) int64, the lane of each weight; -1 where the weight is not stored.
        scale: (n).

    Returns:
        q (n, k) int8.
    """
    # What each lane may still hold, of positive and of negative weights; lane -1 holds nothing.
    room = torch.full((2, int(lane.max()) + 2), float(LANE_LIMIT))
    room[:, -1] = 0

    def decide(j: int, ahead: Tensor) -> Tensor:
        own = lane[:, j]
        above, below = room[:, own].clamp_(max=127)
        q = (ahead[0] / scale).round_().clamp_(-below, above)
        # No two outputs share a lane, but for -1, of which nothing is taken.
        room[0, own] -= q.clamp(min=0)
        room[1, own] += q.clamp(max=0)
        return q * scale

    return (walk(weight, inverse_factor(hessian), decide) / scale[:, None]).round_().to(torch.int8)


def _overflowing(lanes: Tensor, sign: int) -> Tensor:
    """Which lanes hold weights of that sign that sum to more than the limit."""
    return (lanes * sign).clamp_(min=0).sum(1) > LANE_LIMIT


def check_lanes(lanes: Tensor, what: str) -> None:
    """ValueError unless the products of every lane fit in 16 bits."""
    wide = lanes.to(torch.int32)
    if (wide.clamp(min=0).sum(1) > LANE_LIMIT).any() or (
        wide.clamp(max=0).sum(1) < -LANE_LIMIT
    ).any():
        raise ValueError(
            f"{what} holds weights whose products overflow 16 bits: the file is damaged"
        )


def check_scale(scale: Tensor, n: int) -> None:
    """ValueError unless there are n finite positive scales."""
    if scale.shape != (n,) or not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be {n} finite positive numbers, the file is damaged")


def check_wsum(wsum: Tensor, q: Tensor) -> None:
    """ValueError unless wsum (n) is the sum of each row of q (n, k)."""
    if wsum.shape != q.shape[:1] or not torch.equal(wsum, q.sum(1, dtype=torch.int32)):
        raise ValueError("wsum is not the sum of each output's weights: the file is damaged")


def scale_signs(scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """What outputs times `factor` (n) make of their integers, and of their scales (n) float32.

    The size of a factor goes into the scale; integers only take its sign, int8 of -1, 0 or 1,
    which no lane minds: the limit is the same for both signs. Where the product is nothing that a
    float can divide by, the integers are 0, and any scale does.

    Raises:
        ValueError: a factor is not finite.
    """
    size = scale * factor.abs().float()
    if not torch.isfinite(size).all():
        raise ValueError("the factor of an output is not finite: its weights would not be either")
    nothing = size < 2.0**-120
    sign = torch.where(nothing, 0.0, factor.sign().float()).to(torch.int8)
    return sign, torch.where(nothing, torch.ones(()), size)


def times_sign(q: Tensor, sign: Tensor) -> Tensor:
    """Integers times signs of a shape that broadcasts; the same memory where all are 1.

    Raises:
        ValueError: -128, which packing never makes, would have to become 128.
    """
    if (sign == 1).all():
        return q
    if ((q == -128) & (sign == -1)).any():
        raise ValueError("the weight holds a -128, whose negative is no int8: pack it again")
    return q * sign


def lanes_of(q: Tensor) -> Tensor:
    """(n, k) with k a multiple of 8 -> (n * k / 4, 4): inputs 0 1 4 5 and 2 3 6 7 of every 8."""
    return _swap_pairs(q).view(-1, 4)


def unlanes(lanes: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `lanes_of`: (n * k / 4, 4) -> (n, k)."""
    return _swap_pairs(lanes).view(n, k)


# Two weights as one number: half as many to move.
_PAIR = {1: torch.int16, 4: torch.int64}


def lane_ids(lanes: int, n: int, k: int) -> Tensor:
    """(n, k) int64: the lane that each weight is in."""
    own = torch.arange(lanes, dtype=torch.int32)[:, None].expand(-1, 4).contiguous()
    return unlanes(own, n, k).long()


def _swap_pairs(q: Tensor) -> Tensor:
    """Of every 8 in a row the second pair and the third change places; rows of 8."""
    pairs = q.reshape(-1, 8).view(_PAIR[q.element_size()])
    return pairs.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4).view(q.dtype)
