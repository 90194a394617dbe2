"""The whole road of a recipe: train, prune, distil, quantize, pack; a killed run goes on.

Each stage leaves `STAGE.safetensors` and `STAGE.json` in the folder of the run, and while it trains
the checkpoints of `fit` in `STAGE`. What is there is not done again.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bench import machine
from .calibrate import calibrate
from .calls import Call
from .checkpoint import load_, save
from .compare import Comparison, compare
from .compress import compress_
from .distill import Distiller
from .gptq import gptq_
from .loop import History
from .prune import Pruner
from .qat import qat_
from .recipe import STAGES, Calibration, Document, Key, Pack, Quantize, Training
from .report import Report, render
from .resume import replace_text, require_same
from .schedules import OneShot
from .smooth import smooth_
from .tasks import Task, make
from .timing import eval_mode, forward, threads
from .train import fit

MODEL, REPORT = "model.safetensors", "report"
# Of the steps, the last third trains what is left, with the masks as they will be.
PRUNING = 2 / 3


@dataclass
class Outcome:
    """What a recipe made; `str()` is tables.

    Args:
        scores: the task's score of the model after each stage, the packed one as loaded.
        metric: what the score is.
        histories: of the stages that trained.
        layers: what runs where in the packed model; None without a stage `pack`.
        compared: the dense and the packed model, loaded from its file.
        folder: of the files.
    """

    folder: Path
    metric: str
    scores: dict[str, float] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)
    layers: Report | None = None
    compared: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures, as a JSON-able dict."""
        return {
            "machine": machine(),
            "metric": self.metric,
            "scores": self.scores,
            "stages": {name: history.to_json() for name, history in self.histories.items()},
            "layers": self.layers and self.layers.to_json(),
            "compared": self.compared and self.compared.to_json(),
        }

    def __str__(self) -> str:
        rows = []
        for name, score in self.scores.items():
            history = self.histories.get(name, History())
            seconds = f"{history.seconds:.1f}" if history.seconds else ""
            rows.append([name, str(len(history.losses) or ""), seconds, f"{score:.4g}"])
        parts = [render(["after", ">steps", ">seconds", f">{self.metric}"], rows)]
        parts += [str(part) for part in (self.layers, self.compared) if part is not None]
        return "\n\n".join(parts)


def plan(document: Document) -> str:
    """What `run` would do, as a table; the task is made, and all names are held against it."""
    task = _task(document)
    document.check_layers(task.model())
    road = _Road(document, task, Path(), progress=False)
    rows = []
    for name in STAGES:
        stage = getattr(document.recipe, name)
        if stage is not None:
            part = stage.qat if isinstance(stage, Quantize) else stage
            steps = str(road.steps(part)) if isinstance(part, Training) and part.trains else ""
            keys = ", ".join(key for key in document.data[name] or {})
            rows.append([name, steps, keys])
    return render(["stage", ">steps", "says"], rows)


def run(document: Document, folder: Path, resume: bool = False, progress: bool = True) -> Outcome:
    """Goes the whole road, or what is left of it.

    Args:
        document: the recipe.
        folder: of the run; made if it is not there.
        resume: go on in a folder that has a run of the same recipe.
        progress: show bars on stderr.

    Raises:
        ValueError: the recipe does not fit the task; the folder has a run and `resume` is False; a
            run of another recipe (the difference is named).
        FloatingPointError, ImportError, OSError: as `fit` and the task raise them.
    """
    task = _task(document)
    document.check_layers(task.model())
    kept = folder / "recipe.json"
    if kept.exists() and not resume:
        raise ValueError(f"{folder} has a run: go on with --resume, or give another --out")
    if kept.exists():
        old = json.loads(kept.read_text(encoding="utf-8"))

        def where(key: str) -> str:
            return document.where(tuple(int(k) if k.isdecimal() else k for k in key.split(".")))

        require_same(old, document.data, f"the run in {folder}", where)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(document.data, indent=1))
    with threads(document.recipe.threads):
        outcome = _Road(document, task, folder, progress).go()
    replace_text(folder / f"{REPORT}.json", json.dumps(outcome.to_json(), indent=1) + "\n")
    replace_text(folder / f"{REPORT}.txt", f"{outcome}\n")
    return outcome


def _task(document: Document) -> Task:
    arguments = document.recipe.task.model_dump()
    return document.attempt(("task",), make, arguments.pop("name"), **arguments)


@dataclass
class _Road:
    document: Document
    task: Task
    folder: Path
    progress: bool

    def go(self) -> Outcome:
        recipe, task = self.document.recipe, self.task
        self.outcome = Outcome(self.folder, task.metric)
        torch.manual_seed(recipe.seed)
        model = task.model()
        if (train := recipe.train) is not None:
            model = self._stage("train", model, lambda m: self._fit("train", train, m))
        else:
            self._score("as it came", model)
        dense = copy.deepcopy(model)
        prune, distil = recipe.prune, recipe.distil
        if prune is not None and (prune.trains or distil is None):
            model = self._stage("prune", model, self._prune)
        if distil is not None:
            model = self._stage("distil", model, lambda m: self._distil(m, dense))
        if recipe.quantize and recipe.pack:
            ready = self._quantize(recipe.quantize, copy.deepcopy(model))
            self._pack(recipe.quantize, recipe.pack, ready, dense)
        return self.outcome

    def steps(self, stage: Training) -> int:
        """Optimizer steps of a stage."""
        per_epoch = math.ceil(len(self.task.train) / stage.accumulate)
        return stage.steps or per_epoch * (stage.epochs or 0)

    def _stage(
        self, name: str, model: nn.Module, work: Callable[[nn.Module], History]
    ) -> nn.Module:
        """The model after `work`, or as a run before this one left it."""
        weights, story = (self.folder / f"{name}.{kind}" for kind in ("safetensors", "json"))
        if weights.exists():
            load_(model, weights)
            kept = json.loads(story.read_text(encoding="utf-8"))
            kept["evaluations"] = [(step, score) for step, score in kept["evaluations"]]
            history = History(**kept)
        else:
            history = work(model)
            replace_text(story, json.dumps(history.to_json()))
            save(model.cpu(), weights)  # last: it says that the stage is done
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.outcome.histories[name] = history
        self._score(name, model)
        return model.eval()

    def _score(self, name: str, model: nn.Module) -> None:
        with eval_mode(model):
            self.outcome.scores[name] = float(self.task.evaluate(model))

    def _fit(self, name: str, stage: Training, model: nn.Module, **parts: Any) -> History:
        key: Key = ("quantize", name) if name == "qat" else (name,)
        optimizer = self._made((*key, "optimizer"), stage.optimizer, model.parameters())
        scheduler = None
        if stage.scheduler is not None:
            ends = ("total_steps", "T_max", "total_iters")
            total = {key: self.steps(stage) for key in ends if stage.scheduler.lacks(key)}
            scheduler = self._made((*key, "scheduler"), stage.scheduler, optimizer, **total)
        if "distiller" not in parts:
            parts["loss"] = self.task.loss
        return fit(
            model,
            self.task.train,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=self.steps(stage),
            accumulate=stage.accumulate,
            clip=stage.clip,
            mixed_precision=stage.mixed_precision,
            every=stage.every,
            evaluate=self.task.evaluate,
            checkpoint=self.folder / name,
            seed=self.document.recipe.seed,
            progress=self.progress,
            **parts,
        )

    def _made(self, key: Key, call: Call, *first: Any, **more: Any) -> Any:
        try:
            return self.document.attempt(key, call, *first, **more)
        except TypeError as error:
            raise self.document.error(key, f"{call.cls.__name__}: {error}") from error

    def _pruner(self, model: nn.Module, stage: Training | None) -> Pruner:
        """A pruner whose schedule fits the steps of `stage`; at once without one."""
        prune = self.document.recipe.prune
        assert prune is not None
        schedule: Any = OneShot()
        if stage is not None:
            lacks = prune.schedule.lacks("steps")
            steps = {"steps": max(1, round(PRUNING * self.steps(stage)))} if lacks else {}
            schedule = self._made(("prune", "schedule"), prune.schedule, **steps)
        if prune.calibration is not None:
            self._calibrate(model, prune.calibration, hessian=prune.score == "sparsegpt")
        settings = (prune.sparsity, prune.pattern, schedule, prune.scope, prune.exclude)
        more = {"score": prune.score, "cap": prune.cap}
        return self.document.attempt(("prune",), Pruner, model, *settings, **more)

    def _prune(self, model: nn.Module) -> History:
        prune = self.document.recipe.prune
        assert prune is not None
        pruner = self._pruner(model, prune if prune.trains else None)
        history = History()
        if prune.trains:
            history = self._fit("prune", prune, model, pruner=pruner)
        pruner.finish()
        return history

    def _distil(self, model: nn.Module, dense: nn.Module) -> History:
        recipe = self.document.recipe
        distil, prune = recipe.distil, recipe.prune
        assert distil is not None
        parts: dict[str, Any] = {}
        if prune is not None:
            # What an earlier stage has pruned ranks last, so the same weights are chosen again.
            parts["pruner"] = self._pruner(model, None if prune.trains else distil)
        losses = [loss() for loss in distil.losses]
        packed = distil.teacher_format and distil.teacher_format()
        distiller = self.document.attempt(
            ("distil",), Distiller, model, dense, losses, distil.hard, packed
        )
        history = self._fit("distil", distil, model, distiller=distiller, **parts)
        if prune is not None:
            parts["pruner"].finish()
        return history

    def _quantize(self, quantize: Quantize, model: nn.Module) -> nn.Module:
        """The model, in place, as it is to be packed."""
        recipe, attempt = self.document.recipe, self.document.attempt
        parts: dict[str, Any] = {}
        if quantize.qat is not None and recipe.prune is not None:
            # Made before the layers are prepared, as it knows plain ones only.
            parts["pruner"] = self._pruner(model, None)
        if (calibration := quantize.calibration) is not None:
            self._calibrate(model, calibration, quantize.gptq)
            if quantize.smooth:
                attempt(("quantize", "smooth"), smooth_, model, self.task.example_inputs)
                self._calibrate(model, calibration, quantize.gptq)
        formats = quantize.made()
        if quantize.gptq:
            attempt(("quantize", "gptq"), gptq_, model, formats)
        if (qat := quantize.qat) is not None:
            attempt(("quantize", "qat"), qat_, model, formats)
            model = self._stage("qat", model, lambda m: self._fit("qat", qat, m, **parts))
        return model

    def _calibrate(self, model: nn.Module, calibration: Calibration, hessian: bool) -> None:
        torch.manual_seed(self.document.recipe.seed)
        with eval_mode(model), calibrate(model, hessian=hessian, observer=calibration.observer):
            for inputs, _ in islice(self.task.train, calibration.batches):
                forward(model, inputs)

    def _pack(self, quantize: Quantize, pack: Pack, packed: nn.Module, dense: nn.Module) -> None:
        task = self.task
        example = task.example_inputs if pack.timed else None
        self.outcome.layers = self.document.attempt(
            ("quantize", "formats"), compress_, packed, quantize.made(), example_inputs=example
        )
        save(packed, self.folder / MODEL)
        loaded = load_(task.model(), self.folder / MODEL).eval()
        models = {"dense": dense, "packed": loaded}
        inputs, evaluate = task.example_inputs, task.evaluate
        compared = compare(models, None, inputs, evaluate, rounds=pack.rounds)
        self.outcome.compared = compared
        self.outcome.scores["pack"] = compared.models[1].accuracy or 0.0
