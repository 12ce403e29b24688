"""I3D (Carreira and Zisserman, arXiv 1705.07750) with the 400 classes of Kinetics: the features of FVD and KVD.

Inception-v1 with every filter inflated in time, under the names of the public ``i3d_pretrained_400.pt`` (those of
pytorch-i3d). The embedding is the 400 logits. Padding is TensorFlow's "same": what is odd goes to the end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.eval.extractors.base import Extractor
from javis.eval.extractors.pictures import as_pixels, as_rgb, letterboxed, spread
from javis.eval.extractors.weights import load_weights
from javis.eval.metrics.protocol import MetricProtocol, is_official

FRAMES, SIZE = 16, 224
_TRIPLE = tuple[int, int, int]
# Widths: 1x1, then 1x1 and 3x3 twice, then behind the pool.
MIXED: dict[str, tuple[int, ...]] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


def same_padded(x: Tensor, kernel: _TRIPLE, stride: _TRIPLE) -> Tensor:
    """[B, C, T, H, W] padded with zeros so that a window of ``kernel`` every ``stride`` gives ceil(size / stride)."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def same_max_pool(x: Tensor, kernel: _TRIPLE, stride: _TRIPLE) -> Tensor:
    """Largest value of each window; the padding takes part as zeros, and all values behind a ReLU are >= 0."""
    return F.max_pool3d(same_padded(x, kernel, stride), kernel, stride)


class Unit3D(nn.Module):
    """Convolution, batch norm (eps 1e-3) and ReLU; or a convolution with a bias alone."""

    def __init__(
        self, channels: int, out: int, kernel: _TRIPLE = (1, 1, 1), stride: _TRIPLE = (1, 1, 1), *, plain: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(same_padded(x, self.kernel, self.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class Mixed(nn.Module):
    """Four branches side by side: 1x1x1; 3x3x3 twice; a pool."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit3D(channels, widths[0])
        self.b1a = Unit3D(channels, widths[1])
        self.b1b = Unit3D(widths[1], widths[2], (3, 3, 3))
        self.b2a = Unit3D(channels, widths[3])
        self.b2b = Unit3D(widths[3], widths[4], (3, 3, 3))
        self.b3b = Unit3D(channels, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = same_max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)), dim=1)


class I3D(nn.Module):
    """Frames [B, 3, T, 224, 224] in -1..1, T >= 9 -> logits [B, classes].

    Args:
        classes: of the last layer.
        divide: every other width is divided by it; 1 is the public size, 8 one for tests.
    """

    def __init__(self, classes: int = 400, divide: int = 1) -> None:
        super().__init__()
        stem, wide = 64 // divide, 192 // divide
        self.Conv3d_1a_7x7 = Unit3D(3, stem, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(stem, stem)
        self.Conv3d_2c_3x3 = Unit3D(stem, wide, (3, 3, 3))
        channels = wide
        for name, sizes in MIXED.items():
            widths = tuple(size // divide for size in sizes)
            self.add_module(f"Mixed_{name}", Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Unit3D(channels, classes, plain=True)

    def forward(self, x: Tensor) -> Tensor:
        x = same_max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = same_max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            x = self.get_submodule(f"Mixed_{name}")(x)
            if name == "3c":
                x = same_max_pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "4f":
                x = same_max_pool(x, (2, 2, 2), (2, 2, 2))
        pooled = F.avg_pool3d(x, (2, *x.shape[3:]), stride=1)  # two moments, the whole picture
        return self.logits(pooled).mean(dim=(2, 3, 4))


class I3DExtractor(Extractor):
    """[1, 400] of 16 frames spread over the clip, letterboxed to 224 x 224.

    ``official``: pixels in 0..1 instead of -1..1, as JavisBench feeds them (a conversion there is made for -1..1 and
    gets 0..1). Its cached features of real clips are such; compare with them under the official protocol only.
    """

    name = "i3d"
    modalities = frozenset({"video"})

    def __init__(self, model: I3D, weights_hash: str, device: str, protocol: MetricProtocol) -> None:
        self.model, self.weights_hash, self.device = model, weights_hash, device
        self.official = is_official(protocol)

    def embed_video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        frames = as_rgb(frames)
        pixels = letterboxed(as_pixels(frames[spread(len(frames), FRAMES)]), SIZE)
        if self.official:
            pixels = ((pixels + 1.0) * 127.5).clamp(0, 255).to(torch.uint8).float() / 255.0
        with torch.inference_mode():
            clip = (pixels * 2.0 - 1.0).transpose(0, 1)[None].to(self.device)
            return np.asarray(self.model(clip).float().cpu().numpy())


def load(folder: Path, device: str, protocol: MetricProtocol) -> I3DExtractor:
    model = I3D()
    found = load_weights(model, folder, "I3D (i3d_pretrained_400.pt)")
    return I3DExtractor(model.to(device), found, device, protocol)
