"""Checkpoint folder of the small model: ``config.json`` and one ``model.safetensors``, read and written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from javis.errors import UsageError
from javis.model.codecs import PatchAudioCodec, PatchVideoCodec, build_codecs
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator
from javis.model.text import WordEncoder, WordEncoderConfig
from javis.student import PREFIX, Student, check_student

DEMO_FOLDER = Path(__file__).parent / "weights" / "demo"
WEIGHTED = ("model", "prior", "video_codec", "audio_codec")  # prefixes in model.safetensors


class DemoParts(NamedTuple):
    """What a small checkpoint holds."""

    model: JavisDiT
    prior: PriorEstimator
    video_codec: PatchVideoCodec
    audio_codec: PatchAudioCodec
    text_encoder: WordEncoder
    description: dict[str, Any]
    student: Student | None = None


def read_demo(source: str, ops: ModelOps) -> DemoParts:
    """Load a small checkpoint in float32.

    Args:
        source: the folder, or "demo" for the built-in one.

    Raises:
        UsageError: missing or corrupt files, weights that do not fit the configuration.
    """
    folder = DEMO_FOLDER if source == "demo" else Path(source)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UsageError(
                f"checkpoint {source!r}: {path.name} is missing; expected a folder with config.json and "
                "model.safetensors or with model_index.json, a hub id, or 'demo' for the built-in model"
            )
    try:
        description = json.loads(config_path.read_text(encoding="utf-8"))
        model = JavisDiT(JavisDiTConfig.from_dict(description["model"]), ops)
        prior = PriorEstimator(PriorConfig.from_dict(description["prior"]))
        video_codec, audio_codec = build_codecs(description["codecs"])
        text_encoder = WordEncoder(WordEncoderConfig(**description["text"]))
        _check_settings(description)
        student_config = check_student(description) if "student" in description else None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError) as error:
        raise UsageError(
            f"checkpoint {source!r}: config.json is not usable ({_one_line(error)}); export it again"
        ) from error
    try:
        state = load_file(weights_path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"checkpoint {source!r}: model.safetensors is corrupt ({_one_line(error)}); copy or export it again"
        ) from error
    student = None
    try:
        for name, component in zip(WEIGHTED, (model, prior, video_codec, audio_codec), strict=True):
            own = {k[len(name) + 1 :]: v.float() for k, v in state.items() if k.startswith(name + ".")}
            component.load_state_dict(own, strict=True)
        others = {k[len(PREFIX) :]: v for k, v in state.items() if k.startswith(PREFIX)}
        if student_config is not None:
            student = Student(student_config, others, ops, model)
        elif others:
            raise ValueError(f"{PREFIX}{min(others)} is there, but config.json has no student")
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"checkpoint {source!r}: the weights do not fit config.json ({_one_line(error)[:200]})"
        ) from error
    return DemoParts(model, prior, video_codec, audio_codec, text_encoder, description, student)


def write_demo(
    folder: Path,
    components: dict[str, Any],
    description: dict[str, Any],
    student: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing folder; values that fit are kept in float16.

    ``student`` holds the parameters in which the student differs from the model.
    """
    state: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        half = value.half()
        exact = value.is_floating_point() and bool((half.to(value) == value).all())
        state[name] = (half if exact else value).cpu().contiguous()

    for name in WEIGHTED:
        component = components[name]
        assert isinstance(component, nn.Module)
        for key, value in component.state_dict().items():
            add(f"{name}.{key}", value)
    for key, value in (student or {}).items():
        add(PREFIX + key, value)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _check_settings(description: dict[str, Any]) -> None:
    """The parts of ``config.json`` that no constructor checks: format of the clips and sampling defaults."""
    clip, sampling = description["clip"], description["sampling"]
    numbers = {name: clip[name] for name in ("size", "fps", "sample_rate", "seconds")}
    numbers |= {name: sampling[name] for name in ("steps", "guidance", "timestep_ratio")}
    numbers |= {name: value for name, value in sampling.items() if name == "audio_guidance"}
    for name, value in numbers.items():
        whole = name in ("size", "fps", "sample_rate", "steps")
        if not math.isfinite(value) or value <= 0 or (whole and value != int(value)):
            raise ValueError(f"{name} must be a positive {'whole ' * whole}number, got {value!r}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
