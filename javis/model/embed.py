"""Embeddings: patches, positions, time, sizes, captions and priors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.config import JavisDiTConfig
from javis.model.ops import ModelOps, Rope


def sinusoid(positions: Tensor, size: int, *, max_period: float = 10000.0, cos_first: bool = False) -> Tensor:
    """Sinusoidal embedding [..., size] of positions [...], frequencies ``max_period ** (-2i / size)``.

    Positions in space use [sin, cos], the timestep [cos, sin] (as in DiT).
    """
    half = size // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=positions.device).float() / half)
    angles = positions.to(torch.float32)[..., None] * frequencies
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


def video_positions(grid: tuple[int, int], scale: Tensor, size: int) -> Tensor:
    """2-D sin/cos embedding of a patch grid -> [B, H*W, size].

    Args:
        grid: patches (H, W).
        scale: [B], sqrt(height*width of the frame in pixels) / input_sq_size.

    The coordinates are divided by ``scale`` and stretched by base/H resp. base/W with base = round(sqrt(H*W)), so that
    a frame covers the same coordinate range whatever its aspect. The first half of the channels encodes the column and
    the second half the row (the order the official weights were trained with).
    """
    rows, columns = grid
    base = round(math.sqrt(rows * columns))
    y = torch.arange(rows, device=scale.device).float() / scale[:, None].float() * (base / rows)
    x = torch.arange(columns, device=scale.device).float() / scale[:, None].float() * (base / columns)
    y_emb = sinusoid(y, size // 2)[:, :, None].expand(-1, -1, columns, -1)
    x_emb = sinusoid(x, size // 2)[:, None].expand(-1, rows, -1, -1)
    return torch.cat((x_emb, y_emb), dim=-1).flatten(1, 2)


def clock_positions(frames: int, span: int, size: int, device: torch.device | None = None) -> Tensor:
    """Embedding of time on a clock shared by both modalities -> [frames, 1, size].

    The official model has no absolute time: RoPE is relative and acts within one stream, so bidirectional attention can
    match moments of picture and sound by content only. Here token i of ``frames`` gets the sinusoid of
    ``4 * (i + 0.5) * span / frames``: the same moment has the same embedding in both streams.

    Args:
        span: length of the clip in video tokens (of time), for both modalities.
    """
    moments = (torch.arange(frames, device=device).float() + 0.5) * (4.0 * span / frames)
    return sinusoid(moments, size)[:, None]


def rope_table(length: int, head_size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(cos, sin) of rotary embedding, each [length, head_size / 2], angle ``p / 10000 ** (2i / head_size)``."""
    exponent = torch.arange(0, head_size, 2, device=device).float() / head_size
    angles = torch.arange(length, device=device).float()[:, None] * (10000.0**-exponent)
    return angles.cos(), angles.sin()


def clock_rope(frames: int, places: int, span: int, head_size: int, device: torch.device | None = None) -> Rope:
    """RoPE table of all tokens [frames * places, head_size / 2] on the clock of :func:`clock_positions`."""
    moments = (torch.arange(frames, device=device).float() + 0.5) * (4.0 * span / frames)
    exponent = torch.arange(0, head_size, 2, device=device).float() / head_size
    angles = moments.repeat_interleave(places)[:, None] * (10000.0**-exponent)
    return angles.cos(), angles.sin()


class PatchEmbed(nn.Module):
    """Strided convolution over patches after padding the end of each axis to a whole number of patches."""

    def __init__(self, channels: int, patch: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.patch = patch
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = conv(channels, width, kernel_size=patch, stride=patch)  # type: ignore[arg-type]

    def grid(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Patches along each axis for latents of these sizes."""
        return tuple(-(-n // p) for n, p in zip(sizes, self.patch, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, *sizes] -> tokens [B, product of the grid, width]."""
        sizes = tuple(x.shape[2:])
        grid = self.grid(sizes)
        pad = [p * g - n for n, p, g in zip(sizes, self.patch, grid, strict=True)]
        if any(pad):
            x = F.pad(x, [value for amount in reversed(pad) for value in (0, amount)])
        # A strided convolution with kernel = stride is one matrix product; written as such it is faster on CPU.
        batch, channels = x.shape[:2]
        axes = len(grid)
        split = [batch, channels] + [n for g, p in zip(grid, self.patch, strict=True) for n in (g, p)]
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        patches = x.reshape(split).permute(order).reshape(batch, math.prod(grid), -1)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(tokens: Tensor, grid: tuple[int, ...], patch: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, prod(patch)*C] with channels last in each patch -> [B, C, *sizes], cropped."""
    batch, axes = tokens.shape[0], len(grid)
    x = tokens.reshape(batch, *grid, *patch, -1)
    order = [0, 1 + 2 * axes] + [n for axis in range(axes) for n in (1 + axis, 1 + axes + axis)]
    x = x.permute(order).reshape(batch, -1, *(g * p for g, p in zip(grid, patch, strict=True)))
    crop = (slice(None), slice(None), *(slice(n) for n in sizes))
    return x[crop]


class Linear(nn.Linear):
    """``nn.Linear`` whose product is ``ops.linear``: for the layers that see every token, [B, N, C]."""

    def __init__(self, size_in: int, size_out: int, ops: ModelOps) -> None:
        super().__init__(size_in, size_out)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """fc1, tanh-GELU, fc2; the GELU is part of ``ops.gelu_linear`` where blocks use it."""

    def __init__(self, size_in: int, hidden: int, size_out: int, ops: ModelOps | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size_in, hidden)
        self.fc2 = nn.Linear(hidden, size_out) if ops is None else Linear(hidden, size_out, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """Embeds one number per sample (timestep 0..1000, frames per second): sinusoid of 256, Linear, SiLU, Linear."""

    FREQUENCIES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(self.FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        """[B] -> [B, width]."""
        embedded = sinusoid(value, self.FREQUENCIES, cos_first=True).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(embedded)))


class TokenEmbedder(nn.Module):
    """Projects condition tokens to the model width; ``null`` stands for "no condition" (classifier-free guidance)."""

    def __init__(self, channels: int, tokens: int, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(tokens, channels) / channels**0.5)
        self.proj = Mlp(channels, width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, channels] -> [B, L, width]."""
        return self.proj(tokens)


class Embedders(nn.Module):
    """All embedders of the model (see :class:`javis.model.dit.JavisDiT`)."""

    def __init__(self, config: JavisDiTConfig) -> None:
        super().__init__()
        c, width = config, config.hidden_size
        self.video = PatchEmbed(c.video_channels, c.video_patch, width)
        self.audio = PatchEmbed(c.audio_channels, c.audio_patch, width)
        self.time = ScalarEmbedder(width)
        self.fps = ScalarEmbedder(width)
        self.video_text = TokenEmbedder(c.caption_channels, c.caption_length, width)
        self.audio_text = TokenEmbedder(c.caption_channels, c.caption_length, width)
        # Of distilled students: where a step ends, and the guidance scales of picture and sound.
        self.end = ScalarEmbedder(width) if c.step_input else None
        self.guidance = nn.ModuleList(ScalarEmbedder(width) for _ in range(2)) if c.guidance_input else None
        self.prior: TokenEmbedder | None = None
        if c.use_prior:
            self.prior = TokenEmbedder(c.prior_channels, c.spatial_prior_len + c.temporal_prior_len, width)

    def student_inputs(self) -> list[ScalarEmbedder]:
        """The embedders that only a distilled student has; zero at first, so that it begins as its teacher."""
        return [m for m in (self.end, *(self.guidance or ())) if isinstance(m, ScalarEmbedder)]

    def guidance_scales(self, scales: Tensor) -> Tensor:
        """Guidance scales [B, 2] of picture and sound -> [B, width]; a hundredth of a scale is the finest step."""
        assert self.guidance is not None
        return self.guidance[0](scales[:, 0] * 100) + self.guidance[1](scales[:, 1] * 100)


def checked_captions(text: Tensor, mask: Tensor | None, channels: int) -> tuple[Tensor, Tensor | None]:
    """Captions without what is masked in all of them, and the mask that is left.

    Args:
        text: [B, L, channels]; mask: [B, L], nonzero = valid token, or None: all are valid.

    Returns:
        [B, at most L, channels] and bool [B, at most L], or None if all tokens that are left are valid.

    Raises:
        ValueError: shapes that do not fit, or a caption without a valid token.
    """
    if text.ndim != 3 or text.shape[-1] != channels:
        raise ValueError(f"text must be [B, L, {channels}], got {list(text.shape)}")
    if mask is None:
        return text, None
    if mask.shape != text.shape[:2]:
        raise ValueError(f"text_mask {list(mask.shape)} does not fit text {list(text.shape)}")
    mask = mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a caption has no valid token: text_mask must keep at least one token per sample")
    if torch.is_grad_enabled():  # training keeps its shapes, for torch.compile
        return text, mask
    # What lies behind the longest caption is masked in every step; without it nothing changes but the cost.
    longest = int(mask.any(dim=0).nonzero().max()) + 1
    text, mask = text[:, :longest], mask[:, :longest]
    return text, None if bool(mask.all()) else mask
