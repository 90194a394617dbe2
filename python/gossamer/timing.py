"""Forwards and clocks: rounds are interleaved, so that a drift of the clock hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], object]


def forward(model: nn.Module, example_inputs: Any) -> Any:
    """model(*example_inputs), or model(**example_inputs) for a dict, or model(x) for one tensor.

    Example:
        >>> forward(nn.Flatten(), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 12])
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return model(*example_inputs)
    raise TypeError(
        "example_inputs must be a tuple of the model's arguments, a dict of its keywords, or one "
        f"tensor, got {type(example_inputs).__name__}: write example_inputs=(x,)"
    )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within: torch computes with `count` threads (None: as many as now); after: as before."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Within: all modules in eval mode and no gradients; after: each module's own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unfused() -> Iterator[None]:
    """Within: nn.MultiheadAttention and the transformer layers call their submodules, always.

    In eval mode torch calls one fused kernel on the weights instead, and no hook of theirs runs.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def interleave(calls: Sequence[Call], rounds: int, warm: float = 0.0) -> list[list[float]]:
    """Milliseconds of each call in each round, after one unmeasured round; -> [call][time].

    With `warm`, each call runs for so many seconds, once at least, right before it is timed: as
    where nothing else runs, the cache holds what it uses, not what the others left, and its threads
    have cores of their own (Linux may wake one on its waker's, and move it 10 ms later). It is
    timed for as long then, once at least: a round has more times of a shorter call.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for index in range(rounds):
        # Every other round runs backwards: who runs second finds the other one's data in cache.
        order = list(enumerate(calls))[:: -1 if index % 2 else 1]
        for which, call in order:
            if warm:
                _times_within(call, warm)
            times[which] += _times_within(call, warm)
    return times


def _times_within(call: Call, seconds: float) -> list[float]:
    """Milliseconds of calls, one at least, that begin within so many seconds."""
    times: list[float] = []
    first = start = time.perf_counter()
    while not times or start < first + seconds:
        call()
        end = time.perf_counter()
        times.append((end - start) * 1e3)
        start = end
    return times


def race(dense: Call, packed: Call) -> tuple[float, float]:
    """Median milliseconds of one call of each, interleaved, in about a fifth of a second."""
    (first,), (second,) = interleave([dense, packed], rounds=1)
    # Blocks of 0.2 ms and more: the clock's own 0.1 us then weighs nothing.
    repeat = max(1, round(0.2 / max(1e-4, min(first, second))))
    rounds = min(200, max(7, round(200 / (repeat * (first + second) + 1e-4))))

    def block(call: Call) -> Call:
        return lambda: [call() for _ in range(repeat)]

    slow, fast = interleave([block(dense), block(packed)], rounds)
    return statistics.median(slow) / repeat, statistics.median(fast) / repeat
