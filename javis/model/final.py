"""What comes after the layers of JavisDiT: the final layers, and the velocity of a predicted sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.config import JavisDiTConfig
from javis.model.ops import ModelOps

MIN_NOISE_SHARE = 0.05


def velocity_of_sample(out: Tensor, x_t: Tensor, timestep: Tensor, sigma_data: float = 0.0) -> Tensor:
    """Velocity from a predicted clean sample: ``x - noise = (x - x_t) / s`` with s = t/1000, at least 0.05.

    A token that holds more values than the model is wide cannot carry its own noise through the residual stream, which
    a predicted velocity needs; the clean sample has few degrees of freedom (Li & He, arXiv 2511.13720). But neither
    does the last detail of the sample fit through. With ``sigma_data`` > 0 it passes by the network, as in EDM (Karras
    et al., arXiv 2206.00364, eq. 7, with noise level s / (1 - s) on x_t / (1 - s)):

        x = (c x_t + s^2 out) / d,    c = sigma_data^2 (1 - s),    d = sigma_data^2 (1 - s)^2 + s^2

    which is the most likely x if ``out`` has Gaussian errors of variance ``sigma_data^2``, given x_t. Channels beyond
    those of ``x_t`` (pred_sigma) pass through.
    """
    share = (timestep.float() / 1000).clamp(min=MIN_NOISE_SHARE).view(-1, *[1] * (out.ndim - 1))
    channels, variance = x_t.shape[1], sigma_data**2
    # (x - x_t) / s, with the s that both terms share divided out by hand
    scale = variance * (1 - share) ** 2 + share**2
    velocity = (share * out[:, :channels].float() + (variance * (1 - share) - share) * x_t.float()) / scale
    return torch.cat((velocity, out[:, channels:].float()), dim=1) if out.shape[1] > channels else velocity


class FinalLayer(nn.Module):
    """Modulate by the time embedding itself and project to patches.

    Parity: a clean frame (mask False) is modulated twice, first as at timestep t and then, from that result, as at
    timestep 0. Trained weights depend on it.
    """

    def __init__(self, config: JavisDiTConfig, ops: ModelOps, size_out: int) -> None:
        super().__init__()
        self.ops = ops
        # A predicted sample is divided by the share of noise, which multiplies rounding errors: keep it in float32.
        self.wide = config.prediction == "sample"
        self.modulation = nn.Parameter(torch.randn(2, config.hidden_size) / config.hidden_size**0.5)
        self.linear = nn.Linear(config.hidden_size, size_out)

    def forward(self, x: Tensor, time: Tensor, time0: Tensor | None, frame_mask: Tensor | None) -> Tensor:
        """x [B, N, C], time [B, C] -> [B, N, patch * channels]."""
        shift, scale = (self.modulation + time[:, None]).unbind(1)
        y = self.ops.ada_layer_norm(x, shift, scale)
        if frame_mask is not None and time0 is not None:
            shift0, scale0 = (self.modulation + time0[:, None]).unbind(1)
            twice = self.ops.ada_layer_norm(y, shift0, scale0)
            frames = frame_mask.shape[1]
            keep = frame_mask[:, :, None, None]
            y = torch.where(keep, y.unflatten(1, (frames, -1)), twice.unflatten(1, (frames, -1))).flatten(1, 2)
        if not self.wide:
            return self.linear(y)
        with torch.autocast("cpu" if y.is_meta else y.device.type, enabled=False):
            bias = None if self.linear.bias is None else self.linear.bias.float()
            return F.linear(y.float(), self.linear.weight.float(), bias)


__all__ = ["FinalLayer", "velocity_of_sample"]
