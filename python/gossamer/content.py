"""The file of a checkpoint: safetensors with our metadata, written whole, checked when read.

The file holds each parameter and persistent buffer under the name that `state_dict` gives it. Its
metadata has one entry, "gossamer", with this JSON:

    version   1
    layers    {layer: {"geometry", "format", "n", "k"}}   how to build each packed layer
    aliases   {name: name}                                names of tensors that are stored once
    slim      {module: {attribute: [before, now]}}        sizes that slim_ made smaller
    crc32     {name: int}                                 of a tensor's type, shape and bytes

The checksums find damage. They are no defence against a hostile file: that is `packed/`, which
checks every index before a kernel sees it.
"""

from __future__ import annotations

import ctypes
import json
import os
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

VERSION = 1
_KEY = "gossamer"
_SHOWN = 5
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Content:
    """What a file holds: tensors in private memory, and the metadata, all types checked."""

    tensors: dict[str, Tensor]
    layers: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    slim: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Names of all tensors, aliases included."""
        return self.tensors.keys() | self.aliases.keys()

    def stored(self, name: str) -> str:
        """The name under which the tensor called `name` is stored."""
        return self.aliases.get(name, name)

    def layer_of(self, name: str) -> str | None:
        """The packed layer that the tensor called `name` belongs to, as its weight or bias."""
        module = name.rpartition(".")[0]
        owners = (module, module.removesuffix(".packed"))
        return next((owner for owner in owners if owner in self.layers), None)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.stored(name)]


def write(path: StrPath, content: Content) -> None:
    """Writes beside `path`, syncs and renames: the file is there complete, or the old one still is.

    Raises:
        ValueError: safetensors cannot store a tensor.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    about = {
        "version": VERSION,
        "layers": content.layers,
        "aliases": content.aliases,
        "slim": content.slim,
        "crc32": {name: _crc32(tensor) for name, tensor in content.tensors.items()},
    }
    path = Path(os.path.realpath(path))  # a link stays a link: its target is what is replaced
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            save_file(content.tensors, temporary, {_KEY: json.dumps(about)})
        except KeyError as error:
            raise ValueError(f"safetensors cannot store tensors of {error.args[0]}") from error
        temporary.chmod(mode)  # save_file leaves 0600, whatever the umask
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: StrPath) -> Content:
    """Reads and checks a file of `write`; nothing of it stays mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, truncated, foreign or of another version.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # a missing file, a folder or no permission: Python's own sentence
        pass
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY)
            # Cloned out of the mapped file: nobody can change an index after it was checked.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is no intact safetensors file: {error}") from error
    if about is None:
        raise ValueError(
            f"{os.fspath(path)} was not written by gs.save (no {_KEY!r} in its metadata): "
            "load it with safetensors.torch.load_model, then compress"
        )
    try:
        return _checked(tensors, about)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _checked(tensors: dict[str, Tensor], text: str) -> Content:
    """The content, once every type in the metadata and every checksum is right."""
    about = json.loads(text, object_pairs_hook=_unique)
    version = about.get("version") if isinstance(about, dict) else None
    if version != VERSION:
        raise ValueError(f"format version {version!r}, this gossamer reads version {VERSION}")
    layers, aliases, sums = (about.get(key) for key in ("layers", "aliases", "crc32"))
    if not all(isinstance(table, dict) for table in (layers, aliases, sums)):
        raise ValueError("damaged metadata: layers, aliases and crc32 must be tables")
    slim = about.get("slim", {})  # files from before slim_ have none
    if not isinstance(slim, dict) or not all(isinstance(entry, dict) for entry in slim.values()):
        raise ValueError("damaged metadata: slim must be a table of tables")
    for name, entry in layers.items():
        keys = {"geometry": dict, "format": dict, "n": int, "k": int}
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != keys:
            raise ValueError(f"damaged metadata of layer {name!r}: {str(entry)[:80]}")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise ValueError(f"damaged metadata: {alias!r} cannot stand for {str(name)[:80]!r}")
    damaged = [name for name, tensor in tensors.items() if sums.get(name) != _crc32(tensor)]
    if damaged or sums.keys() != tensors.keys():
        raise ValueError(f"damaged: the checksum of {shown(damaged or sums)} is wrong")
    return Content(tensors, layers, aliases, slim)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("damaged metadata: a name occurs twice")
    return table


def _crc32(tensor: Tensor) -> int:
    head = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.nbytes:
        return head
    # The bytes in place, whatever the dtype; numpy knows no bfloat16 and may not be installed.
    return zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), head)


def shown(names: Iterable[str]) -> str:
    """The first few names."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
