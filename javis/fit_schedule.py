"""``javis fit-schedule``: timesteps with which few steps come near to many (javis/sample/fit.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.media import check_writable, write_text
from javis.requests import MAX_STEPS, read_requests
from javis.sampler_options import SolverName, check_ranges

if TYPE_CHECKING:
    from torch import Tensor

    from javis.generation import Settings
    from javis.pipeline import JavisPipeline
    from javis.sample.fit import Part

DESCRIPTIONS = ("model_index.json", "config.json")


@dataclass(frozen=True, kw_only=True)
class FitScheduleArgs:
    """Fit the timesteps of N steps to a checkpoint: those with which its latents come nearest to the ones of many
    steps, for some prompts that training has seen. Prints them; with --write they become the checkpoint's
    schedule "fitted".
    """

    checkpoint: str = "demo"
    """Folder or hub id of a checkpoint, or "demo", the built-in model."""
    steps: tuple[int, ...] = (8,)
    """Numbers of steps to fit, each by itself."""
    order: Literal["together", "sound_first"] | None = None
    """In which the clips are made (default: the checkpoint's); both parts of "sound_first" are fitted."""
    solver: SolverName = "euler"
    """With which the timesteps are to be used."""
    guidance: float | None = None
    """Classifier-free guidance, 1 = none (default: the checkpoint's)."""
    audio_guidance: float | None = None
    """The same of the sound (default: --guidance if given, else the checkpoint's)."""
    count: int = 8
    """Prompts of the synthetic world, if there is no --prompts."""
    prompts: Path | None = None
    """CSV file with a column "prompt" or "text". Needed for a model that was not trained on the synthetic world."""
    seed: int = 3_000_000
    """Of the first clip."""
    fine: int = 64
    """Steps of the reference, at most 1000."""
    seconds: float | None = None
    """Length of the clips (default: the checkpoint's)."""
    write: bool = False
    """Write the timesteps into the checkpoint's folder, beside those that are there for other steps."""


def main(args: FitScheduleArgs) -> None:
    """Entry of ``javis fit-schedule``. Raises `UsageError` for unusable arguments or checkpoints."""
    check_ranges({"solver": args.solver})
    if not args.steps or not all(1 <= n <= MAX_STEPS for n in args.steps):
        raise UsageError(f"--steps must be whole numbers from 1 to {MAX_STEPS}, got {list(args.steps)}")
    if not max(args.steps) < args.fine <= MAX_STEPS:
        raise UsageError(f"--fine must be above the steps and at most {MAX_STEPS}, got {args.fine} for {args.steps}")
    if not 1 <= args.count <= 1024 or args.seed < 0:
        raise UsageError(f"expected --count from 1 to 1024 and --seed from 0, got {args.count} and {args.seed}")
    path = description_path(args.checkpoint) if args.write else None
    from javis.pipeline import JavisPipeline

    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    prompts = _prompts(args, pipe)
    found: dict[str, dict[str, Any]] = {}
    for steps in args.steps:
        order, key, told = fit(pipe, prompts, steps, args)
        found.setdefault(order, {})[key] = told
    if path is not None:
        store(path, {order: {key: told["timesteps"] for key, told in of.items()} for order, of in found.items()})
    output().print(json.dumps(found, indent=1))


def description_path(checkpoint: str) -> Path:
    """The file of a checkpoint folder that holds its sampling settings.

    Raises:
        UsageError: no such folder, or one that cannot be written.
    """
    for name in DESCRIPTIONS:
        path = Path(checkpoint) / name
        if path.is_file():
            check_writable(path)
            return path
    raise UsageError(
        f"--write needs a checkpoint folder with {' or '.join(DESCRIPTIONS)}, got {checkpoint!r}; "
        "copy the checkpoint first"
    )


def store(path: Path, fitted: Mapping[str, Mapping[str, Any]]) -> None:
    """Put timesteps into the settings of a checkpoint, beside those of other steps and orders."""
    description = json.loads(path.read_text(encoding="utf-8"))
    there = description.setdefault("sampling", {}).setdefault("fitted", {})
    for order, lists in fitted.items():
        there[order] = there.get(order, {}) | dict(lists)
    write_text(path, json.dumps(description, indent=1) + "\n")


def fit(pipe: JavisPipeline, prompts: list[str], steps: int, args: FitScheduleArgs) -> tuple[str, str, dict[str, Any]]:
    """Order, name of the fit, and timesteps with their distances to the reference, for one number of steps."""
    from javis.generation import check_settings, codec_grid
    from javis.sample.fit import fit_timesteps, solutions
    from javis.sample.order import parts
    from javis.sample.schedules import fitted_key
    from javis.sample.solvers import intervals

    asked = check_settings(
        pipe.description, grid=codec_grid(pipe.video_codec), seconds=args.seconds, fps=None, resolution=None,
        ratio=None, steps=steps, guidance=args.guidance, audio_guidance=args.audio_guidance, order=args.order,
        ablate=(), batch_size=len(prompts), sampler={"solver": args.solver},
    )  # fmt: skip
    counts = parts(steps, asked.order)
    seeds = [args.seed + i for i in range(len(prompts))]
    fits = []
    total = sum(solutions(count, args.solver) for count in counts)
    with progress_bar(f"fitting {steps} steps", total) as advance:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            advance(done)

        for part, count in zip(parts_of(pipe, prompts, seeds, asked, len(counts), args.fine), counts, strict=True):
            fits.append(fit_timesteps(part, count, args.solver, fine=args.fine, progress=step))
    key = fitted_key([intervals(args.solver, count) for count in counts])
    told = {
        "timesteps": [one.times for one in fits],
        "solver": args.solver,
        "distance": [one.error for one in fits],
        "distance_uniform": [one.uniform for one in fits],
        "best_ratio": [list(one.best_ratio) for one in fits],
    }
    return asked.order, key, told


def parts_of(
    pipe: JavisPipeline, prompts: list[str], seeds: list[int], asked: Settings, number: int, fine: int
) -> list[Part]:
    """The solutions that are fitted: of both streams; or of the sound, then of the picture to the reference's sound."""
    import torch

    from javis.batches import prepared, stage
    from javis.flow import timesteps
    from javis.sample.euler import StepEnd, sample
    from javis.sample.fit import Part

    condition, video, audio = prepared(pipe, pipe.captions(prompts), seeds, asked)
    model = pipe.model if pipe.denoiser is None else pipe.denoiser

    def solve(
        sound: Tensor, given: bool, times: Tensor, solver: str, evaluations: int, on_step_end: StepEnd | None
    ) -> tuple[Tensor, Tensor]:
        with stage(pipe, "denoise", {"denoise": 0.0}):
            return sample(
                model, video, sound, condition, times, guidance=asked.guidance, solver=solver,
                evaluations=evaluations, on_step_end=on_step_end, plan=asked.plan, draw_noise=torch.zeros_like,
                audio_mask=sound.new_zeros(len(sound), sound.shape[2]) if given else None,
            )  # fmt: skip

    def part(sound: Tensor, given: bool, streams: tuple[int, ...]) -> Part:
        return Part(lambda *told: solve(sound, given, *told), (video, sound), streams)

    if number == 1:
        return [part(audio, False, (0, 1))]
    heard = solve(audio, False, timesteps(fine, 2.0), "euler", fine, None)[1]
    return [part(audio, False, (1,)), part(heard, True, (0,))]


def _prompts(args: FitScheduleArgs, pipe: JavisPipeline) -> list[str]:
    if args.prompts is not None:
        return [request.prompt for request in read_requests(args.prompts).requests]
    if pipe.description.get("world") != "javis":
        raise UsageError("this checkpoint was not trained on the synthetic world; expected --prompts FILE.csv")
    from javis.world import caption, sample_scene

    return [caption(sample_scene(args.seed + i, sources=1 + i % 2, split="train")) for i in range(args.count)]
