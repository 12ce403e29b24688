"""The image decoder as a list of steps, read from diffusers' `AutoencoderKL`, and its execution on whole frames.

Read in this order: `ImageDecoderShape` (what is built), `prepare` (weights in the layout and dtype of the decode),
`decode_whole` (all of it on one micro-batch). `javis/decode/tiled.py` runs the same steps in bands of rows.

The steps of Stable Diffusion's decoder, to which Open-Sora's VAE 1.2 adds the time: convolution to the widest level,
residual block, attention, residual block; at each level three residual blocks and, but for the last, an upsampling;
group norm, SiLU, convolution to RGB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.decode.ops import NormSilu, attention, fused_upsample, placed, plain_upsample, upsample_kernel
from javis.errors import UsageError

Upsampling = Literal["fused", "plain"]


@dataclass(frozen=True, kw_only=True)
class ImageDecoderShape:
    """Sizes of the image decoder; the defaults are those of Stable Diffusion's VAE, which Open-Sora uses."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of each level, from full size down
    layers: int = 2  # residual blocks of a level, less one
    latent_channels: int = 4
    out_channels: int = 3
    groups: int = 32
    middle_attention: bool = True

    @property
    def space_factor(self) -> int:
        """Pixels per latent along each side, 8 officially."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageDecoderShape:
        """From the configuration of an `AutoencoderKL`.

        Raises:
            UsageError: an architecture that this decoder does not run.
        """
        blocks, activation = set(config["up_block_types"]), config.get("act_fn", "silu")
        if blocks != {"UpDecoderBlock2D"} or activation != "silu":
            raise UsageError(
                f"the fast decoder runs UpDecoderBlock2D with silu, got {sorted(blocks)} with {activation}; decode "
                "with the library instead"
            )
        return cls(
            widths=tuple(config["block_out_channels"]),
            layers=config["layers_per_block"],
            latent_channels=config["latent_channels"],
            out_channels=config["out_channels"],
            groups=config["norm_num_groups"],
            middle_attention=config.get("mid_block_add_attention", True),
        )


@dataclass(frozen=True)
class Norm:
    """A group norm; weight and bias [C]."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    @property
    def arguments(self) -> tuple[int, Tensor, Tensor, float]:
        """As `NormSilu` takes them after x."""
        return self.groups, self.weight, self.bias, self.eps


@dataclass(frozen=True)
class Conv:
    """A convolution with stride 1 that keeps the size."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class ResBlock:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution on x where the width changes."""

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None


@dataclass(frozen=True)
class Attention:
    """x + out(attention(norm(x))) over all places of a frame, one head."""

    norm: Norm
    qkv: tuple[Tensor, Tensor]  # weight [3 C, C] and bias
    out: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Upsample:
    """2x nearest neighbour, then 3x3; ``weight`` is that of `fused_upsample` or of `plain_upsample`."""

    weight: Tensor
    bias: Tensor | None
    fused: bool


@dataclass(frozen=True)
class Output:
    """Group norm, SiLU, convolution to RGB."""

    norm: Norm
    conv: Conv


Step: TypeAlias = Conv | ResBlock | Attention | Upsample | Output


def prepare(vae: nn.Module, dtype: torch.dtype, *, upsampling: Upsampling = "fused") -> list[Step]:
    """The steps of diffusers' ``AutoencoderKL`` ``vae``, from ``post_quant_conv`` on, with weights in ``dtype``,
    laid out for the device (`placed`). They may be the module's own or copies of them.

    Raises:
        UsageError: an architecture that `ImageDecoderShape` does not describe.
    """
    ImageDecoderShape.from_config(vae.config)  # type: ignore[arg-type]
    decoder: Any = vae.decoder

    def conv(module: nn.Conv2d) -> Conv:
        return Conv(placed(module.weight, dtype), None if module.bias is None else module.bias.detach().to(dtype))

    def norm(module: nn.GroupNorm) -> Norm:
        return Norm(module.num_groups, module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)

    def res_block(block: Any) -> ResBlock:
        scale = getattr(block, "output_scale_factor", 1.0)
        if scale != 1.0 or block.time_emb_proj is not None:
            raise UsageError("the fast decoder runs residual blocks without time embedding and output scale")
        shortcut = None if block.conv_shortcut is None else conv(block.conv_shortcut)
        return ResBlock(norm(block.norm1), conv(block.conv1), norm(block.norm2), conv(block.conv2), shortcut)

    def linear(*modules: nn.Linear) -> tuple[Tensor, Tensor]:
        weights = torch.cat([module.weight.detach() for module in modules]).to(dtype)
        return weights, torch.cat([module.bias.detach() for module in modules]).to(dtype)

    def upsample(module: nn.Conv2d) -> Upsample:
        fused = upsampling == "fused"
        # Sums of float32 weights are rounded once, to the dtype of the decode.
        weight = upsample_kernel(module.weight.detach().double()) if fused else module.weight
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return Upsample(placed(weight, dtype), bias, fused)

    middle = decoder.mid_block
    steps: list[Step] = [] if vae.post_quant_conv is None else [conv(vae.post_quant_conv)]  # type: ignore[arg-type]
    steps += [conv(decoder.conv_in), res_block(middle.resnets[0])]
    for attend, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attend is not None:
            if attend.heads != 1 or attend.rescale_output_factor != 1 or not attend.residual_connection:
                raise UsageError("the fast decoder runs attention with one head and a plain residual")
            qkv = linear(attend.to_q, attend.to_k, attend.to_v)
            steps.append(Attention(norm(attend.group_norm), qkv, linear(attend.to_out[0])))
        steps.append(res_block(block))
    for level in decoder.up_blocks:
        steps += [res_block(block) for block in level.resnets]
        steps += [upsample(module.conv) for module in level.upsamplers or ()]
    return [*steps, Output(norm(decoder.conv_norm_out), conv(decoder.conv_out))]


def run_conv(x: Tensor, conv: Conv) -> Tensor:
    """The convolution, size kept."""
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)


def run_step(step: Step, x: Tensor, norm_silu: NormSilu) -> Tensor:
    """One step on whole frames. ``x`` [N, C, H, W] channels-last may be overwritten by the result.

    What is not needed any more is freed at once: `javis.decode.work.step_peak` counts the values alive at each point.
    """
    if isinstance(step, Conv):
        return run_conv(x, step)
    if isinstance(step, Upsample):
        run = fused_upsample if step.fused else plain_upsample
        return run(x, step.weight, step.bias)
    if isinstance(step, Attention):
        y = F.group_norm(x, step.norm.groups, step.norm.weight, step.norm.bias, step.norm.eps)
        return x.add_(attention(y, step.qkv, step.out))
    if isinstance(step, Output):
        return run_conv(norm_silu(x, *step.norm.arguments), step.conv)
    y = norm_silu(x, *step.norm1.arguments)
    h = run_conv(y, step.conv1)
    del y
    y = norm_silu(h, *step.norm2.arguments)
    del h
    h = run_conv(y, step.conv2)
    del y
    return x.add_(h) if step.shortcut is None else h.add_(run_conv(x, step.shortcut))


@torch.no_grad()
def decode_whole(steps: list[Step], features: Tensor, norm_silu: NormSilu) -> Tensor:
    """Features [N, C, h, w] of the image VAE (not scaled) -> frames [N, 3, H, W] in the dtype of the weights."""
    first = steps[0]
    assert isinstance(first, Conv)
    x = features.to(first.weight.dtype, memory_format=torch.channels_last)
    for step in steps:  # the first one, a convolution, does not write into its input
        x = run_step(step, x, norm_silu)
    return x
