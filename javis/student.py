"""The student of a checkpoint: a second model that shares what it has in common with the teacher.

``config.json`` holds its settings under "student"; ``model.safetensors`` holds, under ``student.``, those of its
parameters that differ from the teacher's. Its model is built when it is first used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.requests import MAX_STEPS
from javis.sample import Denoiser, Order
from javis.variants import Variant, student_config

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline

PREFIX = "student."


class Student:
    """Parameters of the student that differ from the teacher's, and how to build its model.

    Args:
        config: of the student's model.
        own: name in ``JavisDiT.state_dict`` -> value, for the parameters that differ. Kept as they are.
        ops: what the model runs on.
        teacher: the model whose parameters stand for those that are not in ``own``.

    Attributes:
        built: the model; None until it is first used.
        denoiser: stands in for it in the denoise loop (:mod:`javis.acceleration`); None: the model itself.
        why_not: a reason why it cannot be used in this process.

    Raises:
        ValueError: ``own`` has a name that the model does not have, a value of another shape, or lacks a parameter that
            the teacher does not have either (or has in another shape).
    """

    def __init__(self, config: JavisDiTConfig, own: Mapping[str, Tensor], ops: ModelOps, teacher: JavisDiT) -> None:
        self.config, self.own, self.ops = config, dict(own), ops
        self.built: JavisDiT | None = None
        self.denoiser: Denoiser | None = None
        self.why_not: str | None = None
        self._shares = False
        # Not on the meta device: what that imports takes longer than to fill the few parameters of a small model.
        self._fresh = None if config == teacher.config else JavisDiT(config, ops)
        held = _shapes(teacher)
        expected = held if self._fresh is None else _shapes(self._fresh)
        if unexpected := sorted(set(self.own) - set(expected)):
            raise ValueError(f"the student's model has no parameter {_some(unexpected)}")
        for name, value in self.own.items():
            if list(value.shape) != expected[name]:
                raise ValueError(f"{PREFIX}{name} has shape {list(value.shape)}, expected {expected[name]}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{PREFIX}{name} holds values that are not finite")
        missing = [name for name, shape in expected.items() if name not in self.own and held.get(name) != shape]
        if missing:
            raise ValueError(
                f"{_some([PREFIX + name for name in missing])} is missing, and the teacher has none like it"
            )

    def model(self, pipe: JavisPipeline, *, share: bool = True) -> JavisDiT:
        """The model of a pipeline's student, built when it is first asked for.

        It shares parameters with the teacher unless told otherwise, or components are moved in and out of the device.
        """
        if self.built is None:
            self._shares = share and pipe.residency.policy == "all"
            self.built = self.build(pipe.model, share=self._shares)
            pipe.residency.add("student", self.built)
        return self.built

    def forget(self) -> None:
        """Drop the model if it shares parameters with the teacher, which are about to move one by one."""
        if self._shares:
            self.built, self.denoiser, self._shares = None, None, False

    def state(self, teacher: JavisDiT) -> dict[str, Tensor]:
        """The parameters that differ from the teacher's, as a checkpoint holds them."""
        return self.own if self.built is None else differing(self.built.state_dict(), teacher.state_dict())

    def build(self, teacher: JavisDiT, *, share: bool) -> JavisDiT:
        """The student's model, on the teacher's device and in its dtype.

        Args:
            teacher: as loaded, in plain precision.
            share: the parameters in common are the teacher's own, and not copies of them.
        """
        model, self._fresh = self._fresh or JavisDiT(self.config, self.ops), None
        held = dict(teacher.named_parameters(remove_duplicate=False))
        like = next(teacher.parameters())
        for prefix, owner in model.named_modules(remove_duplicate=False):
            for key in owner._parameters:
                name = f"{prefix}.{key}" if prefix else key
                value = self.own.get(name)
                if value is None and share:
                    owner._parameters[key] = held[name]
                    continue
                # A copy in any case: values of a file may lie at addresses that fit no vector.
                made = (held[name].detach() if value is None else value).to(like.device, like.dtype, copy=True)
                owner._parameters[key] = nn.Parameter(made, requires_grad=like.requires_grad)
        return model.to(like.device).eval()


def component_of(pipe: JavisPipeline, variant: Variant) -> str:
    """Name of a variant's model among the components of a pipeline."""
    return "model" if pipe.model_of(variant) is pipe.model else "student"


def takes_scales(model: JavisDiT) -> bool:
    """Whether a model takes the guidance scales as input, and is run without an unconditional half."""
    return bool(getattr(model.config, "guidance_input", False))


def variant_denoiser(pipe: JavisPipeline, variant: Variant) -> Denoiser:
    """What predicts velocities for a variant: its model, or what stands in for it."""
    model = pipe.model_of(variant)
    own = pipe.denoiser if model is pipe.model or pipe.student is None else pipe.student.denoiser
    return model if own is None else own


def differing(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a student's state that are not the teacher's, value by value."""
    return {
        name: value
        for name, value in student.items()
        if name not in teacher or value.shape != teacher[name].shape or not torch.equal(value, teacher[name].to(value))
    }


def check_student(description: Mapping[str, Any]) -> JavisDiTConfig:
    """Check the settings under "student" of a checkpoint; returns the configuration of its model.

    Raises:
        ValueError, KeyError, TypeError: what is wrong with them.
    """
    student = description["student"]
    if not isinstance(student, Mapping) or not isinstance(student.get("model", {}), Mapping):
        raise ValueError(f"student must be an object with steps, guidance and model, got {student!r:.60}")
    config = JavisDiTConfig.from_dict(student_config(description["model"], student))
    steps = student["steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"student steps must be a whole number from 1 to {MAX_STEPS}, got {steps!r}")
    for name in ("guidance", "audio_guidance", "timestep_ratio"):
        value = student.get(name, 1.0) if name != "guidance" else student[name]
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"student {name} must be a positive number, got {value!r}")
        if name != "timestep_ratio" and value != 1 and not getattr(config, "guidance_input", False):
            raise ValueError(f"student {name} must be 1 unless its model has guidance_input, got {value!r}")
    if student.get("order", "together") not in get_args(Order):
        raise ValueError(f"student order must be one of {', '.join(get_args(Order))}, got {student['order']!r}")
    same = ("video_channels", "audio_channels", "caption_channels", "prior_channels", "use_prior")
    for name in (*same, "spatial_prior_len", "temporal_prior_len"):
        if getattr(config, name) != description["model"].get(name, getattr(config, name)):
            raise ValueError(
                f"student model.{name} differs from the teacher's, with whom it shares codecs and encoders"
            )
    return config


def _shapes(model: JavisDiT) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
