"""Names with arguments in a recipe: `Adam`, or `{name: Adam, lr: 0.001}`, out of a table each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import distill
from .schedules import Cubic, OneShot, Polynomial


@dataclass(frozen=True)
class Call:
    """A name out of a table and arguments: `Adam`, or `{name: Adam, lr: 0.001}`."""

    cls: Any
    arguments: Mapping[str, Any]

    def __call__(self, *first: Any, **more: Any) -> Any:
        """The object; the arguments of the file win over `more`."""
        return self.cls(*first, **{**more, **self.arguments})

    def lacks(self, name: str) -> bool:
        """The class takes this argument, and the file does not give it."""
        return name in inspect.signature(self.cls).parameters and name not in self.arguments


def losses(base: Any = distill.Loss) -> dict[str, Any]:
    """Subclasses that have a public name."""
    found: dict[str, Any] = {}
    for cls in base.__subclasses__():
        found |= {cls.__name__: cls} if not cls.__name__.startswith("_") else {}
        found |= losses(cls)
    return found


def named(
    what: str, table: Callable[[], Mapping[str, Any]], skipped: int = 0
) -> Callable[[Any], Call]:
    """Makes a `Call` of what a file says; `skipped` arguments of the class are not the file's."""

    def read(value: Any) -> Call:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, Call):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"give the name of a {what}, or a mapping with name and arguments")
        arguments, names = {k: v for k, v in value.items() if k != "name"}, table()
        if (name := value["name"]) not in names:
            raise ValueError(f"unknown {what} {name!r}: use {', '.join(sorted(names))}")
        parameters = list(inspect.signature(names[name]).parameters)[skipped:]
        for key in arguments:
            if key not in parameters:
                raise ValueError(f"{name} has no {key!r}: it has {', '.join(parameters)}")
        call = Call(names[name], arguments)
        if what in ("schedule", "loss", "format"):
            try:
                call(**({"steps": 1} if call.lacks("steps") else {}))
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        return call

    return read


def _classes(module: Any, base: Any) -> dict[str, Any]:
    return {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base and name[0] != "_"
    }


def schedules() -> dict[str, Any]:
    """Those of pruning."""
    return {cls.__name__: cls for cls in (OneShot, Polynomial, Cubic)}


def optimizers() -> dict[str, Any]:
    """torch's."""
    return _classes(torch.optim, torch.optim.Optimizer)


def schedulers() -> dict[str, Any]:
    """torch's, of the learning rate."""
    found = _classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    # It asks for a score at each step, which nothing here has.
    return {name: cls for name, cls in found.items() if name != "ReduceLROnPlateau"}
