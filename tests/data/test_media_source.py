"""Files as batches of the engine: latents of the right clips, epoch after epoch, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from javis.data.feed import FeedPlan
from javis.data.media_source import MediaSource
from javis.data.pyav_feeder import PyAVFeeder
from javis.model.codecs import PatchAudioCodec, PatchTransformConfig, PatchVideoCodec
from javis.model.text import WordEncoder, WordEncoderConfig
from javis.model.vocoder import LogMelConfig
from javis.train.engine import BatchSource
from javis.world import render_video, sample_scene
from javis.world.make import make

from .media import world_rows

PLAN = FeedPlan(num_frames=32, height=64, width=64, fps=16, batch=2, workers=0, random_start=False)


class NoisyAudioCodec:
    """A codec whose latents are drawn, like those of a variational autoencoder."""

    def latent_sizes(self, samples: int) -> tuple[int, int]:
        return samples // 1600, 4

    def encode(self, audio: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        mean = audio.unflatten(1, (-1, 4, 400)).mean(-1)[:, None]
        return mean + torch.randn(mean.shape, generator=generator)

    def decode(self, latents: Tensor, samples: int, *, seeds: list[int] | None = None) -> Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make(folder, 4, seed=8)
    return folder


def source(world: Path, audio_codec: object = None) -> MediaSource:
    video = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=384))  # keeps everything
    audio = audio_codec or PatchAudioCodec(
        PatchTransformConfig(channels=1, patch=(4, 4), coefficients=16), LogMelConfig()
    )
    words = WordEncoder(WordEncoderConfig(vocabulary=("caption", *map(str, range(9)))))
    return MediaSource(PyAVFeeder(world_rows(world, 4), PLAN), video, audio, words, seed=3)  # type: ignore[arg-type]


def test_a_batch_holds_the_latents_and_captions_of_its_clips(world: Path) -> None:
    made: BatchSource = source(world)
    seen = []
    for _ in range(4):  # two epochs
        batch = made.next()
        assert batch["video"].shape == (2, 384, 16, 8, 8) and batch["video"].dtype == torch.float32
        assert batch["audio"].shape[:2] == (2, 16)
        assert batch["text"].shape[0] == 2 and batch["text_mask"].sum(1).tolist() == [2, 2]
        assert batch["fps"].tolist() == [16, 16] and batch["frames"].tolist() == [32, 32]
        assert batch["height"].tolist() == batch["width"].tolist() == [64, 64]
        codec = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=384))
        frames = (codec.decode(batch["video"], 32) + 1) * 127.5
        for clip, identity, caption in zip(frames, batch["ids"], batch["captions"], strict=True):
            number = int(identity.removeprefix("clip"))
            assert caption == f"caption {number}"
            truth = torch.from_numpy(render_video(sample_scene(8_000_000 + number))).permute(3, 0, 1, 2)
            assert (clip - truth).square().mean() < 255**2 / 10**3.2  # 32 dB: VP9
        seen += batch["ids"]
    assert sorted(seen[:4]) == sorted(seen[4:]) == [f"clip{i}" for i in range(4)]


def test_it_goes_on_where_it_was_saved_with_the_same_latents(world: Path) -> None:
    whole = source(world, NoisyAudioCodec())
    batches = [whole.next() for _ in range(5)]
    assert not torch.equal(batches[0]["audio"], batches[1]["audio"])
    for stop in (1, 2, 3):
        first, second = source(world, NoisyAudioCodec()), source(world, NoisyAudioCodec())
        for _ in range(stop):
            first.next()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for expected in batches[stop:]:
            got = second.next()
            assert got["ids"] == expected["ids"]
            for name in ("video", "audio", "text"):
                assert torch.equal(got[name], expected[name]), name
