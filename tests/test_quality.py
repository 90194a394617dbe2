"""bench/fashion*.py and bench/minilm_distil.py: tiny runs, on data that are made here."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builds import ROOT, output

import gossamer as gs
from gossamer.tasks import minilm

FASHION = ROOT / "bench" / "fashion.py"


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty-four random images of each part."""
    folder = tmp_path_factory.mktemp("clothes")
    pixels = torch.randint(0, 256, (64 * 784,), generator=torch.Generator().manual_seed(0)).tolist()
    classes = [i % 10 for i in range(64)]
    for part in ("train", "t10k"):
        images = struct.pack(">HBBIII", 0, 8, 3, 64, 28, 28) + bytes(pixels)
        labels = struct.pack(">HBBI", 0, 8, 1, 64) + bytes(classes)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def test_every_row_of_fashion_is_trained_once_and_reported(clothes: Path, tmp_path: Path) -> None:
    command = (sys.executable, FASHION, "--data", clothes, "--work", tmp_path / "work")
    command += ("--folder", tmp_path, "--images", "64", "--seeds", "1")
    first = output(*command)
    figures = json.loads((tmp_path / "fashion.json").read_text())
    assert figures["rows"].keys() >= {"dense", "int8", "dense, further", "90", "95", "98"}
    page = (tmp_path / "fashion.md").read_text()
    for row in figures["rows"].values():
        assert row["title"] in page and all(0 <= value <= 100 for value in row["accuracy"])
    assert [len(figures["rows"][name]["accuracy"]) for name in ("dense", "student")] == [1, 3]
    for bar in figures["bars"]:
        kept = bar["measured"] >= bar["limit"]
        assert bar["passed"] == (kept if bar["sense"] == ">=" else bar["measured"] <= bar["limit"])
    # A second call takes everything from the work folder.
    second = output(*command)
    assert "90, seed 0" in first and "90, seed 0" not in second
    assert json.loads((tmp_path / "fashion.json").read_text())["rows"] == figures["rows"]


def test_tuning_never_sees_the_test_images(clothes: Path, tmp_path: Path) -> None:
    (clothes / "t10k-images-idx3-ubyte.gz").rename(tmp_path / "hidden.gz")
    command = (sys.executable, FASHION, "--data", clothes, "--work", tmp_path / "work")
    printed = output(*command, "--folder", tmp_path, "--images", "60", "--tune", "90")
    kept = {path.stem for path in (tmp_path / "work" / "tuning").glob("*.json")}
    assert "90, seed 100" in printed and kept == {"dense-100", "90-100"}
    assert not (tmp_path / "fashion.md").exists()
    (tmp_path / "hidden.gz").rename(clothes / "t10k-images-idx3-ubyte.gz")


def test_a_row_of_another_recipe_is_not_passed_off(bench, clothes: Path, tmp_path: Path) -> None:
    fashion = bench("fashion")
    data = (fashion.images("train", 64, clothes), fashion.images("test", 64, clothes))
    fashion.Work(tmp_path, data, {"epochs": 1}).figures("dense", 0)
    with pytest.raises(SystemExit, match=r"dense-0.json is of another recipe"):
        fashion.Work(tmp_path, data, {"epochs": 1, "rate": 1e-4}).figures("dense", 0)


def test_a_small_resnet_is_trained_once_and_quantized(bench, clothes: Path, tmp_path: Path) -> None:
    command = (sys.executable, ROOT / "bench" / "fashion_resnet.py", "--data", clothes)
    command += ("--work", tmp_path / "work", "--folder", tmp_path, "--images", "64", "--seeds", "2")
    output(*command)
    first = json.loads((tmp_path / "fashion_resnet.json").read_text())
    assert [len(row["each"]) for row in first["rows"].values()] == [2, 2, 2, 2]
    assert first["rows"]["fp32"]["agreement"] == 100 and len(first["bars"]) == 3
    assert all(name in (tmp_path / "fashion_resnet.md").read_text() for name in first["rows"])
    output(*command)  # takes the weights, and their seconds, from the work folder
    assert json.loads((tmp_path / "fashion_resnet.json").read_text()) == first
    script = bench("fashion_resnet")
    with pytest.raises(SystemExit, match=r"1.safetensors is of another recipe"):
        data = script.images("train", 64, clothes)
        script.trained(tmp_path / "work", 1, data, script.Recipe(epochs=2))


def test_images_are_mirrored_and_moved_whole(bench) -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    y = bench("fashion_resnet").augmented(x)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
    inside = y[:, :, 4:-4, 4:-4]

    def is_moved(source: torch.Tensor) -> torch.Tensor:
        places = [(down, right) for down in range(2, 7) for right in range(2, 7)]
        same = [inside == source[:, :, d : d + 24, r : r + 24] for d, r in places]
        return torch.stack([found.flatten(1).all(1) for found in same]).any(0)

    assert (is_moved(x) ^ is_moved(x.flip(3))).all() and is_moved(x).any() and not is_moved(x).all()


def test_the_shuffled_teacher_gives_each_image_anothers_logits(bench) -> None:
    rows = bench("fashion_rows")
    torch.manual_seed(0)
    x = torch.arange(32.0).view(32, 1)
    logits = rows.Shuffled(torch.nn.Identity())(x)
    assert not torch.equal(logits, x) and torch.equal(logits.sort(0).values, x)


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98])
def test_the_layers_lose_what_the_row_says(bench, sparsity: float) -> None:
    rows = bench("fashion_rows")
    model = rows.TextbookCNN()
    pruner = gs.Pruner(model, rows.shares(model, sparsity, root=3.0), "1x4", scope="layer")
    pruner.finish()
    assert pruner.masks.keys() == {"conv1", "conv2", "fc1", "fc2"}
    pruned = [(1 - mask.float().mean().item(), mask.numel()) for mask in pruner.masks.values()]
    assert pruned[0][0] == pruned[3][0] == 0.0 and pruned[1][0] < sparsity < pruned[2][0]
    zeros = sum(share * size for share, size in pruned[1:3])
    assert zeros / sum(size for _, size in pruned[1:3]) == pytest.approx(sparsity, abs=1e-5)


class Words:
    """A tokenizer: one token a word, padded with zeros."""

    def encode_batch(self, sentences: list[str]) -> list[SimpleNamespace]:
        ids = [[len(word) for word in sentence.split()] for sentence in sentences]
        longest = max(map(len, ids))
        return [
            SimpleNamespace(
                ids=own + [0] * (longest - len(own)),
                attention_mask=[1] * len(own) + [0] * (longest - len(own)),
            )
            for own in ids
        ]


def archive(path: Path, texts: list[str]) -> Path:
    """An archive of sentences as `gossamer.tasks.minilm.snippets` reads it."""

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        lines = "\n".join(f"{i}\t0.5\t{text}" for i, text in enumerate(texts))
        add(tar, "hutto/tweets_GroundTruth.txt", lines.encode())
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "more/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_batches_hold_every_sentence_once_by_length(bench) -> None:
    distil = bench("minilm_distil")
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0))
    parts = list(distil.batches(lengths, 128))
    assert sorted(torch.cat(parts).tolist()) == list(range(200))
    assert all(lengths[part].sum() < 128 + 40 for part in parts)
    widest = max(int(lengths[part].max() - lengths[part].min()) for part in parts)
    assert widest < 20, "short sentences are not padded to long ones"


def test_minilm_is_pruned_while_it_learns(bench, monkeypatch, tmp_path: Path) -> None:
    distil = bench("minilm_distil")
    torch.manual_seed(0)
    model = minilm.MiniLM(heads=2, inner=64).eval()
    model.words = torch.nn.Embedding(50, 384)
    texts = [" ".join(["word" * (1 + i % 3)] * (2 + i % 5)) for i in range(24)]
    ratings = torch.arange(24, dtype=torch.float64)
    monkeypatch.setattr(minilm, "load", lambda: (model, Words()))
    monkeypatch.setattr(minilm, "pairs", lambda *_: (texts, texts[::-1], ratings))
    tar = archive(tmp_path / "sentences.tar.gz", [f"{text} {i}" for i, text in enumerate(texts)])
    options = ["--archive", str(tar), "--folder", str(tmp_path), "--epochs", "2", "--points", "2"]
    monkeypatch.setattr(sys, "argv", ["minilm_distil.py", *options, "--threads", "1"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    distil.main()
    figures = json.loads((tmp_path / "minilm_distil.json").read_text())
    assert figures["sentences"] == 24 and figures["zeros"] == pytest.approx(0.8, abs=1e-3)
    assert len(figures["curve"]) == 2 and figures["curve"][-1]["sparsity"] == figures["zeros"]
    assert figures["test"].keys() == {"fp32", "pruned", "sparse int8"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before), (
        "the teacher"
    )
    page = (tmp_path / "minilm_distil.md").read_text()
    assert "(minilm_distil.png)" in page and f"{figures['test']['sparse int8']:.4f}" in page
    assert 5_000 < (tmp_path / "minilm_distil.png").stat().st_size < 150_000
