"""Modules whose buffers keep their dtypes, whatever the rest of a model is converted to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class KeepsDtypes(nn.Module):
    """Its buffers, and those of its children, have the dtypes that kernels read."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .half(), .bfloat16() and .double() convert a model's floats. These keep their dtypes:
        # kernels take inputs of any float dtype as they are.
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor

        return super()._apply(keep, recurse)
