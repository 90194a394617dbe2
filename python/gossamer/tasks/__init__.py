"""Tasks: a model, its data and its score, as `gossamer compress` needs them; some are built in."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BUILT_IN = {
    "digits-mlp": "gossamer.tasks.mlp:task",
    "fashion-cnn": "gossamer.tasks.fashion:task",
    "minilm-sts": "gossamer.tasks.minilm:task",
}


@dataclass(frozen=True)
class Task:
    """What a recipe works on. A batch is a pair (inputs, labels); labels may be None.

    Args:
        model: makes the dense model, with random or with pretrained weights; called again to load
            a file into.
        train: batches to train, distil and calibrate with.
        evaluate: the score of a model, more is better.
        example_inputs: the model's arguments as a tuple, to measure latency with.
        loss: (model's output, labels) -> scalar, for training on labels.
        metric: what `evaluate` returns, in a word.
    """

    model: Callable[[], nn.Module]
    train: DataLoader[Any]
    evaluate: Callable[[nn.Module], float]
    example_inputs: tuple[Tensor, ...]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metric: str = "accuracy"


class Rows(Dataset[Any]):
    """A data set that makes a whole batch at once: faster than sample by sample, then stacked.

    Args:
        count: samples.
        batch: indices (b) int64 -> the batch of these samples.

    Example:
        >>> x = torch.arange(10)
        >>> loader = Rows(10, lambda chosen: (x[chosen], None)).loader(batch=4, shuffle=False)
        >>> [inputs.tolist() for inputs, labels in loader]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(self, count: int, batch: Callable[[Tensor], Any]) -> None:
        self._count, self._batch = count, batch

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._batch(torch.tensor([index]))

    def __getitems__(self, indices: list[int]) -> Any:
        return self._batch(torch.tensor(indices))

    def loader(self, batch: int, shuffle: bool = True) -> DataLoader[Any]:
        """Batches of `batch` samples; the last one may be smaller."""
        return DataLoader(self, batch, shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def make(name: str, **arguments: Any) -> Task:
    """The task of a built-in name or of an import path `module:function`.

    Args:
        name: a key of `BUILT_IN`, or the path of a function that returns a `Task`.
        arguments: the function's.

    Raises:
        ImportError: the module, or what it needs, is not there.
        ValueError: the name is unknown, an argument does not fit, or the result is no task.
    """
    path = BUILT_IN.get(name, name)
    module, separator, function = path.partition(":")
    if not separator:
        raise ValueError(
            f"unknown task {name!r}: use {', '.join(BUILT_IN)} or an import path module:function"
        )
    call = getattr(importlib.import_module(module), function, None)
    if not callable(call):
        raise ValueError(f"task {name!r}: {module} has no function {function!r}")
    try:
        inspect.signature(call).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    task = call(**arguments)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} returned a {type(task).__name__}, not a Task")
    return task
