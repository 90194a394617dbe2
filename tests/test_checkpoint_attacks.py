"""Broken and hostile files: load_ refuses them with a sentence, or the model runs as it should."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import FORMATS, NAMES, Net, image, packed, refuses, snapshot
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import gossamer as gs
from gossamer import content


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Edits metadata and tensors of a file, and signs it with the right checksums."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["gossamer"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(about, tensors)
    about["crc32"] = {name: content._crc32(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {"gossamer": json.dumps(about)})


# Files that are broken.


def test_foreign_files(path: Path) -> None:
    save_file({"fc.weight": torch.zeros(8, 8)}, path)
    refuses(Net(), path, "not written by gs.save")
    torch.save(Net().state_dict(), path)
    refuses(Net(), path, "no intact safetensors file")
    for data in (b"", b"{}", b"\x00" * 100, b"\xff" * 100, b"hello world" * 100):
        path.write_bytes(data)
        refuses(Net(), path, "no intact safetensors file")


@pytest.mark.parametrize("format", [gs.Int8(), gs.SparseInt8()], ids=["int8", "sparse_int8"])
def test_truncated_files(format: Any, path: Path) -> None:
    gs.save(packed(format), path)
    data, fresh = path.read_bytes(), Net()
    before = snapshot(fresh)
    for length in range(0, len(data), 64):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="no intact safetensors file"):
            gs.load_(fresh, path)
    assert before == snapshot(fresh)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_flipped_bytes_are_found_or_harmless(format: Any, path: Path) -> None:
    """A flip is refused, or it changed nothing that matters (a blank in the header's JSON)."""
    model, x = packed(format), image()
    expected = model(x)
    gs.save(model, path)
    data, chance = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(16), *(chance.randrange(header) for _ in range(150))]
    places += [chance.randrange(header, len(data)) for _ in range(150)]
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        fresh = Net().eval()
        try:
            gs.load_(fresh, path)
        except ValueError:
            assert type(fresh.fc) is nn.Linear
        else:
            assert place < header and torch.equal(fresh(x), expected)


def spoiled(tensor: Tensor, chance: random.Random) -> Tensor:
    """The tensor with one element changed to something evil for its type, or of another shape."""
    if chance.random() < 0.15:
        shapes = [tensor.flatten(), tensor[None], tensor.repeat(2, *tensor.shape)]
        shapes += [tensor[:-1], tensor[:0], tensor.flip(0)] if tensor.dim() else []
        return chance.choice(shapes).clone()
    if chance.random() < 0.1:
        return tensor.to(chance.choice([torch.int64, torch.float32, torch.uint8, torch.int8]))
    result = tensor.clone()
    if tensor.dtype.is_floating_point:
        evil: list[Any] = [float("nan"), float("inf"), 0.0, -1.0, 3e38, 1e-45]
    else:
        limits = torch.iinfo(tensor.dtype)
        evil = [limits.min, limits.max, 0, 1, chance.randint(limits.min, limits.max)]
    if result.numel():
        # Through a list: torch cannot index unsigned 16 bits in place.
        flat = result.flatten().tolist()
        flat[chance.randrange(len(flat))] = chance.choice(evil)
        result = torch.tensor(flat, dtype=tensor.dtype).reshape(tensor.shape)
    return result


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_hostile_tensors_with_right_checksums(format: Any, path: Path) -> None:
    """Indices outside, counts that lie, NaN scales: refused, or the model runs as it should."""
    gs.save(packed(format), path)
    data, chance, x = path.read_bytes(), random.Random(1), image()
    refused = 0
    for _ in range(250):
        path.write_bytes(data)

        def edit(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            name = chance.choice([n for n in tensors if n.startswith(("fc.", "stem."))])
            tensors[name] = spoiled(tensors[name], chance)

        rewrite(path, edit)
        fresh = Net().eval()
        try:
            gs.load_(fresh, path)
        except ValueError:
            refused += 1
            assert type(fresh.fc) is nn.Linear
        else:
            assert fresh(x).shape == (2, 4)
            gs.load_(Net(), path).fc.to_dense()
    assert refused > 50


Edit = Callable[[dict[str, Any], dict[str, Tensor]], Any]
EDITS: dict[str, Edit] = {
    "no version": lambda a, t: a.pop("version"),
    "version 2": lambda a, t: a.update(version=2),
    "version true": lambda a, t: a.update(version="1"),
    "no layers": lambda a, t: a.pop("layers"),
    "layers a list": lambda a, t: a.update(layers=[1]),
    "no aliases": lambda a, t: a.update(aliases=None),
    "entry a string": lambda a, t: a["layers"].update(fc="Int8"),
    "entry empty": lambda a, t: a["layers"].update(fc={}),
    "entry with more": lambda a, t: a["layers"]["fc"].update(more=1),
    "n 0": lambda a, t: a["layers"]["fc"].update(n=0),
    "n negative": lambda a, t: a["layers"]["fc"].update(n=-8),
    "n absurd": lambda a, t: a["layers"]["fc"].update(n=10**30),
    "n one less": lambda a, t: a["layers"]["fc"].update(n=7),
    "n a float": lambda a, t: a["layers"]["fc"].update(n=8.0),
    "n a bool": lambda a, t: a["layers"]["fc"].update(n=True),
    "k 0": lambda a, t: a["layers"]["fc"].update(k=0),
    "k negative": lambda a, t: a["layers"]["fc"].update(k=-8),
    "k absurd": lambda a, t: a["layers"]["fc"].update(k=10**30),
    "k one more": lambda a, t: a["layers"]["fc"].update(k=9),
    "k 65536": lambda a, t: a["layers"]["fc"].update(k=65536),
    "k infinite": lambda a, t: a["layers"]["fc"].update(k=float("inf")),
    "format unknown": lambda a, t: a["layers"]["fc"]["format"].update(format="Int3"),
    "format a list": lambda a, t: a["layers"]["fc"]["format"].update(format=[]),
    "format empty": lambda a, t: a["layers"]["fc"].update(format={}),
    "format field": lambda a, t: a["layers"]["fc"]["format"].update(more=1),
    "activations": lambda a, t: a["layers"]["fc"]["format"].update(activations="static"),
    "activations list": lambda a, t: a["layers"]["fc"]["format"].update(activations=[[]]),
    "another format": lambda a, t: a["layers"]["fc"].update(format={"format": "Sparse"}),
    "geometry empty": lambda a, t: a["layers"]["fc"].update(geometry={}),
    "geometry in": lambda a, t: a["layers"]["fc"]["geometry"].update(in_features=10**9),
    "geometry kind": lambda a, t: a["layers"]["fc"]["geometry"].update(kind="Conv2d"),
    "geometry more": lambda a, t: a["layers"]["fc"]["geometry"].update(forward=None),
    "geometry bool": lambda a, t: a["layers"]["fc"]["geometry"].update(bias=1),
    "activation": lambda a, t: a["layers"]["fc"]["geometry"].update(activation="tanh"),
    "activation list": lambda a, t: a["layers"]["fc"]["geometry"].update(activation=[{}]),
    "stride": lambda a, t: a["layers"]["stem"]["geometry"].update(stride=[0, 0]),
    "kernel": lambda a, t: a["layers"]["stem"]["geometry"].update(kernel_size=[10**9, 3]),
    "dilation": lambda a, t: a["layers"]["stem"]["geometry"].update(dilation=[1, 10**18]),
    "padding": lambda a, t: a["layers"]["stem"]["geometry"].update(padding=[-1, 1]),
    "channels": lambda a, t: a["layers"]["stem"]["geometry"].update(in_channels=4),
    "a layer too few": lambda a, t: a["layers"].pop("fc"),
    "a layer too many": lambda a, t: a["layers"].update(gone=a["layers"]["fc"]),
    "a layer at the root": lambda a, t: a["layers"].update({"": a["layers"]["fc"]}),
    "a dense layer packed": lambda a, t: a["layers"].update(head=a["layers"]["fc"]),
    "a norm packed": lambda a, t: a["layers"].update(norm=a["layers"]["fc"]),
    "layers swapped": lambda a, t: a.update(
        layers={"fc": a["layers"]["stem"], "stem": a["layers"]["fc"]}
    ),
    "alias to nothing": lambda a, t: a["aliases"].update({"head.weight": "nothing"}),
    "alias of itself": lambda a, t: a["aliases"].update({"head.weight": "head.weight"}),
    "alias to a list": lambda a, t: a["aliases"].update({"new": ["head.weight"]}),
    "alias too many": lambda a, t: a["aliases"].update({"new": "head.weight"}),
    "alias of another shape": lambda a, t: (
        a["aliases"].update({"head.weight": "head.bias"}),
        t.pop("head.weight"),
    ),
    "a tensor too few": lambda a, t: t.pop("head.weight"),
    "a tensor too many": lambda a, t: t.update(more=torch.zeros(1)),
    "a buffer too few": lambda a, t: t.pop("fc.packed.scale"),
    "a buffer too many": lambda a, t: t.update({"fc.packed.more": torch.zeros(1)}),
    "a name below": lambda a, t: t.update({"fc.packed.a.b": torch.zeros(1)}),
    "no bias": lambda a, t: t.pop("fc.bias"),
    "bias too long": lambda a, t: t.update({"fc.bias": torch.zeros(9)}),
    "bias NaN": lambda a, t: t.update({"fc.bias": torch.full((8,), float("nan"))}),
    "bias of integers": lambda a, t: t.update({"fc.bias": torch.zeros(8, dtype=torch.int64)}),
    "integers for floats": lambda a, t: t.update({"head.bias": torch.zeros(4, dtype=torch.int64)}),
    "floats for integers": lambda a, t: t.update({"norm.num_batches_tracked": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("case", EDITS)
def test_hostile_metadata(case: str, path: Path) -> None:
    gs.save(packed(gs.Int8()), path)
    rewrite(path, EDITS[case])
    refuses(Net(), path, path.name)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "1", '{"version": 1, "version": 1}', "[" * 100_000, "NaN",
     '{"version": ' + "9" * 5000 + "}", '{"version": 1, "layers": {}, "aliases": {}, "crc32": []}'],
)  # fmt: skip
def test_metadata_that_is_no_table(text: str, path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, {"gossamer": text})
    refuses(Net(), path, path.name)


def test_a_name_that_occurs_twice_is_not_trusted(path: Path) -> None:
    gs.save(packed(gs.Int8()), path)
    with safe_open(path, "pt") as file:
        text = file.metadata()["gossamer"]
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for twice in ('"n": 8, "n": 8', '"k": 8, "k": 65536'):
        save_file(tensors, path, {"gossamer": text.replace(twice.split(",")[0], twice, 1)})
        refuses(Net(), path, "occurs twice")


def test_an_index_outside_is_named_with_its_layer(path: Path) -> None:
    gs.save(packed(gs.SparseInt8()), path)

    def edit(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["fc.packed.columns"].fill_(255)

    rewrite(path, edit)
    refuses(Net(), path, "model.safetensors.*layer 'fc'")
