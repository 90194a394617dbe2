"""The cache of teachers' outputs: found where nothing changed, and never where anything did."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.record_log import RecordLog


class Encoder(nn.Module):
    """Tokens to one row each, or to their mean, with a setting that no tensor shows."""

    scale = 1.0

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.words, self.head, self.pooled = nn.Embedding(30, 6), nn.Linear(6, 3), pooled
        self.factors = [1.0]
        self._calls = [0]

    def forward(self, ids: Tensor, mask: Tensor, shift: float = 0.0) -> Tensor:
        self._calls[0] += 1
        x = self.head(self.words(ids)) * self.scale * self.factors[0] + shift
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if self.pooled else x


def distiller_of(folder: Path, teacher: nn.Module, **options: Any) -> gs.Distiller:
    torch.manual_seed(7)
    student = Encoder(getattr(teacher, "pooled", False))
    return gs.Distiller(student, teacher, cache=folder, **options)


def batch_of(*lengths: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Sentences that follow from their length alone, padded."""
    rows = [torch.arange(length) * length % 29 + 1 for length in lengths]
    ids = torch.stack([nn.functional.pad(row, (0, tokens - len(row))) for row in rows])
    return ids, ids.ne(0)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_second_epoch_does_not_run_the_teacher(tmp_path: Path, pooled: bool) -> None:
    torch.manual_seed(0)
    teacher = Encoder(pooled)
    distiller = distiller_of(tmp_path, teacher)
    plain = gs.Distiller(distiller.student, teacher)
    first = [batch_of(5, 3, tokens=5), batch_of(2, 4, tokens=4)]
    for ids, mask in first:
        assert distiller((ids, mask), mask=mask) == plain((ids, mask), mask=mask)
    runs = teacher._calls[0]
    for lengths, tokens in (((2, 5), 5), ((3, 4), 7)):  # other partners, and more padding
        ids, mask = batch_of(*lengths, tokens=tokens)
        loss = distiller((ids, mask), mask=mask)
        assert teacher._calls[0] == runs
        assert loss.item() == pytest.approx(plain((ids, mask), mask=mask).item(), rel=1e-6)
        runs = teacher._calls[0]
    assert (distiller.cache.hits, distiller.cache.misses) == (4, 4)
    loss.backward()

    again = distiller_of(tmp_path, teacher)
    ids, mask = first[0]
    assert again((ids, mask), mask=mask) == plain((ids, mask), mask=mask)
    assert (again.cache.hits, again.cache.misses) == (2, 0), "another run finds them"


def test_a_batch_with_one_unknown_sample_runs_the_teacher_and_keeps_that_one(
    tmp_path: Path,
) -> None:
    teacher = nn.Linear(4, 3)
    distiller = gs.Distiller(nn.Linear(4, 3), teacher, cache=tmp_path)
    data = torch.randn(5, 4)
    distiller(data[:4])
    distiller(data[3:])
    distiller(data.flip(0))
    assert (distiller.cache.hits, distiller.cache.misses) == (6, 5)


def changed(teacher: Encoder) -> dict[str, Any]:
    """Ways of changing a teacher, each a function of it."""

    def through_data() -> None:
        for parameter in teacher.parameters():
            parameter.data.mul_(0.99)

    def assign() -> None:
        teacher.head = nn.Linear(6, 3)

    return {
        "one weight": lambda: nn.init.constant_(teacher.head.weight[0, :1], 9.0),
        "a moving average through .data": through_data,
        "another layer": assign,
        "a setting": lambda: setattr(teacher, "scale", 2.0),
        "a setting in a list": lambda: teacher.factors.append(teacher.factors.pop() * 2),
        "a state": lambda: teacher.load_state_dict(Encoder().state_dict()),
    }


@pytest.mark.parametrize("change", list(changed(Encoder())))
def test_a_changed_teacher_is_never_answered_for(tmp_path: Path, change: str) -> None:
    torch.manual_seed(0)
    teacher = Encoder()
    distiller = distiller_of(tmp_path, teacher)
    ids, mask = batch_of(5, 3, tokens=5)
    before = distiller((ids, mask), mask=mask)
    changed(teacher)[change]()
    loss = distiller((ids, mask), mask=mask)
    assert loss == gs.Distiller(distiller.student, teacher)((ids, mask), mask=mask) != before
    assert distiller.cache.hits == 0
    again = distiller_of(tmp_path, copy.deepcopy(teacher))
    again((ids, mask), mask=mask)
    assert again.cache.misses == 0, "the changed one has records of its own"


def test_a_packed_teacher_and_other_losses_have_records_of_their_own(tmp_path: Path) -> None:
    teacher, x = nn.Linear(8, 3), torch.randn(4, 8)
    teacher = nn.Sequential(teacher)
    for options in ({}, {"teacher_format": gs.Int8()}, {"losses": [gs.KD(), gs.Cosine()]}):
        distiller = gs.Distiller(nn.Linear(8, 3), teacher, cache=tmp_path, **options)
        distiller(x)
        assert (distiller.cache.hits, distiller.cache.misses) == (0, 4)
        distiller(x)
        assert distiller.cache.hits == 4


def test_changed_inputs_are_never_answered_for(tmp_path: Path) -> None:
    distiller = distiller_of(tmp_path, Encoder())
    ids, mask = batch_of(5, 3, tokens=5)
    calls: list[Any] = [(ids, mask), (ids, mask, 1.0), (ids, mask, torch.tensor(1.0))]
    other = ids.clone()
    other[:, 0] += 1
    calls += [(other, mask), (ids.int(), mask), {"ids": ids, "mask": mask, "shift": 2.0}]
    for inputs in calls:
        distiller(inputs, mask=mask)
        assert distiller.cache.hits == 0
    distiller(calls[0])  # no mask: padding may count
    with torch.autocast("cpu", torch.bfloat16):
        distiller(calls[0], mask=mask)
    assert distiller.cache.hits == 0
    distiller(calls[0], mask=mask)
    assert distiller.cache.hits == 2


def test_records_have_the_teachers_dtype(tmp_path: Path) -> None:
    teacher, student = nn.Linear(4, 3).bfloat16(), nn.Linear(4, 3).bfloat16()
    x = torch.randn(2, 4).bfloat16()
    distiller = gs.Distiller(student, teacher, cache=tmp_path)
    assert distiller(x) == distiller(x) == gs.Distiller(student, teacher)(x)
    assert distiller.cache.hits == 2


SCRIPT = """
import sys, torch, gossamer as gs
torch.manual_seed(0)
teacher = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU())
distiller = gs.Distiller(torch.nn.Linear(4, 3), teacher, cache=sys.argv[1])
distiller(torch.randn(6, 4))
print(distiller.cache.hits, distiller.cache.misses)
"""


def test_another_process_finds_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    shown = [subprocess.run(command, capture_output=True, text=True).stdout for _ in range(2)]
    assert shown == ["0 6\n", "6 0\n"]


# The file.


def names_of(count: int) -> list[bytes]:
    return [bytes([i]) * 16 for i in range(count)]


def filled(folder: Path, count: int = 3) -> Path:
    RecordLog(folder).put(
        {name: {"x": torch.full((4,), i)} for i, name in enumerate(names_of(count))}
    )
    (path,) = folder.iterdir()
    return path


def test_a_file_cut_at_any_byte_loses_its_last_records_only(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    known = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        log = RecordLog(tmp_path)
        known.append([log.get(name) is not None for name in names_of(3)])
    counts = [sum(flags) for flags in known]
    assert counts == sorted(counts) and {0, 1, 2, 3} == set(counts)
    assert all(flags == sorted(flags, reverse=True) for flags in known)


def test_a_damaged_record_is_missed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    for place in range(len(b"gossamer records 1\n"), len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        log = RecordLog(tmp_path)
        found = [log.get(name) for name in names_of(3)]
        assert any(record is None for record in found)
        for i, record in enumerate(found):
            assert record is None or record["x"].tolist() == [i] * 4


def test_a_foreign_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.records").write_bytes(b"something else altogether")
    with pytest.raises(ValueError, match=r"a.records is no file of a teacher's outputs: move it"):
        gs.Distiller(nn.Linear(2, 2), nn.Linear(2, 2), cache=tmp_path)


def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = gs.Distiller(nn.Linear(4, 3), nn.Linear(4, 3), cache=tmp_path)
    data, plain = torch.randn(4, 4), os.write
    distiller(data[:2])

    def write(file: int, content: memoryview) -> int:
        if len(content) > 20:
            return plain(file, content[:20])  # a part, as a disk does that fills up
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match=r"cannot be kept, \d+ bytes more in .*: No space left on d"):
        distiller(data)
    monkeypatch.undo()
    distiller(data[:2])
    assert distiller.cache.hits == 2 + 2
    again = RecordLog(tmp_path)
    assert len(again._places) == 2


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.ones(2, 4), object()), TypeError, "input 1 is a object: a cache needs tensors"),
        ((1.0, 2.0), ValueError, "the inputs have no tensor whose first dimension is a batch"),
        (torch.ones(0, 4), ValueError, "the inputs have no tensor whose first dimension is a bat"),
        (torch.ones(2, 3, 4), ValueError, r"logits are \(3, 2, 4\) for a batch of 2: a cache ne"),
    ],
)
def test_what_cannot_be_cached_is_a_sentence(
    tmp_path: Path, inputs: Any, error: type[Exception], message: str
) -> None:
    class Transposed(nn.Module):
        def forward(self, x: Any, more: Any = 0) -> Tensor:
            return x.transpose(0, 1) if isinstance(x, Tensor) else torch.ones(1)

    with pytest.raises(error, match=message):
        gs.Distiller(Transposed(), Transposed(), cache=tmp_path)(inputs)


def test_losses_of_features_cannot_be_cached(tmp_path: Path) -> None:
    student, teacher = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match="holds outputs only, but the losses read the features"):
        gs.Distiller(student, teacher, [gs.KD(), gs.SquareHead("0")], cache=tmp_path)
