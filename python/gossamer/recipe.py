"""A recipe: one YAML file that says how a model is trained, pruned, distilled and packed.

`docs/recipes.md` describes the keys. Whatever is wrong in a file is a sentence with file and line.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from torch import nn

from .calibrate import OBSERVERS
from .calls import Call, losses, named, optimizers, schedulers, schedules
from .formats import FORMATS, Format
from .layers import LAYERS
from .patterns import select

try:
    import yaml
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
    )
except ImportError as error:
    raise ImportError(
        f"{error.name} is missing, recipes are read with it: "
        'pip install "gossamer[train]", or pip install pydantic PyYAML'
    ) from error

STAGES = ("train", "prune", "distil", "quantize", "pack")
FOLDER = Path(__file__).parent / "recipes"
Key = tuple[str | int, ...]
_T = TypeVar("_T")


Optimizer = Annotated[Call, BeforeValidator(named("optimizer", optimizers, skipped=1))]
Scheduler = Annotated[Call, BeforeValidator(named("scheduler", schedulers, skipped=1))]
Schedule = Annotated[Call, BeforeValidator(named("schedule", schedules))]
Loss = Annotated[Call, BeforeValidator(named("loss", losses))]
FormatCall = Annotated[Call, BeforeValidator(named("format", lambda: FORMATS))]


def _by_pattern(value: Any) -> Any:
    """One format for all layers is the pattern `*`."""
    return {"*": value} if isinstance(value, str) or "name" in (value or {}) else value


def _shares(value: Any) -> Any:
    """A share, or patterns of layers to shares."""
    for share in value.values() if isinstance(value, dict) else [value]:
        if type(share) not in (int, float) or not 0 <= share < 1:
            raise ValueError(f"should be a number from 0 to less than 1, got {share!r}")
    return value


def _one_task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )


class TaskName(BaseModel):
    """The task: a built-in name or `module:function`; all other keys are the function's."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = Field(description="built-in task, or import path module:function")


class Training(_Part):
    """How a stage trains."""

    epochs: int | None = Field(None, ge=1, description="passes over the task's batches")
    steps: int | None = Field(None, ge=1, description="optimizer steps, in the place of epochs")
    optimizer: Optimizer = Field("AdamW", validate_default=True, description="of torch.optim")
    scheduler: Scheduler | None = Field(None, description="of torch.optim.lr_scheduler")
    accumulate: int = Field(1, ge=1, description="batches in a step")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="as accelerate's")
    every: int | None = Field(
        None, ge=1, description="steps between scores and checkpoints; default an epoch"
    )

    @property
    def trains(self) -> bool:
        """It says how long."""
        return self.epochs is not None or self.steps is not None


class Train(Training):
    """The dense model on labels; without this stage the task's model is taken as it is."""


class Calibration(_Part):
    """Batches whose inputs of each layer are observed."""

    batches: int = Field(16, ge=1, description="of the task's training batches")
    observer: Literal[OBSERVERS] = Field("minmax", description="how a range is found")  # type: ignore[valid-type]


class Prune(Training):
    """Zeros. With epochs it trains on labels meanwhile; without, during distil, or all at once."""

    sparsity: Annotated[Any, AfterValidator(_shares)] = Field(
        description="share of the weights that go; or of each layer, by pattern"
    )
    pattern: str = Field("unstructured", description="of zeros, as gs.Pruner knows it")
    scope: str = Field("global", description="of the ranking, as gs.Pruner knows it")
    exclude: list[str] = Field([], description="patterns of layers to leave alone")
    score: str = Field("magnitude", description="of a weight, as gs.Pruner knows it")
    cap: float | None = Field(None, gt=0, le=1, description="largest share of one layer that goes")
    calibration: Calibration | None = Field(None, description="needed by wanda and sparsegpt")
    schedule: Schedule = Field(
        "Cubic", validate_default=True, description="default over two thirds of the steps"
    )


class Distil(Training):
    """The dense model of before teaches what is left."""

    losses: list[Loss] = Field(min_length=1, description="one or several, by name")
    hard: float = Field(0.0, ge=0, description="weight of the labels' cross-entropy")
    teacher_format: FormatCall | None = Field(None, description="pack the teacher, for speed")


class Quantize(_Part):
    """The format of each layer."""

    formats: Annotated[dict[str, FormatCall | None], BeforeValidator(_by_pattern)] = Field(
        description="a format, or patterns of layers to formats; null leaves a layer alone"
    )
    calibration: Calibration | None = Field(
        None, description="needed by activations: static, smooth and gptq"
    )
    smooth: bool = Field(False, description="outliers go into the weights, by gs.smooth_")
    gptq: bool = Field(False, description="weights are rounded by gs.gptq_")
    qat: Training | None = Field(None, description="train on labels as int8, by gs.qat_")

    def made(self) -> dict[str, Format | None]:
        """The formats by pattern."""
        return {pattern: call() if call else None for pattern, call in self.formats.items()}


class Pack(_Part):
    """Swap, save, load, measure."""

    timed: bool = Field(False, description="keep a layer dense where packed is not faster")
    rounds: int | None = Field(None, ge=1, description="timed forwards; default by the clock")


class Recipe(_Part):
    """The whole file."""

    task: Annotated[TaskName, BeforeValidator(_one_task)] = Field(description="what to work on")
    seed: int = Field(0, ge=0, description="of weights, batches and everything else random")
    threads: int = Field(1, ge=1, description="torch's")
    train: Train | None = None
    prune: Prune | None = None
    distil: Distil | None = None
    quantize: Quantize | None = None
    pack: Pack | None = None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 2e-3 for a string; here it is a number."""


_Loader.yaml_implicit_resolvers = {**yaml.SafeLoader.yaml_implicit_resolvers}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """A file, its content, and the line of each key."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, int]

    def where(self, key: Key) -> str:
        """`file:line: ` of a key, or of what would hold it."""
        while key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines[key]}: "

    def error(self, key: Key, sentence: str) -> ValueError:
        """To be raised."""
        dotted = ".".join(map(str, key))
        return ValueError(f"{self.where(key)}{dotted + ': ' if dotted else ''}{sentence}")

    @cached_property
    def recipe(self) -> Recipe:
        """The content, checked.

        Raises:
            ValueError: all that is wrong, a line each.
        """
        try:
            recipe = Recipe.model_validate(self.data)
        except ValidationError as error:
            wrong = [self.error(tuple(e["loc"]), _sentence(e)) for e in error.errors()]
            raise ValueError("\n".join(map(str, wrong))) from None
        self._check_stages(recipe)
        return recipe

    def _check_stages(self, recipe: Recipe) -> None:
        present = [key for key in self.data if key in STAGES]
        for before, after in itertools.pairwise(present):
            if STAGES.index(after) < STAGES.index(before):
                order = ", ".join(STAGES)
                raise self.error((after,), f"comes after {before}: the order is {order}")
        if not present:
            raise self.error((), f"the recipe has no stage: give some of {', '.join(STAGES)}")
        for name in ("train", "prune", "distil"):
            self._check_length((name,), getattr(recipe, name), needed=name != "prune")
        for name, other in (("quantize", "pack"), ("pack", "quantize")):
            if getattr(recipe, name) and not getattr(recipe, other):
                raise self.error((name,), f"needs a stage {other}: with defaults, `{other}: {{}}`")
        if recipe.quantize:
            self._check_quantize(recipe.quantize)
        prune = recipe.prune
        if prune and prune.score in ("wanda", "sparsegpt") and prune.calibration is None:
            raise self.error(("prune", "score"), f"{prune.score} needs prune.calibration")
        if prune and prune.score == "taylor" and not (prune.trains or recipe.distil):
            raise self.error(("prune", "score"), "taylor needs gradients: give prune.epochs")

    def _check_quantize(self, stage: Quantize) -> None:
        if stage.gptq and stage.qat:
            raise self.error(("quantize", "gptq"), "qat would train its rounding away: drop one")
        self._check_length(("quantize", "qat"), stage.qat)
        if stage.calibration is None:
            for name in ("smooth", "gptq"):
                if getattr(stage, name):
                    raise self.error(("quantize", name), "needs quantize.calibration")
            for pattern, call in stage.formats.items():
                if call and call.arguments.get("activations") == "static":
                    key = ("quantize", "formats", pattern)
                    raise self.error(key, "static activations need quantize.calibration")

    def _check_length(self, key: Key, stage: Training | None, needed: bool = True) -> None:
        if stage is None:
            return
        if stage.epochs is not None and stage.steps is not None:
            raise self.error((*key, "steps"), "epochs are given too: give one of them")
        if needed and not stage.trains:
            raise self.error(key, "how long? give epochs or steps")

    def check_layers(self, model: nn.Module) -> None:
        """Holds the patterns of the recipe against the layers of a model.

        Raises:
            ValueError: a pattern matches nothing.
        """
        recipe = self.recipe
        modules = [(name, module) for name, module in model.named_modules() if name]
        layers = [name for name, module in modules if type(module) in LAYERS]
        excluded = recipe.prune.exclude if recipe.prune else []
        shares = recipe.prune.sparsity if recipe.prune else None
        formats = recipe.quantize.formats if recipe.quantize else {}
        patterns: list[tuple[Key, str]] = [
            *((("prune", "exclude", index), pattern) for index, pattern in enumerate(excluded)),
            *((("prune", "sparsity", p), p) for p in (shares if isinstance(shares, dict) else ())),
            *((("quantize", "formats", pattern), pattern) for pattern in formats),
        ]
        for key, pattern in patterns:
            self.attempt(key, select, layers, pattern)
        for index, loss in enumerate(recipe.distil.losses if recipe.distil else []):
            self.attempt(("distil", "losses", index), loss().layers, [name for name, _ in modules])

    def attempt(self, key: Key, call: Callable[..., _T], *arguments: Any, **more: Any) -> _T:
        """call(...), whose ValueError gets the file and the line of `key`."""
        try:
            return call(*arguments, **more)
        except ValueError as error:
            raise self.error(key, str(error)) from error


def _sentence(error: Any) -> str:
    """What pydantic found, in the words of this project."""
    kind, loc = error["type"], error["loc"]
    if kind == "extra_forbidden":
        model: Any = Recipe
        for name in loc[:-1]:
            annotation = model.model_fields[name].annotation
            model = next(
                cls for cls in (annotation, *getattr(annotation, "__args__", ())) if _is_model(cls)
            )
        known = list(model.model_fields)
        near = difflib.get_close_matches(str(loc[-1]), known, 1)
        return f"unknown key; did you mean {near[0]}?" if near else f"unknown key: use {known}"
    if kind == "missing":
        return "is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message if kind == "value_error" else f"{message}, got {error['input']!r}"


def _is_model(cls: Any) -> bool:
    return inspect.isclass(cls) and issubclass(cls, BaseModel)


def load(path: Path) -> Document:
    """Reads a recipe; a name without a file is that of a recipe that ships.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the file is no recipe; file and line are named.
    """
    shipped = FOLDER / f"{path}.yaml"
    if not path.exists() and not shipped.exists():
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(
            f"there is no file {path}, and no recipe ships by that name: {names}"
        )
    path = path if path.exists() else shipped
    loader = _Loader(path.read_text(encoding="utf-8"))
    lines: dict[Key, int] = {(): 1}
    try:
        node = loader.get_single_node()
        _read_lines(node, (), lines, path)
        data = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: {error.problem}: this is no YAML") from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ValueError(f"{path}:1: a recipe is a mapping: task, and stages {', '.join(STAGES)}")
    document = Document(path, data, lines)
    _ = document.recipe
    return document


def _read_lines(node: Any, key: Key, lines: dict[Key, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*key, name.value)
            line = name.start_mark.line + 1
            if inner in lines:
                raise ValueError(f"{path}:{line}: {name.value} is given twice")
            lines[inner] = line
            _read_lines(value, inner, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*key, index)] = value.start_mark.line + 1
            _read_lines(value, (*key, index), lines, path)
