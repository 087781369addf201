"""Published methods, one file each: a method names its stages and its numbers and nothing else.

Every module of this folder is imported on first use and registers itself; there is no list to edit.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from kvcompress.budget import Uniform
from kvcompress.pipeline import Stages

__all__ = ["Method", "available", "create", "inner_stages", "register"]

_REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Method(ABC):
    """A published method: parameters in, stages out.

    Attributes:
        budget: entries that a layer may keep for each head: an int counts them, a float in (0, 1] is a share of the
            row's own prompt.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    budget: int | float

    @abstractmethod
    def stages(self) -> Stages:
        """What the method is made of. Raises ValueError for parameters that make no sense together."""

    def __post_init__(self) -> None:
        self.stages()  # a senseless combination is refused when the method is built

    def __str__(self) -> str:
        numbers = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}({numbers})"


M = TypeVar("M", bound=type[Method])


def register(name: str, *, title: str, paper: str) -> Callable[[M], M]:
    """Puts a method class into the registry under `name`."""

    def add(cls: M) -> M:
        if name in _REGISTRY:
            raise ValueError(f"register: name must be new, got {name!r} a second time")
        cls.name, cls.title, cls.paper = name, title, paper
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> dict[str, type[Method]]:
    """All methods by name, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def create(name: str, **parameters: Any) -> Method:
    """Builds a method by its name.

    Raises:
        ValueError: no such method, a missing or unknown parameter, or senseless numbers; the sentence says what there is.

    Example:
        >>> create("snapkv", budget=0.1, window=16).budget
        0.1
    """
    methods = available()
    if name not in methods:
        raise ValueError(f"create: name must be one of {', '.join(methods)}, got {name!r}")
    parameter = {field.name: field for field in fields(methods[name])}
    for given in parameters:
        if given not in parameter:
            raise ValueError(f"create: parameters of {name} must be among {', '.join(parameter)}, got {given}")
    for wanted, field in parameter.items():
        if wanted not in parameters and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"create: {wanted} of {name} must be given, got nothing")
    return methods[name](**parameters)


def inner_stages(outer: str, inner: Method | str, budget: int | float) -> Stages:
    """Stages of the method inside another one, which brings the layer budgets: `inner` by name or built.

    Raises:
        ValueError: the inner method has layer budgets of its own.
    """
    method = create(inner, budget=budget) if isinstance(inner, str) else inner
    stages = method.stages()
    if not isinstance(stages.budget, Uniform):
        raise ValueError(f"{outer}: inner must be a method with equal layer budgets, got {method.name}")
    return replace(stages, budget=Uniform(budget))


# --- profiles: a method with all its numbers in a file

_FORMAT = "kvcompress profile 1"


def save_profile(path: str | PathLike[str], method: Method, **about: Any) -> None:
    """Writes a method with all its parameters, and what is known about it, as JSON that `load_profile` reads."""
    profile = {"format": _FORMAT, "method": _spec(method), **about}
    Path(path).write_text(json.dumps(profile, indent=2) + "\n")


def load_profile(path: str | PathLike[str]) -> Method:
    """The method of a profile, for instance one that `kvcompress tune` wrote.

    Raises:
        ValueError: another file, or a method or parameter that this version does not have.

    Example:
        >>> cache = CompressedCache(model.config, methods.load_profile("profile.json"))
    """
    try:
        profile = json.loads(Path(path).read_text())
    except ValueError:
        profile = None
    if not isinstance(profile, dict) or profile.get("format") != _FORMAT:
        raise ValueError(f"load_profile: path must be a file of `kvcompress tune` ({_FORMAT}), got {path}")
    return _built(profile["method"])


def _spec(value: Any) -> Any:
    if isinstance(value, Method):
        return {"name": value.name, "parameters": {f.name: _spec(getattr(value, f.name)) for f in fields(value)}}
    return list(value) if isinstance(value, tuple) else value


def _built(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"name", "parameters"}:
        return create(value["name"], **{name: _built(own) for name, own in value["parameters"].items()})
    return tuple(value) if isinstance(value, list) else value
