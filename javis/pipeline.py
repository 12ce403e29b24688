"""JavisPipeline: from a prompt to a clip.

>>> from javis import JavisPipeline
>>> clip = JavisPipeline.from_pretrained("demo")("a red ball bounces on the left", seed=1)
>>> clip.save("clip.mp4")

The data flow is that of docs/architecture.md: text and priors once per clip, the denoise loop, the codecs. One class
serves the built-in model and the full-size one; docs/pipeline.md tells what differs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from javis.batches import component_dtype, generate
from javis.best_of import check_best_of, generate_best
from javis.clip_batch import ClipBatch
from javis.clip_stages import Policy
from javis.conditioning import conditioned, negatives
from javis.durations import clip_length
from javis.errors import UsageError
from javis.frame_size import FrameSize
from javis.generation import (
    Ablation,
    check_settings,
    choose_seeds,
    clip_noise,
    clip_size,
    codec_grid,
    full_captions,
    seconds_range,
)
from javis.model.codecs import AudioCodec, VideoCodec
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorEstimator, Priors
from javis.model.text import TextEncoder
from javis.residency import Residency
from javis.sample import Denoiser, Order
from javis.sampler_options import SamplerKeywords
from javis.student import Student
from javis.variants import Variant

if TYPE_CHECKING:
    from javis.decode.stream import TakeFrames

StepCallback = Callable[["JavisPipeline", int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]


class JavisPipeline:
    """Text to audio and video. Build it with :meth:`from_pretrained` or :meth:`with_random_weights`.

    Attributes:
        model, prior, text_encoder, prior_text_encoder, video_codec, audio_codec: the components;
            ``prior_text_encoder`` is None where the priors are estimated from ``text_encoder``'s hidden states.
        description: defaults of clips and sampling, as in ``config.json`` or ``model_index.json``.
        device: where it runs.
        denoiser: stands in for the model in the denoise loop (:mod:`javis.acceleration`); None: the model itself.
        frames_to: takes the frames of each clip while later ones are decoded (:mod:`javis.decode.stream`), or None.
        student: makes clips in few steps (:mod:`javis.student`), if the checkpoint has one; ``model`` is its teacher.
        residency: moves components in and out of the device around the stages, if told to, and notes their peaks.
    """

    def __init__(
        self,
        model: JavisDiT,
        prior: PriorEstimator,
        video_codec: VideoCodec,
        audio_codec: AudioCodec,
        text_encoder: TextEncoder,
        description: dict[str, Any],
        *,
        prior_text_encoder: TextEncoder | None = None,
        folder: Path | None = None,
        device: torch.device | None = None,
        student: Student | None = None,
    ) -> None:
        self.model, self.prior, self.student = model, prior, student
        self.video_codec, self.audio_codec = video_codec, audio_codec
        self.text_encoder, self.prior_text_encoder = text_encoder, prior_text_encoder
        self.description, self.folder = description, folder
        for component in self.components.values():
            if isinstance(component, nn.Module):
                component.eval()
        clip = description["clip"]
        self.fps, self.sample_rate = clip["fps"], int(clip["sample_rate"])
        self.device = next(model.parameters()).device if device is None else device
        self.residency = Residency(self.device)
        self.denoiser: Denoiser | None = None
        self.frames_to: TakeFrames | None = None
        self._cached: dict[str, Any] = {}  # name -> CachedTextEncoder
        self.shows_progress = True

    @property
    def components(self) -> dict[str, Any]:
        """Name -> component, as :class:`javis.residency.Residency` calls them; those that are None are left out."""
        names = ("text_encoder", "prior_text_encoder", "prior", "model", "video_codec", "audio_codec")
        found = {name: part for name in names if (part := getattr(self, name)) is not None}
        return found if self.student is None or self.student.built is None else found | {"student": self.student.built}

    @property
    def frame_size(self) -> FrameSize:
        """Size of the pictures, if no other is asked for."""
        return clip_size(self.description["clip"], None, None, multiple=codec_grid(self.video_codec)[1])

    @property
    def size(self) -> int:
        """Side of the square pictures of the built-in model; the shorter side of others."""
        return min(self.frame_size)

    @property
    def random_weights(self) -> bool:
        """Whether the weights were never trained, so that the clips mean nothing."""
        return bool(self.description.get("random_weights", False))

    # -- loading, saving, moving --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "demo",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        ops: ModelOps | None = None,
        residency: Policy = "all",
        revision: str | None = None,
    ) -> JavisPipeline:
        """Load a checkpoint.

        Args:
            source: a folder with ``model_index.json`` (the full-size pipeline) or with ``config.json`` and
                ``model.safetensors`` (the small one); ``"demo"``, the built-in model; or the hub id of either.
            device: where to run. None: the CPU for the small model; for the full size a GPU if there is one.
            dtype: of model, text encoders and video codec. None: float32 for the small model and on the CPU, else
                bfloat16. The sound codec stays in float32.
            ops: what the model runs on; the kernels of javis by default, ``ModelOps()`` for plain PyTorch.
            residency: "all" components on the device, or only those of the stage that runs: "offload" keeps the others
                in host memory, "staged" on disk (:class:`javis.residency.Residency`).
            revision: of a hub id.

        Raises:
            UsageError: no such checkpoint, missing or corrupt files, weights that do not fit the configuration.
        """
        from javis import components
        from javis.demo_checkpoint import read_demo

        folder = components.resolve(str(source), revision)
        if folder is not None and (folder / components.INDEX).is_file():
            return components.load(cls, folder, device=device, dtype=dtype, ops=ops, residency=residency)
        parts = read_demo(str(source) if folder is None else str(folder), ops or ModelOps.fused())
        pipe = cls(*parts[:-1], student=parts.student)
        if device is not None or dtype is not None:
            pipe.to(device, dtype)
        if residency != "all":
            pipe.set_residency(residency)
        return pipe

    @classmethod
    def with_random_weights(
        cls,
        size: Literal["full", "toy"] = "full",
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        ops: ModelOps | None = None,
        residency: Policy = "all",
    ) -> JavisPipeline:
        """Every component of the full-size pipeline with random weights, without any download.

        For measuring time and memory: clips are noise, and say so (``random_weights``). Components are made on the
        device, in their dtype, one after the other.

        Args:
            size: "full", or "toy": few channels and layers. seed: same seed, same weights (on the same device).
            device, dtype, ops, residency: as in :meth:`from_pretrained`; "staged" needs files and is refused.

        Raises:
            UsageError: an unknown size, or the packages of ``javis[full]`` are missing.
        """
        from javis import components

        return components.with_random_weights(
            cls, size, seed=seed, device=device, dtype=dtype, ops=ops, residency=residency
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a checkpoint folder that :meth:`from_pretrained` reads: all or nothing.

        Raises:
            UsageError: the folder exists and is not empty (``overwrite`` replaces a checkpoint, nothing else).
        """
        from javis import components

        return components.save(self, Path(folder), overwrite=overwrite)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> JavisPipeline:
        """Move all components to a device, and all but the sound codec to a dtype; returns itself."""
        if self.residency.policy != "all":
            raise UsageError("components are moved by the residency; set_residency('all', device) comes first")
        for name, component in self.components.items():
            if isinstance(component, nn.Module):
                # The linear codecs of the small model and the vocoder lose much in bfloat16 and cost little.
                keeps = name == "audio_codec" or ("size" in self.description["clip"] and name == "video_codec")
                component.to(device=device, dtype=None if keeps else dtype)
        self.device = next(self.model.parameters()).device
        self.residency = Residency(self.device)
        for cached in self._cached.values():
            cached.dtype = component_dtype(cached.encoder)  # other hidden states from now on, under other keys
        return self

    def set_residency(self, policy: Policy, device: str | torch.device | None = None) -> None:
        """Which components are on the device: "all", or those of the running stage ("offload", "staged").

        Raises:
            UsageError: "staged" for a pipeline that was not read from a full-size checkpoint folder.
        """
        from javis.components import loader

        residency = Residency(self.device if device is None else device, policy)
        if self.student is not None:
            self.student.forget()
        for name, component in self.components.items():
            if policy == "offload" and isinstance(component, nn.Module):
                component.to("cpu")
            residency.add(name, component, loader(self.folder, name) if policy == "staged" else None)
        self.residency, self.device = residency, residency.device

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Keep components in host memory but for the stage that runs, on a GPU if there is one (diffusers' name)."""
        from javis.components import choose_device

        self.set_residency("offload", choose_device(device))

    def cache_conditions(self, folder: str | os.PathLike[str]) -> None:
        """Keep hidden states of captions in a folder, by prompt, encoder and dtype (javis/condition_cache.py).

        Raises:
            UsageError: the pipeline was not read from a full-size checkpoint folder, or ``folder`` cannot be written.
        """
        from javis.components import cached_encoders

        self._cached = cached_encoders(self, folder)

    def model_of(self, variant: Variant) -> JavisDiT:
        """The model of a variant; that of the student is built when it is first asked for."""
        return self.model if variant == "teacher" or self.student is None else self.student.model(self)

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """``disable=True``: no progress bar (there is one on a terminal, unless ``progress`` is given)."""
        self.shows_progress = not disable

    # -- the parts of a generation ------------------------------------------------------------------------------------

    def captions(self, prompts: Sequence[str], *, negative: bool = False) -> list[str]:
        """Prompts -> captions: cleaned as officially, or in the words of the built-in world.

        Raises:
            UsageError: an empty or overlong prompt, or words the built-in model does not know.
        """
        if "components" in self.description:
            return full_captions(prompts, negative=negative)
        from javis.world import normalize_prompt

        return [normalize_prompt(prompt) for prompt in prompts]

    def frames_of(self, seconds: float, fps: float | None = None) -> int:
        """Whole frames nearest to ``seconds``; the clip lasts exactly ``frames / fps``.

        Raises:
            UsageError: not a number within the checkpoint's limits (0.25 to 4 for the built-in model).
        """
        limits = seconds_range(self.description)
        return clip_length(seconds, self.fps if fps is None else fps, self.sample_rate, limits=limits).frames

    def encode_text(self, captions: Sequence[str], *, for_prior: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, C] and mask bool [B, L] of captions, on the device; from the cache where it has them."""
        name = "prior_text_encoder" if for_prior and self.prior_text_encoder is not None else "text_encoder"
        hidden, mask = self._cached.get(name, getattr(self, name))(list(captions))
        return hidden.to(self.device), mask.to(self.device)

    def estimate_priors(self, text: Tensor, seeds: Sequence[int], *, zero_prior: bool = False) -> Priors:
        """Sampled priors from hidden states [B, L, C]; each sample's noise comes from its own seed."""
        c = self.prior.config
        shape = (c.spatial_token_num + c.temporal_token_num, c.out_dim)
        noise = clip_noise(shape, seeds, 0, self.device)
        with torch.no_grad():
            priors = self.prior.encode(text.to(component_dtype(self.prior)), noise=noise)
        if zero_prior:
            priors = Priors(spatial=torch.zeros_like(priors.spatial), temporal=torch.zeros_like(priors.temporal))
        return priors

    def encode_prompts(
        self, captions: Sequence[str], seeds: Sequence[int], *, zero_prior: bool = False
    ) -> tuple[Tensor, Tensor, Priors]:
        """Caption hidden states, their mask, and sampled priors."""
        text, mask = self.encode_text(captions)
        told = text if self.prior_text_encoder is None else self.encode_text(captions, for_prior=True)[0]
        return text, mask, self.estimate_priors(told, seeds, zero_prior=zero_prior)

    condition = conditioned  # of the prompts, and of the unconditional samples after them: javis/conditioning.py

    # -- all of it ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seconds: float | None = None,
        fps: float | None = None,
        resolution: str | None = None,
        ratio: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        audio_guidance: float | None = None,
        order: Order | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 8,
        ablate: Sequence[Ablation] = (),
        variant: Variant | None = None,
        best_of: int = 1,
        progress: Callable[[int, int], None] | None = None,
        callback_on_step_end: StepCallback | None = None,
        **sampler: Unpack[SamplerKeywords],
    ) -> ClipBatch:
        """Generate one clip per prompt.

        Args:
            prompt: one or several. seconds: length; rounded to whole frames. The built-in model makes 0.25 to 4 s.
            fps: frames per second, and resolution: an official size ("240p", "720p") or WIDTHxHEIGHT in multiples of 8,
                and ratio: height:width of an official size. The built-in model has one of each. None: the checkpoint's.
            steps: evaluations of the model in all. guidance: classifier-free guidance scale, 1 = none.
            audio_guidance: the same of the sound; None: ``guidance`` if that is given, else the checkpoint's.
            order: "together" or "sound_first" (:func:`javis.sample.sample_in_order`); None: the checkpoint's.
            seed: one per prompt, or one number: prompt i gets ``seed + i``. A clip depends on its own seed only, not on
                the batch it is made in. Without seed and generator, seeds are drawn at random.
            generator: draws the seeds, if ``seed`` is not given (diffusers convention); one, or one per prompt.
            negative_prompt: instead of the null caption in the unconditional half.
            batch_size: clips denoised together. ablate: "prior" zeroes the priors, "bidirectional" leaves it out.
            variant: "teacher" or "student"; None: :func:`javis.variants.choose_variant` tells.
            best_of: clips made of each prompt, of which :mod:`javis.best_of` returns the best; the first has the seed.
            progress: called with (steps done, steps in all). callback_on_step_end: called after every step of a batch
                as ``f(pipe, step, timestep, {"video_latents": ..., "audio_latents": ...})``; returned latents go on.
            sampler: solver, schedule, audio_seed and more, see :class:`javis.sampler_options.SamplerKeywords`.

        Raises:
            UsageError: unusable arguments. FailedError: values that are not finite, or out of memory.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UsageError("no prompt was given; expected a text such as 'a red ball bounces on the left'")
        check_best_of(best_of)
        asked = check_settings(
            self.description, grid=codec_grid(self.video_codec), seconds=seconds, fps=fps, resolution=resolution,
            ratio=ratio, steps=steps, guidance=guidance, audio_guidance=audio_guidance, order=order, ablate=ablate,
            batch_size=batch_size, sampler=sampler, variant=variant, negative_prompt=negative_prompt,
            why_no_student=None if self.student is None else self.student.why_not,
        )  # fmt: skip
        seeds = choose_seeds(seed, generator, len(prompts))
        heard = sampler.get("audio_seed")
        make = generate if best_of == 1 else functools.partial(generate_best, best_of)
        return make(
            self, self.captions(prompts), seeds, asked, progress, callback_on_step_end,
            negatives=negatives(self, negative_prompt, len(prompts)),
            audio_negatives=negatives(self, sampler.get("audio_negative_prompt"), len(prompts), "audio "),
            audio_seeds=None if heard is None else choose_seeds(heard, None, len(prompts)),
        )  # fmt: skip
