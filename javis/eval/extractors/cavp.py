"""CAVP (Diff-Foley, Luo et al., arXiv 2306.17203): pictures and sounds, four vectors a second, in one space of 512.

A SlowOnly ResNet-50 over frames at 4 fps and a CNN14 over the mel spectrum, under the names of the public
``cavp_epoch66.ckpt``. The score is the mean cosine of the vectors of the same instants.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.eval.extractors.base import Extractor
from javis.eval.extractors.pictures import as_pixels, as_rgb, nearest_frames
from javis.eval.extractors.sound import mono_at
from javis.eval.extractors.weights import load_weights
from javis.eval.metrics.protocol import MetricProtocol

FPS, SIZE = 4.0, 224
RATE, N_FFT, HOP, BANDS = 16000, 1024, 250, 128
BATCH = 40  # frames that the network sees together
LEAST_SAMPLES = 16 * HOP  # CNN14 halves the spectrum four times
IGNORED = (r"logit_scale",)
_TRIPLE = tuple[int, int, int]


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm, under the names of mmcv's ConvModule."""

    def __init__(self, channels: int, out: int, kernel: _TRIPLE, stride: int = 1) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(channels, out, kernel, (1, stride, stride), padding, bias=False)
        self.bn = nn.BatchNorm3d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Bottleneck(nn.Module):
    """Three convolutions and a residual; the first looks over time where ``inflated``."""

    def __init__(self, channels: int, width: int, stride: int, *, inflated: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, width, (3 if inflated else 1, 1, 1))
        self.conv2 = ConvNorm(width, width, (1, 3, 3), stride)
        self.conv3 = ConvNorm(width, 4 * width, (1, 1, 1))
        changes = stride != 1 or channels != 4 * width
        self.downsample = ConvNorm(channels, 4 * width, (1, 1, 1), stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class SlowOnly(nn.Module):
    """Frames [B, 3, T, H, W] -> [B, T, 32 width]: ResNet-50 whose last two stages look at the neighbours in time."""

    def __init__(self, width: int, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width, (1, 7, 7), 2)
        channels = width
        for stage, count in enumerate(blocks):
            made = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                made.append(Bottleneck(channels, width << stage, stride, inflated=stage >= 2))
                channels = 4 * (width << stage)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.stages = len(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.conv1(x)), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.mean(dim=(3, 4)).transpose(1, 2)


class SpectrumBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU, then a mean over ``pool``."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)

    def forward(self, x: Tensor, pool: tuple[int, int]) -> Tensor:
        return F.avg_pool2d(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))), pool)


class Cnn14(nn.Module):
    """Spectra [B, 1, T, 128] -> [B, T // 16, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(BANDS)
        sizes = [1, *(width << i for i in range(6))]
        for i in range(6):
            self.add_module(f"conv_block{i + 1}", SpectrumBlock(sizes[i], sizes[i + 1]))
        self.fc1 = nn.Linear(sizes[-1], sizes[-1])
        self.final_project = nn.Linear(sizes[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x.transpose(1, 3)).transpose(1, 3)
        for i in range(6):
            x = self.get_submodule(f"conv_block{i + 1}")(x, ((2, 2), (1, 2), (1, 1))[max(0, i - 3)])
        x = x.mean(dim=3)
        x = (F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)).transpose(1, 2)
        x = F.relu(self.fc1(F.relu(self.fc1(x))))  # twice: so it was trained
        return self.final_project(x)


class Cavp(nn.Module):
    """Both encoders.

    Args:
        width: of the first layers; 64 is the public size.
        out: of the common space.
        blocks: of the stages of the ResNet.
    """

    def __init__(self, width: int = 64, out: int = 512, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.video_encoder = SlowOnly(width, blocks)
        self.video_project_head = nn.Linear(32 * width, out)
        self.spec_encoder = Cnn14(width, out)


@lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    from javis.model.mel import MelConfig, mel_filterbank

    return mel_filterbank(
        MelConfig(
            sample_rate=RATE, n_fft=N_FFT, win_length=N_FFT, hop_length=HOP, n_mels=BANDS, fmin=125.0, fmax=7600.0
        )
    )


def spectrum(wave: np.ndarray) -> Tensor:
    """Samples [N] at 16 kHz -> levels in 0..1 [1 + (N - 1) // 250, 128]: 0.01 is 1 dB, a magnitude of 1 is 0.8."""
    samples = torch.from_numpy(wave)[:-1] if len(wave) > 1 else torch.from_numpy(wave)
    spectra = torch.stft(
        samples, N_FFT, HOP, N_FFT, torch.hann_window(N_FFT), center=True, pad_mode="constant", return_complex=True
    )
    levels = torch.log10((_mel_filters() @ spectra.abs()).clamp_min(1e-5))
    return ((levels * 20.0 - 20.0 + 100.0) / 100.0).clamp(0.0, 1.0).T


class CavpExtractor(Extractor):
    """Unit vectors of the frames at 4 fps [T, 512], and of the sound [T', 512], four a second as well.

    Both begin together; T' may be one less at a ragged end. Compare the first ``min(T, T')``.
    """

    name = "cavp"
    modalities = frozenset({"video", "audio"})

    def __init__(self, model: Cavp, weights_hash: str, device: str) -> None:
        self.model, self.weights_hash, self.device = model, weights_hash, device

    def embed_video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        frames = as_rgb(frames)
        pixels = F.interpolate(
            as_pixels(frames[nearest_frames(len(frames), fps, FPS)]), (SIZE, SIZE), mode="bilinear", antialias=True
        )
        with torch.inference_mode():
            found = [
                self.model.video_project_head(self.model.video_encoder(part.transpose(0, 1)[None].to(self.device)))[0]
                for part in pixels.split(BATCH)
            ]
            return _unit(torch.cat(found))

    def embed_audio(self, waveform: np.ndarray, rate: int) -> np.ndarray:
        wave = mono_at(waveform, rate, RATE)
        given = spectrum(np.pad(wave, (0, max(0, LEAST_SAMPLES - len(wave)))))
        with torch.inference_mode():
            return _unit(self.model.spec_encoder(given[None, None].to(self.device))[0])


def _unit(vectors: Tensor) -> np.ndarray:
    return np.asarray(F.normalize(vectors.float(), dim=-1).cpu().numpy())


def load(folder: Path, device: str, protocol: MetricProtocol) -> CavpExtractor:
    model = Cavp()
    found = load_weights(model, folder, "CAVP (cavp_epoch66.ckpt)", ignored=IGNORED)
    return CavpExtractor(model.to(device), found, device)
