"""The rungs of the latency ladder: one model, computed in one way after the other, each on top of the one before.

upstream       our re-creation of the official computation (benchmarks/baselines/upstream_equivalent.py)
eager          de-duplicated: unique prior keys, conditioning once per clip; plain PyTorch
compile        + torch.compile of the blocks (28 layers share the code that is compiled for one)
fused          de-duplicated on our kernels with folded priors, no torch.compile
fused_compile  fused + torch.compile of what lies between the kernels
graph          + the whole step as one CUDA graph
overlap        + picture and sound of a layer on two streams (javis/sample/overlap.py); on a CPU one after the other
fp8            + FP8 linear layers (javis/precision.py); emulated where the quick run is on a CPU
fp8_te         fused with FP8 linear layers of Transformer Engine, where it is installed
interval       fused_compile with guidance at timesteps 200 to 800 only; elsewhere the conditional half alone
cache          interval + the first-block cache, used in every second step: random weights say nothing about thresholds

The last two approximate; the others compute the same. They decide from step to step, so no graph is made of them.

All share one set of random weights, made on the device.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.upstream_equivalent import as_upstream
from javis.cache_options import CacheConfig
from javis.compiled import compile_blocks
from javis.kernels.ops.flow_update.api import flow_update
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT, Velocity
from javis.model.ops import ModelOps
from javis.plan import Grid, PlanArgs, _official, official_latents, token_grid
from javis.precision import apply_precision
from javis.precision import why_not as why_no_precision
from javis.sample.cache import CachedDenoiser
from javis.sample.overlap import overlap_streams

RUNGS = (
    "upstream", "eager", "compile", "fused", "fused_compile", "graph", "overlap", "fp8", "fp8_te", "interval", "cache",
)  # fmt: skip
GRAPHED = ("graph", "overlap", "fp8")
APPROXIMATE = ("interval", "cache")  # steps differ in cost: whole loops are timed, of the longest schedule
GUIDANCE = 7.0
INTERVAL = (200.0, 800.0)  # timesteps
EVERY_SECOND = CacheConfig(kind="first-block", video=float("inf"), audio=float("inf"), most=1)
TIMES = 1000  # timesteps run from here to 0


@dataclass(frozen=True)
class Clip:
    """What is denoised."""

    name: str
    config: JavisDiTConfig
    video: tuple[int, int, int]  # latents
    audio: tuple[int, int]

    @property
    def grid(self) -> Grid:
        return token_grid(self.config, self.video, self.audio)


def official_clip(name: str, seconds: float = 2.0) -> Clip:
    """A clip of the full-size model, as `javis plan` sizes it."""
    config, _, clip = _official(PlanArgs(resolution=name, seconds=seconds))
    return Clip(name, config, *official_latents(clip["frames"], clip["height"], clip["width"], clip["fps"]))


def toy_clip() -> Clip:
    """The same model in small, to try everything on a CPU in seconds. Sizes are those that FP8 products need."""
    config = JavisDiTConfig(
        hidden_size=96, num_heads=4, depth=2, caption_channels=32, caption_length=16, spatial_prior_len=8,
        temporal_prior_len=8, prior_channels=16,
    )  # fmt: skip
    return Clip("toy", config, (3, 8, 8), (8, 4))


@torch.no_grad()
def random_weights(config: JavisDiTConfig, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters of a model, made on the device. Blocks add about a third of what comes in, so that it stays in range.

    What starts at zero in training (the final layers, what a block adds at first) is random here, or the output would
    say nothing about what lies before it.
    """
    with torch.device("meta"):
        model = JavisDiT(config)
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, value in model.state_dict().items():
        std = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.02
        if "time_block" in name or name.endswith("modulation"):
            std = 0.3 if name.endswith("modulation") else 0.02
        noise = torch.empty(value.shape, device=device, dtype=dtype).normal_(generator=generator)
        state[name] = noise * std + (1 if name.endswith("_norm.weight") else 0)
    return state


def make_model(config: JavisDiTConfig, ops: ModelOps, weights: dict[str, Tensor]) -> JavisDiT:
    """A model on these very tensors: rungs share them."""
    with torch.device("meta"):
        model = JavisDiT(config, ops)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def why_not(rung: str, device: str) -> str | None:
    """Why a rung cannot run here, or None."""
    if device == "cuda" and rung.startswith("fp8"):
        return why_no_precision("fp8-te" if rung == "fp8_te" else "fp8", device)
    if rung == "fp8_te" and importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    return None


class Runner:
    """One rung on one clip, guided or not. ``loop`` denoises in place.

    Args:
        rung: of `RUNGS`.
        weights: of `random_weights`.
        steps: of the schedule; ``loop`` may run fewer, and then runs the first ones.
        backend: of torch.compile.
    """

    def __init__(
        self, rung: str, clip: Clip, weights: dict[str, Tensor], *, guided: bool, steps: int, device: str, backend: str
    ) -> None:
        self.rung, self.guided, self.device = rung, guided, device
        self.folded = rung not in ("upstream", "eager", "compile")
        model = make_model(clip.config, ModelOps.fused() if self.folded else ModelOps(), weights)
        if rung == "upstream":
            model = as_upstream(model)
        elif rung == "fp8":
            model = apply_precision(model, "fp8", emulate=device != "cuda")
        elif rung == "fp8_te":
            model = apply_precision(model, "fp8-te")
        if rung == "overlap" and device == "cuda":
            overlap_streams(model)
        if rung in ("compile", "fused_compile", *GRAPHED, *APPROXIMATE):
            compile_blocks(model, backend=backend)
        self.model = model
        self.noise, self.told = inputs(clip, guided, device, next(iter(weights.values())).dtype)
        self.video, self.audio = (x.clone() for x in self.noise)
        share = torch.arange(steps, device=device, dtype=torch.float32) / steps
        self.timesteps = (TIMES * (1 - share))[:, None]
        self.t, self.dt = self.timesteps[0].clone(), torch.full((), 1 / steps, device=device)
        self.update = "auto" if self.folded else "reference"
        self.replay: Callable[[], None] | None = None
        self.condition: Any = None
        self.half: Any = None  # conditioning without the unconditional sample
        self.cached: CachedDenoiser | None = None

    @torch.no_grad()
    def prepare(self) -> None:
        """What is done once per clip. The official code does it in every step."""
        if self.rung != "upstream":
            # With gradients on (no parameter has one) priors stay unfolded, which is what de-duplication alone gives.
            with torch.set_grad_enabled(not self.folded):
                self.condition = self.model.condition(**self.told)
                if self.rung in APPROXIMATE and self.guided:
                    first = {name: x[:1] if isinstance(x, Tensor) else x for name, x in self.told.items()}
                    self.half = self.model.condition(**first)

    def conditioning(self) -> float:
        """Seconds of `prepare`. What it made stays as it was: a graph reads the memory of that."""
        kept, started = (self.condition, self.half), time.perf_counter()
        self.prepare()
        synchronize(self.device)
        seconds, (self.condition, self.half) = time.perf_counter() - started, kept
        return 0.0 if self.rung == "upstream" else seconds

    def guides(self, t: float) -> bool:
        """Whether a step from this timestep has both halves of guidance."""
        return self.guided and (self.rung not in APPROXIMATE or INTERVAL[0] <= round(t, 3) <= INTERVAL[1])

    def share_of_work(self, steps: int) -> float:
        """FLOPs of this schedule over those of as many guided (or, without guidance, unguided) evaluations."""
        halves = [2 if self.guides(float(t)) else 1 for t in self.timesteps[:steps]]
        layers = [1.0] * steps
        if self.rung == "cache":  # all layers in every second evaluation, the first one in the others, of each half
            fresh, depth = [True, True], self.model.config.depth
            for i, half in enumerate(halves):
                layers[i] = 1.0 if fresh[half - 1] else 1 / depth
                fresh[half - 1] = not fresh[half - 1]
        return sum(h * share for h, share in zip(halves, layers, strict=True)) / (steps * (2 if self.guided else 1))

    def predict(self) -> Velocity:
        """The velocity at the present latents and time, of both halves where there is guidance."""
        both = self.guided if self.rung not in APPROXIMATE else self.guides(float(self.t))
        copies, condition = (2 if both else 1), (self.condition if both or not self.guided else self.half)
        video, audio = (x.repeat(copies, *[1] * (x.ndim - 1)) for x in (self.video, self.audio))
        t = self.t.repeat(copies)
        if self.rung == "upstream":
            return self.model(video, audio, t, **{k: v for k, v in self.told.items() if not k.endswith("_sizes")})
        return (self.cached or self.model).denoise(video, audio, t, condition)

    def _step(self) -> None:
        out = self.predict()
        scale = GUIDANCE if len(out.video) > len(self.video) else 1.0
        video, audio = flow_update(
            self.video, self.audio, out.video, out.audio, self.dt, scale, scale, backend=self.update
        )
        self.video.copy_(video)
        self.audio.copy_(audio)

    def capture(self) -> None:
        """Make the step one CUDA graph, for the rungs that have it. On a CPU the step runs as it is."""
        if self.rung not in GRAPHED or self.device != "cuda":
            return
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            self._step()
        self.replay = graph.replay

    def _forget(self) -> None:
        """A new clip, for the rung with a cache."""
        self.cached = CachedDenoiser(self.model, EVERY_SECOND, clips=1) if self.rung == "cache" else None

    @torch.no_grad()
    def start(self) -> float:
        """Seconds until the first step is there: conditioning, compilation, capture."""
        started = time.perf_counter()
        self.prepare()
        self._step()
        self.capture()
        self.loop(1)
        return time.perf_counter() - started

    @torch.no_grad()
    def loop(self, steps: int) -> list[float]:
        """Denoise from noise; seconds after each step since the beginning."""
        for latents, noise in zip((self.video, self.audio), self.noise, strict=True):
            latents.copy_(noise)
        self._forget()
        synchronize(self.device)
        marks = [mark(self.device)]
        for i in range(steps):
            self.t.copy_(self.timesteps[i])
            self.replay() if self.replay is not None else self._step()
            marks.append(mark(self.device))
        synchronize(self.device)
        return [elapsed(marks[0], later) for later in marks[1:]]

    @torch.no_grad()
    def replayed(self) -> tuple[list[Tensor], list[Tensor]]:
        """Latents after two far steps, from the captured graph and from the steps themselves: they should be the same.

        The times of the two steps differ as much as can be, so that a graph that keeps the first one shows.
        """
        kept = self.timesteps, self.dt.clone(), self.replay
        self.timesteps = torch.tensor([[float(TIMES)], [TIMES / 10]], device=self.device)
        self.dt.fill_(0.5)
        found = []
        for replay in (self.replay, None):
            self.replay = replay
            self.loop(2)
            found.append([self.video.clone(), self.audio.clone()])
        self.timesteps, self.replay = kept[0], kept[2]
        self.dt.copy_(kept[1])
        return found[0], found[1]

    @torch.no_grad()
    def first_velocity(self) -> Velocity:
        """What is predicted for the noise, in float64 on the CPU: for comparing rungs."""
        for latents, noise in zip((self.video, self.audio), self.noise, strict=True):
            latents.copy_(noise)
        self._forget()
        self.t.copy_(self.timesteps[0] / 2)  # in the middle: at pure noise the network has little to do
        return Velocity(*(x.double().cpu() for x in self.predict()))


def inputs(clip: Clip, guided: bool, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Noise of one sample (float32, as the sampler holds it) and the arguments of ``condition``.

    The unconditional half has a caption of its own, but the same priors: the official code lets each half see the
    priors of both, which is then the same function.
    """
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).normal_(generator=generator)

    config, copies = clip.config, 2 if guided else 1
    noise = (random(1, config.video_channels, *clip.video), random(1, config.audio_channels, *clip.audio))
    text = random(copies, config.caption_length, config.caption_channels).to(dtype)
    spatial = random(1, config.spatial_prior_len, config.prior_channels).to(dtype).repeat(copies, 1, 1)
    temporal = random(1, config.temporal_prior_len, config.prior_channels).to(dtype).repeat(copies, 1, 1)

    def number(value: float) -> Tensor:
        return torch.full((copies,), value, device=device)

    return noise, {
        "text": text, "fps": number(24.0), "height": number(8.0 * clip.video[1]), "width": number(8.0 * clip.video[2]),
        "video_sizes": clip.video, "audio_sizes": clip.audio, "spatial_prior": spatial, "temporal_prior": temporal,
    }  # fmt: skip


def exact_velocity(clip: Clip, weights: dict[str, Tensor], *, guided: bool, device: str) -> Velocity:
    """The first velocity computed in float32 by the de-duplicated model in plain PyTorch."""
    wide = {name: value.float() for name, value in weights.items()}
    runner = Runner("eager", clip, wide, guided=guided, steps=1, device=device, backend="eager")
    _, told = inputs(clip, guided, device, next(iter(weights.values())).dtype)  # the same, rounded to the rungs' dtype
    runner.told = {k: v.float() if isinstance(v, Tensor) else v for k, v in told.items()}
    runner.prepare()
    return runner.first_velocity()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def mark(device: str) -> Any:
    """A point in time on the device."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks that have passed."""
    return end - start if isinstance(start, float) else float(start.elapsed_time(end)) / 1e3


__all__ = [
    "APPROXIMATE",
    "RUNGS",
    "Clip",
    "Runner",
    "exact_velocity",
    "official_clip",
    "random_weights",
    "toy_clip",
    "why_not",
]
