"""Triton kernel of flow_update: both modalities in one launch.

The first programs work on video, the others on audio; each on one block of one sample, so that dt is one scalar. Within
a sample the latents are the beginning of the velocity: the channels that do not count come last.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.triton_impl import rounded
from javis.kernels.triton_support import AotSpec

# 8 values a thread of 4 warps: one 16-byte access in bfloat16. A 512x512 clip has 246 k values of video and 27 k of
# audio: small blocks, which spread them over the chip, matter more than long ones.
BLOCK = 1024


@triton.jit
def _update(
    z_ptr, v_ptr, out_ptr, mask_ptr, dt, guidance, b, batch, block, size, v_size, frames, places,
    GUIDED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(z_ptr + b * size + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + b * v_size + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(v_ptr + (batch + b) * v_size + at, mask=inside, other=0.0).to(tl.float32)
        v = unconditional + guidance * (v - unconditional)
    moved = rounded(z.to(tl.float32) + v * dt, out_ptr.dtype.element_ty)
    if MASKED:
        frame = (at // places) % frames
        active = tl.load(mask_ptr + b * frames + frame, mask=inside, other=0) != 0
        moved = tl.where(active, moved, z)
    tl.store(out_ptr + b * size + at, moved, mask=inside)


@triton.jit
def flow_update_kernel(
    video_ptr, audio_ptr, video_v_ptr, audio_v_ptr, dt_ptr, video_mask_ptr, audio_mask_ptr,
    video_out_ptr, audio_out_ptr,
    guidance_video, guidance_audio, dt_stride, batch,
    video_blocks, video_size, video_v_size, video_frames, video_places,
    audio_blocks, audio_size, audio_v_size, audio_frames, audio_places,
    VIDEO_GUIDED: tl.constexpr, AUDIO_GUIDED: tl.constexpr,
    VIDEO_MASKED: tl.constexpr, AUDIO_MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < batch * video_blocks:
        b = (pid // video_blocks).to(tl.int64)
        dt = tl.load(dt_ptr + b * dt_stride)
        _update(
            video_ptr, video_v_ptr, video_out_ptr, video_mask_ptr, dt, guidance_video, b, batch, pid % video_blocks,
            video_size, video_v_size, video_frames, video_places, VIDEO_GUIDED, VIDEO_MASKED, BLOCK,
        )  # fmt: skip
    else:
        pid -= batch * video_blocks
        b = (pid // audio_blocks).to(tl.int64)
        dt = tl.load(dt_ptr + b * dt_stride)
        _update(
            audio_ptr, audio_v_ptr, audio_out_ptr, audio_mask_ptr, dt, guidance_audio, b, batch, pid % audio_blocks,
            audio_size, audio_v_size, audio_frames, audio_places, AUDIO_GUIDED, AUDIO_MASKED, BLOCK,
        )  # fmt: skip


def _sizes(z: Tensor, velocity: Tensor) -> tuple[int, int, int, int, int]:
    """Blocks and values of a sample, values of a sample's velocity, frames, places in a frame."""
    size, frames = z[0].numel(), z.shape[2]
    places = z.shape[3:].numel()
    return triton.cdiv(size, BLOCK), size, velocity.shape[1] * frames * places, frames, places


def flow_update(
    video: Tensor,
    audio: Tensor,
    video_velocity: Tensor,
    audio_velocity: Tensor,
    dt: Tensor,
    guidance_video: float,
    guidance_audio: float,
    video_mask: Tensor | None,
    audio_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """javis::flow_update."""
    video_out, audio_out = video.new_empty(video.shape), audio.new_empty(audio.shape)
    batch = video.shape[0]
    if batch == 0:
        return video_out, audio_out
    video_sizes, audio_sizes = _sizes(video, video_velocity), _sizes(audio, audio_velocity)
    programs = batch * (video_sizes[0] + audio_sizes[0])
    if programs == 0:
        return video_out, audio_out
    flow_update_kernel[(programs,)](
        video.contiguous(), audio.contiguous(), video_velocity.contiguous(), audio_velocity.contiguous(),
        dt.contiguous(), None if video_mask is None else video_mask.contiguous(),
        None if audio_mask is None else audio_mask.contiguous(), video_out, audio_out,
        guidance_video, guidance_audio, dt.ndim, batch, *video_sizes, *audio_sizes,
        VIDEO_GUIDED=video_velocity.shape[0] != batch, AUDIO_GUIDED=audio_velocity.shape[0] != batch,
        VIDEO_MASKED=video_mask is not None, AUDIO_MASKED=audio_mask is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return video_out, audio_out


def aot_specs() -> list[AotSpec]:
    """Float32 latents and bfloat16 velocities, as in the full-size model, with guidance."""
    specs = []
    sizes = ("blocks", "size", "v_size", "frames", "places")
    for masked in (False, True):
        signature = {"video_ptr": "*fp32", "audio_ptr": "*fp32", "video_v_ptr": "*bf16", "audio_v_ptr": "*bf16"}
        mask = "*i1" if masked else "constexpr"
        signature |= {"dt_ptr": "*fp32", "video_mask_ptr": mask, "audio_mask_ptr": mask}
        signature |= {"video_out_ptr": "*fp32", "audio_out_ptr": "*fp32"}
        signature |= {"guidance_video": "fp32", "guidance_audio": "fp32", "dt_stride": "i32", "batch": "i32"}
        signature |= {f"{modality}_{size}": "i32" for modality in ("video", "audio") for size in sizes}
        constants: dict[str, Any] = {
            "VIDEO_GUIDED": True,
            "AUDIO_GUIDED": True,
            "VIDEO_MASKED": masked,
            "AUDIO_MASKED": masked,
        }
        constants |= {"BLOCK": BLOCK}
        if not masked:
            constants |= {"video_mask_ptr": None, "audio_mask_ptr": None}
        specs.append(
            AotSpec(
                name=f"guided{' masked' if masked else ''} fp32 bf16",
                kernel=flow_update_kernel,
                signature=signature | {name: "constexpr" for name in constants},
                constants=constants,
                num_warps=4,
                aligned=(
                    "video_ptr", "audio_ptr", "video_v_ptr", "audio_v_ptr", "video_out_ptr", "audio_out_ptr",
                    "video_size", "video_v_size", "audio_size", "audio_v_size",
                ),
            )
        )  # fmt: skip
    return specs
