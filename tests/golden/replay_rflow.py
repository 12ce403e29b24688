"""rflow*: timesteps, sampling trajectories and training losses of the official rectified flow."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from javis.flow import add_noise, flow_losses, timestep_ratio, timesteps, transform_timestep
from javis.model.dit import Conditioning, JavisDiT
from javis.sample import sample
from javis.sample.euler import Step

from .harness import GoldenCase
from .replay_dit import official_model

TRAJECTORY_ATOL = 1e-3  # golden/README.md: sampling trajectories
TIMESTEP_ATOL = 1e-2  # golden/README.md: of 1000


def replay(case: GoldenCase) -> None:
    if "sampler" in case.config:
        replay_sampling(case)
    elif any(key.startswith("in.x_start") for key in case.keys("in")):
        replay_losses(case)
    else:
        replay_tables(case)


def _sizes(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("fps", "height", "width")}


# -- sampling ---------------------------------------------------------------------------------------------------------


def _guided_condition(model: JavisDiT, case: GoldenCase, negative: str | None, scope: str = "sample") -> Conditioning:
    """Conditioning of [prompt, unconditional]; the null text takes the mask of the prompt."""
    inputs = case.group("in")
    text, mask = inputs["y"][:, 0], inputs["text_mask"]
    other, other_mask = model.null_text[None], mask
    if negative is not None:
        other, other_mask = inputs[f"{negative}.y"][:, 0], inputs[f"{negative}.text_mask"]
    null_spatial, null_temporal = model.null_prior
    return model.condition(
        torch.cat((text, other)),
        text_mask=torch.cat((mask, other_mask)),
        spatial_prior=torch.cat((inputs["spatial_prior"], null_spatial[None])),
        temporal_prior=torch.cat((inputs["temporal_prior"], null_temporal[None])),
        video_sizes=tuple(inputs["latent.video"].shape[2:]),  # type: ignore[arg-type]
        audio_sizes=tuple(inputs["latent.audio"].shape[2:]),  # type: ignore[arg-type]
        prior_scope=scope,  # type: ignore[arg-type]
        **{name: value.repeat(2) for name, value in _sizes(inputs).items()},
    )


def replay_sampling(case: GoldenCase) -> None:
    model = official_model(case)
    inputs, options = case.group("in"), case.config["sampler"]
    ratio: Any = 1.0
    if options["use_timestep_transform"]:
        ratio = timestep_ratio(inputs["height"], inputs["width"], inputs["num_frames"])[0]
    times = timesteps(options["num_sampling_steps"], ratio)
    for sub in case.children("out"):
        masks = {name: inputs.get(f"{sub}.mask.{name}") for name in ("video", "audio")}
        condition = _guided_condition(model, case, sub if f"{sub}.y" in inputs else None)
        noises = iter([inputs[k] for i in range(len(times)) for k in _noise_keys(sub, i) if k in inputs])
        steps: list[Step] = []
        video, audio = sample(
            model,
            inputs["latent.video"],
            inputs["latent.audio"],
            condition,
            times,
            guidance=options["cfg_scale"],
            video_mask=masks["video"],
            audio_mask=masks["audio"],
            draw_noise=lambda _z, noises=noises: next(noises),
            callback=steps.append,
        )
        for key in case.keys(f"out.{sub}"):
            tolerance = TIMESTEP_ATOL if key.endswith("timesteps") else TRAJECTORY_ATOL
            case.check(key, _recorded(key.split(".", 2)[2], steps, times, video, audio), atol=tolerance)
    for sub in case.children("info"):
        if sub == "joint_batch":
            condition = _guided_condition(model, case, None, "batch")
            video, audio = sample(
                model, inputs["latent.video"], inputs["latent.audio"], condition, times, guidance=options["cfg_scale"]
            )
            case.check("info.joint_batch.final.video", video, atol=TRAJECTORY_ATOL)
            case.check("info.joint_batch.final.audio", audio, atol=TRAJECTORY_ATOL)


def _noise_keys(sub: str, i: int) -> list[str]:
    return [f"{sub}.noise_step{i}.{name}" for name in ("video", "audio")]


def _recorded(name: str, steps: list[Step], times: Tensor, video: Tensor, audio: Tensor) -> Tensor:
    """The value of one recorded name, e.g. ``latent_before_step2.video``."""
    modality = name.rsplit(".", 1)[-1]
    if name == "timesteps":
        return times
    if name.startswith("final."):
        return {"video": video, "audio": audio}[modality]
    match = re.match(r"(.*)_step(\d+)", name)
    assert match is not None, name
    what, step = match.group(1), steps[int(match.group(2))]
    if what == "latent_before":
        return getattr(step, modality)
    if what == "model_input":
        return getattr(step, f"{modality}_input")
    if what in ("x_mask", "ax_mask"):
        mask = step.video_mask if what == "x_mask" else step.audio_mask
        assert mask is not None
        return mask
    assert what == "pred", name
    half = 0 if ".cond." in name else 1
    return getattr(step.predicted, modality).chunk(2)[half]


# -- losses -----------------------------------------------------------------------------------------------------------


def replay_losses(case: GoldenCase) -> None:
    model = official_model(case)
    inputs = case.group("in")
    count = len(inputs["t"])
    with torch.no_grad():
        condition = model.condition(
            inputs["y"][:, 0].expand(count, -1, -1),
            text_mask=inputs["text_mask"].expand(count, -1),
            spatial_prior=inputs["spatial_prior"].expand(count, -1, -1),
            temporal_prior=inputs["temporal_prior"].expand(count, -1, -1),
            video_sizes=tuple(inputs["x_start.video"].shape[2:]),  # type: ignore[arg-type]
            audio_sizes=tuple(inputs["x_start.audio"].shape[2:]),  # type: ignore[arg-type]
            **{name: value.expand(count) for name, value in _sizes(inputs).items()},
        )
        for sub in case.children("out"):
            losses = flow_losses(
                lambda v, a, t, **masks: model.denoise(v, a, t, condition, **masks),
                inputs["x_start.video"],
                inputs["x_start.audio"],
                inputs["t"],
                video_noise=inputs["noise.video"],
                audio_noise=inputs["noise.audio"],
                video_mask=inputs.get(f"{sub}.mask.video"),
                audio_mask=inputs.get(f"{sub}.mask.audio"),
            )
            case.check(f"out.{sub}.loss", losses.total)
            case.check(f"out.{sub}.loss_video", losses.video)
            case.check(f"out.{sub}.loss_audio", losses.audio)


# -- tables -----------------------------------------------------------------------------------------------------------


def replay_tables(case: GoldenCase) -> None:
    inputs = case.group("in")
    for key in case.keys("out"):
        match = re.fullmatch(r"out\.(fp32|bf16)\.h(\d+)_w(\d+)_f(\d+)_s(\d+)", key)
        if match is not None:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[match.group(1)]
            height, width, frames = (torch.tensor([float(n)], dtype=dtype) for n in match.groups()[1:4])
            ratio = timestep_ratio(height, width, frames)
            case.check(key, timesteps(int(match.group(5)), ratio)[:, 0], atol=TIMESTEP_ATOL)
        elif key.startswith("out.scaled."):
            t, height, width, frames = _scaled_call(case.meta["keys"][key]["what"])
            ratio = timestep_ratio(height, width, frames, scale=float(key.removeprefix("out.scaled.")))
            case.check(key, transform_timestep(t, ratio), atol=TIMESTEP_ATOL)
        elif key.startswith("out.add_noise."):
            given = {name: inputs[f"{key.removeprefix('out.')}.{name}"] for name in ("x", "noise", "t")}
            case.check(key, add_noise(**given), atol=1e-6)


def _scaled_call(text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read "t=[100,512.5,987], (240, 426), 51 frames, scale=1.0"."""
    match = re.match(r"t=\[([\d., ]+)\], \((\d+), (\d+)\), (\d+) frames", text)
    assert match is not None, text
    t = torch.tensor([float(n) for n in match.group(1).split(",")])
    height, width, frames = (torch.tensor([float(n)]) for n in match.groups()[1:])
    return t, height, width, frames
