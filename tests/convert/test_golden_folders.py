"""The golden cases replayed on converted folders: the official numbers come out of what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from javis.convert import convert
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.prior import PriorConfig, PriorEstimator
from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig
from tests.golden import replay_dit, replay_prior, replay_vae
from tests.golden.harness import GoldenCase, golden_dir

from .official import write_folder

CASES = ("dit", "dit_plain", "dit_addition", "dit_modulate", "prior", "prior_det", "prior_onset", "vae_temporal")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    if not (golden_dir() / f"{request.param}.json").exists():
        pytest.skip(f"no golden case {request.param} in {golden_dir()}")
    return GoldenCase.load(golden_dir(), request.param)


def converted(case: GoldenCase, tmp_path: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and weights of the component ``name``, converted from what the case holds."""
    report = convert(write_folder(tmp_path / "in", case.weights(), case.config), tmp_path / "out")
    assert not report.problems() and not report.absent
    folder = tmp_path / "out" / name
    return json.loads((folder / "config.json").read_text()), load_file(folder / "diffusion_pytorch_model.safetensors")


def test_replay(case: GoldenCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.family == "dit":
        config, state = converted(case, tmp_path, "transformer")
        model = JavisDiT(JavisDiTConfig.from_dict(config)).eval()
        model.load_state_dict(state, strict=True)
        monkeypatch.setattr(replay_dit, "official_model", lambda case: model)
        replay_dit.replay(case)
    elif case.family == "prior":
        config, state = converted(case, tmp_path, "prior")
        estimator = PriorEstimator(PriorConfig.from_dict(config)).eval()
        estimator.load_state_dict(state, strict=True)
        with torch.no_grad():
            replay_prior.replay_encode(case, estimator)
            if case.children("out.loss"):
                replay_prior.replay_loss(case, estimator)
    else:
        replay_temporal(case, tmp_path)
    assert not case.unchecked()


def replay_temporal(case: GoldenCase, tmp_path: Path) -> None:
    """The recorded temporal VAE beside a small image VAE, which the official file holds as well."""
    diffusers = pytest.importorskip("diffusers")
    from javis.model.video_vae import OpenSoraVideoCodec, OpenSoraVideoCodecConfig

    image = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    state = {f"temporal_vae.{n}": v for n, v in case.weights().items()}
    state |= {f"spatial_vae.module.{n}": v.clone() for n, v in image.state_dict().items()}
    sizes = {n: v for n, v in case.config.items() if n in TemporalVAEConfig.__dataclass_fields__}
    constants = {n: case.config[n] for n in ("shift", "scale", "micro_frame_size")}
    official = {"vae_temporal": sizes, "vae_2d": {"norm_num_groups": 4}, **constants}
    report = convert(write_folder(tmp_path / "in", state, official), tmp_path / "out")
    assert not report.problems()
    folder = tmp_path / "out" / "video_vae"
    codec = OpenSoraVideoCodec(OpenSoraVideoCodecConfig.from_dict(json.loads((folder / "config.json").read_text())))
    codec.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    config = codec.config
    assert (config.shift, config.scale, config.micro_frame_size) == tuple(
        tuple(v) if isinstance(v, list) else v for v in constants.values()
    )
    own = GoldenCase(case.name, case.meta, {n: v for n, v in case.tensors.items() if not n.startswith("weights.")})
    vae: TemporalVAE = codec.temporal.eval()
    own.tensors |= {f"weights.{n}": v for n, v in vae.state_dict().items()}  # what replay reads is the converted file
    replay_vae.replay(own)
    assert not own.unchecked()
    case._checked |= own._checked
