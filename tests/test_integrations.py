"""Hugging Face's Trainer and Lightning: short runs of a tiny BERT, with a pruner, resumed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer import integrations

STEPS = 24


@pytest.fixture(autouse=True)
def no_accelerator_stays() -> Iterator[None]:
    """The Trainer leaves its own behind, and `gs.fit` wants none in its process."""
    yield
    if importlib.util.find_spec("accelerate"):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def bert(width: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Token ids, a mask and labels, padded to 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(count):
        length = int(torch.randint(4, 13, (), generator=generator))
        ids = torch.randint(1, 40, (12,), generator=generator) * (torch.arange(12) < length)
        data.append({"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": ids.sum() % 3})
    return data


def road(width: int = 8) -> tuple[gs.Distiller, gs.Pruner]:
    torch.manual_seed(0)
    student, teacher = bert(width), bert(16)
    losses = [gs.KD(2.0), gs.Hint("bert.encoder.layer.?", widths=(width, 16))]
    distiller = gs.Distiller(student, teacher, losses, hard=0.5, teacher_format=gs.Int8())
    return distiller, gs.Pruner(student, 0.5, schedule=gs.Cubic(steps=STEPS // 2))


def holds(pruner: gs.Pruner, student: nn.Module) -> None:
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    for name, mask in pruner.masks.items():
        assert not student.get_submodule(name).weight[~mask].any()


def hugging_face(folder: Path, steps: int, **more: Any) -> tuple[Any, gs.Distiller, gs.Pruner]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    distiller, pruner = road()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=STEPS // 2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    trainer = integrations.trainer(distiller, pruner, args=arguments, train_dataset=sentences(64))
    return trainer, distiller, pruner


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hugging_face_trains_prunes_saves_and_resumes(tmp_path: Path) -> None:
    trainer, distiller, pruner = hugging_face(tmp_path / "whole", STEPS)
    projection = next(distiller.parameters()).detach().clone()
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6]), losses
    holds(pruner, trainer.model)
    assert not torch.equal(next(distiller.parameters()), projection)
    assert all(parameter.grad is None for parameter in distiller.parameters())
    trainer.save_model(str(tmp_path / "student"))
    again = type(trainer.model).from_pretrained(tmp_path / "student")
    assert again.state_dict().keys() == trainer.model.state_dict().keys()
    holds(pruner, again)

    resumed, distilled, masked = hugging_face(tmp_path / "whole", STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    for ours, theirs in zip(
        [*trainer.model.parameters(), *distiller.parameters()],
        [*resumed.model.parameters(), *distilled.parameters()],
        strict=True,
    ):
        assert torch.equal(ours, theirs), "a run that goes on ends where the whole one did"
    holds(masked, resumed.model)


def test_hugging_face_evaluates_and_accumulates_the_mean_of_batches(tmp_path: Path) -> None:
    trainer, _, _ = hugging_face(tmp_path, 1, gradient_accumulation_steps=2)
    labels = trainer.predict(sentences(8))
    assert labels.predictions.shape == (8, 3) and labels.metrics["test_loss"] > 0
    batch = {name: torch.stack([s[name] for s in sentences(8)]) for name in sentences(1)[0]}
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.eval()
    whole = trainer.compute_loss(trainer.model, batch)
    trainer.model.train = lambda mode=True: trainer.model  # no dropout
    # The number of labels that it hands over is not for a loss that is a mean already.
    step = trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(16))
    assert step.item() == pytest.approx(whole.item() / 2)


def test_hugging_face_refuses_a_checkpoint_that_is_not_its_own(tmp_path: Path) -> None:
    trainer, distiller, _ = hugging_face(tmp_path, 1)
    with pytest.raises(ValueError, match=r"gossamer.pt is missing: the checkpoint is not of"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    torch.save({"distiller": distiller.state_dict(), "pruner": None}, tmp_path / "gossamer.pt")
    with pytest.raises(ValueError, match="is of a run with no pruner, this has one"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def lightning_run(folder: Path, epochs: int, checkpoint: Path | None = None) -> Any:
    lightning = pytest.importorskip("lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    distiller, pruner = road()
    module = integrations.module(distiller, lambda p: torch.optim.AdamW(p, lr=1e-2), pruner)
    loader = torch.utils.data.DataLoader(sentences(64), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = [distiller(*integrations._split(batch)).item() for batch in loader]
    torch.manual_seed(2)
    trainer.fit(module, loader, val_dataloaders=loader, ckpt_path=checkpoint)
    return trainer, module, distiller, pruner, sum(before)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_prunes_saves_and_resumes(tmp_path: Path) -> None:
    trainer, module, distiller, pruner, before = lightning_run(tmp_path, epochs=3)
    assert trainer.callback_metrics["val_loss"].item() < 0.9 * before / 8
    assert {"loss", "KD", "Hint", "hard"} <= trainer.callback_metrics.keys()
    holds(pruner, module.student)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert all(name.startswith("student.") for name in saved["state_dict"])
    assert saved["gossamer"]["pruner"]["step"] == STEPS

    *_, resumed, again, masked, _ = lightning_run(tmp_path, 3, tmp_path / "whole.ckpt")
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            [*module.student.parameters(), *distiller.parameters()],
            [*resumed.student.parameters(), *again.parameters()],
            strict=True,
        )
    )
    assert masked.state_dict()["step"] == STEPS
    holds(masked, resumed.student)


@pytest.mark.parametrize("missing", ["transformers", "accelerate", "lightning"])
def test_a_missing_package_is_a_sentence(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = importlib.import_module

    def import_module(name: str) -> Any:
        if name == missing:
            raise ImportError(name)
        return plain(name) if name != "transformers" else None

    monkeypatch.setattr(integrations, "import_module", import_module)
    distiller = gs.Distiller(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ImportError, match=rf"{missing} is missing: pip install .*{missing}"):
        if missing == "lightning":
            integrations.module(distiller, torch.optim.AdamW)
        else:
            integrations.trainer(distiller)
