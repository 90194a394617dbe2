"""Peers: each that is installed is right, and each is optional."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

from gossamer import bench, peers


def layer(n: int = 24, k: int = 40, m: int = 3) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    dense, x = nn.Linear(k, n), torch.randn(m, k)
    dense.weight.data[:, ::2] = 0
    return dense, x


@pytest.fixture(params=peers.PEERS)
def name(request) -> str:
    for package in peers.PEERS[request.param].needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return request.param


@pytest.mark.parametrize("m", [1, 5])
def test_a_peer_computes_the_layer(name: str, m: int) -> None:
    dense, x = layer(m=m)
    call = peers.build(name, dense, x)
    y = dense(x)
    limit = peers.PEERS[name].error * y.norm()
    assert call().shape == y.shape
    assert (call() - y).norm() <= limit and (call() - y).norm() <= limit, "twice the same"


def test_a_wrong_peer_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.PEERS[name]

    def wrong(dense: nn.Linear, x: torch.Tensor) -> peers.Call:
        call = peer.build(dense, x)
        return lambda: 1.5 * call()

    monkeypatch.setitem(peers.PEERS, name, peers.Peer(wrong, 1, peer.error, pruned=peer.pruned))
    result = bench.linear(3, 40, 24, ["int8"], seconds=0, against=[name])
    assert [timing.name for timing in result.timings] == [bench.TORCH_FP32, "int8"]
    assert result.notes[0].startswith(f"without {name}: {name} is off by 0.")


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    sentence = "openvino-int8 needs openvino, which is not installed: pip install openvino"
    with pytest.raises(ImportError, match=sentence):
        peers.build("openvino-int8", *layer())
    result = bench.linear(3, 40, 24, ["int8"], seconds=0, against=["openvino-int8", "torch.sparse"])
    assert result.notes == [f"without openvino-int8: {sentence}"]
    assert [t.name for t in result.timings] == [bench.TORCH_FP32, "torch.sparse", "int8"]
    assert sentence in str(result)


def test_quantizing_leaves_torch_as_it_was() -> None:
    before = torch.backends.quantized.engine
    for first, second in (("fbgemm", "onednn"), ("onednn", "fbgemm")):
        torch.backends.quantized.engine = first
        peers.build(second, *layer())
        assert torch.backends.quantized.engine == first
    torch.backends.quantized.engine = before


def test_a_sparse_peer_gets_the_weight_that_sparse_formats_get() -> None:
    result = bench.linear(3, 40, 24, ["sparse"], 0.75, seconds=0, against=["torch.sparse"])
    dense, peer, ours = result.timings
    assert peer.ops == ours.ops == dense.ops / 4
    assert peer.vs["torch.sparse"] == 1


def test_versions_are_those_of_what_is_installed() -> None:
    found = peers.versions()
    assert all(importlib.util.find_spec(package) for package in found)
    assert all(version in bench.machine()["peers"] for version in found.values())
