"""Schedules of pruning: which share of the final sparsity is due after how many steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Schedule = Callable[[int], float]
"""Maps the number of steps taken to the share of the final sparsity, in [0, 1], due by then."""


@dataclass(frozen=True)
class OneShot:
    """s(t) = 1: the whole sparsity at the first step.

    Example:
        >>> import gossamer as gs
        >>> gs.OneShot()(1)
        1.0
    """

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Polynomial:
    """s(t) = 1 - (1 - (t - begin) / steps)^power: a straight line with the power 1.

    Args:
        steps: from the first weight pruned to the final sparsity, in calls of `Pruner.step`.
        power: above 1 the first weights go faster than the last ones.
        begin: steps that leave the model dense.
        every: steps between two choices of masks; by default a hundredth of `steps`, as each
            choice ranks all weights.

    Raises:
        ValueError: `steps` or `every` below 1, `begin` below 0, `power` not a positive number.

    Example:
        >>> import gossamer as gs
        >>> [gs.Polynomial(steps=4)(step) for step in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    steps: int
    power: float = 1
    begin: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("begin", 0), ("every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                kind = type(self).__name__
                raise ValueError(f"{name}={value} is too small: {kind} needs at least {least}")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power={self.power} is not a positive number: 1 is a straight line")

    def __call__(self, step: int) -> float:
        elapsed = min(step - self.begin, self.steps)
        if elapsed <= 0:
            return 0.0
        if elapsed < self.steps:
            elapsed -= elapsed % (self.every or math.ceil(self.steps / 100))
        return 1.0 - (1.0 - elapsed / self.steps) ** self.power


@dataclass(frozen=True)
class Cubic(Polynomial):
    """s(t) = 1 - (1 - (t - begin) / steps)^3: fast while weights are redundant, slow at the end.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, equation 1.

    Args:
        steps: from the first weight pruned to the final sparsity, in calls of `Pruner.step`.
        begin: steps that leave the model dense.
        every: steps between two choices of masks; by default a hundredth of `steps`, as each
            choice ranks all weights.

    Raises:
        ValueError: `steps` or `every` below 1, `begin` below 0.

    Example:
        >>> import gossamer as gs
        >>> [gs.Cubic(steps=4)(step) for step in range(5)]
        [0.0, 0.578125, 0.875, 0.984375, 1.0]
    """

    power: float = field(default=3, init=False, repr=False)
