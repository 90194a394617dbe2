"""Where the tests of the Triton kernels run: on a GPU, or on the CPU in Triton's interpreter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gossamer import ops

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu(packed: Any) -> Any:
    """A copy of a packed weight or a layer, laid out for a GPU."""
    moved = copy.deepcopy(packed).to(DEVICE)
    if DEVICE == "cpu":
        for module in moved.modules():
            if hasattr(module, "_arrange"):
                module._arrange(True)
    return moved


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Inside, every operator runs its Triton kernel."""
    if DEVICE == "cuda":
        yield
    else:
        with mock.patch.object(ops, "_on_gpu", lambda x, weight: True):
            yield


def run(call: Callable[..., Any], *arguments: Any) -> Any:
    """call(*arguments) by Triton kernels: tensors move to the GPU, results back."""
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    with kernels():
        result = call(*moved)
    return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()
