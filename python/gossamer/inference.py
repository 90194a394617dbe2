"""What only inference has: no gradients, of which each gets a sentence, and sums in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# An operator: torch.compile traces a backward that may never run, and this raises when it does run.
@torch.library.custom_op("gossamer::refuse_gradient", mutates_args=())
def _refuse_gradient(grad: Tensor, shape: list[int]) -> Tensor:
    raise RuntimeError(
        "a gradient was asked through a packed layer, which is for inference only: train the dense "
        "model and pack it afterwards, or run the model under torch.no_grad()"
    )


@_refuse_gradient.register_fake
def _(grad, shape):
    return grad.new_empty(shape)


class _Inference(torch.autograd.Function):
    """Marks a result whose gradient no kernel can give, so that asking for it is a sentence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.mark_dirty(y)  # so that y itself may be returned: of a view, relu_(y) would be refused
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _refuse_gradient(grads[0], ctx.shape), None


def finish(x: Tensor, y: Tensor) -> Tensor:
    """y, of which a gradient through x is an error."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Inference.apply(x, y.detach())
    return y


def added(ops: Any, x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    """The second of `ops`, which writes its result over a residual that nobody reads later.

    What a compiler or a gradient would see is not changed: there it is the first.
    """
    own, over = ops
    if residual is None or torch.compiler.is_compiling():
        return own(*arguments)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return own(*arguments)
    over(*arguments)
    return residual
