"""save and load_: what comes back is what was saved; a model that does not fit is left alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import FORMATS, NAMES, Net, image, packed, refuses
from safetensors import safe_open
from torch import Tensor, nn

import gossamer as gs


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# There and back.


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("format", [None, *FORMATS], ids=["dense", *NAMES])
def test_round_trip_gives_the_same_bits(format: Any, kind: Any, path: Path) -> None:
    model, x = packed(format), image()
    gs.save(model, kind(path))
    fresh = Net().eval()
    assert gs.load_(fresh, kind(path)) is fresh
    assert torch.equal(fresh(x), model(x))
    assert type(fresh.fc) is type(model.fc) and type(fresh.head) is nn.Linear
    assert fresh.norm.num_batches_tracked == 2 and fresh.head.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_an_unsaved_buffer_and_the_mode_stay(path: Path) -> None:
    gs.save(packed(gs.Int8()), path)
    fresh = Net().train()
    fresh.scratch.fill_(7)
    gs.load_(fresh, path)
    assert fresh.scratch.tolist() == [7, 7] and fresh.training and fresh.fc.training


def test_parameters_are_filled_in_place(path: Path) -> None:
    gs.save(packed(gs.Int8()), path)
    fresh = Net()
    before = fresh.head.weight
    gs.load_(fresh, path)
    assert fresh.head.weight is before


@pytest.mark.parametrize("format", [None, gs.Int8()], ids=["dense", "int8"])
def test_the_model_keeps_its_dtype(format: Any, path: Path) -> None:
    model = packed(format)
    gs.save(model, path)
    fresh = gs.load_(Net().to(torch.bfloat16), path)
    assert fresh.head.weight.dtype is torch.bfloat16
    assert torch.equal(fresh.head.weight, model.head.weight.bfloat16())
    assert fresh.eval()(image().bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("format", [None, *FORMATS], ids=["dense", *NAMES])
def test_a_model_on_meta_is_filled(format: Any, path: Path) -> None:
    model, x = packed(format), image()
    gs.save(model, path)
    with torch.device("meta"):
        fresh = Net().eval()
    gs.load_(fresh, path)
    assert torch.equal(fresh(x), model(x))
    assert fresh.head.weight.requires_grad


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_into_a_compressed_model(format: Any, path: Path) -> None:
    model, x = packed(format), image()
    gs.save(model, path)
    other = packed(gs.Int8())
    assert torch.equal(gs.load_(other, path)(x), model(x))


def test_a_fused_activation_comes_back(path: Path) -> None:
    layer = gs.Linear.from_dense(nn.Linear(8, 8), gs.Int8(), activation="relu")
    model, x = nn.Sequential(layer), torch.randn(3, 8)
    gs.save(model, path)
    fresh = gs.load_(nn.Sequential(nn.Linear(8, 8)), path)
    assert torch.equal(fresh(x), model(x)) and fresh[0].activation == "relu"


def test_buffers_that_copy_cannot_write_are_replaced(path: Path) -> None:
    class Positions(nn.Module):
        ids: Tensor
        frozen: Tensor

        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("ids", torch.full((1,), value).expand(5))
            with torch.inference_mode():
                self.register_buffer("frozen", torch.full((2,), value))

    gs.save(Positions(3.0), path)
    fresh = gs.load_(Positions(0.0), path)
    assert fresh.ids.tolist() == [3.0] * 5 and fresh.frozen.tolist() == [3.0] * 2


def test_empty_scalar_and_other_dtypes(path: Path) -> None:
    def make(value: int) -> nn.Module:
        module = nn.Module()
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16):
            module.register_buffer(f"a_{str(dtype)[6:]}", torch.full((3, 1), value, dtype=dtype))
        module.register_buffer("none", torch.zeros(0, 3))
        module.register_buffer("scalar", torch.tensor(value))
        module.register_buffer("strided", torch.full((4, 4), value)[::2].t())
        return module

    gs.save(make(1), path)
    fresh = gs.load_(make(0), path)
    for name, buffer in make(1).named_buffers():
        assert torch.equal(fresh.get_buffer(name), buffer)


# Sharing.


def tied(heads: int = 2) -> nn.ModuleDict:
    model = nn.ModuleDict({f"head{i}": nn.Linear(16, 16) for i in range(heads)})
    for head in model.values():
        head.weight = model["head0"].weight
    return model


def test_a_shared_packed_weight_is_stored_once_and_shared_again(path: Path) -> None:
    model = tied()
    gs.compress_(model, gs.Int8())
    gs.save(model, path)
    with safe_open(path, "pt") as file:
        assert sum(name.endswith(".panels") for name in file.keys()) == 1  # noqa: SIM118
    fresh = nn.ModuleDict({name: nn.Linear(16, 16) for name in model})
    gs.load_(fresh, path)
    assert fresh["head0"].packed is fresh["head1"].packed
    assert fresh["head0"] is not fresh["head1"]
    x = torch.randn(2, 16)
    assert all(torch.equal(fresh[name](x), model[name](x)) for name in model)


@pytest.mark.parametrize("one_object", [True, False])
def test_a_layer_with_two_names(one_object: bool, path: Path) -> None:
    layer, x = nn.Linear(16, 16), torch.randn(2, 16)
    model = nn.ModuleDict({"a": layer, "b": layer})
    gs.compress_(model, gs.Int8())
    gs.save(model, path)
    first = nn.Linear(16, 16)
    second = first if one_object else nn.Linear(16, 16)
    fresh = gs.load_(nn.ModuleDict({"a": first, "b": second}), path)
    assert (fresh["a"] is fresh["b"]) is one_object
    assert fresh["a"].packed is fresh["b"].packed
    assert torch.equal(fresh["b"](x), model["b"](x))


@pytest.mark.parametrize("tie", [True, False])
def test_dense_ties_are_stored_once_and_tied_again(tie: bool, path: Path) -> None:
    def make(tie: bool) -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
        if tie:
            model["head"].weight = model["embed"].weight
        return model

    model = make(True)
    gs.save(model, path)
    assert path.stat().st_size < 2 * 50 * 8 * 4
    fresh = gs.load_(make(tie), path)
    assert fresh["head"].weight is fresh["embed"].weight
    assert torch.equal(fresh["head"].weight, model["head"].weight)


def test_a_packed_head_leaves_its_embedding_dense(path: Path) -> None:
    def make() -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Embedding(32, 8), "head": nn.Linear(8, 32)})
        model["head"].weight = model["embed"].weight
        return model

    model = make()
    gs.compress_(model, gs.Int8())
    gs.save(model, path)
    fresh = gs.load_(make(), path)
    assert torch.equal(fresh["embed"].weight, model["embed"].weight)
    assert torch.equal(fresh["head"].unpack(), model["head"].unpack())


def test_views_of_one_storage_are_stored_apart(path: Path) -> None:
    whole = torch.randn(4, 4)
    model = nn.Module()
    model.register_buffer("top", whole[:2])
    model.register_buffer("all", whole)
    gs.save(model, path)
    fresh = copy.deepcopy(model)
    fresh.get_buffer("all").zero_()
    gs.load_(fresh, path)
    assert torch.equal(fresh.get_buffer("all"), whole)
    assert torch.equal(fresh.get_buffer("top"), whole[:2])


def test_a_tie_the_file_does_not_have_is_refused(path: Path) -> None:
    gs.save(nn.ModuleDict({f"head{i}": nn.Linear(16, 16) for i in range(2)}), path)
    refuses(tied(), path, "head0.weight and head1.weight are tied in the model")


def test_one_layer_in_the_model_two_in_the_file(path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    layer = nn.Linear(8, 8)
    gs.compress_(model, gs.Int8())
    gs.save(model, path)
    refuses(nn.ModuleDict({"a": layer, "b": layer}), path, "a and b are one layer in the model")


def test_one_layer_in_the_model_half_packed_in_the_file(path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    layer = nn.Linear(8, 8)
    gs.compress_(model, {"a": gs.Int8()})
    gs.save(model, path)
    refuses(nn.ModuleDict({"a": layer, "b": layer}), path, "not packed in the file: b")


# Files on disk.


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(gs.Int8())
    gs.save(model, path)
    old = path.read_bytes()
    for broken in ("os.fsync", "os.replace", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:

            def fail(*_: Any, **__: Any) -> None:
                raise OSError("disk full")

            patch.setattr(broken, fail)
            with pytest.raises(OSError, match="disk full"):
                gs.save(packed(gs.SparseInt8()), path)
        assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_file_mode_follows_the_umask_and_links_stay(path: Path) -> None:
    before = os.umask(0o022)
    try:
        gs.save(packed(), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    link = path.with_name("latest.safetensors")
    link.symlink_to(path.name)
    gs.save(packed(gs.Int8()), link)
    assert link.is_symlink() and gs.load_(Net(), path).fc.packed.n == 8


def test_the_loaded_model_does_not_look_at_the_file_again(path: Path) -> None:
    model, x = packed(gs.SparseInt8()), image()
    gs.save(model, path)
    fresh = gs.load_(Net().eval(), path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(fresh(x), model(x))


def test_no_pickle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    for name in ("torch.load", "torch.save", "pickle.loads", "pickle.load", "pickle.dumps"):
        monkeypatch.setattr(name, fail)
    gs.save(packed(gs.Int8()), path)
    gs.load_(Net(), path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gs.load_(Net(), tmp_path / "nowhere.safetensors")
    with pytest.raises(OSError):
        gs.load_(Net(), tmp_path)
    with pytest.raises(FileNotFoundError):
        gs.save(Net(), tmp_path / "no" / "folder.safetensors")


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}


def unsavable(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("odd", tensor)
    return module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(Extra(4, 4)), "0._extra_state.*pickle"),
        (lambda: nn.Linear(4, 4, device="meta"), "weight is a tensor.*meta"),
        (lambda: unsavable(torch.eye(3).to_sparse()), "odd.*sparse"),
        (lambda: unsavable(torch.zeros(2, dtype=torch.complex128)), "complex128"),
        (lambda: gs.Linear.from_dense(nn.Linear(4, 4), gs.Int8()), "wrap it in nn.Sequential"),
    ],
    ids=["extra state", "meta", "sparse", "complex128", "one layer"],
)
def test_what_cannot_be_saved(make: Callable[[], nn.Module], match: str, path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        gs.save(make(), path)
    assert not os.listdir(path.parent)


# Files that do not fit.


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.fc = nn.Linear(8, 8)
        self.tail = nn.Linear(8, 4)


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")


def with_head(head: nn.Module) -> Callable[[], Net]:
    def make() -> Net:
        model = Net()
        model.head = head  # type: ignore[assignment]
        return model

    return make


def all_packed() -> nn.Module:
    model = Net()
    gs.compress_(model, gs.Int8())
    return model


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other class": (Other, "fit Other: missing in the file: tail.*not in the model: head.bias"),
    "nothing alike": (lambda: nn.Sequential(nn.Linear(2, 2)), "the model has not: fc, stem"),
    "width": (lambda: Net(width=12), "layer 'stem': 8 outputs in the file, 12 in the model"),
    "stride": (lambda: Net(stride=2), r"layer 'stem': stride is \[1, 1\] in the file, \[2, 2\] in"),
    "padding mode": (Grouped, 'padding_mode is "zeros" in the file, "reflect" in the model'),
    "dense shape": (with_head(nn.Linear(8, 5)), r"head.weight \(\(4, 8\) float32 in the file, \(5"),
    "dense bias": (with_head(nn.Linear(8, 4, bias=False)), "not in the model: head.bias"),
    "lazy": (with_head(nn.LazyLinear(4)), "head.weight .*not initialized here"),
    "packed here": (all_packed, "missing in the file: head.packed"),
    "one dense layer": (lambda: nn.Linear(8, 8), "the model has not: fc, stem"),
    "one packed layer": (
        lambda: gs.Linear.from_dense(nn.Linear(8, 8), gs.Int8()),
        "wrap it in nn.Sequential",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_told_why_and_left(case: str, path: Path) -> None:
    gs.save(packed(gs.Int8()), path)
    make, match = MISFITS[case]
    model = make()
    refuses(model, path, match)


def test_a_file_without_a_bias_does_not_fit_a_layer_with_one(path: Path) -> None:
    model = Net(bias=False)
    gs.compress_(model, gs.Int8())
    gs.save(model, path)
    refuses(Net(), path, "layer 'fc': bias is false in the file, true in the model")


def test_only_the_first_few_names_are_listed(path: Path) -> None:
    gs.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))), path)
    refuses(nn.Sequential(nn.ReLU()), path, r"0.bias, 0.weight, 1.bias.* and 95 more")
