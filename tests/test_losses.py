"""Losses by hand in float64, padding that changes nothing, several teachers, projections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.losses import Loss, Run


def run(output: Any, mask: Tensor | None = None, share: float = 1.0, **features: Tensor) -> Run:
    return Run("student", output, features, mask, share)


def mask_of(*lengths: int, tokens: int = 6) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


# DIST, Cosine, Relation: the formulas.


def pearson(x: Tensor, y: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


@pytest.mark.parametrize(("temperature", "inter", "intra"), [(1.0, 1.0, 1.0), (4.0, 2.0, 0.5)])
def test_dist_is_huangs_formula(temperature: float, inter: float, intra: float) -> None:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 5)
    p, q = (torch.softmax(z.double() / temperature, -1) for z in (student, teacher))
    rows = torch.stack([1 - pearson(a, b) for a, b in zip(p, q, strict=True)]).mean()
    classes = torch.stack([1 - pearson(a, b) for a, b in zip(p.T, q.T, strict=True)]).mean()
    expected = temperature**2 * (inter * rows + intra * classes)
    loss = gs.DIST(temperature, inter=inter, intra=intra)(run(student), run(teacher))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dist_of_one_row_is_finite_and_has_gradients() -> None:
    student = torch.randn(1, 3, requires_grad=True)
    gs.DIST()(run(student), run(torch.randn(1, 3))).backward()
    assert torch.isfinite(student.grad).all()


def test_cosine_reads_tensors_and_named_outputs() -> None:
    student, teacher = torch.randn(2, 4, 6)
    unit = [x.double() / x.double().norm(dim=-1, keepdim=True) for x in (student, teacher)]
    expected = ((unit[0] - unit[1]).square().sum(-1) / 2).mean().item()
    assert gs.Cosine()(run(student), run(teacher)).item() == pytest.approx(expected, rel=1e-5)
    theirs = run(SimpleNamespace(last_hidden_state=teacher))
    ours = run({"last_hidden_state": student})
    assert gs.Cosine()(ours, theirs).item() == pytest.approx(expected, rel=1e-5)
    loss = gs.Cosine(key="sentence_embedding")
    assert loss(run({"sentence_embedding": teacher}), run(teacher)).item() == pytest.approx(0)
    with pytest.raises(TypeError, match="dict without sentence_embedding: it must return a tensor"):
        loss(run({"x": student}), run(teacher))


def relation_by_hand(student: Tensor, teacher: Tensor, heads: int, lengths: list[int]) -> float:
    """One sample, one head, one token at a time, on the real tokens alone, in float64."""
    losses = []
    for ours, theirs, length in zip(student.double(), teacher.double(), lengths, strict=True):
        for head in range(heads):
            a, b = (x[:length].chunk(heads, -1)[head] for x in (ours, theirs))
            p, q = (torch.softmax(x @ x.T / x.shape[1] ** 0.5, -1) for x in (b, a))
            losses.append((p * (p.log() - q.log())).sum(-1))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("lengths", [[6, 6], [6, 2], [1, 5]])
def test_relation_is_minilms_formula_and_widths_may_differ(lengths: list[int]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 12)
    mask = mask_of(*lengths)
    loss = gs.Relation("q", heads=4)(run(0, mask, q=student), run(0, mask, q=teacher))
    expected = relation_by_hand(student, teacher, 4, lengths)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# Padding.

LOSSES = [
    gs.KD(2.0),
    gs.DIST(),
    gs.Cosine(),
    gs.SquareHead("a"),
    gs.Hint("a", widths=(8, 8)),
    gs.Relation("a", heads=2),
]


@pytest.mark.parametrize("garbage", [1e30, torch.nan, torch.inf])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_garbage_in_padding_changes_nothing(loss: Loss, garbage: float) -> None:
    torch.manual_seed(0)
    mask = mask_of(6, 3, 1)
    values, grads = [], []
    for padding in (0.0, garbage):
        generator = torch.Generator().manual_seed(0)
        ours, theirs = (
            torch.randn(3, 6, 8, generator=generator).masked_fill(~mask[..., None], padding)
            for _ in range(2)
        )
        ours.requires_grad_()
        value = loss(run(ours, mask, a=ours), run(theirs, mask, a=theirs))
        value.backward()
        values.append(value.item())
        grads.append(ours.grad)
    assert values[0] == values[1]
    assert torch.equal(grads[0], grads[1])
    assert grads[0][mask].any() and not grads[0][~mask].any()


class Tagger(nn.Module):
    """Labels of tokens, from embeddings and one layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(20, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.layer(self.words(input_ids)))


def test_the_mask_is_an_argument_or_in_the_inputs_and_holds_for_labels() -> None:
    torch.manual_seed(0)
    student, teacher = Tagger(), Tagger()
    distiller = gs.Distiller(student, teacher, [gs.KD(), gs.SquareHead("layer")], hard=1.0)
    ids, labels, mask = torch.randint(20, (2, 6)), torch.randint(3, (2, 6)), mask_of(6, 2)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    loss = distiller(inputs, labels)
    other, others = ids.masked_fill(~mask, 7), labels.masked_fill(~mask, 1)
    assert distiller({"input_ids": other}, others, mask) == loss
    assert distiller(other, others, mask.float()) == loss
    assert distiller(other, others) != loss
    alone = distiller(ids[mask][None], labels[mask][None])
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    probabilities = nn.functional.one_hot(labels, 3).float()
    assert distiller(inputs, probabilities).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(2, 6), torch.tensor([[0.0, -1e9]]), torch.ones(6), torch.ones(2, 1, 6, 6)],
    ids=["no token", "additive", "one dimension", "four dimensions"],
)
def test_a_mask_that_is_none_is_a_sentence(mask: Tensor) -> None:
    distiller = gs.Distiller(Tagger(), Tagger())
    with pytest.raises(ValueError, match=r"the mask \(.*\) must be \(batch, tokens\) with 1 for"):
        distiller(torch.randint(20, (2, 6)), mask=mask)


def test_outputs_that_a_mask_cannot_be_laid_on_are_a_sentence() -> None:
    sequence_first = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match=r"\(6, 2, 8\) of the student starts neither with \(batch"):
        gs.KD()(run(sequence_first, mask_of(6, 3)), run(sequence_first))
    pooled = torch.randn(2, 8)
    assert gs.KD()(run(pooled, mask_of(6, 3)), run(pooled, mask_of(6, 3))).item() < 1e-6


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_output_is_a_sentence(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"of the teacher is empty: there is no mean"):
        gs.KD()(run(torch.zeros(shape)), Run("teacher", torch.zeros(shape)))


# Several teachers.


def test_several_teachers_average_probabilities_or_losses() -> None:
    torch.manual_seed(0)
    student, *teachers = (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)) for _ in range(3))
    x = torch.randn(6, 4)
    losses = [gs.KD(2.0), gs.DIST(2.0), gs.SquareHead("0")]
    distiller = gs.Distiller(student, teachers, losses, teacher_weights=[1, 3])
    distiller(x)
    parts = {name: part.item() for name, part in distiller.parts.items()}
    share = sum(
        weight * torch.softmax(teacher(x).detach() / 2, -1)
        for weight, teacher in zip((0.25, 0.75), teachers, strict=True)
    )
    # log(p) * T are logits whose softened probabilities are p.
    mixed = run(2 * share.log())
    for loss in (gs.KD(2.0), gs.DIST(2.0)):
        expected = loss(run(student(x).detach()), mixed).item()
        assert parts[type(loss).__name__] == pytest.approx(expected, rel=1e-4)
    alone = [gs.Distiller(student, t, [gs.SquareHead("0")])(x).item() for t in teachers]
    assert parts["SquareHead"] == pytest.approx(0.25 * alone[0] + 0.75 * alone[1], rel=1e-5)
    assert not any(p.grad is not None for t in teachers for p in t.parameters())


def test_several_teachers_are_packed_and_weighted_alike_by_default() -> None:
    student, *teachers = (nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
    distiller = gs.Distiller(student, teachers, teacher_format=gs.Int8())
    assert [row.kernel for report in distiller.teacher_reports for row in report] == [
        "gemm_int8",
        "gemm_int8",
    ]
    x = torch.randn(4, 8)
    equal = gs.Distiller(student, teachers, teacher_format=gs.Int8(), teacher_weights=(2, 2))
    assert distiller(x) == equal(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": []}, "teacher is empty: give a model, or several in a list"),
        ({"teacher_weights": [1, 1]}, r"teacher_weights=\[1, 1\] for 1 teachers: give one each"),
        ({"teacher_weights": [0]}, "not all zero"),
        ({"teacher_weights": [-1]}, "teacher_weights=-1 must be finite and not negative"),
    ],
)
def test_errors_of_teachers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gs.Distiller(nn.Linear(2, 2), **{"teacher": nn.Linear(2, 2), **options})


# Projections.


def test_a_hint_learns_its_projection_beside_the_student() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    hint = gs.Hint("0", widths=(3, 8))
    distiller = gs.Distiller(student, teacher, [hint])
    (projection,) = distiller.parameters()
    assert list(student.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(32, 4)
    target = teacher[0](x).detach().double()
    difference = student[0](x).detach().double() @ projection.detach().double().T - target
    expected = difference.square().mean() / target.square().mean()
    first = distiller(x)
    assert first.item() == pytest.approx(expected.item(), rel=1e-5)

    state = {name: value.clone() for name, value in distiller.state_dict().items()}
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        distiller(x).backward()
        optimizer.step()
    assert distiller(x) < 0.5 * first
    other = gs.Distiller(student, teacher, [gs.Hint("0", widths=(3, 8))])
    assert torch.equal(next(other.parameters()), state["0.weight"]), "the same start everywhere"
    other.load_state_dict(distiller.state_dict())
    assert other(x) == distiller(x)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_a_hint_of_feature_maps_projects_their_channels() -> None:
    student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 6, 3))
    hint = gs.Hint("0", widths=(4, 6))
    x = torch.randn(2, 3, 5, 5)
    loss = gs.Distiller(student, teacher, [hint])(x)
    weight = hint.learned.weight
    ours = nn.functional.conv2d(student(x), weight[:, :, None, None])
    theirs = teacher(x)
    expected = (ours - theirs).square().mean() / theirs.square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.Hint("a", widths=(0, 8)), r"widths=\(0, 8\) must be positive"),
        (lambda: gs.Relation("a", heads=0), "heads=0 must be at least 1"),
        (lambda: gs.DIST(0.0), "temperature=0.0 must be positive"),
        (lambda: gs.DIST(inter=-1), "inter=-1 must be finite"),
        (lambda: gs.DIST(intra=torch.inf), "intra=inf must be finite"),
        (
            lambda: gs.Hint("a", widths=(3, 8))(
                run(0, a=torch.ones(2, 4)), run(0, a=torch.ones(2, 8))
            ),
            r"layer 'a': the features are \(4, 8\) wide, but widths=\(3, 8\)",
        ),
        (
            lambda: gs.Relation("a", heads=2)(
                run(0, a=torch.ones(2, 4)), run(0, a=torch.ones(2, 4))
            ),
            r"layer 'a': the student's features are \(2, 4\), Relation needs \(batch, tokens",
        ),
        (
            lambda: gs.Relation("a", heads=3)(
                run(0, a=torch.ones(2, 5, 6)), run(0, a=torch.ones(2, 5, 8))
            ),
            r"features are \(2, 5, 8\), .* heads=3 divides",
        ),
        (
            lambda: gs.Relation("a", heads=2)(
                run(0, a=torch.ones(2, 5, 6)), run(0, a=torch.ones(2, 4, 6))
            ),
            r"batch and tokens in layer 'a' are \(2, 5\), the teacher's \(2, 4\)",
        ),
        (
            lambda: gs.Cosine()(run(torch.ones(2, 3)), run(torch.ones(2, 4))),
            r"embeddings are \(2, 3\), the teacher's \(2, 4\)",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
