"""Condition masks: which latent frames are given and which are to be generated.

Masks are float, one value per latent frame: 1 = generate, 0 = given, between = edit from that share of noise.
A mask strategy is text, one or more groups joined by ``;``, each with seven fields joined by ``,``:

    loop, reference, reference start, target start, length, edit ratio, modality

with modality 0 = both, 1 = video, 2 = audio, 3 = image and sound to video. Starts and lengths count latent frames of
the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError

BOTH, VIDEO, AUDIO, IMAGE_AND_SOUND = range(4)
FIELDS = ("loop", "reference", "reference start", "target start", "length", "edit ratio", "modality")
DEFAULTS = ("0", "0", "0", "0", "1", "0")  # of the fields of a video-only strategy; the modality has none


class MaskGroup(NamedTuple):
    """One parsed group of a mask strategy."""

    loop: int  # generation loop in which it applies
    reference: int  # index into the references of the sample
    reference_start: int  # video latent frames; negative counts from the end
    target_start: int  # likewise
    length: int  # video latent frames; -1: all (for audio alone any value <= 0)
    edit_ratio: float  # value the mask takes, 0 = keep as given
    modality: int = BOTH


class Reference(NamedTuple):
    """Latents of one reference clip: video [C, T, H, W], audio [C, Ta, M]; None where it has none."""

    video: Tensor | None = None
    audio: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MaskedLatents:
    """Latents with the references written in, and their masks."""

    video: Tensor  # [B, C, T, H, W]
    audio: Tensor  # [B, C, Ta, M]
    video_mask: Tensor  # float [B, T]
    audio_mask: Tensor  # float [B, Ta]


def parse_mask_strategy(text: str, fields: int = 7) -> list[MaskGroup]:
    """Parse a mask strategy; an empty string gives no groups.

    Args:
        text: see the top of this module.
        fields: 7, all of which must be given, or 6 for a video-only strategy, whose last fields may be left out.
    """
    if fields not in (6, 7):
        raise ValueError(f"a mask strategy has 6 or 7 fields, got {fields}")
    groups = []
    for group in text.split(";") if text else []:
        values = group.split(",")
        fewest = 1 if fields == 6 else 7
        if not fewest <= len(values) <= fields:
            expected = "7 numbers" if fields == 7 else "1 to 6 numbers"
            raise UsageError(
                f"mask strategy {group!r} has {len(values)} fields; expected {expected}: {','.join(FIELDS[:fields])}"
            )
        values += DEFAULTS[len(values) :]
        try:
            loop, reference, reference_start, target_start, length = (int(v) for v in values[:5])
            ratio, modality = float(values[5]), int(values[6]) if fields == 7 else BOTH
        except ValueError as error:
            raise UsageError(f"mask strategy {group!r}: {error}; all fields are whole numbers but the 6th") from error
        if not 0 <= ratio <= 1:
            raise UsageError(f"mask strategy {group!r}: the edit ratio {ratio} is not within 0..1")
        if modality not in (BOTH, VIDEO, AUDIO, IMAGE_AND_SOUND):
            raise UsageError(f"mask strategy {group!r}: modality {modality} is none of 0, 1, 2, 3")
        groups.append(MaskGroup(loop, reference, reference_start, target_start, length, ratio, modality))
    return groups


def nearest_chunk_start(value: int, chunk: int, length: int) -> int:
    """The multiple of ``chunk`` nearest to ``value`` (a tie goes down) that starts a whole chunk within ``length``."""
    index, rest = divmod(value, chunk)
    if rest > chunk / 2 and index < length // chunk - 1:
        index += 1
    return index * chunk


def audio_frames_per_video_frame(fps: float) -> float:
    """Audio latent frames per video latent frame at official sizes: 5 latents hold 17 frames, 40 ms an audio latent."""
    return 1 / 5 * 17 / fps / 0.01 / 4


def apply_mask_strategies(
    video: Tensor,
    audio: Tensor,
    references: Sequence[Sequence[Reference]],
    strategies: Sequence[str],
    *,
    audio_per_video: float,
    loop: int = 0,
    align: int | None = None,
) -> MaskedLatents | None:
    """Write reference latents into the starting latents and mask them, sample by sample.

    Args:
        video, audio: starting latents, [B, C, T, H, W] and [B, C, Ta, M]; not changed.
        references: for each sample its reference clips.
        strategies: for each sample its mask strategy, possibly empty.
        audio_per_video: audio latent frames per video latent frame, see :func:`audio_frames_per_video_frame`.
        loop: current generation loop; groups of other loops do nothing.
        align: move video starts to multiples of this many latent frames (5: the chunks of the video VAE).

    Returns:
        None if ``strategies`` is empty (nothing is conditioned), else new latents and masks.

    The audio part of modality 0 follows the video part after the latter was resolved and clipped. In modality 2 starts
    count video frames too, but negative ones are Python slices of the audio latents, as the official code has it.
    """
    if not strategies:
        return None
    if len(strategies) != len(video) or len(references) != len(video):
        raise ValueError(
            f"{len(video)} samples, but {len(strategies)} strategies and {len(references)} reference lists"
        )
    video, audio = video.clone(), audio.clone()
    video_mask = torch.ones(len(video), video.shape[2], device=video.device)
    audio_mask = torch.ones(len(audio), audio.shape[2], device=audio.device)
    for i, strategy in enumerate(strategies):
        for group in parse_mask_strategy(strategy):
            if group.loop != loop:
                continue
            if not -len(references[i]) <= group.reference < len(references[i]):
                raise UsageError(
                    f"mask strategy {strategy!r} names reference {group.reference}; sample {i} has {len(references[i])}"
                )
            _apply_group(
                group, references[i][group.reference], video[i], audio[i], video_mask[i], audio_mask[i],
                audio_per_video, align,
            )  # fmt: skip
    return MaskedLatents(video=video, audio=audio, video_mask=video_mask, audio_mask=audio_mask)


def _apply_group(
    group: MaskGroup,
    reference: Reference,
    video: Tensor,
    audio: Tensor,
    video_mask: Tensor,
    audio_mask: Tensor,
    audio_per_video: float,
    align: int | None,
) -> None:
    """Apply one group to one sample, in place: video [C, T, H, W], audio [C, Ta, M], masks [T] and [Ta]."""
    ref_start, start, length = group.reference_start, group.target_start, group.length
    if group.modality != AUDIO:
        ref = _required(reference.video, "video", group)
        total, given = video.shape[1], ref.shape[1]
        length = total if length == -1 else length
        ref_start = ref_start + given if ref_start < 0 else ref_start
        start = start + total if start < 0 else start
        if align:
            ref_start = nearest_chunk_start(ref_start, align, given)
            start = nearest_chunk_start(start, align, total)
        length = min(length, total - start, given - ref_start)
        _write(video, video_mask, ref, start, ref_start, length, group)
    if group.modality == IMAGE_AND_SOUND:
        ref = _required(reference.audio, "audio", group)
        length = min(audio.shape[1], ref.shape[1])
        audio[:, :length] = ref[:, :length]
        audio_mask[:] = 0
    elif group.modality in (BOTH, AUDIO):
        ref = _required(reference.audio, "audio", group)
        total, given = audio.shape[1], ref.shape[1]
        ref_start, start = int(ref_start * audio_per_video), int(start * audio_per_video)
        length = total if group.modality == AUDIO and length <= 0 else int(length * audio_per_video)
        length = min(length, total - start, given - ref_start)
        _write(audio, audio_mask, ref, start, ref_start, length, group)


def _required(latents: Tensor | None, kind: str, group: MaskGroup) -> Tensor:
    if latents is None:
        raise UsageError(f"mask strategy {group} needs the {kind} of reference {group.reference}, which has none")
    return latents


def _write(
    latents: Tensor, mask: Tensor, ref: Tensor, start: int, ref_start: int, length: int, group: MaskGroup
) -> None:
    target, source = latents[:, start : start + length], ref[:, ref_start : ref_start + length]
    if length < 0 or target.shape != source.shape:
        raise UsageError(
            f"mask strategy {group}: {source.shape[1]} reference frames do not fit the {target.shape[1]} of the clip"
        )
    target.copy_(source)
    mask[start : start + length] = group.edit_ratio


def training_audio_masks(video_masks: Tensor, names: Sequence[str], audio_length: int) -> Tensor:
    """Audio masks that belong to the video masks of a training batch.

    Args:
        video_masks: bool [B, T], True = noisy.
        names: mask type of each sample, such as "quarter_head", "random", "image_tail", "video_to_audio".
        audio_length: Ta.

    Returns:
        bool [B, Ta]: the video mask at the nearest frame, except that sound given with an image
        ("sound_image_animate") and "audio_to_video" give all of the audio, while any other "image..." type and
        "video_to_audio" give none of it.
    """
    if len(names) != len(video_masks):
        raise ValueError(f"{len(video_masks)} video masks, but {len(names)} mask types")
    masks = F.interpolate(video_masks[:, None].float(), size=audio_length, mode="nearest")[:, 0] > 0.5
    for mask, name in zip(masks, names, strict=True):
        if name in ("sound_image_animate", "audio_to_video"):
            mask.fill_(False)
        elif "image" in name or name == "video_to_audio":
            mask.fill_(True)
    return masks
