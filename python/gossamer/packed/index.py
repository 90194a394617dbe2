"""The index that both sparse formats share: blocks of columns, chunks of outputs, rows in cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer import _C

BLOCK = 32  # a GPU skips what is empty of as many outputs x as many inputs


class Index(NamedTuple):
    """Where the non-zeros of a matrix lie; both sparse formats use it."""

    columns: Tensor  # (entries) uint8, column inside its block
    rows: Tensor  # (rows, 2) uint16: output inside its chunk, entries
    cells: Tensor  # (blocks * chunks + 1, 2) int32: first row, first entry


INDEX_BUFFERS: dict[str, torch.dtype] = {
    "columns": torch.uint8,
    "rows": torch.uint16,
    "cells": torch.int32,
}


def build_index(mask: Tensor, unit: int) -> tuple[Index, Tensor]:
    """The index of the true places of a mask.

    Args:
        mask: (n, columns) bool.
        unit: inputs a column stands for: 1, or 4 where rows are padded to even lengths.

    Returns:
        The index, and for each true place of the mask, in row-major order, its entry (int64).
    """
    output, column = mask.nonzero(as_tuple=True)
    return index_of_places(output, column, len(mask), mask.shape[1], unit)


def index_of_places(
    output: Tensor, column: Tensor, n: int, width: int, unit: int
) -> tuple[Index, Tensor]:
    """`build_index` of the mask (n, width) that is true at these places, in row-major order."""
    block = _C.block_columns(unit)
    blocks = -(-width // block)
    # A row is one output in one block. Its entries follow each other in row-major order already.
    row = output * blocks + column // block
    length = torch.bincount(row, minlength=n * blocks)
    within = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
    stored = length + length % 2 if unit == 4 else length
    filled = stored.nonzero().squeeze(1)
    order, rows, cells = _in_cells(filled // blocks, filled % blocks, stored[filled], n, blocks)
    start = torch.empty_like(stored)
    start[filled[order]] = rows[:, 1].cumsum(0) - rows[:, 1]

    columns = torch.zeros(int(stored.sum()), dtype=torch.uint8)
    entry = start[row] + within
    columns[entry] = (column % block).to(torch.uint8)
    return Index(columns, rows.to(torch.uint16), cells), entry


def _in_cells(
    output: Tensor, block: Tensor, length: Tensor, n: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which a kernel walks these rows, then `rows` (int64) and `cells` of an index."""
    chunk = _C.chunk_rows(n)
    chunks = -(-n // chunk)
    cell = block * chunks + output // chunk
    # Cell by cell, longest row first, then by output.
    longest = int(length.max()) if len(length) else 0
    order = ((cell * (longest + 1) + longest - length) * n + output).argsort()
    rows = torch.stack([output % chunk, length], 1)[order]
    cells = torch.zeros(blocks * chunks + 1, 2, dtype=torch.int64)
    cells[1:, 0] = torch.bincount(cell, minlength=blocks * chunks)
    cells[1:, 1].index_add_(0, cell, length)
    cells = cells.cumsum(0)
    if cells[-1, 1] > 2**31 - 1:
        raise ValueError(f"{cells[-1, 1]} stored weights overflow the int32 index: split the layer")
    return order, rows, cells.to(torch.int32)


def concat_indices(sizes: Sequence[int], indices: Sequence[Index]) -> tuple[Index, Tensor]:
    """The index of weights of the same width, one below the other, of `sizes` outputs each.

    Rows stay as they are, and with them who shares a lane with whom.

    Returns:
        The index, and of each of its entries the place among those of all `indices`.
    """
    places = [_row_places(n, index) for n, index in zip(sizes, indices, strict=True)]
    above = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    output = torch.cat([place[0] + n for place, n in zip(places, above, strict=True)])
    block = torch.cat([place[1] for place in places])
    length = torch.cat([index.rows[:, 1].to(torch.int64) for index in indices])
    blocks = (len(indices[0].cells) - 1) // -(-sizes[0] // _C.chunk_rows(sizes[0]))
    order, rows, cells = _in_cells(output, block, length, sum(sizes), blocks)
    start = (length.cumsum(0) - length)[order] - (rows[:, 1].cumsum(0) - rows[:, 1])
    entry = torch.repeat_interleave(start, rows[:, 1]) + torch.arange(int(length.sum()))
    columns = torch.cat([index.columns for index in indices])[entry]
    return Index(columns, rows.to(torch.uint16), cells), entry


def _row_places(n: int, index: Index) -> tuple[Tensor, Tensor]:
    """Output and block of every row of a valid index, both int64."""
    first_rows = index.cells[:, 0].to(torch.int64)
    chunk = _C.chunk_rows(n)
    chunks = -(-n // chunk)
    cell = torch.repeat_interleave(first_rows[1:] - first_rows[:-1])
    return index.rows[:, 0].to(torch.int64) + cell % chunks * chunk, cell // chunks


def entry_places(n: int, unit: int, index: Index) -> tuple[Tensor, Tensor]:
    """Output and first input of every entry of a valid index, both int64."""
    output, block = _row_places(n, index)
    length = index.rows[:, 1].to(torch.int64)
    first = torch.repeat_interleave(block * _C.block_columns(unit), length)
    columns = index.columns.to(torch.int64) + first
    return torch.repeat_interleave(output, length), columns * unit


def bitmap_of(n: int, k: int, unit: int, index: Index) -> Tensor:
    """The index as the kernels of a GPU read it: (n, words, 2) int32.

    A word is 32 columns: a bit for each that has an entry, and which entry the first of them is.
    Entries of zeros that fill up a row of an odd length are left out.

    Raises:
        ValueError: the entries of a row are not in the order of their columns, as packing has them.
    """
    output, inputs = entry_places(n, unit, index)
    words = -(-k // (32 * unit))
    column = inputs // unit
    place = output * words + column // 32
    entry = torch.arange(len(column))
    block = output * words + column // _C.block_columns(unit)
    behind = torch.ones(len(column), dtype=torch.bool)
    behind[1:] = (block[1:] != block[:-1]) | (column[1:] > column[:-1])
    last = torch.ones_like(behind)
    last[:-1] = block[1:] != block[:-1]
    kept = behind | ~last if unit == 4 else torch.ones_like(behind)
    bits, count = torch.zeros(2, n * words, dtype=torch.int64)
    first, end = torch.full((n * words,), len(entry)), torch.full((n * words,), -1)
    bits.index_add_(0, place[kept], (1 << column % 32)[kept])
    count.index_add_(0, place[kept], torch.ones_like(entry)[kept])
    first.scatter_reduce_(0, place[kept], entry[kept], "amin")
    end.scatter_reduce_(0, place[kept], entry[kept], "amax")
    if not behind[kept].all() or (count > 0).logical_and(end - first + 1 != count).any():
        raise ValueError(
            "the index lists the inputs of an output twice or out of order, which no GPU kernel "
            "can read: pack the weight again"
        )
    first = torch.where(count > 0, first, 0)
    # Bit 31 is the sign of an int32.
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    return torch.stack([bits, first], -1).to(torch.int32).view(n, words, 2)


def steps_of(bitmap: Tensor, k: int, unit: int) -> Tensor | None:
    """Which blocks of 32 outputs x 32 inputs hold something; None if half of them or more do.

    For each 32 outputs where their list begins, where the last one ends, then the lists: int32
    numbers of inputs / 32, ascending. A place is counted from the beginning of the tensor.

    Args:
        bitmap: of a weight (n, k), see `bitmap_of`.
        k, unit: inputs, and those of a column.
    """
    # Eight columns of four inputs are a byte of a word, the lowest first.
    bits = bitmap[..., 0].clone(memory_format=torch.contiguous_format)
    bits = bits.view(torch.int32 if unit == 1 else torch.int8)
    filled = bits[:, : -(-k // BLOCK)] != 0
    filled = torch.nn.functional.pad(filled, (0, 0, 0, -len(filled) % BLOCK))
    filled = filled.unflatten(0, (-1, BLOCK)).any(1)
    if 2 * int(filled.sum()) >= filled.numel():
        return None
    begin = torch.zeros(len(filled) + 1, dtype=torch.int64)
    begin[1:] = filled.sum(1).cumsum(0)
    return torch.cat([begin + len(begin), filled.nonzero()[:, 1]]).to(torch.int32)


def check_index(n: int, k: int, unit: int, values: Tensor, index: Index) -> None:
    """ValueError unless the index and the shape of the values belong to an n x k weight."""
    columns, rows, cells = index
    if columns.dim() != 1 or rows.dim() != 2 or rows.shape[1] != 2:
        raise ValueError(
            f"columns {tuple(columns.shape)} and rows {tuple(rows.shape)} must be (entries,) and "
            "(rows, 2)"
        )
    if cells.dim() != 2 or cells.shape[1] != 2 or cells.shape[0] < 1:
        raise ValueError(f"cells have shape {tuple(cells.shape)}: they must be (cells + 1, 2)")
    shape = columns.shape if unit == 1 else (*columns.shape, 4)
    if values.shape != shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, the index needs {tuple(shape)}")
    pointers = (columns.data_ptr(), rows.data_ptr(), cells.data_ptr())
    _C.check_index(n, k, len(columns), len(rows), *pointers, len(cells) - 1, unit)
