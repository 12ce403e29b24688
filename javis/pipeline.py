"""JavisPipeline: from a prompt to a clip.

>>> from javis import JavisPipeline
>>> clip = JavisPipeline.from_pretrained("demo")("a red ball bounces on the left", seed=1)
>>> clip.save("clip.mp4")

The data flow is that of docs/architecture.md: text and priors once per clip, the denoise loop, the codecs.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from javis.clip_batch import ClipBatch
from javis.errors import FailedError, UsageError
from javis.model.codecs import PatchAudioCodec, PatchVideoCodec, build_codecs
from javis.model.config import JavisDiTConfig
from javis.model.dit import Conditioning, JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator, Priors
from javis.model.text import WordEncoder, WordEncoderConfig
from javis.sample import Guidance, Order, sample_in_order

Ablation = Literal["prior", "bidirectional"]
DEMO_FOLDER = Path(__file__).parent / "weights" / "demo"
SECONDS_RANGE = (0.25, 4.0)
MAX_STEPS = 1000


class JavisPipeline:
    """Text to audio and video. Build it with :meth:`from_pretrained`."""

    def __init__(
        self,
        model: JavisDiT,
        prior: PriorEstimator,
        video_codec: PatchVideoCodec,
        audio_codec: PatchAudioCodec,
        text_encoder: WordEncoder,
        description: dict[str, Any],
    ) -> None:
        self.model, self.prior = model.eval(), prior.eval()
        self.video_codec, self.audio_codec = video_codec.eval(), audio_codec.eval()
        self.text_encoder, self.description = text_encoder, description
        clip = description["clip"]
        self.fps, self.sample_rate, self.size = int(clip["fps"]), int(clip["sample_rate"]), int(clip["size"])

    # -- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] = "demo", *, ops: ModelOps | None = None) -> JavisPipeline:
        """Load a checkpoint folder (``config.json`` and ``model.safetensors``), or the built-in one, ``"demo"``.

        Args:
            source: the folder, or "demo".
            ops: what the model runs on; the kernels of javis by default, ``ModelOps()`` for plain PyTorch.

        Raises:
            UsageError: no such folder, missing or corrupt files, weights that do not fit the configuration.
        """
        folder = DEMO_FOLDER if str(source) == "demo" else Path(source)
        config_path, weights_path = folder / "config.json", folder / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise UsageError(
                    f"checkpoint {str(source)!r}: {path.name} is missing; expected a folder with config.json and "
                    "model.safetensors, or 'demo' for the built-in model"
                )
        try:
            description = json.loads(config_path.read_text(encoding="utf-8"))
            model = JavisDiT(JavisDiTConfig.from_dict(description["model"]), ops or ModelOps.fused())
            prior = PriorEstimator(PriorConfig.from_dict(description["prior"]))
            video_codec, audio_codec = build_codecs(description["codecs"])
            text_encoder = WordEncoder(WordEncoderConfig(**description["text"]))
            _check_settings(description)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError) as error:
            raise UsageError(
                f"checkpoint {str(source)!r}: config.json is not usable ({_one_line(error)}); export it again"
            ) from error
        try:
            state = load_file(weights_path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(
                f"checkpoint {str(source)!r}: model.safetensors is corrupt ({_one_line(error)}); "
                "copy or export it again"
            ) from error
        parts = {"model": model, "prior": prior, "video_codec": video_codec, "audio_codec": audio_codec}
        try:
            for name, module in parts.items():
                own = {k[len(name) + 1 :]: v.float() for k, v in state.items() if k.startswith(name + ".")}
                module.load_state_dict(own, strict=True)
        except RuntimeError as error:
            raise UsageError(
                f"checkpoint {str(source)!r}: the weights do not fit config.json ({_one_line(error)[:200]})"
            ) from error
        return cls(model, prior, video_codec, audio_codec, text_encoder, description)

    # -- the parts of a generation ------------------------------------------------------------------------------------

    def captions(self, prompts: Sequence[str]) -> list[str]:
        """Prompts -> captions in the words of the built-in world.

        Raises:
            UsageError: an empty or overlong prompt, or unknown words (named, with the known ones).
        """
        from javis.world import normalize_prompt

        return [normalize_prompt(prompt) for prompt in prompts]

    def encode_prompts(
        self, captions: Sequence[str], seeds: Sequence[int], *, zero_prior: bool = False
    ) -> tuple[Tensor, Tensor, Priors]:
        """Caption hidden states, their mask, and sampled priors; each sample's noise comes from its own seed."""
        text, mask = self.text_encoder(list(captions))
        c = self.prior.config
        shape = (c.spatial_token_num + c.temporal_token_num, c.out_dim)
        noise = torch.stack([torch.randn(shape, generator=_generator(seed, 0)) for seed in seeds])
        with torch.no_grad():
            priors = self.prior.encode(text, noise=noise)
        if zero_prior:
            priors = Priors(spatial=torch.zeros_like(priors.spatial), temporal=torch.zeros_like(priors.temporal))
        return text, mask, priors

    def condition(
        self,
        text: Tensor,
        mask: Tensor,
        priors: Priors,
        *,
        frames: int,
        samples: int,
        guided: bool,
        negative: tuple[Tensor, Tensor] | None = None,
        with_bidirectional: bool = True,
    ) -> Conditioning:
        """Conditioning of the prompts, and with guidance of the unconditional samples after them."""
        spatial, temporal = priors.spatial, priors.temporal
        if guided:
            null_spatial, null_temporal = self.model.null_prior
            other, other_mask = negative or (self.model.null_text.expand(len(text), -1, -1), mask)
            text, mask = torch.cat((text, other)), torch.cat((mask, other_mask))
            spatial = torch.cat((spatial, null_spatial.expand_as(spatial)))
            temporal = torch.cat((temporal, null_temporal.expand_as(temporal)))
        side = torch.full((len(text),), float(self.size))
        with torch.no_grad():
            return self.model.condition(
                text,
                text_mask=mask,
                spatial_prior=spatial,
                temporal_prior=temporal,
                fps=torch.full((len(text),), float(self.fps)),
                height=side,
                width=side,
                video_sizes=self.video_codec.latent_sizes(frames, self.size, self.size),
                audio_sizes=self.audio_codec.latent_sizes(samples),
                with_bidirectional=with_bidirectional,
            )

    def frames_of(self, seconds: float) -> int:
        """Whole frames nearest to ``seconds``; the clip lasts exactly ``frames / fps``.

        Raises:
            UsageError: not a number between 0.25 and 4 (the built-in model was trained on 2 s).
        """
        low, high = SECONDS_RANGE
        if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or not low <= seconds <= high:
            raise UsageError(f"seconds must be between {low} and {high}, got {seconds}")
        return max(1, round(seconds * self.fps))

    # -- all of it ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        audio_guidance: float | None = None,
        order: Order | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 8,
        ablate: Sequence[Ablation] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> ClipBatch:
        """Generate one clip per prompt.

        Args:
            prompt: one prompt or several.
            seconds: length, 0.25 to 4; rounded to whole frames.
            steps: Euler steps, evaluations of the model in all. guidance: classifier-free guidance scale, 1 = none.
            audio_guidance: the same of the sound; None: ``guidance`` if that is given, else the checkpoint's.
            order: "together" or "sound_first" (:func:`javis.sample.sample_in_order`); None: the checkpoint's.
            seed: one per prompt, or one number: prompt i gets ``seed + i``. A clip depends on its own seed only, not on
                the batch it is made in. Without seed and generator, seeds are drawn at random.
            generator: draws the seeds, if ``seed`` is not given (diffusers convention).
            negative_prompt: instead of the null caption in the unconditional half.
            batch_size: prompts denoised together.
            ablate: "prior" zeroes the priors, "bidirectional" leaves out that attention (for experiments).
            progress: called with (steps done, steps in all).

        Raises:
            UsageError: unusable arguments.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UsageError("no prompt was given; expected a text such as 'a red ball bounces on the left'")
        defaults = self.description["sampling"]
        steps = defaults["steps"] if steps is None else steps
        if audio_guidance is None:
            audio_guidance = defaults.get("audio_guidance", defaults["guidance"]) if guidance is None else guidance
        scales = Guidance(float(defaults["guidance"] if guidance is None else guidance), float(audio_guidance))
        if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise UsageError(f"steps must be a whole number from 1 to {MAX_STEPS}, got {steps}")
        for name, scale in (("guidance", scales.video), ("audio_guidance", scales.audio)):
            if not math.isfinite(scale) or not 0 <= scale <= 100:
                raise UsageError(f"{name} must be between 0 and 100 (1 = none), got {scale}")
        order = defaults.get("order", "together") if order is None else order
        if order not in get_args(Order):
            raise UsageError(f"unknown order {order!r}; expected one of {', '.join(get_args(Order))}")
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {batch_size}")
        named: set[str] = {ablate} if isinstance(ablate, str) else set(ablate)
        if unknown := sorted(named - set(get_args(Ablation))):
            raise UsageError(f"unknown ablation {', '.join(map(repr, unknown))}; expected prior, bidirectional")
        frames = self.frames_of(self.description["clip"]["seconds"] if seconds is None else seconds)
        seeds = _seeds(seed, generator, len(prompts))
        captions = self.captions(prompts)
        negatives = None
        if negative_prompt is not None:
            given = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(given) != len(prompts):
                raise UsageError(f"{len(given)} negative prompts for {len(prompts)} prompts; expected as many or one")
            negatives = self.captions(given)
        videos, audios = [], []
        spent = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        batches = range(0, len(prompts), batch_size)
        for number, start in enumerate(batches):
            part = slice(start, start + batch_size)
            report = None
            if progress is not None:
                done, total, call = number * steps, len(batches) * steps, progress
                report = lambda i, done=done, total=total, call=call: call(done + i, total)  # noqa: E731
            video, audio = self._generate(
                captions[part],
                seeds[part],
                None if negatives is None else negatives[part],
                frames=frames,
                steps=steps,
                guidance=scales,
                order=order,
                ablate=ablate,
                spent=spent,
                report=report,
            )
            videos.append(video)
            audios.append(audio)
        return ClipBatch(
            video=np.concatenate(videos),
            audio=np.concatenate(audios),
            fps=self.fps,
            sample_rate=self.sample_rate,
            prompts=captions,
            seeds=seeds,
            steps=steps,
            guidance=scales.video,
            audio_guidance=scales.audio,
            order=order,
            seconds_per_stage={name: round(value, 4) for name, value in spent.items()},
        )

    @torch.no_grad()
    def _generate(
        self,
        captions: list[str],
        seeds: list[int],
        negatives: list[str] | None,
        *,
        frames: int,
        steps: int,
        guidance: Guidance,
        order: Order,
        ablate: Sequence[Ablation],
        spent: dict[str, float],
        report: Callable[[int], None] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One batch -> video uint8 [B, T, H, W, 3] and audio float32 [B, samples]."""
        started = time.perf_counter()
        samples = frames * self.sample_rate // self.fps
        text, mask, priors = self.encode_prompts(captions, seeds, zero_prior="prior" in ablate)
        condition = self.condition(
            text,
            mask,
            priors,
            frames=frames,
            samples=samples,
            guided=guidance != (1, 1),
            negative=None if negatives is None else self.text_encoder(negatives),
            with_bidirectional="bidirectional" not in ablate,
        )
        video_shape = (self.model.config.video_channels, *condition.video_sizes)
        audio_shape = (self.model.config.audio_channels, *condition.audio_sizes)
        video = torch.stack([torch.randn(video_shape, generator=_generator(seed, 1)) for seed in seeds])
        audio = torch.stack([torch.randn(audio_shape, generator=_generator(seed, 2)) for seed in seeds])
        spent["text"] += time.perf_counter() - started

        started = time.perf_counter()
        video, audio = sample_in_order(
            self.model,
            video,
            audio,
            condition,
            steps,
            order=order,
            ratio=float(self.description["sampling"]["timestep_ratio"]),
            guidance=guidance,
            callback=None if report is None else lambda step: report(step.number + 1),
        )
        spent["denoise"] += time.perf_counter() - started

        started = time.perf_counter()
        if not bool(torch.isfinite(video).all() and torch.isfinite(audio).all()):
            raise FailedError("the model produced values that are not finite; check the checkpoint")
        pixels = (self.video_codec.decode(video, frames) + 1) * 127.5
        picture = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
        sound = self.audio_codec.decode(audio, samples, seeds=[s % 2**62 for s in seeds])
        spent["decode"] += time.perf_counter() - started
        return picture.numpy(), sound.numpy()


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


def _generator(seed: int, stream: int) -> torch.Generator:
    """Independent random stream of a clip: 0 priors, 1 video, 2 audio."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _seeds(seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int) -> list[int]:
    if seed is None:
        return [int(s) for s in torch.randint(0, 2**31, (count,), generator=generator)]
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise UsageError(f"{len(seeds)} seeds for {count} prompts; expected one per prompt or a single one")
    if any(not 0 <= s < 2**63 for s in seeds):
        raise UsageError(f"seeds must be between 0 and 2**63 - 1, got {seeds}")
    return seeds


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
