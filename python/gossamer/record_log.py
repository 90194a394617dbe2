"""Records of tensors under 16-byte names, appended to files that survive a crash at any byte."""

from __future__ import annotations

import errno
import os
import struct
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

_START = b"gossamer records 1\n"
_SUFFIX = ".records"
_HEAD = struct.Struct("<16sII")  # name, bytes of the record, CRC-32 of the name and the record


class RecordLog:
    """A folder of append-only files, each written by one process: `_START`, then the records.

    A record is its head and, in safetensors' own format, its tensors. Files are read with pread
    and not mapped: they grow, and another process may delete them.

    Args:
        folder: made if it is missing.

    Raises:
        ValueError: a file with our suffix is not ours.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from gossamer.record_log import RecordLog
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     RecordLog(Path(folder)).put({b"sixteen bytes it": {"x": torch.ones(2)}})
        ...     RecordLog(Path(folder)).get(b"sixteen bytes it")
        {'x': tensor([1., 1.])}
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._own: BinaryIO | None = None
        self._places: dict[bytes, tuple[BinaryIO, int, int]] = {}  # name -> file, offset, bytes
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            self._scan(path.open("rb", buffering=0), path)

    def _scan(self, file: BinaryIO, path: Path) -> None:
        """Finds the records of a file, up to one that was cut off."""
        size, offset = os.fstat(file.fileno()).st_size, len(_START)
        start = os.pread(file.fileno(), offset, 0)
        if start != _START[: len(start)]:
            raise ValueError(f"{path} is no file of a teacher's outputs: move it elsewhere")
        while len(head := os.pread(file.fileno(), _HEAD.size, offset)) == _HEAD.size:
            name, length, _ = _HEAD.unpack(head)
            if offset + _HEAD.size + length > size:
                break
            self._places[name] = file, offset, length
            offset += _HEAD.size + length

    def get(self, name: bytes) -> dict[str, Tensor] | None:
        """The record, or None if there is none that is intact."""
        from safetensors.torch import load

        if name not in self._places:
            return None
        file, offset, length = self._places[name]
        content = os.pread(file.fileno(), _HEAD.size + length, offset)
        record = content[_HEAD.size :]
        if content[: _HEAD.size] != _head(name, record):
            del self._places[name]
            return None
        return load(record)

    def put(self, records: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Appends the records in one write.

        Raises:
            OSError: they cannot be written; then none of them is there.
        """
        from safetensors.torch import save

        if self._own is None:
            path = self._folder / f"{uuid.uuid4().hex}{_SUFFIX}"
            self._own = path.open("xb+", buffering=0)
            self._append(self._own, _START)
        whole, places = bytearray(), {}
        end = self._own.seek(0, os.SEEK_END)
        for name, tensors in records.items():
            record = save(dict(tensors))
            places[name] = self._own, end + len(whole), len(record)
            whole += _head(name, record) + record
        self._append(self._own, whole)
        self._places |= places

    def _append(self, file: BinaryIO, content: bytes | bytearray) -> None:
        end, rest = file.seek(0, os.SEEK_END), memoryview(content)
        try:
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
        except OSError as error:
            file.truncate(end)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space, or leave the cache out" if full else "see to the folder"
            raise OSError(
                error.errno,
                f"the teacher's outputs cannot be kept, {len(content)} bytes more in "
                f"{self._folder}: {os.strerror(error.errno or 0)}; {remedy}",
            ) from error


def _head(name: bytes, record: bytes) -> bytes:
    return _HEAD.pack(name, len(record), zlib.crc32(name + record))
