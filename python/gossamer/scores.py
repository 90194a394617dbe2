"""How much each weight matters: the energies that `masks.choose` ranks."""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor, nn

from .calibrate import observed, set_weight_, weight_matrix
from .geometry import conv_matrix, conv_weight, groups_inside
from .observed import Observed

Prunable = nn.Linear | nn.Conv2d


def parse(score: str) -> tuple[str, int]:
    """Kind and seed: ("random", 3) for "random:3", a seed of 0 for all others.

    Raises:
        ValueError: there is no such score.
    """
    kinds = ("magnitude", "wanda", "taylor", "sparsegpt", "random")
    found = re.fullmatch(r"(\w+?)(?::(\d{1,9}))?", str(score))
    if not found or found[1] not in kinds or (found[2] and found[1] != "random"):
        raise ValueError(
            f"score={score!r} is unknown: choose one of {list(kinds)} (or 'random:3', with a seed)"
        )
    return found[1], int(found[2] or 0)


def energy(name: str, module: Prunable, score: str, average: Tensor | None = None) -> Tensor:
    """A number from 0 for each weight, in the weight's shape, in fp32 or better.

    - magnitude: w^2.
    - wanda: w^2 E[x^2], with x the weight's input: the change of the output's square.
    - taylor: `average`, the moving average of `gradient_energy`.
    - random: uniform, the same in every run; "random:3" has a seed.

    Args:
        name: the layer's, for messages and seeds.
        module: the layer.
        score: see `parse`.
        average: for "taylor".

    Raises:
        ValueError: the weights or the score are NaN or Inf, or what the score needs is missing.
    """
    weight = module.weight.detach()
    require_finite(name, weight, "weights")
    kind, seed = parse(score)
    if kind == "random":
        # zlib's, not hash(): equal in every process. The generator takes 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    if kind == "taylor":
        if average is None:
            raise ValueError(f"layer {name!r} has no gradient: call loss.backward() first")
        found = across_ranks(average.clone())
    else:
        found = _relative(weight.abs()).square()
        if kind == "wanda":
            found = across_ranks(found * _relative(_input_square(name, module)))
    require_finite(name, found, "scores")
    return _relative(found)


def gradient_energy(name: str, module: Prunable) -> Tensor:
    """(w * gradient)^2: the squared change of the loss, to first order, when the weight goes.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning",
    arXiv 1906.10771, equation 8.

    Raises:
        ValueError: there is no gradient.
    """
    weight = module.weight
    if weight.grad is None:
        raise ValueError(
            f"layer {name!r} has no gradient, which score='taylor' needs: call loss.backward() "
            "before, zero_grad() after, and exclude layers that are frozen"
        )
    return (weight.detach().float() * weight.grad.float()).square()


def across_ranks(tensor: Tensor) -> Tensor:
    """The mean over all processes, in place, equal bits on each; alone, the tensor itself."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()
    return tensor


def require_finite(name: str, tensor: Tensor, what: str) -> None:
    """Raises a ValueError if a number of the tensor is NaN or Inf."""
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise ValueError(
            f"layer {name!r} has {bad} {what} that are NaN or Inf and cannot be ranked: "
            "return to a checkpoint from before they appeared"
        )


def _relative(size: Tensor) -> Tensor:
    """Over the largest: fp32 cannot hold the squares of weights near 1e-20 or 1e+20."""
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    return size / size.max().clamp_min(torch.finfo(size.dtype).tiny)


def _input_square(name: str, module: Prunable) -> Tensor:
    """E[x^2] of each weight's input, to be multiplied with the weight."""
    square = torch.atleast_2d(_observed(name, module, "wanda").square.to(module.weight.device))
    groups = groups_inside(module) if isinstance(module, nn.Conv2d) else 1
    if groups > 1:
        square = square.expand(len(module.weight), -1)
    return _as_weight(square, module.weight.shape, groups)


def _observed(name: str, module: Prunable, score: str) -> Observed:
    found = observed(module)
    if found is None:
        raise ValueError(
            f"layer {name!r} was not observed, which score={score!r} needs: run data through the "
            "model within gs.calibrate(model), and exclude layers that do not run there"
        )
    return found


def reconstruct_(
    name: str, module: Prunable, mask: Tensor, sparsity: float, pattern: str
) -> Tensor:
    """SparseGPT: drops weights of one layer and lets the others make up for them; the new mask.

    Args:
        name: the layer's, for messages.
        module: the layer, calibrated with `hessian=True`; its weight changes.
        mask: bool in the weight's shape, False where a weight is gone already.
        sparsity: share of the layer's blocks to be gone after.
        pattern: one that `obs.prune_weight` knows.

    Raises:
        ValueError: no Hessian, or another pattern.
    """
    from .obs import prune_weight

    hessian = _observed(name, module, "sparsegpt").hessian
    if hessian is None:
        raise ValueError(
            f"layer {name!r} was observed without its Hessian, which score='sparsegpt' needs: "
            "gs.calibrate(model, hessian=True), and exclude grouped convolutions, which have none"
        )
    matrix = weight_matrix(module)
    kept = conv_matrix(mask) if mask.dim() == 4 else mask
    if pattern == "unstructured":
        # A convolution's matrix has columns of padding, which are the first to go.
        sparsity = 1 - (1 - sparsity) * mask.numel() / kept.numel()
    try:
        # A mean over ranks is the same on each, and so is what follows from it.
        mean = across_ranks(hessian.to(matrix.device, copy=True))
        matrix, kept = prune_weight(matrix, mean, sparsity, pattern, kept)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    set_weight_(module, matrix)
    return _as_weight(kept, mask.shape)


def _as_weight(matrix: Tensor, shape: torch.Size, groups: int = 1) -> Tensor:
    """(rows, k) as (rows, c, kh, kw), where the weight is a convolution's."""
    return matrix if len(shape) == 2 else conv_weight(matrix, shape, groups)
