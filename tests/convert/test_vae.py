"""The OpenSora VAE 1.2: both halves find their places, and the codec computes what the halves compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from javis.convert import convert
from javis.errors import FailedError
from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig, VideoVAE
from javis.model.video_vae import OpenSoraVideoCodec, OpenSoraVideoCodecConfig

from .official import write_folder

diffusers = pytest.importorskip("diffusers")

SHIFT, SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)
TEMPORAL = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}
CONFIG = {  # the official one has no sizes of the halves; here they are small, and group norms do not show in shapes
    "model_type": "VideoAutoencoderPipeline",
    "vae_2d": {"type": "VideoAutoencoderKL", "norm_num_groups": 4},
    "vae_temporal": {"type": "VAE_Temporal_SD", "num_groups": 4},
    "shift": list(SHIFT),
    "scale": list(SCALE),
    "micro_frame_size": 17,
}


@pytest.fixture(scope="module")
def halves() -> tuple[Any, TemporalVAE]:
    torch.manual_seed(0)
    image = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    return image.eval(), TemporalVAE(TemporalVAEConfig(**TEMPORAL)).eval()


def official_state(halves: tuple[Any, TemporalVAE], *, old_attention: bool = False) -> dict[str, Tensor]:
    image, temporal = halves
    state = {f"spatial_vae.module.{n}": v for n, v in image.state_dict().items()}
    if old_attention:  # names and 1x1 convolutions of diffusers before 0.18
        new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for name in [n for n in state if ".attentions." in n]:
            for new, old in new_to_old.items():
                if new in name:
                    value = state.pop(name)
                    state[name.replace(new, old)] = value[..., None, None] if value.ndim == 2 else value
    state |= {f"temporal_vae.{n}": v for n, v in temporal.state_dict().items()}
    for name, values in (("shift", SHIFT), ("scale", SCALE)):
        state[name] = torch.tensor(values)[None, :, None, None, None]
    return {n: v.clone() for n, v in state.items()}


def converted(folder: Path) -> OpenSoraVideoCodec:
    config = OpenSoraVideoCodecConfig.from_dict(json.loads((folder / "video_vae" / "config.json").read_text()))
    codec = OpenSoraVideoCodec(config)
    codec.load_state_dict(load_file(folder / "video_vae" / "diffusion_pytorch_model.safetensors"), strict=True)
    return codec.eval()


@pytest.mark.parametrize("old", [False, True], ids=["today's names", "old attention"])
def test_the_codec_decodes_as_its_halves_do(tmp_path: Path, halves: tuple[Any, TemporalVAE], old: bool) -> None:
    report = convert(
        write_folder(tmp_path / "vae", official_state(halves, old_attention=old), CONFIG), tmp_path / "out"
    )
    assert report.kind == "video-vae" and not report.problems()
    codec = converted(tmp_path / "out")
    assert codec.config.image.block_out_channels == (8, 8, 16, 16) and codec.config.micro_frame_size == 17
    assert codec.config.temporal == TemporalVAEConfig(**TEMPORAL)
    image, temporal = halves
    z = torch.randn(1, 4, 6, 2, 2, generator=torch.Generator().manual_seed(1))  # 17 frames and 3 more
    with torch.no_grad():
        features = VideoVAE(temporal, shift=SHIFT, scale=SCALE).decode(z, 20)
        frames = image.decode(features[0].transpose(0, 1) / 0.18215).sample
        torch.testing.assert_close(codec.decode(z, 20)[0].transpose(0, 1), frames.clamp(-1, 1), atol=1e-5, rtol=0)
    assert {row["source"] for row in report.ignored} == {"shift", "scale"}


def test_what_no_file_tells_is_assumed_and_said(tmp_path: Path, halves: tuple[Any, TemporalVAE]) -> None:
    config = {"vae_2d": {"norm_num_groups": 4}, "vae_temporal": {"num_groups": 4}}
    state = official_state(halves)
    report = convert(write_folder(tmp_path / "vae", state, config), tmp_path / "out")
    assert report.components["video_vae"]["assumed"] == {"image.scaling_factor": 0.18215, "micro_frame_size": 17}
    assert converted(tmp_path / "out").config.shift == pytest.approx(SHIFT)


def test_constants_that_contradict_each_other(tmp_path: Path, halves: tuple[Any, TemporalVAE]) -> None:
    source = write_folder(tmp_path / "vae", official_state(halves), CONFIG | {"scale": [1.0, 1.0, 1.0, 1.0]})
    with pytest.raises(FailedError, match=r"config.json says scale \[1.0, 1.0, 1.0, 1.0\], the weights have \[3.85"):
        convert(source, tmp_path / "out")


def test_a_missing_half_is_missing(tmp_path: Path, halves: tuple[Any, TemporalVAE]) -> None:
    state = {n: v for n, v in official_state(halves).items() if "decoder.up_blocks.3" not in n}
    with pytest.raises(FailedError, match=r"missing video_vae/image.decoder.up_blocks.3"):
        convert(write_folder(tmp_path / "vae", state, CONFIG), tmp_path / "out")
