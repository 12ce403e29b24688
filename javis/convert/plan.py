"""What a conversion will do, before it does it: which tensor of the source becomes which of ours, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from javis.convert.read import WeightSource

Shape = tuple[int, ...]


@dataclass
class Component:
    """One component folder to be written.

    ``sources`` says where each of our tensors comes from; ``expected`` says which tensors the component has: those of
    the class built from ``config``. What is expected and has no source is missing, unless it is in ``absent``.
    """

    name: str  # of the folder, such as "transformer"
    class_name: str
    config: dict[str, Any]  # config.json
    expected: Mapping[str, Shape]  # our name -> shape
    sources: dict[str, str]  # our name -> name in the source
    stem: str = "diffusion_pytorch_model"  # of the weights file
    tied: dict[str, str] = field(default_factory=dict)  # our name -> name in the source it shares, which fills it
    absent: set[str] = field(default_factory=set)  # ours that this kind of checkpoint does not have, by design
    reshaped: dict[str, Shape] = field(default_factory=dict)  # our name -> the shape that the tensor is brought into
    assumed: dict[str, Any] = field(default_factory=dict)  # configuration that neither shapes nor config.json told
    conflicts: list[str] = field(default_factory=list)  # where config.json contradicts the shapes
    files: dict[str, Path] = field(default_factory=dict)  # other files to copy: name in the folder -> from where
    finish: Callable[[Path], None] | None = None  # writes further files into the folder

    def source_of(self, name: str) -> str | None:
        return self.sources.get(name) or self.tied.get(name)


@dataclass
class Plan:
    """A conversion: the components that come out, and the names of the source that no component takes."""

    kind: str
    components: list[Component]
    ignored: dict[str, str] = field(default_factory=dict)  # name in the source -> why it is left out
    notes: list[str] = field(default_factory=list)
    clip: dict[str, Any] = field(default_factory=dict)  # defaults of the pipeline that this checkpoint was trained for


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, Shape]:
    """Names and shapes of the state dict of a module, without its memory."""
    with torch.device("meta"):
        module = build()
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def strip_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names that begin with ``prefix``: the rest -> the full name."""
    return {name[len(prefix) :]: name for name in names if name.startswith(prefix)}


def settle(
    shapes: Mapping[str, Any], official: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Configuration from the shapes, then config.json, then defaults.

    Args:
        shapes: what the shapes of the tensors tell; it is right where config.json says something else.
        official: what config.json tells, in our names; None without one.
        defaults: what neither may tell.

    Returns:
        (values, those of them that were assumed, contradictions in words).
    """

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    values, assumed, conflicts = dict(shapes), {}, []
    for name, value in (official or {}).items():
        if name in shapes and plain(shapes[name]) != plain(value):
            conflicts.append(f"config.json says {name} {plain(value)}, the weights have {plain(shapes[name])}")
        values.setdefault(name, value)
    for name, value in defaults.items():
        if name not in values:
            values[name] = assumed[name] = value
    return values, assumed, conflicts


def need(source: WeightSource, name: str, what: str) -> Shape:
    """Shape of a tensor from which the configuration is derived.

    Raises:
        UsageError: the tensor is not there.
    """
    from javis.errors import UsageError

    if name not in source.names():
        raise UsageError(f"this looks like {what}, but it lacks {name!r}, which tells its sizes")
    return source.info(name).shape
