"""A student into the checkpoint of its teacher: one folder that holds both."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from javis.demo_checkpoint import DEMO_FOLDER
from javis.errors import UsageError
from javis.model.ops import ModelOps
from javis.student import PREFIX, Student, check_student, differing

HEADER = 200  # bytes, at most, of a tensor's name, dtype and place
PACKAGE_LIMIT = 25_000_000  # bytes of the built-in checkpoint, teacher and student


def export_student(
    teacher: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    limit: int | None = PACKAGE_LIMIT,
    revert: bool | Sequence[str] = False,
) -> Path:
    """Write a checkpoint folder that holds a teacher and its student, all or nothing.

    Args:
        teacher: folder of a small checkpoint, or "demo"; a student that it has already is replaced.
        state: of the student's model: all of it, or the parameters that were trained (LoRA merged into them). Of these
            the ones that differ from the teacher's in float16 are stored, in float16.
        settings: what "student" in ``config.json`` says: steps, guidance and, if they are not the teacher's,
            audio_guidance, order, timestep_ratio, solver, and "model", the changed fields of the configuration.
        folder: to write; ``overwrite`` replaces a checkpoint there, the teacher's folder included.
        limit: bytes that both may take; None: any.
        revert: where both take more, leave parameters as they are in the teacher until they fit, first those that
            changed least for their bytes (square of the Frobenius norm of the change over that of the teacher's, a
            byte), or in the order of the given names; "reverted" of the settings then names them. A small change is
            not always a small effect: measure the student as it was exported.

    Returns:
        ``folder``.

    Raises:
        UsageError: a teacher that cannot be read, settings or weights that do not fit, values that float16 cannot hold,
            more than ``limit`` bytes, a folder that cannot be written.
    """
    from javis.pipeline import JavisPipeline

    pipe = JavisPipeline.from_pretrained(str(teacher), ops=ModelOps())
    if "components" in pipe.description:
        raise UsageError(f"checkpoint {str(teacher)!r} is of full size; a student is stored beside a small model only")
    pipe.description = {**pipe.description, "student": dict(settings)}
    source = DEMO_FOLDER if str(teacher) == "demo" else Path(teacher)
    try:
        config = check_student(pipe.description)
        halves = {name: _half(name, value) for name, value in state.items()}
        held = {name: value.half() for name, value in pipe.model.state_dict().items()}
        own = differing(halves, held)
        base = _bytes_of(source) + len(json.dumps(pipe.description["student"], indent=2))
        over = 0 if limit is None else base + sum(value.nbytes + HEADER for value in own.values()) - limit
        if over > 0 and revert:
            order = None if revert is True else list(revert)
            pipe.description["student"]["reverted"] = _revert(own, held, over, order)
            over = 0
        pipe.student = Student(config, own, ModelOps(), pipe.model)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the student cannot be stored: {error}") from error
    if limit is not None and over > 0:
        raise UsageError(
            f"teacher and student take {(over + limit) / 1e6:.2f} MB, which is {over / 1e6:.2f} MB more than "
            f"{limit / 1e6:g} MB; train fewer of the student's parameters, or revert those that changed least"
        )
    return pipe.save_pretrained(folder, overwrite=overwrite)


def _revert(
    own: dict[str, Tensor], teacher: Mapping[str, Tensor], over: int, order: Sequence[str] | None = None
) -> list[str]:
    """Take those that changed least a byte, or those of ``order``, out of ``own`` until ``over`` bytes are gone.

    Returns:
        Their names.
    """

    def change(name: str) -> float:
        before = teacher[name].float()
        share = (own[name].float() - before).norm() / before.norm().clamp(min=1e-12)
        return float(share**2) / own[name].nbytes

    common = [name for name in own if name in teacher and own[name].shape == teacher[name].shape]
    names: list[str] = []
    for name in sorted(common, key=change) if order is None else [name for name in order if name in common]:
        if over <= 0:
            break
        over -= own.pop(name).nbytes + HEADER - (len(name) + 10)  # its name goes into config.json
        names.append(name)
    if over > 0:
        what = "what the teacher has none of" if order is None else "without the parameters to revert it"
        raise ValueError(f"{what} is more than the limit allows")
    return names


def _half(name: str, value: Tensor) -> Tensor:
    half = value.detach().cpu().half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} holds values that are not finite in float16")
    return half


def _bytes_of(source: Path) -> int:
    """Bytes of a checkpoint without a student."""
    path = source / "model.safetensors"
    size = path.stat().st_size + (source / "config.json").stat().st_size
    with safe_open(path, "pt") as file:
        return size - sum(file.get_tensor(name).nbytes for name in file.keys() if name.startswith(PREFIX))  # noqa: SIM118
