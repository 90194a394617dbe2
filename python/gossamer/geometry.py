"""Convolutions as products of matrices: their geometry, their rows and their weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer import ops

PAD_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Both directions' setting, of a number or of two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding_sides(
    padding: tuple[int, int] | str, kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """top, bottom, left, right."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        # As torch: the odd one goes to the end.
        (top, bottom), (left, right) = (
            ((d * (k - 1)) // 2, d * (k - 1) - (d * (k - 1)) // 2)
            for k, d in zip(kernel, dilation, strict=True)
        )
        return (top, bottom, left, right)
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r} is unknown: use numbers, 'same' or 'valid'")
    return (padding[0], padding[0], padding[1], padding[1])


def conv_geometry(conv: Any) -> tuple[list[int] | None, list[int]]:
    """What F.pad adds outside of the kernel (None: nothing), and the ten integers for the ops."""
    kernel, dilation = pair(conv.kernel_size), pair(conv.dilation)
    padding = conv.padding if isinstance(conv.padding, str) else pair(conv.padding)
    sides = _padding_sides(padding, kernel, dilation)
    numbers = [*kernel, *pair(conv.stride), *dilation]
    if conv.padding_mode == "zeros":
        return None, [*numbers, *sides]
    # F.pad takes the last dimension first.
    return [*sides[2:], *sides[:2]], [*numbers, 0, 0, 0, 0]


def least_size(numbers: list[int]) -> tuple[int, int]:
    """The height and width that an input must have for a kernel to fit in."""
    kh, kw, _, _, dh, dw, top, bottom, left, right = numbers
    return (dh * (kh - 1) + 1 - top - bottom, dw * (kw - 1) + 1 - left - right)


def too_small(x: Tensor, numbers: list[int]) -> ValueError:
    """What to raise about an input, (images, .., height, width, ..), below the least size."""
    kh, kw, _, _, dh, dw, top, bottom, left, right = numbers
    return ValueError(
        f"the padded input is {x.size(2) + top + bottom} x {x.size(3) + left + right}, smaller "
        f"than the kernel {kh} x {kw} (dilation {dh}, {dw})"
    )


def pad_outside(x: Tensor, outside: list[int] | None, padding_mode: str) -> Tensor:
    """x with the padding that no kernel knows: all but zeros."""
    return x if outside is None else nn.functional.pad(x, outside, mode=PAD_MODES[padding_mode])


def conv_rows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The rows that `conv` multiplies `conv_matrix` of its weight with, one an output pixel.

    >>> import torch
    >>> conv_rows(nn.Conv2d(3, 5, 2), torch.zeros(1, 3, 4, 4)).shape
    torch.Size([9, 16])
    """
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    outside, numbers = conv_geometry(conv)
    return ops.im2col(pad_outside(batched, outside, conv.padding_mode), [*numbers, 1])


def is_depthwise(conv: Any) -> bool:
    """Whether each output of a convolution reads one channel, and each channel is read by one."""
    return bool(conv.in_channels == conv.out_channels == conv.groups > 1)


def groups_inside(conv: Any) -> int:
    """The groups inside of the matrix of a convolution: 1 if it is depthwise, which has its own."""
    return 1 if is_depthwise(conv) else int(conv.groups)


def over_all_channels(weight: Tensor, groups: int) -> Tensor:
    """(out, in / groups, kh, kw) -> (out, in, kh, kw), zero where a group reads nothing.

    >>> import torch
    >>> over_all_channels(torch.ones(2, 1, 1, 1), 2).flatten(1).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    each, own = weight.detach().unflatten(0, (groups, -1)), torch.arange(groups)
    whole = weight.new_zeros(*each.shape[:2], groups, *each.shape[2:], requires_grad=False)
    whole[own, :, own] = each
    return whole.flatten(2, 3).flatten(0, 1)


def conv_matrix(weight: Tensor, depthwise: bool = False) -> Tensor:
    """(out, in, kh, kw) -> (out, kh * kw * in up to 4), channels innermost, padded with zeros.

    depthwise: -> (out, kh * kw), in which nothing is padded.
    """
    taps = weight.detach().permute(0, 2, 3, 1)
    return nn.functional.pad(taps, (0, 0 if depthwise else -weight.shape[1] % 4)).flatten(1)


def weight_matrix(module: nn.Module) -> Tensor:
    """The (n, k) matrix that a layer packs: a Linear's weight, or `conv_matrix` of it.

    That of a grouped convolution is as wide as if each output read all channels.
    """
    weight: Any = module.weight
    if isinstance(module, nn.Conv2d):
        if groups_inside(module) > 1:
            weight = over_all_channels(weight, module.groups)
        return conv_matrix(weight, is_depthwise(module))
    return weight.detach()


def conv_weight(matrix: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The inverse of `conv_matrix`, of some outputs of a weight of the shape (out, in, kh, kw).

    groups: those of `over_all_channels`, of all outputs; in is that of one of them.
    """
    taps = matrix.unflatten(1, (*shape[2:], -1))
    weight = taps[..., : groups * shape[1]].permute(0, 3, 1, 2)
    if groups > 1:
        own = torch.arange(groups)
        weight = weight.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))[own, :, own]
        weight = weight.flatten(0, 1)
    return weight.contiguous()
