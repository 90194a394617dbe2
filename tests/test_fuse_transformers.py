"""The road of `transformers` users: its models are packed whole, and fused where they trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs

transformers = pytest.importorskip("transformers")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return transformers.BertModel(config).eval()


@torch.no_grad()
def test_gelu_of_each_layer_goes_into_its_kernel() -> None:
    model, ids = bert(), torch.randint(0, 99, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    gs.compress_(model, gs.Int8())
    want = model(ids, mask).last_hidden_state
    for layer in model.encoder.layer:
        layer.intermediate = gs.fuse(layer.intermediate, example_inputs=(torch.randn(2, 9, 32),))
        (row,) = layer.intermediate.report.rows
        assert (row.name, row.runs, row.fused) == ("dense", "Linear Int8", "gelu")
    torch.testing.assert_close(model(ids, mask).last_hidden_state, want, rtol=0, atol=0.02)


@torch.no_grad()
def test_what_does_not_trace_says_where() -> None:
    model, x = bert(), torch.randn(2, 9, 32)
    gs.compress_(model, gs.Int8())
    layer = model.encoder.layer[0]
    fused = gs.fuse(layer, example_inputs=(x,))
    notes = {row.name: row.note for row in fused.report.rows}
    assert "not traced" in notes["attention.self"] and "modeling_bert.py" in notes["attention.self"]
    with pytest.raises(ValueError, match="BertModel cannot be traced"):
        gs.fuse(model, example_inputs={"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
