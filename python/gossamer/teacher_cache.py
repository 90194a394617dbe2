"""Outputs of teachers kept on disk: found again by the bytes of the sample and of the teacher."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .losses import Run
from .record_log import RecordLog

_TOKENS = "/tokens"  # after the key of an output that has a row a token: it is stored trimmed
_PLAIN = (bool, int, float, str, type(None))


class TeacherCache:
    """A folder of what teachers returned, one record a sample; made by `Distiller(cache=...)`.

    A record is found by a hash of all that the output follows from: the sample's part of every
    input (all tensors whose first dimension is the batch; others and plain values as a whole), up
    to its last token where a mask is given, so that padding to another length finds it too; and the
    teacher's tensors, classes with their source, and settings, and autocast. Whatever else there is
    gives another hash, and the teacher runs: other data, a teacher with one weight changed or a new
    format, augmented inputs. So nothing is ever stale; but over augmented data nothing is ever
    found either, and the folder only grows. The hash does not see what a teacher takes from
    elsewhere, such as a global variable, nor other samples of the batch: teachers in eval mode do
    not mix them.

    Every process appends to a file of its own and reads those that were there when it started. A
    record that was cut off or damaged is missed, and computed again. Any epoch may be interrupted.

    Args:
        folder: made if it is missing. Delete it whenever you like.
        keys: what to keep of outputs that are not tensors, such as `"logits"`.

    Attributes:
        hits, misses: samples that were found, and that the teacher had to run for.

    Raises:
        ValueError: a file in the folder is not a cache's.

    Example:
        >>> import tempfile, torch, gossamer as gs
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> data = torch.randn(10, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     distiller = gs.Distiller(student, teacher, cache=folder)
        ...     losses = [distiller(x) for x in (*data.split(5), data.flip(0))]
        >>> distiller.cache.misses, distiller.cache.hits
        (10, 10)
    """

    def __init__(self, folder: str | os.PathLike[str], keys: Collection[str] = ("logits",)) -> None:
        self.hits = self.misses = 0
        self._keys = sorted(keys)
        self._log = RecordLog(Path(folder))
        self._teachers: dict[int, tuple[object, bytes]] = {}

    def recall(
        self, teacher: nn.Module, inputs: Any, mask: Tensor | None, forward: Callable[[], Run]
    ) -> Run:
        """What `forward()` gives, with a dict of the kept tensors as its output; it may not run.

        Args:
            teacher: the model that `forward` runs.
            inputs: of the batch, as for `Distiller`.
            mask: (batch, tokens) bool, False for padding, or None.
            forward: runs the teacher on the inputs.

        Raises:
            TypeError: an input is neither a tensor nor a plain value.
            ValueError: the inputs have no batch, or the outputs another one.
            OSError: a record cannot be written.
        """
        lengths = None if mask is None else _lengths(mask)
        fields = _fields(inputs)
        names = self._sample_names(self._fingerprint(teacher), fields, mask, lengths)
        found = [self._log.get(name) for name in names]
        known = [record for record in found if record is not None]
        device = next(x.device for x in fields.values() if isinstance(x, Tensor))
        output = _batched(known, mask, device) if len(known) == len(found) else None
        if output is not None:
            self.hits += len(found)
            return Run("teacher", output)
        run = forward()
        run.output = {key: run.tensor(key) for key in self._keys}
        missed = [i for i, record in enumerate(found) if record is None]
        self.hits, self.misses = self.hits + len(known), self.misses + len(missed)
        self._log.put({names[i]: _record(run.output, i, len(names), mask, lengths) for i in missed})
        return run

    def _fingerprint(self, teacher: nn.Module) -> bytes:
        """Taken again whenever the teacher may have changed since the last call."""
        probe = _probe(teacher)
        if self._teachers.get(id(teacher), (None, b""))[0] != probe:
            self._teachers[id(teacher)] = probe, fingerprint(teacher)
        return self._teachers[id(teacher)][1]

    def _sample_names(
        self, teacher: bytes, fields: dict[str, Any], mask: Tensor | None, lengths: list[int] | None
    ) -> list[bytes]:
        batched = next((x for x in fields.values() if isinstance(x, Tensor) and x.ndim), None)
        if batched is None or not len(batched):
            raise ValueError("the inputs have no tensor whose first dimension is a batch to cache")
        count, device = len(batched), batched.device.type
        whole = blake2b(teacher)
        casts = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        whole.update(repr((self._keys, mask is not None, casts, list(fields))).encode())
        rows: list[tuple[Tensor, np.ndarray, bool]] = []
        for name, value in fields.items():
            if not isinstance(value, Tensor):
                whole.update(repr((name, value)).encode())
            elif value.ndim and len(value) == count:
                tokens = mask is not None and value.shape[:2] == mask.shape
                rows.append((value, _raw(value).reshape(count, -1), tokens))
            else:
                whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                whole.update(_raw(value).data)
        salt = whole.digest()
        return [_sample_name(salt, rows, i, lengths) for i in range(count)]


def _sample_name(
    salt: bytes, rows: list[tuple[Tensor, np.ndarray, bool]], index: int, lengths: list[int] | None
) -> bytes:
    name = blake2b(salt, digest_size=16)
    for value, raw, tokens in rows:
        shape, row = list(value.shape[1:]), raw[index]
        if tokens and lengths:
            row = row[: len(row) // shape[0] * lengths[index]]
            shape[0] = lengths[index]
        name.update(f"{value.dtype} {shape} ".encode())
        name.update(row.data)
    return name.digest()


def _lengths(mask: Tensor) -> list[int]:
    """Tokens of each sample up to its last one that is no padding."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = (mask * places).amax(1).tolist()
    return lengths


def _fields(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        fields = {f"{name}=": inputs[name] for name in sorted(inputs)}
    else:
        listed = inputs if isinstance(inputs, (tuple, list)) else [inputs]
        fields = {str(i): value for i, value in enumerate(listed)}
    for name, value in fields.items():
        if not isinstance(value, (Tensor, *_PLAIN)):
            raise TypeError(
                f"input {name} is a {type(value).__name__}: a cache needs tensors and plain "
                "values, which it can tell from each other"
            )
    return fields


def _raw(x: Tensor) -> np.ndarray:
    """Its bytes; numpy itself knows no bfloat16."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _record(
    output: dict[str, Tensor], index: int, count: int, mask: Tensor | None, lengths: Any
) -> dict[str, Tensor]:
    record = {}
    for key, tensor in output.items():
        if not tensor.ndim or len(tensor) != count:
            raise ValueError(
                f"the teacher's {key} are {tuple(tensor.shape)} for a batch of {count}: "
                "a cache needs a row a sample"
            )
        tokens = mask is not None and tensor.shape[:-1] == mask.shape
        row = tensor[index, : lengths[index]] if tokens else tensor[index]
        record[key + _TOKENS if tokens else key] = row.detach().cpu().clone()
    return record


def _batched(
    records: list[dict[str, Tensor]], mask: Tensor | None, device: torch.device
) -> dict[str, Tensor] | None:
    """The records as one output, zeros for padding; None if they do not fit together."""
    output = {}
    for key in records[0]:
        rows = [record[key] for record in records]
        if mask is not None and key.endswith(_TOKENS):
            shape = (len(rows), mask.shape[1], *rows[0].shape[1:])
            whole = rows[0].new_zeros(shape)
            for place, row in zip(whole, rows, strict=True):
                place[: len(row)] = row
        elif all(row.shape == rows[0].shape for row in rows):
            whole = torch.stack(rows)
        else:
            return None
        output[key.removesuffix(_TOKENS)] = whole.to(device)
    return output


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _probe(model: nn.Module) -> object:
    """Differs once the model was changed: versions, settings, and for writes past torch a value.

    0.3 ms for 100 tensors, where their bytes would take 10: an optimizer or a moving average that
    writes through .data leaves the version, but hardly the element in the middle.
    """
    kinds = (*_PLAIN, list, tuple, dict)
    settings = ((k, v) for m in model.modules() for k, v in vars(m).items() if k[0] != "_")
    values = repr([v for _, v in settings if type(v) in kinds])
    tensors = [
        (
            t.data_ptr(),
            0 if t.is_inference() else t._version,
            str(t[tuple(n // 2 for n in t.shape)].item()) if t.numel() else "",
        )
        for _, t in _tensors(model)
    ]
    return values, tensors


def fingerprint(model: nn.Module) -> bytes:
    """A hash of all that a model's outputs follow from: tensors, classes, their source, settings.

    The same in every process; the train or eval mode does not count.

    Example:
        >>> import copy, torch
        >>> from gossamer.teacher_cache import fingerprint
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
        >>> before = fingerprint(model)
        >>> fingerprint(copy.deepcopy(model)) == before
        True
        >>> model[1].p = 0.2
        >>> fingerprint(model) == before
        False
    """
    content = blake2b()
    classes = {type(m) for m in model.modules()}
    for kind in sorted(classes, key=lambda c: (c.__module__, c.__qualname__)):
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # made in an interactive session or at run time
            source = ""
        content.update(repr((kind.__module__, kind.__qualname__, source)).encode())
    for name, module in model.named_modules():
        content.update(repr((name, type(module).__qualname__, _settings(module))).encode())
    for name, tensor in _tensors(model):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(_raw(tensor).data)
    return content.digest()


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """Attributes in words, but for those that print an address or have no order of their own."""
    public = [(k, v) for k, v in vars(module).items() if k[0] != "_" and k != "training"]
    shown = [
        (k, repr(v)) for k, v in sorted(public, key=lambda item: item[0]) if type(v) is not set
    ]
    return [(k, text) for k, text in shown if " at 0x" not in text]
