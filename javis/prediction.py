"""Memory and seconds of every stage of a clip, and what fits into the memory of a card, for ``javis plan``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from javis.clip_stages import STAGES, Policy
from javis.data.sizes import RATIO_NAMES, SIZES
from javis.decode import Batches, VideoDecoder, choose_batches, decode_peak_bytes
from javis.errors import UsageError
from javis.model.video_vae import OpenSoraVideoCodec
from javis.plan_args import Precision
from javis.precision import kept_names, linear_names
from javis.rates import Rates
from javis.stages import ClipSize, Parts, StageTrace, peak_bytes, present, trace

RESERVED = 1e9  # bytes of a card that are left to the CUDA context, the libraries' workspaces and fragmentation
PLENTY = 1e12  # bytes
_SIZES = ("4k", "2k", "1080p", "720p", "480p", "360p", "240p", "144p")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a clip's memory depends on beside its length."""

    residency: Policy = "all"
    precision: Precision = "bf16"
    resolution: str = ""  # as the user would write it

    def words(self, than: Choice) -> str:
        """The options in which this differs from another choice."""
        names = [
            name for name in ("resolution", "precision", "residency") if getattr(self, name) != getattr(than, name)
        ]
        return " ".join(f"--{name} {getattr(self, name)}" for name in names)


class Predictor:
    """Predicts stages, and remembers what it traced.

    Args:
        parts: components in their plain dtype (bfloat16 also where the precision is FP8).
        cpu: the memory is that of a CPU, where convolutions need more.
        keep: layers that stay in bfloat16 where the precision is FP8 (`javis.precision.read_keep`).

    Raises:
        UsageError: a pattern of ``keep`` that matches no layer.
    """

    def __init__(self, parts: Parts, *, cpu: bool = False, keep: Iterable[str] = ()) -> None:
        self.parts, self.cpu = parts, cpu
        self.kept = frozenset(kept_names(parts.model, keep))
        self.weights = parts.weights()
        self._traces: dict[tuple[str, Any], StageTrace] = {}

    def traced(self, clip: ClipSize, stage: str, free: float = PLENTY) -> StageTrace:
        """As :func:`javis.stages.trace`; the video decode in the batches that it takes where ``free`` bytes are."""
        same = replace(clip, steps=1) if stage != "denoise" else clip
        batches = None
        if stage in ("text", "prior"):  # they see the caption alone
            same = replace(same, frames=1, height=8, width=8, samples=1)
        elif stage == "video_decode" and isinstance(self.parts.video_codec, OpenSoraVideoCodec):
            batches = self._batches(clip, free)
            same = replace(same, frames_at_once=batches.frames_at_once, windows_at_once=batches.windows_at_once)
        if (stage, same) not in self._traces:
            self._traces[stage, same] = trace(self.parts, same, [stage], cpu=self.cpu)[stage]
        found = self._traces[stage, same]
        if batches is None or self.cpu:
            return found
        # On a GPU the decode copies its weights into another layout, and bands are not traced.
        peak = decode_peak_bytes(clip.frames, clip.height, clip.width, batches, **self._decoder())
        return replace(found, activations=peak)

    def _decoder(self) -> dict[str, Any]:
        codec = self.parts.video_codec
        return {
            "image": VideoDecoder(codec).shape, "temporal": codec.config.temporal, "dtype": self.parts.dtype,
            "window": codec.config.micro_frame_size or 17,
        }  # fmt: skip

    def _batches(self, clip: ClipSize, free: float) -> Batches:
        device = "cpu" if self.cpu else "cuda"
        return choose_batches(max(0, int(free)), clip.frames, clip.height, clip.width, device=device, **self._decoder())

    def component_bytes(self, precision: Precision) -> dict[str, int]:
        """Bytes of each component's weights."""
        if not precision.startswith("fp8"):
            return self.weights
        saved, model = 0, self.parts.model
        for name in linear_names(model):
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if name not in self.kept:  # one byte for each value, and a float32 scale for each output
                saved += weight.nbytes - weight.numel() - 4 * len(weight)
        return self.weights | {"model": self.weights["model"] - saved}

    def free(self, clip: ClipSize, choice: Choice, room: float | None) -> float:
        """Bytes that the video decode finds free where ``room`` bytes are in all."""
        if room is None:
            return PLENTY
        weights = self.component_bytes(choice.precision)
        held = self.traced(clip, "video_decode").held
        return room - present(weights, "video_decode", choice.residency) - held

    def peaks(self, clip: ClipSize, choice: Choice, room: float | None = None) -> dict[str, int]:
        """Bytes on the device at the worst moment of each stage; the decode adapts to the ``room`` there is."""
        weights, free = self.component_bytes(choice.precision), self.free(clip, choice, room)
        return {s: peak_bytes(s, self.traced(clip, s, free), weights, choice.residency) for s in STAGES if s != "mux"}

    def stages(
        self,
        clip: ClipSize,
        choice: Choice,
        rates: Mapping[str, Rates],
        mux_pixels_per_s: float,
        room: float | None = None,
    ) -> dict[str, dict[str, Any]]:
        """What each stage takes, as json values."""
        found: dict[str, dict[str, Any]] = {}
        weights, free = self.component_bytes(choice.precision), self.free(clip, choice, room)
        for stage, peak in self.peaks(clip, choice, room).items():
            traced = self.traced(clip, stage, free)
            found[stage] = {
                "tflop": traced.flops / 1e12,
                "gb_moved": traced.bytes / 1e9,
                "peak_gb": peak / 1e9,
                "weights_gb": present(weights, stage, choice.residency) / 1e9,
                "held_gb": traced.held / 1e9,
                "activations_gb": traced.activations / 1e9,
                "seconds": rates[stage].seconds(traced.calls, stage),
            }
        found["mux"] = dict.fromkeys(next(iter(found.values())), 0.0) | {"seconds": clip.pixels / mux_pixels_per_s}
        return found


def refuse_what_cannot_fit(
    predictor: Predictor, clip: ClipSize, choice: Choice, gpu_memory_gb: float, smaller: Mapping[str, ClipSize]
) -> None:
    """Nothing, if the clip fits into so much memory.

    Args:
        gpu_memory_gb: of the card, of which `RESERVED` is left free.
        smaller: the same clip at smaller resolutions, largest first.

    Raises:
        UsageError: it does not fit; the message says what would, or that nothing does.
    """
    room = gpu_memory_gb * 1e9 - RESERVED

    def most(clip: ClipSize, choice: Choice) -> tuple[str, int]:
        return max(predictor.peaks(clip, choice, room).items(), key=lambda item: item[1])

    stage, needed = most(clip, choice)
    if needed <= room:
        return
    fitting: list[str] = []
    least = needed
    for other_clip, other in _alternatives(clip, choice, smaller):
        _, bytes_ = most(other_clip, other)
        least = min(least, bytes_)
        covered = any(words in other.words(choice) for words in (text.partition(" (")[0] for text in fitting))
        if bytes_ <= room and not covered:
            fitting.append(f"{other.words(choice)} ({_gb(bytes_)})")
        if len(fitting) == 4:
            break
    detail = predictor.traced(clip, stage, predictor.free(clip, choice, room))
    told = (
        f"{choice.resolution or f'{clip.width}x{clip.height}'} needs {_gb(needed)} in stage {stage} "
        f"({_gb(needed - detail.held - detail.activations)} of weights, {_gb(detail.held + detail.activations)} of "
        f"activations), but a card of {gpu_memory_gb:g} GB has {_gb(max(room, 0))} to give"
    )
    if not fitting:
        raise UsageError(f"{told}; nothing that was tried fits: the least is {_gb(least)}; make a shorter clip")
    raise UsageError(f"{told}; what fits: {', '.join(fitting)}")


def _alternatives(clip: ClipSize, choice: Choice, smaller: Mapping[str, ClipSize]) -> Iterator[tuple[ClipSize, Choice]]:
    """From the least change to the greatest."""
    offload = replace(choice, residency="offload")
    thin = replace(choice, precision="fp8")
    if choice.residency == "all":
        yield clip, offload
    if choice.precision == "bf16":
        yield clip, thin
        if choice.residency == "all":
            yield clip, replace(thin, residency="offload")
    for name, less in smaller.items():
        yield less, replace(choice, resolution=name)
        if choice.residency == "all":
            yield less, replace(offload, resolution=name)


def smaller_sizes(clip: ClipSize, ratio: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Official sizes of this ratio with fewer pixels, largest first: name, (height, width)."""
    name = RATIO_NAMES.get(ratio, ratio)
    for resolution in _SIZES:
        height, width = SIZES[resolution].get(name, SIZES[resolution]["0.56"])
        if height * width < clip.height * clip.width:
            yield resolution, (height, width)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"
