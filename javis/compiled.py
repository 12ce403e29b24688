"""torch.compile of the blocks: what lies between the kernels is fused, and all layers share what was compiled for one.

Compiling the whole step would compile its 28 layers one by one, for minutes. Here a block is compiled when it first
runs with a new shape, and the other layers find it made. The first step of a shape is slow, those after it are not.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
from torch import nn

from javis.model.dit import JavisDiT

# Variants of a block that dynamo keeps: shapes, guided or not, layers in FP8 or not. Beyond them it would run eagerly.
VARIANTS = 64
_numbers = itertools.count()


def own_code(module: nn.Module, label: str) -> None:
    """Give a module a ``forward`` of its own.

    torch.compile keeps what it compiled with the code of a function and tries one variant after the other: without
    this, models that share a class would make each other's calls slower, and use up each other's number of variants.
    """
    kind = type(module)
    forward: Any = kind.forward
    copy = types.FunctionType(
        forward.__code__.replace(co_name=f"forward_{label}"),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    module.__class__ = type(f"{kind.__name__}_{label}", (kind,), {"forward": copy, "__module__": kind.__module__})


def compile_blocks(model: JavisDiT, *, backend: Any = "inductor") -> JavisDiT:
    """Compile every block of ``model``, in place; blocks in the same place of a layer share their code.

    Args:
        model: as it will run: quantise it first (:func:`javis.precision.apply_precision`).
        backend: of ``torch.compile``.

    Raises:
        ValueError: the model is compiled already.
    """
    if any(block._compiled_call_impl is not None for layer in model._layers for block in layer.blocks().values()):
        raise ValueError("the blocks of this model are compiled already")
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    number = next(_numbers)
    made: dict[str, type[nn.Module]] = {}
    for layer in model._layers:
        for name, block in layer.blocks().items():
            if name in made:
                block.__class__ = made[name]
            else:
                own_code(block, f"{number}_{name}")
                made[name] = type(block)
            block.compile(backend=backend, dynamic=False)
    return model


__all__ = ["compile_blocks", "own_code"]
