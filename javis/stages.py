"""The stages of a clip, and what each costs: found out on the meta device before anything loads.

:func:`trace` runs the components themselves, without values, under a `javis.ledger.Ledger`: text encoder, prior,
conditioning, one denoising step (times the steps), both decoders. Captions are counted at their full length. The same
code runs on real components (:func:`prepare`), which is how the prediction is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import javis
from javis.calls import Call
from javis.component_specs import SPECS, component_dtypes, configurations
from javis.decode import DecodeOptions, VideoDecoder
from javis.errors import UsageError
from javis.ledger import Ledger, counted_ops
from javis.model.codecs import PatchAudioCodec, PatchVideoCodec, build_codecs
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator
from javis.model.video_vae import OpenSoraVideoCodec
from javis.residency import STAGES, Policy
from javis.sample.euler import sample


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Components on one device, in the dtype they run in. On the meta device they can be traced, elsewhere run.

    Encoders without weights
    are None; an audio codec with values (that of the small model, which inverts spectra) is counted on the host.
    """

    config: JavisDiTConfig
    dtype: torch.dtype
    prior: PriorEstimator
    video_codec: Any
    audio_codec: Any
    text_encoder: nn.Module | None = None
    prior_text_encoder: nn.Module | None = None
    device: str = "meta"

    @cached_property
    def model(self) -> JavisDiT:
        """The model: on the meta device with operations that are counted, elsewhere on the kernels."""
        ops = counted_ops() if self.device == "meta" else ModelOps.fused()
        with torch.device(self.device):
            return JavisDiT(self.config, ops).to(self.dtype).eval().requires_grad_(False)

    def weights(self) -> dict[str, int]:
        """Bytes of each component's parameters and buffers; tied ones count once."""
        named: dict[str, Any] = {name: getattr(self, name) for name in COMPONENTS if name != "model"}
        modules = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
        modules["model"] = self.model
        return {name: nbytes((*m.parameters(), *m.buffers())) for name, m in modules.items()}


COMPONENTS = tuple(dict.fromkeys(name for names in STAGES.values() for name in names))


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """What is made. ``frames`` and ``samples`` are whole windows of the codecs, and those that are kept."""

    frames: int
    height: int
    width: int
    fps: float
    samples: int
    steps: int
    guided: bool = True
    batch: int = 1
    frames_at_once: int = 1  # of the video decode, and windows in time
    windows_at_once: int = 1

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width


@dataclass(frozen=True, kw_only=True)
class StageTrace:
    """What one stage does."""

    calls: tuple[Call, ...]
    activations: int  # bytes: most that is alive of what the stage makes
    held: int  # bytes of earlier stages' results that are alive meanwhile

    @property
    def flops(self) -> int:
        return sum(call.count * call.flops for call in self.calls)

    @property
    def bytes(self) -> int:
        return sum(call.count * call.bytes for call in self.calls)


def official_parts(dtype: torch.dtype = torch.bfloat16) -> Parts:
    """Components of the official size.

    Raises:
        UsageError: the packages of ``javis[full]`` are missing.
    """
    return full_size_parts(configurations("full"), dtype)


def folder_parts(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Parts:
    """Components of a full-size checkpoint folder; only its configurations are read.

    Raises:
        UsageError: a configuration is missing or not usable, or the packages of ``javis[full]`` are missing.
    """
    try:
        return full_size_parts({spec.attribute: spec.read(folder) for spec in SPECS}, dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model {str(folder)!r}: a config.json is not usable ({error}); convert it again") from None


def full_size_parts(configs: Mapping[str, Any], dtype: torch.dtype) -> Parts:
    """Components of the full-size pipeline from their configurations (`javis.component_specs`)."""
    dtypes = component_dtypes(torch.device("meta"), dtype)
    with torch.device("meta"):
        made: dict[str, Any] = {
            spec.attribute: _ready(spec.make(configs[spec.attribute], ModelOps()), dtypes[spec.attribute])
            for spec in SPECS
            if spec.attribute != "model"
        }
    return Parts(config=configs["model"], dtype=dtype, **made)


def checkpoint_parts(model: str) -> Parts:
    """Components of the small model: "demo", or a folder with its ``config.json``. Its text encoder has no weights.

    Raises:
        UsageError: the folder or its configuration is not usable.
    """
    folder = Path(javis.__file__).parent / "weights" / "demo" if model == "demo" else Path(model)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        video, audio = build_codecs(facts["codecs"])
        with torch.device("meta"):
            prior = PriorEstimator(PriorConfig.from_dict(facts["prior"]))
        config = JavisDiTConfig.from_dict(facts["model"])
    except OSError as error:
        raise UsageError(
            f"model {model!r}: {folder.name}/config.json cannot be read ({error.strerror}); expected 'official', "
            "'demo' or a checkpoint folder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model {model!r}: config.json is not usable ({error}); export it again") from None
    return Parts(
        config=config, dtype=torch.float32, prior=prior.eval(), video_codec=video.to("meta"), audio_codec=audio
    )


def parts_of(components: Mapping[str, Any], device: str = "meta") -> Parts:
    """The components of a pipeline once more, each in its own dtype, with no or with fresh weights.

    Args:
        components: as ``JavisPipeline.components``; of the model the configuration counts.
        device: "meta" for tracing.
    """

    def again(name: str) -> Any:
        module = components.get(name)
        if not isinstance(module, nn.Module) or isinstance(module, PatchAudioCodec):
            return module if name == "audio_codec" else None
        kind: Any = type(module)
        with torch.device(device):
            if isinstance(module, PatchVideoCodec) and module.refinement is not None:
                return _ready(PatchVideoCodec(module.config, module.refinement.config), _dtype(module))
            return _ready(kind(module.config), _dtype(module))

    model = components["model"]
    return Parts(
        config=model.config,
        dtype=_dtype(model),
        device=device,
        **{name: again(name) for name in COMPONENTS if name != "model"},
    )


def _dtype(module: nn.Module) -> torch.dtype:
    floats = (t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next(floats, torch.float32)


def _ready(module: nn.Module, dtype: torch.dtype) -> Any:
    return module.to(dtype).eval().requires_grad_(False)


# -- running and tracing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to run."""

    run: Callable[[], object]
    held: int  # bytes of earlier stages' results that are alive meanwhile
    times: int = 1  # that a clip runs it


def trace(
    parts: Parts, clip: ClipSize, stages: Iterable[str] = tuple(STAGES), *, cpu: bool = False
) -> dict[str, StageTrace]:
    """What each stage of a clip does; ``parts`` are on the meta device. ``cpu``: as of `javis.ledger.Ledger`."""
    found = {}
    for name in stages:
        if name not in _STAGES:
            continue
        stage = prepare(parts, clip, name)
        with Ledger(cpu=cpu) as ledger:
            made = stage.run()
        del made
        calls = tuple(replace(call, count=stage.times * call.count) for call in ledger.calls)
        found[name] = StageTrace(calls=calls, activations=ledger.peak_bytes, held=stage.held)
    return found


@torch.no_grad()
def prepare(parts: Parts, clip: ClipSize, stage: str) -> Stage:
    """A stage with inputs that mean nothing, on the device of ``parts``; run it without gradients."""
    return _STAGES[stage](parts, clip)


def _empty(parts: Parts, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0.5, device=parts.device).to(dtype)  # no values that are slow to compute with


def _encode(encoder: nn.Module | None, batch: int, device: str) -> Tensor | None:
    """Hidden states of captions of full length."""
    if encoder is None:
        return None
    inner: Any = encoder
    length = getattr(inner.config, "max_length", None) or inner.config.context_length
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    # The transformers library looks at the values of a mask, so there is none: every token is one.
    hidden = inner.model(input_ids=ids).last_hidden_state if hasattr(inner, "model") else inner.encode(ids)
    return hidden.float()


def _told(parts: Parts, clip: ClipSize) -> list[Tensor]:
    """Results of the text stage: hidden states and mask."""
    shape = clip.batch, parts.config.caption_length
    return [_empty(parts, *shape, parts.config.caption_channels), _empty(parts, *shape, dtype=torch.bool)]


def _text(parts: Parts, clip: ClipSize) -> Stage:
    return Stage(lambda: _encode(parts.text_encoder, clip.batch, parts.device), 0)


def _prior(parts: Parts, clip: ClipSize) -> Stage:
    c, told, dtype = parts.prior.config, _told(parts, clip), _dtype(parts.prior)
    noise = _empty(parts, clip.batch, c.spatial_token_num + c.temporal_token_num, c.out_dim)

    def run() -> object:
        own = _encode(parts.prior_text_encoder, clip.batch, parts.device)
        return parts.prior.encode((told[0] if own is None else own).to(dtype), noise=noise)

    return Stage(run, nbytes(told))


def _condition_inputs(parts: Parts, clip: ClipSize) -> dict[str, Any]:
    c, copies = parts.config, clip.batch * (2 if clip.guided else 1)
    side = 16 * _empty(parts, copies)
    priors = {}
    if c.use_prior:
        priors = {
            "spatial_prior": _empty(parts, copies, c.spatial_prior_len, c.prior_channels),
            "temporal_prior": _empty(parts, copies, c.temporal_prior_len, c.prior_channels),
        }
    return {
        "text": _empty(parts, copies, c.caption_length, c.caption_channels), "fps": side, "height": side, "width": side,
        "video_sizes": parts.video_codec.latent_sizes(clip.frames, clip.height, clip.width),
        "audio_sizes": parts.audio_codec.latent_sizes(clip.samples), **priors,
    }  # fmt: skip


def _condition(parts: Parts, clip: ClipSize) -> Stage:
    told, model = _condition_inputs(parts, clip), parts.model
    return Stage(lambda: model.condition(**told), nbytes((*_told(parts, clip), *_values(told))))


def _latents(parts: Parts, clip: ClipSize) -> tuple[Tensor, Tensor]:
    c = parts.config
    video = parts.video_codec.latent_sizes(clip.frames, clip.height, clip.width)
    audio = parts.audio_codec.latent_sizes(clip.samples)
    return _empty(parts, clip.batch, c.video_channels, *video), _empty(parts, clip.batch, c.audio_channels, *audio)


def _denoise(parts: Parts, clip: ClipSize) -> Stage:
    told, (video, audio), model = _condition_inputs(parts, clip), _latents(parts, clip), parts.model
    with Ledger() if parts.device == "meta" else torch.no_grad():
        condition = model.condition(**told)
    held = nbytes((*_told(parts, clip), *_values(told), *_values(condition), video, audio))
    scale, step = 4.0 if clip.guided else 1.0, torch.full((1,), 500.0)
    return Stage(lambda: sample(model, video, audio, condition, step, guidance=scale), held, clip.steps)


def _video_decode(parts: Parts, clip: ClipSize) -> Stage:
    (video, audio), codec = _latents(parts, clip), parts.video_codec

    def run() -> None:  # as javis.decode.decode_frames
        latents = video.to(_dtype(codec))
        if isinstance(codec, OpenSoraVideoCodec):
            options = DecodeOptions(frames_at_once=clip.frames_at_once, windows_at_once=clip.windows_at_once)
            for one in latents:
                for _ in VideoDecoder(codec, options).stream(one, clip.frames):
                    pass  # finished frames are in main memory
        else:
            pixels = (codec.decode(latents, clip.frames).float() + 1) * 127.5
            pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()

    return Stage(run, nbytes((video, audio)))


def _audio_decode(parts: Parts, clip: ClipSize) -> Stage:
    (video, audio), codec = _latents(parts, clip), parts.audio_codec
    latents = audio if next(iter((*codec.parameters(), *codec.buffers()))).is_meta else torch.zeros(audio.shape)
    return Stage(lambda: codec.decode(latents, clip.samples, seeds=list(range(clip.batch))), nbytes((video, audio)))


_STAGES: dict[str, Callable[[Parts, ClipSize], Stage]] = {
    "text": _text, "prior": _prior, "condition": _condition, "denoise": _denoise, "video_decode": _video_decode,
    "audio_decode": _audio_decode,
}  # fmt: skip


# -- memory -----------------------------------------------------------------------------------------------------------


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors; what several share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _values(tree: Any) -> Iterator[Tensor]:
    """All tensors in dicts, sequences and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from (t for value in tree.values() for t in _values(value))
    elif isinstance(tree, (tuple, list)):
        yield from (t for value in tree for t in _values(value))
    elif is_dataclass(tree):
        yield from (t for field in fields(tree) for t in _values(getattr(tree, field.name)))


def present(weights: Mapping[str, int], stage: str, policy: Policy) -> int:
    """Bytes of the components that are on the device while a stage runs."""
    there = weights if policy == "all" else [name for name in STAGES[stage] if name in weights]
    return sum(weights[name] for name in there)


def peak_bytes(stage: str, traced: StageTrace, weights: Mapping[str, int], policy: Policy) -> int:
    """Most memory on the device while a stage runs: weights that are there, what is held, what the stage makes."""
    return present(weights, stage, policy) + traced.held + traced.activations
