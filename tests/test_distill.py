"""Distillation: the losses by hand, whom gradients reach, what is left behind, every error."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.distill import KD, Distiller, Loss, Run, SquareHead


class Net(nn.Module):
    """Layers of two parts each, a dropout that a teacher in training mode would show, a head."""

    def __init__(self, width: int = 6, classes: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)) for _ in range(depth)
        )
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        x = self.act(self.stem(x + shift))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

    def features(self, x: Tensor) -> list[Tensor]:
        outputs, x = [], self.act(self.stem(x))
        for layer in self.layers:
            outputs.append(layer(x))
            x = x + outputs[-1]
        return outputs


def pair(seed: int = 0, **student: int) -> tuple[Net, Net]:
    torch.manual_seed(seed)
    return Net(**student).eval(), Net()


def run(logits: Tensor, **features: Tensor | None) -> Run:
    return Run("student", logits, features)


def kd_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Hinton et al.: T^2 * mean over rows of sum_c p_c (log p_c - log q_c), in float64."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    return float(temperature**2 * (p * (p.log() - q.log())).sum(-1).mean())


def squarehead_by_hand(pairs: list[tuple[Tensor, Tensor]]) -> float:
    doubles = [(student.double(), teacher.double()) for student, teacher in pairs]
    ratios = [(s - t).square().mean() / t.square().mean() for s, t in doubles]
    return torch.stack(ratios).mean().item()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(2, 7),
    st.floats(0.5, 20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**30),
)
def test_kd_is_hintons_formula(
    rows: int, classes: int, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(2, rows, classes, generator=generator)).to(dtype)
    expected = kd_by_hand(student, teacher, temperature)
    # 1e-6 * T^2: the sum of C products near 1, each rounded at 2^-24, then scaled by T^2.
    bound = 1e-6 * temperature**2 + 1e-5 * expected
    assert abs(KD(temperature)(run(student), run(teacher)).item() - expected) <= bound


def test_kd_averages_over_all_leading_dimensions() -> None:
    student, teacher = torch.randn(2, 3, 5, 4)
    expected = kd_by_hand(student, teacher, 2.0)
    assert KD()(run(student), run(teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_kd_survives_classes_that_the_teacher_rules_out() -> None:
    ruled_out = torch.tensor([[1.0, -torch.inf, 0.0]])
    assert torch.isfinite(KD()(run(torch.zeros(1, 3)), run(ruled_out)))


def test_squarehead_by_hand() -> None:
    student, teacher = pair()
    loss = Distiller(student, teacher, [SquareHead("layers.*")])(x := torch.randn(5, 4))
    expected = squarehead_by_hand(list(zip(student.features(x), teacher.features(x), strict=True)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_squarehead_does_not_depend_on_the_scale_and_survives_zeros() -> None:
    a, b = torch.randn(2, 2, 3)
    factors = ((1, 1), (1e-3, 1e-3), (1, 0))
    loss, small, zeros = (SquareHead("a")(run(a, a=s * a), run(b, a=t * b)) for s, t in factors)
    assert small.item() == pytest.approx(loss.item(), rel=0.05)  # eps is 1e-8 of about 1e-6
    assert torch.isfinite(zeros)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("layers.*", ["layers.0", "layers.1"]),
        ("layers.?.0", ["layers.0.0", "layers.1.0"]),
        ("re:layers.1|head", ["layers.1", "head"]),
        ("*", ["stem", "layers.0", "layers.1", "act", "head", "unused"]),
    ],
)
def test_the_outermost_of_nested_matches_counts(match: str, expected: list[str]) -> None:
    names = [n for n, _ in Net().named_modules() if n and n != "layers"]
    assert SquareHead(match).layers(names) == {name: name for name in expected}


def test_a_container_that_does_not_run_is_no_layer() -> None:
    Distiller(*pair(), [SquareHead("layers*")])(torch.randn(2, 4))


def test_a_dict_pairs_layers_of_different_names_one_student_layer_with_two() -> None:
    student, teacher = pair(depth=1)
    pairs = [("layers.0", "layers.1"), ("layers.0", "layers.0"), ("stem", "layers.0")]
    distiller = Distiller(student, teacher, [SquareHead({ours: theirs}) for ours, theirs in pairs])
    distiller(x := torch.randn(5, 4))
    (ours,), (first, second), stem = student.features(x), teacher.features(x), student.stem(x)
    assert list(distiller.parts) == ["SquareHead", "SquareHead 2", "SquareHead 3"]
    expected = [squarehead_by_hand([two]) for two in ((ours, second), (ours, first), (stem, first))]
    assert [part.item() for part in distiller.parts.values()] == pytest.approx(expected, rel=1e-5)


def test_a_student_in_ddp_has_the_names_of_the_model_inside() -> None:
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        student, teacher = pair()
        wrapped = nn.parallel.DistributedDataParallel(student)
        losses, x = [KD(), SquareHead("layers.*")], torch.randn(5, 4)
        assert Distiller(wrapped, teacher, losses)(x) == Distiller(student, teacher, losses)(x)
    finally:
        torch.distributed.destroy_process_group()


def test_an_inplace_operation_after_a_layer_does_not_change_its_features() -> None:
    student, teacher = pair()
    loss = Distiller(student, teacher, [SquareHead("stem")])(x := torch.randn(5, 4))
    expected = squarehead_by_hand([(student.stem(x), teacher.stem(x))])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()


def test_a_layer_may_return_a_tuple() -> None:
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, x, x)

    student, teacher = (nn.ModuleDict({"att": Attention(4, 1)}) for _ in range(2))
    for model in (student, teacher):
        model.forward = model["att"].__call__
    loss = Distiller(student, teacher, [SquareHead("att")])(x := torch.randn(2, 3, 4))
    expected = squarehead_by_hand([(student(x)[0], teacher(x)[0])])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    student, teacher = pair()
    x, labels = torch.randn(6, 4), torch.randint(3, (6,))
    losses = [KD(3.0, weight=0.25), SquareHead("layers.*", weight=2.0), KD(1.0)]
    distiller = Distiller(student, teacher, losses, hard=0.5)
    loss = distiller(x, labels)
    parts = {name: part.item() for name, part in distiller.parts.items()}
    assert list(parts) == ["KD", "SquareHead", "KD 2", "hard"]
    assert not any(part.requires_grad for part in distiller.parts.values())
    assert loss.item() == pytest.approx(sum(parts.values()), rel=1e-6)
    logits = student(x).detach(), teacher(x).detach()
    assert parts["KD"] == pytest.approx(0.25 * kd_by_hand(*logits, 3.0), rel=1e-4)
    assert parts["KD 2"] == pytest.approx(kd_by_hand(*logits, 1.0), rel=1e-4)
    hard = -torch.log_softmax(logits[0].double(), -1)[range(6), labels].mean()
    assert parts["hard"] == pytest.approx(0.5 * hard.item(), rel=1e-5)
    alone = Distiller(student, teacher, [SquareHead("layers.*")])(x)
    assert parts["SquareHead"] == pytest.approx(2 * alone.item(), rel=1e-6)


def test_labels_are_used_only_with_a_weight_and_when_given() -> None:
    student, teacher = pair()
    x, labels = torch.randn(6, 4), torch.randint(3, (6,))
    for hard, given_labels in ((0.0, labels), (1.0, None)):
        distiller = Distiller(student, teacher, hard=hard)
        distiller(x, given_labels)
        assert list(distiller.parts) == ["KD"]


def test_labels_of_tokens_and_of_probabilities() -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher, hard=1.0)
    x, labels = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    distiller(x, labels)
    by_index = distiller.parts["hard"]
    distiller(x, nn.functional.one_hot(labels, 3).float())
    assert torch.allclose(distiller.parts["hard"], by_index, rtol=1e-6)
    ignored = labels.clone()
    ignored[:, 1:] = -100
    distiller(x, ignored)
    log_share = torch.log_softmax(student(x).detach(), -1)
    expected = -log_share[range(2), 0, labels[:, 0]].mean()
    assert distiller.parts["hard"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_reach_the_student_only_and_are_those_of_the_formula() -> None:
    student, teacher = pair()
    losses = [KD(2.0), SquareHead("layers.*")]
    Distiller(student, teacher, losses)(x := torch.randn(5, 4)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for n, p in student.named_parameters() if "unused" not in n)
    # d KD / d logits = T * (softmax(student / T) - softmax(teacher / T)) / rows
    logits = torch.randn(5, 3, requires_grad=True)
    KD(2.0)(run(logits), run(teacher(x).detach())).backward()
    soft = [torch.softmax(z.detach() / 2, -1) for z in (logits, teacher(x))]
    assert torch.allclose(logits.grad, 2 * (soft[0] - soft[1]) / 5, atol=1e-6)


def test_the_teacher_runs_in_eval_mode_without_autograd_and_stays_as_it_is() -> None:
    student, teacher = pair()
    modes: list[tuple[bool, bool]] = []
    teacher.head.register_forward_hook(
        lambda module, args, out: modes.append((module.training, torch.is_grad_enabled()))
    )
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher.train())
    assert not any(module.training for module in teacher.modules())
    distiller(torch.randn(2, 4))
    teacher.layers.train()
    loss = distiller(torch.randn(2, 4))
    loss.backward()
    assert modes == [(False, False)] * 2
    assert not any(module.training for module in teacher.modules())
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_the_student_keeps_its_mode_class_and_state() -> None:
    student, teacher = pair()
    student.train()
    student.stem.eval()
    modes = [module.training for module in student.modules()]
    before = copy.deepcopy(student.state_dict())
    Distiller(student, teacher, [SquareHead("layers.*")])(torch.randn(2, 4)).backward()
    assert [module.training for module in student.modules()] == modes
    assert type(student) is Net
    assert list(before) == list(student.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) for model in models for m in model.modules())


@pytest.mark.parametrize("broken", ["none", "student", "teacher", "loss"])
def test_hooks_live_only_inside_a_call(broken: str) -> None:
    student, teacher = pair()
    during: list[int] = []
    for model in (student, teacher):
        plain = model.forward

        def forward(x: Tensor, plain: Any = plain, model: nn.Module = model) -> Tensor:
            during.append(hooks(student, teacher))
            if model is {"student": student, "teacher": teacher}.get(broken):
                raise ConnectionError
            return plain(x)

        model.forward = forward

    losses = [SquareHead("layers.*"), *([Loss()] if broken == "loss" else [])]
    distiller = Distiller(student, teacher, losses)
    assert hooks(student, teacher) == 0
    if broken == "none":
        distiller(torch.randn(2, 4))
    else:
        with pytest.raises(NotImplementedError if broken == "loss" else ConnectionError):
            distiller(torch.randn(2, 4))
    assert set(during) == {2}
    assert hooks(student, teacher) == 0


def test_inputs_are_a_tensor_positional_or_by_keyword() -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher)
    x = torch.randn(2, 4)
    shifted = [distiller(inputs) for inputs in ((x, 1.0), [x, 1.0], {"x": x, "shift": 1.0})]
    assert shifted[0] == shifted[1] == shifted[2] == distiller(x + 1.0) != distiller(x)


def test_outputs_with_logits() -> None:
    logits = torch.randn(2, 3)
    for output in (logits, {"logits": logits}, SimpleNamespace(logits=logits)):
        assert Run("student", output, {}).logits is logits
    for output in ({"x": logits}, (logits,), SimpleNamespace(logits=None)):
        with pytest.raises(TypeError, match=f"the student returned a {type(output).__name__} with"):
            _ = Run("student", output, {}).logits


def test_a_model_without_logits_can_match_features() -> None:
    class Embedder(Net):
        def forward(self, x: Tensor, shift: float = 0.0) -> Any:
            return SimpleNamespace(embedding=super().forward(x, shift))

    assert Distiller(Embedder(), Embedder(), [SquareHead("head")])(torch.randn(2, 4)).item() > 0


def test_a_packed_teacher_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()

    def compress_(model: nn.Module, formats: Any) -> Any:
        assert formats == "the format"
        with torch.no_grad():
            model.head.weight.mul_(2.0)
        return "the report"

    monkeypatch.setitem(sys.modules, "gossamer.compress", SimpleNamespace(compress_=compress_))
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher, [SquareHead("head")], teacher_format="the format")
    assert distiller.teachers[0] is not teacher and distiller.teacher_reports == ("the report",)
    assert teacher.training and not distiller.teachers[0].training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    x = torch.randn(2, 4)
    expected = squarehead_by_hand([(student(x), distiller.teachers[0](x))])
    assert distiller(x).item() == pytest.approx(expected, rel=1e-5)


def match(student: nn.Module, teacher: nn.Module, layers: Any) -> Distiller:
    return Distiller(student, teacher, [SquareHead(layers)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: Distiller(s, t, []), "losses is empty: give at least one, such as KD"),
        (lambda s, t: Distiller(s, s), "the student is its own teacher"),
        (lambda s, t: Distiller(s, t, hard=-1), "hard=-1 must be finite and not negative"),
        (lambda s, t: KD(temperature=0), "temperature=0 must be positive and finite"),
        (lambda s, t: KD(float("nan")), "temperature=nan must be positive"),
        (lambda s, t: KD(weight=-0.5), "weight=-0.5 must be finite and not negative"),
        (lambda s, t: SquareHead("a", weight=float("nan")), "weight=nan must be finite"),
        (
            lambda s, t: match(s, t, "block.*"),
            r"pattern 'block.\*' matches no layer; layers are",
        ),
        (lambda s, t: match(s, t, {"stern": "stem"}), "the student has no layer 'stern'"),
        (lambda s, t: match(s, t, {"stem": "root"}), "no layer 'root' for the student's 'stem'"),
        (
            lambda s, t: match(Net(depth=3), t, "layers.*"),
            "teacher has no layer 'layers.2' for",
        ),
    ],
)
def test_errors_when_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*pair())


@pytest.mark.parametrize(
    ("student", "losses", "message"),
    [
        ({"classes": 4}, [KD()], r"student's logits are \(2, 4\), the teacher's \(2, 3\)"),
        (
            {"width": 8},
            [SquareHead("layers.*")],
            r"features of layer 'layers.0' are \(2, 8\), the teacher's \(2, 6\): Hint projects",
        ),
        ({}, [SquareHead("unused")], "layer 'unused' of the student did not run"),
    ],
)
def test_errors_in_a_call(student: dict[str, int], losses: list[Loss], message: str) -> None:
    distiller = Distiller(*pair(**student), losses)
    with pytest.raises(ValueError, match=message):
        distiller(torch.randn(2, 4))


def test_other_errors_in_a_call() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"labels are \(4,\), the logits \(2, 3\): give class ind"):
        Distiller(student, teacher, hard=1.0)(torch.randn(2, 4), torch.zeros(4).long())

    class Split(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"out": super().forward(x)}

    student.stem = Split(4, 6)
    student.forward = lambda x: student.stem(x)["out"]
    with pytest.raises(TypeError, match="layer 'stem' of the student returned a dict: features"):
        Distiller(student, teacher, [SquareHead("stem")])(torch.randn(2, 4))
