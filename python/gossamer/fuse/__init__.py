"""fuse: BatchNorm, activations and additions into the layers before, and 8 bits between them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .epilogues import fuse_activations
from .floats import settle_floats
from .fold import fold
from .graph import drop_what_passes, name_apart, out_of_place, record, settle_ranks
from .merge import merge_linears
from .pieces import images_at_once, may_cut
from .plan import make_plan
from .reuse import reuse_residuals
from .rewrite import rewrite
from .rows import FusedRow, FuseReport, report_of
from .trace import Fused, trace

__all__ = ["FuseReport", "Fused", "FusedRow", "fuse"]


def fuse(model: nn.Module, example_inputs: Any) -> Fused:
    """The same function with fewer passes over memory: a new module, made by torch.fx.

    - BatchNorm in eval mode goes into the packed (or dense) layer before it, of any format.
    - ReLU, ReLU6, SiLU, Hardswish and exact GELU become the activation of the packed layer before,
      the first two also across a max-pool.
    - Packed linear layers of one format that read the same tensor, such as the query, key and value
      of attention, become one layer, and its result is cut in slices.
    - `gs.Sparse()` layers add a residual inside, with the activation behind the sum. A dense
      convolution of an image's few channels pools before its ReLU, channels innermost.
    - Between static convolutions (`gs.Int8(activations="static")`, `gs.SparseInt8(...)`) values
      stay 8 bits, in one layout; an addition becomes the residual of the convolution before it,
      max-pooling, concatenation, nearest upsampling and ReLU move bytes, and means over all pixels
      and average pools sum them. Everything else gets floats, from the last convolution before it.

    A value between two static convolutions has the scale that the reader quantizes by, so that
    conv, activation, max-pooling, conv give the bits of the unfused model. Where BatchNorm was
    folded, sums of floats are rounded otherwise; what residuals, means and average pools read,
    which the unfused model has in floats, is rounded to the 8 bits of the range that the example
    shows.

    Where all nodes are known to treat each image by itself, a batch runs in pieces of as many
    images as leave values of 2 MB, an image a thread at least; pieces join where values get small.

    The module takes inputs of other sizes and batches than the example's, of as many dimensions, as
    far as the model does; its results do not depend on what else is in the batch. Values that go
    back to floats have the dtype that they had in the example. A NaN or an Inf, which no byte can
    stand for, is an error where floats become bytes.

    Args:
        model: in eval mode, on the CPU, after `compress_`; it stays as it is, and its tensors are
            shared where nothing was folded into them.
        example_inputs: the model's arguments as a tuple, a dict of keywords, or one tensor; real
            data, since their ranges count. What holds no tensor is fixed to its value here.

    Returns:
        A torch.fx.GraphModule with the `report` of what runs where, and why not.

    Raises:
        TypeError: `example_inputs` does not fit the model.
        ValueError: torch.fx cannot trace the model (the line is named), or a BatchNorm is in
            training mode.

    Example:
        >>> import torch, gossamer as gs
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> report, x = gs.compress_(model, gs.Int8()), torch.randn(1, 3, 16, 16)
        >>> fused = gs.fuse(model, example_inputs=(x,))
        >>> fused.report.rows[0].fused
        'BatchNorm, ReLU'
        >>> torch.allclose(fused(x), model(x), atol=1e-5)
        True
    """
    fused, inputs = trace(model, example_inputs)
    graph = fused.graph
    drop_what_passes(graph)
    out_of_place(graph)
    name_apart(graph)
    record(fused, inputs)
    settle_ranks(graph)
    fold(graph)
    fuse_activations(graph)
    merge_linears(fused)
    plan = make_plan(graph)
    alone = may_cut(graph)
    rewrite(fused, plan)
    settle_floats(fused)
    reuse_residuals(graph)
    fused.delete_all_unused_submodules()
    fused.recompile()
    images = images_at_once(graph) if alone else {}
    fused.meta.update(report=report_of(graph), images=images, images_of=fused.code)
    for node in graph.nodes:
        node.meta.clear()
    return fused
