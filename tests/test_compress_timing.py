"""compress_ with example_inputs: the decision, by a clock of the test's own, and no trace of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import image, snapshot, trained
from torch import Tensor, nn

import gossamer as gs
from gossamer.compress import compress_


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def clock(faster: Callable[[nn.Module], bool] = lambda module: True) -> Any:
    """A timer that measures nothing: packed takes 1 ms where `faster`, else 3; dense takes 2."""

    def timer(dense: Any, packed: Any) -> tuple[float, float]:
        dense(), packed()
        module = dense.__closure__[0].cell_contents
        return 2.0, 1.0 if faster(module) else 3.0

    return timer


def test_keeps_dense_where_it_is_faster() -> None:
    model = trained()
    dense = dict(model.named_modules())
    timer = clock(lambda module: isinstance(module, nn.Linear))
    report = compress_(model, gs.Int8(), example_inputs=(image(),), timer=timer)
    assert model.stem is dense["stem"] and type(model.head) is gs.Linear
    stem, head = report.rows[0], report.rows[-1]
    assert stem.note == "kept: dense is faster (2 ms vs 3 ms)"
    assert (stem.ms_before, stem.ms_after, stem.after) == (2.0, 3.0, "")
    assert (head.ms_before, head.ms_after, head.note) == (2.0, 1.0, "")


def test_a_tie_keeps_dense() -> None:
    model = trained()
    report = compress_(model, gs.Int8(), example_inputs=image(), timer=lambda *_: (1.0, 1.0))
    assert not any(row.after for row in report)


@pytest.mark.parametrize("inputs", [image(), (image(),), [image()], {"x": image()}])
def test_all_forms_of_example_inputs(inputs: Any) -> None:
    report = compress_(trained(), gs.Int8(), example_inputs=inputs, timer=clock())
    assert all(row.ms_before == 2.0 and row.after for row in report)


def test_layers_get_the_input_that_is_live_there() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.fc(x[:1]))  # type: ignore[no-any-return]

    shapes: list[torch.Size] = []

    def timer(dense: Any, packed: Any) -> tuple[float, float]:
        assert torch.is_inference_mode_enabled()
        torch.testing.assert_close(dense(), packed(), atol=0.1, rtol=0)
        shapes.append(packed().shape)
        return 2.0, 1.0

    report = compress_(Keyword(), gs.Int8(), example_inputs=torch.randn(3, 4), timer=timer)
    assert shapes == [(1, 4)], "an input of a known shape is timed once"
    assert report.rows[0].ms_before == 4.0, "but counts for each call"


def test_a_layer_that_is_not_reached_is_packed_and_says_so() -> None:
    class Aside(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)  # type: ignore[no-any-return]

    model = Aside(nn.Linear(4, 4), nn.Linear(4, 4))
    report = compress_(model, gs.Int8(), example_inputs=torch.randn(1, 4), timer=clock())
    assert report.rows[1].note == "not reached by example_inputs: not timed"
    assert type(model[1]) is gs.Linear and report.rows[1].ms_before is None


def test_all_layers_of_a_transformer_are_reached() -> None:
    """In eval mode torch's fused path would walk past them, and hand nested tensors to them."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": padding}
    report = compress_(model, gs.Int8(), example_inputs=inputs, timer=clock())
    assert [row.ms_before for row in report if row.after] == [2.0] * 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_that_share_a_weight_are_kept_together() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    slow = model[0]
    report = compress_(
        model,
        gs.Int8(),
        example_inputs=torch.randn(1, 8),
        timer=lambda dense, packed: (
            (1.0, 9.0) if dense.__closure__[0].cell_contents is slow else (2.0, 1.0)
        ),
    )
    assert {row.note for row in report} == {"kept: dense is faster (3 ms vs 10 ms)"}
    assert model[0].weight is model[2].weight


def test_timing_leaves_no_trace() -> None:
    model = trained().train()
    model.fc.eval()
    modes = [module.training for module in model.modules()]
    mean = model.norm.running_mean.clone()  # type: ignore[union-attr]
    report = compress_(model, gs.Int8(), example_inputs=image(), timer=clock(lambda _: False))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.norm.running_mean, mean)  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.head.weight.requires_grad and len(report) == 3


def test_the_real_clock_gives_numbers() -> None:
    report = gs.compress_(trained(), gs.Int8(), example_inputs=(image(),))
    for row in report:
        assert row.ms_before is not None and row.ms_before > 0
        assert row.ms_after is not None and row.ms_after > 0
        assert bool(row.after) == (row.ms_after < row.ms_before)


@pytest.mark.parametrize("inputs", ["text", 3, torch.zeros(1, 5, 8, 8)])
def test_an_example_that_fails_leaves_the_model(inputs: Any) -> None:
    model = trained().train()
    before = snapshot(model)
    with pytest.raises((TypeError, RuntimeError)):
        gs.compress_(model, gs.Int8(), example_inputs=inputs)
    assert before == snapshot(model) and torch.backends.mha.get_fastpath_enabled()


def test_integer_input_to_the_timed_forward_is_no_layer_of_ours() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    report = gs.compress_(model, gs.Int8(), example_inputs=torch.tensor([1, 2]))
    assert [row.name for row in report] == ["1"]
