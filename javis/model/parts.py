"""What the full-size components share: configurations as json, and libraries that load on first use."""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

from javis.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType

    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def library(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UsageError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"the full-size components need {name.split('.')[0]} ({error}); install it: pip install 'javis[full]'"
        ) from error


def config_to_dict(config: DataclassInstance) -> dict[str, Any]:
    """Fields of a configuration, nested ones too, with lists for tuples: equal to what json gives back."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def config_from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Inverse of :func:`config_to_dict`; fields that are left out keep their defaults.

    Raises:
        ValueError: an unknown field.
    """
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown {cls.__name__} fields {unknown}; this version knows {sorted(known)}")
    return cls(**{name: _frozen(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(inner) for inner in value) if isinstance(value, (tuple, list)) else value
