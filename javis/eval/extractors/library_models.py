"""Models of `transformers` from a local folder; nothing is downloaded, and no pickle is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from javis.errors import UsageError
from javis.model.parts import library

_UNUSABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError)


def read_model(name: str, folder: Path, device: str) -> Any:
    """The class ``name`` with the safetensors of ``folder``, for evaluation.

    Raises:
        UsageError: transformers is not installed, files are missing, or some weights have no place or no tensor.
    """
    kind = getattr(library("transformers"), name)
    try:
        model, told = kind.from_pretrained(
            os.fspath(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except _UNUSABLE as error:
        raise _refused(folder, name, error) from error
    if lacking := sorted(told["missing_keys"]):
        raise UsageError(
            f"{folder} is no complete {name}: it lacks {', '.join(lacking[:3])}; copy the public folder again"
        )
    return model.to(device).eval().requires_grad_(False)


def read_part(name: str, folder: Path) -> Any:
    """A tokenizer or feature extractor of ``transformers`` from ``folder``. Raises `UsageError` as `read_model`."""
    try:
        return getattr(library("transformers"), name).from_pretrained(os.fspath(folder), local_files_only=True)
    except _UNUSABLE as error:
        raise _refused(folder, name, error) from error


def pooled(found: Any) -> Tensor:
    """The vectors of what ``get_*_features`` returns: a tensor up to transformers 4, a record since."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _refused(folder: Path, name: str, error: Exception) -> UsageError:
    told = " ".join(str(error).split())[:200]
    return UsageError(
        f"{folder} gives no {name} ({told}); put config.json, model.safetensors and the tokenizer's files there"
    )
