"""Public weights into our modules: every name must find its place, and every place its name.

Files are opened by `javis.convert.read`, which runs nothing that they contain (safetensors, or pickles of tensors).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from javis.convert.read import SUFFIXES, Checkpoint, WeightSource
from javis.errors import UsageError
from javis.eval.extractors.base import weights_hash

NameMap = Callable[[str], "str | None"]


def weights_files(folder: Path) -> list[Path]:
    """The weights in ``folder``, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def load_weights(
    module: nn.Module, folder: Path, what: str, *, rename: NameMap = lambda name: name, ignored: Sequence[str] = ()
) -> str:
    """Fill ``module`` with the only weights in ``folder`` and return their hash. The module is set to evaluation.

    Args:
        rename: public name -> name in ``module``; None leaves a tensor out.
        ignored: regular expressions of public names that the module has no use for.

    Raises:
        UsageError: not one set of weights, a tensor without a place or of another shape, a place without a tensor.
    """
    source = Checkpoint(folder)
    missing = fill(module, source, rename, ignored)
    for text, names in missing.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"{source.path} is not {what}: {text} {', '.join(names[:3])}{more}; put the public weights there"
            )
    module.eval().requires_grad_(False)
    return weights_hash(source.files)


def fill(
    module: nn.Module, source: WeightSource, rename: NameMap, ignored: Sequence[str]
) -> Mapping[str, Sequence[str]]:
    """Copy what fits; say what does not, by kind."""
    places = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # Counters of batch norms, which evaluation does not read and older files lack.
    wanted = {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}
    leave = re.compile("|".join([r".*num_batches_tracked", *ignored]))
    unknown, shapes, found = [], [], set()
    for public in source.names():
        name = None if leave.fullmatch(public) else rename(public)
        if name is None:
            continue
        if name not in wanted:
            unknown.append(public)
            continue
        shape, expected = source.info(public).shape, tuple(places[name].shape)
        if shape not in (expected, (1, *expected)):  # public position embeddings may have a batch of one in front
            shapes.append(f"{public} {list(shape)} instead of {list(expected)}")
            continue
        found.add(name)
        with torch.no_grad():
            places[name].copy_(source.get(public).reshape(expected))
    return {
        "there is no place for": unknown,
        "other shapes:": shapes,
        "it lacks": sorted(wanted - found),
    }
