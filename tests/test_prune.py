"""Pruning: masks that follow the schedule and hold against optimizers, and every error sentence."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from gossamer.prune import Pruner, prune_
from gossamer.schedules import Cubic, OneShot


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.Linear(8, 3),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    kinds = (nn.Linear, nn.Conv2d)
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, kinds)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], None]) -> None:
    images = torch.randn(4, 4, 5, 5)
    optimizer.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()
    after()


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("begin", [0, 5])
def test_cubic_is_the_formula_of_zhu_and_gupta(steps: int, begin: int) -> None:
    schedule = Cubic(steps, begin)
    assert [schedule(t) for t in range(begin + 1)] == [0.0] * (begin + 1)
    for t in range(steps + 1):
        assert schedule(begin + t) == pytest.approx(1 - (1 - t / steps) ** 3, abs=1e-12)
    assert schedule(begin + steps) == schedule(begin + steps + 100) == 1.0


def test_cubic_holds_its_value_between_updates_and_always_arrives() -> None:
    schedule = Cubic(steps=10, every=4)
    at = [1 - (1 - t / 10) ** 3 for t in (0, 4, 8, 10)]
    expected = [at[0]] * 4 + [at[1]] * 4 + [at[2]] * 2 + [at[3]] * 3
    assert [schedule(t) for t in range(13)] == pytest.approx(expected)
    assert len({Cubic(steps=2000)(t) for t in range(2001)}) == 101
    assert [OneShot()(t) for t in (0, 1, 7)] == [1.0] * 3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("optim", [sgd, adamw])
@pytest.mark.parametrize(("pattern", "width"), [("unstructured", 1), ("1x4", 4)])
def test_masks_hold_in_training_and_follow_the_schedule(
    optim: Callable[[nn.Module], torch.optim.Optimizer], pattern: str, width: int
) -> None:
    model = small_model()
    optimizer, schedule = optim(model), Cubic(steps=6, begin=2, every=2)
    pruner = Pruner(model, 0.9, pattern, schedule)
    total = sum(weight.numel() for weight in weights(model).values()) // width
    leaked, before = 0, pruner.masks
    for t in range(1, 12):
        train(model, optimizer, lambda: None)
        leaked += sum(int(w[~pruner.masks[n]].count_nonzero()) for n, w in weights(model).items())
        pruner.step()
        dead = 0
        for name, weight in weights(model).items():
            mask = pruner.masks[name]
            assert not weight[~mask].any() and not torch.signbit(weight[~mask]).any()
            assert not (mask & ~before[name]).any(), "a pruned weight stays pruned"
            dead += int((~mask).sum())
        assert dead // width == round(0.9 * schedule(t) * total)
        before = pruner.masks
    assert leaked, "the optimizer did move pruned weights: the test can fail"
    assert pruner.sparsity == pytest.approx(0.9, abs=0.5 / total)


def test_not_finite_values_in_pruned_weights_are_wiped() -> None:
    model = nn.Linear(4, 2)
    pruner = Pruner(model, 0.5)
    pruner.step()
    with torch.no_grad():
        model.weight[~pruner.masks[""]] = torch.tensor([float("nan"), float("inf"), -1.0, 1.0])
    pruner.step()
    assert not model.weight[~pruner.masks[""]].any()


def test_sparsity_counts_pruned_weights_now() -> None:
    model = nn.Linear(8, 2)
    pruner = Pruner(model, 0.5, schedule=Cubic(steps=2))
    assert pruner.sparsity == 0.0 and pruner.masks[""].all()
    pruner.step()
    assert pruner.sparsity == 7 / 16  # 0.5 * (1 - 0.5^3) of 16 weights
    pruner.step()
    assert pruner.sparsity == 0.5


def test_finish_goes_all_the_way_and_later_steps_do_not_undo_it() -> None:
    model = small_model()
    pruner = Pruner(model, 0.9, schedule=Cubic(steps=100))
    pruner.step()
    early = pruner.sparsity
    report = pruner.finish()
    masks = pruner.masks
    assert early < 0.1 and pruner.sparsity == pytest.approx(0.9, abs=0.001)
    assert f"{pruner.sparsity:.2%} of the weights pruned, 90.00% asked for" in report.title
    resumed = Pruner(model, 0.9, schedule=Cubic(steps=100))
    resumed.load_state_dict(pruner.state_dict())
    for one in (pruner, resumed):
        one.step()
        assert all(torch.equal(one.masks[name], masks[name]) for name in masks)


def test_a_shared_weight_is_pruned_and_counted_once() -> None:
    torch.manual_seed(0)
    embedding, first, tied = nn.Embedding(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)
    first.weight = tied.weight = embedding.weight
    model = nn.ModuleDict({"emb": embedding, "a": first, "b": tied, "c": nn.Linear(8, 6)})
    model["again"] = model["c"]
    pruner = Pruner(model, 0.25)
    report = pruner.finish()
    assert list(pruner.masks) == ["a", "c"]
    assert sum(int((model[name].weight == 0).sum()) for name in "ac") == 24
    assert first.weight is tied.weight is embedding.weight
    notes = {row.name: row.note for row in report}
    assert notes == {
        "a": "shared with emb.weight, b.weight",
        "b": "pruned as a, whose weight it shares",
        "c": "shared with again.weight",
        "again": "pruned as c, whose weight it shares",
    }


def test_excluded_layers_and_what_they_share_are_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["c"].weight = model["a"].weight
    dense = copy.deepcopy(weights(model))
    report = prune_(model, 0.5, exclude="re:[c]")
    assert torch.equal(model["a"].weight, dense["a"])
    assert int((model["b"].weight == 0).sum()) == 32
    assert [(row.name, row.after, row.zeros, row.note) for row in report] == [
        ("a", "", 0.0, "left alone: shared with c.weight, which is excluded"),
        ("b", "Linear unstructured", 0.5, ""),
        ("c", "", 0.0, "excluded"),
    ]


def test_the_report_has_a_row_for_each_layer_and_names_short_blocks() -> None:
    model = small_model()
    model[0] = nn.Conv2d(3, 8, 3)
    report = prune_(model, 0.5, "1x4", exclude=("6",))
    rows = {row.name: row for row in report}
    assert list(rows) == ["0", "2", "5", "6"]
    assert rows["0"].note == "the last block of a row is short: 4 does not divide 3 inputs"
    assert rows["2"].note == "" and rows["2"].shape == (12, 4, 3, 3)
    assert (rows["2"].before, rows["2"].after) == ("Conv2d", "Conv2d 1x4")
    for name, weight in weights(model).items():
        assert rows[name].zeros == pytest.approx(float((weight == 0).double().mean()))


def test_subclasses_are_left_alone_and_reported() -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    dense = model.self_attn.out_proj.weight.clone()
    report = prune_(model, 0.5)
    row = next(row for row in report if row.name == "self_attn.out_proj")
    assert row.note.startswith("left alone: NonDynamicallyQuantizableLinear is a subclass")
    assert torch.equal(model.self_attn.out_proj.weight, dense)
    assert int((model.linear1.weight == 0).sum() + (model.linear2.weight == 0).sum()) == 128


def test_the_model_stays_plain() -> None:
    model = small_model()
    keys, pickled = list(model.state_dict()), len(pickle.dumps(model))
    pruner = Pruner(model, 0.5, schedule=Cubic(steps=3))
    pruner.step()
    assert list(model.state_dict()) == keys and len(pickle.dumps(model)) == pickled
    twin = copy.deepcopy(model)
    pruner.finish()
    assert int((twin[5].weight == 0).sum()) < int((model[5].weight == 0).sum())


def test_a_model_moved_or_reloaded_under_the_pruner_stays_masked() -> None:
    model = small_model()
    dense = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, 0.5)
    pruner.step()
    model.to(torch.bfloat16)
    model.load_state_dict(dense, assign=True)
    pruner.step()
    for name, weight in weights(model).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, dense[f"{name}.weight"] * pruner.masks[name])


def test_a_resumed_run_is_the_uninterrupted_run() -> None:
    model = small_model()
    optimizer, pruner = sgd(model), Pruner(model, 0.8, "1x4", Cubic(steps=8))
    torch.manual_seed(1)
    for _ in range(4):
        train(model, optimizer, pruner.step)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    resumed = small_model(seed=9)
    optimizer2, pruner2 = sgd(resumed), Pruner(resumed, 0.8, "1x4", Cubic(steps=8))
    file.seek(0)
    parts = (resumed, optimizer2, pruner2)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert 0 < pruner2.sparsity == pruner.sparsity
    for pieces in ((model, optimizer, pruner.step), (resumed, optimizer2, pruner2.step)):
        torch.manual_seed(2)
        for _ in range(3):
            train(*pieces)
    assert all(torch.equal(pruner.masks[name], pruner2.masks[name]) for name in pruner.masks)
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(model).items())


def test_loading_masks_wipes_the_weights_at_once() -> None:
    model = nn.Linear(4, 2)
    pruner = Pruner(model, 0.5)
    pruner.step()
    fresh = nn.Linear(4, 2)
    Pruner(fresh, 0.5).load_state_dict(pruner.state_dict())
    assert torch.equal(fresh.weight != 0, pruner.masks[""])


def test_a_state_of_another_model_is_refused() -> None:
    pruner = Pruner(nn.Linear(4, 2), 0.5)
    for other, message in (
        (nn.Sequential(nn.Linear(4, 2)), r"masks for \['0'\], this pruner for \[''\]"),
        (nn.Linear(4, 3), r"mask of layer '' is \[3, 4\], the weight \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(Pruner(other, 0.5).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 is not in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 is not in \[0, 1\)"),
        ({"sparsity": 90}, r"sparsity=90 is not in \[0, 1\): give the share of weights"),
        ({"sparsity": float("nan")}, "sparsity=nan is not in"),
        ({"sparsity": None}, "pattern='unstructured' needs a sparsity, such as 0.9"),
        (
            {"pattern": "4:2"},
            r"pattern='4:2' is unknown: choose one of \['unstructured', '1x4', 'channel', '16x16', "
            r"'32x32'\]",
        ),
        ({"pattern": "0:4"}, "pattern='0:4' is unknown"),
        ({"pattern": "1:4"}, "sparsity=0.5 is not that of pattern='1:4', which is 0.75: leave it"),
        ({"cap": 0.4}, "sparsity=0.5 is above cap=0.4: no layer may lose as much"),
        ({"cap": 1.1}, r"cap=1.1 is not in \(0, 1\]"),
        ({"score": "wand"}, r"score='wand' is unknown: choose one of \['magnitude', 'wanda'"),
        ({"score": "taylor:3"}, "score='taylor:3' is unknown"),
        ({"score": "taylor"}, "layer '0' has no gradient, which score='taylor' needs: call loss"),
        ({"score": "wanda"}, "layer '0' was not observed, which score='wanda' needs: run data"),
        ({"sparsity": {"0": 0.5}}, "a sparsity for each layer needs scope='layer'"),
        ({"sparsity": {"haed": 0.5}, "scope": "layer"}, "pattern 'haed' matches no layer"),
        ({"sparsity": {"0": 1.5}, "scope": "layer"}, r"sparsity=1.5 is not in \[0, 1\)"),
        ({"scope": "local"}, r"scope='local' is unknown: choose one of \['global', 'layer'\]"),
        ({"exclude": ("haed",)}, "pattern 'haed' matches no layer; layers are: 0, 2, 5, 6"),
        ({"exclude": "*"}, r"exclude='\*' names every layer"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_(small_model(), **{"sparsity": 0.5, **arguments})


def computed() -> nn.Module:
    return nn.Sequential(l1_unstructured(nn.Linear(4, 4), "weight", 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "no nn.Linear or nn.Conv2d to prune"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "layer '0' has no weights yet: run one batch"),
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "layer '0' is on the meta device"),
        (lambda: nn.Sequential(nn.Linear(4, 0)), r"layer '0' has an empty weight \(0, 4\)"),
        (computed, "layer '0' computes its weight anew"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_that_cannot_be_pruned(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_(make(), 0.5)
    with_other = nn.Sequential(make(), nn.Linear(4, 4))
    if not message.startswith("no nn"):
        assert len(list(prune_(with_other, 0.5, exclude="0.0"))) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_pruned(value: float) -> None:
    model = small_model()
    with torch.no_grad():
        model[5].weight[1, 2:4] = value
    dense = copy.deepcopy(weights(model))
    with pytest.raises(ValueError, match="layer '5' has 2 weights that are NaN or Inf"):
        prune_(model, 0.5)
    assert all(torch.equal(w, dense[n]) for n, w in weights(model).items() if n != "5")


def test_schedules_out_of_range() -> None:
    for arguments, message in (
        ({"steps": 0}, "steps=0 is too small: Cubic needs at least 1"),
        ({"steps": 5, "begin": -1}, "begin=-1 is too small"),
        ({"steps": 5, "every": 0}, "every=0 is too small"),
    ):
        with pytest.raises(ValueError, match=message):
            Cubic(**arguments)
    pruner = Pruner(nn.Linear(4, 4), 0.5, schedule=lambda step: 1.5)
    with pytest.raises(ValueError, match=r"the schedule gives 1.5 at step 1"):
        pruner.step()
